"""Decoding with chunked cross-attention: new tokens against the cached neighbours of the chunk each sequence is in."""

from .api import chunked_cross_attention_decode

__all__ = ["chunked_cross_attention_decode"]
