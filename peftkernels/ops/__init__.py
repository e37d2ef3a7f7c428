"""What the operators are: their call records, schemas, checks, meaning, and the types of their operands."""
