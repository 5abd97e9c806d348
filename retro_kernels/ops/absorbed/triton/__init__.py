"""Triton kernels of the attention with absorbed projections."""
