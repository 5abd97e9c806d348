"""Projected chunked cross-attention in plain PyTorch: keys and values are made in fp32 (fp64 for fp64 input), and
attended to as `ops/attention/reference.py` specifies. It is the specification of both strategies."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..attention import common as attention_common
from ..attention import reference as attention_reference
from .common import Call


def unavailable() -> None:
    """Plain PyTorch runs everywhere."""


def refusal(call: Call) -> None:
    """The specification refuses nothing."""


def attend(call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    """-> out [b, n, h, d_value] in the query's dtype, lse [b, n, h] fp32 (fp64 for fp64 input)."""
    b, n, h, d = call.query.shape
    compute = attention_reference.accumulation_dtype(call.query.dtype)
    # What no token sees, NaN included, must not reach the gradient of a weight: 0 * NaN in the product's derivative.
    encoded = torch.where(_visible_tokens(call)[..., None], call.encoded.to(compute), 0.0)

    def project(weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        flat = None if bias is None else bias.to(compute).flatten()
        return F.linear(encoded, weight.to(compute).flatten(0, 1), flat).unflatten(-1, weight.shape[:2])

    core = attention_common.Call(
        operation=call.operation,
        grouping=attention_common.CLOCK,
        query=call.query.view(b, 1, 1, n, h, d),
        key=project(call.w_key, call.bias_key),
        value=project(call.w_value, call.bias_value),
        mask=call.mask,
        attention_bias=call.attention_bias,
        relative_key=call.relative_key,
        content_bias=call.content_bias,
        relative_bias=call.relative_bias,
        null_key=call.null_key,
        null_value=call.null_value,
        chunk_spans=call.chunk_spans,
        dropout_seed=call.dropout_seed,
        scale=call.scale,
        dropout_p=call.dropout_p,
        rows=call.rows,
        stride=call.stride,
        first_token=call.first_token,
        return_lse=call.return_lse,
    )
    out, lse = attention_reference.attend(core)
    return out[:, 0, 0], lse[:, 0, 0]


def _visible_tokens(call: Call) -> torch.Tensor:
    """bool [b, l, k, r]: the tokens that are not masked, of the chunks that some token attends to."""
    n, l, device = call.query.shape[1], call.encoded.shape[1], call.encoded.device
    if call.chunk_spans is None:
        first, last = attention_common.attended_chunks(n, l, call.stride, call.first_token)
        chunk = torch.arange(l, device=device)
        attended = (chunk >= first) & (chunk < last)
    else:
        attended = call.chunk_spans[..., 1] > 0
    attended = attended[..., None, None].expand(call.encoded.shape[:4])
    return attended if call.mask is None else attended & call.mask
