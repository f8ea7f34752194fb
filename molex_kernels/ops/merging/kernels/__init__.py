"""Triton kernels of the merging op."""
