"""Errors, progress and text on the terminal, for the commands that read and write folders."""

from __future__ import annotations

import errno
import json
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from retro_kernels.retrieval.build.builder import Progress, Report

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
SECONDS_BETWEEN_LINES = 30.0
UNITS = {
    **dict.fromkeys(("match", "search", "export", "index", "encode"), "chunks"),
    "score": "batches",
    "generate": "prompts",
}
"""What the stages without documents count."""
Folder = Annotated[Path, typer.Argument(help="The database's folder.", show_default=False)]


ADVICE = {
    errno.EROFS: "name a place that can be written",
    errno.EACCES: "ask for the permission, or name another place",
    errno.EPERM: "ask for the permission, or name another place",
    errno.ENOSPC: "what is finished was kept: free space and run the same command again",
    errno.EDQUOT: "what is finished was kept: free space and run the same command again",
    errno.ENOENT: "make it, or name another place",
    errno.ENOTDIR: "a part of the path is a file: name a folder",
}


@contextmanager
def show_errors(*kinds: type[Exception], code: int = 1) -> Iterator[None]:
    """Turns what the user can do something about into a line and the exit code `code`: DatabaseError, ValueError, what
    the operating system refuses (OSError) and these kinds. An interruption (Ctrl-C) ends with 130, as in a shell."""
    from retro_kernels.errors import DatabaseError

    caught: tuple[type[Exception], ...] = (DatabaseError, ValueError, *kinds)
    try:
        yield
    except BrokenPipeError:  # whoever read the output has gone: typer ends in silence
        raise
    except caught as error:
        typer.echo(f"error: {printable(str(error))}", err=True)
        raise typer.Exit(code) from None
    except OSError as error:
        typer.echo(f"error: {printable(refusal(error))}", err=True)
        raise typer.Exit(code) from None
    except KeyboardInterrupt:
        typer.echo("interrupted: what is finished was kept, the same command goes on", err=True)
        raise typer.Exit(130) from None


def refusal(error: OSError) -> str:
    """What the operating system refused, of which file, and what to do about it."""
    if error.strerror is None:
        return str(error)
    names = [os.fsdecode(name) for name in (error.filename, error.filename2) if isinstance(name, (str, bytes))]
    where = f"{' -> '.join(names)}: " if names else ""
    advice = ADVICE.get(error.errno or 0)
    return f"{where}{error.strerror}" + (f": {advice}" if advice else "")


def printable(text: str) -> str:
    """`text` with its control characters written out (as \\x1b): what stands in a corpus or in a file's name must not
    command the terminal. Lines and tabs stay."""
    return CONTROL.sub(lambda found: found[0].encode("unicode_escape", "surrogatepass").decode(), text)


def say(text: str) -> None:
    """Prints `printable` text."""
    typer.echo(printable(text))


def say_json(value: Any) -> None:
    """Prints JSON, with the control characters that JSON lets pass written as JSON writes them."""
    text = json.dumps(value, indent=1, ensure_ascii=False)
    typer.echo(re.sub("[\x7f-\x9f\ud800-\udfff]", lambda found: f"\\u{ord(found[0]):04x}", text))


@contextmanager
def show_progress() -> Iterator[Report]:
    """A line on the terminal (standard error) that follows the work; in a file or a pipe a line of its own for every
    stage, and every half a minute."""
    from rich.console import Console
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn
    from rich.progress import Progress as Bars

    console = Console(stderr=True)
    if not console.is_terminal:
        yield _lines()
        return
    columns = (
        TextColumn("{task.description:<6}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[facts]}"),
    )
    with Bars(*columns, console=console) as bars:
        tasks: dict[str, object] = {}

        def show(at: Progress) -> None:
            task = tasks.get(at.stage)
            if task is None:
                task = tasks[at.stage] = bars.add_task(at.stage, total=1.0, facts="")
            bars.update(task, completed=at.done, facts=_facts(at))  # type: ignore[arg-type]

        yield show


def _lines() -> Report:
    said: dict[str, float] = {}  # when each stage is due to be said again

    def show(at: Progress) -> None:
        now, due = time.monotonic(), said.get(at.stage, 0.0)
        if now < due and not (at.done >= 1.0 and due < float("inf")):
            return
        said[at.stage] = now + SECONDS_BETWEEN_LINES if at.done < 1.0 else float("inf")
        typer.echo(f"{at.stage}: {at.done:.0%}, {_facts(at)}", err=True)

    return show


def counting(stage: str, report: Report) -> Callable[[int, int], None]:
    """Turns a function's progress, called with what is done and all, into a stage of `show_progress`."""
    from retro_kernels.retrieval.build.builder import Meter

    meters: list[Meter] = []

    def step(done: int, total: int) -> None:
        if not meters:
            meters.append(Meter(stage, total, report))
        meters[0](0, done - meters[0].chunks, done - meters[0].size)

    return step


def _facts(at: Progress) -> str:
    left = ""
    if at.seconds_left is not None:
        minutes, seconds = divmod(round(at.seconds_left), 60)
        left = f", {minutes // 60}:{minutes % 60:02}:{seconds:02} left"
    unit = UNITS.get(at.stage)
    if unit is not None:
        return f"{at.chunks:,} {unit}, {at.chunks_per_second:,.{0 if at.chunks_per_second > 10 else 2}f} {unit}/s{left}"
    if at.stage in ("verify", "evaluate"):
        return left.removeprefix(", ")
    if at.stage == "read":
        return f"{at.documents:,} documents{left}"
    return f"{at.documents:,} documents, {at.chunks:,} chunks, {at.chunks_per_second:,.0f} chunks/s{left}"
