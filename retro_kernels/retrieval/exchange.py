"""Databases from and to other projects' files: retro-pytorch's and Megatron's chunks and neighbours in, Parquet out.

An imported chunk keeps its number, so that neighbours stay what they were; they come into `neighbours.npy` of the
database, int64 [queries, k], -1 for a missing one. Only arrays, JSON and HDF5 are read: nothing is unpickled. What
other projects do not store is unknown here too: the characters at which chunks begin are -1.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from ..errors import DatabaseError
from ..files import replaced
from ..tokenizers import ChunkTokenizer, load_tokenizer, open_tokenizer
from .build.writer import ShardWriter, finish_database
from .corpus.readers import Options, Problem, Reader, find
from .database import IMPORTED, Database, token_dtype
from .embedders import Embedder, load_embedder
from .manifest import describe, inside, lock_folder, map_array, name_full_disk, read_json

FORMATS = ("retro-pytorch", "megatron", "numpy")
EMBEDDINGS = "embeddings.npy"
NEIGHBOURS = "neighbours.npy"
SHARD_CHUNKS = 1 << 22
"""Chunks after which an imported shard ends, at the next document's border."""
ROWS = 4096
"""Rows of a Parquet row group, and chunks that are read at a time."""


class _Document(NamedTuple):
    tokens: np.ndarray
    path: str
    record: int | None
    first_chunk: int


class _RetroPytorch:
    """The files that retro-pytorch's TrainingWrapper leaves: `train.chunks.dat` and its companions.

    A row of the chunk file is a chunk and the first token of the next; documents are padded with zeros."""

    def __init__(self, folder: Path, chunk_size: int) -> None:
        self.chunk_size = chunk_size
        stats = read_json(folder / "processed-stats.json")
        count = stats.get("chunks") if isinstance(stats, dict) else None
        if not isinstance(count, int) or count < 1:
            raise DatabaseError(f"{folder / 'processed-stats.json'}: expected the number of chunks, found {count!r}")
        self.count = count
        self._folder = folder
        self._chunks = self._map("train.chunks.dat", chunk_size + 1)
        self._owners = self._map("train.doc_ids.dat", 1)[:, 0]
        if (np.diff(self._owners) < 0).any():
            raise DatabaseError(f"{folder / 'train.doc_ids.dat'}: documents are not in order")
        self.vocabulary_size = None
        embedded = folder / "train.chunks.dat.embedded"
        self.embeddings = self._whole(embedded, np.dtype(np.float32)) if embedded.exists() else None

    def _map(self, name: str, width: int) -> np.ndarray:
        path = self._folder / name
        size = path.stat().st_size if path.exists() else -1
        # The files are as long as the most chunks that were allowed for.
        if size % (4 * width) or size < 4 * width * self.count:
            raise DatabaseError(
                f"{path}: {size:,} bytes are no {self.count:,} rows of {width} int32; expected retro-pytorch's file of "
                f"chunks of {self.chunk_size}: is chunk_size another?"
            )
        return np.memmap(path, np.int32, mode="r").reshape(-1, width)[: self.count]

    def _whole(self, path: Path, dtype: np.dtype) -> np.ndarray:
        found = np.memmap(path, dtype, mode="r")
        if len(found) % self.count:
            raise DatabaseError(f"{path}: {len(found):,} numbers are no rows of {self.count:,} chunks")
        return found.reshape(self.count, -1)

    def documents(self) -> Iterator[_Document]:
        borders = [0, *(np.flatnonzero(np.diff(self._owners)) + 1).tolist(), self.count]
        for start, stop in itertools.pairwise(borders):
            tokens = self._chunks[start:stop, :-1].reshape(-1)
            # All its chunks must stay, for their numbers.
            length = max(int(np.max(np.flatnonzero(tokens), initial=-1)) + 1, len(tokens) - self.chunk_size + 1)
            yield _Document(tokens[:length], "retro-pytorch", int(self._owners[start]), start)

    def neighbours(self) -> np.ndarray | None:
        path = self._folder / "train.chunks.knn.dat"
        if not path.exists():
            return None
        found = np.memmap(path, np.int32, mode="r")
        # Its data set maps rows for chunks beyond the last, by which the file grows by zeros once training has begun.
        k = _last_nonzero(found) // self.count + 1
        if len(found) % k or len(found) < k * self.count:
            raise DatabaseError(f"{path}: {len(found):,} numbers are no rows of {self.count:,} chunks")
        return found[: k * self.count].reshape(self.count, k)


def _last_nonzero(numbers: np.ndarray, block: int = 1 << 22) -> int:
    """Its place, or 0; a block at a time, since the file may be larger than the memory."""
    for stop in range(len(numbers), 0, -block):
        start = max(stop - block, 0)
        places = np.flatnonzero(numbers[start:stop])
        if len(places):
            return start + int(places[-1])
    return 0


class _Megatron:
    """A project folder of Megatron's Retro: `db/merged/train.hdf5` says which tokens of the indexed datasets below
    `data` are chunks. neighbours: a folder of `query`, for the neighbours of one split."""

    TYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}  # noqa: RUF012

    def __init__(self, folder: Path, neighbours: Path | None) -> None:
        self._h5py = _h5py()
        config = read_json(folder / "config.json")
        self.chunk_size = config.get("retro_gpt_chunk_length", 64)
        self.vocabulary_size = config.get("retro_gpt_vocab_size")
        infos = read_json(folder / "db" / "indexed_dataset_infos.json")
        self._prefixes = [info["prefix"] for info in infos]
        self._data = [self._read_indexed(folder / "data", prefix) for prefix in self._prefixes]
        self._path = folder / "db" / "merged" / "train.hdf5"
        self._neighbours = neighbours
        with self._open(self._path) as file:
            self.count = len(self._of(file, "chunks", self._path))
        self.embeddings = None

    def _open(self, path: Path) -> Any:
        try:
            return self._h5py.File(path, "r")
        except OSError as error:
            raise DatabaseError(f"{path} cannot be read as HDF5 ({error})") from None

    def _of(self, file: Any, name: str, path: Path) -> Any:
        if name not in file or file[name].ndim != 2:
            raise DatabaseError(f"{path}: holds no table {name!r}; expected a file of Megatron's Retro")
        return file[name]

    def _read_indexed(self, folder: Path, prefix: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """-> tokens of an indexed dataset, and where each sequence begins and how many it has."""
        path = inside(folder, f"{prefix}.idx")
        try:
            head = path.read_bytes()
            if head[:9] != b"MMIDIDX\x00\x00" or head[9] != 1:
                raise ValueError("no index of version 1")
            dtype = np.dtype(self.TYPES[head[17]])
            count = int(np.frombuffer(head, "<u8", 1, 18)[0])
            lengths = np.frombuffer(head, "<i4", count, 34)
            starts = np.frombuffer(head, "<i8", count, 34 + lengths.nbytes) // dtype.itemsize
            tokens = np.memmap(inside(folder, f"{prefix}.bin"), dtype, mode="r")
        except (OSError, ValueError, KeyError, IndexError) as error:
            raise DatabaseError(f"{path} is no index of a Megatron dataset ({error})") from None
        return tokens, starts, lengths

    def documents(self) -> Iterator[_Document]:
        with self._open(self._path) as file:
            table = self._of(file, "chunks", self._path)
            open_rows = np.empty((0, 5), np.int64)
            first = 0
            for start in range(0, self.count, 1 << 20):
                rows = np.concatenate([open_rows, table[start : start + (1 << 20)].astype(np.int64)])
                borders = [0, *(np.flatnonzero((np.diff(rows[:, :2], axis=0) != 0).any(1)) + 1).tolist()]
                for begin, end in itertools.pairwise(borders):
                    yield self._document(rows[begin:end], first + begin)
                open_rows, first = rows[borders[-1] :], first + borders[-1]
            yield self._document(open_rows, first)

    def _document(self, rows: np.ndarray, first_chunk: int) -> _Document:
        dataset, document = int(rows[0, 0]), int(rows[0, 1])
        where = f"{self._path}: chunk {first_chunk:,} (document {document:,} of dataset {dataset})"
        if dataset >= len(self._data) or document >= len(self._data[dataset][1]):
            raise DatabaseError(f"{where} is of a document that is not there")
        tokens, starts, lengths = self._data[dataset]
        sizes = rows[:, 3] - rows[:, 2]
        if (sizes[:-1] != self.chunk_size).any() or not 0 < sizes[-1] <= self.chunk_size:
            raise DatabaseError(f"{where}: a chunk that is not the document's last has not {self.chunk_size} tokens")
        whole = tokens[int(starts[document]) : int(starts[document]) + int(lengths[document])]
        if int(rows[:, 3].max()) > len(whole):
            raise DatabaseError(f"{where} ends beyond its document's {len(whole):,} tokens")
        # Megatron leaves out chunks that are empty to BERT; the next one kept continues the one before.
        found = np.concatenate([whole[begin:end] for begin, end in rows[:, 2:4].tolist()])
        return _Document(found, self._prefixes[dataset], document, first_chunk)

    def neighbours(self) -> np.ndarray | None:
        if self._neighbours is None:
            return None
        blocks = sorted(self._neighbours.glob("*.hdf5"), key=lambda path: int(path.stem.partition("-")[0]))
        if not blocks:
            raise DatabaseError(f"neighbours: {self._neighbours} holds no blocks of Megatron's, FIRST-LAST.hdf5")
        found, rows = [], 0
        for path in blocks:
            if int(path.stem.partition("-")[0]) != rows:
                raise DatabaseError(f"{path}: a block is missing before it, the blocks end at {rows:,}")
            with self._open(path) as file:
                found.append(np.asarray(self._of(file, "neighbors", path), np.int64))
            rows += len(found[-1])
        return np.concatenate(found)


class _Numpy:
    """A folder with `embeddings.npy`, floating [texts, dim], and files of texts, one chunk each, in the same order."""

    def __init__(self, folder: Path, tokenizer: ChunkTokenizer | None, chunk_size: int) -> None:
        if tokenizer is None:
            raise ValueError("tokenizer: got none; expected one, which cuts the texts into tokens")
        self.tokenizer, self.chunk_size, self.vocabulary_size = tokenizer, chunk_size, tokenizer.vocabulary_size
        path = folder / EMBEDDINGS
        self.embeddings = map_array(path)
        if self.embeddings.ndim != 2 or self.embeddings.dtype.kind != "f" or not self.embeddings.size:
            raise DatabaseError(
                f"{path}: {self.embeddings.dtype} {list(self.embeddings.shape)}; expected floating [texts, dim]"
            )
        self.count = len(self.embeddings)
        self._pieces, self._folder = find([folder])[0], folder

    def documents(self) -> Iterator[_Document]:
        number = 0
        for piece in self._pieces:
            for found in Reader(piece, Options()):
                where = piece.name if found.record is None else f"{piece.name}, record {found.record:,}"
                try:
                    tokens = np.array(self.tokenizer.encode("".join(found.blocks)), np.int64)
                except Problem as problem:
                    raise DatabaseError(f"{where}: {problem}; every embedding needs its text") from None
                if not 0 < len(tokens) <= self.chunk_size:
                    raise DatabaseError(
                        f"{where}: {len(tokens):,} tokens; expected 1 to {self.chunk_size}, a chunk, which has one "
                        "embedding: cut the texts before they are embedded, or take a larger chunk size"
                    )
                if number >= self.count:
                    raise DatabaseError(f"{where}: a text without an embedding, {EMBEDDINGS} has {self.count:,}")
                yield _Document(tokens, piece.name, found.record, number)
                number += 1
        if number != self.count:
            raise DatabaseError(f"{self._folder}: {number:,} texts, {EMBEDDINGS} has {self.count:,} embeddings")

    def neighbours(self) -> None:
        return None


def _h5py() -> Any:
    try:
        import h5py
    except ImportError:
        raise DatabaseError(
            "Megatron's files are HDF5, which needs the package h5py: pip install 'retro_kernels[retrieval]'"
        ) from None
    return h5py


def import_database(
    format: str,
    source: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    tokenizer: str | None = None,
    chunk_size: int = 64,
    neighbours: str | os.PathLike[str] | None = None,
    embedder: str | Embedder | None = None,
) -> Database:
    """Makes the database `folder` of chunks that another project made.

    Args:
        format: "retro-pytorch": `source` is the folder with `processed-stats.json`, `train.chunks.dat`,
            `train.doc_ids.dat` and, where they are there, embeddings and neighbours. "megatron": a Retro project's
            folder with `config.json`, `db` and `data`. "numpy": a folder with your own `embeddings.npy`, floating
            [texts, dim], and the texts in the same order in files as `build_database` reads them, of a chunk at most
            each.
        tokenizer: the one that made the tokens, by name as in `load_tokenizer`; None leaves it unknown.
        chunk_size: of retro-pytorch's files; Megatron's say their own.
        neighbours: a folder of Megatron's `query`.
        embedder: what made the embeddings, by name as in `load_embedder`, if it can embed queries here too.

    A chunk's source is its document's number in the other project. Unless `embedder` is named, that of imported
    embeddings is unknown: queries must be given as embeddings of the same model. Raises DatabaseError for files that
    are missing or do not fit together, and for a folder that is not empty; ValueError for an unknown format.
    """
    if format not in FORMATS:
        raise ValueError(f"format: got {format!r}; expected one of {FORMATS}")
    root, given = Path(folder), Path(source)
    query = None if neighbours is None else Path(neighbours)
    known = None if tokenizer is None else load_tokenizer(tokenizer)
    found: _RetroPytorch | _Megatron | _Numpy
    if format == "numpy":
        found = _Numpy(given, known, chunk_size)
    else:
        found = _RetroPytorch(given, chunk_size) if format == "retro-pytorch" else _Megatron(given, query)
    vocabulary = known.vocabulary_size if known else found.vocabulary_size
    dim = None if found.embeddings is None else found.embeddings.shape[1]
    keys = None if embedder is None else load_embedder(embedder)
    if keys is not None and keys.dim != dim:
        raise DatabaseError(f"embedder: makes {keys.dim} numbers, the imported embeddings have {dim}")
    shape: dict[str, Any] = {
        "chunk_size": found.chunk_size,
        "token_dtype": token_dtype(vocabulary) if vocabulary else "int32",
        "dim": dim,
        "embedding_dtype": "float32",
    }
    if root.exists() and any(root.iterdir()):
        raise DatabaseError(f"{root} is not empty: name a new folder (an import that was stopped is begun anew)")
    root.mkdir(parents=True, exist_ok=True)
    with lock_folder(root), name_full_disk(root):
        shards = _write(root, found, shape)
        files = []
        ids = found.neighbours()
        if ids is not None:
            if int(ids.max(initial=-1)) >= found.count:
                raise DatabaseError(f"neighbours: chunk {int(ids.max()):,} is not one of {found.count:,}")
            np.save(root / NEIGHBOURS, np.maximum(ids.astype(np.int64), -1), allow_pickle=False)
            files.append(describe(root, root / NEIGHBOURS))
        unknown = {"name": format, "kind": IMPORTED, "sha256": "unknown"}
        return finish_database(
            root,
            shards,
            tokenizer=known.identity if known else unknown,
            embedder=None if dim is None else unknown if keys is None else keys.identity,
            build={"imported": format, "skipped": {}, "shorter_than_a_chunk": 0, "unknown_tokens": 0},
            files=files,
            **shape,
        )


def _write(root: Path, found: _RetroPytorch | _Megatron | _Numpy, shape: dict[str, Any]) -> int:
    """-> the number of shards."""
    shards = 0
    writer: ShardWriter | None = None
    for document in found.documents():
        writer = writer or ShardWriter(root, shards, **shape)
        chunks = -(-len(document.tokens) // found.chunk_size)
        rows = slice(document.first_chunk, document.first_chunk + chunks)
        embeddings = None if found.embeddings is None else found.embeddings[rows]
        writer.add(
            document.tokens, np.full(chunks, -1), path=document.path, record=document.record, embeddings=embeddings
        )
        if writer.chunks >= SHARD_CHUNKS:
            writer.commit()
            writer, shards = None, shards + 1
    if writer is None:
        return shards
    writer.commit()
    return shards + 1


def export_parquet(
    database: Database,
    path: str | os.PathLike[str],
    *,
    embeddings: bool = False,
    text: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Writes one row a chunk: `id`, `document`, `path`, `record`, `token_offset`, `tokens` (without padding), `text`
    (its tokens decoded by the database's tokenizer) and `embedding`. -> rows

    progress: called with the rows that are written, and all. The file is whole or absent. Raises DatabaseError where it
    exists, where pyarrow is not installed, for embeddings that the database has not, and where the tokenizer is another
    one by now."""
    try:
        import pyarrow as arrow
        import pyarrow.parquet as parquet
    except ImportError:
        raise DatabaseError("Parquet needs the package pyarrow: pip install 'retro_kernels[retrieval]'") from None
    target = Path(path)
    if target.exists():
        raise DatabaseError(f"{target} exists, and is never overwritten: name another file")
    tokenizer = open_tokenizer(database.manifest["tokenizer"]) if text else None
    stored = arrow.uint16() if database.manifest["token_dtype"] == "uint16" else arrow.int32()
    fields = [("id", arrow.int64()), ("document", arrow.int64()), ("path", arrow.string()), ("record", arrow.int64())]
    fields += [("token_offset", arrow.int64()), ("tokens", arrow.list_(stored))]
    if text:
        fields.append(("text", arrow.string()))
    if embeddings:
        if database.dim is None:
            raise DatabaseError(f"embeddings: {database.folder} holds none")
        kind = arrow.float16() if database.manifest["embedding_dtype"] == "float16" else arrow.float32()
        fields.append(("embedding", arrow.list_(kind, database.dim)))
    schema = arrow.schema(fields)
    with (
        name_full_disk(target.parent),
        replaced(target) as temporary,
        parquet.ParquetWriter(temporary, schema) as writer,
    ):
        for ids, vectors in _blocks(database, embeddings):
            sources = [database.source(chunk) for chunk in ids]
            tokens, _ = database.chunks(torch.arange(ids.start, ids.stop), database.chunk_size)
            kept = [row[: source.num_tokens] for row, source in zip(tokens.cpu().numpy(), sources)]
            columns: dict[str, Any] = {
                "id": list(ids),
                "document": [source.document for source in sources],
                # A file's name may be no UTF-8, and Parquet knows nothing else.
                "path": [source.path.encode("utf-8", "backslashreplace").decode() for source in sources],
                "record": [source.record for source in sources],
                "token_offset": [source.token_offset for source in sources],
                "tokens": kept,
            }
            if tokenizer is not None:
                columns["text"] = [tokenizer.decode(row.tolist()) for row in kept]
            if vectors is not None:
                columns["embedding"] = list(np.asarray(vectors))
            writer.write_table(arrow.table(columns, schema=schema))
            if progress is not None:
                progress(ids.stop, len(database))
    return len(database)


def _blocks(database: Database, embeddings: bool) -> Iterator[tuple[range, np.ndarray | None]]:
    """Chunk numbers, at most ROWS at a time, with their embeddings if they are wanted."""
    if embeddings:
        yield from ((range(first, first + len(found)), found) for first, found in database.embeddings(ROWS))
    else:
        yield from ((range(first, min(first + ROWS, len(database))), None) for first in range(0, len(database), ROWS))
