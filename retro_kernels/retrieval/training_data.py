"""The neighbours of a training corpus, looked up once and kept beside its tokens (RETRO, section 2.3).

The folder that training reads holds one stream of tokens, in which every document begins at a chunk's border, as in the
database: a text that both have is cut alike in both.

    tokens.npy           integers [chunks * m], documents one after another, each filled up to whole chunks
    document_starts.npy  int64 [documents], where each begins in the stream, a multiple of m
    document_ends.npy    int64 [documents], where each ends: what follows, up to the next start, fills up
    neighbour_ids.npy    int64 [chunks, k], chunks of the database, nearest first; -1 where there is none. Row u is of
                         tokens u * m to u * m + m - 1
    data.json            what it is, with a SHA-256 per file; written last

Neighbours are in the database, whose path and hash `data.json` has. What was retrieved with a chunk is read by the rest
of its document alone, so no neighbour is of that document.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from ..errors import DatabaseError
from ..files import replaced, write_bytes, write_json
from ..tokenizers import open_tokenizer
from .build.builder import Meter, Report, build_database
from .database import MANIFEST, Database
from .manifest import describe, inside, lock_folder, name_full_disk, problem_with, read_json
from .retriever import Retriever

FORMAT, VERSION = "retro-kernels training data", 2
TOKENS, STARTS, ENDS, IDS, FACTS = (
    "tokens.npy",
    "document_starts.npy",
    "document_ends.npy",
    "neighbour_ids.npy",
    "data.json",
)
WORK, PLAN, CORPUS = "work", "plan.json", "corpus"
BLOCK = 4096
"""Chunks whose neighbours are looked up and kept at a time: what a killed run repeats."""
SCANNED = 1 << 16
"""Chunks that are read at a time."""


@dataclasses.dataclass(frozen=True)
class TrainingData:
    """A finished folder, its files mapped."""

    folder: Path
    facts: dict[str, Any]
    """`data.json`: "tokenizer" (its name), "chunk_size", "bytes" of text (None if unknown), "tokens", "documents",
    "chunks", "num_neighbours", "missing", "filters", "eos_token_id" (which ends a document), "vocab_size" (with that)
    and more."""
    tokens: np.ndarray
    document_starts: np.ndarray
    document_ends: np.ndarray
    ids: np.ndarray
    """int64 [chunks, k], for `database.chunks`."""
    database: Database

    def verify(self) -> list[str]:
        """Reads every file. -> what is wrong, one line each; empty where every checksum holds."""
        problems = (problem_with(self.folder, entry) for entry in self.facts["files"])
        return [problem for problem in problems if problem]


def open_neighbours(folder: str | os.PathLike[str], database: str | os.PathLike[str] | None = None) -> TrainingData:
    """Opens what `precompute_neighbours` made. database: where its database is by now, if it was moved.

    Raises DatabaseError where the folder is unfinished, of another version, or cut short, and where the database is
    absent or another one."""
    root = Path(folder)
    facts = read_json(root / FACTS)
    if not isinstance(facts, dict) or facts.get("format") != FORMAT or facts.get("version") != VERSION:
        raise DatabaseError(f"{root / FACTS} is not of format {FORMAT!r}, version {VERSION}: make the folder anew")
    try:
        for entry in facts["files"]:
            path = inside(root, entry["path"])
            size = path.stat().st_size if path.is_file() else -1
            if size != entry["bytes"]:
                raise DatabaseError(f"{path}: {size:,} bytes, {FACTS} says {entry['bytes']:,}: restore it")
        where = Path(os.path.normpath(root / facts["database"])) if database is None else Path(database)
        found = Database(where)
        if found.content_hash() != facts["database_sha256"]:
            raise DatabaseError(f"{where} is not the database that the neighbours in {root} are of: name that one")
        tokens, starts, ends, ids = (_map_array(root / name) for name in (TOKENS, STARTS, ENDS, IDS))
    except (KeyError, TypeError) as error:
        raise DatabaseError(f"{root / FACTS} is damaged: {type(error).__name__} {error}") from error
    return TrainingData(root, facts, tokens, starts, ends, ids, found)


def precompute_neighbours(
    retriever: Retriever,
    inputs: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    folder: str | os.PathLike[str],
    *,
    same_document: bool = False,
    progress: Report | None = None,
    **reading: Any,
) -> TrainingData:
    """Looks up the neighbours of every chunk of a corpus and writes the folder `folder`, or goes on where an earlier
    call was stopped. Called again when all is done it returns the finished folder.

    Args:
        retriever: on the database; says k and the filters.
        inputs: files, folders and globs, as in `build_database`, tokenised by the database's tokenizer; or the folder
            of a database with this tokenizer and chunk size, which may be the same.
        same_document: let neighbours be of the same document, which is found in the database by its text.
        progress: as in `build_database`; its last stages are "match" and "search".
        reading: `format`, `text_field`, `encoding`, `keep_duplicates`, ... of `build_database`.

    Raises DatabaseError as `build_database` does; ValueError for a corpus without a token.
    """
    root = Path(folder)
    given = [inputs] if isinstance(inputs, (str, os.PathLike)) else list(inputs)
    database = retriever.database
    filters = {
        "same_document": not same_document,
        "max_overlap": retriever.max_overlap,
        "deduplicate": retriever.deduplicate,
    }
    plan = {
        "inputs": [os.path.abspath(one) for one in given],
        "reading": reading,
        "database_sha256": database.content_hash(),
        "num_neighbours": retriever.num_neighbours,
        "retrieved_length": retriever.retrieved_length,
        "filters": filters,
        "search": retriever.search_settings,
    }
    if root.exists() and not root.is_dir():
        raise DatabaseError(f"{root} is a file; expected a new folder")
    root.mkdir(parents=True, exist_ok=True)
    with lock_folder(root), name_full_disk(root):
        if not _begin(root, plan):
            corpus = _corpus(given, root / WORK / CORPUS, database, progress, reading)
            _write_stream(root, corpus)
            _search(root, retriever, corpus, same_document, progress)
            _finish(root, plan, retriever, corpus)
        shutil.rmtree(root / WORK, ignore_errors=True)
    return open_neighbours(root, database.folder)


def _begin(root: Path, plan: dict[str, Any]) -> bool:
    """Writes the plan down, or checks that what was begun or finished here has the same. -> is it finished?"""
    finished = (root / FACTS).exists()
    path = root / WORK / PLAN
    found = read_json(root / FACTS).get("request") if finished else read_json(path) if path.exists() else None
    if found is None and not finished:
        others = sorted(one.name for one in root.iterdir() if one.name != WORK)
        if others:
            raise DatabaseError(f"{root} is not empty (it holds {others[0]!r}): name a new folder")
        path.parent.mkdir(exist_ok=True)
        write_json(path, plan)
    elif found != plan:
        changed = [name for name in plan if not isinstance(found, dict) or found.get(name) != plan[name]]
        raise DatabaseError(
            f"{root} holds {'finished' if finished else 'unfinished'} neighbours of something else (other "
            f"{', '.join(changed)}), which are never overwritten: name another folder, or delete it"
        )
    return finished


def _corpus(
    given: list[Any], folder: Path, database: Database, progress: Report | None, reading: dict[str, Any]
) -> Database:
    """The corpus as a database without keys: given as one, or built in `folder`."""
    identity = database.manifest["tokenizer"]
    if len(given) == 1 and (Path(given[0]) / MANIFEST).is_file():
        if reading:
            raise ValueError(f"{', '.join(reading)}: given with a database as input; expected files")
        corpus = Database(given[0])
        theirs = corpus.manifest["tokenizer"]
        if theirs.get("sha256") != identity.get("sha256") or corpus.chunk_size != database.chunk_size:
            raise DatabaseError(
                f"{given[0]} has the tokenizer {theirs.get('name')!r} and chunks of {corpus.chunk_size}, "
                f"{database.folder} {identity.get('name')!r} and {database.chunk_size}: build it with the same"
            )
        return corpus
    return build_database(
        given,
        folder,
        tokenizer=identity["name"],
        embedder=None,
        chunk_size=database.chunk_size,
        progress=progress,
        **reading,
    )


def _blocks(database: Database) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """All chunks, a block at a time: their documents [c], tokens [c, m] and which are there [c, m]."""
    for first in range(0, len(database), SCANNED):
        ids = torch.arange(first, min(first + SCANNED, len(database)))
        tokens, mask = (x.cpu().numpy() for x in database.chunks(ids, database.chunk_size))
        yield database.documents(ids).cpu().numpy(), tokens, mask


def _write_stream(root: Path, corpus: Database) -> None:
    """Writes the corpus's tokens, and where its documents begin and end."""
    if len(corpus) == 0:
        raise ValueError("inputs: no token; expected some text")
    if (root / ENDS).exists():
        return
    m, dtype = corpus.chunk_size, np.dtype(corpus.manifest["token_dtype"])
    lengths, chunks = (np.zeros(corpus.num_documents, np.int64) for _ in range(2))
    with _array(root / TOKENS, dtype, (len(corpus) * m,)) as file:
        for documents, tokens, mask in _blocks(corpus):
            np.add.at(lengths, documents, mask.sum(-1))
            np.add.at(chunks, documents, 1)
            file.write(np.where(mask, tokens, 0).astype(dtype).tobytes())
    starts = np.concatenate(([0], chunks.cumsum()[:-1])) * m
    for name, places in ((STARTS, starts), (ENDS, starts + lengths)):
        with _array(root / name, places.dtype, places.shape) as file:
            file.write(places.tobytes())


def _search(root: Path, retriever: Retriever, corpus: Database, same_document: bool, progress: Report | None) -> None:
    """Looks up the neighbours of every chunk of the corpus; what is there already is kept."""
    chunks = len(corpus)
    owners = None if same_document else Owners(corpus, retriever.database, progress)
    meter = Meter("search", chunks, progress)
    for number, first in enumerate(range(0, chunks, BLOCK)):
        path = _block_file(root, number)
        numbers = torch.arange(first, min(first + BLOCK, chunks))
        if path.exists():
            meter.before(0, len(numbers), len(numbers))
            continue
        path.parent.mkdir(exist_ok=True)
        own = None if owners is None else owners(corpus.documents(numbers).cpu().numpy())
        tokens, mask = corpus.chunks(numbers, corpus.chunk_size)
        found = retriever.retrieve(tokens.long().masked_fill_(~mask, -1), documents=own)
        write_bytes(path, found.ids.cpu().numpy().tobytes())
        meter(0, len(numbers), len(numbers))


def _block_file(root: Path, number: int) -> Path:
    return root / WORK / "ids" / f"{number:08d}"


def _finish(root: Path, plan: dict[str, Any], retriever: Retriever, corpus: Database) -> None:
    chunks, k, missing = len(corpus), retriever.num_neighbours, 0
    with _array(root / IDS, np.dtype(np.int64), (chunks, k)) as file:
        for number, first in enumerate(range(0, chunks, BLOCK)):
            block = _block_file(root, number).read_bytes()
            if len(block) != min(BLOCK, chunks - first) * k * 8:
                raise DatabaseError(f"{_block_file(root, number)}: {len(block):,} bytes; delete it and run this again")
            missing += int((np.frombuffer(block, np.int64) < 0).sum())
            file.write(block)
    identity = corpus.manifest["tokenizer"]
    tokenizer = open_tokenizer(identity)
    facts = {
        "format": FORMAT,
        "version": VERSION,
        "tokenizer": identity["name"],
        "tokenizer_identity": identity,
        "eos_token_id": tokenizer.eos_token_id,
        "vocab_size": max(tokenizer.vocabulary_size, tokenizer.eos_token_id + 1),
        "chunk_size": corpus.chunk_size,
        "bytes": (corpus.manifest["build"] or {}).get("text_bytes"),
        "tokens": corpus.manifest["counts"]["tokens"],
        "documents": corpus.num_documents,
        "chunks": chunks,
        "num_neighbours": k,
        "missing": missing,
        "filters": plan["filters"],
        "database": Path(os.path.relpath(retriever.database.folder, root)).as_posix(),
        "database_sha256": plan["database_sha256"],
        "files": [describe(root, root / name) for name in (TOKENS, STARTS, ENDS, IDS)],
        "request": plan,
    }
    write_json(root / FACTS, facts)


def _map_array(path: Path) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except ValueError as error:
        raise DatabaseError(
            f"{path} holds no array of numbers ({error}): restore it, or make the folder anew"
        ) from None


@contextmanager
def _array(path: Path, dtype: np.dtype, shape: tuple[int, ...]) -> Iterator[IO[bytes]]:
    """A file to write an array's elements to, which is whole, as numpy.save writes it, or absent."""
    with replaced(path) as temporary, temporary.open("wb") as file:
        header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        yield file


class Owners:
    """Finds the documents of the database that are a document of the corpus."""

    def __init__(self, corpus: Database, database: Database, progress: Report | None) -> None:
        same = corpus.content_hash() == database.content_hash()
        meter = Meter("match", len(database) + (0 if same else len(corpus)), progress)
        theirs = _document_hashes(database, meter)
        mine = theirs if same else _document_hashes(corpus, meter)
        self._order = np.argsort(theirs, kind="stable")
        ranked = theirs[self._order]
        self._begin, self._end = (np.searchsorted(ranked, mine, side=side) for side in ("left", "right"))

    def __call__(self, documents: np.ndarray) -> torch.Tensor:
        """int64 [chunks, d]: the database's documents with the text of each of these documents of the corpus, -1 for
        none more."""
        begin, end = self._begin[documents], self._end[documents]
        column = np.arange(int((end - begin).max(initial=0)))
        place = np.minimum(begin[:, None] + column, len(self._order) - 1)
        return torch.from_numpy(np.where(begin[:, None] + column < end[:, None], self._order[place], -1))


def _document_hashes(database: Database, meter: Meter) -> np.ndarray:
    """uint64 [documents]: the sum of all its tokens, each times a number that belongs to its place."""
    hashes = np.zeros(database.num_documents, np.uint64)
    first = np.full(database.num_documents, -1, np.int64)
    at = 0
    within = _mix(np.arange(database.chunk_size))
    for documents, tokens, mask in _blocks(database):
        numbers, begin = np.unique(documents, return_index=True)
        new = first[numbers] < 0
        first[numbers[new]] = at + begin[new]
        place = np.arange(at, at + len(documents)) - first[documents]
        chunks = (((tokens.astype(np.uint64) + np.uint64(1)) * mask) * within).sum(-1, dtype=np.uint64)
        np.add.at(hashes, documents, chunks * _mix(place))
        at += len(documents)
        meter(0, len(documents), len(documents))
    return hashes


def _mix(numbers: np.ndarray) -> np.ndarray:
    """A random odd-looking uint64 for each number, the same everywhere (SplitMix64's finaliser)."""
    x = (numbers.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (x ^ (x >> np.uint64(31))) | np.uint64(1)
