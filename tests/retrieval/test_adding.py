"""Adding documents: what is there stays as it is, what is new is embedded alone, and a kill costs nothing."""

from __future__ import annotations

import os
import signal
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from retrieval_common import CHUNK, Everything, Letters, texts_of, write_texts
from typer.testing import CliRunner

from retro_kernels.cli import app
from retro_kernels.retrieval import Database, DatabaseError, add_documents, build_database
from retro_kernels.retrieval.build import adding
from retro_kernels.retrieval.manifest import lock_folder


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def built(corpus: Path, folder: Path, **options) -> Database:
    given = {"tokenizer": "bytes", "embedder": Letters(), "chunk_size": CHUNK, "shard_bytes": 300}
    return build_database(corpus, folder, **{**given, **options})


@pytest.fixture
def more(tmp_path: Path) -> Path:
    """New texts among old ones, one of them twice."""
    new = texts_of(12, 7)
    return write_texts(tmp_path / "more.jsonl", [texts_of(10)[3], *new, new[2], texts_of(10)[0]])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    built(write_texts(tmp_path / "texts.jsonl", texts_of(10)), tmp_path / "db")
    return tmp_path / "db"


def test_new_documents_alone_are_embedded_and_numbers_stay(folder: Path, more: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(adding, "SHARD_CHUNKS", 20)
    old = Database(folder)
    before, hash_before = contents(folder), old.content_hash()
    letters = Letters()
    seen = []
    database = add_documents(str(more), folder, embedder=letters, progress=seen.append)
    assert database.verify() == []
    new = [text for n, text in enumerate(texts_of(12, 7)) if text not in texts_of(12, 7)[:n] + texts_of(10)]
    assert "".join(letters.texts) == "".join(new)
    assert len(database.manifest["shards"]) > len(old.manifest["shards"]) + 2
    assert database.num_documents == old.num_documents + len(new)
    for name, content in before.items():
        assert name == "manifest.json" or (folder / name).read_bytes() == content
    # The same chunks and keys as a build of everything has.
    whole = built(write_texts(tmp_path / "all.jsonl", [*texts_of(10), *new]), tmp_path / "whole")
    ids = torch.arange(len(whole))
    assert torch.equal(database.chunks(ids)[0], whole.chunks(ids)[0])
    assert np.array_equal(Everything(database).keys, Everything(whole).keys)
    assert database.manifest["counts"] == whole.manifest["counts"]
    assert database.manifest["build"]["text_bytes"] == whole.manifest["build"]["text_bytes"]
    assert database.manifest["index"] == whole.manifest["index"]
    assert database.manifest["earlier"] == [hash_before]
    assert {at.stage for at in seen} == {"read", "build", "match", "embed", "index"}
    source = database.source(len(old))
    assert (source.path, source.offset) == ("more.jsonl", 0)
    # Again: nothing is new.
    after, asked = contents(folder), len(letters.texts)
    add_documents(str(more), folder, embedder=letters)
    assert contents(folder) == after
    assert len(letters.texts) == asked


def test_a_file_of_a_name_that_is_there_gets_another(folder: Path, tmp_path: Path):
    (tmp_path / "elsewhere").mkdir()
    other = write_texts(tmp_path / "elsewhere" / "texts.jsonl", texts_of(3, 9))
    database = add_documents(str(other), folder, embedder=Letters())
    assert database.paths() == {"texts.jsonl", "elsewhere/texts.jsonl"}


def test_killed_anywhere_and_resumed_it_is_the_same(folder: Path, more: Path, tmp_path: Path, monkeypatch):
    import shutil

    monkeypatch.setattr(adding, "SHARD_CHUNKS", 20)
    monkeypatch.setattr(os, "fsync", lambda number: None)
    shutil.copytree(folder, tmp_path / "start")
    add_documents(str(more), folder, embedder=Letters())
    whole = contents(folder)
    kills = 0
    for steps in range(0, 200, 3):
        at = tmp_path / f"killed {steps}"
        shutil.copytree(tmp_path / "start", at)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            child = os.fork()
        if child == 0:
            left, rename = iter(range(steps)), os.replace

            def step(*given, left=left, rename=rename) -> None:
                if next(left, None) is None:
                    os.kill(os.getpid(), signal.SIGKILL)
                rename(*given)

            os.replace = step  # type: ignore[assignment]
            try:
                add_documents(str(more), at, embedder=Letters())
            finally:
                os._exit(0)
        if not os.WIFSIGNALED(os.waitpid(child, 0)[1]):
            break
        kills += 1
        assert len(Database(at)) in (len(Database(tmp_path / "start")), len(Database(folder)))
        add_documents(str(more), at, embedder=Letters())
        assert contents(at) == whole, f"killed before rename {steps}"
    assert kills > 5


def test_what_is_refused(folder: Path, more: Path, tmp_path: Path):
    before = contents(folder)
    with lock_folder(folder), pytest.raises(DatabaseError, match="another process"):
        add_documents(str(more), folder, embedder=Letters())
    with pytest.raises(DatabaseError, match="does not exist"):
        add_documents(str(tmp_path / "absent"), folder, embedder=Letters())
    with pytest.raises(DatabaseError, match="does not exist"):
        add_documents(str(more), tmp_path / "nothing", embedder=Letters())
    assert contents(folder) == before

    class Stops(Letters):
        def __call__(self, texts):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        add_documents(str(more), folder, embedder=Stops())
    write_texts(more, ["another text"])
    with pytest.raises(DatabaseError, match=r"unfinished addition of something else \(more.jsonl changed\)"):
        add_documents(str(more), folder, embedder=Letters())


def test_the_commands_take_the_standard_input(tmp_path: Path):
    """Built of it, again of the same, and added to."""
    run, db = CliRunner(), str(tmp_path / "db")
    lines = '{"text": "one text"}\n{"text": "two texts"}\n'
    build = ["db", "build", "-", "--format", "jsonl", "--out", db, "--tokenizer", "bytes", "--embedder", "none"]
    for _ in range(2):
        done = run.invoke(app, build, input=lines)
        assert done.exit_code == 0, done.output
    assert Database(db).num_documents == 2
    assert Database(db).source(0).path == "stdin.jsonl"
    other = run.invoke(app, build, input=lines.replace("one", "eno"))
    assert other.exit_code == 1
    assert "stdin.jsonl changed" in other.output
    done = run.invoke(
        app, ["db", "add", db, "-", "--format", "jsonl"], input='{"text": "a third"}\n{"text": "one text"}'
    )
    assert done.exit_code == 0, done.output
    assert "1 new documents" in done.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["db"]
