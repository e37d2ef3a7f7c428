"""The benchmark suite: cases, contestants, measurement, goals and report. `python -m bench` at the root runs it."""
