"""examples/retrofit.py from files of text to a generated one, with a tiny decoder and a cheap embedder."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers")
import retrofit as example
from decoders import decoder
from retrieval_common import Letters, texts_of


def test_the_example_goes_on_from_what_it_has_saved(tmp_path, capsys):
    for i, text in enumerate(texts_of(24)):
        (tmp_path / f"{i:02}.txt").write_text(text + " end." * 12)
    (tmp_path / "noise.bin").write_bytes(b"\0\1")
    known, held_out = example.split(tmp_path, 1.0)
    assert len(known) + len(held_out) == 24
    assert not {x.name for x in known} & {x.name for x in held_out}
    with pytest.raises(SystemExit, match="0 to hold out"):
        example.split(tmp_path, 1e-4)
    given = {
        "tokenizer": "bytes",
        "embedder": Letters(),
        "chunk_size": 8,
        "length": 32,
        "texts": 4,
        "held_out": 3,
        "new_tokens": 17,
    }
    first = example.run(decoder(vocab_size=256), (known, held_out), tmp_path / "out", **given)
    shown = capsys.readouterr().out
    assert "4 of 4 texts" in shown
    assert set(first) == {"without", "other neighbours", "right neighbours"}
    # The prompt of 2 chunks and two that were generated; each has two neighbours in files that were not held out.
    sources = [line for line in shown.splitlines() if line.startswith("  [after chunk")]
    assert len(sources) == 4
    assert all(any(path.name in line for path in known) for line in sources)
    assert example.run(decoder(vocab_size=256), (known, held_out), tmp_path / "out", **given) == first
    assert "4 of 4 texts" not in capsys.readouterr().out
