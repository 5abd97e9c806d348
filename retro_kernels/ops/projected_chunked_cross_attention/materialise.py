"""The materialised strategy: keys and values are made by one matrix product and attended to in place."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from ..chunked_cross_attention import chunked_cross_attention


def project(
    encoded: torch.Tensor, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor | None]
) -> tuple[torch.Tensor, ...]:
    """`encoded` [..., e] through every weight [hk, d, e] (+ bias [hk, d]) in one matrix product -> [..., hk, d] each,
    side by side in memory."""
    flat = [weight.flatten(0, 1) for weight in weights]
    bias = None
    if any(x is not None for x in biases):
        bias = torch.cat([
            weight.new_zeros(weight.shape[:2]).flatten() if x is None else x.to(weight.dtype).flatten()
            for weight, x in zip(weights, biases)
        ])  # fmt: skip
    together = F.linear(encoded, flat[0] if len(flat) == 1 else torch.cat(flat), bias)
    parts = together.split([x.shape[0] for x in flat], dim=-1)
    return tuple(part.unflatten(-1, weight.shape[:2]) for part, weight in zip(parts, weights))


def attend(
    query: torch.Tensor,
    encoded: torch.Tensor,
    weights: tuple[torch.Tensor, torch.Tensor],
    biases: tuple[torch.Tensor | None, torch.Tensor | None],
    **options,
) -> tuple[torch.Tensor, torch.Tensor]:
    """-> out, lse of `chunked_cross_attention` on the projected states."""
    key, value = project(encoded, weights, biases)
    return chunked_cross_attention(query, key, value, return_lse=True, **options)  # type: ignore[return-value]
