"""From a validated call to its result, on the backend that `ops/backends.py` chooses."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from .. import backends as backend_choice
from .. import plans
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


def planned(options: tuple[Any, ...], tensors: tuple[Any, ...]) -> tuple[Any, tuple[torch.Tensor, torch.Tensor] | None]:
    """-> the signature of a call of these options and tensors (those of SLOTS up to null_value, as the user gave
    them) and, where a call like it was checked before, its result as `run` gives it."""
    signature = plans.signature(options, tensors)
    plan = None if signature is None else plans.get(signature)
    if plan is None:
        return signature, None
    out, lse = plan((*tensors, None, None, None))
    return signature, (out, plain_lse(out, lse))


def rotary(tables: Any) -> tuple[Any, Any]:
    """cos and sin for `planned`; what is no pair of tables has no plan."""
    if tables is None:
        return None, None
    return tables if type(tables) is tuple and len(tables) == 2 else (tables, tables)


def run(
    call: Call, backend: str | None, signature: Any = None, arrange: Callable[[list[Any]], None] | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """-> out [b, lq, kq, n, h, d_value], lse [b, lq, kq, n, h]. With a `signature` of `planned` the CPU's plan is kept;
    `arrange` brings the tensors that the user gave into the call's form."""
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
    if chosen == "cpu" and signature is not None:
        plans.keep(signature, plans.Plan(cpu, DIFFERENTIABLE, FLAGS, settings, tensors, arrange, call.return_lse))
    out, lse = fused(module.forward, module.backward, DIFFERENTIABLE, FLAGS, settings, tensors, call.return_lse)
    return out, plain_lse(out, lse)
