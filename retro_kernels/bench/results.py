"""The raw results of a run.

A run writes one JSON document, `bench.json`. What is committed is a table of it, `results/<device>.csv`: a line a row,
with the columns that tables and figures use, after comment lines `# name: JSON` with the rest of the document.
"""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

from retro_kernels import files

SCHEMA = 2
FILE = "bench.json"


def new(environment: dict, settings: dict) -> dict:
    """An empty document; a run fills it up and may be interrupted at any time."""
    return {
        "schema": SCHEMA,
        "environment": environment,
        "settings": settings,
        "ceilings": None,
        "rows": [],
        "real_text": None,
        "parts": [],
        "skipped": [],
        "interrupted": False,
        "seconds": None,
    }


def save(document: dict, path: Path) -> None:
    """Replaces the file as a whole, by a table where it is called `*.csv`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = to_csv(document).encode() if path.suffix == ".csv" else compact_json(document)
    files.write_bytes(path, content, concurrent=True)


def load(path: Path) -> dict:
    """Reads a document or a table. Raises ValueError when the file is not a result of this schema."""
    text = path.read_text()
    document = from_csv(text) if path.suffix == ".csv" else json.loads(text)
    if not isinstance(document, dict) or document.get("schema") != SCHEMA:
        found = document.get("schema") if isinstance(document, dict) else type(document).__name__
        raise ValueError(f"{path}: got schema {found}, expected {SCHEMA}: run `retro-kernels bench` again")
    return document


def committed(folder: Path) -> list[Path]:
    """The tables of all devices in `benchmarks/results`."""
    return sorted(folder.glob("*.csv"))


_TEXT = ("operation", "option", "workload", "shape", "dtype", "mode", "variant", "status", "reason", "strategy")
_TRUTH = ("cuda_graph", "chosen")
_COUNTS = (
    "samples", "flops", "bytes", "peak_extra_bytes", "scratch_bytes", "whole_scratch_bytes", "saved_bytes",
    "cache_bytes", "parameter_bytes",
)  # fmt: skip
_NUMBERS = ("p20_ms", "p50_ms", "p80_ms", "error", "predicted_ms", "border_ms", "wall_ms")
COLUMNS = (*_TEXT[:-1], *_NUMBERS[:4], *_COUNTS[:3], *_TRUTH[:1], *_COUNTS[3:], *_TEXT[-1:], *_TRUTH[1:], *_NUMBERS[4:])
"""The columns of a table. "error" is the largest relative error of a row; rates and limits follow from the others."""


def to_csv(document: dict) -> str:
    """The document as a table. Times keep nine significant digits, so that tables are the same to the last."""
    out = io.StringIO()
    for name, value in finite(document).items():
        if name != "rows":
            out.write(f"# {name}: {json.dumps(value, allow_nan=False, default=_plain)}\n")
    writer = csv.DictWriter(out, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for row in document["rows"]:
        cells = {name: row.get(name) for name in COLUMNS}
        cells["error"] = max((float(error["relative"]) for error in row.get("errors") or []), default=None)
        cells |= {name: f"{cells[name]:.9g}" for name in _NUMBERS if cells[name] is not None}
        cells |= {name: "yes" if cells[name] else None for name in _TRUTH}
        cells |= {name: int(cells[name]) for name in _COUNTS if cells[name] is not None}
        writer.writerow(cells)
    return out.getvalue()


def from_csv(text: str) -> dict:
    """The document of a table, with the rates and limits that follow from it."""
    lines = text.splitlines()
    head = [line for line in lines if line.startswith("# ")]
    document = {name: json.loads(value) for name, _, value in (line[2:].partition(": ") for line in head)}
    document["rows"] = [_row(cells, document.get("ceilings")) for cells in csv.DictReader(lines[len(head) :])]
    return document


def _row(cells: dict, ceilings: dict | None) -> dict:
    row: dict = {name: cells[name] or None for name in _TEXT}
    row |= {name: cells[name] == "yes" for name in _TRUTH}
    row |= {name: int(cells[name]) if cells[name] else None for name in _COUNTS}
    row |= {name: float(cells[name]) if cells.get(name) else None for name in _NUMBERS}  # older tables lack the last
    error = row.pop("error")
    row["errors"] = [] if error is None else [{"name": "largest", "relative": error}]
    if row["status"] == "ok" and row["p50_ms"] and row["bytes"]:
        row["tflops"] = row["flops"] / row["p50_ms"] / 1e9
        row["gigabytes_per_second"] = row["bytes"] / row["p50_ms"] / 1e6
        if ceilings:
            arithmetic = row["flops"] / ceilings["matrix_flops_per_second"][row["dtype"]] * 1e3
            memory = row["bytes"] / ceilings["copy_bytes_per_second"] * 1e3
            row["limit_ms"], row["bound"] = max((arithmetic, "arithmetic"), (memory, "memory"))
            row["percent_of_limit"] = 100 * row["limit_ms"] / row["p50_ms"]
    return row


def compact_json(value) -> bytes:
    """JSON with a line an entry: short values stand on one line, long lists and objects a line an element."""

    def text(value, indent: str) -> str:
        flat = json.dumps(value, allow_nan=False, default=_plain)
        if len(indent) + len(flat) <= 160 or not isinstance(value, (dict, list)):
            return flat
        inner = indent + " "
        if isinstance(value, dict):
            parts = [f"{json.dumps(key)}: {text(entry, inner)}" for key, entry in value.items()]
        else:
            parts = [text(entry, inner) for entry in value]
        ends = "{}" if isinstance(value, dict) else "[]"
        return f"{ends[0]}\n{inner}" + f",\n{inner}".join(parts) + f"\n{indent}{ends[1]}"

    return (text(value, "") + "\n").encode()


def _plain(value):
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} is no JSON value")


def finite(value):
    """Turns NaN and infinity into text, since JSON has no number for them."""
    if isinstance(value, dict):
        return {key: finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(entry) for entry in value]
    if isinstance(value, float) and value - value != 0:
        return str(value)
    return value


Case = tuple[str, str, str, str, str]


def case_of(row: dict) -> Case:
    """(operation, option, workload, dtype, mode)"""
    return row["operation"], row["option"], row["workload"], row["dtype"], row["mode"]


def cases(document: dict) -> list[Case]:
    """In the order they were run."""
    return list(dict.fromkeys(map(case_of, document["rows"])))


def rows_of(document: dict, case: Case) -> list[dict]:
    return [row for row in document["rows"] if case_of(row) == case]


def is_ours(variant: str) -> bool:
    return variant.startswith("retro_kernels") and not is_baseline(variant)


def is_baseline(variant: str) -> bool:
    """Ours without the case's option, timed beside it to tell what the option costs."""
    return variant.endswith(" without")
