"""Chunked cross-attention (CCA), section 2.4 of the RETRO paper (arXiv 2112.04426)."""

from .api import backends, chunked_cross_attention

__all__ = ["backends", "chunked_cross_attention"]
