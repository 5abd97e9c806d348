"""The GPU suite's part on retrieval, reduced: all its items on the CPU, with FAISS's CPU indexes and without FAISS."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu, retrieval_gpu
from benchmarks.gpu_part import Record
from retro_kernels.retrieval.index import exact


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a kit's embeddings."""
    monkeypatch.setattr(retrieval_gpu, "EMBEDDINGS", Path("there is no kit"))
    retrieval_gpu.real_embeddings.cache_clear()


def outcomes(folder: Path, done: set[str] = frozenset()) -> dict[str, dict]:  # type: ignore[assignment]
    file = folder / "items.jsonl"
    retrieval_gpu.run(Record(file, "retrieval timings", 600.0, done, reduced=True))
    return {entry["item"]: entry for entry in map(json.loads, file.read_text().splitlines()) if "status" in entry}


def test_every_item_is_compared_and_timed(tmp_path):
    pytest.importorskip("faiss")
    found = outcomes(tmp_path, {"embedding"})
    assert {name: entry["detail"] for name, entry in found.items() if entry["status"] != "ok"} == {}
    rows = [row for entry in found.values() for row in entry["retrieval"]]
    searched = {(row["index"], row["keys"], row["batch"]) for row in rows if "index" in row}
    assert {batch for _, _, batch in searched} == {1, 64}
    assert {index for index, *_ in searched} == {
        "exact",
        "Flat, moved",
        "Flat, built there",
        "IVF16,SQ8, moved",
        "IVF16,SQ8, built there",
        "IVF16,PQ4x4, moved",
        "IVF16,PQ4x4, built there",
        "IVF32,SQ8, built there",
        "IVF32,PQ4x4, built there",
    }
    assert all(row["queries_per_second"] > 0 for row in rows if "index" in row)
    assert found["text to loss"]["retrieval"][0]["backend"] == "cpu"


def test_embedding_is_compared_and_timed(tmp_path):
    """Of a small model with made weights. (Importing transformers is what takes its time.)"""
    pytest.importorskip("transformers")
    detail, rows = retrieval_gpu.embedding(
        retrieval_gpu.Bench(Record(tmp_path / "items.jsonl", "a", 600.0, reduced=True))
    )
    assert rows[0]["chunks_per_second"] > 0
    assert "off the CPU's" in detail


def test_without_faiss_exact_search_runs_alone_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    found = outcomes(tmp_path, {"embedding", "text to loss"})
    for name, entry in found.items():
        if name.startswith("FAISS"):
            assert entry["status"] == "skipped"
            assert entry["detail"].startswith("exact search runs alone: import of faiss")
        else:
            assert entry["status"] == "ok", entry["detail"]


def test_a_wrong_search_is_not_timed(tmp_path, monkeypatch):
    """The second key in place of the first."""
    search = exact.search

    def wrong(keys: exact.Keys, queries: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        distances, ids = search(keys, queries, k + 1)
        return distances[:, 1:], ids[:, 1:]

    monkeypatch.setitem(sys.modules, "faiss", None)
    monkeypatch.setattr(retrieval_gpu.exact, "search", wrong)
    found = outcomes(tmp_path, {"embedding", "text to loss"})
    made = found["exact search, 4,000 made embeddings"]
    assert made["status"] == "failed"
    assert "by distances in fp64" in made["detail"]
    assert "retrieval" not in made


def test_the_rows_of_all_items_come_into_the_document(tmp_path):
    items = gpu.Items(tmp_path, {}, 0.0)
    for name in ("a", "b"):
        items.add(part="retrieval timings", item=name, status="ok", detail="", seconds=1.0, retrieval=[{"what": name}])
    assert items.document()["retrieval"] == [{"what": "a"}, {"what": "b"}]
