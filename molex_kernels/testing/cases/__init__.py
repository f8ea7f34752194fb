"""Sizes, options and inputs of every op, a file for each folder of `ops`."""
