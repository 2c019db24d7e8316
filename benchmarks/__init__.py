"""What pymistral does with a machine, measured. Each module is one command: ``python -m benchmarks.kernels --help``."""
