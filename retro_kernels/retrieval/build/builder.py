"""Builds a retrieval database from files of text: read, tokenise, chunk, embed, index (RETRO, sections 2.1 and 2.3).

The input alone decides the plan of a build, which is written first: the files in a fixed order, cut into shards. A
build reads each shard twice: once to find duplicates and unusable documents, once to write the shard. A shard is whole
or absent, and the manifest comes last. So a build that was killed at any moment resumes, and its database equals that
of an uninterrupted build byte for byte. Float results repeat exactly on one machine with the same number of threads.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ...errors import DatabaseError
from ...files import json_bytes, replaced, write_json
from ...tokenizers import DEFAULT_TOKENIZER, ChunkTokenizer, load_tokenizer
from ..embedders import DEFAULT_EMBEDDER, Embedder, load_embedder
from .engines import ENGINES, Run, start_engine
from ..index.index import check_spec, give_index, remove_parts
from ..manifest import describe, lock_folder, name_full_disk, read_json
from ..corpus.readers import Options, Piece, Problem, cut, find
from .shards import (
    PLAN,
    WORK,
    Settings,
    Worker,
    finished_counts,
    json_line,
    read_piece,
    remove_work,
    summarise,
    work_file,
)
from ..database import EMBEDDING_DTYPES, MANIFEST, Database
from .writer import finish_database, shard_folder

SKIPPED = "skipped.jsonl"
INPUTS = "inputs.jsonl"
CHARACTERS = 4
"""Of a token, by which the number of chunks is guessed before they are made."""
SHARDS_AIMED_AT = 1024
SMALLEST_SHARD, LARGEST_SHARD = 16 << 20, 4 << 30
"""Bytes of input of a shard: a killed build repeats one shard at most, and a system maps some ten thousand files."""


@dataclasses.dataclass(frozen=True)
class Progress:
    """The progress of a build."""

    stage: str
    """"read" (planning), "build" (tokenising and embedding), "index"; of `precompute_neighbours` also "match"
    (which documents the database has) and "search"."""
    documents: int
    chunks: int
    done: float
    """The stage's share that is done, 0 to 1."""
    chunks_per_second: float
    """Of this run, without what an earlier one had finished."""
    seconds_left: float | None
    """Of this stage; None while nothing is known."""


Report = Callable[[Progress], None]


class Meter:
    """Adds up what workers report and tells `report`."""

    def __init__(self, stage: str, total: int, report: Report | None) -> None:
        self.stage, self.total, self.report = stage, total, report
        self.documents = self.chunks = self.size = 0
        self._begun = time.monotonic()
        self._earlier = (0, 0)

    def before(self, documents: int, chunks: int, size: int) -> None:
        """Counts what an earlier run had finished."""
        self._earlier = (self._earlier[0] + chunks, self._earlier[1] + size)
        self(documents, chunks, size)

    def __call__(self, documents: int, chunks: int, size: int) -> None:
        self.documents, self.chunks, self.size = self.documents + documents, self.chunks + chunks, self.size + size
        if self.report is None:
            return
        seconds = max(time.monotonic() - self._begun, 1e-9)
        done = min(1.0, self.size / self.total) if self.total else 1.0
        rate = (self.size - self._earlier[1]) / seconds
        left = max(0.0, self.total - self.size) / rate if rate else None
        speed = (self.chunks - self._earlier[0]) / seconds
        self.report(Progress(self.stage, self.documents, self.chunks, done, speed, left))


def build_database(
    inputs: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    folder: str | os.PathLike[str],
    *,
    tokenizer: str | ChunkTokenizer = DEFAULT_TOKENIZER,
    embedder: str | Embedder | None = DEFAULT_EMBEDDER,
    chunk_size: int = 64,
    index: str | None = "auto",
    embedding_dtype: str = "float16",
    format: str | None = None,
    text_field: str = "text",
    encoding: str = "utf-8",
    keep_duplicates: bool = False,
    shard_bytes: int | None = None,
    record_bytes: int = Options.record_bytes,
    engine: str = "local",
    workers: int = 1,
    address: str | None = None,
    device: str = "auto",
    precision: str = "auto",
    exclude: str | os.PathLike[str] | None = None,
    progress: Report | None = None,
) -> Database:
    """Builds the database of the text in `inputs` in the new folder `folder`, or goes on with a build begun there.

    Called again when all is done it returns the finished database. Memory stays under 2 GB per worker with the default
    embedder, whatever the input.

    Args:
        inputs: files, folders and globs of plain text, Markdown, HTML, JSON Lines and Parquet, also in .gz and .zst.
        tokenizer: by name, as in `tokenizers.load_tokenizer`; the model's that will read the neighbours.
        embedder: by name, as in `embedders.load_embedder`, or an object; None for a database without keys.
        chunk_size: tokens of a chunk, m.
        index: "auto" (by size, see `index.choice`), "exact", a FAISS factory string, or None for none. By "auto" a
            database without an embedder has none.
        embedding_dtype: float16 or float32, as they are stored.
        format: text, html, jsonl or parquet for every file; None goes by the file's ending.
        text_field: field of JSON Lines or column of Parquet with the text.
        encoding: of text that does not say its own. A file in another one is left out and reported.
        keep_duplicates: keep documents whose text an earlier document has, too.
        shard_bytes: input of a shard, in bytes; by default a 1024th of all, from 16 MiB to 4 GiB.
        record_bytes: the longest line of JSON Lines that is read.
        engine: where shards are worked on: "local" or "ray" (Ray Data). The machines of a Ray cluster must share the
            file systems of input and database.
        workers: processes of "local", actors of "ray".
        address: of a Ray cluster; None starts a Ray on this machine, unless one was initialised already.
        device, precision: of the embedder, as in `embedders.HuggingFaceEmbedder`. The process that begins the build
            decides what precision "auto" is for all.
        exclude: a folder with the database in it that is never input; by default the database's own.
        progress: called with a `Progress` after every window of chunks.

    What was left out, and why, is counted in `manifest["build"]` and listed in `skipped.jsonl` in the folder.

    Raises DatabaseError for input that is not there or holds no text, input that changed since the build began, a
    folder that holds something else, a finished database of something else, or another builder at work; a full disk;
    a tokenizer or embedder that is not to be had. Raises ValueError for an argument that cannot be.
    """
    _check(chunk_size, embedding_dtype, engine, workers, shard_bytes, record_bytes)
    named = isinstance(tokenizer, str) and (embedder is None or isinstance(embedder, str))
    if (workers > 1 or engine != "local") and not named:
        raise ValueError(
            f"workers: got {workers} and engine {engine!r} with a tokenizer or embedder object; name it, so that each "
            "process loads its own"
        )
    if embedder is None and index == "auto":
        index = None
    root = Path(folder)
    given = [inputs] if isinstance(inputs, (str, os.PathLike)) else list(inputs)

    wanted = "cpu" if embedder is None else device
    with start_engine(engine, device=wanted, workers=workers, address=address) as run:
        files, left = find(given, format=format, exclude=root if exclude is None else Path(exclude))
        splitter = load_tokenizer(tokenizer)
        keys = None if embedder is None else load_embedder(embedder, device=device, precision=precision)
        settings = Settings(
            chunk_size=chunk_size,
            tokenizer=splitter.identity,
            embedder=None if keys is None else keys.identity,
            dim=None if keys is None else keys.dim,
            embedding_dtype=embedding_dtype,
            vocabulary_size=splitter.vocabulary_size,
            keep_duplicates=keep_duplicates,
            **dataclasses.asdict(Options(text_field, encoding, record_bytes)),
        )
        shards = _shards(files, left, shard_bytes)
        if index is not None:
            check_spec(index, settings.dim)
        plan = {
            "settings": dataclasses.asdict(settings),
            "left": [list(one) for one in left],
            "shards": [[dataclasses.asdict(piece) for piece in shard] for shard in shards],
        }
        make = functools.partial(Worker, root, device=device, precision=precision)
        if engine == "local" and workers == 1:
            make = functools.partial(Worker, root, tokenizer=splitter, embedder=keys)
        if root.exists() and not root.is_dir():
            raise DatabaseError(f"{root} is a file; expected a new folder for the database")
        root.mkdir(parents=True, exist_ok=True)
        with lock_folder(root):
            if (root / MANIFEST).exists():
                database = _open_finished(root, plan)
            else:
                _begin(root, plan)
                _make_shards(root, run, make, shards, left, settings, index, progress)
                database = _finish(root, plan, settings, len(shards))
            remove_work(root)
            return _indexed(database, index, device, progress)


def _make_shards(
    root: Path,
    run: Run,
    make: Callable[[], Worker],
    shards: list[list[Piece]],
    left: list[tuple[str, str]],
    settings: Settings,
    index: str | None,
    progress: Report | None,
) -> None:
    """Reads and builds what is not there yet."""
    numbers = range(len(shards))
    meter = Meter("read", sum(piece.size for shard in shards for piece in shard), progress)
    run(make, "read", [number for number in numbers if not work_file(root, "read", number, ".json").exists()], meter)
    totals = summarise(root, shards, settings.keep_duplicates)
    if not totals["documents"]:
        raise DatabaseError(f"the input holds no text: {_reasons(root, len(shards), left)}")

    if index == "auto":
        check_spec(index, settings.dim, totals["characters"] // (CHARACTERS * settings.chunk_size))
    meter = Meter("build", totals["characters"], progress)
    unbuilt: list[int] = []
    for number in numbers:
        if shard_folder(root, number).exists():
            meter.before(*finished_counts(root, number))
        else:
            unbuilt.append(number)
    run(make, "build", unbuilt, meter)


def _check(
    chunk_size: int, embedding_dtype: str, engine: str, workers: int, shard_bytes: int | None, record_bytes: int
) -> None:
    for name, value in {
        "chunk_size": chunk_size,
        "workers": workers,
        "shard_bytes": 1 if shard_bytes is None else shard_bytes,
        "record_bytes": record_bytes,
    }.items():
        if value < 1:
            raise ValueError(f"{name}: got {value}; expected at least 1")
    if embedding_dtype not in EMBEDDING_DTYPES:
        raise ValueError(f"embedding_dtype: got {embedding_dtype!r}; expected one of {EMBEDDING_DTYPES}")
    if engine not in ENGINES:
        raise ValueError(f"engine: got {engine!r}; expected one of {ENGINES}")


def _shards(files: list[Piece], left: list[tuple[str, str]], shard_bytes: int | None) -> list[list[Piece]]:
    """Files, in their order, in shards of about `shard_bytes`. Adds what is no Parquet to `left`."""
    total = sum(piece.size for piece in files)
    aim = min(max(total // SHARDS_AIMED_AT, SMALLEST_SHARD), LARGEST_SHARD) if shard_bytes is None else shard_bytes

    def all_pieces() -> Iterator[Piece]:
        for file in files:
            try:
                yield from cut(file, aim)
            except Problem as problem:
                left.append((file.name, str(problem)))

    shards: list[list[Piece]] = []
    size = 0
    for piece in all_pieces():
        if not shards or size + piece.size > aim:
            shards.append([])
            size = 0
        shards[-1].append(piece)
        size += piece.size
    if not shards:
        reasons = ", ".join(f"{count} {reason}" for reason, count in _count_reasons(left).items())
        raise DatabaseError(f"input: no file that can be read ({reasons or 'the folder is empty'})")
    return shards


def _begin(root: Path, plan: dict[str, Any]) -> None:
    """Writes the plan down, or checks that the build that was begun here has the same."""
    path = root / WORK / PLAN
    if path.exists():
        found = read_json(path)
        if _request(found) != _request(plan):
            raise DatabaseError(
                f"{root} holds an unfinished build of something else ({_difference(found, plan)}): go on with the same "
                "input and settings, or delete the folder"
            )
        for old, new in zip(found["shards"], plan["shards"]):
            for one, other in zip(old, new):
                if one["file_time"] != other["file_time"]:
                    raise DatabaseError(
                        f"{one['path']} changed since the build in {root} began: put it back as it was, or delete "
                        f"{root} and build anew"
                    )
        return
    others = sorted(path.name for path in root.iterdir() if path.name != WORK)
    if others:
        raise DatabaseError(f"{root} is not empty (it holds {others[0]!r}) and no build of ours: name a new folder")
    with name_full_disk(root):
        path.parent.mkdir(exist_ok=True)
        write_json(path, plan)


def _open_finished(root: Path, plan: dict[str, Any]) -> Database:
    """The finished database in `root`, if it is of this plan and its input is what it was."""
    database = Database(root)
    build = database.manifest.get("build") or {}
    inputs = root / INPUTS
    if not inputs.is_file():
        raise DatabaseError(
            f"{root} is a finished database that was imported, or made by an older release: name another folder"
        )
    pieces = [json.loads(line) for line in inputs.read_bytes().splitlines()]
    if build.get("request") != _request(plan):
        found = {"settings": build.get("settings", {}), "shards": [pieces]}
        raise DatabaseError(
            f"{root} is a finished database of other input or settings ({_difference(found, plan)}), and is never "
            "overwritten: name another folder, or add new documents to it with `retro-kernels db add`"
        )
    if database.manifest.get("input_times") == _times(plan):
        return database
    given = (Piece(**piece) for shard in plan["shards"] for piece in shard)
    for known, piece in zip(pieces, given):
        if known["digest"] != read_piece(piece, _reading(build))["digest"]:
            raise DatabaseError(
                f"{piece.path} changed since the database in {root} was made of it, which is never overwritten: name "
                "another folder"
            )
    return database


def _reading(build: dict[str, Any]) -> Options:
    known = build["settings"]
    return Options(known["text_field"], known["encoding"], known["record_bytes"])


def _request(plan: dict[str, Any]) -> str:
    """A hash of the request: the settings and the input's names and sizes, but not its place and times, nor what is no
    input. Of the index it says nothing: that is made of a finished database."""
    shards = [_pieces(shard) for shard in plan["shards"]]
    return hashlib.sha256(json_bytes({"settings": plan["settings"], "shards": shards})).hexdigest()


def _pieces(shard: list[dict[str, Any]]) -> list[dict[str, Any]]:
    names = ("name", "format", "size", "file_size", "start", "stop")
    return [{name: piece[name] for name in names} for piece in shard]


def _times(plan: dict[str, Any]) -> str:
    return hashlib.sha256(json_bytes([piece["file_time"] for shard in plan["shards"] for piece in shard])).hexdigest()


def _difference(found: dict[str, Any], plan: dict[str, Any]) -> str:
    for name, value in plan["settings"].items():
        if found.get("settings", {}).get(name) != value:
            return f"{name} was {found.get('settings', {}).get(name)!r}, now {value!r}"
    old, new = (
        {piece["name"]: piece["file_size"] for shard in one["shards"] for piece in shard} for one in (found, plan)
    )
    for name in sorted(old.keys() | new.keys()):
        if name not in new:
            return f"{name} is missing now"
        if name not in old:
            return f"{name} is new"
        if old[name] != new[name]:
            return f"{name} had {old[name]:,} bytes, now {new[name]:,}"
    return "its files are others, or cut into other shards"


def _count_reasons(left: Sequence[tuple[str, str]]) -> collections.Counter[str]:
    return collections.Counter(reason for _, reason in left)


def _reasons(root: Path, shards: int, left: list[tuple[str, str]]) -> str:
    counts = _count_reasons(left)
    for number in range(shards):
        notes = read_json(work_file(root, "read", number, ".json"))
        counts.update(reason for *_, reason in notes["skipped"])
    return ", ".join(f"{count} {reason}" for reason, count in sorted(counts.items())) or "no document in any file"


def _finish(root: Path, plan: dict[str, Any], settings: Settings, shards: int) -> Database:
    """Writes the manifest. The index comes after it: one that cannot be made costs nothing that is finished."""
    left = [{"path": name, "record": None, "reason": reason} for name, reason in plan["left"]]
    counts: collections.Counter[str] = collections.Counter(line["reason"] for line in left)
    short = text_bytes = unknown = 0
    with name_full_disk(root):
        with replaced(root / SKIPPED) as temporary, temporary.open("wb") as file:
            for line in left:
                file.write(json_line(line))
            for number in range(shards):
                built = work_file(root, "built", number, ".json")
                facts = read_json(built)
                counts.update(facts["skipped"])
                short += facts["short"]
                text_bytes += facts["bytes"]
                unknown += facts["unknown"]
                with built.with_suffix(".skipped").open("rb") as lines:
                    shutil.copyfileobj(lines, file)
        with replaced(root / INPUTS) as temporary, temporary.open("wb") as file:
            for number, shard in enumerate(plan["shards"]):
                digests = read_json(work_file(root, "read", number, ".json"))["digests"]
                for piece, digest in zip(_pieces(shard), digests):
                    file.write(json_line({**piece, "digest": digest}))
    return finish_database(
        root,
        shards,
        tokenizer=settings.tokenizer,
        embedder=settings.embedder,
        build={
            "request": _request(plan),
            "settings": dataclasses.asdict(settings),
            "skipped": dict(sorted(counts.items())),
            "shorter_than_a_chunk": short,
            "text_bytes": text_bytes,
            "unknown_tokens": unknown,
        },
        files=[describe(root, root / SKIPPED), describe(root, root / INPUTS)],
        input_times=_times(plan),
        **settings.shape(),
    )


def _indexed(database: Database, index: str | None, device: str, progress: Report | None) -> Database:
    """The database with the index that is asked for: by "auto" whichever it has, if it has one."""
    entry = database.manifest["index"]
    if index is None or (entry is not None and index in ("auto", entry["asked"])):
        remove_parts(database.folder, entry)
        return database
    meter = Meter("index", len(database), progress)

    def step(done: int, total: int) -> None:
        meter(0, done - meter.chunks, done - meter.size)

    try:
        return give_index(database, index, device="cpu" if device == "auto" else device, progress=step)
    except DatabaseError as error:
        raise DatabaseError(
            f"{error}. The database in {database.folder} is whole but for its index: run this again, with another "
            f"--index if you like, or `retro-kernels db index {database.folder}`"
        ) from error
