"""Curvature-aware merging of experts (CAMEx): weights merged anew for every segment."""
