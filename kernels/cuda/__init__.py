"""Kernels for NVIDIA GPUs, in CUDA C, and their declarations in Python.

`linear`, `rowwise`, `attention`, `moe` and `sampling` say how each is launched, `planes` how weights lie in memory, `device` loads and
launches them through CuPy.
"""
