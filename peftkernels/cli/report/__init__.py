"""``peftkernels report``: what an allocator decided in a run, as one page and its pictures."""
