"""Momentum over the outputs of expert layers."""
