"""Triton kernels of the dispatch ops."""
