"""Triton kernels of the routing ops and their launchers."""
