"""Readers: what text comes out of every format, what is left out and why, and that cuts lose and repeat nothing."""

from __future__ import annotations

import gzip
import json
import os
import time
from pathlib import Path

import numpy as np
import pytest

from retro_kernels.retrieval import DatabaseError, load_tokenizer
from retro_kernels.retrieval.corpus import chunking
from retro_kernels.retrieval.corpus.readers import UNKNOWN_ENDING, Options, Problem, Reader, cut, find

PAGE = """<!doctype html><html><head><title>Not shown</title><style>p {}</style></head><body>
<h1>Head &amp;  line</h1><script>var x = "</p>";</script><p>One <b>bold</b>
word<p>Two<br>three <pre>a  b
c</pre><noscript>no</noscript>end"""
SHOWN = "Head & line\nOne bold word\nTwo\nthree\na  b\nc\nend"


def read(path: Path, **options) -> list[tuple[int | None, str]]:
    """(record, text) of every document of every file; the text is "!" and the reason where it is left out."""
    found = []
    for piece in find([path])[0]:
        for document in Reader(piece, Options(**options)):
            try:
                found.append((document.record, "".join(document.blocks)))
            except Problem as problem:
                found.append((document.record, f"!{problem}"))
    return found


def test_every_format_gives_its_text(tmp_path: Path):
    lines = "\n".join(json.dumps({"text": text}) for text in ("eins", "zwei ü", "\ud83d half"))
    (tmp_path / "a.txt").write_text("Text, ümlaut\n")
    (tmp_path / "b.md").write_bytes(b"\xef\xbb\xbf# Title")
    (tmp_path / "c.html").write_text(PAGE)
    (tmp_path / "d.txt.gz").write_bytes(gzip.compress(b"packed"))
    (tmp_path / "e.jsonl").write_text(lines)
    (tmp_path / "f.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "g.txt").write_text("sixteen", "utf-16")
    (tmp_path / "h.html").write_bytes('<meta charset="latin-1"><body>é'.encode("latin-1"))
    in_json = [(0, "eins"), (1, "zwei ü"), (2, "\ufffd half")]
    expected = [(None, "Text, ümlaut\n"), (None, "# Title"), (None, SHOWN), (None, "packed"), *in_json, *in_json]
    expected += [(None, "sixteen"), (None, "é")]
    assert read(tmp_path) == expected


def test_zstd(tmp_path: Path):
    zstandard = pytest.importorskip("zstandard", reason="zstandard is not installed")
    (tmp_path / "a.txt.zst").write_bytes(zstandard.compress(b"a" * 1000))
    (tmp_path / "b.jsonl.zst").write_bytes(zstandard.compress(b'{"text": "x"}\n{"text": "y"}'))
    (tmp_path / "c.txt.zst").write_bytes(zstandard.compress(np.random.default_rng(0).bytes(4000))[:-100])
    *whole, (_, damaged) = read(tmp_path)
    assert whole == [(None, "a" * 1000), (0, "x"), (1, "y")]
    assert damaged.startswith("!")


def test_parquet_by_rows_and_row_groups(tmp_path: Path):
    arrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    import pyarrow.parquet as parquet

    texts = [f"row {number} " + "x" * number for number in range(20)]
    table = arrow.table({"id": list(range(21)), "text": [*texts, None]})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=4)
    assert read(tmp_path) == [*enumerate(texts), (20, "!no text in 'text'")]
    whole = find([tmp_path])[0][0]
    pieces = list(cut(whole, 1))
    assert len(pieces) == 6
    found = [(d.record, next(d.blocks)) for piece in pieces[:5] for d in Reader(piece, Options())]
    assert found == list(enumerate(texts))
    with pytest.raises(Problem, match="no column 'body'"):
        list(Reader(whole, Options(text_field="body")))
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(Problem, match="damaged Arrow or Parquet"):
        list(cut(find([tmp_path / "bad.parquet"])[0][0], 100))


def test_json_lines_cut_anywhere_lose_and_repeat_nothing(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    texts = [f"{number}" * (number % 7) for number in range(30)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" * (1 + number % 2) for number, text in enumerate(texts)))
    whole = find([path])[0][0]
    for size in (1, 2, 3, 10, 17, 64, 1000):
        found, lines, numbers = [], 0, []
        for piece in cut(whole, size):
            reader = Reader(piece, Options())
            for document in reader:
                found.append("".join(document.blocks))
                numbers.append(lines + document.record)
            lines += reader.records
        assert found == texts
        assert numbers == [number + number // 2 for number in range(30)]


def test_bad_input_is_left_out_with_its_reason(tmp_path: Path):
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    (tmp_path / "b.txt").write_bytes(b"bin\0ary")
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(b"x" * 10000)[:-12])
    (tmp_path / "d.txt.gz").write_bytes(b"not packed")
    line = b'{"text": "' + b"y" * 100 + b'"}'
    bad = b'\n[1]\n{\n{"text": "\xff"}\n{"text": 3}\n{"text": "z"}'
    (tmp_path / "e.jsonl").write_bytes(b'{"text": "ok"}\n' + line * 40 + bad)
    assert read(tmp_path, record_bytes=64) == [
        (None, "!not utf-8"),
        (None, "!binary"),
        (None, "!damaged packing"),
        (None, "!damaged packing"),
        (0, "ok"),
        (1, "!longer than 64 bytes"),
        (2, "!no text in 'text'"),
        (3, "!not JSON"),
        (4, "!not utf-8"),
        (5, "!no text in 'text'"),
        (6, "z"),
    ]
    assert read(tmp_path / "a.txt", encoding="latin-1") == [(None, "café")]
    (tmp_path / "open.html").write_text("<p>text<!-- " + "x" * 1000)
    assert read(tmp_path / "open.html", record_bytes=64) == [(None, "!longer than 64 bytes")]


def test_find_orders_names_and_takes_each_file_once(tmp_path: Path):
    for name in ("b/2.txt", "b/1.md", "a.txt", "b/.hidden.txt", ".git/x.txt", "c.bin", "db/own.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    found, left = find([tmp_path, tmp_path / "a.txt", f"{tmp_path}/*/*.md"], exclude=tmp_path / "db")
    assert [piece.name for piece in found] == ["a.txt", "b/1.md", "b/2.txt"]
    assert sorted(left) == [(".git/x.txt", "hidden"), ("b/.hidden.txt", "hidden"), ("c.bin", UNKNOWN_ENDING)]
    found, _ = find([f"{tmp_path}/**/*.txt", tmp_path / "c.bin"])
    assert [(piece.name, piece.format) for piece in found][-2:] == [("db/own.txt", "text"), ("c.bin", "text")]
    for wrong in (tmp_path / "absent", f"{tmp_path}/*.absent"):
        with pytest.raises(DatabaseError, match=r"absent"):
            find([wrong])


@pytest.mark.parametrize("text", ["", "a" * 150, "äß€ words and\nlines 𝄞 " * 40])
def test_chunks_are_the_texts_however_it_is_cut(monkeypatch: pytest.MonkeyPatch, text: str):
    """Tokens of all chunks, put together, are the document's, whatever blocks it comes in."""
    monkeypatch.setattr(chunking, "PIECE", 37)
    monkeypatch.setattr(chunking, "BATCH", 100)
    seen = set()
    for block in (1, 5, 1000):
        blocks = [text[start : start + block] for start in range(0, len(text), block)]
        documents = [chunking.Text(7, blocks), chunking.Text(8, ["second"])]
        found = list(chunking.parts(documents, load_tokenizer("bytes"), 8))
        assert [part.number for part in found if part.last] == [7, 8]
        mine = [part for part in found if part.number == 7]
        tokens = np.concatenate([part.tokens for part in mine])
        assert tokens.tolist() == list(text.encode())
        assert sum(part.characters for part in mine) == len(text)
        offsets = [offset for part in mine for offset in part.offsets]
        # A chunk may begin within a character of several bytes.
        assert offsets == [
            len(text.encode()[: 8 * n + 1].decode(errors="ignore"))
            - (len(text.encode()[: 8 * n + 1].decode(errors="ignore").encode()) == 8 * n + 1)
            for n in range(len(offsets))
        ]
        assert all(len(part.tokens) % 8 == 0 for part in mine if not part.last)
        seen.add(tuple(offsets))
    assert len(seen) == 1


def test_sources_of_several_inputs_are_told_apart(tmp_path: Path):
    """a/x.txt and b/x.txt are two names; of one folder names are those below it, wherever it lies."""
    for name in ("a/x.txt", "b/x.txt", "b/c/y.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    names = lambda *inputs: [piece.name for piece in find([*inputs])[0]]  # noqa: E731
    assert names(tmp_path / "a", tmp_path / "b") == ["a/x.txt", "b/x.txt", "b/c/y.txt"]
    assert names(tmp_path / "a" / "x.txt", tmp_path / "b" / "x.txt") == ["a/x.txt", "b/x.txt"]
    assert names(f"{tmp_path}/a/*.txt", tmp_path / "b" / "c") == ["a/x.txt", "b/c/y.txt"]
    assert names(tmp_path / "b") == ["x.txt", "c/y.txt"]
    assert names(tmp_path / "a" / "x.txt") == ["x.txt"]


def test_folders_that_are_not_entered_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("in/a.txt", "in/closed/b.txt", "other/c.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "in" / "link").symlink_to(tmp_path / "other")
    scandir = os.scandir

    def refused(path):  # root may read everything
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refused)
    found, left = find([tmp_path / "in"])
    assert [piece.name for piece in found] == ["a.txt"]
    assert sorted(left) == [("closed/", "unreadable"), ("link/", "link to a folder")]


def test_a_cut_zst_is_refused_as_a_cut_gz_is(tmp_path: Path):
    """Anywhere but between frames; whole frames, empty and skippable ones are read one after another."""
    zstandard = pytest.importorskip("zstandard", reason="zstandard is not installed")
    data = np.random.default_rng(0).integers(97, 123, 9000, np.uint8).tobytes()
    packer = zstandard.ZstdCompressor(write_checksum=True)
    whole = packer.compress(data)
    path = tmp_path / "a.txt.zst"
    for cut_at in (1, 3, 7, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut_at])
        assert read(path) == [(None, "!damaged packing")], cut_at
    skippable = b"\x50\x2a\x4d\x18" + (5).to_bytes(4, "little") + b"12345"
    path.write_bytes(whole + skippable + packer.compress(b"") + whole)
    assert read(path) == [(None, (data + data).decode())]
    path.write_bytes(whole + skippable[:-1])
    assert read(path) == [(None, "!damaged packing")]
    lines = b"".join(b'{"text": "%d"}\n' % number for number in range(2000))
    path = tmp_path / "b.jsonl.zst"
    path.write_bytes(packer.compress(lines)[:-5])
    with pytest.raises(Problem, match="damaged packing"):
        read(path)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32"])
def test_json_lines_with_a_mark_of_wide_characters(tmp_path: Path, encoding: str):
    texts = ["eins", "zwei \u010a\u0a0d", "x" * 100, "vier"]  # characters with the byte of a line's end
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts), encoding)
    whole = find([path])[0][0]
    assert list(cut(whole, 10)) == [whole]
    assert read(path) == list(enumerate(texts))
    assert read(path, record_bytes=64) == [(0, "eins"), (1, texts[1]), (2, "!longer than 64 bytes"), (3, "vier")]
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(Problem, match=f"not {encoding}"):
        read(path)


def test_broken_markup_takes_time_in_proportion(tmp_path: Path):
    """2 MB of it took an hour; text before it is kept, and scripts of any size hide themselves alone."""
    path = tmp_path / "a.html"
    path.write_text("<p>text" + "<![CDATA[" * 200_000)
    begun = time.process_time()
    found = read(path)
    assert time.process_time() - begun < 20
    assert found[0][1].startswith("text")
    path.write_text("<p>one<script>" + "x < y;" * 200_000 + "</script>two<p>three")
    assert read(path) == [(None, "onetwo\nthree")]
    path.write_text("<p>one<!-- " + "x" * 500_000 + "--> two")
    assert read(path) == [(None, "one two")]


def test_arrow_streams_are_read_row_by_row(tmp_path: Path):
    """What `datasets` writes by save_to_disk; a stream that is cut between two batches is refused."""
    arrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    path = tmp_path / "data-00000-of-00001.arrow"
    table = arrow.table({"text": ["one", None, "zwei ü"], "other": [1, 2, 3]})
    for kind in (arrow.ipc.new_file, arrow.ipc.new_stream):
        with arrow.OSFile(str(path), "wb") as file, kind(file, table.schema) as stream:
            for start in range(3):
                stream.write_batch(table.slice(start, 1).to_batches()[0])
        assert read(path) == [(0, "one"), (1, "!no text in 'text'"), (2, "zwei ü")]
    with pytest.raises(Problem, match="no column 'body'"):
        read(path, text_field="body")
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(Problem, match="damaged Arrow"):
        read(path)
