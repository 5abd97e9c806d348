"""Self-attention within each retrieved neighbour, section 2.3 of the RETRO paper (arXiv 2112.04426)."""

from .api import neighbour_self_attention

__all__ = ["neighbour_self_attention"]
