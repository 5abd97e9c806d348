"""Positions in attention: the paper's relative positions, rotary tables with explicit positions, and T5's buckets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..ops import checks


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

    def arguments(
        self, num_queries: int, num_keys: int, offset: int = 0, heads: slice | None = None
    ) -> dict[str, torch.Tensor | None]:
        """The arguments `relative_key`, `content_bias` and `relative_bias` of the operations; see `forward`."""
        chosen = slice(None) if heads is None else heads
        biases = (None if x is None else _local(x)[chosen] for x in (self.content_bias, self.relative_bias))
        content_bias, relative_bias = biases
        return {
            "relative_key": self(num_queries, num_keys, offset, heads),
            "content_bias": content_bias,
            "relative_bias": relative_bias,
        }

    def forward(self, num_queries: int, num_keys: int, offset: int = 0, heads: slice | None = None) -> torch.Tensor:
        """-> [num_heads, num_queries + num_keys - 1, head_dim], the `relative_key` of the operations.

        Chunked cross-attention: num_queries = m, num_keys = r, offset = m - 1 (equation 6). Encoder cross-attention:
        r, m, 0 (equation 7). Self-attention: r, r, 0. `heads`: of these only.
        """
        weight = _local(self.projection.weight)
        compute = torch.float64 if weight.dtype == torch.float64 else torch.float32
        half = torch.arange(self.model_dim // 2, device=weight.device, dtype=compute)
        frequency = self.base ** (-2.0 * half / self.model_dim)
        first = offset - (num_keys - 1)
        distance = torch.arange(first, max(first, offset + num_queries), device=weight.device, dtype=compute)
        angle = distance[:, None] * frequency
        sinusoid = torch.cat([angle.sin(), angle.cos()], dim=-1).to(weight.dtype)
        if heads is None and weight is self.projection.weight:
            projected = self.projection(sinusoid)
        else:
            chosen = slice(None) if heads is None else heads
            projected = F.linear(sinusoid, weight.unflatten(0, (self.num_heads, self.head_dim))[chosen].flatten(0, 1))
        return projected.unflatten(-1, (-1, self.head_dim)).transpose(0, 1)

    def extra_repr(self) -> str:
        return f"model_dim={self.model_dim}, num_heads={self.num_heads}, head_dim={self.head_dim}, base={self.base:g}"


def _local(x: torch.Tensor) -> torch.Tensor:
    """This process's part of a parameter that is divided among several (a DTensor), with its gradient."""
    return x.to_local() if hasattr(x, "to_local") else x


class RotaryPositions(nn.Module):
    """Rotary tables of explicit query and key positions.

    Args:
        query_positions: the position of each row, any real numbers.
        key_positions: the position of each token of a neighbour (they restart for every neighbour) or of a chunk.
        rotary_dim: how many dimensions turn, even; frequency j is base^(-2j / rotary_dim).
        frequencies: the rotary_dim / 2 frequencies themselves, in place of those of the base.

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
        frequencies: Sequence[float] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if rotary_dim < 2 or rotary_dim % 2:
            raise ValueError(f"rotary_dim: got {rotary_dim}, expected an even number, as dimensions turn in pairs")
        self.query_positions = tuple(float(x) for x in query_positions)
        self.key_positions = tuple(float(x) for x in key_positions)
        self.rotary_dim, self.base = rotary_dim, base
        self.frequencies = None if frequencies is None else tuple(float(x) for x in frequencies)
        if self.frequencies is not None and len(self.frequencies) != rotary_dim // 2:
            raise ValueError(
                f"rotary_frequencies: got {len(self.frequencies)}, expected {rotary_dim // 2}, one for each pair of "
                f"rotary_dim = {rotary_dim}"
            )
        self._build(
            torch.get_default_device() if device is None else torch.device(device),
            torch.get_default_dtype() if dtype is None else dtype,
        )

    def _build(self, device: torch.device, module_dtype: torch.dtype) -> None:
        dtype = torch.float64 if module_dtype == torch.float64 else torch.float32
        # Frequencies are rounded to fp32 also in fp64 modules: every peer holds them in an fp32 buffer.
        exponent = torch.arange(0, self.rotary_dim, 2, device=device, dtype=torch.float32) / self.rotary_dim
        frequency = (1.0 / self.base**exponent).to(dtype)
        if self.frequencies is not None:
            frequency = torch.tensor(self.frequencies, device=device, dtype=torch.float32).to(dtype)
        for name, positions in (("query", self.query_positions), ("key", self.key_positions)):
            angle = torch.tensor(positions, device=device, dtype=dtype)[:, None] * frequency
            self.register_buffer(f"{name}_cos", angle.cos(), persistent=False)
            self.register_buffer(f"{name}_sin", angle.sin(), persistent=False)

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        self._build(self.query_cos.device, self.query_cos.dtype)
        return self

    def forward(self, num_keys: int, num_queries: int | None = None) -> tuple[tuple[torch.Tensor, torch.Tensor], ...]:
        """-> (cos, sin) of the first `num_queries` (default all) queries, [num_queries, rotary_dim / 2] each, and of
        the first `num_keys` keys, [num_keys, rotary_dim / 2] each.

        Raises ValueError when there are fewer positions.
        """
        num_queries = len(self.query_positions) if num_queries is None else num_queries
        for number, positions, what in (
            (num_queries, self.query_positions, "queries"),
            (num_keys, self.key_positions, "keys"),
        ):
            if number > len(positions):
                raise ValueError(
                    f"rotary positions: got {number} {what}, but this layer has positions for {len(positions)}; build "
                    "it with a larger retrieved_length, or with longer key_positions"
                )
        query = self.query_cos[:num_queries], self.query_sin[:num_queries]
        return query, (self.key_cos[:num_keys], self.key_sin[:num_keys])

    def extra_repr(self) -> str:
        return (
            f"queries={len(self.query_positions)}, keys={len(self.key_positions)}, "
            f"rotary_dim={self.rotary_dim}, base={self.base:g}"
        )


def t5_buckets(rows: int, num_keys: int, num_buckets: int, device: torch.device | str | None = None) -> torch.Tensor:
    """Linear T5 buckets, int64 [rows, num_keys]: the offset key - row, clamped to the `num_buckets` offsets that end at
    num_buckets // 2, counted from 0."""
    checks.integer("num_buckets", num_buckets, 1)
    high = num_buckets // 2
    low = high - num_buckets + 1
    offset = torch.arange(num_keys, device=device) - torch.arange(rows, device=device)[:, None]
    return offset.clamp(low, high) - low
