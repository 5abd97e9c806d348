"""`retro-kernels convert`: another implementation's checkpoint as a model of this library, or back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer


def settings(given: list[str]) -> dict[str, Any]:
    """`name=value` each, the value as JSON or else as text. Raises ValueError for anything else."""
    found: dict[str, Any] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise ValueError(f"set: got {text!r}, expected name=value, such as chunk_size=64")
        try:
            found[name] = json.loads(value)
        except json.JSONDecodeError:
            found[name] = value
    return {name: tuple(x) if isinstance(x, list) else x for name, x in found.items()}


def convert(
    source: Annotated[Path, typer.Argument(help="A checkpoint, a file or a folder; with --to: a model's folder.")],
    out: Annotated[Path, typer.Argument(help="Folder to write, which must not be there.")],
    peer: Annotated[str | None, typer.Option(help="The implementation it is of. Default: found out.")] = None,
    prefix: Annotated[
        str | None, typer.Option(help="Of several models in a file: what its names begin with. Default: the only one.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="Such as bfloat16. Default: the source's.")] = None,
    to: Annotated[str | None, typer.Option(help="Instead, export this library's model to: retro-pytorch.")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="A field of the config that the source does not tell: name=value; may be repeated."),
    ] = None,
) -> None:
    """Converts weights from or to another implementation. Every tensor is accounted for, or nothing is written.

    With --to OUT holds model.safetensors, a state dict, and arguments.json, with which to build the model for it
    (norm_klass by its name in torch.nn).
    """
    import torch

    from ..files import replaced, write_json
    from ..integrations.weights import converted, exported
    from ..models import Retro
    from .db_common import show_errors

    with show_errors(TypeError, code=2):
        if out.exists():
            raise ValueError(f"out: {out} is there already, expected a name that is free")
        if to is not None:
            from safetensors.torch import save_file

            from ..integrations import retro_pytorch

            if set_ or (peer, prefix, dtype) != (None, None, None):
                raise ValueError("peer, prefix, dtype, set: got one with --to, which they do nothing for")
            model = Retro.from_pretrained(source)
            weights = exported(model.config, model.state_dict(), to)
            arguments = {
                name: getattr(value, "__name__", value) for name, value in retro_pytorch.arguments(model.config).items()
            }
            out.mkdir(parents=True)
            with replaced(out / "model.safetensors") as temporary:
                save_file({name: x.contiguous() for name, x in weights.items()}, temporary)
            write_json(out / "arguments.json", arguments)
            typer.echo(f"{out}: {len(weights)} tensors of {to}")
            return
        wanted: Any = None if dtype is None else getattr(torch, dtype, dtype)
        found = converted(source, peer=peer, prefix=prefix, dtype=wanted, **settings(set_ or []))
        from ..models.checkpoint import assemble

        tensors = (
            (source, name, x.to(wanted) if wanted is not None and x.is_floating_point() else x)
            for name, x in found.weights.items()
        )
        model = assemble(Retro, found.config, tensors, source)
        model.save_pretrained(out)
    counts = model.count_parameters()
    assumed = ", ".join(f"{name}={value}" for name, value in found.assumed.items())
    typer.echo(f"{source} is of {found.peer}: {len(found.weights)} tensors, every one accounted for")
    typer.echo("\n".join(f"  {part:16} {count:15,}" for part, count in counts.items()))
    if assumed:
        typer.echo(f"the weights do not tell {assumed}: where the model's differ, convert with --set name=value")
    typer.echo(f"{out}: use it with retro_kernels.models.Retro.from_pretrained, or retro-kernels generate")
