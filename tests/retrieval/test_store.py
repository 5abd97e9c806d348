"""The chunk store: what is read back, what is refused, what survives a kill, and that damage is reported."""

from __future__ import annotations

import json
import os
import signal
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from retro_kernels.retrieval import Database, DatabaseError, ShardWriter, committed_shard, finish_database
from retro_kernels.retrieval import manifest as manifest_module
from retro_kernels.retrieval.database import MANIFEST

CHUNK, DIM = 4, 3
LENGTHS = [[1, 4, 9], [], [5, 8, 3, 17], [2]]  # tokens of each document of each shard
SHAPE = {"chunk_size": CHUNK, "token_dtype": "uint16", "dim": DIM}


def documents(shard: int) -> list[dict]:
    made = []
    for number, length in enumerate(LENGTHS[shard]):
        values = np.random.default_rng([shard, number])
        chunks = -(-length // CHUNK)
        made.append(
            {
                "tokens": values.integers(1, 1 << 16, length),
                "chunk_offsets": np.arange(chunks) * 11,
                "path": f"{shard}/ümlaut {number}.txt",
                "record": None if number % 2 else number,
                "embeddings": values.standard_normal((chunks, DIM)).astype(np.float16),
            }
        )
    return made


def build(folder: Path, on_call=lambda: None) -> None:
    """Builds what is missing; finished shards are kept."""
    for number in range(len(LENGTHS)):
        if committed_shard(folder, number) is None:
            writer = ShardWriter(folder, number, **SHAPE)
            for document in documents(number):
                writer.add(**document)
                on_call()
            writer.commit()
    if not (folder / MANIFEST).exists():
        finish_database(folder, len(LENGTHS), tokenizer={"name": "t"}, embedder={"name": "e"}, **SHAPE)


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    build(tmp_path / "db")
    return tmp_path / "db"


@pytest.mark.parametrize("length", [1, CHUNK, 2 * CHUNK, 3 * CHUNK + 1])
def test_chunks_are_their_documents_and_never_cross_their_end(folder: Path, length: int):
    """Every chunk against the documents that were written, in shuffled order with missing neighbours among them."""
    expected = []
    for shard in range(len(LENGTHS)):
        for document in documents(shard):
            for start in range(0, len(document["tokens"]), CHUNK):
                expected.append((document, start))
    database = Database(folder)
    assert len(database) == len(expected) == 16
    ids = torch.tensor([-1, *np.random.default_rng(0).permutation(len(expected)).tolist(), -7]).view(1, -1)
    tokens, mask = database.chunks(ids, length)
    assert tokens.dtype == torch.int32
    assert mask.dtype == torch.bool
    assert tokens.shape == mask.shape == (*ids.shape, length)
    for chunk, row, visible in zip(ids[0].tolist(), tokens[0], mask[0]):
        true = np.zeros(length, np.int64)
        valid = 0
        if chunk >= 0:
            document, start = expected[chunk]
            rest = document["tokens"][start : start + length]
            valid = len(rest)
            true[:valid] = rest
        assert row.tolist() == true.tolist()
        assert visible.tolist() == [t < valid for t in range(length)]


def test_chunks_are_gathered_into_what_is_given(folder: Path):
    database = Database(folder)
    ids = torch.tensor([[3, -1, 15], [0, 9, 9]])
    tokens, mask = database.chunks(ids)
    for dtype in (torch.int32, torch.int64):
        out = torch.full((2, 3, 2 * CHUNK), -5, dtype=dtype), torch.zeros(2, 3, 2 * CHUNK, dtype=torch.bool)
        found = database.chunks(ids, out=out)
        assert found[0] is out[0]
        assert found[1] is out[1]
        assert torch.equal(out[0], tokens.to(dtype))
        assert torch.equal(out[1], mask)
    for wrong in (
        (out[0][:1], out[1]),
        (out[0].float(), out[1]),
        (out[0], out[1].int()),
        (out[0].transpose(0, 1).contiguous().transpose(0, 1), out[1]),
        (out[0].to("meta"), out[1]),
    ):
        with pytest.raises(ValueError, match="out: got"):
            database.chunks(ids, out=wrong)


def test_a_store_that_a_gpu_cannot_hold_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch):
    database = Database(folder)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (100, 200))
    with pytest.raises(DatabaseError, match=r"cuda:0 has 100 free: leave the store where it is"):
        database.to("cuda:0")
    assert database.device.type == "cpu"
    assert database.chunks(torch.arange(16))[1].any()


def test_documents_sources_and_embeddings(folder: Path):
    database = Database(folder)
    known = [document for shard in range(len(LENGTHS)) for document in documents(shard)]
    numbers = [n for n, document in enumerate(known) for _ in document["chunk_offsets"]]
    assert database.documents(torch.arange(len(database))).tolist() == numbers
    assert database.documents(torch.tensor([-1])).tolist() == [-1]
    for chunk, source in enumerate(database.sources(torch.arange(len(database)))):
        document = known[numbers[chunk]]
        place = chunk - numbers.index(numbers[chunk])
        assert source == database.source(chunk)
        assert source is not None
        assert (source.document, source.path, source.record) == (numbers[chunk], document["path"], document["record"])
        assert (source.offset, source.token_offset) == (11 * place, CHUNK * place)
        assert source.num_tokens == len(document["tokens"][CHUNK * place :][:CHUNK])
    assert database.sources(torch.tensor([-1])) == [None]
    blocks = list(database.embeddings(block=2))
    assert [first for first, _ in blocks] == np.cumsum([0] + [len(b) for _, b in blocks])[:-1].tolist()
    assert np.array_equal(np.concatenate([b for _, b in blocks]), np.concatenate([d["embeddings"] for d in known]))
    with pytest.raises(IndexError, match="16 chunks"):
        database.chunks(torch.tensor([16]))


def build_and_die(folder: Path, steps: int) -> None:
    """Ends this process: by SIGKILL at the step after `steps`, or with 0 where the build has no more steps."""
    left = iter(range(steps))
    rename = os.replace

    def step(*_: object) -> None:
        if next(left, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)

    os.fsync = step  # type: ignore[assignment]
    os.replace = lambda a, b: (step(), rename(a, b))  # type: ignore[assignment]
    try:
        build(folder, step)
    finally:
        os._exit(0)


def test_killed_at_every_step_and_resumed_it_is_the_same_byte_for_byte(tmp_path: Path, monkeypatch):
    """kill -9 before every sync, rename and document of the build; the next run ends as an uninterrupted one does."""
    monkeypatch.setattr(os, "fsync", lambda number: None)  # a kill keeps the page cache; syncing takes seconds
    build(tmp_path / "whole")
    whole = contents(tmp_path / "whole")
    kills = 0
    while True:
        folder = tmp_path / f"killed {kills}"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # newer Pythons warn of forking beside threads, and this child uses none
            child = os.fork()
        if child == 0:
            build_and_die(folder, kills)
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status):
            break
        if not (folder / MANIFEST).exists():
            with pytest.raises(DatabaseError, match="no finished retrieval database"):
                Database(folder)
        build(folder)
        assert contents(folder) == whole, f"killed before step {kills}"
        kills += 1
    assert kills > 40
    assert contents(folder) == whole


def test_verify_reports_every_flipped_bit_and_opening_every_cut(folder: Path):
    assert Database(folder).verify() == []
    flipped = 0
    for name, content in contents(folder).items():
        if not content or name == MANIFEST:
            continue
        path = folder / name
        position = (7 * len(content)) // 11
        path.write_bytes(content[:position] + bytes([content[position] ^ 4]) + content[position + 1 :])
        assert any(name in line and "SHA-256" in line for line in Database(folder).verify())
        path.write_bytes(content[:-1])
        with pytest.raises(DatabaseError, match=path.name):
            Database(folder)
        path.write_bytes(content)
        flipped += 1
    assert flipped > 20
    (folder / "stray").write_text("x")
    assert Database(folder).verify() == ["stray: not in the manifest"]


@pytest.mark.parametrize(
    "name", ["../outside", "/etc/passwd", "shards/../../outside", "a\\b", "", 3, None, "leads out"]
)
def test_a_path_in_the_manifest_cannot_leave_the_folder(folder: Path, name: object):
    (folder.parent / "outside").write_text("secret")
    (folder / "leads out").symlink_to(folder.parent / "outside")
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["shards"][0]["files"]["sources"]["path"] = name
    (folder / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(DatabaseError, match=r"manifest names|leads out"):
        Database(folder)


def test_other_versions_and_damaged_manifests_are_refused(folder: Path, tmp_path: Path):
    good = json.loads((folder / MANIFEST).read_text())
    for change, message in [
        ({"version": 99}, "version 99"),
        ({"magic": "else"}, "not the manifest"),
        ({"chunk_size": 8}, "damaged"),
        ({"token_dtype": "object"}, "damaged"),
        ({"counts": {**good["counts"], "chunks": 1}}, "add up"),
        ({"shards": None}, "damaged"),
    ]:
        (folder / MANIFEST).write_text(json.dumps({**good, **change}))
        with pytest.raises(DatabaseError, match=message):
            Database(folder)
    (folder / MANIFEST).write_text("{")
    with pytest.raises(DatabaseError, match="not valid JSON"):
        Database(folder)
    with pytest.raises(DatabaseError, match="does not exist"):
        Database(tmp_path / "nowhere")


def test_nothing_finished_is_overwritten_and_two_builders_are_refused(folder: Path, tmp_path: Path):
    before = contents(folder)
    with pytest.raises(DatabaseError, match="never overwritten"):
        ShardWriter(folder, 0, **SHAPE)
    with pytest.raises(DatabaseError, match="never overwritten"):
        finish_database(folder, 1, tokenizer={}, embedder={}, **SHAPE)
    assert contents(folder) == before
    with (
        manifest_module.lock_folder(tmp_path),
        pytest.raises(DatabaseError, match="another process"),
        manifest_module.lock_folder(tmp_path),
    ):
        pass
    with manifest_module.lock_folder(tmp_path):
        pass


def test_an_altered_shard_is_not_resumed_from(tmp_path: Path):
    writer = ShardWriter(tmp_path, 0, **SHAPE)
    writer.add(**documents(0)[2])
    path = tmp_path / writer.commit()["files"]["tokens"]["path"]
    path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(DatabaseError, match="altered"):
        committed_shard(tmp_path, 0)
    path.parent.rename(tmp_path / "away")
    ShardWriter(tmp_path, 0, **SHAPE).commit()
    with pytest.raises(DatabaseError, match="shard 1 of 2"):
        finish_database(tmp_path, 2, tokenizer={}, embedder={}, **SHAPE)


def test_bad_documents_are_refused_and_leave_nothing(tmp_path: Path):
    writer = ShardWriter(tmp_path, 0, **SHAPE)
    good = documents(0)[2]
    for change, message in [
        ({"tokens": np.array([], np.int64)}, "n >= 1"),
        ({"tokens": np.array([70000])}, "65535"),
        ({"tokens": np.array([-1])}, "-1"),
        ({"tokens": good["tokens"].astype(float)}, "integers"),
        ({"chunk_offsets": np.zeros(2, np.int64)}, "one per chunk"),
        ({"embeddings": np.zeros((3, DIM + 1))}, "expected"),
        ({"embeddings": np.full((3, DIM), 1e9)}, "finite"),
    ]:
        with pytest.raises(ValueError, match=message), np.errstate(over="ignore"):
            writer.add(**{**good, **change})
    entry = writer.commit()
    assert (entry["chunks"], entry["documents"], entry["files"]["tokens"]["bytes"]) == (0, 0, 0)


def set_at(value: dict, path: tuple, new: object) -> dict:
    """A copy of `value` with another thing in one place."""
    if not path:
        return new  # type: ignore[return-value]
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = set_at(value[path[0]], path[1:], new)
    return copy  # type: ignore[return-value]


@pytest.mark.parametrize("other", [None, True, "text", 2.0, -1, [], [3], {}, {"name": 3}], ids=repr)
def test_wrong_kinds_in_a_manifest_are_damage_and_nothing_else(folder: Path, other: object):
    """Everywhere in it: a DatabaseError that names the file, or a database that can be read."""
    good = json.loads((folder / MANIFEST).read_text())
    entry = {"asked": "exact", "spec": "exact", "why": "x", "settings": {"nprobe": 1}, "kind": "exact", "files": []}
    good["index"] = entry
    places: list[tuple] = [(name,) for name in good]
    places += [("index", name) for name in entry] + [("index", "settings", "nprobe"), ("counts", "chunks")]
    places += [
        ("tokenizer", "name"),
        ("embedder", "name"),
        ("shards", 0),
        *(("shards", 0, n) for n in good["shards"][0]),
    ]
    places += [
        ("shards", 0, "files", "sources"),
        *(("shards", 0, "files", "tokens", n) for n in ("path", "bytes", "sha256")),
    ]
    refused = unnamed = 0
    for place in places:
        (folder / MANIFEST).write_text(json.dumps(set_at(good, place, other)))
        try:
            database = Database(folder)
            database.chunks(torch.arange(len(database)))
            database.sources(torch.arange(len(database)))
            list(database.embeddings()) if database.dim else None
        except DatabaseError as error:
            refused += 1
            unnamed += str(folder) not in str(error) and "manifest" not in str(error)
    assert unnamed == 0
    assert refused > len(places) // 2


def test_flipped_bytes_in_small_arrays_are_named_where_they_are_met(folder: Path):
    said = []
    files = {name: folder / "shards" / "000000" / name for name in ("source_starts", "chunk_documents", "sources")}
    for path in files.values():
        content = path.read_bytes()
        for position in range(0, len(content), 3):
            path.write_bytes(content[:position] + bytes([content[position] ^ 0xC0]) + content[position + 1 :])
            database = Database(folder)
            for read in (database.sources, database.chunks, database.documents):
                try:
                    read(torch.arange(len(database)))
                except DatabaseError as error:
                    said.append(str(error))
        path.write_bytes(content)
    assert len(said) > 10
    assert all("db verify" in line for line in said)
