"""`neighbour_self_attention`: checks the arguments and runs them as groups of one neighbour each
(`ops/attention/common.py`) on the backend that `ops/backends.py` chooses."""

from __future__ import annotations

import torch

from .. import validate
from ..attention import arguments
from ..attention.common import NEIGHBOUR, Call
from ..attention.run import autocast, planned, rotary, run


def neighbour_self_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    neighbour_mask: torch.Tensor | None = None,
    attention_bias: torch.Tensor | None = None,
    relative_key: torch.Tensor | None = None,
    content_bias: torch.Tensor | None = None,
    relative_bias: torch.Tensor | None = None,
    query_rotary: tuple[torch.Tensor, torch.Tensor] | None = None,
    key_rotary: tuple[torch.Tensor, torch.Tensor] | None = None,
    rotary_interleaved: bool = False,
    causal: bool = False,
    sequence_starts: torch.Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """The tokens of every neighbour attend to the tokens of the same neighbour (RETRO, section 2.3), in both directions
    unless `causal`. With l = k = 1 and `causal` it is a decoder's self-attention over r = n tokens, in memory linear
    in n. The logits are

        scale * ((q + content_bias) . k + (q + relative_bias) . relative_key[t - t' + r - 1]) + attention_bias[t, t']

    Any strides are read in place; a tensor whose last dimension is strided is copied first. Under autocast all floating
    inputs but the rotary tables are cast to the autocast dtype.

    Args:
        query: [b, l, k, r, h, d]; fp16, bf16, fp32 or fp64 (fp64 on the reference only).
        key: [b, l, k, r, hk, d] in the query's dtype; query head i reads head i // (h / hk).
        value: [b, l, k, r, hk, d_value] in the query's dtype. Empty b, l, k or r are valid.
        neighbour_mask: bool [b, l, k, r], True = attend to. A masked token's key and value reach nothing, NaN included;
            its own row is still computed from the visible ones. Where all are masked the output is 0.
        attention_bias: [h, r, r], in fp32 or the query's dtype.
        relative_key: [h, 2 r - 1, d], the projected position of distance x - (r - 1) in row x.
        content_bias, relative_bias: [h, d], Transformer-XL's u and v; they need `relative_key`.
        query_rotary, key_rotary: (cos, sin), [r, w] each, w <= d / 2; they turn the first 2 w dimensions, have no
            gradient, and exclude `relative_key`.
        rotary_interleaved: pairs dimensions 2j and 2j + 1 instead of j and j + w.
        causal: token t sees t' <= t only.
        sequence_starts: bool [b, r], True at the first token of every document packed into a row; needs `causal` and
            l = k = 1, and excludes `attention_bias`. Tokens see their own document only, and positions restart with it.
        scale: any number; default d ** -0.5.
        dropout_p: in [0, 1), on the probabilities; rounded to a multiple of 2 ** -16.
        return_lse: also return the natural logarithm of the softmax's sum.
        backend: "reference", "cpu", "triton" or "cuda"; None chooses, RETRO_KERNELS_BACKEND overrides None.

    Returns:
        [b, l, k, r, h, d_value] in the query's dtype, and with `return_lse` also [b, l, k, r, h] in fp32 (fp64 for
        fp64; -inf where nothing is visible).

    Raises:
        TypeError: an argument of the wrong type or dtype. ValueError: a wrong size, device or combination, an unknown
        backend, or an option that the named backend refuses. RuntimeError: the named backend cannot run here; a second
        derivative of a fused backend.
    """
    signature = None
    if type(dropout_p) in (int, float) and dropout_p == 0 and sequence_starts is None:
        signature, known = planned(
            ("neighbour_self_attention", rotary_interleaved, causal, scale, return_lse, backend),
            (query, key, value, neighbour_mask, attention_bias, relative_key, content_bias, relative_bias,
             *rotary(query_rotary), *rotary(key_rotary), None, None),
        )  # fmt: skip
        if known is not None:
            return known if return_lse else known[0]
    validate.tensor("query", query, validate.FLOATING)
    query, key, value, attention_bias, relative_key, content_bias, relative_bias = autocast(
        query, key, value, attention_bias, relative_key, content_bias, relative_bias
    )
    arguments.check_heads(query, key, value, "b, l, k, r, h, d", "b, l, k, r, hk, d")
    b, l, k, r, _, d = query.shape
    hk, d_value = key.shape[-2], value.shape[-1]
    validate.shape("key", key, "b, l, k, r, hk, d", (b, l, k, r, hk, d))
    validate.shape("value", value, "b, l, k, r, hk, d_value", (b, l, k, r, hk, d_value))
    arguments.check_mask("neighbour_mask", neighbour_mask, query, "b, l, k, r", (b, l, k, r))
    arguments.check_positions(
        query, arguments.Tables(r, r, "r", "r"), attention_bias, relative_key, content_bias, relative_bias,
        query_rotary, key_rotary, rotary_interleaved,
    )  # fmt: skip
    if not isinstance(causal, bool):
        raise TypeError(f"causal: got {causal!r}, expected True or False")
    first_visible = None
    if sequence_starts is not None:
        if not causal or (l, k) != (1, 1):
            raise ValueError(
                f"sequence_starts: got causal={causal}, l = {l} and k = {k}, expected causal=True and l = k = 1: it is "
                "for a decoder's packed rows"
            )
        if attention_bias is not None:
            raise ValueError(
                "attention_bias: got sequence_starts too, whose positions restart with every document, which a table "
                "[h, r, r] by place in the row does not: drop one of them, or use relative_key"
            )
        first_visible = arguments.document_starts(sequence_starts, query, b, r).to(torch.int32)
    dropout_p, dropout_seed = arguments.checked_dropout(dropout_p, query)
    call = Call(
        operation="neighbour_self_attention", grouping=NEIGHBOUR, query=query, key=key, value=value,
        mask=neighbour_mask, attention_bias=attention_bias, relative_key=relative_key, content_bias=content_bias,
        relative_bias=relative_bias, query_rotary=arguments.pair(query_rotary), key_rotary=arguments.pair(key_rotary),
        rotary_interleaved=rotary_interleaved, null_key=None, null_value=None, chunk_spans=None,
        first_visible=first_visible, dropout_seed=dropout_seed, causal=causal,
        scale=arguments.checked_scale(scale, query), dropout_p=dropout_p, rows=r, stride=max(r, 1), first_token=0,
        return_lse=return_lse,
    )  # fmt: skip
    out, lse = run(call, backend, signature)
    return (out, lse) if return_lse else out
