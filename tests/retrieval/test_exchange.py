"""Import and export: chunks keep numbers and tokens, neighbours their chunks, and files that do not fit are named."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from retro_kernels.cli import app
from retro_kernels.retrieval import Database, DatabaseError, build_database, load_tokenizer
from retro_kernels.retrieval.exchange import NEIGHBOURS, export_parquet, import_database

CHUNK = 8


def documents(lengths: tuple[int, ...], low: int = 1) -> list[np.ndarray]:
    random = np.random.default_rng(0)
    return [random.integers(low, 300, length) for length in lengths]


@pytest.fixture
def retro_pytorch(tmp_path: Path) -> Path:
    """What its README's TrainingWrapper leaves, written by its own functions where it is installed."""
    folder = tmp_path / "retro-pytorch"
    folder.mkdir()
    retrieval = pytest.importorskip("retro_pytorch.retrieval", reason="retro-pytorch is not installed")
    texts = documents((3, 8, 9, 40))
    for number, tokens in enumerate(texts):
        (folder / f"{number}.txt").write_text(json.dumps(tokens.tolist()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(retrieval, "tokenize", lambda text: torch.tensor([json.loads(text)]))
        stats = retrieval.text_folder_to_chunks_(
            folder=folder,
            chunks_memmap_path=folder / "train.chunks.dat",
            seqs_memmap_path=folder / "train.seq.dat",
            doc_ids_memmap_path=folder / "train.doc_ids.dat",
            chunk_size=CHUNK,
            seq_len=2 * CHUNK,
            max_chunks=50,
        )
    (folder / "processed-stats.json").write_text(json.dumps(stats))
    random = np.random.default_rng(1)
    random.standard_normal((stats["chunks"], 5)).astype(np.float32).tofile(folder / "train.chunks.dat.embedded")
    random.integers(-1, stats["chunks"], (stats["chunks"], 2)).astype(np.int32).tofile(folder / "train.chunks.knn.dat")
    return folder


def check_documents(database: Database, expected: list[np.ndarray], chunk_size: int) -> None:
    chunk = 0
    for number, tokens in enumerate(expected):
        for start in range(0, len(tokens), chunk_size):
            found, mask = database.chunks(torch.tensor([chunk]))
            assert found[mask].tolist() == tokens[start : start + 2 * chunk_size].tolist()
            assert database.source(chunk).record == number
            chunk += 1
    assert chunk == len(database)


def test_neighbours_from_retro_pytorch_once_it_has_trained(retro_pytorch: Path, tmp_path: Path):
    """Its data set has made the file longer, by the chunks of a sequence."""
    path = retro_pytorch / "train.chunks.knn.dat"
    before = np.fromfile(path, np.int32).reshape(-1, 2)
    for more in (1, 2, 9, 100):
        path.write_bytes(before.tobytes() + bytes(before[0].nbytes * more))
        import_database("retro-pytorch", retro_pytorch, tmp_path / f"{more}", chunk_size=CHUNK)
        assert np.array_equal(np.load(tmp_path / f"{more}" / NEIGHBOURS, allow_pickle=False), before)
    path.write_bytes(before.tobytes()[:-8])
    with pytest.raises(DatabaseError, match="are no rows of 9 chunks"):
        import_database("retro-pytorch", retro_pytorch, tmp_path / "cut", chunk_size=CHUNK)


def test_from_retro_pytorch(retro_pytorch: Path, tmp_path: Path):
    folder = tmp_path / "db"
    given = ["db", "import", "retro-pytorch", str(retro_pytorch), "--out", str(folder), "--chunk-size", str(CHUNK)]
    run = CliRunner().invoke(app, given)
    assert run.exit_code == 0, run.output
    database = Database(folder)
    assert database.verify() == []
    check_documents(database, documents((3, 8, 9, 40)), CHUNK)
    embedded = np.fromfile(retro_pytorch / "train.chunks.dat.embedded", np.float32).reshape(-1, 5)
    assert np.array_equal(np.concatenate([block for _, block in database.embeddings()]), embedded)
    neighbours = np.fromfile(retro_pytorch / "train.chunks.knn.dat", np.int32).reshape(-1, 2)
    assert np.array_equal(np.load(folder / NEIGHBOURS, allow_pickle=False), neighbours)
    again = CliRunner().invoke(app, given)
    assert again.exit_code == 1
    assert "not empty" in again.output
    for name, content, match in (
        ("train.chunks.knn.dat", np.full(2 * len(database), 99, np.int32).tobytes(), "chunk 99 is not one of"),
        ("train.chunks.dat.embedded", bytes(4), "are no rows of"),
        ("train.doc_ids.dat", np.arange(50, 0, -1, np.int32).tobytes(), "not in order"),
        ("train.chunks.dat", bytes(40), "are no 9 rows of 9 int32"),
        ("processed-stats.json", b"{}", "expected the number of chunks"),
    ):
        (retro_pytorch / name).write_bytes(content)
        with pytest.raises(DatabaseError, match=match):
            import_database("retro-pytorch", retro_pytorch, tmp_path / name, chunk_size=CHUNK)
    with pytest.raises(ValueError, match="format: got 'other'"):
        import_database("other", retro_pytorch, tmp_path / "other")


def write_megatron(folder: Path, datasets: dict[str, list[np.ndarray]], left_out: set[tuple[str, int, int]]) -> int:
    """A Retro project as megatron-core 0.15.3 lays it out. -> chunks. left_out: (dataset, document, first token)."""
    h5py = pytest.importorskip("h5py", reason="h5py is not installed")
    rows = []
    for number, (prefix, found) in enumerate(datasets.items()):
        base = folder / "data" / prefix
        base.parent.mkdir(parents=True, exist_ok=True)
        lengths = np.array([len(tokens) for tokens in found], np.int32)
        np.concatenate(found).astype(np.uint16).tofile(base.with_name(base.name + ".bin"))
        starts = (np.cumsum(lengths, dtype=np.int64) - lengths) * 2
        head = b"MMIDIDX\x00\x00" + np.array([1], "<u8").tobytes() + bytes([8])
        counts = np.array([len(found), len(found) + 1], "<u8").tobytes()
        ends = np.arange(len(found) + 1, dtype=np.int64).tobytes()
        base.with_name(base.name + ".idx").write_bytes(head + counts + lengths.tobytes() + starts.tobytes() + ends)
        for document, tokens in enumerate(found):
            for start in range(0, len(tokens), CHUNK):
                if (prefix, document, start) not in left_out:
                    rows.append((number, document, start, min(start + CHUNK, len(tokens)), 1))
    (folder / "db" / "merged").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"retro_gpt_chunk_length": CHUNK, "retro_gpt_vocab_size": 300}))
    (folder / "db" / "indexed_dataset_infos.json").write_text(json.dumps([{"prefix": prefix} for prefix in datasets]))
    with h5py.File(folder / "db" / "merged" / "train.hdf5", "w") as file:
        file["chunks"] = np.array(rows, np.uint32)
    query = folder / "query" / "train_0"
    query.mkdir(parents=True)
    for first in (0, 4):
        with h5py.File(query / f"{first:02d}-{first + 4:02d}.hdf5", "w") as file:
            file["neighbors"] = np.arange(first, first + 8).reshape(4, 2) % len(rows) - (first == 0)
    return len(rows)


def test_from_megatron(tmp_path: Path):
    """Documents of two datasets; a chunk that Megatron left out is passed over, as Megatron passes over it."""
    folder = tmp_path / "project"
    found = documents((8, 30, 5))
    others = documents((17,))
    count = write_megatron(folder, {"a/wiki_text": found, "books_text": others}, {("a/wiki_text", 1, 8)})
    query = folder / "query" / "train_0"
    database = import_database("megatron", folder, tmp_path / "db", neighbours=query)
    assert (len(database), database.chunk_size, database.manifest["token_dtype"]) == (count, CHUNK, "uint16")
    assert database.verify() == []
    kept = np.concatenate([found[1][:8], found[1][16:]])
    sources = database.sources(torch.arange(count))
    assert [(s.path, s.record) for s in sources] == [("a/wiki_text", n) for n in (0, 1, 1, 1, 2)] + [
        ("books_text", 0)
    ] * 3
    tokens, mask = database.chunks(torch.tensor([0, 1, 4, 5]), 3 * CHUNK)
    parts = [tokens[row][mask[row]].tolist() for row in range(4)]
    assert parts == [found[0].tolist(), kept.tolist(), found[2].tolist(), others[0].tolist()]
    neighbours = np.load(tmp_path / "db" / NEIGHBOURS, allow_pickle=False)
    assert neighbours.tolist() == [[-1, 0], [1, 2], [3, 4], [5, 6], [4, 5], [6, 7], [0, 1], [2, 3]]
    (query / "00-04.hdf5").unlink()
    with pytest.raises(DatabaseError, match="a block is missing before it"):
        import_database("megatron", folder, tmp_path / "gap", neighbours=query)
    (query / "04-08.hdf5").write_bytes(b"no HDF5")
    (query / "04-08.hdf5").rename(query / "00-08.hdf5")
    with pytest.raises(DatabaseError, match="cannot be read as HDF5"):
        import_database("megatron", folder, tmp_path / "damaged", neighbours=query)
    infos = folder / "db" / "indexed_dataset_infos.json"
    infos.write_text(json.dumps([{"prefix": "../../secret"}]))
    with pytest.raises(DatabaseError, match="outside"):
        import_database("megatron", folder, tmp_path / "outside")
    infos.write_text(json.dumps([{"prefix": "a/wiki_text"}]))
    with pytest.raises(DatabaseError, match="is not there"):
        import_database("megatron", folder, tmp_path / "fewer")


def test_to_parquet(tmp_path: Path):
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    (tmp_path / "a.txt").write_text("abcdefghijk")
    (tmp_path / "b.jsonl").write_text('{"text": "xyz"}\n{"text": "long enough"}\n')
    database = build_database(
        [tmp_path / "a.txt", tmp_path / "b.jsonl"],
        tmp_path / "db",
        tokenizer="bytes",
        embedder=Ones(),
        chunk_size=CHUNK,
        index=None,
    )
    out = tmp_path / "db.parquet"
    run = CliRunner().invoke(app, ["db", "export", str(database.folder), str(out), "--text", "--embeddings"])
    assert run.exit_code == 0, run.output
    rows = parquet.read_table(out).to_pylist()
    assert [row["text"] for row in rows] == ["abcdefgh", "ijk", "xyz", "long eno", "ugh"]
    assert [(row["path"], row["record"], row["token_offset"], row["document"]) for row in rows] == [
        ("a.txt", None, 0, 0),
        ("a.txt", None, 8, 0),
        ("b.jsonl", 0, 0, 1),
        ("b.jsonl", 1, 0, 2),
        ("b.jsonl", 1, 8, 2),
    ]
    assert [bytes(row["tokens"]).decode() for row in rows] == [row["text"] for row in rows]
    assert [list(map(float, row["embedding"])) for row in rows] == [[len(row["text"]), 1.0] for row in rows]
    with pytest.raises(DatabaseError, match="never overwritten"):
        export_parquet(database, out)
    assert export_parquet(database, tmp_path / "plain.parquet") == 5
    assert "text" not in parquet.read_schema(tmp_path / "plain.parquet").names
    assert load_tokenizer("bytes").identity == database.manifest["tokenizer"]


def test_own_embeddings_and_their_texts(tmp_path: Path):
    """Each text is a chunk with its embedding; what does not fit together is named, with its place."""
    own = tmp_path / "own"
    own.mkdir()
    texts = ["abc", "dead beef"[:CHUNK], "ü"]
    lines = [json.dumps({"text": text}) + "\n" for text in texts]
    (own / "texts.jsonl").write_text("".join(lines))
    keys = np.random.default_rng(0).standard_normal((3, 5)).astype(np.float16)
    np.save(own / "embeddings.npy", keys)
    given = ["db", "import", "numpy", str(own), "--tokenizer", "bytes", "--chunk-size", f"{CHUNK}"]
    run = CliRunner().invoke(app, [*given, "--out", str(tmp_path / "db")])
    assert run.exit_code == 0, run.output
    database = Database(tmp_path / "db")
    assert database.verify() == []
    check_documents(database, [np.frombuffer(text.encode(), np.uint8) for text in texts], CHUNK)
    assert np.array_equal(np.concatenate([block for _, block in database.embeddings()]), keys)
    assert (database.source(1).path, database.source(1).record) == ("texts.jsonl", 1)

    asked = CliRunner().invoke(app, ["db", "query", str(tmp_path / "db"), "dead"])
    assert asked.exit_code == 1
    assert "embedder: " in asked.output
    assert "import it again with --embedder" in asked.output

    def refused(message: str, **options) -> None:
        with pytest.raises((DatabaseError, ValueError), match=message):
            import_database("numpy", own, tmp_path / "x", **{"tokenizer": "bytes", "chunk_size": CHUNK, **options})
        for path in sorted((tmp_path / "x").rglob("*"), reverse=True):
            path.unlink() if path.is_file() else path.rmdir()

    refused("tokenizer: got none", tokenizer=None)
    refused(r"record 1: 8 tokens; expected 1 to 4", chunk_size=4)
    refused("embedder: makes 2 numbers", embedder=Ones())
    (own / "texts.jsonl").write_text("".join(lines[:2]))
    refused(r"2 texts, embeddings.npy has 3")
    (own / "texts.jsonl").write_text("".join([*lines, lines[0]]))
    refused(r"record 3: a text without an embedding")
    (own / "texts.jsonl").write_text("".join([lines[0], "{broken", lines[1], lines[2]]))
    refused(r"record 1: not JSON")
    np.save(own / "embeddings.npy", np.array([object()]), allow_pickle=True)
    refused("holds no array of numbers")


def test_a_name_that_is_no_utf8_is_exported(tmp_path: Path):
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    (tmp_path / "in").mkdir()
    with open(bytes(tmp_path / "in") + b"/\xff.txt", "wb") as file:
        file.write(b"abc")
    database = build_database(tmp_path / "in", tmp_path / "db", tokenizer="bytes", embedder=None, chunk_size=CHUNK)
    assert database.source(0).path == "\udcff.txt"
    assert export_parquet(database, tmp_path / "db.parquet") == 1
    assert parquet.read_table(tmp_path / "db.parquet").to_pylist()[0]["path"] == "\\udcff.txt"


class Ones:
    """An embedding is the text's length, and 1."""

    dim = 2
    identity = {"name": "ones", "kind": "test", "sha256": "0"}  # noqa: RUF012

    def __call__(self, texts):
        return np.array([[len(text), 1] for text in texts], np.float32)
