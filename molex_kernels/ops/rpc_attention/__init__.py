"""Robust and scaled attention (RPC-Attention)."""
