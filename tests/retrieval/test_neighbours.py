"""Neighbours of a corpus kept for training: they are those of a loop, of no document that is being read, and survive
kills byte for byte."""

from __future__ import annotations

import functools
import json
import os
import shutil
import signal
import sys
import types
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from retrieval_common import CHUNK, Everything, Letters, database_of, texts_of, write_texts
from typer.testing import CliRunner

from retro_kernels.cli import app
from retro_kernels.retrieval import Database, DatabaseError, Retriever, add_documents, open_neighbours, training_data
from retro_kernels.retrieval import precompute_neighbours as precompute
from retro_kernels.retrieval import retriever as retriever_module
from retro_kernels.retrieval.corpus import matching

K = 3


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Database:
    return database_of(tmp_path_factory.mktemp("neighbours") / "db", 30)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Half of the database's documents, among others, one of them twice in a longer text, and an é."""
    known, new = texts_of(30), texts_of(9, 4)
    texts = [*known[::2], "é a", *new, f"{known[1]} {known[1]}", "a"]
    return write_texts(tmp_path / "train.jsonl", texts)


def retriever_of(database: Database, **options) -> Retriever:
    return Retriever(database, embedder=Letters(), index=Everything(database), num_neighbours=K, **options)


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_folder_holds_the_neighbours_of_a_loop(database: Database, corpus: Path, tmp_path: Path, monkeypatch):
    """Tokens, places and neighbours, that every document begins at a chunk's border, and has no neighbour of itself."""
    monkeypatch.setattr(training_data, "BLOCK", 7)
    monkeypatch.setattr(matching, "SCANNED", 5)
    seen = []
    made = precompute(retriever_of(database), corpus, tmp_path / "out", progress=seen.append)
    texts = [json.loads(line)["text"] for line in corpus.read_text().splitlines()]
    arrays = [f"{name}.npy" for name in ("document_ends", "document_starts", "neighbour_ids", "tokens")]
    assert sorted(contents(tmp_path / "out")) == ["data.json", *arrays[:2], "inputs.json", *arrays[2:]]
    assert made.tokens.dtype == np.uint16
    data = [text.encode() for text in texts]
    filled = [text + bytes(-len(text) % CHUNK) for text in data]
    assert made.tokens.tolist() == list(b"".join(filled))
    assert made.document_starts.tolist() == np.cumsum([0, *map(len, filled)])[:-1].tolist()
    assert (made.document_ends - made.document_starts).tolist() == [len(text) for text in data]
    chunks = len(b"".join(filled)) // CHUNK
    assert made.ids.shape == (chunks, K)
    assert made.ids.dtype == np.int64
    cut = [(text, one[at : at + CHUNK]) for text, one in zip(texts, data) for at in range(0, len(one), CHUNK)]
    sources = [
        json.loads(database.folder.with_suffix(".jsonl").read_text().splitlines()[database.source(c).record])["text"]
        for c in range(len(database))
    ]
    retriever = retriever_of(database)
    same = 0
    for chunk in range(chunks):
        left_out = [c for c in range(len(database)) if sources[c] == cut[chunk][0]]
        tokens = torch.tensor(list(cut[chunk][1]))
        exclude = torch.tensor(left_out, dtype=torch.int64)
        assert made.ids[chunk].tolist() == retriever.retrieve(tokens, exclude=exclude).ids.tolist()
        same += not set(left_out).isdisjoint(retriever.retrieve(tokens).ids.tolist())
    assert same > 20
    facts = made.facts
    assert {name: facts[name] for name in ("format", "version", "tokenizer", "chunk_size", "bytes", "chunks")} == {
        "format": "retro-kernels training data",
        "version": 2,
        "tokenizer": "bytes",
        "chunk_size": CHUNK,
        "bytes": sum(map(len, data)),
        "chunks": chunks,
    }
    assert (facts["eos_token_id"], facts["vocab_size"], facts["tokens"]) == (256, 257, sum(map(len, data)))
    assert (tmp_path / "out" / facts["database"]).resolve() == database.folder.resolve()
    assert facts["missing"] == int((made.ids < 0).sum())
    assert [at.stage for at in seen][-1] == "search"
    assert (seen[-1].chunks, seen[-1].done) == (chunks, 1.0)
    let = precompute(retriever_of(database), corpus, tmp_path / "let", same_document=True)
    assert not np.array_equal(let.ids, made.ids)


def test_a_database_is_a_corpus_too(database: Database, tmp_path: Path):
    """The database itself: every token, the same as its files give, and no chunk has a neighbour of its document."""
    made = precompute(retriever_of(database), database.folder, tmp_path / "own")
    files = precompute(retriever_of(database), database.folder.with_suffix(".jsonl"), tmp_path / "files")
    assert np.array_equal(made.tokens, files.tokens)
    assert np.array_equal(made.ids, files.ids)
    assert made.facts["bytes"] == files.facts["bytes"] == database.manifest["build"]["text_bytes"]
    assert made.facts["tokens"] == database.manifest["counts"]["tokens"]
    assert len(made.tokens) == len(database) * CHUNK
    other = database_of(tmp_path / "other", chunk_size=4)
    with pytest.raises(DatabaseError, match="chunks of 4"):
        precompute(retriever_of(database), other.folder, tmp_path / "x")


def killed_after(writes: int, act) -> bool:
    """Ends in a process of its own by SIGKILL before one of its renames. -> was it killed?"""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        child = os.fork()
    if child == 0:
        left, rename = iter(range(writes)), os.replace

        def step(*given) -> None:
            if next(left, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)
            rename(*given)

        os.replace = step  # type: ignore[assignment]
        try:
            act()
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def test_killed_anywhere_and_resumed_it_is_the_same_byte_for_byte(database, corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(training_data, "BLOCK", 64)
    monkeypatch.setattr(os, "fsync", lambda number: None)  # a kill keeps the page cache; syncing takes seconds

    def make(folder: Path) -> None:
        precompute(retriever_of(database), corpus, folder)

    make(tmp_path / "out")
    whole = contents(tmp_path / "out")
    kills = 0
    while True:
        # The folder's name is in no file of it, and its depth is the same.
        resume = functools.partial(make, tmp_path / f"killed {kills}")
        if not killed_after(kills, resume):
            break
        killed_after(1 + kills % 5, resume)
        resume()
        assert contents(tmp_path / f"killed {kills}") == whole, f"killed before rename {kills}"
        kills += 1
    assert kills > 12


def test_what_is_refused(database: Database, corpus: Path, tmp_path: Path):
    out = tmp_path / "out"
    made = precompute(retriever_of(database), corpus, out)
    before = contents(out)
    precompute(retriever_of(database), corpus, out)
    with pytest.raises(DatabaseError, match=r"other filters\), which are never overwritten"):
        precompute(retriever_of(database, max_overlap=0.5), corpus, out)
    assert contents(out) == before
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter").write_text("dear")
    with pytest.raises(DatabaseError, match="not empty"):
        precompute(retriever_of(database), corpus, tmp_path / "full")
    short = precompute(retriever_of(database), write_texts(tmp_path / "short.jsonl", ["abc"]), tmp_path / "short")
    assert (short.tokens.tolist(), short.document_ends.tolist()) == ([*b"abc", *[0] * (CHUNK - 3)], [3])
    with pytest.raises(DatabaseError, match="holds no finished training data"):
        open_neighbours(tmp_path / "full")
    # The database moved, or is another one.
    shutil.copytree(database.folder, tmp_path / "moved")
    shutil.copytree(out, tmp_path / "away" / "out")
    with pytest.raises(DatabaseError, match="does not exist"):
        open_neighbours(tmp_path / "away" / "out")
    found = open_neighbours(tmp_path / "away" / "out", tmp_path / "moved")
    assert np.array_equal(found.ids, made.ids)
    assert found.verify() == []
    database_of(tmp_path / "fewer", 5)
    with pytest.raises(DatabaseError, match="not the database"):
        open_neighbours(out, tmp_path / "fewer")
    for name, content in before.items():
        if name == "data.json":
            continue
        (out / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        assert any(name in line for line in open_neighbours(out).verify())
        (out / name).write_bytes(content[:-1])
        with pytest.raises(DatabaseError, match=name):
            open_neighbours(out)
        (out / name).write_bytes(content)
    (out / "data.json").write_text(before["data.json"].decode().replace('"version": 2', '"version": 1'))
    with pytest.raises(DatabaseError, match="version 2"):
        open_neighbours(out)


def test_keys_that_the_database_has_are_not_made_again(database: Database, corpus: Path, tmp_path: Path):
    """Of the database's own corpus nothing is embedded; of another one only documents that the database has not.
    What is found is the same as where all is embedded."""
    retriever = retriever_of(database)
    precompute(retriever, database.folder.with_suffix(".jsonl"), tmp_path / "own")
    assert retriever.embedder.texts == []
    made = precompute(retriever, corpus, tmp_path / "other")
    new = {json.loads(line)["text"] for line in corpus.read_text().splitlines()} - {*texts_of(30)}
    chunks = {
        text.encode()[at : at + CHUNK].decode(errors="replace")
        for text in new
        for at in range(0, len(text.encode()), CHUNK)
    }
    assert set(retriever.embedder.texts) == chunks

    plain = retriever_of(database)
    with pytest.MonkeyPatch.context() as patch:
        nothing = lambda self, chunks, documents, tokens: torch.full((len(chunks), Letters.dim), torch.nan)  # noqa: E731
        patch.setattr(training_data._Matched, "keys", nothing)
        again = precompute(plain, corpus, tmp_path / "again")
    assert np.array_equal(made.ids, again.ids)


def test_held_out_documents_are_apart_and_nobodys_neighbours(database: Database, corpus: Path, tmp_path: Path):
    """Both folders together are the corpus; no neighbour on either side has a held-out text; the same in
    another order."""
    made = precompute(retriever_of(database), corpus, tmp_path / "out", held_out=0.3)
    held = open_neighbours(tmp_path / "out" / "held-out")
    assert held.verify() == made.verify() == []

    def texts(data) -> list[str]:
        places = zip(data.document_starts.tolist(), data.document_ends.tolist())
        return [bytes(data.tokens[start:end].tolist()).decode() for start, end in places]

    given = [json.loads(line)["text"] for line in corpus.read_text().splitlines()]
    assert sorted(texts(made) + texts(held)) == sorted({*given})
    apart = {*texts(held)}
    assert len(apart) == round(0.3 * len({*given}))
    assert apart & {*texts_of(30)}
    lines = database.folder.with_suffix(".jsonl").read_text().splitlines()
    for data in (made, held):
        assert data.facts["bytes"] == sum(len(text.encode()) for text in texts(data))
        assert data.facts["held_out"] == 0.3
        assert data.facts["missing"] == int((data.ids < 0).sum())
        found = [database.source(chunk).record for chunk in np.unique(data.ids[data.ids >= 0]).tolist()]
        assert not apart & {json.loads(lines[record])["text"] for record in found}
        assert np.array_equal(data.ids, open_neighbours(data.folder).ids)
    turned = write_texts(tmp_path / "turned.jsonl", given[::-1])
    precompute(retriever_of(database), turned, tmp_path / "turned", held_out=0.3)
    assert {*texts(open_neighbours(tmp_path / "turned" / "held-out"))} == apart
    for share, message in ((0.0, "between 0 and 1"), (0.99, "expected some on either side")):
        with pytest.raises(ValueError, match=message):
            precompute(retriever_of(database), corpus, tmp_path / "x", held_out=share)
        shutil.rmtree(tmp_path / "x", ignore_errors=True)


def test_a_text_that_is_there_many_times_takes_one_search(tmp_path: Path, monkeypatch):
    """Of n copies every one has all others to pass over: looked up one by one that took n * n."""
    copies = 400
    monkeypatch.setattr(training_data, "BLOCK", 50)
    corpus = write_texts(tmp_path / "texts.jsonl", ["page not found"] * copies + ["something else", "abc dead beef"])
    options = {"tokenizer": "bytes", "embedder": Letters(), "chunk_size": CHUNK, "keep_duplicates": True}
    database = training_data.build_database(corpus, tmp_path / "db", **options)
    retriever = retriever_of(database)
    asked: list[int] = []
    inner = retriever.index.search

    def search(queries, k):
        asked.append(len(queries) * k)
        return inner(queries, k)

    retriever.index.search = search
    made = precompute(retriever, corpus, tmp_path / "out", keep_duplicates=True)
    assert len(made.document_starts) == copies + 2
    # Six different chunks, each looked for among twice as many candidates each time.
    assert sum(asked) < 6 * 4 * len(database)
    own = {database.source(chunk).record for chunk in np.unique(made.ids[:-4]).tolist() if chunk >= 0}
    assert own == {copies, copies + 1}


def test_a_changed_corpus_is_named_and_refused(database: Database, tmp_path: Path):
    texts = tmp_path / "texts"
    texts.mkdir()
    for number, text in enumerate(texts_of(6, 3)):
        (texts / f"{number}.txt").write_text(text)
    out = tmp_path / "out"
    precompute(retriever_of(database), texts, out)
    before = contents(out)
    precompute(retriever_of(database), texts, out)
    (texts / "new.txt").write_text("new")
    with pytest.raises(DatabaseError, match=r"finished neighbours of something else \(new.txt is new\)"):
        precompute(retriever_of(database), texts, out)
    (texts / "new.txt").unlink()
    stat = (texts / "3.txt").stat()
    (texts / "3.txt").write_text("x" * stat.st_size)
    os.utime(texts / "3.txt", ns=(0, stat.st_mtime_ns + 1))
    with pytest.raises(DatabaseError, match=r"\(3.txt changed\)"):
        precompute(retriever_of(database), texts, out)
    assert contents(out) == before


def test_a_database_that_grew_still_has_the_neighbours(tmp_path: Path):
    database = database_of(tmp_path / "db", 20)
    made = precompute(retriever_of(database), tmp_path / "db", tmp_path / "out")
    add_documents(str(write_texts(tmp_path / "more.jsonl", texts_of(5, 8))), tmp_path / "db", embedder=Letters())
    grown = open_neighbours(tmp_path / "out")
    assert len(grown.database) > len(database)
    ids = np.unique(made.ids[made.ids >= 0])
    assert torch.equal(grown.database.chunks(ids)[0], database.chunks(ids)[0])


def test_missing_neighbours_are_counted_truthfully(tmp_path: Path, letters_by_name):
    """A database of the one document itself has none for it."""
    database = database_of(tmp_path / "db", 1)
    corpus = tmp_path / "db.jsonl"
    done = CliRunner().invoke(
        app, ["db", "neighbours", str(tmp_path / "db"), str(corpus), "--out", str(tmp_path / "o")]
    )
    assert done.exit_code == 0, done.output
    chunks = len(database)
    assert f"with 0 of {2 * chunks} neighbours (2 a chunk)" in done.output
    assert f"100.0% of the neighbours are missing, {chunks} chunks have none" in done.output


def test_what_was_made_of_a_folder_in_it_is_no_text_of_it(tmp_path: Path):
    """Database and training data lie in the folder of texts: each run of a command sees the texts alone."""
    (tmp_path / "a.txt").write_text("dead beef " * 9)
    given = {"tokenizer": "bytes", "embedder": Letters(), "chunk_size": CHUNK}
    for _ in range(2):
        database = training_data.build_database(tmp_path, tmp_path / "db", **given)
        made = precompute(retriever_of(database), tmp_path, tmp_path / "data")
        add_documents(str(tmp_path), tmp_path / "db", embedder=Letters())
    assert database.paths() == {"a.txt"}
    assert made.facts["documents"] == 1


@pytest.mark.parametrize("header", [b"{'descr': '<i8', (", b"{'descr': '<i8'\n((", b"\xff" * 20, b"[" * 70])
def test_a_damaged_header_of_an_array_is_named(database: Database, corpus: Path, tmp_path: Path, header: bytes):
    precompute(retriever_of(database), corpus, tmp_path / "out")
    path = tmp_path / "out" / "neighbour_ids.npy"
    content = path.read_bytes()
    path.write_bytes(content[:10] + header + content[10 + len(header) :])
    with pytest.raises(DatabaseError, match=r"neighbour_ids\.npy holds no array"):
        open_neighbours(tmp_path / "out")


@pytest.mark.parametrize("other", [None, True, "text", 2.0, -1, [], {}, {"path": 3}], ids=repr)
def test_wrong_kinds_in_data_json_are_named(database: Database, corpus: Path, tmp_path: Path, other: object):
    precompute(retriever_of(database), corpus, tmp_path / "out")
    path = tmp_path / "out" / "data.json"
    good = json.loads(path.read_text())
    for name in ("format", "version", "files", "database", "database_sha256", "chunk_size", "chunks", "documents"):
        if (name, other) == ("version", 2.0):  # JSON's 2 and 2.0 are one number
            continue
        path.write_text(json.dumps({**good, name: other}))
        with pytest.raises(DatabaseError, match=r"data\.json|database"):
            open_neighbours(tmp_path / "out")
    for name in ("path", "bytes"):
        path.write_text(json.dumps({**good, "files": [{**good["files"][0], name: other}]}))
        with pytest.raises(DatabaseError):
            open_neighbours(tmp_path / "out")
    path.write_text(json.dumps(other))
    with pytest.raises(DatabaseError, match=r"data\.json"):
        open_neighbours(tmp_path / "out")


@pytest.fixture
def letters_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """The commands find the cheap embedder and index where they look for a real one."""
    monkeypatch.setattr(retriever_module, "load_embedder", lambda name, **_: Letters())
    index = types.ModuleType("index")
    index.open_index = lambda database, **_: Everything(database)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "retro_kernels.retrieval.index.index", index)


def test_the_commands(database: Database, corpus: Path, tmp_path: Path, letters_by_name):
    run = CliRunner()
    done = run.invoke(
        app,
        [
            "db",
            "neighbours",
            str(database.folder),
            str(corpus),
            "--out",
            str(tmp_path / "out"),
            "--num-neighbours",
            f"{K}",
        ],
    )
    assert done.exit_code == 0, done.output
    made = open_neighbours(tmp_path / "out")
    assert f"{made.facts['tokens']:,} tokens of" in done.output
    precompute(retriever_of(database), corpus, tmp_path / "api")
    assert np.array_equal(made.ids, open_neighbours(tmp_path / "api").ids)
    refused = run.invoke(app, ["db", "neighbours", str(tmp_path), str(corpus), "--out", str(tmp_path / "x")])
    assert refused.exit_code == 1
    assert "no finished retrieval database" in refused.output

    asked = ["db", "query", str(database.folder), "dead beef", "-k", "2"]
    shown = run.invoke(app, asked)
    assert shown.exit_code == 0, shown.output
    told = json.loads(run.invoke(app, [*asked, "--json"]).output)
    found = retriever_of(database).retrieve_text(["dead beef"], num_neighbours=2)
    assert [one["chunk"] for one in told["neighbours"]] == found.ids[0].tolist()
    for one, source, tokens, mask in zip(told["neighbours"], found.sources[0], found.tokens[0], found.mask[0]):
        assert source is not None
        assert (one["path"], one["record"], one["character"]) == (source.path, source.record, source.offset)
        assert one["text"] + one["continuation"] == bytes(tokens[mask].tolist()).decode()
        for part in (
            one["text"],
            one["continuation"].strip(),
            f"distance {one['distance']:.3f}",
            f"record {one['record']}",
        ):
            assert part in shown.output
    assert run.invoke(app, ["db", "query", str(database.folder), " "]).exit_code == 1
    wrong = run.invoke(app, [*asked, "--search", "nprobe"])
    assert wrong.exit_code == 1
    assert "NAME=VALUE" in wrong.output
