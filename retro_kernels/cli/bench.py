"""`retro-kernels bench`: times RETRO's fused attentions against the real alternatives on this machine."""

from __future__ import annotations

import importlib
import json
import time
import warnings
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import typer

FOLDER = "bench-report"


def load(name: str) -> ModuleType:
    """A module of the benchmark suite, loaded when it is needed: it imports torch."""
    return importlib.import_module(f"retro_kernels.bench.{name}")


def bench(
    quick: Annotated[
        bool, typer.Option("--quick", help="One workload an operation and a short text: under 3 minutes on 2 cores.")
    ] = False,
    out: Annotated[Path, typer.Option(help="Folder for report.html, table.md and the raw bench.json.")] = Path(FOLDER),
    operation: Annotated[
        list[str] | None,
        typer.Option(
            help="'cca', 'encoder-self', 'encoder-cross', 'causal-self', 'cca-projected' (with both strategies of its "
            "projections), 'cca-layer', 'cca-decode' or 'decoder-step'; may be repeated. Default: all."
        ),
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(help="'plain', 'relative', 'dropout' or 'retrieval' (a decoder step); may be repeated."),
    ] = None,
    workload: Annotated[
        list[str] | None,
        typer.Option(help="A workload by name, of the operations that have it; may be repeated. Default: all of them."),
    ] = None,
    dtype: Annotated[
        list[str] | None, typer.Option(help="fp32, bf16 or (on a GPU) fp16; may be repeated. Default: fp32 and bf16.")
    ] = None,
    mode: Annotated[
        list[str] | None, typer.Option(help="'forward' or 'forward+backward'; may be repeated. Default: both.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="'cpu' or 'cuda'. Default: the GPU if there is one.")] = None,
    backend: Annotated[
        list[str] | None, typer.Option(help="A backend of retro_kernels; may be repeated. Default: all fused ones.")
    ] = None,
    compiled: Annotated[
        bool, typer.Option("--compile/--no-compile", help="Whether to time torch.compile and FlexAttention.")
    ] = True,
    real_text: Annotated[
        bool, typer.Option("--real-text/--no-real-text", help="Whether to run a retro-pytorch model on real text.")
    ] = True,
    seconds: Annotated[
        float | None, typer.Option(help="Seconds of timing a case, all variants together. Default: 8 (quick: 2).")
    ] = None,
    minutes: Annotated[
        float | None, typer.Option(help="Start no new measurement after so many minutes (quick: 2.65).")
    ] = None,
    text_length: Annotated[
        int | None, typer.Option(help="Tokens of real text, at most 2048. Default: 2048 (quick, on a CPU: 256).")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the raw results instead of the table.")] = False,
) -> None:
    """Times the fused attentions against eager code, folded SDPA, torch.compile and FlexAttention.

    With --quick a few lines say how much faster they are; without, every table is printed too. The report has both,
    and what was not timed, with the reasons.

    Chunked cross-attention, the neighbour encoder's self- and cross-attention and a decoder's causal self-attention,
    each plain, with the paper's relative positions and with dropout; chunked cross-attention with its projections, the
    whole layer, decoding, and a decoder step with retrieval on and off.

    Every result is checked against an fp64 reference before it is timed. A retro-pytorch model then runs on real text
    with and without rk.swap. Writes a report page, a table and the raw numbers. Ctrl-C writes what is there. Compile
    time is capped and not counted.
    """
    from rich.console import Console

    console = Console(stderr=as_json)
    if not console.is_terminal:
        console = Console(stderr=as_json, width=120)
    try:
        driver = load("bench")
    except ImportError as error:
        console.print(f"The benchmark suite cannot be imported: {error}", style="red", markup=False)
        raise typer.Exit(2) from error
    options = driver.Options(
        quick=quick,
        operations=operation or [],
        options=option or [],
        workloads=workload or [],
        dtypes=dtype or [],
        modes=mode or [],
        device=device,
        compiled=compiled,
        real_text=real_text,
        backends=backend,
        seconds=seconds,
        minutes=minutes,
        text_length=text_length,
    )
    try:
        options.resolved()
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the report says what each warning would: what ran, and what could not
        document = _run(driver, options, console)
    paths = driver.write(document, out)
    if as_json:
        typer.echo(json.dumps(load("results").finite(document), default=str))
    else:
        (show_speedups if quick else show_tables)(document, console)
        show_end(document, paths, console)
    wrong = [
        row for row in document["rows"] if row["status"] in ("wrong", "failed") and "retro_kernels" in row["variant"]
    ]
    raise typer.Exit(130 if document["interrupted"] else 1 if wrong else 0)


def _run(driver: ModuleType, options: Any, console: Any) -> dict:
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    class Shown(driver.Progress):  # type: ignore[name-defined, misc]
        current = ""

        def case(self, text: str) -> None:
            self.current = text
            bar.update(task, description=text)
            if not console.is_terminal:
                console.print(f"[{time.strftime('%X')}] {text}", highlight=False, markup=False)

        def step(self, text: str) -> None:
            bar.update(task, description=f"{self.current}: {text}")

        def row(self, row: Any) -> None:
            if row.status in ("wrong", "failed"):
                case = f"{row.operation} {row.option} {row.workload} {row.dtype} {row.mode}"
                console.print(f"{case} {row.variant}: {row.status}: {row.reason}", style="red", markup=False)

    columns = (SpinnerColumn(), TimeElapsedColumn(), TextColumn("{task.description}", markup=False))
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("starting", total=None)
        return driver.run(options, Shown())


def show_speedups(document: dict, console: Any) -> None:
    """Prints a line an operation: how many times faster it is than the fastest alternative."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    tables = load("tables")
    head, cells = tables.speedup_cells(document)
    if not cells:
        return
    title = f"How many times faster than the fastest alternative, {document['environment']['device']}"
    shown = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        padding=(0, 2, 0, 0),
        show_edge=False,
    )
    for i, name in enumerate(head):
        shown.add_column(name, justify="left" if i < 2 or i == len(head) - 1 else "right", no_wrap=True)
    for row in cells:
        shown.add_row(*map(Text, row))
    console.print(shown)
    console.print(tables.SPEEDUP_LEGEND, style="dim", highlight=False, markup=False)


def show_end(document: dict, paths: list[Path], console: Any) -> None:
    """Whether a swapped model computes the same, and where everything stands."""
    report = document["real_text"]
    for comparison in report["comparisons"] if report else []:
        verdict = "the same" if comparison["passed"] else f"NOT the same ({comparison['worst']})"
        console.print(
            f"rk.swap of {report['model']} on real text, {comparison['dtype']}: logits, loss and "
            f"{comparison['tensors'] - 2} gradients are {verdict}.",
            style="green" if comparison["passed"] else "red",
            highlight=False,
            markup=False,
        )
    missing = len(load("tables").not_timed(document))
    page, *others = sorted(paths, key=lambda path: path.suffix != ".html")
    what = f"tables, plots, and why {missing} things were not timed" if missing else "tables and plots"
    console.print(
        f"{page}: {what}. Beside it: {', '.join(path.name for path in others)}. {document['seconds']:.0f} s.",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    if document["interrupted"]:
        console.print("Interrupted: this is what was finished.", style="bold yellow")


def show_tables(document: dict, console: Any) -> None:
    """A table a section, and the real-text part under them."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    tables = load("tables")
    environment = document["environment"]

    def table(title: str, head: Any, cells: list[list[str]], left: int) -> None:
        if console.width < 90:  # what a narrow terminal can spare; the report has everything
            spared = ("comp. ms", "eager ms", "MB", "SDPA MB")
            kept = [i for i, name in enumerate(head) if name not in spared]
            head, cells = [head[i] for i in kept], [[row[i] for i in kept] for row in cells]
        shown = Table(
            title=title,
            title_justify="left",
            title_style="bold",
            box=box.SIMPLE_HEAD,
            padding=(0, 1, 0, 0),
            show_edge=False,
        )
        for i, name in enumerate(head):
            shown.add_column(name.replace(" ", "\n"), justify="left" if i < left else "right", no_wrap=True)
        for row in cells:
            shown.add_row(*map(Text, row))
        console.print(shown)

    for title, rows in tables.sections(document):
        head, cells, left = tables.section_cells(document, rows)
        table(f"{title}, {environment['device']}", head, [[cell.strip("*") for cell in row] for row in cells], left)
        if tables.remark(rows):
            console.print(tables.remark(rows), highlight=False, markup=False)
        console.print()
    for text in dict.fromkeys(tables.legend(rows) for _, rows in tables.sections(document)):
        console.print(text, style="dim", highlight=False, markup=False)
        console.print()
    report = document["real_text"]
    if report:
        console.print(f"rk.swap replaced: {report['swapped']}", style="dim", highlight=False, markup=False)
        for line in (f"{name}: {value}" for name, value in report["description"].items()):
            console.print(line, style="dim", highlight=False, markup=False)
        for note in report["notes"]:
            console.print(note, style="dim", highlight=False, markup=False)
        cells = tables.real_text_cells(document)
        if cells:
            title = f"{report['model']}, {report['parameters']:,} parameters, {report['length']} tokens of real text"
            table(title, tables.REAL_TEXT_HEAD, cells, left=2)
