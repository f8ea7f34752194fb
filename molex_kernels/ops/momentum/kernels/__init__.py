"""Triton kernels of the momentum ops."""
