"""Whole models on real data."""
