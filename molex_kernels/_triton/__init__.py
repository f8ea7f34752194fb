"""What kernels share: tiles, launch configurations."""
