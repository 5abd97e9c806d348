"""Filters the chunks that an index finds to those that may be neighbours of a chunk (RETRO, sections 2.3 and 2.6).

All work on whole batches: q chunks with c candidates each, nearest first. A negative number stands for nothing, be it
an id, a document or a token, and is like nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor


def listed(found: Tensor, lists: Tensor) -> Tensor:
    """found int64 [q, c], lists int64 [q, d] -> bool [q, c]: is it in its own row's list?"""
    if not lists.shape[-1]:
        return torch.zeros_like(found, dtype=torch.bool)
    # Sorted, a list of thousands costs little more than one of two.
    ranked = lists.sort(dim=-1).values
    place = torch.searchsorted(ranked, found.contiguous()).clamp_(max=lists.shape[-1] - 1)
    return (ranked.gather(-1, place) == found) & (found >= 0)


def longest_common_stretch(chunks: Tensor, neighbours: Tensor) -> Tensor:
    """chunks integers [q, m], neighbours integers [q, c, r] -> int16 [q, c]: the length of the longest run of tokens
    that stands in the chunk and in the neighbour.

    Section 2.6 takes this "longest token substring common to both", over m, as the share of a chunk that a neighbour
    with its continuation gives away; the chunk's r(C) is the largest over its neighbours."""
    q, c, r = neighbours.shape
    if chunks.shape[-1] > torch.iinfo(torch.int16).max:
        raise ValueError(f"chunks: got {chunks.shape[-1]} tokens in each; expected at most 32,767")
    longest = torch.zeros(q, c, dtype=torch.int16, device=neighbours.device)
    # running[..., t + 1]: the common run that ends with the chunk's present token and with token t of the neighbour.
    running = torch.zeros(q, c, r + 1, dtype=torch.int16, device=neighbours.device)
    for token in chunks.unbind(-1):
        same = (neighbours == token[:, None, None]) & (token >= 0)[:, None, None]
        running[..., 1:] = (running[..., :-1] + 1) * same
        if r:
            longest = torch.maximum(longest, running.amax(-1))
    return longest


def repeated(neighbours: Tensor, kept: Tensor) -> Tensor:
    """neighbours integers [q, c, r], kept bool [q, c] -> bool [q, c]: does an earlier kept candidate of the same row
    have the same tokens? Only kept ones repeat or are repeated."""
    r = neighbours.shape[-1]
    # Odd factors, the same in every process; products wrap round.
    factors = torch.randint(-(1 << 62), 1 << 62, (r,), generator=torch.Generator().manual_seed(0)) * 2 + 1
    hashes = (neighbours.long() * factors.to(neighbours.device)).sum(-1)
    # Within equal hashes the kept ones come first, in their order.
    order = torch.argsort(~kept, dim=-1, stable=True)
    order = order.gather(-1, torch.argsort(hashes.gather(-1, order), dim=-1, stable=True))
    ranked, kept_ranked = hashes.gather(-1, order), kept.gather(-1, order)
    again = torch.zeros_like(kept)
    again[:, 1:] = (ranked[:, 1:] == ranked[:, :-1]) & kept_ranked[:, 1:] & kept_ranked[:, :-1]
    row, place = again.nonzero(as_tuple=True)
    # Equal hashes of different tokens are next to impossible, and must not drop a neighbour.
    pairs = neighbours[row, order[row, place]] == neighbours[row, order[row, place - 1]]
    again[row, place] = pairs.all(-1)
    return torch.zeros_like(kept).scatter_(-1, order, again)
