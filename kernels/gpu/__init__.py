"""Triton kernels for NVIDIA GPUs. Each module has one operation; `cases` lists what is checked on a real GPU."""
