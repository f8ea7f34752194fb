"""Sending tokens to their experts: grouped GEMM and the experts' MLP."""
