"""The kernels of the layer operators, one a file, each with the forms in which it is compiled."""
