"""`retro-kernels db`: retrieval databases, one function per subcommand."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from . import db_build, db_exchange, db_neighbours, db_search

if TYPE_CHECKING:
    from retro_kernels.retrieval import Database

app = typer.Typer(
    help="Retrieval databases: build one, see what it holds, check it, look something up.", no_args_is_help=True
)
app.command("build")(db_build.build)
app.command("import")(db_exchange.import_)
app.command("export")(db_exchange.export)
app.command("neighbours")(db_neighbours.neighbours)
app.command("query")(db_neighbours.query)
app.command("index")(db_search.index)
app.command("evaluate")(db_search.evaluate)
Folder = Annotated[Path, typer.Argument(help="The database's folder.", show_default=False)]


def _open(folder: Path) -> Database:
    from retro_kernels.retrieval import Database, DatabaseError

    try:
        return Database(folder)
    except DatabaseError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None


@app.command()
def info(folder: Folder) -> None:
    """Says what a database holds: counts, sizes, tokenizer, embedder and index."""
    database = _open(folder)
    manifest = database.manifest
    counts = manifest["counts"]
    size = sum(file["bytes"] for shard in manifest["shards"] for file in shard["files"].values())
    embeddings = "none" if database.dim is None else f"{database.dim} x {manifest['embedding_dtype']}"
    for name, value in {
        "chunks": f"{counts['chunks']:,} of {manifest['chunk_size']} tokens ({manifest['token_dtype']})",
        "documents": f"{counts['documents']:,}",
        "tokens": f"{counts['tokens']:,} without padding",
        "shards": f"{len(manifest['shards']):,}, {size:,} bytes",
        "embeddings": embeddings,
        "tokenizer": manifest["tokenizer"],
        "embedder": manifest["embedder"] or "none",
        "index": _index_facts(manifest["index"]),
    }.items():
        typer.echo(f"{name:<11} {value}")


def _index_facts(entry: dict | None) -> str:
    if entry is None:
        return "none: searches are exact"
    settings = "".join(f", {name} {value}" for name, value in entry["settings"].items())
    size = sum(file["bytes"] for file in entry["files"])
    return f"{entry['spec']}{settings}, {size:,} bytes ({entry['why']})"


@app.command()
def verify(folder: Folder) -> None:
    """Reads every file and checks every checksum and count. Exit code 1 where something is wrong."""
    problems = _open(folder).verify()
    for line in problems:
        typer.echo(f"error: {line}", err=True)
    if problems:
        raise typer.Exit(1)
    typer.echo("every checksum and count holds")
