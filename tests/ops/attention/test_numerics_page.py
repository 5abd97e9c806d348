"""docs/numerics.md: its table is what docs/numerics.py measures, and errors are as large as the page says."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from retro_kernels.ops.attention import cpu

DOCS = Path(__file__).resolve().parents[3] / "docs"


@pytest.mark.skipif(cpu.unavailable() is not None, reason=str(cpu.unavailable()))
def test_what_large_logits_cost():
    specification = importlib.util.spec_from_file_location("numerics", DOCS / "numerics.py")
    numerics = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(numerics)
    rows = {}
    for line in (DOCS / "numerics.md").read_text().split("large-logits:begin")[1].splitlines()[3:]:
        if not line.startswith("|"):
            break
        first, *errors = (cell.strip() for cell in line.strip("|").split("|"))
        rows[int(first.replace(",", ""))] = [float(x) for x in errors]
    assert tuple(rows) == numerics.MAGNITUDES
    for magnitude, errors in rows.items():
        measured = list(numerics.measure(magnitude, "cpu").values())
        # another level of instructions rounds otherwise
        assert all(x <= 4 * y + 1e-6 and y <= 4 * x + 1e-6 for x, y in zip(measured, errors)), (magnitude, measured)
        assert measured[0] <= 1e-7 * magnitude + 1e-6
