"""Launches through Triton's own launcher onto a driver that computes nothing, in a process without a GPU.

`python -m support.driver.launches FOLDER` makes the calls, with `libcuda.c` built as FOLDER/libcuda.so.1, and prints
what was launched and what was wrong with it.
"""
