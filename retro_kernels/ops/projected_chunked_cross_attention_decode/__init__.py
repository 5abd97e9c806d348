"""Decoding with chunked cross-attention from cached encoder states: the projections act on the query and the result."""

from .api import projected_chunked_cross_attention_decode

__all__ = ["projected_chunked_cross_attention_decode"]
