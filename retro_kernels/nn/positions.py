"""Positions in attention: the paper's relative positions, and rotary tables with explicit positions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn


class RelativePositions(nn.Module):
    """The paper's relative positional logits (appendix B.1.2): a projected sinusoid of the distance, one row per
    distance, and optionally Transformer-XL's two biases.

    A query at row i and a key at position t are `i - t + offset` apart. Row x of the table serves the pairs with
    i - t + num_keys - 1 = x, so it holds the distance x - (num_keys - 1) + offset.

    Args:
        model_dim: width of the sinusoid [sin | cos], even.
        num_heads, head_dim: the projection gives `head_dim` values per head; it has no bias.
        biases: learn `content_bias` (u) and `relative_bias` (v), each [num_heads, head_dim], both starting at zero.
        base: wavelengths run from 2 pi to `base` * 2 pi.

    Raises ValueError for an odd or non-positive width.
    """

    def __init__(
        self,
        model_dim: int,
        *,
        num_heads: int,
        head_dim: int,
        biases: bool = True,
        base: float = 10000.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if model_dim < 2 or model_dim % 2:
            raise ValueError(
                f"model_dim: got {model_dim}, expected an even number, as the sinusoid is half sines and half cosines"
            )
        self.model_dim, self.num_heads, self.head_dim, self.base = model_dim, num_heads, head_dim, base
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.projection = nn.Linear(model_dim, num_heads * head_dim, bias=False, **factory)
        self.content_bias: nn.Parameter | None
        self.relative_bias: nn.Parameter | None
        for name in ("content_bias", "relative_bias"):
            parameter = nn.Parameter(torch.zeros(num_heads, head_dim, **factory)) if biases else None
            self.register_parameter(name, parameter)

    def forward(self, num_queries: int, num_keys: int, offset: int = 0) -> torch.Tensor:
        """-> [num_heads, num_queries + num_keys - 1, head_dim], the `relative_key` of the operations.

        Chunked cross-attention: num_queries = m, num_keys = r, offset = m - 1 (equation 6). Encoder cross-attention:
        r, m, 0 (equation 7). Self-attention: r, r, 0.
        """
        weight = self.projection.weight
        compute = torch.float64 if weight.dtype == torch.float64 else torch.float32
        half = torch.arange(self.model_dim // 2, device=weight.device, dtype=compute)
        frequency = self.base ** (-2.0 * half / self.model_dim)
        distance = torch.arange(offset - (num_keys - 1), offset + num_queries, device=weight.device, dtype=compute)
        angle = distance[:, None] * frequency
        sinusoid = torch.cat([angle.sin(), angle.cos()], dim=-1).to(weight.dtype)
        return self.projection(sinusoid).unflatten(-1, (self.num_heads, self.head_dim)).transpose(0, 1)

    def extra_repr(self) -> str:
        return f"model_dim={self.model_dim}, num_heads={self.num_heads}, head_dim={self.head_dim}, base={self.base:g}"


class RotaryPositions(nn.Module):
    """Rotary tables of explicit query and key positions.

    Args:
        query_positions: the position of each row of an attending chunk, any real numbers.
        key_positions: the position of each token of a neighbour; they restart for every neighbour.
        rotary_dim: how many dimensions turn, even; frequency j is base^(-2j / rotary_dim).

    The tables are buffers that no state dict carries. They stay fp32 (fp64 in an fp64 module) whatever the module is
    cast to, because a position rounded to bfloat16 turns by the wrong angle.
    """

    query_cos: torch.Tensor
    query_sin: torch.Tensor
    key_cos: torch.Tensor
    key_sin: torch.Tensor

    def __init__(
        self,
        query_positions: Sequence[float],
        key_positions: Sequence[float],
        *,
        rotary_dim: int,
        base: float = 10000.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if rotary_dim < 2 or rotary_dim % 2:
            raise ValueError(f"rotary_dim: got {rotary_dim}, expected an even number, as dimensions turn in pairs")
        self.query_positions = tuple(float(x) for x in query_positions)
        self.key_positions = tuple(float(x) for x in key_positions)
        self.rotary_dim, self.base = rotary_dim, base
        self._build(
            torch.get_default_device() if device is None else torch.device(device),
            torch.get_default_dtype() if dtype is None else dtype,
        )

    def _build(self, device: torch.device, module_dtype: torch.dtype) -> None:
        dtype = torch.float64 if module_dtype == torch.float64 else torch.float32
        # Frequencies are rounded to fp32 also in fp64 modules: every peer holds them in an fp32 buffer.
        exponent = torch.arange(0, self.rotary_dim, 2, device=device, dtype=torch.float32) / self.rotary_dim
        frequency = (1.0 / self.base**exponent).to(dtype)
        for name, positions in (("query", self.query_positions), ("key", self.key_positions)):
            angle = torch.tensor(positions, device=device, dtype=dtype)[:, None] * frequency
            self.register_buffer(f"{name}_cos", angle.cos(), persistent=False)
            self.register_buffer(f"{name}_sin", angle.sin(), persistent=False)

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        self._build(self.query_cos.device, self.query_cos.dtype)
        return self

    def forward(self, retrieved_length: int) -> tuple[tuple[torch.Tensor, torch.Tensor], ...]:
        """-> (cos, sin) of the queries, each [m, rotary_dim / 2], and of the keys, each [r, rotary_dim / 2].

        Raises ValueError when neighbours are longer than there are key positions.
        """
        if retrieved_length > len(self.key_positions):
            raise ValueError(
                f"encoded: got neighbours of {retrieved_length} tokens, but this layer has {len(self.key_positions)} "
                "key positions; build it with a larger retrieved_length or with longer key_positions"
            )
        key = self.key_cos[:retrieved_length], self.key_sin[:retrieved_length]
        return (self.query_cos, self.query_sin), key

    def extra_repr(self) -> str:
        return (
            f"chunk_size={len(self.query_positions)}, retrieved_length={len(self.key_positions)}, "
            f"rotary_dim={self.rotary_dim}, base={self.base:g}"
        )
