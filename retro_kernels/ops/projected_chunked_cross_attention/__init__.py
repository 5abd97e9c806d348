"""Chunked cross-attention from the encoder's states: the key and value projections are inside."""

from .api import projected_chunked_cross_attention
from .explanation import Estimate, Explanation, explain

__all__ = ["Estimate", "Explanation", "explain", "projected_chunked_cross_attention"]
