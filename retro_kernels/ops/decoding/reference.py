"""Decoding in plain PyTorch: the specification. Each new token is put into its row of an otherwise empty chunk, and the
chunk attends to its neighbours exactly as in the full computation.

This is why a token decoded alone gets the same bits as in the full computation: the products of matrices, which PyTorch
rounds differently for other shapes, have the shape they have there. It does the work of a whole chunk for every call;
the fused backends do that of the tokens given.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from ..attention import reference as attention
from ..attention.common import CLOCK, Call
from . import common


def unavailable() -> None:
    """Plain PyTorch runs everywhere."""


def refusal(call: common.DecodeCall) -> None:
    """The specification refuses nothing."""


def attend(call: common.DecodeCall) -> tuple[torch.Tensor, torch.Tensor]:
    """-> out [b, t, h, d_value] in the query's dtype, lse [b, t, h] fp32 (fp64 for fp64), detached."""
    b, t, h, d = call.query.shape
    m = call.chunk_size
    compute = attention.accumulation_dtype(call.query.dtype)

    # Rows of the chunk that no token of this call takes see nothing, and their results are dropped. Tokens that do not
    # attend share a row of their own, which is cut off.
    state, row = common.states(call), common.rows(call)
    attends = state == common.ATTENDS
    # What no token sees holds anything: what is masked, and the cache of a sequence that reads none of it.
    mask = attends.any(1)[:, None, None].expand(call.key.shape[:3])
    if call.mask is not None:
        mask = mask & call.mask
    key, value = _keys_and_values(call, mask, compute)
    place = (torch.where(attends, row, m) + torch.arange(b, device=row.device)[:, None] * (m + 1)).flatten()
    query = torch.where(attends[..., None, None], call.query, 0.0)
    chunk = query.new_zeros(b * (m + 1), h, d).index_copy(0, place, query.reshape(-1, h, d))
    chunk = chunk.view(b, m + 1, h, d)[:, None, :m]
    taken = torch.zeros(b * (m + 1), dtype=torch.bool, device=row.device).index_fill(0, place, True)
    taken = taken.view(b, m + 1)[:, None, :m]

    query_cos, query_sin = call.query_cos, call.query_sin
    if query_cos is not None and query_sin is not None and call.key_rotary is None:  # the cache's keys are turned
        tables = query_cos.detach().to(compute), query_sin.detach().to(compute)
        chunk = attention.rotate(chunk.to(compute), tables, call.rotary_interleaved)
        query_cos = query_sin = None
    rows = Call(
        operation=call.operation,
        grouping=CLOCK,
        query=chunk,
        key=key,
        value=value,
        mask=mask,
        attention_bias=call.attention_bias,
        relative_key=call.relative_key,
        content_bias=call.content_bias,
        relative_bias=call.relative_bias,
        query_cos=query_cos,
        query_sin=query_sin,
        key_cos=call.key_cos,
        key_sin=call.key_sin,
        rotary_interleaved=call.rotary_interleaved,
        null_key=call.null_key,
        null_value=call.null_value,
        scale=call.scale,
        logit_softcap=call.logit_softcap,
        rows=m,
        stride=m,
        return_lse=True,
    )
    nowhere = torch.zeros(b, 1, m, dtype=torch.int64, device=row.device)
    out, lse = attention.attend_folded(rows, chunk, key, value, mask, nowhere, nowhere, taken)
    out, lse = (
        torch.cat([x[:, 0], x.new_full((b, 1, *x.shape[3:]), idle)], dim=1).flatten(0, 1)[place]
        for x, idle in ((out, 0.0), (lse, float("-inf")))
    )
    out, lse = out.view(b, t, h, value.shape[-1]).to(call.query.dtype), lse.view(b, t, h)
    beyond = (state == common.BEYOND)[..., None]
    return out.masked_fill(beyond[..., None], float("nan")), lse.masked_fill(beyond, float("nan"))


def _keys_and_values(
    call: common.DecodeCall, seen: torch.Tensor, compute: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """[b, k, r, hk, d | d_value]: dequantised, and projected where the cache holds encoder states. `seen`: bool
    [b, k, r], the tokens that some query sees."""
    key = _dequantised(call.key, call.key_scale, compute)
    if call.w_key is None or call.w_value is None:
        return key, _dequantised(call.value, call.value_scale, compute)
    encoded = key[..., 0, :]
    encoded = torch.where(seen[..., None], encoded, 0.0)  # NaN would reach the gradients of w_key and w_value
    k, r = encoded.shape[1:3]

    def project(weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        flat = weight.to(compute).flatten(0, 1), None if bias is None else bias.to(compute).flatten()
        return by_group(lambda states: F.linear(states, *flat), encoded, k * r).unflatten(-1, weight.shape[:2])

    return project(call.w_key, call.bias_key), project(call.w_value, call.bias_value)


def by_group(linear: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, rows: int) -> torch.Tensor:
    """`linear(x)` for x [..., in], computed `rows` rows at a time, so that a group of rows gets the same bits whatever
    other groups there are."""
    if x.numel() == 0:
        return linear(x)
    groups = x.reshape(-1, rows, x.shape[-1])
    return torch.stack([linear(group) for group in groups]).view(*x.shape[:-1], -1)


def _dequantised(cache: torch.Tensor, scale: torch.Tensor | None, compute: torch.dtype) -> torch.Tensor:
    cache = cache.to(compute)
    return cache if scale is None else cache * scale.to(compute)[..., None, None]
