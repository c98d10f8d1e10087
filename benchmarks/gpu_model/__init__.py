"""Predicts the speed of the CUDA kernels from their machine code, for machines without a GPU."""
