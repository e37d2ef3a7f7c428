"""Tensor code on the library's products: runs on every device, in every dtype; what the others must beat or equal."""
