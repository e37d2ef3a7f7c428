"""Figures that decide how the kernels go on: what parts of a product cost on a GPU, and what a training step launches.

`python -m bench.gpu.questions` measures them; `docs/notes/gpu.md` says what each decides, and has the answers.
"""
