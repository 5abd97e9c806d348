"""From a validated call to its result, on the backend that `ops/backends.py` chooses."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from .. import backends as backend_choice
from ..common import fused
from ..compiling import constant
from ..later import import_later
from . import cpu, cuda, reference
from .common import DIFFERENTIABLE, FLAGS, Call, plain_lse

triton = import_later(__package__, "triton")

BACKENDS = {"reference": reference, "cpu": cpu, "triton": triton, "cuda": cuda}


def backends() -> dict[str, backend_choice.BackendStatus]:
    """Every backend's name -> whether it can run in this process (`available`) and if not why (`reason`)."""
    return backend_choice.status(BACKENDS)


@constant  # torch 2.11's compiler does not trace the question
def has_autocast(device: str) -> bool:
    """Whether this type of device knows autocast."""
    return torch.amp.is_autocast_available(device)


def autocast(*tensors: Any) -> tuple[Any, ...]:
    """Floating tensors cast to the autocast dtype where the first one's device has autocast on. Like torch's own, it
    leaves fp64 alone."""
    device = tensors[0].device.type
    if not (has_autocast(device) and torch.is_autocast_enabled(device)):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() and x.dtype != torch.float64 else x
        for x in tensors
    )


def without_autocast(tensor: torch.Tensor) -> AbstractContextManager[object]:
    """What has been cast already must not be cast again: reference and kernels choose their precision themselves."""
    device = tensor.device.type
    return torch.autocast(device, enabled=False) if has_autocast(device) else nullcontext()


def run(call: Call, backend: str | None) -> tuple[torch.Tensor, torch.Tensor]:
    """-> out [b, lq, kq, n, h, d_value], lse [b, lq, kq, n, h]."""
    chosen = backend_choice.choose(call.operation, BACKENDS, call, backend)
    if chosen == "reference":
        with without_autocast(call.query):
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
    module = BACKENDS[chosen]
    out, lse = fused(module.forward, module.backward, DIFFERENTIABLE, FLAGS, settings, tensors)
    return out, plain_lse(out, lse)
