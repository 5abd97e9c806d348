"""Exact search: every key is compared, and no more than a block of distances exists at a time.

What is found follows from the keys and the queries alone, not from k, from blocks, or from the device: the k keys that
come first when all are sorted by `squared_distances` and, where those are equal, by number. A search has two steps.

1. Scores of all keys, by a matrix product, choose a few candidates more than k. The floor is one multiplication of all
   queries with all keys, 2 * q * count * dim operations, or one read of the keys where queries are few. On the CPU what
   is added to it is one pass over the scores: `nearest` looks at the least score of every 32 keys only, because the k
   nearest keys lie in the k groups with the nearest members.
2. Candidates are compared by `squared_distances`. A key that is no candidate could still be among the k nearest where
   the scores' rounding errors (`_uncertainty`) allow it, as with more equal keys than candidates. For such queries all
   keys that could be are compared in a second pass.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

KEYS, QUERIES, GROUP = 16384, 1024, 32
"""Keys and queries of a block of scores; keys of a group."""
KEYS_ON_A_GPU = 1 << 17
SPARE = 8
"""Candidates beyond k."""
HELD_BYTES = 1 << 30
"""Keys up to this size in fp32 are held so; larger ones are widened block by block at every search."""
NUMBERS = 1 << 20
"""Numbers of keys that `squared_distances` is given at a time."""


class Keys:
    """The keys that queries are compared with.

    blocks: (number of the first, [count, dim] float16 or float32) each, arrays or tensors, one after another. A memory
    map is not copied unless it is small (`HELD_BYTES`) or `device` is not the CPU, where all become one tensor.
    """

    def __init__(self, blocks: Sequence[tuple[int, np.ndarray | Tensor]], device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")  # and nothing writes
            self.blocks = [(first, torch.as_tensor(block)) for first, block in blocks if len(block)]
        if self.device.type != "cpu" and self.blocks:
            self.blocks = [(self.blocks[0][0], _joined([block for _, block in self.blocks], self.device))]
        self._half: list[Tensor | None] = [None] * len(self.blocks)

    @property
    def count(self) -> int:
        """The number of keys."""
        return sum(len(block) for _, block in self.blocks)

    def hold(self) -> Keys:
        """Widens small keys once, and keeps their norms. -> self"""
        if sum(block.numel() * 4 for _, block in self.blocks) <= HELD_BYTES:
            self.blocks = [(first, block.float()) for first, block in self.blocks]
            self._half = [_half_norms(block) for _, block in self.blocks]
        return self

    def parts(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        """At most `KEYS` keys each: the number of the first, the keys in fp32, and half their squared norms."""
        step = KEYS if self.device.type == "cpu" else KEYS_ON_A_GPU
        for (first, block), half in zip(self.blocks, self._half):
            for start in range(0, len(block), step):
                part = block[start : start + step].float()
                yield first + start, part, _half_norms(part) if half is None else half[start : start + step]

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


def squared_distances(queries: Tensor, keys: Tensor) -> Tensor:
    """queries, keys: float32 [..., dim], broadcast against each other. -> float32 [...], sums of squared differences.

    The second half of the squares is added to the first, and so on: the same additions in the same order on every
    device and for every shape, so that equal keys have equal distances, to the bit."""
    squares = (queries - keys).square_()
    width = squares.shape[-1]
    while width > 1:
        first = (width + 1) // 2
        squares[..., : width - first] += squares[..., first:width]
        width = first
    return squares.sum(-1) if width == 0 else squares[..., 0].clone()


@torch.no_grad()
def search(keys: Keys, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k nearest keys of every query under squared L2, in fp32.

    queries: floating [q, dim]. -> distances float32 [q, k], ascending, of equal ones the least number first, and ids
    int64 [q, k], on the keys' device; where there are fewer than k keys, distance inf and id -1.
    """
    queries = queries.to(keys.device, torch.float32)
    wide = min(k + SPARE, keys.count)
    # An explicit `out=` keeps autocast off the product.
    scores, candidates, longest = _candidates(keys, queries, wide)
    distances, ids = rescored(keys, queries, candidates, k)
    if wide < keys.count and len(queries):
        norms = queries.square().sum(-1)
        uncertain = _uncertainty(queries.shape[-1]) * (norms.sqrt() + longest) ** 2
        # No key that is not a candidate has a lower score than the worst candidate.
        open_rows = (2 * scores.amax(-1) + norms - uncertain <= distances[:, -1]).nonzero()[:, 0]
        if len(open_rows):
            limits = (distances[open_rows, -1] - norms[open_rows] + uncertain[open_rows]) / 2
            distances[open_rows], ids[open_rows] = _all_within(keys, queries[open_rows], limits, k)
    return distances, ids


def _joined(blocks: list[Tensor], device: torch.device) -> Tensor:
    if len(blocks) == 1:
        return blocks[0].to(device)
    whole = torch.empty(sum(map(len, blocks)), blocks[0].shape[1], dtype=blocks[0].dtype, device=device)
    for part, block in zip(whole.split([len(block) for block in blocks]), blocks):
        part.copy_(block)
    return whole


def _half_norms(keys: Tensor) -> Tensor:
    return keys.square().sum(-1) / 2


def _uncertainty(dim: int) -> float:
    """How far 2 * score + |q|^2 and `squared_distances` may lie apart, over (|q| + |x|)^2 of the longest key x.

    Sums of dim numbers, in any order, are off by dim * 2^-24 of the sum of their sizes at most. Where the user lets
    torch round factors first, to TF32 or bfloat16, they are off by that too."""
    rounded = {"highest": 0.0, "high": 2.0**-11, "medium": 2.0**-8}
    return (dim + 16) * 2.0**-24 + rounded[torch.get_float32_matmul_precision()]


def _scores(queries: Tensor, keys: Tensor, half: Tensor, space: Tensor) -> Tensor:
    """|q - x|^2 / 2 without |q|^2 / 2, which all keys of a query have in common. -> [q, count], in `space`"""
    out = space[: len(queries) * len(keys)].view(len(queries), len(keys))
    return torch.addmm(half, queries, keys.T, alpha=-1, out=out)


def _space(keys: Keys, queries: Tensor) -> Tensor:
    largest = min(KEYS if keys.device.type == "cpu" else KEYS_ON_A_GPU, keys.count)
    return torch.empty(min(QUERIES, len(queries)) * largest, device=keys.device)


def _candidates(keys: Keys, queries: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """-> the k least scores of every query [q, k], the numbers of their keys [q, k], and the longest key's norm."""
    scores = torch.full((len(queries), k), torch.inf, device=keys.device)
    ids = torch.full((len(queries), k), -1, dtype=torch.int64, device=keys.device)
    longest = torch.zeros((), device=keys.device)
    space = _space(keys, queries)
    for first, part, half in keys.parts():
        longest = torch.maximum(longest, half.amax())
        for at in range(0, len(queries), QUERIES):
            rows = slice(at, at + QUERIES)
            score, place = nearest(_scores(queries[rows], part, half, space), k)
            together = torch.cat([scores[rows], score], dim=-1)
            numbers = torch.cat([ids[rows], place + first], dim=-1)
            scores[rows], order = together.topk(k, largest=False)
            ids[rows] = numbers.gather(-1, order)
    return scores, ids, (2 * longest).sqrt()


def _all_within(keys: Keys, queries: Tensor, limits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k nearest of the keys whose score is at most `limits` [q], at least k for each. -> distances, ids [q, k]"""
    row = torch.empty(0, dtype=torch.int64, device=keys.device)
    distance, number = torch.empty(0, device=keys.device), row
    space = _space(keys, queries)
    for first, part, half in keys.parts():
        for at in range(0, len(queries), QUERIES):
            within = _scores(queries[at : at + QUERIES], part, half, space) <= limits[at : at + QUERIES, None]
            for pairs in within.nonzero().split(max(1, NUMBERS // queries.shape[-1])):
                new, place = pairs[:, 0] + at, pairs[:, 1]
                row = torch.cat([row, new])
                distance = torch.cat([distance, squared_distances(queries[new], part[place])])
                number = torch.cat([number, place + first])
                row, distance, number = _first_of_each(row, distance, number, k)
    return distance.view(-1, k), number.view(-1, k)


def _first_of_each(row: Tensor, distance: Tensor, number: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of the entries of every row the k nearest, by row and distance. Entries of a row come in the order of their
    numbers, or, at one distance, keep it."""
    for by_row in (False, True):
        order = (row if by_row else distance).argsort(stable=True)
        row, distance, number = row[order], distance[order], number[order]
    rank = torch.arange(len(row), device=row.device) - torch.searchsorted(row, row)
    first = rank < k
    return row[first], distance[first], number[first]


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

    -> distances float32 [q, k], ascending, of equal ones the least number first, and ids [q, k]; inf and -1 where there
    are fewer."""
    queries, ids = queries.to(keys.device, torch.float32), ids.to(keys.device)
    distances = torch.empty(ids.shape, device=keys.device)
    width = max(1, min(ids.shape[1], NUMBERS // max(1, queries.shape[-1])))
    rows = max(1, NUMBERS // max(1, queries.shape[-1] * width))
    for at in range(0, len(ids), rows):
        for column in range(0, ids.shape[1], width):
            part = slice(at, at + rows), slice(column, column + width)
            distances[part] = squared_distances(queries[part[0], None], keys[ids[part]])
    return padded(*in_order(distances.masked_fill_(ids < 0, torch.inf), ids), k)


def in_order(distances: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Rows sorted by distance and, where distances are equal, by number; what is missing (-1) comes last."""
    missing = ids < 0
    ids, order = ids.masked_fill(missing, torch.iinfo(torch.int64).max).sort(dim=-1)
    distances, by_distance = distances.masked_fill(missing, torch.inf).gather(-1, order).sort(dim=-1, stable=True)
    ids = ids.gather(-1, by_distance)
    return distances, ids.masked_fill_(ids == torch.iinfo(torch.int64).max, -1)


def padded(distances: Tensor, ids: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The first k columns: what is missing has the distance inf and the id -1."""
    short = k - ids.shape[-1]
    if short <= 0:
        return distances[:, :k], ids[:, :k]
    pad = torch.nn.functional.pad
    return pad(distances, (0, short), value=torch.inf), pad(ids, (0, short), value=-1)
