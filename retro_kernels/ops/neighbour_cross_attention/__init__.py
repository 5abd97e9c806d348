"""Cross-attention of the neighbours to their chunk, section 2.3 of the RETRO paper (arXiv 2112.04426)."""

from .api import neighbour_cross_attention

__all__ = ["neighbour_cross_attention"]
