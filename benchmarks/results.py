"""The raw results: one JSON document a run, written whole or not at all, and what is derived from it for tables."""

from __future__ import annotations

import json
import os
from pathlib import Path

from .workloads import OPERATIONS, OPTIONS, PLAIN

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
    """Writes to a temporary name beside `path` and renames: a reader never sees half a document."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(json.dumps(document, indent=1, allow_nan=False, default=_plain) + "\n")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load(path: Path) -> dict:
    """Raises ValueError when the file is not a result of this schema."""
    document = json.loads(path.read_text())
    if not isinstance(document, dict) or document.get("schema") != SCHEMA:
        found = document.get("schema") if isinstance(document, dict) else type(document).__name__
        raise ValueError(f"{path}: got schema {found}, expected {SCHEMA}: run `retro-kernels bench` again")
    return document


def _plain(value):
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} is no JSON value")


def finite(value):
    """The same with NaN and infinity as text, which JSON has no number for."""
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


def sections(document: dict) -> list[tuple[str, list[dict]]]:
    """(title, rows): one section an operation without options, then one for each option."""
    plain = [(title, [row for row in document["rows"] if (row["operation"], row["option"]) == (operation, PLAIN)])
             for operation, title in OPERATIONS.items()]  # fmt: skip
    others = [(f"With {text}", [row for row in document["rows"] if row["option"] == option])
              for option, text in OPTIONS.items() if option != PLAIN]  # fmt: skip
    return [(title, rows) for title, rows in plain + others if rows]


def summary(document: dict, rows: list[dict] | None = None) -> list[dict]:
    """One entry a case (of these rows): retro_kernels, the same without the option, eager, and the fastest of each
    family of alternatives; None where there is no checked time."""

    def fastest(rows: list[dict], *prefixes: str) -> dict | None:
        timed = [row for row in rows if row["status"] == "ok" and row["variant"].startswith(prefixes)]
        return min(timed, key=lambda row: row["p50_ms"], default=None)

    result = []
    grouped: dict[Case, list[dict]] = {}
    for row in document["rows"] if rows is None else rows:
        grouped.setdefault(case_of(row), []).append(row)
    for (operation, option, workload, dtype, mode), found in grouped.items():
        own = [row for row in found if is_ours(row["variant"])]
        ours = fastest([row for row in own if row["variant"] != "retro_kernels[reference]"], "retro_kernels")
        ours = ours or fastest(own, "retro_kernels")
        result.append(
            {
                "operation": operation,
                "option": option,
                "workload": workload,
                "dtype": dtype,
                "mode": mode,
                "ours": ours,
                "without": fastest([row for row in found if is_baseline(row["variant"])], "retro_kernels"),
                "eager": fastest(found, "eager"),
                "sdpa": fastest(found, "sdpa"),
                "compiled": fastest(found, "compile", "flex"),
            }
        )
    return result


def ratio(other: dict | None, ours: dict | None) -> float | None:
    """How many times faster ours is."""
    return other["p50_ms"] / ours["p50_ms"] if other and ours else None


def real_text_pairs(document: dict) -> list[dict]:
    """(dtype, stage) with both variants' rows, original and swapped."""
    report = document.get("real_text")
    if not report or "rows" not in report:
        return []
    pairs: dict[tuple[str, str], dict] = {}
    for row in report["rows"]:
        entry = pairs.setdefault((row["dtype"], row["stage"]), {"dtype": row["dtype"], "stage": row["stage"]})
        entry["swapped" if "rk.swap" in row["variant"] else "original"] = row
    # One round is no measurement: a pause of the machine would stand there as a fact about the code.
    return [pair for pair in pairs.values() if len(pair) == 4 and pair["swapped"]["samples"] > 1]


# Text of numbers: three significant digits, units in the column heads.


def milliseconds(row: dict | None) -> str:
    return "-" if row is None else digits(row["p50_ms"])


def times(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}x"


def megabytes(row: dict | None) -> str:
    value = row.get("peak_extra_bytes") if row else None
    return "-" if value is None else digits(value / 1e6)


def percent(row: dict | None) -> str:
    value = row.get("percent_of_limit") if row else None
    return "-" if value is None else f"{value:.0f}%"


def digits(value: float) -> str:
    """Three significant digits."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}" if value >= 0.1 else f"{value:.3g}"


SUMMARY_HEAD = (
    "workload", "dtype", "mode", "ours ms", "SDPA ms", "comp. ms", "eager ms", "vs SDPA", "vs comp.", "vs eager",
    "limit", "MB", "SDPA MB",
)  # fmt: skip
OPTION_HEAD = (
    "operation", "workload", "dtype", "mode", "ours ms", "without", "costs", "SDPA ms", "comp. ms", "eager ms",
    "vs SDPA", "vs comp.", "vs eager", "limit", "MB", "SDPA MB",
)  # fmt: skip
SUMMARY_LEGEND = (
    "Medians of interleaved rounds; every timed result was checked against an fp64 reference in the same run. "
    "Ours: retro_kernels. SDPA: the fastest way of using scaled_dot_product_attention (every backend, on folded "
    "tensors; relative positions as a materialised bias); comp.: the fastest of torch.compile and FlexAttention; "
    "eager: retro-pytorch's way, with relative positions Transformer-XL's. vs: how many times faster ours is. without: "
    "ours without the option, in the same rounds; costs: how much longer the option takes. Limit: the least time that "
    "the measured copy bandwidth and multiply-add rate allow, as a share of our time. MB: most memory alive beyond the "
    "inputs, results included."
)


def section_cells(document: dict, rows: list[dict]) -> tuple[tuple[str, ...], list[list[str]], int]:
    """One section's table: its head, its cells as text (one row a case), and how many columns are words."""
    entries = summary(document, rows)
    plain = all(entry["option"] == PLAIN for entry in entries)
    cells = []
    for entry in entries:
        ours, sdpa, compiled, eager = (entry[name] for name in ("ours", "sdpa", "compiled", "eager"))
        without = [] if plain else [milliseconds(entry["without"]), cost(entry)]
        cells.append(
            [
                *([] if plain else [entry["operation"]]), entry["workload"], entry["dtype"],
                entry["mode"].replace("forward", "fwd").replace("backward", "bwd"), milliseconds(ours), *without,
                *(milliseconds(row) for row in (sdpa, compiled, eager)),
                *(times(ratio(row, ours)) for row in (sdpa, compiled, eager)),
                percent(ours), megabytes(ours), megabytes(sdpa),
            ]
        )  # fmt: skip
    return (SUMMARY_HEAD, cells, 3) if plain else (OPTION_HEAD, cells, 4)


def cost(entry: dict) -> str:
    """How much longer ours takes with the case's option, in percent."""
    value = ratio(entry["ours"], entry["without"])
    return "-" if value is None else f"{100 * (value - 1):+.0f}%"


REAL_TEXT_HEAD = ("dtype", "what", "unswapped ms", "swapped ms", "faster", "rounds", "MB", "swapped MB")


def real_text_cells(document: dict) -> list[list[str]]:
    return [
        [
            pair["dtype"],
            pair["stage"].replace("forward+backward", "fwd+bwd"),
            milliseconds(pair["original"]),
            milliseconds(pair["swapped"]),
            times(ratio(pair["original"], pair["swapped"])),
            str(pair["swapped"]["samples"]),
            megabytes(pair["original"]),
            megabytes(pair["swapped"]),
        ]
        for pair in real_text_pairs(document)
    ]


def _places(where: list[str]) -> str:
    """Cases, those that differ in dtype and mode only named once."""
    short: dict[str, list[str]] = {}
    for what in where:
        operation, option, workload, *case = what.split()
        short.setdefault(f"{operation} {option} {workload}", []).append(" ".join(case))
    return "; ".join(f"{place}: {', '.join(found)}" for place, found in short.items())


def not_timed(document: dict) -> list[tuple[str, str]]:
    """(what, why) of everything that has no time: variants grouped by reason, then whole parts."""
    grouped: dict[tuple[str, str, str], list[str]] = {}
    for row in document["rows"]:
        if row["status"] != "ok":
            what = " ".join(case_of(row))
            grouped.setdefault((row["variant"], row["status"], row["reason"] or ""), []).append(what)
    total = len(cases(document))
    entries = []
    for (variant, status, reason), where in grouped.items():
        place = "everywhere" if len(where) == total else _places(where)
        entries.append((f"{variant} ({place})", reason if status == "skipped" else f"{status}: {reason}"))
    text = document.get("real_text") or {}
    single = dict.fromkeys(f"{row['dtype']} {row['stage']}" for row in text.get("rows", []) if row["samples"] < 2)
    entries += [(f"real text, {what}", "one round only fitted into this run: not shown") for what in single]
    for note in (document.get("real_text") or {}).get("notes", []):
        if "was not timed" in note or "no time" in note:
            entries.append(("real text", note))
    return entries + [(entry["what"], entry["reason"]) for entry in document["skipped"]]
