"""What several of the kernels, or of the code that launches them, use."""
