"""What the operator tests share: random cases, the oracle with its error budgets, checks, and deliberate faults."""
