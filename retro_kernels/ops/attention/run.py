"""From a validated call to its result: the choice of a backend, and the fused backends' connection to autograd."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch

from .. import backends as backend_choice
from . import cpu, reference, triton
from .common import DIFFERENTIABLE, Call

BACKENDS = {"reference": reference, "cpu": cpu, "triton": triton}


def backends() -> dict[str, backend_choice.BackendStatus]:
    """Every backend's name -> whether it can run in this process (`available`) and if not why (`reason`)."""
    return backend_choice.status(BACKENDS)


def autocast(*tensors: Any) -> tuple[Any, ...]:
    """Floating tensors cast to the autocast dtype where the first one's device has autocast on. Like torch's own, it
    leaves fp64 alone."""
    device = tensors[0].device.type
    if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() and x.dtype != torch.float64 else x
        for x in tensors
    )


def run(call: Call, backend: str | None) -> tuple[torch.Tensor, torch.Tensor]:
    """-> out [b, lq, kq, n, h, d_value], lse [b, lq, kq, n, h]."""
    chosen = backend_choice.choose(call.operation, BACKENDS, call, backend)
    if chosen == "reference":
        device = call.query.device.type
        with torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext():
            return reference.attention(call)
    query_cos, query_sin = call.query_rotary or (None, None)
    key_cos, key_sin = call.key_rotary or (None, None)
    tensors = (
        call.query, call.key, call.value, call.mask, call.attention_bias, call.relative_key, call.content_bias,
        call.relative_bias, query_cos, query_sin, key_cos, key_sin, call.null_key, call.null_value,
        call.chunk_spans, call.first_visible, call.dropout_seed,
    )  # fmt: skip
    settings = (
        call.grouping, call.causal, call.rotary_interleaved, call.scale, call.dropout_p, call.stride, call.first_token
    )  # fmt: skip
    return FusedAttention.apply(chosen, settings, *(_unit_last_stride(x) for x in tensors))


def _unit_last_stride(x: torch.Tensor | None) -> torch.Tensor | None:
    """The kernels read vectors along the last dimension of floating tensors; any other stride is read in place."""
    if x is None or not x.is_floating_point() or x.stride(-1) == 1 or x.shape[-1] <= 1:
        return x
    return x.contiguous()


class FusedAttention(torch.autograd.Function):
    """Connects a backend's forward and backward ops to autograd. Keeps the inputs, the output and the lse."""

    @staticmethod
    def forward(ctx, backend, settings, *tensors):
        out, lse = BACKENDS[backend].forward(*tensors, *settings)
        ctx.backend, ctx.settings = backend, settings
        ctx.save_for_backward(*tensors, out, lse)
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx, grad_out, _):
        *tensors, out, lse = ctx.saved_tensors
        wanted = ctx.needs_input_grad[2:]
        results = BACKENDS[ctx.backend].backward(
            _unit_last_stride(grad_out), *tensors, out, lse, *ctx.settings,
            wanted[4], wanted[5] or wanted[6] or wanted[7], wanted[12] or wanted[13],
        )  # fmt: skip
        gradients = [None] * len(tensors)
        for place, gradient in zip(DIFFERENTIABLE, results):
            if wanted[place]:
                gradients[place] = gradient
        return None, None, *gradients
