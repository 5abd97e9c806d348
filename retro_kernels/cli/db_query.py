"""`retro-kernels db neighbours` and `db query`: what a database finds, for a corpus and for a line of text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .db_build import standard_input
from .db_common import Folder, printable, say, say_json, show_errors, show_progress

if TYPE_CHECKING:
    from retro_kernels.retrieval import Retrieved, Retriever

Overlap = Annotated[
    float | None,
    typer.Option(help="Drop neighbours that have more than this share of the chunk in one piece, 0 to 1."),
]
Search = Annotated[
    list[str] | None, typer.Option(help="A setting of the index, as nprobe=16; may be repeated.", metavar="NAME=VALUE")
]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda, for the embedder and the index.")]


def neighbours(
    folder: Folder,
    inputs: Annotated[
        list[str], typer.Argument(help="The corpus: files, folders and globs, as for build, or a database's folder.")
    ],
    out: Annotated[Path, typer.Option(help="The new folder, or the one of an unfinished run.")],
    num_neighbours: Annotated[int, typer.Option(help="Neighbours of a chunk.")] = 2,
    same_document: Annotated[
        bool, typer.Option("--same-document", help="Let neighbours be of the chunk's own document.")
    ] = False,
    held_out: Annotated[
        float | None,
        typer.Option(help="Keep this share of the documents apart for evaluation, in OUT/held-out, as 0.05."),
    ] = None,
    max_overlap: Overlap = None,
    search: Search = None,
    format: Annotated[str | None, typer.Option(help="As for build.")] = None,
    text_field: Annotated[str, typer.Option(help="As for build.")] = "text",
    encoding: Annotated[str, typer.Option(help="As for build.")] = "utf-8",
    keep_duplicates: Annotated[bool, typer.Option(help="As for build.")] = False,
    device: Device = "cpu",
) -> None:
    """Looks up the neighbours of every chunk of a corpus, into a folder for training. Stopped, it goes on."""
    from retro_kernels.retrieval import Retriever, open_neighbours, precompute_neighbours
    from retro_kernels.retrieval.training_data import HELD_OUT

    reading = {"format": format, "text_field": text_field, "encoding": encoding, "keep_duplicates": keep_duplicates}
    usual = {"format": None, "text_field": "text", "encoding": "utf-8", "keep_duplicates": False}
    changed = {name: value for name, value in reading.items() if value != usual[name]}
    with show_errors(), standard_input(inputs, out, format) as given:
        retriever = Retriever(
            folder,
            num_neighbours=num_neighbours,
            max_overlap=max_overlap,
            search=_settings(search),
            cache_size=0,
            device=_device(device),
        )
        with show_progress() as progress:
            made = precompute_neighbours(
                retriever, given, out, same_document=same_document, held_out=held_out, progress=progress, **changed
            )
        parts = {out: made}
        if held_out is not None:
            parts[out / HELD_OUT] = open_neighbours(out / HELD_OUT, folder)
    for where, part in parts.items():
        _say_found(where, part.facts)


def _say_found(where: Path, facts: dict[str, Any]) -> None:
    """What a folder of training data holds, and what is missing of it."""
    chunks, k, missing = facts["chunks"], facts["num_neighbours"], facts["missing"]
    say(
        f"{where}: {facts['tokens']:,} tokens of {facts['documents']:,} documents in {chunks:,} chunks, with "
        f"{chunks * k - missing:,} of {chunks * k:,} neighbours ({k} a chunk)"
    )
    if missing:
        say(
            f"  {missing / (chunks * k):.1%} of the neighbours are missing, {facts['chunks_without_neighbours']:,} "
            "chunks have none: nothing else in the database passed the filters"
        )


def query(
    folder: Folder,
    text: Annotated[str, typer.Argument(help="What to look up.", show_default=False)],
    num_neighbours: Annotated[int, typer.Option("--num-neighbours", "-k", help="How many to show.")] = 5,
    max_overlap: Overlap = None,
    search: Search = None,
    device: Device = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Shows the neighbours of a text: each chunk, what follows it, where it is from, and its distance."""
    from retro_kernels.retrieval import Retriever

    with show_errors():
        if not text.strip():
            raise ValueError("text: got nothing; expected something to look up")
        retriever = Retriever(
            folder,
            num_neighbours=num_neighbours,
            max_overlap=max_overlap,
            search=_settings(search),
            device=_device(device),
        )
        found = _entries(retriever, retriever.retrieve_text([text]))
    if as_json:
        say_json({"query": text, "neighbours": found})
    else:
        _print(text, found)


def _entries(retriever: Retriever, found: Retrieved) -> list[dict[str, Any]]:
    """Describes each neighbour of the first text; missing ones are left out."""
    m = retriever.chunk_size
    entries = []
    for rank, source in enumerate(found.sources[0]):
        if source is None:
            continue
        tokens, mask = found.tokens[0, rank], found.mask[0, rank]
        whole, chunk = retriever.decode(tokens[mask]), retriever.decode(tokens[:m][mask[:m]])
        # A chunk may end within a word.
        if whole.startswith(chunk):
            following = whole[len(chunk) :]
        else:
            following = retriever.decode(tokens[m:][mask[m:]])
        entries.append(
            {
                "rank": rank + 1,
                "distance": float(found.distances[0, rank]),
                "chunk": int(found.ids[0, rank]),
                "document": source.document,
                "path": source.path,
                "record": source.record,
                "character": source.offset if source.offset >= 0 else None,
                "text": chunk,
                "continuation": following,
            }
        )
    return entries


def _print(text: str, found: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.panel import Panel
    from rich.text import Text

    console = Console(highlight=False)
    if not found:
        say("no neighbour passed the filters")
    for one in found:
        place = [one["path"]]
        place += [] if one["record"] is None else [f"record {one['record']:,}"]
        place += [] if one["character"] is None else [f"character {one['character']:,}"]
        where, distance = printable(", ".join(place)), f"distance {one['distance']:.3f}"
        if not console.is_terminal:
            # For other programs: no frames, nothing cut.
            following = f"\n  … {one['continuation'].strip()}" if one["continuation"] else ""
            say(f"{one['rank']}. {distance}  {where}\n  {one['text']}{following}\n")
            continue
        body = Text(printable(one["text"]), style="bold")
        if one["continuation"]:
            body.append(printable(one["continuation"]), style="not bold dim")
        title = Text.assemble((f"{one['rank']}", "bold cyan"), "  ", distance)
        console.print(
            Panel(body, title=title, subtitle=Text(where, style="cyan"), title_align="left", subtitle_align="right")
        )


def _settings(given: list[str] | None) -> dict[str, int | float | str]:
    """NAME=VALUE, with numbers as numbers."""
    found: dict[str, int | float | str] = {}
    for one in given or []:
        name, equals, value = one.partition("=")
        if not name or not equals or not value:
            raise ValueError(f"search: got {one!r}; expected NAME=VALUE, as nprobe=16")
        for kind in (int, float, str):
            try:
                found[name] = kind(value)
                break
            except ValueError:
                continue
    return found


def _device(name: str) -> str:
    import torch

    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
