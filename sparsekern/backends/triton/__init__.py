"""Triton kernels, for GPUs where nothing was compiled: those of normalisation with its activation."""
