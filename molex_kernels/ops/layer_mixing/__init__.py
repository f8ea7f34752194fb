"""Mixing of layers chosen on the device (MoLEx)."""
