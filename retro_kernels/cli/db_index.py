"""`retro-kernels db index` and `db evaluate`: the index of a database, and how good it is."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .db_common import Folder, counting, printable, say, say_json, show_errors, show_progress

KEYS_OF_ANOTHER = 0.95
"""The recall below which keys and embedder are said not to belong together."""


def index(
    folder: Folder,
    index: Annotated[str, typer.Option(help='"auto" (by size), exact, or a FAISS factory string.')] = "auto",
    device: Annotated[str, typer.Option(help="cpu, or cuda: train on the GPUs.")] = "cpu",
) -> None:
    """Gives a finished database an index, or another one. The old one serves until the new one is whole; a stopped
    command goes on when it is run again."""
    from retro_kernels.retrieval.index.index import replace_index

    with show_errors(), show_progress() as report:
        database = replace_index(folder, index, device=device, progress=counting("index", report))
    entry = database.manifest["index"]
    say(f"{folder}: {entry['spec']} over {len(database):,} keys ({entry['why']})")


def evaluate(
    folder: Folder,
    k: Annotated[int, typer.Option(help="Neighbours that are looked for.")] = 2,
    queries: Annotated[int, typer.Option(help="Chunks of the database to look up, each without itself.")] = 1000,
    query_file: Annotated[
        Path | None, typer.Option(help="Instead: a .npy file of embeddings from elsewhere, a row a query.")
    ] = None,
    recall: Annotated[float, typer.Option(help="That the recommended setting reaches.")] = 0.95,
    seed: Annotated[int, typer.Option(help="Of the choice of chunks.")] = 0,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    plot: Annotated[Path | None, typer.Option(help="Draw recall against speed into this .png or .svg.")] = None,
    save: Annotated[bool, typer.Option("--save", help="Make the recommended setting the database's own.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Compares the index with exact search: recall and queries a second of its settings, and which to take."""
    import numpy as np

    from retro_kernels.retrieval import Database, DatabaseError, Retriever
    from retro_kernels.retrieval.index.evaluation import evaluate_search
    from retro_kernels.retrieval.index.evaluation import plot as draw
    from retro_kernels.retrieval.index.index import save_settings
    from retro_kernels.retrieval.manifest import map_array

    with show_errors(ImportError):
        given = None if query_file is None else np.array(map_array(query_file))
        database = Database(folder)
        embed = None
        if given is None:
            try:
                embed = Retriever(database, device=device).embed_chunks
            except DatabaseError as error:
                typer.echo(printable(f"asked with stored keys, as nothing can be embedded here: {error}"), err=True)
        with show_progress() as report:
            found = evaluate_search(
                database,
                k=k,
                num_queries=queries,
                queries=given,
                embed=embed,
                recall=recall,
                seed=seed,
                device=device,
                progress=counting("evaluate", report),
            )
        if plot is not None:
            draw(found, plot)
        if save and found.points:
            save_settings(folder, **found.recommended)
    if as_json:
        say_json(found.to_dict())
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, title=found.description, title_justify="left")
    names = list(found.points[0].settings) if found.points else []
    for name in (*names, f"recall@{k}", "queries/s", ""):
        table.add_column(name, justify="right" if name else "left")
    for point in found.points:
        mark = "recommended" if point.settings == found.recommended else ""
        values = [str(value) for value in point.settings.values()]
        table.add_row(*values, f"{point.recall:.3f}", f"{point.queries_per_second:,.0f}", mark)
    table.add_row(
        *("exact" if i == 0 else "" for i in range(len(names))),
        "1.000",
        f"{found.exact_queries_per_second:,.0f}",
        "" if names else "exact",
    )
    Console().print(table)
    if found.embedded_recall is not None:
        say(f"recall@{k} of exact search asked with what a retriever embeds: {found.embedded_recall:.3f}")
    if found.embedded_recall is not None and found.embedded_recall < KEYS_OF_ANOTHER:
        say(
            "  warning: the database's keys are not what its embedder makes of its chunks' tokens. Where the tokenizer "
            "knows little of the text, a database of an older release is such: build it anew"
        )
    say(f"recommended: {found.reason}" + (" (saved)" if save and found.points else ""))
