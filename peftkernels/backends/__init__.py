"""What implements the operators that `peftkernels.ops` declares, a module for each backend; none imports another."""
