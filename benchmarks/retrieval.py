"""The tables of docs/retrieval.md, made of the raw results of `retrieval_build`, `retrieval_gather` and
`retrieval_search`.

python -m benchmarks.retrieval            rewrite what is between the marks in docs/retrieval.md
python -m benchmarks.retrieval --check    exit 1 where it is not what the results say
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path

from retro_kernels.bench import report

ROOT = Path(__file__).resolve().parent.parent


def span(values: list[float], unit: str, digits: int = 0) -> str:
    """One number, or the least and the largest of several."""
    low, high = f"{min(values):,.{digits}f}", f"{max(values):,.{digits}f}"
    return f"{low} {unit}" if low == high else f"{low} to {high} {unit}"


def build_rows(folder: Path) -> list[tuple[str, str]]:
    path = folder / "retrieval-build.json"
    if not path.exists():
        return []
    groups: dict[tuple, list[dict]] = {}
    for row in json.loads(path.read_text())["rows"]:
        embedded = "seconds_embedder_alone" in row
        groups.setdefault((not embedded, row["chunks"], row["every"]), []).append(row)
    found = []
    for (given, chunks, _), rows in sorted(groups.items()):
        megabytes = rows[0]["text_bytes"] / 1e6
        of = f"{rows[0]['files']:,} files, {megabytes:,.1f} MB, {chunks:,} chunks"
        runs = "" if len(rows) == 1 else f", {len(rows)} runs"
        peak = f"peak memory {max(row['peak_bytes'] for row in rows) / 1e9:.2f} GB"
        speed = span([row["chunks_per_second"] for row in rows], "chunks/s")
        if given:
            rate = span([row["megabytes_per_minute"] for row in rows], "MB of text a minute")
            found.append((f"{of}, embeddings given{runs}", f"{rate}, {speed}, {peak}"))
        else:
            share = statistics.median(row["share_of_embedder"] for row in rows)
            found.append((f"{of}, default embedder{runs}", f"{speed}, {share:.0%} of the embedder's own; {peak}"))
    return found


def gather_rows(folder: Path) -> list[tuple[str, str]]:
    path = folder / "retrieval-gather.json"
    if not path.exists():
        return []
    found = []
    for row in json.loads(path.read_text())["rows"]:
        place = {"cpu": "from page cache", "cuda": "in GPU memory"}[row["store"]] + ", pinned" * row["pinned"]
        found.append(
            (
                f"gathering {row['rows']:,} random rows of {row['length']} tokens and their masks {place}, of "
                f"{row['chunks']:,} chunks",
                f"{row['rows_per_second'] / 1e6:.1f} M rows/s, {row['chunks_per_second'] / 1e6:.1f} M chunks/s",
            )
        )
    return found


def search_tables(folder: Path) -> str:
    """The tables of searching: a row an index, with the settings that reach at least 0.95, or the best recall."""
    parts = []
    for path in sorted(folder.glob("retrieval-search-*.json")):
        found = json.loads(path.read_text())
        lines = [
            f"Search of {found['chunks']:,} embeddings of {found['dim']} numbers ({found['embedder']['name']}), k = 2, "
            "1,000 queries at once; what each index finds by itself, and what `db evaluate` recommends for a recall of "
            "0.95:",
            "",
            "| index | bytes a key | built in | recall@2 (queries/s) at nprobe 4 / 16 / 64 | recommended | recall@2 | "
            "queries/s |",
            "|---|---:|---:|---|---|---:|---:|",
        ]
        for row in found["rows"]:
            plain = {
                point["settings"]["nprobe"]: f"{point['recall']:.3f} ({point['queries_per_second'] / 1e3:.1f}k)"
                for point in row["points"]
                if not point["settings"]["rerank"]
            }
            best = next(point for point in row["points"] if point["settings"] == row["recommended"])
            settings = ", ".join(f"{name} {value}" for name, value in row["recommended"].items())
            lines.append(
                f"| `{row['spec']}` | {row['bytes'] / found['chunks']:.0f} | {row['build_seconds']:.0f} s | "
                f"{' / '.join(plain.get(n, '-') for n in (4, 16, 64))} | {settings} | {best['recall']:.3f} | "
                f"{best['queries_per_second']:,.0f} |"
            )
        lines.append(f"| exact | - | - | - | - | 1.000 | {found['rows'][0]['exact_queries_per_second']:,.0f} |")
        lines += [
            "",
            "Exact search, milliseconds, ours / FAISS's IndexFlatL2:",
            "",
            "| queries | k = 2 | k = 64 |",
            "|---:|---:|---:|",
        ]
        for batch in sorted({row["batch"] for row in found["exact"]}):
            cells = [
                f"{row['ours_ms']:,.1f} / {row['faiss_ms']:,.1f}" for row in found["exact"] if row["batch"] == batch
            ]
            lines.append(f"| {batch:,} | " + " | ".join(cells) + " |")
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def block(results: Path) -> str:
    """The text between the marks: a table a device."""
    parts = []
    for folder in sorted(path for path in results.iterdir() if path.is_dir()):
        rows = build_rows(folder) + gather_rows(folder)
        if rows:
            lines = ["| | |", "|---|---|", *(f"| {what} | {found} |" for what, found in rows)]
            parts.append(f"On `{folder.name}`:\n\n" + "\n".join(lines) + "\n")
        parts += [text for text in [search_tables(folder)] if text]
    return "\n".join(parts)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.retrieval", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--check", action="store_true", help="exit 1 when the page is stale")
    options = parser.parse_args(arguments)
    page = ROOT / "docs" / "retrieval.md"
    old = page.read_text()
    new = report.replace_block(old, block(ROOT / "benchmarks" / "results"), name="speed", file=page.name)
    if options.check and old != new:
        print(f"{page}: stale; run `python -m benchmarks.retrieval`")
        return 1
    if old != new:
        page.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
