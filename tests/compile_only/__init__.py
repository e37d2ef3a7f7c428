"""Triton's kernels compiled to machine code and examined, which needs no GPU."""
