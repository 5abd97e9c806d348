"""The speeds in docs/retrieval.md are those of the raw results."""

from __future__ import annotations

import json

from benchmarks import retrieval


def test_the_page_is_not_stale():
    assert retrieval.main(["--check"]) == 0


def test_rows_say_what_the_results_say(tmp_path):
    folder = tmp_path / "a-machine"
    folder.mkdir()
    base = {"files": 2, "text_bytes": 2e6, "chunks": 1000, "every": 1, "peak_bytes": 5e8, "megabytes_per_minute": 90.0}
    rows = [
        {**base, "chunks_per_second": 100.0, "seconds_embedder_alone": 1.0, "share_of_embedder": 0.9},
        {**base, "chunks_per_second": 120.0, "seconds_embedder_alone": 1.0, "share_of_embedder": 1.0},
        {**base, "chunks_per_second": 2000.0},
    ]
    (folder / "retrieval-build.json").write_text(json.dumps({"rows": rows}))
    gathered = {"store": "cpu", "pinned": False, "chunks": 4096, "rows": 8192, "length": 128}
    gathered |= {"rows_per_second": 5e6, "chunks_per_second": 1e7}
    (folder / "retrieval-gather.json").write_text(json.dumps({"rows": [gathered]}))
    block = retrieval.block(tmp_path)
    assert "On `a-machine`" in block
    assert "default embedder, 2 runs | 100 to 120 chunks/s, 95% of the embedder's own" in block
    assert "embeddings given | 90 MB of text a minute, 2,000 chunks/s, peak memory 0.50 GB" in block
    assert (
        "rows of 128 tokens and their masks from page cache, of 4,096 chunks | 5.0 M rows/s, 10.0 M chunks/s" in block
    )
