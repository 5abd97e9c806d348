"""`projected_chunked_cross_attention_decode`: checks the arguments; the call itself is the other decode operation's."""

from __future__ import annotations

from typing import Any

import torch

from .. import validate
from ..attention.run import autocast
from ..chunked_cross_attention_decode.api import cast_cache, check_cache, check_query, decode
from ..chunked_cross_attention_decode.common import Projection


def projected_chunked_cross_attention_decode(
    query: torch.Tensor,
    encoded: torch.Tensor,
    w_key: torch.Tensor,
    w_value: torch.Tensor,
    *,
    chunk_size: int,
    position: torch.Tensor,
    bias_key: torch.Tensor | None = None,
    bias_value: torch.Tensor | None = None,
    encoded_scale: torch.Tensor | None = None,
    valid: torch.Tensor | None = None,
    chunk: torch.Tensor | None = None,
    neighbour_mask: torch.Tensor | None = None,
    attention_bias: torch.Tensor | None = None,
    relative_key: torch.Tensor | None = None,
    content_bias: torch.Tensor | None = None,
    relative_bias: torch.Tensor | None = None,
    query_rotary: Any = None,
    key_rotary: Any = None,
    rotary_interleaved: bool = False,
    null_key: torch.Tensor | None = None,
    null_value: torch.Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    validate: bool = False,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """`chunked_cross_attention_decode` from the encoder's states: their keys and values are never made.

    W_k acts on the query and W_v on the weighted sum of the states, so the cache is k * r states of e numbers, shared
    by all heads and all layers, instead of keys and values of 2 hk d numbers for each layer. W_k and W_v are read
    besides, once whatever the batch: up to a batch of about e / (k r) a cache of keys and values has fewer bytes to
    read.

    Args:
        query: [b, t, h, d].
        encoded: [b, k, r, e] in the query's dtype, or int8 or float8_e4m3fn with `encoded_scale`; e is at most 4096 on
            the fused backends.
        w_key, w_value: [hk, d, e] and [hk, d_value, e] in the query's dtype; query head i uses those of i // (h / hk).
        bias_key, bias_value: [hk, d] and [hk, d_value], in fp32 or the query's dtype.
        encoded_scale: fp32 [b, k, r], what a quantised cache is multiplied with.
        query_rotary, key_rotary, rotary_interleaved: refused. A turned key is not a projection of the state.

    The other arguments, the result and the errors are those of `chunked_cross_attention_decode`.
    """
    check_query(query)
    for name, given in (("query_rotary", query_rotary is not None), ("key_rotary", key_rotary is not None),
                        ("rotary_interleaved", rotary_interleaved)):  # fmt: skip
        if given:
            raise ValueError(
                f"{name}: rotary positions cannot be used with a cache of encoder states: keys are turned after W_k, "
                "by an angle of their own each, so that W_k cannot act on the query instead. Cache keys and values "
                "and call chunked_cross_attention_decode"
            )
    (query, w_key, w_value, bias_key, bias_value, attention_bias, relative_key, content_bias, relative_bias, null_key,
     null_value) = autocast(
        query, w_key, w_value, bias_key, bias_value, attention_bias, relative_key, content_bias, relative_bias,
        null_key, null_value,
    )  # fmt: skip
    encoded = cast_cache("encoded", encoded, query)
    k, r = _check_states(query, encoded, encoded_scale)
    d_value = _check_projection(query, w_key, w_value, bias_key, bias_value, encoded.shape[-1])
    states = encoded.unsqueeze(3)
    return decode(
        "projected_chunked_cross_attention_decode", query, states, states,
        Projection(w_key, w_value, bias_key, bias_value), d_value, k, r, chunk_size=chunk_size, position=position,
        valid=valid, chunk=chunk, neighbour_mask=neighbour_mask, attention_bias=attention_bias,
        relative_key=relative_key, content_bias=content_bias, relative_bias=relative_bias, query_rotary=None,
        key_rotary=None, rotary_interleaved=False, null_key=null_key, null_value=null_value, scale=scale,
        key_scale=encoded_scale, value_scale=encoded_scale, return_lse=return_lse, synchronise=validate,
        backend=backend,
    )  # fmt: skip


def _check_states(query: torch.Tensor, encoded: Any, encoded_scale: torch.Tensor | None) -> tuple[int, int]:
    """-> k, r."""
    k, r = check_cache("encoded", encoded, encoded_scale, "encoded_scale", query, "b, k, r, e")
    e = encoded.shape[-1]
    validate.shape("encoded", encoded, "b, k, r, e", (query.shape[0], k, r, e))
    if e == 0:
        raise ValueError(f"encoded: got shape {list(encoded.shape)}, expected e at least 1")
    return k, r


def _check_projection(query, w_key, w_value, bias_key, bias_value, e: int) -> int:
    """-> d_value."""
    _, _, h, d = query.shape
    for name, weight in (("w_key", w_key), ("w_value", w_value)):
        validate.tensor(name, weight, (query.dtype,), query.device)
        if weight.dim() != 3:
            raise ValueError(f"{name}: got shape {list(weight.shape)}, expected [hk, d, e]")
    hk, d_value = w_key.shape[0], w_value.shape[1]
    if hk == 0 or h % hk != 0:
        raise ValueError(f"w_key: got {hk} key/value heads, expected a divisor of the query's {h} heads")
    if d_value == 0:
        raise ValueError(f"w_value: got shape {list(w_value.shape)}, expected d_value at least 1")
    validate.shape("w_key", w_key, "hk, d, e", (hk, d, e))
    validate.shape("w_value", w_value, "hk, d_value, e", (hk, d_value, e))
    for name, bias, letter, size in (("bias_key", bias_key, "d", d), ("bias_value", bias_value, "d_value", d_value)):
        if bias is not None:
            validate.tensor(name, bias, (query.dtype, torch.float32), query.device)
            validate.shape(name, bias, f"hk, {letter}", (hk, size))
    return d_value
