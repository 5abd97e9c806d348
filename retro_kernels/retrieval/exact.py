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
HELD_BYTES = 1 << 30
"""Keys up to this size in fp32 are held so; larger ones are widened block by block at every search."""
CANCELLED = 0.05
"""|q|^2 + |x|^2 - 2 qx loses as many digits as it is smaller than |q|^2: below this share it is summed anew."""


class Keys:
    """The keys that queries are compared with.

    blocks: (number of the first, [count, dim] float16 or float32) each, arrays or tensors; a memory map is not copied
    unless it is small (`HELD_BYTES`) or `device` is not the CPU.
    """

    def __init__(self, blocks: Sequence[tuple[int, np.ndarray | Tensor]], device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")  # and nothing writes
            self.blocks = [(first, torch.as_tensor(block).to(device)) for first, block in blocks if len(block)]
        self._half: list[Tensor | None] = [None] * len(self.blocks)

    def hold(self) -> Keys:
        """Widens small keys once, and keeps their norms. -> self"""
        if sum(block.numel() * 4 for _, block in self.blocks) <= HELD_BYTES:
            self.blocks = [(first, block.float()) for first, block in self.blocks]
            self._half = [block.square().sum(-1) / 2 for _, block in self.blocks]
        return self

    def parts(self) -> list[tuple[int, Tensor, Tensor | None]]:
        """At most `KEYS` keys each: the number of the first, the keys, and half their squared norms where known."""
        return [
            (first + start, block[start : start + KEYS], None if half is None else half[start : start + KEYS])
            for (first, block), half in zip(self.blocks, self._half)
            for start in range(0, len(block), KEYS)
        ]

    def __getitem__(self, ids: Tensor) -> Tensor:
        """-> the keys of `ids`, of any shape, float32 [*ids.shape, dim]; a negative one gives zeros."""
        flat = ids.flatten().to(self.device)
        dim = self.blocks[0][1].shape[1] if self.blocks else 0
        if len(self.blocks) == 1 and bool((flat >= 0).all()):
            return self.blocks[0][1][flat - self.blocks[0][0]].float().view(*ids.shape, dim)
        out = torch.zeros(len(flat), dim, device=self.device)
        for first, block in self.blocks:
            rows = ((flat >= first) & (flat < first + len(block))).nonzero().flatten()
            out[rows] = block[flat[rows] - first].float()
        return out.view(*ids.shape, dim)


def search(keys: Keys, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k nearest keys of every query under squared L2, in fp32.

    queries: floating [q, dim]. -> distances float32 [q, k], ascending, and ids int64 [q, k], on the keys' device; where
    there are fewer than k keys, distance inf and id -1.
    """
    queries = queries.to(keys.device, torch.float32)
    scores = torch.full((len(queries), k), torch.inf, device=keys.device)
    ids = torch.full((len(queries), k), -1, dtype=torch.int64, device=keys.device)
    space = torch.empty(min(QUERIES, len(queries)) * KEYS, device=keys.device)
    for first, stored, half in keys.parts():
        block = stored.float()
        half = block.square().sum(-1) / 2 if half is None else half
        for at in range(0, len(queries), QUERIES):
            rows = slice(at, at + QUERIES)
            part = queries[rows]
            # |q - x|^2 / 2 without |q|^2 / 2, which all keys of a query have in common.
            out = space[: len(part) * len(block)].view(len(part), len(block))
            score, place = nearest(torch.addmm(half, part, block.T, alpha=-1, out=out), k)
            together = torch.cat([scores[rows], score], dim=-1)
            candidates = torch.cat([ids[rows], place + first], dim=-1)
            scores[rows], order = together.topk(k, largest=False)
            ids[rows] = candidates.gather(-1, order)
    norms = queries.square().sum(-1, keepdim=True)
    distances = 2 * scores + norms
    near = (distances < CANCELLED * norms).nonzero()
    if len(near):
        row, column = near.unbind(1)
        for at in range(0, len(row), KEYS):
            r, c = row[at : at + KEYS], column[at : at + KEYS]
            distances[r, c] = (queries[r] - keys[ids[r, c]]).square().sum(-1)
        distances, order = distances.sort(dim=-1, stable=True)
        ids = ids.gather(-1, order)
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


def rescored(keys: Keys, queries: Tensor, ids: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Of the candidates `ids` [q, c] (-1: none) the k nearest, by the distance that the stored keys give.

    -> distances float32 [q, k], ascending, and ids [q, k]; inf and -1 where there are fewer."""
    distances = (queries.to(keys.device, torch.float32)[:, None] - keys[ids]).square_().sum(-1)
    distances = distances.masked_fill(ids < 0, torch.inf)
    # A stable sort: keys at one distance stay in the order in which they came.
    distances, order = distances.sort(dim=-1, stable=True)
    return padded(distances[:, :k], ids.gather(-1, order)[:, :k], k)


def padded(distances: Tensor, ids: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """k columns: what is missing has the distance inf and the id -1."""
    short = k - ids.shape[-1]
    if short <= 0:
        return distances, ids
    pad = torch.nn.functional.pad
    return pad(distances, (0, short), value=torch.inf), pad(ids, (0, short), value=-1)
