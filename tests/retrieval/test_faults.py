"""What can go wrong outside: enormous lines, a disk that is really full, two builders, arrays that would run code."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import time
import tracemalloc
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from retrieval_common import CHUNK, Everything, Letters, database_of, texts_of, write_texts

from retro_kernels.retrieval import (
    Database,
    DatabaseError,
    Retriever,
    build_database,
    open_neighbours,
    precompute_neighbours,
)


def peak_of(act: Callable[[], object]) -> int:
    """Bytes that Python and NumPy had at most while `act` ran."""
    tracemalloc.start()
    try:
        act()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_one_line_of_256_megabytes_is_left_out_in_little_memory(tmp_path: Path):
    """The line is a hole in a sparse file; those before and after it are kept."""
    path = tmp_path / "long.jsonl"
    with path.open("wb") as file:
        file.write(b'{"text": "before it"}\n{"text": "')
        file.seek(1 << 28)
        file.write(b'"}\n{"text": "after it"}\n')
    folder = tmp_path / "db"
    given = {"tokenizer": "bytes", "embedder": None, "chunk_size": CHUNK, "record_bytes": 1 << 20}
    assert peak_of(lambda: build_database(path, folder, shard_bytes=25 << 20, **given)) < 16 << 20
    database = build_database(path, folder, shard_bytes=25 << 20, **given)
    assert len(database.manifest["shards"]) > 5
    assert [(database.source(chunk).record, database.source(chunk).offset) for chunk in range(len(database))] == [
        (0, 0),
        (0, 8),
        (2, 0),
    ]
    assert database.manifest["build"]["skipped"] == {"longer than 1,048,576 bytes": 1}


def test_memory_does_not_grow_with_a_text_on_one_line(tmp_path: Path):

    def build(path: Path) -> None:
        build_database(path, path.with_suffix(""), tokenizer="bytes", embedder=None, chunk_size=64)

    peaks = []
    for megabytes in (4, 12):
        path = tmp_path / f"{megabytes}.txt"
        path.write_text("all on one line " * (megabytes << 16))
        peaks.append(peak_of(functools.partial(build, path)))
    assert peaks[1] < 1.2 * peaks[0]


def test_a_disk_that_is_full(tmp_path: Path):
    """A file system of 200 KB: the error names it, and with space the same command ends as anywhere else."""
    texts = write_texts(tmp_path / "texts.jsonl", texts_of(300))
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a file system cannot be mounted here")
    given = {"tokenizer": "bytes", "embedder": Letters(), "chunk_size": CHUNK, "shard_bytes": 4000}
    try:
        with pytest.raises(DatabaseError, match=r"the disk of .* is full"):
            build_database(texts, disk / "db", **given)
        subprocess.run([*mount[:-2], "-o", "remount,size=20m", str(disk)], check=True)
        database = build_database(texts, disk / "db", **given)
        whole = build_database(texts, tmp_path / "db", **given)
        assert database.content_hash() == whole.content_hash()
        assert database.verify() == []
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_of_two_builders_the_second_is_refused(tmp_path: Path):
    """Two processes at once; the first, told to go on, ends well."""
    begun, go_on = tmp_path / "begun", tmp_path / "go on"
    texts = write_texts(tmp_path / "texts.jsonl", texts_of(12))

    def build(embedder: Letters) -> Database:
        return build_database(texts, tmp_path / "db", tokenizer="bytes", embedder=embedder, chunk_size=CHUNK)

    class Slow(Letters):
        def __call__(self, texts):
            begun.touch()
            while not go_on.exists():
                time.sleep(0.01)
            return super().__call__(texts)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        first = os.fork()
    if first == 0:
        try:
            build(Slow())
            os._exit(0)
        finally:
            os._exit(1)
    while not begun.exists():
        time.sleep(0.01)
    try:
        with pytest.raises(DatabaseError, match="another process is building"):
            build(Letters())
    finally:
        go_on.touch()
        status = os.waitpid(first, 0)[1]
    assert status == 0
    assert build(Letters()).verify() == []


class Runs:
    """Unpickled, it writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_nothing_is_unpickled(tmp_path: Path):
    """Arrays of objects in place of those of a folder, with sizes and checksums that fit, are refused unread."""
    database = database_of(tmp_path / "db")
    retriever = Retriever(database, embedder=Letters(), index=Everything(database))
    precompute_neighbours(retriever, database.folder, tmp_path / "out")
    facts = json.loads((tmp_path / "out" / "data.json").read_text())
    for name in ("tokens.npy", "document_starts.npy", "document_ends.npy", "neighbour_ids.npy"):
        path = tmp_path / "out" / name
        content = path.read_bytes()
        np.save(path, np.array([Runs(tmp_path / "ran")], dtype=object), allow_pickle=True)
        for entry in facts["files"]:
            if entry["path"] == name:
                entry["bytes"] = path.stat().st_size
        (tmp_path / "out" / "data.json").write_text(json.dumps(facts))
        with pytest.raises(DatabaseError, match=name):
            open_neighbours(tmp_path / "out")
        assert not (tmp_path / "ran").exists()
        path.write_bytes(content)
        for entry in facts["files"]:
            entry["bytes"] = (tmp_path / "out" / entry["path"]).stat().st_size
    facts["files"][0]["path"] = "../db/manifest.json"
    (tmp_path / "out" / "data.json").write_text(json.dumps(facts))
    with pytest.raises(DatabaseError, match="outside"):
        open_neighbours(tmp_path / "out")
