"""The encoder that `retrofit(encoder="fresh")` adds."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ...nn import NeighbourEncoder


class FreshEncoder(nn.Module):
    """A `rk.nn.NeighbourEncoder` over the decoder's embeddings, without the paper's conditioning on the chunk: it reads
    a neighbour alone, so that what it gives can be kept."""

    def __init__(self, decoder: Any, chunk_size: int, retrieved_length: int) -> None:
        super().__init__()
        table = decoder.get_input_embeddings()
        heads = decoder.config.get_text_config().num_attention_heads
        width = table.embedding_dim
        self._table = (table,)  # the decoder's, in a tuple, because it is no part of this one
        self.inner = NeighbourEncoder(
            width,
            num_heads=heads if width % heads == 0 else 1,
            chunk_size=chunk_size,
            retrieved_length=retrieved_length,
            cross_attention_layers=(),
        )

    def forward(self, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """tokens int64 [s, r], mask bool [s, r] -> states [s, r, e]."""
        embedded = self._table[0](tokens)[None, :, None]
        hidden = embedded.new_zeros(1, 0, embedded.shape[-1])
        return self.inner(embedded, hidden, mask[None, :, None])[0, :, 0]
