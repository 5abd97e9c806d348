"""`retro-kernels db import` and `db export`: other projects' chunks and neighbours in, Parquet out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer


def import_(
    format: Annotated[str, typer.Argument(help="retro-pytorch or megatron.", show_default=False)],
    source: Annotated[
        Path, typer.Argument(help="The folder with processed-stats.json, or the Retro project's.", show_default=False)
    ],
    out: Annotated[Path, typer.Option(help="The new database's folder.")],
    tokenizer: Annotated[str | None, typer.Option(help="The one that made the tokens, as for `db build`.")] = None,
    chunk_size: Annotated[int, typer.Option(help="Of retro-pytorch's files; Megatron's say their own.")] = 64,
    neighbours: Annotated[Path | None, typer.Option(help="A folder of Megatron's `query`.")] = None,
) -> None:
    """Makes a database of the chunks, embeddings and neighbours that another project made."""
    from retro_kernels.retrieval.interchange import NEIGHBOURS, import_database

    with show_errors():
        database = import_database(
            format, source, out, tokenizer=tokenizer, chunk_size=chunk_size, neighbours=neighbours
        )
    typer.echo(f"{out}: {len(database):,} chunks of {database.num_documents:,} documents")
    if database.manifest["files"]:
        typer.echo(f"  their neighbours are in {out / NEIGHBOURS}")


def export(
    folder: Annotated[Path, typer.Argument(help="The database's folder.", show_default=False)],
    out: Annotated[Path, typer.Argument(help="The new Parquet file.", show_default=False)],
    embeddings: Annotated[bool, typer.Option("--embeddings", help="With a column of embeddings.")] = False,
    text: Annotated[bool, typer.Option("--text", help="With a column of the tokens' text.")] = False,
) -> None:
    """Writes the chunks to Parquet, a row each."""
    from retro_kernels.retrieval import Database
    from retro_kernels.retrieval.interchange import export_parquet

    with show_errors():
        rows = export_parquet(Database(folder), out, embeddings=embeddings, text=text)
    typer.echo(f"{out}: {rows:,} chunks")


@contextmanager
def show_errors() -> Iterator[None]:
    """Turns an error that its user can do something about into a line and exit code 1."""
    from retro_kernels.retrieval import DatabaseError

    try:
        yield
    except (DatabaseError, ValueError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None
