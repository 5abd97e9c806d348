"""The filters against loops over their definitions."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from retro_kernels.retrieval.corpus import filters


def stretch(chunk: list[int], neighbour: list[int]) -> int:
    """The longest run of tokens that is in both, by trying all."""
    runs = {tuple(chunk[a:b]) for a in range(len(chunk)) for b in range(a + 1, len(chunk) + 1)}
    there = {tuple(neighbour[a:b]) for a in range(len(neighbour)) for b in range(a + 1, len(neighbour) + 1)}
    return max((len(run) for run in runs & there if min(run) >= 0), default=0)


def test_the_longest_common_stretch_is_the_longest_token_substring():
    random = np.random.default_rng(0)
    for m, r, kinds in ((6, 9, 2), (5, 3, 3), (1, 1, 2), (4, 0, 2)):
        chunks = random.integers(-1, kinds, (7, m))
        neighbours = random.integers(-1, kinds, (7, 5, r))
        found = filters.longest_common_stretch(torch.from_numpy(chunks), torch.from_numpy(neighbours))
        assert found.tolist() == [
            [stretch(chunk.tolist(), one.tolist()) for one in row] for chunk, row in zip(chunks, neighbours)
        ]
    # A subsequence with gaps is no substring; what is absent is like nothing, absent things included.
    gaps = filters.longest_common_stretch(torch.tensor([[1, 2, 3, 4]]), torch.tensor([[[1, 9, 2, 9, 3, 4], [-1] * 6]]))
    assert gaps.tolist() == [[2, 0]]
    assert filters.longest_common_stretch(torch.tensor([[-1, -1]]), torch.tensor([[[-1, -1]]])).tolist() == [[0]]


def test_listed_looks_in_its_own_row_only():
    found = torch.tensor([[3, -1, 4], [3, 4, 5]])
    assert filters.listed(found, torch.tensor([[4, -1], [5, 3]])).tolist() == [
        [False, False, True],
        [True, False, True],
    ]
    assert not filters.listed(found, torch.empty(2, 0, dtype=torch.int64)).any()
    random = torch.Generator().manual_seed(0)
    found = torch.randint(-1, 20, (6, 9), generator=random)
    lists = torch.randint(-1, 20, (6, 5), generator=random)
    got = filters.listed(found.mT.contiguous().mT, lists)
    for row, of, hits in zip(found.tolist(), lists.tolist(), got.tolist()):
        assert hits == [one >= 0 and one in of for one in row]


@pytest.mark.parametrize("colliding", [False, True])
def test_repeated_keeps_the_first_kept_of_equal_ones(colliding: bool, monkeypatch: pytest.MonkeyPatch):
    """Where permutations of tokens have one hash, none is dropped for another: tokens decide, not hashes."""
    if colliding:
        monkeypatch.setattr(torch, "randint", lambda low, high, size, generator: torch.zeros(size, dtype=torch.int64))
    random = np.random.default_rng(1)
    neighbours = torch.from_numpy(random.integers(0, 3, (20, 15, 3)))
    kept = torch.from_numpy(random.random((20, 15)) < 0.7)
    found = filters.repeated(neighbours, kept)
    for row, there, got in zip(neighbours.tolist(), kept.tolist(), found.tolist()):
        seen: list[list[int]] = []
        for one, is_kept, repeats in zip(row, there, got):
            assert repeats <= (is_kept and one in seen)
            assert colliding or repeats == (is_kept and one in seen)
            seen += [one] if is_kept else []
    assert found.any()
