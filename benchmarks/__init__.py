"""Microbenchmarks of every op, and a training run on real text."""
