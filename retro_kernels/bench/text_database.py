"""Real English text with real neighbours: a retrieval database of plays, and a passage of one looked up in the others.

The database is built by `rk.retrieval.build_database` under the user's cache folder, so that it is built once, and a
build that was stopped goes on. Where no tokenizer or embedder is installed an honest stand-in takes its place;
`Corpus.description` names which, and every result carries it.
"""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import os
import shutil
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from retro_kernels.retrieval import Database, DatabaseError, Embedder, Retriever, build_database, load_embedder
from retro_kernels.retrieval.embedders import DEFAULT_EMBEDDER as OFFLINE
from retro_kernels.tokenizers import BYTES

TEXT = Path(__file__).parent / "data" / "shakespeare_histories.txt.gz"
PAD = 0
UNKNOWN = 100  # [UNK] of BERT's vocabularies
SHARD_BYTES = 1 << 16  # what a stopped build embeds again: a few seconds' worth
MEASURED_SECONDS = 0.3


@dataclass(frozen=True)
class Corpus:
    """A passage and, for each of its chunks, the nearest chunks of other plays."""

    sequence: Tensor
    """[1, length + 1] tokens; the last is only a label."""
    retrieved: Tensor
    """[1, l, k, 2 m]: every neighbour followed by its continuation, or by PAD where its document ends."""
    neighbours: Tensor
    """[l, k], the numbers of these chunks in the database."""
    database: Database
    document: int
    """The database's document that the passage is of."""
    description: dict[str, str]
    measured: list[dict] = field(default_factory=list)
    """Speeds found on the way: "what", "rate" and its "unit"."""


def documents() -> list[str]:
    """The eight plays of data/SOURCE.md."""
    return gzip.decompress(TEXT.read_bytes()).decode().split("\f")


class HashedWords:
    """A stand-in for an embedder: words, hashed, each with a random vector, summed and of length 1."""

    dim = 384
    buckets = 1 << 15

    def __init__(self) -> None:
        self.identity = {"name": "hashed words", "kind": "stand-in", "sha256": "1"}
        self._vectors = np.random.default_rng(0).standard_normal((self.buckets, self.dim), np.float32)

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        words = [[zlib.crc32(word.encode()) % self.buckets for word in text.split()] for text in texts]
        found = np.array([self._vectors[numbers].sum(0) for numbers in words], np.float32).reshape(-1, self.dim)
        return found / np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-6)


def build(
    *,
    vocabulary: int,
    chunk_size: int,
    length: int,
    k: int,
    document: int = 3,
    characters: int | None = None,
    device: torch.device | str = "cpu",
) -> Corpus:
    """The shipped plays, or the first `characters` of each, and neighbours for the `length` tokens in the middle of
    play `document`, all of other plays. Tokens that `vocabulary` has not are [UNK]."""
    plays = [text[:characters] for text in documents()]
    if all(importlib.util.find_spec(name) for name in (OFFLINE.replace("-", "_"), "tokenizers", "transformers")):
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        tokenizer, embedder = OFFLINE, load_embedder(OFFLINE, device=str(device))
        named = {"tokenizer": f"WordPiece of {OFFLINE}", "embedder": f"{OFFLINE}, {embedder.identity['precision']}"}
    else:
        tokenizer, embedder = BYTES, HashedWords()
        missing = f"stand-in: {OFFLINE}, tokenizers or transformers is not installed"
        named = {"tokenizer": f"bytes ({missing})", "embedder": f"hashed words ({missing})"}
    database, rate = _database(plays, tokenizer, embedder, chunk_size)
    with Retriever(database, embedder=embedder, num_neighbours=k, device=str(device)) as retriever:
        of_play = (database.documents(torch.arange(len(database))) == document).nonzero()[:, 0]
        needed = length // chunk_size
        if needed + 1 > len(of_play):
            raise ValueError(
                f"length: got {length}, but play {document} has only {len(of_play)} chunks of {chunk_size}"
            )
        first = int(of_play[(len(of_play) - needed - 1) // 2])
        passage, _ = database.chunks(torch.arange(first, first + needed + 1), chunk_size)
        passage = passage.long().view(1, -1)
        found = retriever.retrieve_tokens(passage[:, : needed * chunk_size], documents=torch.tensor([document]))
        ids, tokens = found.ids.cpu(), found.tokens.cpu()
        if not bool((ids >= 0).all()):
            raise RuntimeError(f"{int((ids < 0).sum())} of {ids.numel()} neighbours are missing")
        measured = [] if rate is None else [{"what": "building the database", "rate": rate, "unit": "chunks/s"}]
        measured += _measure(retriever)
        index = f"{getattr(retriever.index, 'description', 'exact search')}; {k} of other plays"
    beyond = int((passage >= vocabulary).sum()) / passage.numel()
    sequence, retrieved = (torch.where(x < vocabulary, x, UNKNOWN) for x in (passage[:, : length + 1], tokens))
    if beyond:
        named["tokenizer"] += f"; {beyond:.2%} of the passage's tokens are not in the model's {vocabulary:,}: [UNK]"
    cut = "" if characters is None else f", the first {characters:,} characters of each"
    description = {
        "text": f"{len(plays)} history plays of Shakespeare{cut}: {database.manifest['counts']['tokens']:,} tokens, "
        f"{len(database):,} chunks of {chunk_size}",
        **named,
        "index": index,
        "passage": f"{length} tokens from the middle of {plays[document].splitlines()[0].title()}",
    }
    return Corpus(sequence, retrieved, ids[0], database, document, description, measured)


def _database(plays: list[str], tokenizer: str, embedder: Embedder, chunk_size: int) -> tuple[Database, float | None]:
    """-> the plays' database, from the cache or built now, and then the chunks that were embedded in a second."""
    wanted = repr((plays, tokenizer, sorted(embedder.identity.items()), chunk_size)).encode()
    folder = _cache_folder() / f"plays-{hashlib.sha256(wanted).hexdigest()[:16]}"
    text = folder / "text"
    text.mkdir(parents=True, exist_ok=True)
    for number, play in enumerate(plays):
        path = text / f"{number}.txt"
        if not path.exists() or path.read_text() != play:
            path.write_text(play)
    rates: list[float] = []

    def note(at) -> None:
        if at.stage == "build":
            rates.append(at.chunks_per_second)

    for attempt in range(2):
        try:
            database = build_database(
                text,
                folder / "database",
                tokenizer=tokenizer,
                embedder=embedder,
                chunk_size=chunk_size,
                shard_bytes=SHARD_BYTES,
                progress=note,
            )
            if database.verify():
                raise DatabaseError(f"{folder} is damaged")
            return database, rates[-1] if rates else None
        except DatabaseError:
            if attempt:
                raise
            # What lies in the cache is of an earlier version, or damaged.
            shutil.rmtree(folder / "database", ignore_errors=True)
    raise AssertionError


def _measure(retriever: Retriever) -> list[dict]:
    """Measures the parts of retrieval on this database, in most of a second altogether."""
    database = retriever.database
    keys = np.concatenate([np.asarray(block, np.float32) for _, block in database.embeddings()])[:1024]
    ids = torch.randint(len(database), (8192,), generator=torch.Generator().manual_seed(0))
    searching = f"searching {len(database):,} keys for the nearest 64"
    parts: tuple[tuple[str, Callable[[], object], int, str], ...] = (
        (searching, lambda: retriever.index.search(keys, 64), len(keys), "queries/s"),
        ("reading chunks with their continuations", lambda: database.chunks(ids), len(ids), "neighbours/s"),
    )
    found = []
    for what, act, count, unit in parts:
        act()
        rounds, begun = 0, time.perf_counter()
        while time.perf_counter() - begun < MEASURED_SECONDS:
            act()
            rounds += 1
        found.append({"what": what, "rate": rounds * count / (time.perf_counter() - begun), "unit": unit})
    return found


def _cache_folder() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "retro_kernels"
