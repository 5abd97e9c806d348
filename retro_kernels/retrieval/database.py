"""The chunk store: token streams on disk, gathered at memory-map speed.

A database is a folder: `manifest.json` names every other file with its size and SHA-256. A shard holds whole documents,
each padded to a multiple of `chunk_size`, so chunk i of a shard starts at token i * chunk_size of its one flat stream,
and a neighbour with its continuation (RETRO, section 2.1: [N, F]) is one contiguous read. Chunks and documents are
numbered through all shards. Files of a shard, all raw little-endian arrays:

    tokens            [chunks * chunk_size]  uint16 or int32
    chunk_documents   [chunks]               int32, the document's number within the shard
    chunk_offsets     [chunks]               int64, where the chunk begins in its document, in characters
    document_chunks   [documents + 1]        int64, the document's first chunk
    document_ends     [documents]            int64, where the document's tokens end in the stream (the rest is padding)
    sources           bytes                  one JSON object per document: "path", and "record" and "bytes" if known
    source_starts     [documents + 1]        int64, where each begins in `sources`
    embeddings        [chunks, dim]          float16 or float32 (absent where none were made)
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import DatabaseError
from ..files import json_bytes, write_json
from .index.devices import check_memory, find_device
from .manifest import inside, problem_with, read_json

MAGIC = "retro-kernels retrieval database"
VERSION = 1
MANIFEST = "manifest.json"
INDEX_FOLDER = "index"
IMPORTED = "imported"
"""The kind of a tokenizer or embedder that another project used and did not name."""
TOKEN_DTYPES = ("uint16", "int32")
EMBEDDING_DTYPES = ("float16", "float32")


@dataclasses.dataclass(frozen=True)
class Source:
    """The origin of a chunk."""

    document: int
    """The document's number in the database."""
    path: str
    """The input file, relative to the input it was found under."""
    record: int | None
    """The line (JSON Lines) or row (Parquet) in that file, from 0; None where the file is the document."""
    offset: int
    """The character of the document's text at which the chunk begins."""
    token_offset: int
    """The token of the document at which the chunk begins."""
    num_tokens: int
    """Tokens of the chunk that are not padding."""
    bytes: int | None = None
    """Of the document's text, if known."""


def token_dtype(vocabulary_size: int) -> str:
    """The narrowest type that holds every token number."""
    return "uint16" if vocabulary_size <= 1 << 16 else "int32"


def file_bytes(manifest: dict[str, Any], shard: dict[str, Any]) -> dict[str, int | None]:
    """The size that every file of a shard must have, in bytes (None: any)."""
    chunks, documents = shard["chunks"], shard["documents"]
    sizes: dict[str, int | None] = {
        "tokens": chunks * manifest["chunk_size"] * np.dtype(manifest["token_dtype"]).itemsize,
        "chunk_documents": chunks * 4,
        "chunk_offsets": chunks * 8,
        "document_chunks": (documents + 1) * 8,
        "document_ends": documents * 8,
        "sources": None,
        "source_starts": (documents + 1) * 8,
    }
    if manifest["embedder"] is not None:
        sizes["embeddings"] = chunks * manifest["dim"] * np.dtype(manifest["embedding_dtype"]).itemsize
    return sizes


class _Shard:
    """One shard's arrays, memory-mapped."""

    def __init__(self, folder: Path, manifest: dict[str, Any], entry: dict[str, Any]) -> None:
        self.num_chunks, self.num_documents = entry["chunks"], entry["documents"]
        self.paths = {name: inside(folder, file["path"]) for name, file in entry["files"].items()}
        # torch gathers int16 but not uint16: the bits are reinterpreted, and the sign is taken off after the gather.
        stored = {"uint16": "int16", "int32": "int32"}[manifest["token_dtype"]]
        self.tokens = torch.from_numpy(self._map("tokens", stored))
        self.documents = torch.from_numpy(self._map("chunk_documents", "int32"))
        self.ends = torch.from_numpy(self._map("document_ends", "int64"))
        self.offsets = self._map("chunk_offsets", "int64")
        self.first_chunks = self._map("document_chunks", "int64")
        self.source_starts = self._map("source_starts", "int64")

    def _map(self, name: str, dtype: str) -> np.ndarray:
        path = self.paths[name]
        if path.stat().st_size == 0:
            return np.empty(0, dtype)
        # Copy-on-write: torch refuses to wrap read-only arrays, and nothing written here could reach the file.
        return np.memmap(path, dtype=dtype, mode="c")

    @property
    def nbytes(self) -> int:
        """Of what `to` moves."""
        return sum(x.nbytes for x in (self.tokens, self.documents, self.ends))

    def embeddings(self, dtype: str, dim: int) -> np.ndarray:
        if self.num_chunks == 0:
            return np.empty((0, dim), dtype)
        return np.memmap(self.paths["embeddings"], dtype=dtype, mode="r").reshape(-1, dim)

    def to(self, device: torch.device) -> None:
        self.tokens, self.documents, self.ends = (x.to(device) for x in (self.tokens, self.documents, self.ends))

    def gather(self, ids: Tensor, length: int, chunk_size: int) -> tuple[Tensor, Tensor]:
        """-> tokens [ids, length] in the stored type, garbage where they are not valid, and the number that is valid
        of each, int64 [ids]."""
        starts = ids * chunk_size
        owners = self.documents.index_select(0, ids).long()
        valid = self.ends.index_select(0, owners).sub_(starts).clamp_(max=length)
        # Rows of a view, one a chunk: index_select copies whole rows, several times as fast as indexing.
        rows = max(0, (len(self.tokens) - length) // chunk_size + 1)
        late = ids >= rows
        if not bool(late.any()):
            return self._rows(rows, length, chunk_size).index_select(0, ids), valid
        # Those few that would run past the stream's end are read token by token.
        found = torch.empty(len(ids), length, dtype=self.tokens.dtype, device=ids.device)
        if rows:
            found = self._rows(rows, length, chunk_size).index_select(0, ids.clamp(max=rows - 1))
        places = starts[late][:, None] + torch.arange(length, device=ids.device)
        found[late] = self.tokens[places.clamp(max=len(self.tokens) - 1)]
        return found, valid

    def _rows(self, rows: int, length: int, chunk_size: int) -> Tensor:
        return self.tokens.as_strided((rows, length), (chunk_size, 1))

    def source(self, chunk: int, chunk_size: int, first_document: int) -> Source:
        document = int(self.documents[chunk])
        start, stop = self.source_starts[document : document + 2].tolist()
        with self.paths["sources"].open("rb") as file:
            if not 0 <= start < stop <= os.fstat(file.fileno()).st_size:
                raise ValueError(f"sources of {start} to {stop}")
            file.seek(start)
            line = file.read(stop - start)
        known = json.loads(line)
        if not isinstance(known["path"], str) or not isinstance(known.get("record"), (int, type(None))):
            raise TypeError(f"source {known!r}")
        token_offset = (chunk - int(self.first_chunks[document])) * chunk_size
        return Source(
            first_document + document,
            known["path"],
            known.get("record"),
            int(self.offsets[chunk]),
            token_offset,
            min(chunk_size, int(self.ends[document]) - chunk * chunk_size),
            known.get("bytes"),
        )


class Database:
    """A finished retrieval database, opened for reading.

    Opening checks the manifest and the size of every file; `verify` reads and checks everything. Raises DatabaseError
    where the folder is no database, is of another version, or lacks or cuts short a file.

    manifest: given only while the database is built, before there is one in the folder.
    """

    def __init__(self, folder: str | Path, manifest: dict[str, Any] | None = None) -> None:
        if sys.byteorder != "little":
            raise DatabaseError("databases are little-endian, this machine is not: build and read them on another one")
        self.folder = Path(folder)
        found = read_json(self.folder / MANIFEST) if manifest is None else manifest
        self.manifest = checked_manifest(found, self.folder)
        self._shards = [_Shard(self.folder, self.manifest, entry) for entry in self.manifest["shards"]]
        self._first_chunk = np.cumsum([0] + [shard.num_chunks for shard in self._shards])
        self._first_document = np.cumsum([0] + [shard.num_documents for shard in self._shards])
        self.device = torch.device("cpu")

    def __len__(self) -> int:
        return int(self._first_chunk[-1])

    def __repr__(self) -> str:
        return f"Database({str(self.folder)!r}: {len(self):,} chunks of {self.num_documents:,} documents)"

    @property
    def num_documents(self) -> int:
        return int(self._first_document[-1])

    @property
    def chunk_size(self) -> int:
        return self.manifest["chunk_size"]

    @property
    def dim(self) -> int | None:
        """The width of an embedding; None where the database has none."""
        return self.manifest["dim"]

    @property
    def index_folder(self) -> Path:
        """The folder that `index.build_index` writes."""
        return self.folder / INDEX_FOLDER

    def to(self, device: torch.device | str) -> Database:
        """Loads tokens and document numbers onto `device`: a small store can live on the GPU. -> self

        Raises DatabaseError where there is no such GPU, or its free memory does not hold them."""
        wanted = find_device(device)
        check_memory(
            wanted,
            sum(shard.nbytes for shard in self._shards),
            f"the tokens of {self.folder}",
            "leave the store where it is, memory-mapped, and gather into pinned memory (out=)",
        )
        self.device = wanted
        for shard in self._shards:
            shard.to(self.device)
        return self

    def chunks(
        self, ids: Tensor | np.ndarray, length: int | None = None, *, out: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Chunks and their continuations, `length` tokens from each chunk's start (2 * chunk_size by default).

        ids: int64 of any shape; a negative one is a missing neighbour. -> tokens int32 [..., length], 0 where the mask
        is False, and mask bool [..., length], False beyond the end of the chunk's document and for a missing neighbour.
        Both on the database's device. out: the tensors to fill and return, contiguous, tokens int32 or int64: pinned
        ones, for instance, which go to a GPU without waiting. Raises IndexError for ids beyond the last chunk."""
        length = 2 * self.chunk_size if length is None else length
        if length < 1:
            raise ValueError(f"length: got {length}; expected at least 1 token")
        flat, shape = self._flat(ids)
        if out is None:
            tokens = torch.empty(*shape, length, dtype=torch.int32, device=self.device)
            out = tokens, torch.empty(*shape, length, dtype=torch.bool, device=self.device)
        else:
            self._check_out(out, (*shape, length))
        tokens, mask = (x.view(len(flat), length) for x in out)
        valid = torch.zeros(len(flat), dtype=torch.int64, device=self.device)
        for number, (shard, first, rows) in self._numbered_shards(flat):
            try:
                found, count = shard.gather((flat if rows is None else flat[rows]) - first, length, self.chunk_size)
            except IndexError as error:
                raise self._damaged(number, error) from error
            if rows is None:
                tokens.copy_(found)
                valid = count
            else:
                tokens.index_copy_(0, rows, found.to(tokens.dtype))
                valid.index_copy_(0, rows, count)
        if self.manifest["token_dtype"] == "uint16":
            tokens &= 0xFFFF
        # Most rows are whole: only the others need blanking.
        mask.fill_(True)
        short = (valid < length).nonzero()[:, 0]
        if len(short):
            there = torch.arange(length, device=self.device) < valid[short, None]
            mask.index_copy_(0, short, there)
            tokens.index_copy_(0, short, tokens.index_select(0, short).masked_fill_(~there, 0))
        return out

    def _check_out(self, out: tuple[Tensor, Tensor], shape: tuple[int, ...]) -> None:
        kinds = ((torch.int32, torch.int64), (torch.bool,))
        for name, tensor, dtypes in zip(("tokens", "mask"), out, kinds):
            if tensor.dtype not in dtypes or tuple(tensor.shape) != shape or not tensor.is_contiguous():
                raise ValueError(
                    f"out: got {name} {tensor.dtype} {list(tensor.shape)}; expected contiguous "
                    f"{' or '.join(map(str, dtypes))} {list(shape)}"
                )
            if tensor.device != self.device:
                raise ValueError(f"out: got {name} on {tensor.device}; expected {self.device}, where the database is")

    def documents(self, ids: Tensor | np.ndarray) -> Tensor:
        """-> int64, of the shape of `ids`: the document of each chunk, -1 for a negative id."""
        flat, shape = self._flat(ids)
        documents = torch.full_like(flat, -1)
        for number, (shard, first, rows) in self._numbered_shards(flat):
            chosen = slice(None) if rows is None else rows
            local = shard.documents[flat[chosen] - first].long()
            if len(local) and not 0 <= int(local.min()) <= int(local.max()) < shard.num_documents:
                raise self._damaged(number, "chunk_documents names a document that the shard does not have")
            documents[chosen] = local + int(self._first_document[number])
        return documents.view(shape)

    def _damaged(self, shard: int, what: object) -> DatabaseError:
        return DatabaseError(
            f"{self._shards[shard].paths['tokens'].parent} is damaged ({what}): `retro-kernels db verify "
            f"{self.folder}` names the file; restore it, or build the database anew"
        )

    def source(self, chunk: int) -> Source:
        """-> where one chunk comes from. Raises IndexError for a negative number or one beyond the last chunk."""
        if not 0 <= chunk < len(self):
            raise IndexError(f"chunk: got {chunk}; the database has {len(self)} chunks")
        number = int(np.searchsorted(self._first_chunk, chunk, side="right")) - 1
        local = chunk - int(self._first_chunk[number])
        try:
            return self._shards[number].source(local, self.chunk_size, int(self._first_document[number]))
        except (IndexError, KeyError, OSError, TypeError, ValueError, RecursionError) as error:
            raise self._damaged(number, error) from error

    def sources(self, ids: Tensor | np.ndarray) -> list[Source | None]:
        """-> where each chunk of `ids` (flattened) comes from; None for a negative id."""
        return [self.source(chunk) if chunk >= 0 else None for chunk in self._flat(ids)[0].tolist()]

    def first_chunks(self) -> np.ndarray:
        """-> int64 [documents + 1], each document's first chunk, and behind the last one's the number of all chunks."""
        parts = [shard.first_chunks[:-1] + first for shard, first in zip(self._shards, self._first_chunk.tolist())]
        return np.concatenate([*parts, [len(self)]])

    def offsets(self, chunks: range) -> np.ndarray:
        """-> int64: where chunks of one shard begin in their documents, in characters."""
        number = int(np.searchsorted(self._first_chunk, chunks.start, side="right")) - 1
        first = int(self._first_chunk[number])
        return self._shards[number].offsets[chunks.start - first : chunks.stop - first]

    def _facts_of_documents(self) -> Iterator[dict[str, Any]]:
        for number, shard in enumerate(self._shards):
            with shard.paths["sources"].open("rb") as file:
                for line in file:
                    try:
                        known = json.loads(line)
                        yield {"path": known["path"], "bytes": known.get("bytes")}
                    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
                        raise self._damaged(number, error) from error

    def paths(self) -> set[str]:
        """-> the files that documents are of."""
        return {known["path"] for known in self._facts_of_documents()}

    def document_bytes(self) -> np.ndarray | None:
        """-> int64 [documents], the bytes of each document's text; None where the database does not know."""
        sizes = [known["bytes"] for known in self._facts_of_documents()]
        known = len(sizes) == self.num_documents and all(type(size) is int for size in sizes)
        return np.array(sizes, np.int64) if known else None

    def embeddings(self, block: int = 65536) -> Iterator[tuple[int, np.ndarray]]:
        """Yields (number of the first chunk, [at most `block`, dim] view of the memory map) through all chunks.

        Raises DatabaseError, at the first step, where the database was built without an embedder."""
        if self.dim is None:
            raise DatabaseError(f"{self.folder} holds no embeddings: it was built with embedder=None")
        for shard, first in zip(self._shards, self._first_chunk.tolist()):
            stored = shard.embeddings(self.manifest["embedding_dtype"], self.dim)
            for start in range(0, len(stored), block):
                yield first + start, stored[start : start + block]

    def keys(self, ids: np.ndarray) -> np.ndarray:
        """-> float32 [ids, dim], the embeddings of these chunks."""
        flat = torch.from_numpy(ids)
        keys = np.empty((len(ids), self.dim or 0), np.float32)
        for _, (shard, first, rows) in self._numbered_shards(flat):
            chosen = slice(None) if rows is None else rows.numpy()
            keys[chosen] = shard.embeddings(self.manifest["embedding_dtype"], keys.shape[1])[ids[chosen] - first]
        return keys

    def content_hash(self) -> str:
        """SHA-256 of the manifest without its index and its input's times: what chunks, documents and keys are."""
        content = {name: value for name, value in self.manifest.items() if name not in ("index", "input_times")}
        return hashlib.sha256(json_bytes(content)).hexdigest()

    def verify(self, progress: Callable[[int, int], None] | None = None) -> list[str]:
        """Reads every file. -> what is wrong, one line each; empty where every checksum and count holds.

        progress: called with the bytes that were read, and all."""
        return list(self.problems(progress))

    def problems(self, progress: Callable[[int, int], None] | None = None) -> Iterator[str]:
        """Yields the problems that `verify` returns."""
        entries = [file for shard in self.manifest["shards"] for file in shard["files"].values()]
        index = self.manifest["index"]
        entries += (index["files"] if index else []) + self.manifest.get("files", [])
        done, total = 0, sum(entry["bytes"] for entry in entries)
        for entry in entries:
            problem = problem_with(self.folder, entry)
            if problem:
                yield problem
            done += entry["bytes"]
            if progress is not None:
                progress(done, total)
        for number, shard in enumerate(self._shards):
            yield from (f"shard {number}: {line}" for line in self._inconsistencies(shard))
        listed = {entry["path"] for entry in entries} | {MANIFEST}
        for path in sorted(self.folder.rglob("*")):
            if path.is_file() and path.relative_to(self.folder).as_posix() not in listed:
                yield f"{path.relative_to(self.folder).as_posix()}: not in the manifest"

    def _inconsistencies(self, shard: _Shard) -> Iterator[str]:
        first, ends = shard.first_chunks, shard.ends.cpu().numpy()
        spans = np.diff(first)
        if first[0] != 0 or first[-1] != shard.num_chunks or (spans < 1).any():
            yield "document_chunks does not divide the chunks among the documents"
            return
        used = ends - first[:-1] * self.chunk_size
        if (-(-used // self.chunk_size) != spans).any():
            yield "document_ends does not agree with document_chunks"
        if not np.array_equal(shard.documents.cpu().numpy(), np.repeat(np.arange(len(spans), dtype=np.int32), spans)):
            yield "chunk_documents does not agree with document_chunks"
        if (np.diff(shard.source_starts) < 1).any() or shard.source_starts[-1] != shard.paths["sources"].stat().st_size:
            yield "source_starts does not divide sources among the documents"

    def _flat(self, ids: Tensor | np.ndarray) -> tuple[Tensor, tuple[int, ...]]:
        tensor = torch.as_tensor(ids)
        if tensor.dtype.is_floating_point or tensor.dtype is torch.bool:
            raise TypeError(f"ids: got {tensor.dtype}; expected integers, int64")
        flat = tensor.reshape(-1).to(self.device, torch.int64)
        if len(flat) and int(flat.max()) >= len(self):
            raise IndexError(f"ids: got {int(flat.max())}; the database has {len(self)} chunks")
        return flat, tuple(tensor.shape)

    def _numbered_shards(self, flat: Tensor) -> Iterator[tuple[int, tuple[_Shard, int, Tensor | None]]]:
        """The shards that `flat` touches, each with its first chunk and its rows of `flat` (None: all of them)."""
        if not len(flat):
            return
        if len(self._shards) == 1 and int(flat.min()) >= 0:
            yield 0, (self._shards[0], 0, None)
            return
        borders = torch.from_numpy(self._first_chunk).to(flat.device)
        # A shard without chunks shares its border with the next: side "right" passes over it.
        owner = torch.searchsorted(borders, flat, right=True) - 1
        order = owner.argsort(stable=True)
        numbers, counts = owner[order].unique_consecutive(return_counts=True)
        for number, rows in zip(numbers.tolist(), order.split(counts.tolist())):
            if number >= 0:
                yield number, (self._shards[number], int(self._first_chunk[number]), rows)


def checked_manifest(manifest: Any, folder: Path) -> dict[str, Any]:
    """-> the manifest. Raises DatabaseError unless it is of this version, whole, and every file has its size."""
    where = folder / MANIFEST
    if not isinstance(manifest, dict) or manifest.get("magic") != MAGIC:
        raise DatabaseError(f"{where} is not the manifest of a retrieval database (no magic {MAGIC!r})")
    if manifest.get("version") != VERSION:
        raise DatabaseError(
            f"{folder} is a database of version {manifest.get('version')!r}, this code reads version {VERSION}: "
            "rebuild it, or use the release of retro_kernels that wrote it"
        )
    try:
        _check_kinds(manifest)
        if manifest["token_dtype"] not in TOKEN_DTYPES:
            raise ValueError(f"token_dtype {manifest['token_dtype']!r}")
        if manifest["embedder"] is not None and manifest["embedding_dtype"] not in EMBEDDING_DTYPES:
            raise ValueError(f"embedding_dtype {manifest['embedding_dtype']!r}")
        for total in ("chunks", "documents", "tokens"):
            if sum(shard[total] for shard in manifest["shards"]) != manifest["counts"][total]:
                raise ValueError(f"the shards' {total} do not add up to counts")
        for shard in manifest["shards"]:
            sizes = file_bytes(manifest, shard)
            for name in sizes.keys() | shard["files"].keys():
                _check_size(folder, shard["files"][name], sizes.get(name))
        for entry in (manifest["index"]["files"] if manifest["index"] else []) + manifest.get("files", []):
            _check_size(folder, entry, None)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DatabaseError(f"{where} is damaged: {type(error).__name__} {error}") from error
    return manifest


def _check_kinds(manifest: dict[str, Any]) -> None:
    """Raises ValueError for a value of another kind than its readers expect, KeyError for one that is absent."""

    def expect(value: Any, *kinds: type, least: int | None = None) -> None:
        if type(value) not in kinds or (least is not None and value is not None and value < least):
            names = " or ".join(kind.__name__ for kind in kinds)
            raise ValueError(f"got {value!r}, expected {names}" + ("" if least is None else f" of at least {least}"))

    expect(manifest["chunk_size"], int, least=1)
    expect(manifest["dim"], int, type(None), least=1)
    expect(manifest["build"], dict, type(None))
    expect(manifest["index"], dict, type(None))
    expect(manifest["embedder"], dict, type(None))
    expect(manifest["tokenizer"], dict)
    if (manifest["dim"] is None) != (manifest["embedder"] is None):
        raise ValueError(f"dim {manifest['dim']!r} with embedder {manifest['embedder']!r}")
    for identity in (manifest["tokenizer"], manifest["embedder"] or {"name": ""}):
        for name in ("name", *({"kind", "sha256", "precision"} & identity.keys())):
            expect(identity[name], str)
    files = [*manifest.get("files", [])]
    for shard in manifest["shards"]:
        for total in ("chunks", "documents", "tokens"):
            expect(shard[total], int, least=0)
        files += shard["files"].values()
    index = manifest["index"]
    if index is not None:
        for name in ("kind", "spec", "asked", "why"):
            expect(index[name], str)
        for value in index["settings"].values():
            expect(value, int, least=0)
        if index["kind"] not in ("exact", "faiss") or (index["kind"] == "faiss") != bool(index["files"]):
            raise ValueError(f"index of kind {index['kind']!r} with {len(index['files'])} files")
        files += index["files"]
    for entry in files:
        expect(entry["bytes"], int, least=0)
        expect(entry["sha256"], str)


def _check_size(folder: Path, entry: dict[str, Any], expected: int | None) -> None:
    path = inside(folder, entry["path"])
    if expected is not None and entry["bytes"] != expected:
        raise ValueError(f"{entry['path']} has {entry['bytes']} bytes by its entry, {expected} by the counts")
    size = path.stat().st_size if path.is_file() else None
    if size != entry["bytes"]:
        found = "is missing" if size is None else f"has {size:,} bytes"
        raise DatabaseError(f"{path} {found}, the manifest says {entry['bytes']:,}: restore it or rebuild the database")


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Writes the manifest, last of all files: from then on the folder is a database."""
    write_json(folder / MANIFEST, manifest)
