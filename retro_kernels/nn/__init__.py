"""Layers: thin `torch.nn.Module`s over the operations."""

from .chunked_cross_attention import ChunkedCrossAttention
from .neighbour_encoder import NeighbourEncoder
from .positions import RelativePositions, RotaryPositions

__all__ = ["ChunkedCrossAttention", "NeighbourEncoder", "RelativePositions", "RotaryPositions"]
