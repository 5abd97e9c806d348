"""From a validated decode call to its result: the choice of a backend, and what comes before and after its kernel."""

from __future__ import annotations

import torch

from .. import backends as backend_choice
from ..attention.run import without_autocast
from ..later import import_later
from . import common, cpu, cuda, reference

triton = import_later(__package__, "triton")

BACKENDS = {"reference": reference, "cpu": cpu, "triton": triton, "cuda": cuda}


def run(call: common.DecodeCall, backend: str | None) -> tuple[torch.Tensor, torch.Tensor]:
    """-> out [b, t, h, d_value], lse [b, t, h]."""
    chosen = backend_choice.choose(call.operation, BACKENDS, call, backend)
    with without_autocast(call.query):
        if chosen == "reference":
            return reference.decode(call)
        module = BACKENDS[chosen]
        # The CPU's own product keeps decoding with relative positions bitwise the same for any number of threads.
        logit_bias = common.logit_bias(call, cpu.project_few if chosen == "cpu" else common.project)
        if call.projection is None:
            return _decode(call, logit_bias, module.decode)
        return _decode_projected(call, call.projection, logit_bias, module.decode, module.project)


def _decode(call: common.DecodeCall, logit_bias: torch.Tensor | None, fused) -> tuple[torch.Tensor, torch.Tensor]:
    content = common.content_query(call)
    null_logit = common.null_logit(call, content)
    return fused(*_arguments(call, content, logit_bias, null_logit, call.null_value))


def _decode_projected(call: common.DecodeCall, projection: common.Projection, logit_bias, fused, project):
    """W_k acts on the query and W_v on the weighted sum of the states, [b, t, h, e] each: no key or value exists.

    `bias_key` adds the same to all logits of a row but the null slot's, so it is taken from the null slot's instead and
    given back to the lse. `bias_value` comes in with all the weight that the null slot leaves.
    """
    b, t, h, _ = call.query.shape
    hk, d_value, e = projection.w_value.shape
    content = common.content_query(call)
    null_logit = common.null_logit(call, content)
    shift = None
    if projection.bias_key is not None:
        bias = projection.bias_key.float().repeat_interleave(h // hk, dim=0)
        shift = call.scale * (content.float() * bias).sum(-1)
    absorbed = project(content.flatten(0, 1), projection.w_key, False).view(b, t, h, e)
    shifted = null_logit if null_logit is None or shift is None else null_logit - shift
    weighted, lse = fused(*_arguments(call, absorbed, logit_bias, shifted, None))
    out = project(weighted.flatten(0, 1), projection.w_value, True).view(b, t, h, d_value)
    if null_logit is None and projection.bias_value is None:
        return out, lse if shift is None else torch.where(lse == float("-inf"), lse, lse + shift)
    empty = lse == float("-inf")
    p_null = 0.0 if shifted is None else (shifted - lse).exp().masked_fill(empty, 0.0)[..., None]
    total = out.float()
    if projection.bias_value is not None:
        bias = projection.bias_value.float().repeat_interleave(h // hk, dim=0)
        total = total + (1.0 - p_null) * bias * ~empty[..., None]
    if call.null_value is not None:
        total = total + p_null * call.null_value.float()
    return total.to(call.query.dtype), lse if shift is None else torch.where(empty, lse, lse + shift)


def _arguments(call: common.DecodeCall, query, logit_bias, null_logit, null_value) -> tuple:
    key_cos, key_sin = call.key_rotary or (None, None)
    key = _unit_last_stride(call.key)
    return (
        _unit_last_stride(query), key, key if call.value is call.key else _unit_last_stride(call.value), call.mask,
        logit_bias, null_logit, _unit_last_stride(null_value), _unit_last_stride(key_cos),
        _unit_last_stride(key_sin), call.key_scale, call.value_scale, call.position, call.valid, call.chunk,
        call.rotary_interleaved, call.scale, call.chunk_size,
    )  # fmt: skip


def _unit_last_stride(x: torch.Tensor | None) -> torch.Tensor | None:
    return x if x is None or x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()
