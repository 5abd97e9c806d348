"""Chunked cross-attention (CCA), section 2.4 of the RETRO paper (arXiv 2112.04426)."""

from .api import chunked_cross_attention

__all__ = ["chunked_cross_attention"]
