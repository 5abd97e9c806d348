"""`retro-kernels db`: retrieval databases. Here are `info`, `verify`, `import` and `export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import db_build, db_encode, db_index, db_query
from .db_common import Folder, counting, printable, say, show_errors, show_progress

app = typer.Typer(
    help="Retrieval databases: build one, see what it holds, check it, look something up.", no_args_is_help=True
)
app.command("build")(db_build.build)
app.command("add")(db_build.add)
app.command("neighbours")(db_query.neighbours)
app.command("query")(db_query.query)
app.command("index")(db_index.index)
app.command("evaluate")(db_index.evaluate)
app.command("encode")(db_encode.encode)


@app.command()
def info(folder: Folder) -> None:
    """Says what a database holds: counts, sizes, tokenizer, embedder and index."""
    from retro_kernels.retrieval import Database

    with show_errors():
        database = Database(folder)
    manifest = database.manifest
    counts = manifest["counts"]
    size = sum(file["bytes"] for shard in manifest["shards"] for file in shard["files"].values())
    embeddings = "none" if database.dim is None else f"{database.dim} x {manifest['embedding_dtype']}"
    for name, value in {
        "chunks": f"{counts['chunks']:,} of {manifest['chunk_size']} tokens ({manifest['token_dtype']})",
        "documents": f"{counts['documents']:,}",
        "tokens": f"{counts['tokens']:,} without padding{_unknown(manifest)}",
        "shards": f"{len(manifest['shards']):,}, {size:,} bytes",
        "embeddings": embeddings,
        "tokenizer": manifest["tokenizer"],
        "embedder": manifest["embedder"] or "none",
        "index": _index_facts(manifest["index"]),
    }.items():
        say(f"{name:<11} {value}")


def _unknown(manifest: dict) -> str:
    unknown = (manifest["build"] or {}).get("unknown_tokens")
    return f", {unknown / max(1, manifest['counts']['tokens']):.1%} of them unknown to the tokenizer" if unknown else ""


def _index_facts(entry: dict | None) -> str:
    if entry is None:
        return "none: searches are exact"
    settings = "".join(f", {name} {value}" for name, value in entry["settings"].items())
    size = sum(file["bytes"] for file in entry["files"])
    return f"{entry['spec']}{settings}, {size:,} bytes ({entry['why']})"


@app.command()
def verify(folder: Folder) -> None:
    """Reads every file and checks every checksum and count. Exit code 1 where something is wrong."""
    from retro_kernels.retrieval import Database

    with show_errors(), show_progress() as report:
        problems = Database(folder).verify(counting("verify", report))
    for line in problems:
        typer.echo(printable(f"error: {line}"), err=True)
    if problems:
        raise typer.Exit(1)
    say("every checksum and count holds")


@app.command("import")
def import_(
    format: Annotated[
        str, typer.Argument(help="retro-pytorch, megatron, or numpy: embeddings.npy and texts.", show_default=False)
    ],
    source: Annotated[
        Path, typer.Argument(help="The folder with these files, or the Retro project's.", show_default=False)
    ],
    out: Annotated[Path, typer.Option(help="The new database's folder.")],
    tokenizer: Annotated[str | None, typer.Option(help="The one that made the tokens, as for `db build`.")] = None,
    chunk_size: Annotated[int, typer.Option(help="Of a chunk; Megatron's files say their own.")] = 64,
    neighbours: Annotated[Path | None, typer.Option(help="A folder of Megatron's `query`.")] = None,
    embedder: Annotated[str | None, typer.Option(help="What made the embeddings, as for `db build`.")] = None,
) -> None:
    """Makes a database of the chunks, embeddings and neighbours that another project made."""
    from retro_kernels.retrieval.exchange import NEIGHBOURS, import_database

    with show_errors():
        database = import_database(
            format, source, out, tokenizer=tokenizer, chunk_size=chunk_size, neighbours=neighbours, embedder=embedder
        )
    say(f"{out}: {len(database):,} chunks of {database.num_documents:,} documents")
    if database.manifest["files"]:
        say(f"  their neighbours are in {out / NEIGHBOURS}")


@app.command()
def export(
    folder: Folder,
    out: Annotated[Path, typer.Argument(help="The new Parquet file.", show_default=False)],
    embeddings: Annotated[bool, typer.Option("--embeddings", help="With a column of embeddings.")] = False,
    text: Annotated[bool, typer.Option("--text", help="With a column of the tokens' text.")] = False,
) -> None:
    """Writes the chunks to Parquet, a row each."""
    from retro_kernels.retrieval import Database
    from retro_kernels.retrieval.exchange import export_parquet

    with show_errors(), show_progress() as report:
        step = counting("export", report)
        rows = export_parquet(Database(folder), out, embeddings=embeddings, text=text, progress=step)
    say(f"{out}: {rows:,} chunks")
