"""Layers: thin `torch.nn.Module`s over the operations."""

from .chunked_cross_attention import ChunkedCrossAttention
from .positions import RelativePositions, RotaryPositions

__all__ = ["ChunkedCrossAttention", "RelativePositions", "RotaryPositions"]
