"""The neighbours of a training corpus, looked up once and kept beside its tokens (RETRO, section 2.3).

The folder that training reads holds one stream of tokens, in which every document begins at a chunk's border, as in the
database: a text that both have is cut alike in both.

    tokens.npy           integers [chunks * m], documents one after another, each filled up to whole chunks
    document_starts.npy  int64 [documents], where each begins in the stream, a multiple of m
    document_ends.npy    int64 [documents], where each ends: what follows, up to the next start, fills up
    neighbour_ids.npy    int64 [chunks, k], chunks of the database, nearest first; -1 where there is none. Row u is of
                         tokens u * m to u * m + m - 1
    inputs.json          the files that it was made of, their sizes and times
    tokenizer.json       a copy of the tokenizer's, where it has one
    data.json            what it is, with a SHA-256 per file; written last

Neighbours are in the database, whose path and hash `data.json` has. What was retrieved with a chunk is read by the rest
of its document alone, so no neighbour is of that document.

With `held_out` the folder `held-out` in it is another one of the same kind, of documents that training has not and
that are neighbours of none.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import shutil
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from ..errors import DatabaseError
from ..files import json_bytes, replaced, write_bytes, write_json
from ..tokenizers import FILE, HuggingFaceTokenizer, lost_by, open_tokenizer
from .build.builder import Meter, Report, build_database
from .corpus.inputs import InputFiles
from .corpus.matching import blocks, document_hashes, mix
from .database import MANIFEST, Database
from .manifest import describe, inside, lock_folder, map_array, name_full_disk, problem_with, read_json
from .retriever import HIDDEN, Retriever

FORMAT, VERSION = "retro-kernels training data", 2
TOKENS, STARTS, ENDS, IDS, FACTS = (
    "tokens.npy",
    "document_starts.npy",
    "document_ends.npy",
    "neighbour_ids.npy",
    "data.json",
)
HELD_OUT = "held-out"
WORK, PLAN, CORPUS, INPUTS = "work", "plan.json", "corpus", "inputs.json"
BLOCK = 4096
"""Chunks whose neighbours are looked up and kept at a time: what a killed run repeats."""


@dataclasses.dataclass(frozen=True)
class TrainingData:
    """A finished folder, its files mapped."""

    folder: Path
    facts: dict[str, Any]
    """`data.json`: "tokenizer" (its name), "chunk_size", "bytes" of text (None if unknown), "tokens", "documents",
    "chunks", "num_neighbours", "missing" and "chunks_without_neighbours", "filters", "held_out" (its share),
    "eos_token_id" (which ends a document), "vocab_size" (with that), "lost_by_tokenizer" (see
    `tokenizers.lost_by`) and more."""
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
    facts = read_json(root / FACTS, "training data (`retro-kernels db neighbours` makes it)")
    if not isinstance(facts, dict) or facts.get("format") != FORMAT or facts.get("version") != VERSION:
        raise DatabaseError(f"{root / FACTS} is not of format {FORMAT!r}, version {VERSION}: make the folder anew")
    try:
        for entry in facts["files"]:
            path = inside(root, entry["path"])
            size = path.stat().st_size if path.is_file() else -1
            if size != entry["bytes"]:
                raise DatabaseError(f"{path}: {size:,} bytes, {FACTS} says {entry['bytes']:,}: restore it")
        if not {TOKENS, STARTS, ENDS, IDS} <= {entry["path"] for entry in facts["files"]}:
            raise ValueError(f"files: got {facts['files']!r}")
        where = Path(os.path.normpath(root / facts["database"])) if database is None else Path(database)
        found = Database(where)
        if facts["database_sha256"] not in (found.content_hash(), *found.manifest.get("earlier", [])):
            raise DatabaseError(f"{where} is not the database that the neighbours in {root} are of: name that one")
        tokens, starts, ends, ids = (map_array(root / name) for name in (TOKENS, STARTS, ENDS, IDS))
        m, documents = facts["chunk_size"], facts["documents"]
        for name, array, shape in (
            (TOKENS, tokens, (facts["chunks"] * m,)),
            (STARTS, starts, (documents,)),
            (ENDS, ends, (documents,)),
            (IDS, ids, (facts["chunks"], facts["num_neighbours"])),
        ):
            if array.shape != shape or array.dtype.kind not in "iu":
                raise DatabaseError(
                    f"{root / name}: {array.dtype} {list(array.shape)}, {FACTS} says integers {list(shape)}: restore it"
                )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DatabaseError(f"{root / FACTS} is damaged: {type(error).__name__} {error}") from error
    return TrainingData(root, facts, tokens, starts, ends, ids, found)


def precompute_neighbours(
    retriever: Retriever,
    inputs: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    folder: str | os.PathLike[str],
    *,
    same_document: bool = False,
    held_out: float | None = None,
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
        held_out: the share of documents that are kept apart for evaluation, drawn by their text, in the folder
            `held-out` of this one, which is of the same kind. No chunk has one of them as a neighbour, those of
            held-out documents included: to both sides it is as if the database had never held them.
        progress: as in `build_database`; its last stages are "match" and "search".
        reading: `format`, `text_field`, `encoding`, `keep_duplicates`, ... of `build_database`.

    A chunk of a document that the database has too has its key there, and is not embedded again. Raises DatabaseError
    as `build_database` does, and where the corpus changed; ValueError for a corpus without a token.
    """
    root = Path(folder)
    given = [inputs] if isinstance(inputs, (str, os.PathLike)) else list(inputs)
    database = retriever.database
    filters = {
        "same_document": not same_document,
        "max_overlap": retriever.max_overlap,
        "deduplicate": retriever.deduplicate,
    }
    if held_out is not None and not 0.0 < held_out < 1.0:
        raise ValueError(f"held_out: got {held_out}; expected a share of the documents, between 0 and 1, or None")
    own = len(given) == 1 and (Path(given[0]) / MANIFEST).is_file()
    files = None if own else InputFiles.of(given, reading.get("format"), root)
    corpus_hash = (
        Database(os.fspath(given[0])).content_hash()
        if files is None
        else hashlib.sha256(json_bytes(files.entries)).hexdigest()
    )
    plan = {
        "corpus_sha256": corpus_hash,
        "held_out": held_out,
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
        if not _begin(root, plan, files):
            corpus = _corpus(given, root, database, progress, reading)
            if len(corpus) == 0:
                raise ValueError("inputs: no token; expected some text")
            matched = _Matched(corpus, database, held_out, progress)
            _search(root, retriever, corpus, matched, same_document, progress)
            chosen = np.ones(corpus.num_documents, bool)
            if matched.held is not None:
                chosen = ~matched.held
                _finish(root, root / HELD_OUT, plan, retriever, corpus, matched.held)
            _finish(root, root, plan, retriever, corpus, chosen)
        shutil.rmtree(root / WORK, ignore_errors=True)
    return open_neighbours(root, database.folder)


def _begin(root: Path, plan: dict[str, Any], files: InputFiles | None) -> bool:
    """Writes the plan down, or checks that what was begun or finished here has the same. -> is it finished?"""
    finished = (root / FACTS).exists()
    path = root / WORK / PLAN
    found = read_json(root / FACTS).get("request") if finished else read_json(path) if path.exists() else None
    if found is None and not finished:
        others = sorted(one.name for one in root.iterdir() if one.name != WORK)
        if others:
            raise DatabaseError(f"{root} is not empty (it holds {others[0]!r}): name a new folder")
        path.parent.mkdir(exist_ok=True)
        if files is not None:
            write_json(root / WORK / INPUTS, files.entries)
        write_json(path, plan)
    elif found != plan:
        changed = [name for name in plan if not isinstance(found, dict) or found.get(name) != plan[name]]
        known = root / INPUTS if finished else root / WORK / INPUTS
        what = f"other {', '.join(changed)}"
        if changed == ["corpus_sha256"] and files is not None and known.exists():
            what = files.difference(read_json(known)) or what
        raise DatabaseError(
            f"{root} holds {'finished' if finished else 'unfinished'} neighbours of something else ({what}), which are "
            "never overwritten: name another folder, or delete it"
        )
    return finished


def _corpus(
    given: list[Any], root: Path, database: Database, progress: Report | None, reading: dict[str, Any]
) -> Database:
    """The corpus as a database without keys: given as one, or built below `root`."""
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
        root / WORK / CORPUS,
        tokenizer=identity["name"],
        embedder=None,
        chunk_size=database.chunk_size,
        exclude=root,
        progress=progress,
        **reading,
    )


def _write_stream(root: Path, corpus: Database, chosen: np.ndarray) -> None:
    """Writes the tokens of the `chosen` documents of the corpus (bool [documents]), and where these begin and end."""
    if (root / ENDS).exists():
        return
    m, dtype = corpus.chunk_size, np.dtype(corpus.manifest["token_dtype"])
    chunks = np.diff(corpus.first_chunks())
    lengths = np.zeros(corpus.num_documents, np.int64)
    with _array(root / TOKENS, dtype, (int(chunks[chosen].sum()) * m,)) as file:
        for documents, tokens, mask in blocks(corpus):
            np.add.at(lengths, documents, mask.sum(-1))
            rows = chosen[documents]
            file.write(np.where(mask[rows], tokens[rows], 0).astype(dtype).tobytes())
    starts = np.concatenate(([0], chunks[chosen].cumsum()[:-1])) * m
    for name, places in ((STARTS, starts), (ENDS, starts + lengths[chosen])):
        with _array(root / name, places.dtype, places.shape) as file:
            file.write(places.tobytes())


def _search(
    root: Path,
    retriever: Retriever,
    corpus: Database,
    matched: _Matched,
    same_document: bool,
    progress: Report | None,
) -> None:
    """Looks up the neighbours of every chunk of the corpus; what is there already is kept."""
    chunks = len(corpus)
    meter = Meter("search", chunks, progress)
    known: OrderedDict[bytes, torch.Tensor] = OrderedDict()
    for number, first in enumerate(range(0, chunks, BLOCK)):
        path = _block_file(root, number)
        numbers = np.arange(first, min(first + BLOCK, chunks))
        if path.exists():
            meter.before(0, len(numbers), len(numbers))
            continue
        path.parent.mkdir(exist_ok=True)
        documents = corpus.documents(numbers).cpu().numpy()
        tokens, mask = (x.cpu() for x in corpus.chunks(numbers, corpus.chunk_size))
        tokens = tokens.long().masked_fill_(~mask, -1)
        own = matched.own(documents)
        ids = retriever.look_up(
            tokens,
            torch.full_like(own, -1) if same_document else own,
            matched.labels,
            matched.keys(numbers, documents, tokens),
            known,
        )
        write_bytes(path, ids.numpy().tobytes())
        meter(0, len(numbers), len(numbers))


def _block_file(root: Path, number: int) -> Path:
    return root / WORK / "ids" / f"{number:08d}"


def _finish(
    root: Path, folder: Path, plan: dict[str, Any], retriever: Retriever, corpus: Database, chosen: np.ndarray
) -> None:
    """Makes `folder`, which is `root` or in it, the folder of the `chosen` documents."""
    folder.mkdir(exist_ok=True)
    _write_stream(folder, corpus, chosen)
    total, k = len(corpus), retriever.num_neighbours
    sizes = np.diff(corpus.first_chunks())
    chunks, missing, alone = int(sizes[chosen].sum()), 0, 0
    with _array(folder / IDS, np.dtype(np.int64), (chunks, k)) as file:
        for number, first in enumerate(range(0, total, BLOCK)):
            block = _block_file(root, number).read_bytes()
            count = min(BLOCK, total - first)
            if len(block) != count * k * 8:
                raise DatabaseError(f"{_block_file(root, number)}: {len(block):,} bytes; delete it and run this again")
            documents = corpus.documents(np.arange(first, first + count)).cpu().numpy()
            ids = np.frombuffer(block, np.int64).reshape(count, k)[chosen[documents]]
            missing += int((ids < 0).sum())
            alone += int((ids < 0).all(-1).sum())
            file.write(ids.tobytes())
    identity = corpus.manifest["tokenizer"]
    tokenizer = open_tokenizer(identity)
    files = [folder / name for name in (TOKENS, STARTS, ENDS, IDS)]
    if (root / WORK / INPUTS).exists():
        shutil.copyfile(root / WORK / INPUTS, folder / INPUTS)
        files.append(folder / INPUTS)
    facts = {
        "format": FORMAT,
        "version": VERSION,
        "tokenizer": identity["name"],
        "tokenizer_identity": identity,
        "eos_token_id": tokenizer.eos_token_id,
        "vocab_size": max(tokenizer.vocabulary_size, tokenizer.eos_token_id + 1),
        "chunk_size": corpus.chunk_size,
        "lost_by_tokenizer": lost_by(tokenizer),
        "bytes": _text_bytes(corpus, chosen),
        "tokens": int((map_array(folder / ENDS) - map_array(folder / STARTS)).sum()),
        "documents": int(chosen.sum()),
        "chunks": chunks,
        "num_neighbours": k,
        "missing": missing,
        "chunks_without_neighbours": alone,
        "filters": plan["filters"],
        "held_out": plan["held_out"],
        "database": Path(os.path.relpath(retriever.database.folder, folder)).as_posix(),
        "database_sha256": plan["database_sha256"],
        "files": [describe(folder, path) for path in files],
        "request": plan,
    }
    if isinstance(tokenizer, HuggingFaceTokenizer):
        write_bytes(folder / FILE, tokenizer.path.read_bytes())
    write_json(folder / FACTS, facts)


def _text_bytes(corpus: Database, chosen: np.ndarray) -> int | None:
    if chosen.all():
        return (corpus.manifest["build"] or {}).get("text_bytes")
    sizes = corpus.document_bytes()
    return None if sizes is None else int(sizes[chosen].sum())


@contextmanager
def _array(path: Path, dtype: np.dtype, shape: tuple[int, ...]) -> Iterator[IO[bytes]]:
    """A file to write an array's elements to, which is whole, as numpy.save writes it, or absent."""
    with replaced(path) as temporary, temporary.open("wb") as file:
        header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        yield file


class _Matched:
    """Which documents of corpus and database have the same tokens, and which of the corpus are held out."""

    def __init__(self, corpus: Database, database: Database, held_out: float | None, progress: Report | None) -> None:
        same = corpus.content_hash() == database.content_hash()
        meter = Meter("match", len(database) + (0 if same else len(corpus)), progress)
        theirs = document_hashes(database, meter)
        mine = theirs if same else document_hashes(corpus, meter)
        self.held: np.ndarray | None = None if held_out is None else _draw_documents(mine, held_out)
        _, labels = np.unique(np.concatenate([theirs, mine]), return_inverse=True)
        labels = labels.reshape(-1)
        theirs_labels, self._labels = labels[: len(theirs)], labels[len(theirs) :]
        self._corpus, self._database = corpus, database
        # The first document of the database with each label, or -1.
        self._first = np.full(int(labels.max(initial=-1)) + 1, -1, np.int64)
        self._first[theirs_labels[::-1]] = np.arange(len(theirs))[::-1]
        self._corpus_chunks, self._database_chunks = corpus.first_chunks(), database.first_chunks()
        hidden = theirs_labels.copy()
        if self.held is not None:
            hidden[np.isin(theirs, mine[self.held])] = HIDDEN
        self.labels = torch.from_numpy(hidden)

    def own(self, documents: np.ndarray) -> torch.Tensor:
        """int64 [chunks]: labels of these documents of the corpus."""
        return torch.from_numpy(self._labels[documents])

    def keys(self, chunks: np.ndarray, documents: np.ndarray, tokens: torch.Tensor) -> torch.Tensor:
        """float32 [chunks, dim]: the keys that the database has of these chunks of the corpus, NaN where it has not."""
        keys = torch.full((len(chunks), int(self._database.dim or 0)), torch.nan)
        theirs = self._first[self._labels[documents]]
        rows = np.flatnonzero(theirs >= 0)
        at = self._database_chunks[theirs[rows]] + chunks[rows] - self._corpus_chunks[documents[rows]]
        rows, at = rows[at < len(self._database)], at[at < len(self._database)]
        found, mask = (x.cpu() for x in self._database.chunks(at, self._database.chunk_size))
        # Hashes of two texts may be equal.
        equal = (found.long().masked_fill_(~mask, -1) == tokens[rows]).all(-1)
        keys[rows[equal.numpy()]] = torch.from_numpy(self._database.keys(at[equal.numpy()]))
        return keys


def _draw_documents(hashes: np.ndarray, share: float) -> np.ndarray:
    """bool [documents]: about `share` of them, of equal ones all or none, by their text alone: the same again whatever
    the order. Raises ValueError where none would be left on either side."""
    texts, of = np.unique(hashes, return_inverse=True)
    count = max(1, round(share * len(texts)))
    if count >= len(texts):
        raise ValueError(f"held_out: got {share:g} of {len(texts)} different documents; expected some on either side")
    chosen = np.zeros(len(texts), bool)
    chosen[np.argsort(mix(texts), kind="stable")[:count]] = True
    return chosen[of.reshape(-1)]
