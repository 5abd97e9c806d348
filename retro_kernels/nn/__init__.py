"""Layers: thin `torch.nn.Module`s over the operations."""

from .chunked_cross_attention import ChunkedCrossAttention, project_neighbours
from .neighbour_cache import NeighbourCache
from .neighbour_encoder import NeighbourEncoder
from .positions import RelativePositions, RotaryPositions
from .retro_decoder_block import CausalSelfAttention, RetroDecoderBlock, SelfAttentionCache

__all__ = [
    "CausalSelfAttention",
    "ChunkedCrossAttention",
    "NeighbourCache",
    "NeighbourEncoder",
    "RelativePositions",
    "RetroDecoderBlock",
    "RotaryPositions",
    "SelfAttentionCache",
    "project_neighbours",
]
