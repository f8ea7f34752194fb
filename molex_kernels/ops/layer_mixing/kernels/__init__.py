"""Triton kernels of layer mixing and their launchers."""
