"""The benchmark on a GPU: cases, contestants on the device, sampled verification, a time budget, tables and plots.

`python -m bench.gpu` runs it; `bench/run_gpu.sh` builds, tests, calibrates and runs it in one command.
"""
