"""Callbacks that watch a run and act on it: rollback, freezing, learning rates and accumulation."""
