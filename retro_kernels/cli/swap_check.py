"""`retro-kernels swap-check`: what `rk.swap` does to a model of yours, compared and timed on a probe batch."""

from __future__ import annotations

import importlib
import json
import statistics
import time
from typing import Annotated, Any

import typer


def model_of(name: str) -> Any:
    """`package.module:name`, a module or a function that makes one. Raises ValueError where there is none."""
    module, _, attribute = name.partition(":")
    try:
        found = importlib.import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"model: got {name!r}, expected package.module:name ({error})") from error
    return found


def compare(model: Any, call: Any, rounds: int) -> tuple[Any, dict[str, Any]]:
    """Swaps the model, which may be swapped already -> the report; largest differences of outputs and gradients, each
    over the largest value of the unswapped model's; and the median milliseconds of a step (forward and backward) of
    both, in turn."""
    import torch

    from ..integrations import swap, unswap

    outs: list[Any] = []
    gradients: list[Any] = []
    times: list[Any] = []
    unswap(model)
    for swapped in (False, True):
        report = swap(model) if swapped else None
        model.zero_grad()
        out = call(model)
        if not outs:
            gradient = torch.randn_like(out)
        out.backward(gradient)
        outs.append(out.detach())
        gradients.append({name: x.grad for name, x in model.named_parameters() if x.grad is not None})
    model.zero_grad()
    if gradients[0].keys() != gradients[1].keys():
        raise ValueError(f"gradients: got other ones: {sorted(gradients[0].keys() ^ gradients[1].keys())[:5]}")
    largest = max(x.abs().max().item() for x in gradients[0].values())
    worst = max((gradients[1][name] - x).abs().max().item() for name, x in gradients[0].items())
    for _ in range(rounds):
        pair = []
        for change in (unswap, swap):
            change(model)
            start = time.perf_counter()
            call(model).backward(gradient)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            pair.append(1e3 * (time.perf_counter() - start))
        times.append(pair)
    before, after = (statistics.median(x) for x in zip(*times))
    return report, {
        "output_difference": ((outs[1] - outs[0]).abs().max() / outs[0].abs().max()).item(),
        "gradient_difference": worst / largest,
        "unswapped_ms": before,
        "swapped_ms": after,
    }


def probe(model: Any, length: int | None) -> Any:
    """A function that calls a peer's whole model on random tokens, `length` or a few chunks of them -> logits. Raises
    ValueError for what is none."""
    from ..integrations.weights import PEERS

    for peer in PEERS.values():
        if peer.is_model(model):
            return peer.probe(model, length)
    raise ValueError(
        f"model: got a {type(model).__name__}, expected a whole model of {', '.join(PEERS)}, or a pair (model, call) "
        "whose call(model) gives logits"
    )


def swap_check(
    model: Annotated[
        str,
        typer.Argument(help="package.module:name of a model, of what makes it, or of a pair (model, call)."),
    ],
    length: Annotated[int | None, typer.Option(help="Tokens of the probe. Default: a few chunks.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Steps to time of each.")] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
) -> None:
    """Swaps MODEL, compares logits and gradients with the unswapped model's, times both, and prints.

    Exit code 1 where they differ by more than rounding (1e-3 of the largest).
    """
    import torch
    from torch import nn

    from .db_common import show_errors

    with show_errors(TypeError, code=2):
        made = model_of(model)
        if callable(made) and not isinstance(made, nn.Module):
            try:
                made = made()
            except TypeError as error:
                raise ValueError(
                    f"model: {model}() raised {error}, expected what makes a model from nothing"
                ) from error
        inner, call = made if isinstance(made, tuple) else (made, None)
        if not isinstance(inner, nn.Module):
            raise ValueError(f"model: {model} is a {type(inner).__name__}, expected a torch.nn.Module")
        torch.manual_seed(0)
        inner.eval()
        report, found = compare(inner, probe(inner, length) if call is None else call, rounds)
    agree = found["output_difference"] <= 1e-3 and found["gradient_difference"] <= 1e-3
    if as_json:
        typer.echo(json.dumps({"replaced": report.replaced, "skipped": report.skipped, "agree": agree, **found}))
    else:
        typer.echo(report)
        typer.echo(
            f"logits differ by {found['output_difference']:.1e}, gradients by {found['gradient_difference']:.1e}"
        )
        typer.echo(
            f"a step takes {found['unswapped_ms']:.1f} ms unswapped, {found['swapped_ms']:.1f} ms swapped: "
            f"{found['unswapped_ms'] / found['swapped_ms']:.2f}x"
        )
    if not agree:
        raise typer.Exit(1)
