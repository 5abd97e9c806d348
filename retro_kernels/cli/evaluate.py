"""`retro-kernels evaluate`: bits per byte of a model on a stream of tokens."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Annotated

import typer

from .db_common import counting, printable, say_json, show_errors, show_progress


def evaluate(
    model: Annotated[Path, typer.Argument(help="Folder of a model: config.json and safetensors.")],
    data: Annotated[Path, typer.Argument(help="The folder that `retro-kernels db neighbours` wrote.")],
    db: Annotated[Path | None, typer.Option(help="The database of its neighbours, if that was moved.")] = None,
    retrieval: Annotated[
        list[str] | None, typer.Option(help="'on', 'off' or 'random'; may be repeated. Default: all that can be.")
    ] = None,
    neighbours: Annotated[
        list[int] | None, typer.Option(help="k; may be repeated, for a sweep. Default: the model's.")
    ] = None,
    overlap: Annotated[
        list[float] | None,
        typer.Option(help="Also of the chunks that share at most so much with a neighbour, 0 to 1; may be repeated."),
    ] = None,
    window_stride: Annotated[
        int | None,
        typer.Option(
            help="Tokens between overlapping windows, of which only so many new ones count. Default: no overlap."
        ),
    ] = None,
    rows: Annotated[int | None, typer.Option(help="Only the first rows of max_length tokens. Default: all.")] = None,
    batch: Annotated[int, typer.Option(help="Rows at a time.")] = 8,
    plot: Annotated[
        Path | None, typer.Option(help="Draw bits per byte by overlap into this file (.svg, .png, .pdf).")
    ] = None,
    device: Annotated[str | None, typer.Option(help="'cpu' or 'cuda'. Default: the GPU if there is one.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Bits per byte with the retrieved neighbours, without any, and with those of another place in the text.

    By overlap (--overlap, --plot): of the chunks alone that share at most so much of their tokens, in one piece, with a
    neighbour. What retrieval gains where little is shared is not copied.
    """

    from ..models import Retro
    from ..models.data import TokenStream
    from ..models.evaluation import MODES, OVERLAPS, draw_overlaps, unchanged_by_retrieval
    from ..models.evaluation import evaluate as run
    from ..retrieval.index.devices import find_device

    with show_errors(code=2):
        device = str(find_device(device or "auto"))
        loaded = Retro.from_pretrained(model, device=device)
        stream = TokenStream(data, loaded.config, db)
        if plot is not None and not overlap:
            overlap = list(OVERLAPS)
        kinds: Collection[str] = retrieval or (
            MODES if stream.neighbours is not None and loaded.encoder is not None else ("off",)
        )
        if not retrieval and stream.rows == 1 and len(kinds) > 1:
            kinds = ("on", "off")
            _warn("there is one row of text, and no other whose neighbours it could be given")
        with show_progress() as progress:
            results = run(
                loaded,
                stream,
                retrieval=kinds,
                num_neighbours=neighbours,
                overlaps=overlap or (),
                batch_size=batch,
                max_rows=rows,
                window_stride=window_stride,
                progress=counting("score", progress),
            )
        if plot is not None:
            draw_overlaps(results, plot)
    lost, lacking = stream.facts.get("lost_by_tokenizer"), stream.share_without_neighbours()
    if lost:
        _warn(f"the tokenizer loses {', '.join(lost)}: bits per byte are of text that the model cannot write")
    if lacking:
        _warn(f"{lacking:.1%} of the neighbours are missing: nothing passed the filters of `db neighbours`")
    if unchanged_by_retrieval(results):
        _warn(
            "RETRIEVAL CHANGES NOTHING: with neighbours the loss is that without, to the bit. The model does not read "
            "them, or all are missing: these numbers say nothing about retrieval"
        )
    if as_json:
        say_json([result.to_dict() for result in results])
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    for name in ("retrieval", "k", "overlap", "tokens", "bits/token", "bits/byte"):
        table.add_column(name, justify="left" if name == "retrieval" else "right")
    for x in results:
        limit = "all" if x.max_overlap is None else f"<= {x.max_overlap:g}"
        per_byte = "not known" if x.bits_per_byte is None else f"{x.bits_per_byte:.4f}"
        table.add_row(x.retrieval, str(x.num_neighbours), limit, str(x.tokens), f"{x.bits_per_token:.4f}", per_byte)
    Console().print(table)


def _warn(text: str) -> None:
    typer.echo(printable(f"Warning: {text}"), err=True)
