"""Measurements whose results are committed under `bench/results/`."""
