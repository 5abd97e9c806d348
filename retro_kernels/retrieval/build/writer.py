"""Writes the chunk store shard by shard: a shard is whole or absent, and a database exists once its manifest does."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import DatabaseError
from ...files import move, write_json
from ..manifest import describe, name_full_disk, problem_with, read_json
from ..database import EMBEDDING_DTYPES, MAGIC, MANIFEST, TOKEN_DTYPES, VERSION, Database, file_bytes, write_manifest

SHARD_FOLDER = "shards"
ENTRY = "entry.json"


def shard_folder(folder: Path, number: int) -> Path:
    """The folder of shard `number` once it is committed."""
    return folder / SHARD_FOLDER / f"{number:06d}"


class ShardWriter:
    """Streams documents into one shard of the database being built in `folder`.

    Memory does not grow with the shard. Nothing is seen of it before `commit`, which renames the whole folder; what a
    killed writer left is thrown away by the next writer of the same number. Raises DatabaseError where `folder` already
    is a finished database, unless documents are being added to it, or the shard was committed.
    """

    def __init__(
        self,
        folder: str | Path,
        number: int,
        *,
        chunk_size: int,
        token_dtype: str = "uint16",
        dim: int | None = None,
        embedding_dtype: str = "float16",
        padding: int = 0,
        adding: bool = False,
    ) -> None:
        if chunk_size < 1:
            raise ValueError(f"chunk_size: got {chunk_size}; expected at least 1 token")
        if token_dtype not in TOKEN_DTYPES:
            raise ValueError(f"token_dtype: got {token_dtype!r}; expected one of {TOKEN_DTYPES}")
        if embedding_dtype not in EMBEDDING_DTYPES:
            raise ValueError(f"embedding_dtype: got {embedding_dtype!r}; expected one of {EMBEDDING_DTYPES}")
        if dim is not None and dim < 1:
            raise ValueError(f"dim: got {dim}; expected the width of an embedding, or None for no embeddings")
        self.folder, self.number = Path(folder), number
        self.chunk_size, self.dim, self.padding = chunk_size, dim, padding
        self.token_dtype, self.embedding_dtype = np.dtype(token_dtype), np.dtype(embedding_dtype)
        self._limit = (1 << 16 if token_dtype == "uint16" else 1 << 31) - 1
        self._final = shard_folder(self.folder, number)
        self._temporary = self._final.with_name(self._final.name + ".tmp")
        if not adding:
            _refuse_finished(self.folder)
        if self._final.exists():
            raise DatabaseError(f"{self._final} is already committed: a committed shard is never overwritten")
        if self._temporary.exists():
            shutil.rmtree(self._temporary)
        self._temporary.mkdir(parents=True)
        shape = {"chunk_size": chunk_size, "token_dtype": token_dtype, "dim": dim, "embedding_dtype": embedding_dtype}
        names = file_bytes({**shape, "embedder": dim}, {"chunks": 0, "documents": 0})
        self._files = {name: (self._temporary / name).open("wb") for name in names}
        self.chunks = self.documents = self.tokens = self._source_bytes = self._open_tokens = 0
        self._append("document_chunks", np.zeros(1, np.int64))
        self._append("source_starts", np.zeros(1, np.int64))

    def add(
        self,
        tokens: np.ndarray,
        chunk_offsets: np.ndarray,
        *,
        path: str,
        record: int | None = None,
        embeddings: np.ndarray | None = None,
        size: int | None = None,
    ) -> None:
        """Adds one document: `tokens` [n], n >= 1, whose ceil(n / chunk_size) chunks begin at `chunk_offsets`
        (characters of its text); `embeddings` [chunks, dim] where the database has them; `path` and `record` as in
        `Source`; `size`, the bytes of its text, where they are known. Raises ValueError for shapes and numbers that do not fit, and writes nothing then."""
        self.extend(tokens, chunk_offsets, embeddings=embeddings)
        self.end(path=path, record=record, size=size)

    def extend(self, tokens: np.ndarray, chunk_offsets: np.ndarray, *, embeddings: np.ndarray | None = None) -> None:
        """Adds the next part of a document, as in `add`: whole chunks, unless it is the last. `end` names the document.
        A document of any length is written so, part by part. Raises ValueError as `add` does."""
        tokens, chunk_offsets = np.asarray(tokens), np.asarray(chunk_offsets)
        if tokens.ndim != 1 or not len(tokens) or tokens.dtype.kind not in "iu":
            raise ValueError(f"tokens: got {tokens.dtype} {tokens.shape}; expected integers [n] with n >= 1")
        if int(tokens.min()) < 0 or int(tokens.max()) > self._limit:
            raise ValueError(
                f"tokens: got {int(tokens.min())} to {int(tokens.max())}; {self.token_dtype} holds 0 to {self._limit}"
            )
        if self._open_tokens % self.chunk_size:
            raise ValueError(f"tokens: a part of {self._open_tokens} tokens, no whole chunks, can only be the last")
        chunks = -(-len(tokens) // self.chunk_size)
        if chunk_offsets.shape != (chunks,):
            raise ValueError(f"chunk_offsets: got shape {chunk_offsets.shape}; expected [{chunks}], one per chunk")
        if self.dim is None and embeddings is not None:
            raise ValueError("embeddings: given, but the shard was opened with dim=None")
        if self.dim is not None:
            embeddings = np.asarray(embeddings, dtype=self.embedding_dtype)
            if embeddings.shape != (chunks, self.dim):
                raise ValueError(f"embeddings: got shape {embeddings.shape}; expected [{chunks}, {self.dim}]")
            if not np.isfinite(embeddings).all():
                raise ValueError(f"embeddings: not finite in {self.embedding_dtype}: check the embedder")
        padded = np.full(chunks * self.chunk_size, self.padding, self.token_dtype)
        padded[: len(tokens)] = tokens
        self._append("tokens", padded)
        self._append("chunk_documents", np.full(chunks, self.documents, np.int32))
        self._append("chunk_offsets", chunk_offsets.astype(np.int64))
        if embeddings is not None:
            self._append("embeddings", embeddings)
        self.chunks += chunks
        self.tokens += len(tokens)
        self._open_tokens += len(tokens)

    def end(self, *, path: str, record: int | None = None, size: int | None = None) -> None:
        """Ends the document whose parts `extend` added; the arguments are those of `add`. Raises ValueError where it has none."""
        if not self._open_tokens:
            raise ValueError(f"document {path!r}: ended without a token; expected at least one part before")
        facts = {"path": path, "record": record, "bytes": size}
        source = json.dumps({name: value for name, value in facts.items() if value is not None}).encode() + b"\n"
        start = (self.chunks - -(-self._open_tokens // self.chunk_size)) * self.chunk_size
        self._append("document_ends", np.array([start + self._open_tokens], np.int64))
        self._append("sources", np.frombuffer(source, np.uint8))
        self.documents += 1
        self._open_tokens = 0
        self._source_bytes += len(source)
        self._append("document_chunks", np.array([self.chunks], np.int64))
        self._append("source_starts", np.array([self._source_bytes], np.int64))

    def commit(self) -> dict[str, Any]:
        """Makes the shard durable and visible, all at once. -> its entry in the manifest."""
        if self._open_tokens:
            raise ValueError("commit: the last document was not ended")
        with name_full_disk(self.folder):
            for file in self._files.values():
                file.flush()
                os.fsync(file.fileno())
                file.close()
            files = {name: describe(self._temporary, self._temporary / name) for name in self._files}
            for name, entry in files.items():
                entry["path"] = f"{SHARD_FOLDER}/{self._final.name}/{name}"
            counts = {"chunks": self.chunks, "documents": self.documents, "tokens": self.tokens}
            write_json(self._temporary / ENTRY, {**counts, "files": files})
            move(self._temporary, self._final)
        committed = committed_shard(self.folder, self.number)
        assert committed is not None
        return committed

    def _append(self, name: str, values: np.ndarray) -> None:
        with name_full_disk(self.folder):
            self._files[name].write(np.ascontiguousarray(values).data)


def committed_shard(folder: str | Path, number: int) -> dict[str, Any] | None:
    """-> the manifest entry of shard `number`, every checksum verified; None where it was never committed.

    Raises DatabaseError where it was committed and altered since."""
    root = Path(folder)
    final = shard_folder(root, number)
    if not final.exists():
        return None
    entry = read_json(final / ENTRY)
    try:
        for file in entry["files"].values():
            problem = problem_with(root, file)
            if problem:
                raise DatabaseError(f"{problem}. Delete {final} and build again: only this shard is made anew")
        entry["files"]["entry"] = describe(root, final / ENTRY)
    except (AttributeError, KeyError, TypeError) as error:
        raise DatabaseError(f"{final / ENTRY} is damaged ({type(error).__name__} {error}): delete {final}") from error
    return entry


def finish_database(
    folder: str | Path,
    shards: int,
    *,
    chunk_size: int,
    token_dtype: str = "uint16",
    tokenizer: dict[str, Any],
    embedder: dict[str, Any] | None = None,
    dim: int | None = None,
    embedding_dtype: str = "float16",
    build: dict[str, Any] | None = None,
    files: Sequence[dict[str, Any]] = (),
    input_times: str | None = None,
) -> Database:
    """Writes the manifest over the committed shards 0 to `shards` - 1: from then on `folder` is a database.

    tokenizer, embedder: identity and hash of each, as its user will check them; no embedder, no embeddings.
    The database has no index yet: `index.index.replace_index` makes one. build: facts to keep, JSON. files: entries of
    further files of the database. input_times: a hash of its input's times of change, no part of its content.
    Raises DatabaseError where a shard is absent or altered, or `folder` is finished already."""
    root = Path(folder)
    if (embedder is None) != (dim is None):
        raise ValueError(f"embedder and dim: got {embedder!r} and {dim!r}; expected both or neither")
    _refuse_finished(root)
    entries = []
    for number in range(shards):
        entry = committed_shard(root, number)
        if entry is None:
            raise DatabaseError(f"shard {number} of {shards} in {root} was never committed: run the build again")
        entries.append(entry)
    manifest = {
        "magic": MAGIC,
        "version": VERSION,
        "chunk_size": chunk_size,
        "token_dtype": token_dtype,
        "tokenizer": tokenizer,
        "embedder": embedder,
        "dim": dim,
        "embedding_dtype": None if embedder is None else embedding_dtype,
        "counts": {total: sum(entry[total] for entry in entries) for total in ("chunks", "documents", "tokens")},
        "shards": entries,
        "index": None,
        "build": build,
        "files": list(files),
        "input_times": input_times,
    }
    with name_full_disk(root):
        write_manifest(root, manifest)
    return Database(root)


def _refuse_finished(folder: Path) -> None:
    if (folder / MANIFEST).exists():
        raise DatabaseError(f"{folder} is a finished database, which is never overwritten: name another folder")
