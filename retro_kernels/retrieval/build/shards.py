"""The work of a build, shard by shard: read it once to plan, read it again to write. Both can be killed and repeated.

A `Worker` needs nothing but the folder of the build: the same one runs under every engine of `engines.py`.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import DatabaseError
from ...files import write_bytes, write_json
from ...hub import check_identity
from ...tokenizers import ChunkTokenizer, load_tokenizer
from ..corpus.chunking import Part, Text, parts, windows
from ..embedders import Embedder, embedded_text, load_embedder
from ..manifest import name_full_disk, read_json
from ..corpus.readers import Options, Piece, Problem, Reader
from ..database import token_dtype
from .writer import ShardWriter, shard_folder

WORK = "build"
PLAN, READ = "plan.json", "read.json"
WINDOW = 4096
"""Chunks that the embedder is given at a time, to sort by length."""

Tick = Callable[[int, int, int], None]
"""Called with the documents, chunks and characters that were finished since the last call."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings that decide a database's content besides its input. JSON."""

    chunk_size: int
    tokenizer: dict[str, Any]
    embedder: dict[str, Any] | None
    dim: int | None
    embedding_dtype: str
    vocabulary_size: int
    keep_duplicates: bool
    text_field: str
    encoding: str
    record_bytes: int

    def shape(self) -> dict[str, Any]:
        """The arguments of a shard's writer."""
        names = ("chunk_size", "dim", "embedding_dtype")
        return {"token_dtype": token_dtype(self.vocabulary_size), **{name: getattr(self, name) for name in names}}

    def reading(self) -> Options:
        return Options(self.text_field, self.encoding, self.record_bytes)


def work_file(folder: Path, kind: str, number: int, suffix: str) -> Path:
    """The file in which the build in `folder` keeps its findings about a shard."""
    return folder / WORK / kind / f"{number:06d}{suffix}"


def json_line(value: dict[str, Any]) -> bytes:
    """One line of JSON Lines."""
    return json.dumps(value, sort_keys=True).encode() + b"\n"


def finished_counts(folder: Path, number: int) -> tuple[int, int, int]:
    """-> documents, chunks and characters of a shard that is there."""
    built = read_json(work_file(folder, "built", number, ".json"))
    characters = read_json(work_file(folder, "read", number, ".json"))["characters"]
    return built["documents"], built["chunks"], characters


class Worker:
    """Reads and builds the shards of the plan that `folder` holds.

    tokenizer, embedder: objects that are used in place of those that the plan names; they must be the same ones.
    device, precision: as in `build_database`."""

    def __init__(
        self,
        folder: str | Path,
        *,
        tokenizer: ChunkTokenizer | None = None,
        embedder: Embedder | None = None,
        device: str = "auto",
        precision: str = "auto",
    ) -> None:
        self.folder = Path(folder)
        plan = read_json(self.folder / WORK / PLAN)
        self.settings = Settings(**plan["settings"])
        self.shards = [[Piece(**piece) for piece in shard] for shard in plan["shards"]]
        self._tokenizer, self._embedder = tokenizer, embedder
        self._device, self._precision = device, precision
        self._first_records: dict[str, int] | None = None

    @property
    def tokenizer(self) -> ChunkTokenizer:
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.settings.tokenizer["name"])
            check_identity("tokenizer", self.settings.tokenizer, self._tokenizer.identity)
        return self._tokenizer

    @property
    def embedder(self) -> Embedder:
        expected = self.settings.embedder
        assert expected is not None
        if self._embedder is None:
            # Machines differ in what "auto" is; all shards are to be alike.
            precision = expected.get("precision", "auto") if self._precision == "auto" else self._precision
            self._embedder = load_embedder(expected["name"], device=self._device, precision=precision)
            check_identity("embedder", expected, self._embedder.identity)
        return self._embedder

    def read(self, number: int, tick: Tick) -> None:
        """Reads shard `number` once and notes its documents' hashes and what must be left out of it."""
        notes = work_file(self.folder, "read", number, ".json")
        if notes.exists():
            return
        hashes, skipped, records, digests, characters = bytearray(), [], [], [], 0
        for piece in self.shards[number]:
            self._check_unchanged(piece)
            found = read_piece(piece, self.settings.reading())
            documents = len(hashes) // DIGEST
            for ordinal, record, reason in found["skipped"]:
                skipped.append([None if ordinal is None else documents + ordinal, piece.name, record, reason])
            hashes += found["hashes"]
            characters += found["characters"]
            records.append(found["records"])
            digests.append(found["digest"])
            tick(len(found["hashes"]) // DIGEST, 0, piece.size)
        with name_full_disk(self.folder):
            notes.parent.mkdir(parents=True, exist_ok=True)
            write_bytes(notes.with_suffix(".hashes"), bytes(hashes))
            content = {
                "documents": len(hashes) // DIGEST,
                "characters": characters,
                "records": records,
                "digests": digests,
                "skipped": skipped,
            }
            write_json(notes, content)

    def build(self, number: int, tick: Tick) -> None:
        """Writes shard `number`, unless it is there."""
        if not shard_folder(self.folder, number).exists():
            notes = read_json(work_file(self.folder, "read", number, ".json"))
            with name_full_disk(self.folder):
                self._build(number, notes, tick)

    def _build(self, number: int, notes: dict[str, Any], tick: Tick) -> None:
        settings = self.settings
        reasons = {ordinal: reason for ordinal, _, _, reason in notes["skipped"] if ordinal is not None}
        dropped = np.fromfile(work_file(self.folder, "read", number, ".dropped"), np.int64)
        reasons |= dict.fromkeys((set(dropped.tolist()) - reasons.keys()), "duplicate")
        skipped: list[dict[str, Any]] = [
            {"path": name, "record": record, "reason": reason}
            for ordinal, name, record, reason in notes["skipped"]
            if ordinal is None
        ]
        sources: dict[int, tuple[str, int | None]] = {}
        counted = collections.Counter(documents=0, chunks=0, short=0, bytes=0, unknown=0)
        sizes: collections.Counter[int] = collections.Counter()

        def count_bytes(ordinal: int, blocks: Iterable[str]) -> Iterator[str]:
            for block in blocks:
                sizes[ordinal] += len(block.encode("utf-8", "surrogatepass"))
                yield block

        def documents() -> Iterator[Text]:
            ordinal = 0
            for position, piece in enumerate(self.shards[number]):
                self._check_unchanged(piece)
                first = self._first_record(number, position)
                try:
                    for document in Reader(piece, settings.reading()):
                        record = None if document.record is None else document.record + first
                        if ordinal in reasons:
                            skipped.append({"path": piece.name, "record": record, "reason": reasons[ordinal]})
                        else:
                            sources[ordinal] = (piece.name, record)
                            yield Text(ordinal, count_bytes(ordinal, document.blocks))
                        ordinal += 1
                except Problem:
                    pass  # noted when it was read the first time
            if ordinal != notes["documents"]:
                raise DatabaseError(
                    f"shard {number}: {ordinal:,} documents, {notes['documents']:,} when it was planned"
                )

        writer = ShardWriter(self.folder, number, **settings.shape())
        held = 0
        for window, vectors in self._embed(windows(parts(documents(), self.tokenizer, settings.chunk_size), WINDOW)):
            row = ended = characters = 0
            for part in window:
                count = len(part.offsets)
                if count:
                    rows = None if vectors is None else vectors[row : row + count]
                    writer.extend(part.tokens, np.asarray(part.offsets, np.int64), embeddings=rows)
                row, held = row + count, held + len(part.tokens)
                characters += part.characters
                if self.tokenizer.unknown_token is not None:
                    counted["unknown"] += int((part.tokens == self.tokenizer.unknown_token).sum())
                if part.last:
                    name, record = sources.pop(part.number)
                    size = sizes.pop(part.number, 0)
                    counted["bytes"] += size
                    if held:
                        writer.end(path=name, record=record, size=size)
                        counted["short"] += held < settings.chunk_size
                        ended += 1
                    else:
                        skipped.append({"path": name, "record": record, "reason": "no tokens"})
                    held = 0
            counted["documents"] += ended
            counted["chunks"] += row
            tick(ended, row, characters)
        lines = b"".join(map(json_line, skipped))
        built = work_file(self.folder, "built", number, ".json")
        built.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(built.with_suffix(".skipped"), lines)
        reasons_counted = collections.Counter(line["reason"] for line in skipped)
        write_json(built, {**counted, "skipped": reasons_counted})
        writer.commit()

    def _embed(self, found: Iterator[list[Part]]) -> Iterator[tuple[list[Part], np.ndarray | None]]:
        """Every window with its embeddings. The next one is read and tokenised meanwhile, in another thread."""
        with ThreadPoolExecutor(1, thread_name_prefix="tokenise") as pool:
            waiting = pool.submit(self._next, found)
            while (taken := waiting.result()) is not None:
                window, texts = taken
                waiting = pool.submit(self._next, found)
                if self.settings.embedder is None:
                    yield window, None
                    continue
                vectors = self.embedder(texts) if texts else np.empty((0, self.settings.dim or 0), np.float32)
                if vectors.shape != (len(texts), self.settings.dim):
                    raise DatabaseError(
                        f"embedder: {self.embedder.identity['name']!r} returned shape {list(vectors.shape)} for "
                        f"{len(texts)} texts; expected [{len(texts)}, {self.settings.dim}]"
                    )
                yield window, vectors

    def _next(self, found: Iterator[list[Part]]) -> tuple[list[Part], list[str]] | None:
        """The next window, and what the embedder is given of its chunks."""
        window = next(found, None)
        if window is None or self.settings.embedder is None:
            return None if window is None else (window, [])
        m = self.settings.chunk_size
        rows = (part.tokens[at : at + m] for part in window for at in range(0, len(part.tokens), m))
        return window, [embedded_text(self.tokenizer, row.tolist()) for row in rows]

    def _check_unchanged(self, piece: Piece) -> None:
        if not piece.unchanged():
            raise DatabaseError(
                f"{piece.path} changed or went away since the build began: put it back as it was, or delete "
                f"{self.folder} and build anew"
            )

    def _first_record(self, number: int, position: int) -> int:
        """Lines of the file before this piece."""
        if self._first_records is None:
            self._first_records = read_json(self.folder / WORK / READ)["first_records"]
        return self._first_records.get(f"{number}.{position}", 0)


DIGEST = 16
"""Bytes of a document's hash."""


def read_piece(piece: Piece, options: Options) -> dict[str, Any]:
    """Reads a piece once: the "hashes" of its documents (zeros for one that is to be left out), what must be left out
    of it as "skipped" [document, record, reason], its "records" and "characters", and a "digest" of all of it."""
    reader = Reader(piece, options)
    hashes, skipped, characters = bytearray(), [], 0
    try:
        for ordinal, document in enumerate(reader):
            try:
                digest, length = _digest(document.blocks)
                characters += length
            except Problem as problem:
                skipped.append([ordinal, document.record, str(problem)])
                digest = bytes(DIGEST)
            hashes += digest
    except Problem as problem:
        # Nothing more of the file can be read: what came before it is kept.
        skipped.append([None, reader.records if hashes else None, str(problem)])
    whole = hashlib.blake2b(hashes + json.dumps(skipped).encode(), digest_size=DIGEST).hexdigest()
    return {
        "hashes": hashes,
        "skipped": skipped,
        "records": reader.records,
        "characters": characters,
        "digest": whole,
    }


def _digest(blocks: Iterator[str]) -> tuple[bytes, int]:
    """-> BLAKE2b over the text, and its length in characters. Raises Problem where there is no text."""
    digest, length, blank = hashlib.blake2b(digest_size=DIGEST), 0, True
    for block in blocks:
        digest.update(block.encode("utf-8", "surrogatepass"))
        length += len(block)
        blank = blank and (not block or block.isspace())
    if blank:
        raise Problem("empty")
    return digest.digest(), length


HASHES_AT_ONCE = 1 << 24


def summarise(folder: Path, shards: list[list[Piece]], keep_duplicates: bool) -> dict[str, Any]:
    """What all shards' reading found: writes which documents of each repeat an earlier one, and the totals. -> totals

    Hashes are compared a part at a time, by their first byte: memory stays bounded for any number of documents."""
    done = folder / WORK / READ
    if done.exists():
        return read_json(done)
    notes = [read_json(work_file(folder, "read", number, ".json")) for number in range(len(shards))]
    dropped: list[list[np.ndarray]] = [[] for _ in shards]
    total = sum(note["documents"] for note in notes)
    rounds = 0 if keep_duplicates else min(256, 1 + total // HASHES_AT_ONCE)
    for part in range(rounds):
        found, owners, ordinals = [], [], []
        for number in range(len(shards)):
            hashes = np.fromfile(work_file(folder, "read", number, ".hashes"), np.uint64).reshape(-1, 2)
            rows = np.flatnonzero((hashes[:, 0] & np.uint64(255)) % np.uint64(rounds) == part)
            # Zeros stand for what is left out anyway.
            rows = rows[hashes[rows].any(1)]
            found.append(hashes[rows])
            owners.append(np.full(len(rows), number, np.int32))
            ordinals.append(rows)
        keys, owner, ordinal = (np.concatenate(x) for x in (found, owners, ordinals))
        order = np.lexsort((keys[:, 1], keys[:, 0]))  # stable: of equal hashes the first document comes first
        ordered = keys[order]
        again = order[1:][(ordered[1:] == ordered[:-1]).all(1)]
        for number in np.unique(owner[again]).tolist():
            dropped[number].append(ordinal[again[owner[again] == number]])
    first_records: dict[str, int] = {}
    lines: dict[str, int] = collections.defaultdict(int)
    with name_full_disk(folder):
        for number, (shard, note) in enumerate(zip(shards, notes)):
            numbers = np.sort(np.concatenate(dropped[number] or [np.empty(0, np.int64)])).astype(np.int64)
            write_bytes(work_file(folder, "read", number, ".dropped"), numbers.tobytes())
            for position, (piece, records) in enumerate(zip(shard, note["records"])):
                if piece.format == "jsonl" and piece.stop >= 0:
                    if lines[piece.path]:
                        first_records[f"{number}.{position}"] = lines[piece.path]
                    lines[piece.path] += records
        kept = total - sum(len(x) for parts_of in dropped for x in parts_of)
        kept -= sum(ordinal is not None for note in notes for ordinal, *_ in note["skipped"])
        characters = sum(note["characters"] for note in notes)
        totals = {"documents": kept, "characters": characters, "first_records": first_records}
        write_json(done, totals)
    return totals


def remove_work(folder: Path) -> None:
    """Deletes what the build noted, once the database is finished."""
    if (folder / WORK).exists():
        shutil.rmtree(folder / WORK)
