"""The comparison of rank-allocation strategies: ``python -m demo --allocators all``."""
