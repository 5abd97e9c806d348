"""`retro-kernels db encode`: what a retrofitted decoder makes of every chunk of a database, kept."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .db_common import Folder, counting, say, show_errors, show_progress
from .retrofit import load_decoder


def encode(
    folder: Folder,
    model: Annotated[str, typer.Option(help="The decoder, as for `retro-kernels retrofit`.")],
    retro: Annotated[Path, typer.Option(help="What `retro-kernels retrofit` or save_pretrained wrote.")],
    out: Annotated[Path, typer.Option(help="The new folder, or the one of an unfinished run.")],
    layers: Annotated[
        list[int] | None, typer.Option(help="A layer to keep; may be repeated. Default: all that look at neighbours.")
    ] = None,
    batch: Annotated[int, typer.Option(help="Chunks that are read at a time.")] = 16,
    gguf: Annotated[str | None, typer.Option(help="As for `retro-kernels retrofit`.")] = None,
    device: Annotated[str | None, typer.Option(help="'cpu' or 'cuda'. Default: the GPU if there is one.")] = None,
) -> None:
    """Has the decoder read every chunk once, so that generation reads none again. Stopped, it goes on.

    Keys and values are kept as int8. Says first how large they will be: every layer counts.
    """

    import retro_kernels as rk

    with show_errors(ImportError, RuntimeError):
        from ..integrations.retrofit.store import encode_database, size_of
        from ..retrieval import Database
        from ..retrieval.index.devices import find_device

        database = Database(folder)
        device = str(find_device(device or "auto"))
        decoder = load_decoder(model, gguf).to(device)
        rk.retrofit(decoder, retro)
        chosen = sorted(decoder.retro.active()) if layers is None else layers
        size = size_of(decoder, database, chosen)
        say(f"{len(database):,} chunks in {len(chosen)} layers: {size:,} bytes ({size / 1e9:.2f} GB)")
        with show_progress() as progress:
            encode_database(
                decoder, database, out, layers=chosen, batch_size=batch, progress=counting("encode", progress)
            )
