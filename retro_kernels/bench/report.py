"""Turns raw results into a report page, tables, and the README's table.

python -m retro_kernels.bench.report RESULTS --out DIR     write report.html and table.md of a bench.json or of a table
python -m retro_kernels.bench.report RESULTS --add         make it benchmarks/results/<device>.csv, to be committed
python -m retro_kernels.bench.report --readme              rewrite from the committed tables: results/<device>.md, and
                                                           README.md and docs/projections.md between their marks
python -m retro_kernels.bench.report --check               fail when a page or README.md is not what the tables say
"""

from __future__ import annotations

import argparse
import html
import subprocess
import sys
from pathlib import Path

from . import results, tables

REPOSITORY = Path(__file__).resolve().parents[2]

STYLE = """
:root { color-scheme: light dark; --line: #d5d9de; --soft: #f4f6f8; --accent: #c7401b; --dim: #5c6670; }
@media (prefers-color-scheme: dark) { :root { --line: #3a424b; --soft: #1f252b; --accent: #ff8a65; --dim: #9aa5b1; } }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em; }
@media (prefers-color-scheme: dark) { body { background: #14181c; color: #e4e8ec; } }
h1 { font-size: 1.6em; margin-bottom: 0.2em; } h2 { font-size: 1.2em; margin-top: 2em; }
p.dim, .dim { color: var(--dim); } .warn { color: var(--accent); font-weight: 600; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: 13px; }
th, td { border-bottom: 1px solid var(--line); padding: 3px 9px; text-align: left; vertical-align: top; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
th { background: var(--soft); } tr.ours td { color: var(--accent); font-weight: 600; }
svg { max-width: 100%; height: auto; display: block; margin: 0.6em 0 1.4em; font-family: system-ui, sans-serif; }
details { margin: 0.4em 0; } summary { cursor: pointer; } code { font-size: 0.92em; }
"""


def markdown(document: dict) -> str:
    """The tables of one run in Markdown, with the device, versions and limits they hold for."""
    lines = [*_heading(document), *_sections(document, tables.sections(document))]
    report = document.get("real_text")
    cells = tables.real_text_cells(document)
    if report and cells:
        lines += [
            f"{report['model']} ({report['parameters']:,} parameters) on real text, {report['length']} tokens (bf16: "
            f"autocast), as it is and after `rk.swap`, which replaced {report['swapped']}; logits, loss and all "
            "gradients compared first:",
            "",
            *_markdown_table(tables.REAL_TEXT_HEAD, cells, left=2),
            "",
        ]
    return "\n".join(lines).rstrip() + "\n"


def readme_markdown(document: dict) -> str:
    """The table that the README shows of one run, and where the rest is."""
    slug = document["environment"]["device_slug"]
    lines = [
        *_heading(document),
        *_markdown_table(tables.README_HEAD, tables.readme_cells(document), left=3),
        "",
        f"[benchmarks/results/{slug}.md](benchmarks/results/{slug}.md) has every table of this run, "
        f"[{slug}.csv](benchmarks/results/{slug}.csv) every variant.",
    ]
    return "\n".join(lines).rstrip() + "\n"


def _heading(document: dict) -> list[str]:
    environment = document["environment"]
    return [
        f"**{environment['device']}**, "
        + ", ".join(f"{name} {version}" for name, version in environment["packages"].items() if name in _NAMED)
        + f", commit {environment['commit'] or 'unknown'}, {environment['date']}. {_ceilings(document)}",
        "",
        *(line for note in document.get("notes", []) for line in (f"Note: {note}", "")),
    ]


def _sections(document: dict, sections) -> list[str]:
    """Their tables, remarks and legends."""
    lines = []
    for number, (title, rows) in enumerate(sections):
        head, cells, left = tables.section_cells(document, rows)
        lines += [f"{title}:", "", *_markdown_table(head, cells, left), ""]
        lines += [f"{text}\n" for text in [tables.remark(rows)] if text]
        following = sections[number + 1][1] if number + 1 < len(sections) else None
        if following is None or tables.legend(following) != tables.legend(rows):
            lines += [tables.legend(rows), ""]
    return lines


_NAMED = ("torch", "triton", "retro_kernels", "retro-pytorch", "faiss-cpu")


def _ceilings(document: dict) -> str:
    ceilings = document["ceilings"]
    if not ceilings:
        return ""
    rates = ", ".join(f"{name} {value / 1e9:,.0f}" for name, value in ceilings["matrix_flops_per_second"].items())
    return f"Measured limits: copy {ceilings['copy_bytes_per_second'] / 1e9:,.0f} GB/s; multiply-add {rates} GFLOP/s."


def _markdown_table(head, cells, left: int) -> list[str]:
    rule = ["---" if i < left else "---:" for i in range(len(head))]
    return ["| " + " | ".join(row) + " |" for row in (head, rule, *cells)]


def page(document: dict) -> str:
    """The self-contained report: everything inline, nothing fetched."""
    environment = document["environment"]
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8>",
        '<meta name=viewport content="width=device-width, initial-scale=1">',
        f"<title>retro_kernels benchmark, {_text(environment['device'])}</title><style>{STYLE}</style>",
        "<h1>RETRO's attentions: retro_kernels against the alternatives</h1>",
        f"<p class=dim>{_text(environment['device'])} · {_text(environment['date'])} · commit "
        f"{_text(environment['commit'] or 'unknown')} · {_text(_ceilings(document))}</p>",
    ]
    parts += [f"<p class=warn>{_text(note)}</p>" for note in document.get("notes", [])]
    if document["interrupted"]:
        parts.append("<p class=warn>This run was interrupted: what follows is what it had finished.</p>")
    if any(row["variant"] == "retro_kernels[reference]" for row in document["rows"]):
        parts.append(
            "<p class=warn>No fused backend ran here: retro_kernels[reference] is the specification, not a kernel. "
            "<code>retro-kernels doctor</code> tells why.</p>"
        )
    for number, (title, rows) in enumerate(tables.sections(document)):
        head, cells, left = tables.section_cells(document, rows)
        plain = [[cell.strip("*") for cell in row] for row in cells]
        parts += [f"<h2>{_text(title)}</h2>", _table(head, plain, left=left)]
        parts += [f"<p>{_text(text)}</p>" for text in [tables.remark(rows)] if text]
        shown = tables.legend(rows)
        parts += [f"<p class=dim>{_text(shown)}</p>"] if number == 0 or shown != tables.SUMMARY_LEGEND else []
        parts += _figures(document, rows, unfolded=number == 0)
    parts += _real_text(document)
    if document["rows"]:
        parts += ["<h2>Position on the roofline</h2>", *_plot("roofline", document)]
    parts += _details(document)
    missing = tables.not_timed(document)
    parts.append("<h2>Not timed, and why</h2>")
    parts.append(_table(("what", "why"), [list(entry) for entry in missing], left=2) if missing else "<p>Nothing.</p>")
    if document.get("checks"):
        found = [[entry["check"], entry["status"], entry["detail"]] for entry in document["checks"]]
        parts += ["<h2>Checks</h2>", _table(("check", "status", "found"), found, left=3)]
    if document["parts"]:
        found = [[p["name"], p["status"], f"{p['seconds']:.0f}", p.get("detail") or ""] for p in document["parts"]]
        parts += ["<h2>Parts of the run</h2>", _table(("part", "status", "seconds", "detail"), found, left=2)]
    parts.append("<h2>Environment</h2>" + _table(("", ""), _flat(environment) + _flat(document["settings"]), left=2))
    return "\n".join(parts) + "\n"


def _real_text(document: dict) -> list[str]:
    report = document.get("real_text")
    if not report:
        return []
    parts = [
        "<h2>A real RETRO on real text</h2>",
        f"<p>{_text(report['model'])}, {report['parameters']:,} parameters, {report['length']} tokens, batch 1. "
        f"<b>rk.swap replaced:</b> {_text(report['swapped'])}. "
        + " ".join(
            f"<b>{_text(name.capitalize())}:</b> {_text(value)}." for name, value in report["description"].items()
        )
        + "</p>",
    ]
    rows = [
        [
            c["dtype"],
            "yes" if c["passed"] else "NO",
            c["rule"],
            c["worst"],
            str(c["tensors"]),
            f"{c['loss_original']:.6f}",
            f"{c['loss_swapped']:.6f}",
        ]
        for c in report["comparisons"]
    ]
    head = ("precision", "same?", "rule", "worst tensor", "tensors", "loss", "loss with rk.swap")
    parts.append(_table(head, rows, left=4))
    cells = tables.real_text_cells(document)
    if cells:
        parts += [_table(tables.REAL_TEXT_HEAD, cells, left=2), *_plot("swap", document)]
    parts += [f"<p class=dim>{_text(note)}.</p>" for note in report["notes"]]
    if report.get("retrieval"):
        rows = [[entry["what"], f"{entry['rate']:,.0f} {entry['unit']}"] for entry in report["retrieval"]]
        parts += ["<h2>Its retrieval database</h2>", _table(("", "speed"), rows, left=1)]
    if report["swap"]:
        parts.append(f"<details><summary>What rk.swap said</summary><pre>{_text(report['swap'])}</pre></details>")
    return parts


def _figures(document: dict, rows: list[dict], unfolded: bool) -> list[str]:
    """Speed and memory of one section, folded away but for the first."""
    state = " open" if unfolded else ""
    speed, memory = _plot("speed", document, rows), _plot("memory", document, rows)
    return [
        f"<details{state}><summary>Speed against the alternatives</summary>",
        *speed,
        "</details>",
        "<details><summary>Peak memory</summary>",
        *memory,
        "</details>",
    ]


def _plot(name: str, *arguments) -> list[str]:
    try:
        from . import plots

        return getattr(plots, name)(*arguments)
    except ImportError as error:
        return [f"<p class=warn>No figure: {_text(str(error))}. pip install 'retro_kernels[bench]'</p>"]


def _details(document: dict) -> list[str]:
    parts = ["<h2>Every variant</h2>"] if document["rows"] else []
    head = (
        "variant",
        "p20 ms",
        "p50 ms",
        "p80 ms",
        "wall ms",
        "samples",
        "GFLOP/s",
        "GB/s",
        "of the limit",
        "memory MB",
        "errors",
    )
    for case in results.cases(document):
        rows, ours = [], []
        for row in results.rows_of(document, case):
            if row["status"] != "ok":
                continue
            ours.append(results.is_ours(row["variant"]))
            errors = ", ".join(f"{error['name']} {float(error['relative']):.0e}" for error in row["errors"])
            rows.append(
                [
                    row["variant"],
                    *(f"{row[key]:.3f}" for key in ("p20_ms", "p50_ms", "p80_ms")),
                    f"{row['wall_ms']:.3f}" if row.get("wall_ms") else "-",
                    str(row["samples"]),
                    f"{row['tflops'] * 1e3:,.0f}",
                    f"{row['gigabytes_per_second']:,.1f}",
                    f"{tables.percent(row)} ({row['bound']})",
                    tables.megabytes(row),
                    errors,
                ]
            )
        shape = results.rows_of(document, case)[0]["shape"]
        parts.append(
            f"<details><summary>{_text(' · '.join(case))} <span class=dim>{_text(shape)}</span></summary>"
            f"{_table(head, rows, left=1, highlighted=ours)}</details>"
        )
    return parts


def _table(head, rows, left: int, highlighted: list[bool] | None = None) -> str:
    def line(cells, tag: str) -> str:
        return "".join(
            f"<{tag}{'' if i < left or head[i] == 'errors' else ' class=number'}>{_text(cell)}</{tag}>"
            for i, cell in enumerate(cells)
        )

    body = "".join(
        f"<tr{' class=ours' if highlighted and highlighted[i] else ''}>{line(row, 'td')}</tr>"
        for i, row in enumerate(rows)
    )
    header = f"<tr>{line(head, 'th')}</tr>" if any(head) else ""
    return f"<div class=wide><table>{header}{body}</table></div>"


def _flat(values: dict) -> list[list[str]]:
    rows = []
    for name, value in values.items():
        if isinstance(value, dict):
            value = ", ".join(f"{key} {entry}" for key, entry in value.items())
        elif isinstance(value, list):
            value = ", ".join(map(str, value))
        rows.append([name.replace("_", " "), str(value) if value not in (None, "") else "-"])
    return rows


def _text(value) -> str:
    return html.escape(str(value))


def write(document: dict, folder: Path) -> list[Path]:
    """bench.json, report.html and table.md; returns their paths."""
    document = results.finite(document)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / results.FILE, folder / "report.html", folder / "table.md"]
    results.save(document, paths[0])
    paths[1].write_text(page(document))
    paths[2].write_text(markdown(document))
    return paths


def readme_block(folder: Path) -> str:
    """The text between the marks: the README's table of every committed device."""
    documents = [results.load(path) for path in results.committed(folder)]
    if not documents:
        return "No results are committed yet.\n"
    return "\n".join([*map(readme_markdown, documents), tables.README_LEGEND, ""])


def pages(root: Path) -> dict[Path, str]:
    """The pages that are generated of the committed tables: one a device, and README.md."""
    folder, readme = root / "benchmarks" / "results", root / "README.md"
    found = {path.with_suffix(".md"): markdown(results.load(path)) for path in results.committed(folder)}
    return found | {readme: replace_block(readme.read_text(), readme_block(folder))}


def replace_block(text: str, block: str, *, name: str = "results", file: str = "README.md") -> str:
    """The file's text with the block between the marks of that name. Raises ValueError when they are not there once, in
    order."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"{file}: expected one {begin} and after it one {end}")
    before, after = text.split(begin)[0], text.split(end)[1]
    return f"{before}{begin}\n{block.rstrip()}\n{end}{after}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="retro_kernels.bench.report", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("results", nargs="?", type=Path, help="a bench.json, or a table of benchmarks/results")
    parser.add_argument("--add", action="store_true", help="make the results a table in benchmarks/results")
    parser.add_argument("--out", type=Path, help="folder for the report (default: beside the results)")
    parser.add_argument("--readme", action="store_true", help="rewrite the pages and the README's tables")
    parser.add_argument("--check", action="store_true", help="exit 1 when one of them is stale")
    parser.add_argument("--root", type=Path, default=REPOSITORY, help="the repository (default: this one)")
    options = parser.parse_args(arguments)
    if options.results is None and not (options.readme or options.check):
        parser.error("give raw results, --readme or --check")
    try:
        if options.results and options.add:
            document = results.load(options.results)
            name = f"{document['environment']['device_slug']}.csv"
            results.save(document, options.root / "benchmarks" / "results" / name)
            print(f"benchmarks/results/{name}: now run `python -m retro_kernels.bench.report --readme`")
        elif options.results:
            for path in write(results.load(options.results), options.out or options.results.parent):
                print(path)
        if options.readme or options.check:
            stale = {
                path: text
                for path, text in pages(options.root).items()
                if not path.exists() or path.read_text() != text
            }
            if options.check and stale:
                names = ", ".join(str(path.relative_to(options.root)) for path in stale)
                print(f"{names}: not what the results say; run `python -m retro_kernels.bench.report --readme`")
                return 1
            for path, text in stale.items():
                path.write_text(text)
            drawing = options.root / "docs" / "projections.py"
            if options.readme and drawing.exists():
                subprocess.run([sys.executable, str(drawing)], check=True)
    except (OSError, ValueError, subprocess.CalledProcessError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
