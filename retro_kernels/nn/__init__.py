"""Layers: thin `torch.nn.Module`s over the operations."""

from .chunked_cross_attention import ChunkedCrossAttention, project_neighbours
from .neighbour_cache import NeighbourCache
from .neighbour_encoder import NeighbourEncoder
from .positions import RelativePositions, RotaryPositions

__all__ = [
    "ChunkedCrossAttention",
    "NeighbourCache",
    "NeighbourEncoder",
    "RelativePositions",
    "RotaryPositions",
    "project_neighbours",
]
