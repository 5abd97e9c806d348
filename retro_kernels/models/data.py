"""Training data: a stream of tokens and, for every chunk of it, neighbours that were retrieved beforehand."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from ..errors import DatabaseError
from ..ops import checks
from ..retrieval.database import Database
from ..retrieval.manifest import map_array
from ..retrieval.training_data import ENDS, FACTS, IDS, STARTS, TOKENS, open_neighbours
from .config import RetroConfig
from .loss import IGNORED

NEIGHBOURS = "neighbours.npy"
ABSENT = -1


class Batch(NamedTuple):
    """Arguments of `Retro.loss`."""

    tokens: torch.Tensor
    targets: torch.Tensor
    neighbours: torch.Tensor | None
    neighbour_mask: torch.Tensor | None
    sequence_starts: torch.Tensor | None = None

    def to(self, device: torch.device | str) -> Batch:
        return self._each(lambda x: x.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        return self._each(lambda x: x.pin_memory())

    def part(self, i: int, count: int) -> Batch:
        """Part i of `count` equal parts of every row, which must be whole chunks."""
        return self._each(lambda x: x.tensor_split(count, dim=1)[i]) if count > 1 else self

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        return Batch(*(None if x is None else change(x) for x in self))  # type: ignore[arg-type]


class NumberedNeighbours:
    """Neighbours that are kept as numbers of a database's chunks: indexed like an array of their tokens
    [chunks, k, length], -1 where one is absent, they are read from the database."""

    def __init__(self, ids: np.ndarray, database: Database, length: int) -> None:
        self.ids, self.database = ids, database
        self.shape = (*ids.shape, length)

    def __getitem__(self, index: Any) -> np.ndarray:
        tokens, mask = self.database.chunks(np.array(self.ids[index]), self.shape[-1])
        return tokens.masked_fill_(~mask, ABSENT).numpy()


class TokenStream:
    """A folder of data, cut into rows of the model's `max_length` tokens: what `retro-kernels db neighbours` wrote (see
    `retrieval.neighbours`), whose neighbours are read from their database; or one with the tokens themselves:

        tokens.npy       integers [tokens]
        neighbours.npy   integers [chunks, k, r]: what was retrieved for tokens u * m to u * m + m - 1; -1 where a
                         neighbour or a part of it is absent. Without the file there is no retrieval.
        document_starts.npy, document_ends.npy
                         integers [documents]: where each begins, a multiple of m, and ends; optional
        data.json        {"tokenizer": name, "chunk_size": m, "bytes": bytes of text in the stream}, all optional

    Files are mapped, not read. Where documents are known, each is read alone: tokens see no other document, the target
    of its last one is the config's `eos_token_id`, and what fills its last chunk up is no target. A last row that is
    not full is filled up likewise. Without them the stream is one text, of which the tokens that fill no row are left
    out.

    Args:
        folder: where they are.
        config: of the model that reads them.
        database: where the neighbours' database is by now, if it was moved.

    Attributes:
        bytes: of text, None if not known. num_targets: tokens to predict in all rows. documents: where each begins and
            ends, None if not known. facts: `data.json`.
        tokenizer: what identifies it, where the folder says so (see `retrieval.tokenizers`), else None.

    Raises FileNotFoundError; DatabaseError for an unfinished folder and for another database than its neighbours are
    of; ValueError for data of another tokenizer, chunk size or shape, and for less than one row.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        config: RetroConfig,
        database: str | os.PathLike[str] | None = None,
    ) -> None:
        self.folder, self.config = Path(folder), config
        path = self.folder / FACTS
        self.neighbours: np.ndarray | NumberedNeighbours | None = None
        self.documents: tuple[np.ndarray, np.ndarray] | None = None
        facts: dict[str, Any]
        if (self.folder / IDS).exists():
            data = open_neighbours(self.folder, database)
            self.tokens, facts = data.tokens, data.facts
            self.documents = np.asarray(data.document_starts), np.asarray(data.document_ends)
            self.neighbours = NumberedNeighbours(data.ids, data.database, config.retrieved_length or 0)
        else:
            if database is not None:
                raise ValueError(f"database: got one, but {self.folder} has no {IDS}, expected none")
            self.tokens = self._map_array(TOKENS, 1)
            if (self.folder / NEIGHBOURS).exists():
                self.neighbours = self._map_array(NEIGHBOURS, 3)
            if (self.folder / STARTS).exists():
                self.documents = np.array(self._map_array(STARTS, 1)), np.array(self._map_array(ENDS, 1))
            facts = _read_facts(path) if path.exists() else {}
        self.facts = facts
        self.tokenizer: dict[str, Any] | None = facts.get("tokenizer_identity")
        self.bytes: int | None = facts.get("bytes")
        for name, mine in (("tokenizer", config.tokenizer), ("chunk_size", config.chunk_size)):
            if facts.get(name) is not None and mine is not None and facts[name] != mine:
                raise ValueError(f"{path}: got {name} {facts[name]!r}, expected {mine!r}, the model's")
        n, m = config.max_length, config.chunk_size
        if n % m:
            raise ValueError(
                f"max_length: got {n}, expected a multiple of chunk_size = {m}, so that rows are whole chunks"
            )
        if self.documents is None:  # a row needs one token more, the target of its last
            self.rows = max(len(self.tokens) - 1, 0) // n
            self.num_targets = self.rows * n
            chunks_needed = self.rows * n // m
        else:
            self._check_documents()
            self.rows, chunks_needed = -(-len(self.tokens) // n), len(self.tokens) // m
            starts, ends = self.documents
            lengths = ends - starts
            ended = 0 if config.eos_token_id is None else int((lengths > 0).sum())
            self.num_targets = int(np.maximum(lengths - 1, 0).sum()) + ended
        if self.rows == 0 or self.num_targets == 0:
            raise ValueError(
                f"{self.folder / TOKENS}: got {len(self.tokens)} tokens, expected "
                f"{f'more than max_length = {n}' if self.documents is None else 'some text'}"
            )
        if self.neighbours is not None:
            chunks, _, r = self.neighbours.shape
            if chunks < chunks_needed or r > (config.retrieved_length or 0):
                raise ValueError(
                    f"{self.folder}: got neighbours of shape {list(self.neighbours.shape)}, expected [chunks, k, r] "
                    f"with at least {chunks_needed} chunks of {m} tokens and r at most {config.retrieved_length}"
                )

    def batch(
        self, rows: Sequence[int], num_neighbours: int | None = None, neighbours_of: Sequence[int] | None = None
    ) -> Batch:
        """The rows of these numbers. `num_neighbours`: at most so many of each chunk (0: none); default the config's,
        none for a decoder without chunked cross-attention.
        `neighbours_of`: the rows whose neighbours to take instead.

        Raises ValueError for a token outside the vocabulary, with its place.
        """
        n = self.config.max_length
        return self.windows(
            [row * n for row in rows],
            num_neighbours,
            None if neighbours_of is None else [row * n for row in neighbours_of],
        )

    def windows(
        self, starts: Sequence[int], num_neighbours: int | None = None, neighbours_of: Sequence[int] | None = None
    ) -> Batch:
        """As `batch`, of rows that begin at these tokens of the stream, multiples of chunk_size."""
        n, m = self.config.max_length, self.config.chunk_size
        places = np.asarray(starts, dtype=np.int64)[:, None] + np.arange(n + 1)
        stretch = np.stack([self._cut(self.tokens, start, n + 1) for start in starts])
        self._check(TOKENS, stretch, 0)
        tokens, targets = stretch[:, :-1], stretch[:, 1:]
        begins: torch.Tensor | None = None
        if self.documents is not None:
            begin, ends = self.documents
            of = np.searchsorted(begin, places[:, :-1], side="right") - 1
            left = ends[of] - places[:, :-1]  # tokens of the document from here on
            filler, end = self.config.eos_token_id, IGNORED
            if filler is not None:
                end = filler
            tokens = np.where(left > 0, tokens, filler or 0)
            targets = np.where(left > 1, targets, np.where(left == 1, end, IGNORED))
            first = places[:, :-1] == begin[of]
            if first[:, 1:].any():  # rows within a document need no clock of their own
                begins = torch.from_numpy(first)
        given = [torch.from_numpy(np.ascontiguousarray(x)) for x in (tokens, targets)]
        usual = self.config.num_neighbours if self.config.cross_attention_layers else 0
        k = usual if num_neighbours is None else num_neighbours
        if self.neighbours is None or k == 0:
            return Batch(given[0], given[1], None, None, begins)
        chunks = n // m
        others = starts if neighbours_of is None else neighbours_of
        found = np.stack([self._neighbours(start // m, chunks, k) for start in others])
        self._check(NEIGHBOURS if isinstance(self.neighbours, np.ndarray) else IDS, found, ABSENT)
        neighbours = torch.from_numpy(found)
        mask = neighbours != ABSENT
        return Batch(given[0], given[1], neighbours.clamp(min=0), mask, begins)

    def identity(self) -> dict[str, Any]:
        """What identifies the data wherever they lie: of every file its size and SHA-256 (of files of a folder without
        checksums, over 64 pieces), and the database's hash."""
        if "files" in self.facts:
            found = {entry["path"]: [entry["bytes"], entry["sha256"]] for entry in self.facts["files"]}
            return {**found, "database": self.facts["database_sha256"]}
        names = (TOKENS, NEIGHBOURS, STARTS, ENDS)
        return {name: _sampled(self.folder / name) for name in names if (self.folder / name).is_file()}

    def share_without_neighbours(self) -> float:
        """The share of neighbours that `db neighbours` did not find; 0 where it is not known."""
        wanted = self.facts.get("chunks", 0) * self.facts.get("num_neighbours", 0)
        return self.facts.get("missing", 0) / wanted if wanted else 0.0

    def _neighbours(self, first: int, chunks: int, k: int) -> np.ndarray:
        found = np.asarray(self.neighbours[first : first + chunks, :k], dtype=np.int64)  # type: ignore[index]
        lacking = chunks - len(found)
        return np.pad(found, ((0, lacking), (0, 0), (0, 0)), constant_values=ABSENT) if lacking else found

    @staticmethod
    def _cut(tokens: np.ndarray, first: int, count: int) -> np.ndarray:
        found = np.asarray(tokens[first : first + count], dtype=np.int64)
        return np.pad(found, (0, count - len(found))) if len(found) < count else found

    def _check_documents(self) -> None:
        """Raises ValueError for documents that do not lie one after another in the tokens."""
        starts, ends = self.documents  # type: ignore[misc]
        m = self.config.chunk_size
        following = np.append(starts[1:], len(self.tokens))
        if (
            starts.shape != ends.shape
            or len(starts) == 0
            or starts[0] != 0
            or (starts % m).any()
            or (ends < starts).any()
            or (ends > following).any()
            or (following - ends >= m).any()
        ):
            raise ValueError(
                f"{self.folder}: {STARTS} and {ENDS} do not fit; expected documents one after another, each from a "
                f"multiple of chunk_size = {m} on and in as few chunks as hold it"
            )

    def _check(self, name: str, found: np.ndarray, low: int) -> None:
        if found.size and (found.min() < low or found.max() >= self.config.vocab_size):
            wrong = int(found.min()) if found.min() < low else int(found.max())
            raise ValueError(
                f"{self.folder / name}: got token {wrong}, expected {low} to vocab_size - 1 = "
                f"{self.config.vocab_size - 1}: is it from another tokenizer?"
            )

    def _map_array(self, name: str, dims: int) -> np.ndarray:
        path = self.folder / name
        if not path.is_file():
            raise FileNotFoundError(f"{path} is not there; expected integers, saved by numpy.save")
        try:
            found = map_array(path)
        except DatabaseError as error:
            raise ValueError(f"{path}: no array that numpy.save wrote ({error})") from error
        if found.ndim != dims or found.dtype.kind not in "iu":
            raise ValueError(f"{path}: got {found.dtype} {list(found.shape)}, expected integers of {dims} dimensions")
        return found


def facts_of(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """What a folder of data says of itself, nothing where it says nothing. Raises ValueError for a broken file."""
    path = Path(folder) / FACTS
    return _read_facts(path) if path.is_file() else {}


def _read_facts(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: no valid JSON ({error})") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: got {type(found).__name__}, expected a JSON object")
    return found


def _sampled(path: Path) -> list[Any]:
    """A file's size, and the SHA-256 of 64 pieces of it, evenly spread (of all of a file up to 4 MiB)."""
    size, piece, digest = path.stat().st_size, 1 << 16, hashlib.sha256()
    with path.open("rb") as file:
        for at in range(0, size, max(piece, size // 64)):
            file.seek(at)
            digest.update(file.read(piece))
    return [size, digest.hexdigest()]


def other_rows(rows: int, seed: int) -> list[int]:
    """For each row another one, no row twice: a random ring. Raises ValueError for a single row."""
    if rows == 1:
        raise ValueError("stream: got one row, expected at least two, as random neighbours are those of another row")
    order = np.random.default_rng(seed).permutation(rows)
    other = np.empty(rows, dtype=np.int64)
    other[order] = np.roll(order, 1)
    return other.tolist()


class Order:
    """Which rows come when: every epoch all of them, in an order that only the seed and the epoch decide; so that the
    number of rows seen is all that a resumed run needs to know."""

    def __init__(self, rows: int, seed: int) -> None:
        self.rows, self.seed = checks.integer("rows", rows, 1), seed
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def __getitem__(self, place: int) -> int:
        epoch, within = divmod(place, self.rows)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, np.random.default_rng([self.seed, epoch]).permutation(self.rows)
        return int(self._order[within])


def prefetch(
    stream: TokenStream,
    order: Order,
    places: Iterator[Sequence[int]],
    device: torch.device,
    part: tuple[int, int] = (0, 1),
    *,
    documents_apart: bool = True,
) -> Iterator[Batch]:
    """The batch of each of `places` (numbers of rows seen before), made in another thread while the one before is
    used, and on a GPU copied from pinned memory. `part`: (i, count), part i of every row only.
    `documents_apart`: say where documents begin."""
    pinned = device.type == "cuda"

    def make(at: Sequence[int]) -> Batch:
        batch = stream.batch([order[place] for place in at])
        batch = (batch if documents_apart else batch._replace(sequence_starts=None)).part(*part)
        return batch.pin_memory() if pinned else batch

    with ThreadPoolExecutor(1, thread_name_prefix="data") as pool:
        waiting = None
        for at in places:
            following = pool.submit(make, at)
            if waiting is not None:
                yield waiting.result().to(device)
            waiting = following
        if waiting is not None:
            yield waiting.result().to(device)


__all__ = ["ABSENT", "IGNORED", "Batch", "Order", "TokenStream", "facts_of", "other_rows", "prefetch"]
