"""Search over budgets: an outer loop that tries whole fine-tunings and learns which budgets to try next (Optuna)."""

from peftkernels.allocation.search.space import BudgetSpace, Candidate
from peftkernels.allocation.search.study import Asked, BudgetSearch, Finished, Pruned, cost_of_ranks

__all__ = ["Asked", "BudgetSearch", "BudgetSpace", "Candidate", "Finished", "Pruned", "cost_of_ranks"]
