"""Chunked cross-attention from the encoder's states: the key and value projections are inside."""

from .api import projected_chunked_cross_attention

__all__ = ["projected_chunked_cross_attention"]
