"""The comparison of rank-allocation strategies: ``peftkernels demo --allocators all``."""
