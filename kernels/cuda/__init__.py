"""Kernels for NVIDIA GPUs, in CUDA C, and their declarations in Python.

`ops` says how each is launched, `planes` how weights lie in memory, `device` loads and launches them through CuPy.
"""
