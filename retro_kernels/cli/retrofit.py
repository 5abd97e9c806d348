"""`retro-kernels retrofit`: a RETRO out of a Hugging Face decoder and a folder of data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from .db_common import printable, show_errors


def retrofit(
    model: Annotated[str, typer.Argument(help="A decoder of transformers: a folder, or a name on the hub.")],
    data: Annotated[Path, typer.Argument(help="The folder that `retro-kernels db neighbours` wrote.")],
    out: Annotated[Path, typer.Option(help="The new folder, or the one of an unfinished run.")],
    held_out: Annotated[
        Path | None, typer.Option(help="Another such folder to measure on. Default: the last texts of DATA.")
    ] = None,
    db: Annotated[Path | None, typer.Option(help="The database of the neighbours, if that was moved.")] = None,
    steps: Annotated[int, typer.Option(help="Updates.")] = 120,
    batch: Annotated[int, typer.Option(help="Texts of an update.")] = 1,
    length: Annotated[int, typer.Option(help="Tokens of a text.")] = 512,
    texts: Annotated[int, typer.Option(help="Texts to measure.")] = 24,
    num_neighbours: Annotated[int, typer.Option(help="Neighbours of a chunk.")] = 2,
    join: Annotated[str, typer.Option(help="softmax or add, see rk.retrofit.")] = "softmax",
    adapt: Annotated[bool, typer.Option("--adapt", help="Train maps of queries and of what is found, too.")] = False,
    precision: Annotated[str, typer.Option(help="fp32 or bf16.")] = "fp32",
    start: Annotated[
        Path | None, typer.Option(help="A finished OUT of another run, to go on from; then --join and --adapt are its.")
    ] = None,
    keep_layers: Annotated[
        int | None,
        typer.Option(help="With --start: only so many layers go on seeing neighbours, those that gain most."),
    ] = None,
    gguf: Annotated[str | None, typer.Option(help="The file in MODEL with the weights, if it is of GGUF.")] = None,
    device: Annotated[str | None, typer.Option(help="'cpu' or 'cuda'. Default: the GPU if there is one.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Trains the gates that let a decoder read neighbours, and says what they gain on texts that were held out.

    DATA must have been made with the decoder's tokenizer. OUT gets what was added: `rk.retrofit(model, OUT)` puts it on
    the decoder again. Stopped, the same command goes on.

    Every layer that sees neighbours costs time. `--start OUT --keep-layers 8 --out SMALL` closes all but the eight that
    gain most, trains these on, and measures again.
    """

    import retro_kernels as rk

    with show_errors(ImportError):
        from ..integrations.retrofit.training import GateTraining, run
        from ..retrieval.index.devices import find_device
        from ..retrieval.training_data import open_neighbours

        settings = GateTraining(steps=steps, batch_size=batch, length=length, held_out=texts, precision=precision)
        facts = open_neighbours(data, db).facts
        device = str(find_device(device or "auto"))
        decoder = load_decoder(model, gguf).to(device)
        chunk_size = facts["chunk_size"]
        if keep_layers is not None and start is None:
            raise ValueError(
                f"keep_layers: got {keep_layers} without start, expected the folder of a run whose gates say what each "
                "layer gains"
            )
        if start is not None:
            report = rk.retrofit(decoder, start)
        else:
            report = rk.retrofit(
                decoder,
                join=join,
                adapt=adapt,
                chunk_size=chunk_size,
                num_neighbours=num_neighbours,
                retrieved_length=2 * chunk_size,
                tokenizer=facts["tokenizer"],
            )
        _compare_tokenizers(model, gguf, facts)
        _say(str(report))
        given: dict[str, Any] = {"database": db, "held_out": held_out, "keep_layers": keep_layers, "say": _say}
        results = run(decoder, data, out, settings, **given)
    if as_json:
        typer.echo(json.dumps(results, indent=1))
        return
    _show(results)


def _say(text: str) -> None:
    """On standard error: standard output has the results alone."""
    typer.echo(printable(text), err=True)


def load_decoder(model: str, gguf: str | None) -> Any:
    """A decoder of transformers in fp32. Raises ValueError for a name that is nowhere."""
    import torch
    from transformers import AutoModelForCausalLM

    given: dict[str, Any] = {}
    if gguf is not None:
        from transformers import GgufConfig

        given = {"gguf_file": gguf, "quantization_config": GgufConfig(dequantize=True)}
    try:
        return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, **given).eval()
    except OSError as error:  # what transformers says of a name that is nowhere
        raise ValueError(f"model: {error}") from error


def _compare_tokenizers(model: str, gguf: str | None, facts: dict[str, Any]) -> None:
    """Raises ValueError where the model's own tokenizer, if it comes with one, makes other tokens than the data's."""
    from transformers import AutoTokenizer

    from ..retrieval import open_tokenizer

    try:
        theirs = AutoTokenizer.from_pretrained(model, **({} if gguf is None else {"gguf_file": gguf}))
    except (OSError, ValueError, ImportError, KeyError):
        _say(f"{model} has no tokenizer here, so that it is not known whether its tokens are the data's")
        return
    text = "The quick brown fox jumps over 13 lazy dogs;\n\tint main(void) { return 0; }"
    mine = open_tokenizer(facts["tokenizer_identity"]).encode(text)
    if theirs.encode(text, add_special_tokens=False) != list(mine):
        raise ValueError(
            f"data: its tokenizer {facts['tokenizer']!r} makes other tokens than the one of {model}; make database and "
            "neighbours with that (`retro-kernels db build --tokenizer FOLDER`)"
        )


def _show(results: list[dict[str, Any]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    for name in ("neighbours", "overlap", "tokens", "nats/token", "bits/byte"):
        table.add_column(name, justify="left" if name == "neighbours" else "right")
    for x in results:
        limit = "all" if x["max_overlap"] == 1.0 else f"<= {x['max_overlap']:g}"
        numbers = ("-" if x[name] is None else f"{x[name]:.4f}" for name in ("nats_per_token", "bits_per_byte"))
        table.add_row(x["neighbours"], limit, str(x["tokens"]), *numbers)
    Console().print(table)
