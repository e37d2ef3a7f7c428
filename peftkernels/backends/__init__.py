"""Implementations of the operators declared in `peftkernels._ops`, one module a backend; none imports another."""
