"""The benchmark suite: cases, contestants, measurement, goals and report. Installed as `peftkernels.bench`."""
