"""Exact search: every key is compared, and no more than a block of distances exists at a time.

The floor is one multiplication of all queries with all keys, 2 * q * count * dim operations, or one read of the keys
where queries are few. On the CPU what is added to it is one pass over the distances: `topk` looks at the least distance
of every 32 keys only, because the k nearest keys lie in the k groups with the nearest members.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

KEYS, QUERIES, GROUP = 16384, 1024, 32
"""Keys and queries of a block of distances; keys of a group."""


def search(
    keys: Sequence[tuple[int, Tensor]], queries: Tensor, k: int, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """The k nearest keys of every query under squared L2, summed in fp32.

    keys: (number of the first, [count, dim] float16 or float32) blocks, on any device; queries: float32 [q, dim].
    -> distances float32 [q, k], ascending, and ids int64 [q, k], both on `device`; where there are fewer than k keys,
    distance inf and id -1.
    """
    queries = queries.to(device, torch.float32)
    distances = torch.full((len(queries), k), torch.inf, device=device)
    ids = torch.full((len(queries), k), -1, dtype=torch.int64, device=device)
    for first, stored in keys:
        for start in range(0, len(stored), KEYS):
            block = stored[start : start + KEYS].to(device, torch.float32)
            half = block.square().sum(-1) / 2
            for at in range(0, len(queries), QUERIES):
                rows = slice(at, at + QUERIES)
                # |q - x|^2 / 2 without |q|^2 / 2, which every key of a query has.
                score, place = nearest(torch.addmm(half, queries[rows], block.T, alpha=-1), k)
                scores = torch.cat([distances[rows], score], dim=-1)
                candidates = torch.cat([ids[rows], place + (first + start)], dim=-1)
                distances[rows], order = scores.topk(k, largest=False)
                ids[rows] = candidates.gather(-1, order)
    for at in range(0, len(queries), QUERIES):
        rows = slice(at, at + QUERIES)
        distances[rows], ids[rows] = rescored(keys, queries[rows], ids[rows], k)
    return distances, ids


def nearest(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The least k of each row of `scores` [q, n], or all n where there are fewer. -> values, places [q, min(k, n)]"""
    count = scores.shape[-1]
    if k * GROUP * 2 > count:
        return scores.topk(min(k, count), largest=False)
    whole = count // GROUP * GROUP
    groups = scores[:, :whole].unflatten(-1, (-1, GROUP))
    chosen = groups.amin(-1).topk(k, largest=False).indices
    places = (chosen[..., None] * GROUP + torch.arange(GROUP, device=scores.device)).flatten(-2)
    if whole < count:
        rest = torch.arange(whole, count, device=scores.device).expand(len(scores), -1)
        places = torch.cat([places, rest], dim=-1)
    values, order = scores.gather(-1, places).topk(k, largest=False)
    return values, places.gather(-1, order)


def rescored(keys: Sequence[tuple[int, Tensor]], queries: Tensor, ids: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Of the candidates `ids` [q, c] (-1: none) the k nearest, by the distance that the stored keys give.

    -> distances float32 [q, k], ascending, and ids [q, k]; inf and -1 where there are fewer."""
    found = gather(keys, ids)
    distances = (queries.to(ids.device, torch.float32)[:, None] - found).square_().sum(-1)
    distances = distances.masked_fill(ids < 0, torch.inf)
    # A stable sort: keys at one distance stay in the order in which they came.
    distances, order = distances.sort(dim=-1, stable=True)
    distances, ids = distances[:, :k], ids.gather(-1, order)[:, :k]
    short = k - ids.shape[-1]
    if short > 0:
        distances = torch.nn.functional.pad(distances, (0, short), value=torch.inf)
        ids = torch.nn.functional.pad(ids, (0, short), value=-1)
    return distances, ids


def gather(keys: Sequence[tuple[int, Tensor]], ids: Tensor) -> Tensor:
    """-> the keys of `ids` (any shape; a negative one gives zeros), float32 [*ids.shape, dim], on the ids' device."""
    flat = ids.flatten()
    out = torch.zeros(len(flat), keys[0][1].shape[1] if keys else 0, device=ids.device)
    for first, stored in keys:
        rows = ((flat >= first) & (flat < first + len(stored))).nonzero().flatten()
        if len(rows):
            out[rows] = stored[(flat[rows] - first).to(stored.device)].to(ids.device, torch.float32)
    return out.view(*ids.shape, -1)


def tensors(blocks: Sequence[tuple[int, np.ndarray]]) -> list[tuple[int, Tensor]]:
    """Memory maps as tensors, without a copy."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")  # and nothing writes
        return [(first, torch.from_numpy(block)) for first, block in blocks if len(block)]
