"""What kernels share: arguments, tiles, launches and their configurations by chip."""
