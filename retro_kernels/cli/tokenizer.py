"""`retro-kernels tokenizer`: a tokenizer of one's own text, and what one loses."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from .db_common import show_errors

app = typer.Typer(help="Tokenizers: train one on your text, see what one loses.", no_args_is_help=True)


@app.command()
def train(
    inputs: Annotated[list[str], typer.Argument(help="Files, folders and globs, as for `db build`.")],
    out: Annotated[Path, typer.Option(help="The folder that gets tokenizer.json.")],
    vocab_size: Annotated[int, typer.Option(help="Tokens; all but 257 are learned.")] = 16384,
    sample: Annotated[float, typer.Option(help="Megabytes of text to learn from, of files drawn at random.")] = 200.0,
    format: Annotated[str | None, typer.Option(help="As for `db build`.")] = None,
    text_field: Annotated[str, typer.Option(help="As for `db build`.")] = "text",
    encoding: Annotated[str, typer.Option(help="As for `db build`.")] = "utf-8",
) -> None:
    """Trains a byte-level BPE: every text comes back as it was, in any language. Give OUT to `db build --tokenizer`."""
    from ..retrieval.corpus.readers import Options, find
    from ..tokenizers import FILE, train_tokenizer

    with show_errors():
        if (out / FILE).exists():
            raise ValueError(f"out: {out / FILE} is there, and is never overwritten: name another folder, or delete it")
        pieces, _ = find(inputs, format=format)
        options = Options(text_field=text_field, encoding=encoding)
        made = train_tokenizer(_texts(pieces, options, sample * 1e6), out, vocab_size=vocab_size)
    typer.echo(f"{out / FILE}: {made.vocabulary_size:,} tokens; {made.eos_token_id} ends a document")


def _texts(pieces: list, options: object, limit: float) -> Iterator[str]:
    """The text of the files, in an order drawn at random, until so many characters were given."""
    from ..retrieval.corpus.readers import Problem, Reader

    order = list(pieces)
    random.Random(0).shuffle(order)
    given = 0
    for piece in order:
        try:
            for document in Reader(piece, options):  # type: ignore[arg-type]
                try:
                    for block in document.blocks:
                        yield block
                        given += len(block)
                        if given >= limit:
                            return
                except Problem:
                    continue  # `db build` names what it leaves out
        except Problem:
            continue
    if not given:
        raise ValueError("inputs: no text in them")


@app.command()
def check(
    tokenizer: Annotated[str, typer.Argument(help="As for `db build --tokenizer`.", show_default=False)],
) -> None:
    """Says what text does not come back as it was from a tokenizer. Exit code 1 where something does not."""
    from ..tokenizers import load_tokenizer, lost_by

    with show_errors():
        found = load_tokenizer(tokenizer)
        lost = lost_by(found)
    typer.echo(
        f"{found.vocabulary_size:,} tokens; {found.eos_token_id} ends a document; loses: "
        + (", ".join(lost) or "nothing")
    )
    if lost:
        raise typer.Exit(1)
