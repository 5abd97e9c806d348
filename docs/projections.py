"""Draws docs/projections.png, the cost model's predictions against the measured times of the committed results, and
rewrites the numbers in docs/projections.md. Run it as `python docs/projections.py [RESULTS]`."""

from __future__ import annotations

import math
import statistics
import sys
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from retro_kernels.bench import results, tables  # noqa: E402
from retro_kernels.bench.operations import PROJECTED  # noqa: E402
from retro_kernels.bench.report import replace_block  # noqa: E402

COLOURS = {"materialise": "#3d85c6", "absorb": "#d1491f"}
MARKERS = {"fp32": "o", "bf16": "s", "fp16": "^"}
BAND = 1.2


def predicted_rows(document: dict) -> list[dict]:
    return [
        row
        for row in document["rows"]
        if row["operation"] == PROJECTED and row["status"] == "ok" and row.get("predicted_ms")
    ]


def times(axes, rows: list[dict]) -> None:
    """Predicted against measured, on logarithmic axes."""
    values = [row[key] for row in rows for key in ("predicted_ms", "p50_ms")]
    low, high = min(values) / 1.4, max(values) * 1.4
    axes.plot([low, high], [low, high], color="#444444", linewidth=1)
    axes.fill_between(
        [low, high], [low / BAND, high / BAND], [low * BAND, high * BAND], color="#888888", alpha=0.2, lw=0
    )
    for row in rows:
        colour = COLOURS[row["strategy"]]
        face = "none" if row["mode"] == "forward" else colour
        axes.plot(
            row["p50_ms"],
            row["predicted_ms"],
            MARKERS[row["dtype"]],
            markersize=5.5,
            markerfacecolor=face,
            markeredgecolor=colour,
        )
    axes.set(
        xscale="log", yscale="log", xlim=(low, high), ylim=(low, high), xlabel="measured, ms", ylabel="predicted, ms"
    )
    axes.set_title(f"Time of a call (band: {BAND:g} times)", loc="left", fontsize=10)
    axes.grid(alpha=0.25, which="major")
    entries = [(name, "o", colour, colour) for name, colour in COLOURS.items()]
    entries += [(name, MARKERS[name], "#444444", "none") for name in dict.fromkeys(row["dtype"] for row in rows)]
    entries += [("forward", "o", "#444444", "none"), ("forward + backward", "o", "#444444", "#444444")]
    handles = [
        plt.Line2D([], [], linestyle="none", marker=marker, markeredgecolor=edge, markerfacecolor=face, label=name)
        for name, marker, edge, face in entries
    ]
    axes.legend(handles=handles, fontsize=8, frameon=False, loc="upper left")


def ratios(axes, rows: list[dict]) -> None:
    """The time of absorbing over that of making keys and values: measured and predicted, a line a case."""
    pairs = []
    for case, group in tables.grouped(rows).items():
        found = tables.strategies(group)
        if len(found) == 2:
            made, absorbed = found["materialise"], found["absorb"]
            measured = absorbed["p50_ms"] / made["p50_ms"]
            predicted = absorbed["predicted_ms"] / made["predicted_ms"]
            chosen = "absorb" if absorbed["chosen"] else "materialise"
            mode = case[4].replace("forward", "fwd").replace("backward", "bwd")
            pairs.append((measured, predicted, chosen, f"{case[2]} {case[3]} {mode}"))
    for place, (measured, predicted, chosen, _) in enumerate(sorted(pairs)):
        axes.plot([measured, predicted], [place, place], color="#999999", linewidth=1)
        axes.plot(measured, place, "o", color=COLOURS[chosen], markersize=5.5)
        axes.plot(predicted, place, "|", color="#222222", markersize=8)
    axes.axvline(1.0, color="#444444", linewidth=1)
    axes.set_yticks(range(len(pairs)), [name for *_, name in sorted(pairs)], fontsize=7.5)
    axes.set(xscale="log", xlabel="time of absorb / time of materialise")
    axes.set_xticks([0.4, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 4.0], ["0.4", "0.5", "0.7", "1", "1.5", "2", "3", "4"])
    axes.minorticks_off()
    axes.grid(axis="x", alpha=0.25)
    axes.set_title("dot: measured, coloured by auto's choice; bar: predicted", loc="left", fontsize=10)


def sentences(document: dict, rows: list[dict]) -> str:
    """The numbers of the page."""
    environment = document["environment"]
    lines = [
        f"{environment['device']}, commit {environment['commit']}, {environment['date']}: {len(rows)} times of the "
        f"workload table in {len(tables.grouped(rows))} cases (`benchmarks/results/`).",
        "",
        "| strategy | mode | times | median error | largest error |",
        "| --- | --- | ---: | ---: | ---: |",
    ]
    for strategy in COLOURS:
        for mode in dict.fromkeys(row["mode"] for row in rows):
            mine = [row for row in rows if (row["strategy"], row["mode"]) == (strategy, mode)]
            if not mine:
                lines.append(f"| {strategy} | {mode} | none | - | - |")
                continue
            errors = [math.exp(abs(math.log(row["predicted_ms"] / row["p50_ms"]))) - 1 for row in mine]
            lines.append(f"| {strategy} | {mode} | {len(mine)} | {statistics.median(errors):.0%} | {max(errors):.0%} |")
    said = tables.remark(rows)
    return "\n".join([*lines, "", said[0].upper() + said[1:] if said else "Both strategies were timed in no case."])


def main(path: Path) -> None:
    document = results.load(path)
    rows = predicted_rows(document)
    figure, (left, right) = plt.subplots(1, 2, figsize=(11.5, 5.4), layout="constrained", facecolor="white")
    times(left, rows)
    ratios(right, rows)
    figure.savefig(HERE / "projections.png", dpi=100, metadata={"Software": None})
    page = HERE / "projections.md"
    page.write_text(replace_block(page.read_text(), sentences(document, rows)))


if __name__ == "__main__":
    committed = results.committed(HERE.parent / "benchmarks" / "results")
    for path in map(Path, sys.argv[1:]) if len(sys.argv) > 1 else committed:
        if predicted_rows(results.load(path)):
            main(path)
            break
    else:
        print("docs/projections.py: no result has times of both strategies; nothing was drawn", file=sys.stderr)
