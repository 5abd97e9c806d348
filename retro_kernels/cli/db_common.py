"""Errors and progress on the terminal, for all subcommands of `retro-kernels db`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from retro_kernels.retrieval.build.builder import Progress, Report

Folder = Annotated[Path, typer.Argument(help="The database's folder.", show_default=False)]


@contextmanager
def show_errors(*kinds: type[Exception]) -> Iterator[None]:
    """Turns DatabaseError, ValueError and these kinds, which the user can do something about, into a line and exit
    code 1."""
    from retro_kernels.retrieval import DatabaseError

    caught: tuple[type[Exception], ...] = (DatabaseError, ValueError, *kinds)
    try:
        yield
    except caught as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None


@contextmanager
def show_progress() -> Iterator[Report]:
    """A line on the terminal (standard error) that follows the build."""
    from rich.console import Console
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn
    from rich.progress import Progress as Bars

    columns = (
        TextColumn("{task.description:<6}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[facts]}"),
    )
    with Bars(*columns, console=Console(stderr=True)) as bars:
        tasks: dict[str, object] = {}

        def show(at: Progress) -> None:
            task = tasks.get(at.stage)
            if task is None:
                task = tasks[at.stage] = bars.add_task(at.stage, total=1.0, facts="")
            bars.update(task, completed=at.done, facts=_facts(at))  # type: ignore[arg-type]

        yield show


def _facts(at: Progress) -> str:
    left = ""
    if at.seconds_left is not None:
        minutes, seconds = divmod(round(at.seconds_left), 60)
        left = f", {minutes // 60}:{minutes % 60:02}:{seconds:02} left"
    if at.stage in ("match", "search"):
        return f"{at.chunks:,} chunks, {at.chunks_per_second:,.0f} chunks/s{left}"
    if at.stage == "read":
        return f"{at.documents:,} documents{left}"
    return f"{at.documents:,} documents, {at.chunks:,} chunks, {at.chunks_per_second:,.0f} chunks/s{left}"
