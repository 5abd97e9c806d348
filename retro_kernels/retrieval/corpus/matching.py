"""Which documents of two databases have the same text: by a hash of their tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch

from ..database import Database

SCANNED = 1 << 16
"""Chunks that are read at a time."""


def blocks(database: Database) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """All chunks, a block at a time: their documents [c], tokens [c, m] and which are there [c, m]."""
    for first in range(0, len(database), SCANNED):
        ids = torch.arange(first, min(first + SCANNED, len(database)))
        tokens, mask = (x.cpu().numpy() for x in database.chunks(ids, database.chunk_size))
        yield database.documents(ids).cpu().numpy(), tokens, mask


def document_hashes(database: Database, tick: Callable[[int, int, int], None]) -> np.ndarray:
    """uint64 [documents]: the sum of all its tokens, each times a number that belongs to its place. tick: called with 0
    and, twice, the chunks that were read since the last call."""
    hashes = np.zeros(database.num_documents, np.uint64)
    first = np.full(database.num_documents, -1, np.int64)
    at = 0
    within = mix(np.arange(database.chunk_size))
    for documents, tokens, mask in blocks(database):
        numbers, begin = np.unique(documents, return_index=True)
        new = first[numbers] < 0
        first[numbers[new]] = at + begin[new]
        place = np.arange(at, at + len(documents)) - first[documents]
        chunks = (((tokens.astype(np.uint64) + np.uint64(1)) * mask) * within).sum(-1, dtype=np.uint64)
        np.add.at(hashes, documents, chunks * mix(place))
        at += len(documents)
        tick(0, len(documents), len(documents))
    return hashes


def mix(numbers: np.ndarray) -> np.ndarray:
    """A random odd-looking uint64 for each number, the same everywhere (SplitMix64's finaliser)."""
    x = (numbers.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (x ^ (x >> np.uint64(31))) | np.uint64(1)
