"""Texts of a corpus and their neighbours in its other documents."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.language_model import split
from retro_kernels import files, retrieval
from retro_kernels.models.data import ABSENT

M, R, LENGTH, MOST = 64, 128, 256, 4
CHUNKS = LENGTH // M - 1
"""Chunks whose neighbours are read, and that are predicted with them."""
PAIRS = 1 << 20
CANDIDATES = 32


class NearestChunks:
    """The chunks of a database by tf-idf of their tokens and of their pairs of tokens, searched exactly.

    tokens int64 [c, m], ABSENT where there is none; documents int64 [c].
    """

    def __init__(self, tokens: np.ndarray, documents: np.ndarray) -> None:
        self.tokens, self.documents, self.count = tokens, documents, len(tokens)
        self.vocabulary = int(tokens.max()) + 1
        term, chunk, times = self._counts(tokens)
        self.starts = np.searchsorted(term, np.arange(self.vocabulary + PAIRS + 1))
        self.rarity = np.log((1 + self.count) / (1 + np.diff(self.starts))).astype(np.float32)
        weight = self._weights(term, times, chunk)
        self.chunk, self.weight = chunk.astype(np.int32), weight

    def _counts(self, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """tokens [c, m] -> term, chunk and how often the one is in the other, sorted."""
        known = (tokens >= 0) & (tokens < self.vocabulary)
        both = known[:, 1:] & known[:, :-1]
        pairs = (tokens[:, :-1] * 1000003 + tokens[:, 1:]) % PAIRS + self.vocabulary
        row = np.broadcast_to(np.arange(len(tokens))[:, None], tokens.shape)
        term = np.concatenate([tokens[known], pairs[both]])
        chunk = np.concatenate([row[known], row[:, 1:][both]])
        key, times = np.unique(term * len(tokens) + chunk, return_counts=True)
        return key // len(tokens), key % len(tokens), times

    def _weights(self, term: np.ndarray, times: np.ndarray, chunk: np.ndarray) -> np.ndarray:
        weight = (1 + np.log(times)).astype(np.float32) * self.rarity[term]
        norm = np.sqrt(np.bincount(chunk, weight * weight))
        return weight / np.maximum(norm, 1e-9)[chunk].astype(np.float32)

    def search(self, tokens: np.ndarray, document: int, k: int) -> tuple[np.ndarray, np.ndarray]:
        """A chunk [m] of this document (-1: of none of the database's) -> its k nearest and their cosines [k]."""
        term, _, times = self._counts(tokens[None])
        weights = self._weights(term, times, np.zeros(len(term), np.int64))
        parts = [slice(self.starts[t], self.starts[t + 1]) for t in term]
        found = np.concatenate([self.chunk[part] for part in parts])
        product = np.concatenate([self.weight[part] * w for part, w in zip(parts, weights)])
        score = np.bincount(found, product, self.count)
        score[self.documents == document] = -1.0
        near = np.argpartition(-score, CANDIDATES)[:CANDIDATES]
        near = near[np.argsort(-score[near], kind="stable")]
        different = {self.tokens[chunk].tobytes(): chunk for chunk in near[::-1]}
        chosen = np.array(sorted(different.values(), key=lambda chunk: -score[chunk])[:k])
        return chosen, score[chosen]


@dataclass
class Texts:
    """Texts int64 [t, 512], and neighbours int64 [t, 7, 4, 128] of their chunks, ABSENT where there is no token, with
    their cosines [t, 7, 4]; names of the documents [t]."""

    tokens: np.ndarray
    neighbours: np.ndarray
    cosines: np.ndarray
    names: list[str]


def texts_of(folder: Path, work: Path, tokenizer: str, count: dict[str, int]) -> tuple[dict[str, Texts], dict]:
    """-> the texts to train on and those held out, and what the corpus is."""
    work.mkdir(parents=True, exist_ok=True)
    databases = {}
    for name, part in zip(("train", "held-out"), split(folder, work, None)):
        databases[name] = retrieval.build_database(
            str(part), work / f"{name}-database", tokenizer=tokenizer, embedder=None, chunk_size=M
        )
    facts = {
        name: {
            "documents": one.num_documents,
            "chunks": len(one),
            "bytes": sum(path.stat().st_size for path in (work / name).rglob("*.txt")),
        }
        for name, one in databases.items()
    }
    found: dict[str, Texts] = {}
    known = databases["train"]
    nearest = None
    for name, one in databases.items():
        path = work / f"{name}.npz"
        if not path.exists():
            if nearest is None:
                ids = torch.arange(len(known))
                tokens, mask = known.chunks(ids, M)
                nearest = NearestChunks(_numbered(tokens, mask), known.documents(ids).numpy())
            drawn = _drawn(one, known, nearest, name == "train", count[name])
            with files.replaced(path) as partial, partial.open("wb") as stream:
                np.savez(stream, **drawn)
        with np.load(path) as saved:
            found[name] = Texts(*(saved[x] for x in ("tokens", "neighbours", "cosines")), saved["names"].tolist())
    return found, facts


def _numbered(tokens: torch.Tensor, mask: torch.Tensor) -> np.ndarray:
    return tokens.long().masked_fill(~mask, ABSENT).numpy()


def _drawn(one: Any, known: Any, nearest: NearestChunks, own: bool, count: int) -> dict[str, np.ndarray]:
    tokens, mask = one.chunks(torch.arange(len(one)), LENGTH)
    whole = mask.all(-1).nonzero()[:, 0]
    random = np.random.default_rng(0)
    whole = whole[torch.from_numpy(random.permutation(len(whole)))]
    _, first = np.unique(one.documents(whole).numpy(), return_index=True)
    chosen = whole[torch.from_numpy(np.sort(first)[:count])]
    documents = one.documents(chosen).tolist()
    rows = tokens[chosen].long().numpy()
    ids, cosines = np.zeros((len(rows), CHUNKS, MOST), np.int64), np.zeros((len(rows), CHUNKS, MOST), np.float32)
    for i, row in enumerate(rows):
        for u in range(CHUNKS):
            where = documents[i] if own else -1
            ids[i, u], cosines[i, u] = nearest.search(row[u * M : (u + 1) * M], where, MOST)
    neighbours = _numbered(*known.chunks(torch.from_numpy(ids), R))
    names = np.array([one.source(int(chunk)).path for chunk in chosen])
    return {"tokens": rows, "neighbours": neighbours, "cosines": cosines, "names": names}
