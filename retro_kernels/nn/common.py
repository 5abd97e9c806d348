"""What the layers share: sizes of heads, and checks of constructor arguments."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import nn

from ..ops import checks
from ..ops.backends import ENVIRONMENT_VARIABLE
from ..ops.decoding.reference import by_group

POSITIONS = ("none", "relative", "rotary", "bias")
PROJECTIONS = ("query", "key", "value", "out")


NORMS = ("rms", "layer", "gated_rms")
Norm = str | Callable[[int], nn.Module]


class GatedRMSNorm(nn.RMSNorm):
    """weight * x / rms(x), times the sigmoid of gate * x (retro-pytorch's `gated_rmsnorm`)."""

    def __init__(self, width: int, eps: float | None = None, **factory: Any) -> None:
        super().__init__(width, eps=eps, **factory)
        self.gate = nn.Parameter(torch.ones(width, **factory))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * (x * self.gate).sigmoid()


def norm_maker(norm: Norm, eps: float | None, factory: dict[str, Any]) -> Callable[[int], nn.Module]:
    """Makes a norm for a width: one of NORMS, or what the function `norm` makes."""
    if not isinstance(norm, str):
        if eps is not None:
            raise ValueError(f"norm_eps: got {eps} with a norm of your own, expected None: that norm has its own")
        return norm
    one_of("norm", norm, NORMS)
    if norm == "layer":
        return lambda width: nn.LayerNorm(width, eps=1e-5 if eps is None else eps, **factory)
    kind = nn.RMSNorm if norm == "rms" else GatedRMSNorm
    return lambda width: kind(width, eps=1e-6 if eps is None else eps, **factory)


def head_sizes(model_dim: int, num_heads: int, num_kv_heads: int | None, head_dim: int | None) -> tuple[int, int]:
    """-> the number of key/value heads (default `num_heads`) and the head size (default `model_dim / num_heads`)."""
    num_kv_heads = checks.integer("num_kv_heads", num_heads if num_kv_heads is None else num_kv_heads, 1)
    if num_heads % num_kv_heads:
        raise ValueError(f"num_kv_heads: got {num_kv_heads}, expected a divisor of num_heads = {num_heads}")
    if head_dim is None:
        if model_dim % num_heads:
            raise ValueError(
                f"head_dim: got None and model_dim = {model_dim}, which num_heads = {num_heads} does not divide; "
                "give head_dim"
            )
        head_dim = model_dim // num_heads
    return num_kv_heads, checks.integer("head_dim", head_dim, 1)


def probability(name: str, value: float) -> float:
    value = checks.number(name, value)
    if not 0.0 <= value < 1.0:
        raise ValueError(f"{name}: got {value}, expected 0 <= {name} < 1")
    return value


def one_of(name: str, value: Any, choices: Collection[Any]) -> Any:
    if value not in choices:
        raise ValueError(f"{name}: got {value!r}, expected one of {', '.join(map(str, choices))}")
    return value


def biased_projections(biases: bool | Collection[str]) -> Collection[str]:
    """Which of PROJECTIONS have a bias."""
    if isinstance(biases, bool):
        return PROJECTIONS if biases else ()
    unknown = sorted(set(biases) - set(PROJECTIONS)) if not isinstance(biases, str) else [biases]
    if unknown:
        raise ValueError(f"biases: got {biases!r}, expected True, False or a collection of {', '.join(PROJECTIONS)}")
    return biases


def refuse_idle_options(positions: str | Collection[str], **options: dict[str, Any]) -> None:
    """Raises for an option (kind of positions -> name -> value, None if not given) whose kind is not used."""
    used = {positions} if isinstance(positions, str) else set(positions)
    for kind, settings in options.items():
        for name, value in settings.items():
            if kind not in used and value is not None:
                shown = " and ".join(f'"{x}"' for x in sorted(used))
                raise ValueError(f'{name}: got a value with positions={shown}, expected positions="{kind}"')


def exact(backend: str | None) -> bool:
    """Whether the reference was asked for by name, here or in the environment, outside a compiled graph: a layer then
    projects chunk by chunk (`linear`), and decoding a token gives the bits of the full computation."""
    name = os.environ.get(ENVIRONMENT_VARIABLE) if backend is None else backend
    return name == "reference" and not torch.compiler.is_compiling()


def linear(module: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, rows: int, exact: bool) -> torch.Tensor:
    """`module(x)`, x [..., in]; if `exact`, in products of `rows` rows each, which PyTorch rounds alike however many
    there are. Every projection of a layer that can decode goes through here."""
    return by_group(module, x, rows) if exact else module(x)


def check_hidden_and_neighbours(
    hidden: Any,
    hidden_width: tuple[str, int],
    name: str,
    neighbours: Any,
    width: tuple[str, int],
    neighbour_mask: Any,
) -> None:
    """Raises unless hidden is [b, n, .], `neighbours`, which the caller calls `name`, [b, l, k, r, .] on its device,
    and the mask bool [b, l, k, r] or None. Both widths come with the names of what they must equal."""
    checks.tensor("hidden", hidden, checks.FLOATING)
    checks.rank("hidden", hidden, f"b, n, {hidden_width[0]}")
    checks.tensor(name, neighbours, checks.FLOATING, hidden.device)
    checks.rank(name, neighbours, f"b, l, k, r, {width[0]}")
    for what, x, (size_name, size) in (("hidden", hidden, hidden_width), (name, neighbours, width)):
        if x.shape[-1] != size:
            raise ValueError(f"{what}: got width {x.shape[-1]}, expected {size_name} = {size}")
    if hidden.shape[0] != neighbours.shape[0]:
        raise ValueError(f"{name}: got batch {neighbours.shape[0]}, expected {hidden.shape[0]}, the batch of hidden")
    if neighbour_mask is not None:
        checks.tensor("neighbour_mask", neighbour_mask, (torch.bool,), hidden.device)
        checks.shape("neighbour_mask", neighbour_mask, "b, l, k, r", tuple(neighbours.shape[:-1]))
