"""What all operations and backends share: private op registration and output allocation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

LIBRARY = torch.library.Library("retro_kernels", "FRAGMENT")


def allocate(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """An uninitialised contiguous tensor. Every output and scratch buffer of a fused backend is made here,
    so that a test can replace it by one that fills with NaN and puts guard bands round the memory."""
    return torch.empty(shape, dtype=dtype, device=device)


def register(schema: str, *, implementation: Callable, fake: Callable, devices: tuple[str, ...]) -> Callable:
    """Defines a private `retro_kernels::` op with its kernels and its fake; returns the callable overload.

    Plain `define`/`impl` costs half of `custom_op` per call. Autograd is not registered here: an
    `autograd.Function` in `api.py` calls these ops with grad mode off.
    """
    name = schema.split("(", 1)[0]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    for device in devices:
        LIBRARY.impl(name, implementation, {"cpu": "CPU", "cuda": "CUDA"}[device])
    torch.library.register_fake(f"retro_kernels::{name}", fake, lib=LIBRARY)
    return getattr(torch.ops.retro_kernels, name).default


def register_pair(
    operation: str,
    backend: str,
    *,
    schemas: tuple[str, str],
    implementations: tuple[Callable, Callable],
    fakes: tuple[Callable, Callable],
    devices: tuple[str, ...],
) -> tuple[Callable, Callable]:
    """`<operation>_forward_<backend>` and `<operation>_backward_<backend>`, whose own derivative raises and is not
    silently zero."""
    forward, backward = (
        register(schema, implementation=implementation, fake=fake, devices=devices)
        for schema, implementation, fake in zip(schemas, implementations, fakes)
    )

    def raise_on_backward(ctx, *gradients):
        raise RuntimeError(
            "retro_kernels' fused kernels have no second derivative: the gradient of a gradient was asked for "
            '(create_graph=True and another backward). Use backend="reference", which PyTorch differentiates twice.'
        )

    torch.library.register_autograd(f"retro_kernels::{operation}_backward_{backend}", raise_on_backward, lib=LIBRARY)
    return forward, backward


def unit_last_stride(x: torch.Tensor | None) -> torch.Tensor | None:
    """The kernels read vectors along the last dimension of floating tensors; any other stride is read in place."""
    if x is None or not x.is_floating_point() or x.stride(-1) == 1 or x.shape[-1] <= 1:
        return x
    return x.contiguous()


class _Fused(torch.autograd.Function):
    """See `fused`. Keeps the inputs, the output and the lse."""

    @staticmethod
    def forward(ctx, forward_op, backward_op, differentiable, flags, settings, *tensors):
        tensors = tuple(unit_last_stride(x) for x in tensors)
        out, lse = forward_op(*tensors, *settings)
        ctx.backward_op, ctx.differentiable, ctx.flags, ctx.settings = backward_op, differentiable, flags, settings
        ctx.save_for_backward(*tensors, out, lse)
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx, grad_out, _):
        *tensors, out, lse = ctx.saved_tensors
        wanted = ctx.needs_input_grad[5:]
        flags = [any(wanted[place] for place in places) for places in ctx.flags]
        results = ctx.backward_op(unit_last_stride(grad_out), *tensors, out, lse, *ctx.settings, *flags)
        gradients = [None] * len(tensors)
        for place, gradient in zip(ctx.differentiable, results):
            if wanted[place]:
                gradients[place] = gradient
        return None, None, None, None, None, *gradients


def fused(
    forward_op: Callable,
    backward_op: Callable,
    differentiable: Sequence[int],
    flags: Sequence[Sequence[int]],
    settings: tuple[Any, ...],
    tensors: tuple[Any, ...],
) -> tuple[torch.Tensor, torch.Tensor]:
    """The output and the lse of `forward_op(*tensors, *settings)`, with `backward_op` as its derivative.

    `differentiable`: which of the tensors have a gradient, in the order in which the backward op returns them. `flags`:
    for each flag that ends the backward op's arguments, the tensors any of whose gradients it asks for.
    """
    # torch.compile does not trace an autograd.Function that is given one tensor twice, and self-attention's query is
    # often its key too: every repetition becomes a view of its own.
    apart: list[Any] = []
    for x in tensors:
        apart.append(x.view_as(x) if x is not None and any(x is other for other in apart) else x)
    return _Fused.apply(forward_op, backward_op, differentiable, flags, settings, *apart)
