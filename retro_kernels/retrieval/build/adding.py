"""Adds documents to a finished database: those that it has not are embedded, the others keep their keys and numbers.

The input is made into a database without keys first, in the folder `adding` of the database. Its documents that the
database has not go into shards of their own, and a new manifest names them: until then the database is the old one, and
a killed addition goes on when it is run again.
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...errors import DatabaseError
from ...files import write_json
from ...tokenizers import open_tokenizer
from ..corpus.inputs import InputFiles, unambiguous
from ..corpus.matching import document_hashes
from ..database import Database, write_manifest
from ..embedders import Embedder, embedded_text, open_embedder
from ..index.index import check_spec, give_index
from ..manifest import describe, lock_folder, name_full_disk, read_json
from .builder import SKIPPED, Meter, Report, build_database
from .shards import WINDOW
from .writer import ShardWriter, committed_shard

ADDING, CORPUS, PLAN = "adding", "corpus", "plan.json"
SHARD_CHUNKS = 1 << 14
"""Chunks after which a shard ends, at the next document's border: what a killed addition repeats."""


def add_documents(
    inputs: str | Sequence[str],
    folder: str | Path,
    *,
    embedder: Embedder | None = None,
    device: str = "auto",
    precision: str | None = None,
    progress: Report | None = None,
    **reading: Any,
) -> Database:
    """Adds the documents of `inputs` to the finished database in `folder`, or goes on where an earlier call was stopped.

    Documents whose tokens the database has are passed over. Numbers of chunks and documents stay, new ones come after
    them, so that neighbours looked up before are still right (`open_neighbours` takes the grown database). The index is
    made anew of all keys, of the kind that was asked for; until it is there search is exact.

    Args:
        inputs, reading: as in `build_database`: "format", "text_field", "encoding", "keep_duplicates", "record_bytes".
        embedder: an object, in place of the one that the manifest names.
        device, precision: of the embedder; by default the precision that made the keys.

    Raises DatabaseError as `build_database` does, and where another addition was begun and not finished."""
    root = Path(folder)
    given = [inputs] if isinstance(inputs, str) else [str(one) for one in inputs]
    files = InputFiles.of(given, reading.get("format"), root)
    Database(root)
    with lock_folder(root), name_full_disk(root):
        database = Database(root)
        identity = database.manifest["tokenizer"]
        tokenizer = open_tokenizer(identity)
        plan = _begin(root, database, files, reading)
        if plan["index"] is not None:
            check_spec(plan["index"], database.dim, len(database))
        corpus = build_database(
            given,
            root / ADDING / CORPUS,
            tokenizer=identity["name"],
            embedder=None,
            chunk_size=database.chunk_size,
            exclude=root,
            progress=progress,
            **reading,
        )
        if corpus.manifest["tokenizer"]["sha256"] != identity["sha256"]:
            raise DatabaseError(f"tokenizer: {identity['name']!r} is another one by now: put the old one back")
        if database.content_hash() == plan["database"]:
            new = _new_documents(corpus, database, progress)
            if len(new):
                known = database.manifest["embedder"]
                if known is not None and embedder is None:
                    chosen = precision or known.get("precision", "auto")
                    embedder = open_embedder(known, device=device, precision=chosen)
                meter = Meter("embed", int(sum(map(len, _chunks_of(corpus, new)))), progress)
                shards, known_names = 0, database.paths()
                for group in _groups(corpus, new):
                    number = len(database.manifest["shards"]) + shards
                    if committed_shard(root, number) is None:
                        named = functools.partial(unambiguous, known=known_names, folder=files.folder)
                        _write_shard(root, number, database, corpus, group, named, tokenizer, embedder, meter)
                    else:
                        count = sum(map(len, _chunks_of(corpus, group)))
                        meter.before(len(group), count, count)
                    shards += 1
                database = _grown(root, database, corpus, shards)
        if plan["index"] is not None and database.manifest["index"] is None:
            meter = Meter("index", len(database), progress)

            def step(done: int, total: int) -> None:
                meter(0, done - meter.chunks, done - meter.size)

            database = give_index(database, plan["index"], progress=step)
        shutil.rmtree(root / ADDING)
    return database


def _begin(root: Path, database: Database, files: InputFiles, reading: dict[str, Any]) -> dict[str, Any]:
    """Writes the plan down, or checks that what was begun here has the same. -> it"""
    path = root / ADDING / PLAN
    index = database.manifest["index"]
    plan = {
        "files": files.entries,
        "reading": reading,
        "database": database.content_hash(),
        "index": None if index is None else index["asked"],
    }
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        write_json(path, plan)
        return plan
    found = read_json(path)
    changed = files.difference(found["files"]) or ("its settings" if found["reading"] != reading else None)
    if changed:
        raise DatabaseError(
            f"{root / ADDING} holds an unfinished addition of something else ({changed}): finish it with the same "
            "command and input, or delete that folder"
        )
    return found


def _new_documents(corpus: Database, database: Database, progress: Report | None) -> np.ndarray:
    """-> numbers of the corpus's documents whose tokens the database has not, each text once."""
    meter = Meter("match", len(corpus) + len(database), progress)
    theirs, mine = document_hashes(database, meter), document_hashes(corpus, meter)
    _, first = np.unique(mine, return_index=True)
    return np.sort(first[~np.isin(mine[first], theirs)])


def _chunks_of(corpus: Database, documents: np.ndarray) -> Iterator[range]:
    first = corpus.first_chunks()
    return (range(int(first[number]), int(first[number + 1])) for number in documents)


def _groups(corpus: Database, documents: np.ndarray) -> Iterator[np.ndarray]:
    """The documents, in their order, in groups of about SHARD_CHUNKS chunks."""
    sizes = np.fromiter(map(len, _chunks_of(corpus, documents)), np.int64, len(documents))
    group = (sizes.cumsum() - sizes) // SHARD_CHUNKS
    borders = np.flatnonzero(np.diff(group)) + 1
    yield from np.split(documents, borders)


def _write_shard(
    root: Path,
    number: int,
    database: Database,
    corpus: Database,
    documents: np.ndarray,
    named: Callable[[str], str],
    tokenizer: Any,
    embedder: Embedder | None,
    meter: Meter,
) -> None:
    manifest, m = database.manifest, database.chunk_size
    dtype = manifest["embedding_dtype"] or "float16"
    writer = ShardWriter(
        root,
        number,
        chunk_size=m,
        token_dtype=manifest["token_dtype"],
        dim=database.dim,
        embedding_dtype=dtype,
        adding=True,
    )
    ids = np.concatenate([np.arange(of.start, of.stop) for of in _chunks_of(corpus, documents)])
    keys = None if embedder is None else np.empty((len(ids), embedder.dim), np.float32)
    for start in range(0, len(ids), WINDOW):
        part = ids[start : start + WINDOW]
        if keys is not None and embedder is not None:
            tokens, mask = corpus.chunks(part, m)
            texts = [embedded_text(tokenizer, row[there].tolist()) for row, there in zip(tokens, mask)]
            keys[start : start + len(part)] = embedder(texts)
        meter(0, len(part), len(part))
    at = 0
    for of in _chunks_of(corpus, documents):
        tokens, mask = corpus.chunks(np.arange(of.start, of.stop), m)
        source = corpus.source(of.start)
        writer.add(
            tokens[mask].numpy(),
            corpus.offsets(of),
            path=named(source.path),
            record=source.record,
            size=source.bytes,
            embeddings=None if keys is None else keys[at : at + len(of)],
        )
        at += len(of)
    writer.commit()
    meter(len(documents), 0, 0)


def _grown(root: Path, database: Database, corpus: Database, shards: int) -> Database:
    """Writes the manifest that names the new shards."""
    old = database.manifest
    first = len(old["shards"])
    entries = [committed_shard(root, first + number) for number in range(shards)]
    skipped = root / f"skipped-{first:06d}.jsonl"
    shutil.copyfile(corpus.folder / SKIPPED, skipped)
    added = [entry for entry in entries if entry is not None]
    build = dict(old["build"] or {})
    made = corpus.manifest["build"]
    build["added"] = [*build.get("added", []), {"first_shard": first, "skipped": made["skipped"]}]
    if "text_bytes" in build:
        sizes = Database(root, {**old, "shards": added, "counts": _counts(added), "index": None}).document_bytes()
        build["text_bytes"] += int(sizes.sum()) if sizes is not None else 0
    write_manifest(
        root,
        {
            **old,
            "shards": [*old["shards"], *added],
            "counts": _counts([*old["shards"], *added]),
            "index": None,
            "build": build,
            "files": [*old["files"], describe(root, skipped)],
            "earlier": [*old.get("earlier", []), database.content_hash()],
        },
    )
    return Database(root)


def _counts(entries: Sequence[dict[str, Any]]) -> dict[str, int]:
    return {total: sum(entry[total] for entry in entries) for total in ("chunks", "documents", "tokens")}
