"""The page says of swapped peers what the results say; a small run compares before it times."""

import json

import pytest

from benchmarks import swapped

TINY = {"width": 32, "layers": 3, "heads": 1, "head_dim": 32, "m": 4, "k": 1, "r": 8, "tokens": 8, "vocab": 50}


def test_the_page_is_not_stale():
    found = list(swapped.RESULTS.glob(f"*/{swapped.FILE}"))
    assert found
    for path in found:
        assert swapped.table(json.loads(path.read_text())) in swapped.DOCUMENT.read_text()


def test_results_are_compared_before_they_are_timed(monkeypatch):
    pytest.importorskip("retro_pytorch", reason="the peer is not installed (extra `peers`)")
    rows = swapped.measure("retro-pytorch 0.3.9", 2, TINY)
    assert [row["dtype"] for row in rows] == ["fp32", "bf16"]
    assert all(len(row["seconds"]) == 2 and row["replaced"] > 0 for row in rows)
    monkeypatch.setattr(swapped, "FP32_LIMIT", -1.0)
    with pytest.raises(RuntimeError, match="the swapped model differs"):
        swapped.measure("retro-pytorch 0.3.9", 2, TINY)
