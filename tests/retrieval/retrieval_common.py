"""What tests of retrieval share: a cheap embedder, an index that compares with everything, small databases."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from retro_kernels.retrieval import Database, build_database

CHUNK = 8


class Letters:
    """Counts of the first letters of the alphabet."""

    dim = 5

    def __init__(self) -> None:
        self.identity = {"name": "letters", "kind": "test", "sha256": "0"}
        self.texts: list[str] = []

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        self.texts += texts
        return np.array([[text.count(letter) for letter in "abcde"] for text in texts], np.float32).reshape(-1, 5)


class Everything:
    """Exact search by a sort; equal distances in the order of chunks."""

    def __init__(self, database: Database) -> None:
        self.keys = np.concatenate([np.asarray(block, np.float32) for _, block in database.embeddings()])
        self.widths: list[int] = []

    def search(self, queries: np.ndarray, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        self.widths.append(k)
        distances = ((np.asarray(queries)[:, None] - self.keys) ** 2).sum(-1)
        ids = np.argsort(distances, axis=1, kind="stable")[:, :k]
        found = np.full((len(ids), k), np.inf, np.float32), np.full((len(ids), k), -1, np.int64)
        found[0][:, : ids.shape[1]] = np.take_along_axis(distances, ids, 1)
        found[1][:, : ids.shape[1]] = ids
        return torch.from_numpy(found[0]), torch.from_numpy(found[1])


def texts_of(documents: int, seed: int = 0) -> list[str]:
    """Documents of few words, so that chunks are alike and some are the same."""
    random = np.random.default_rng(seed)
    words = ["abc", "dead", "beef", "cab", "decade"]
    return [" ".join(random.choice(words, int(random.integers(1, 30)))) for _ in range(documents)]


def write_texts(path: Path, texts: Sequence[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def database_of(folder: Path, documents: int = 12, **options) -> Database:
    """Of `texts_of(documents)`, in several shards."""
    corpus = write_texts(folder.with_suffix(".jsonl"), texts_of(documents))
    given = {"tokenizer": "bytes", "embedder": Letters(), "chunk_size": CHUNK, "shard_bytes": 400}
    return build_database(corpus, folder, **{**given, **options})
