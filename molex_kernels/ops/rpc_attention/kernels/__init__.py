"""Triton kernels of the attention ops."""
