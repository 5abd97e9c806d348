"""The attentions of the neighbour encoder, `neighbour_self_attention` and `neighbour_cross_attention`: check the
arguments and run them as groups of one neighbour or one chunk each (`ops/attention/common.py`) on the backend that
`ops/backends.py` chooses."""

from __future__ import annotations

import torch

from . import backends, checks, plans
from .attention.common import CHUNK, NEIGHBOUR, Call, plain_lse


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
    logit_softcap: float | None = None,
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
        logit_softcap: c > 0: scaled logits x become c * tanh(x / c), before the bias is added (Gemma 2); None: no cap.
            "cuda" refuses it.
        dropout_p: in [0, 1), on the probabilities; rounded to a multiple of 2 ** -16.
        return_lse: also return the natural logarithm of the softmax's sum. It has a gradient,
            0 where nothing is visible.
        backend: "reference", "cpu", "triton" or "cuda"; None chooses, RETRO_KERNELS_BACKEND overrides None.

    Returns:
        [b, l, k, r, h, d_value] in the query's dtype, and with `return_lse` also [b, l, k, r, h] in fp32 (fp64 for
        fp64; -inf where nothing is visible).

    Raises:
        TypeError: an argument of the wrong type or dtype. ValueError: a wrong size, device or combination, an unknown
        backend, or an option that the named backend refuses. RuntimeError: the named backend cannot run here; a second
        derivative of a fused backend.
    """
    query_cos, query_sin = checks.pair(query_rotary)
    key_cos, key_sin = checks.pair(key_rotary)
    given = {
        "query": query,
        "key": key,
        "value": value,
        "mask": neighbour_mask,
        "attention_bias": attention_bias,
        "relative_key": relative_key,
        "content_bias": content_bias,
        "relative_bias": relative_bias,
        "query_cos": query_cos,
        "query_sin": query_sin,
        "key_cos": key_cos,
        "key_sin": key_sin,
    }
    signature = None
    if type(dropout_p) in (int, float) and dropout_p == 0 and sequence_starts is None:
        options = ("neighbour_self_attention", rotary_interleaved, causal, scale, logit_softcap, return_lse)
        signature = plans.signature(backend, options, given)
        plan = plans.get(signature)
        if plan is not None:
            out, lse = plan(given)
            return (out, plain_lse(lse)) if return_lse else out
    checks.tensor("query", query, checks.FLOATING)
    tensors = checks.autocast(given)
    query, key, value = (tensors[name] for name in ("query", "key", "value"))
    checks.heads(query, key, value, "b, l, k, r, h, d", "b, l, k, r, hk, d")
    b, l, k, r, _, d = query.shape
    hk, d_value = key.shape[-2], value.shape[-1]
    checks.shape("key", key, "b, l, k, r, hk, d", (b, l, k, r, hk, d))
    checks.shape("value", value, "b, l, k, r, hk, d_value", (b, l, k, r, hk, d_value))
    checks.mask("neighbour_mask", neighbour_mask, query, "b, l, k, r", (b, l, k, r))
    checks.positions(
        tensors,
        checks.Tables(r, r, "r", "r"),
        query_rotary,
        key_rotary,
        rotary_interleaved,
    )
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
        first_visible = checks.document_starts(sequence_starts, query, b, r).to(torch.int32)
    dropout_p, dropout_seed = checks.dropout_of(dropout_p, query)
    call = Call(
        operation="neighbour_self_attention",
        grouping=NEIGHBOUR,
        **tensors,
        rotary_interleaved=rotary_interleaved,
        first_visible=first_visible,
        dropout_seed=dropout_seed,
        causal=causal,
        scale=checks.scale_of(scale, query),
        logit_softcap=checks.softcap_of(logit_softcap),
        dropout_p=dropout_p,
        rows=r,
        stride=max(r, 1),
        return_lse=return_lse,
    )
    chosen = backends.choose(backends.ATTENTION, call, backend)
    out, lse = plans.run(backends.ATTENTION, chosen, call, signature, given, (*query.shape[:-1], d_value))
    return (out, plain_lse(lse)) if return_lse else out


def neighbour_cross_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    activation_mask: torch.Tensor | None = None,
    attention_bias: torch.Tensor | None = None,
    relative_key: torch.Tensor | None = None,
    content_bias: torch.Tensor | None = None,
    relative_bias: torch.Tensor | None = None,
    query_rotary: tuple[torch.Tensor, torch.Tensor] | None = None,
    key_rotary: tuple[torch.Tensor, torch.Tensor] | None = None,
    rotary_interleaved: bool = False,
    scale: float | None = None,
    logit_softcap: float | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """The tokens of every neighbour attend to the decoder activations of the chunk that it was retrieved for (RETRO,
    section 2.3). The k neighbours of a chunk share its keys and values, which are read in place and never repeated.
    The logits are, for neighbour token t and activation j (equation 7),

        scale * ((q + content_bias) . k + (q + relative_bias) . relative_key[t - j + m - 1]) + attention_bias[t, j]

    Any strides are read in place; a tensor whose last dimension is strided is copied first. Under autocast all floating
    inputs but the rotary tables are cast to the autocast dtype.

    Args:
        query: [b, l, k, r, h, d]; fp16, bf16, fp32 or fp64 (fp64 on the reference only).
        key: [b, l, m, hk, d] in the query's dtype; query head i reads head i // (h / hk).
        value: [b, l, m, hk, d_value] in the query's dtype. Empty b, l, k, r or m are valid.
        activation_mask: bool [b, l, m], True = attend to: the activations that a partial chunk has. What is masked
            reaches nothing, NaN included; where all are masked the output is 0.
        attention_bias: [h, r, m], in fp32 or the query's dtype.
        relative_key: [h, r + m - 1, d], the projected position of distance x - (m - 1) in row x.
        content_bias, relative_bias: [h, d], Transformer-XL's u and v; they need `relative_key`.
        query_rotary, key_rotary: (cos, sin) of [r, w] by neighbour token and of [m, w] by activation, w <= d / 2; they
            turn the first 2 w dimensions, have no gradient, and exclude `relative_key`.
        rotary_interleaved: pairs dimensions 2j and 2j + 1 instead of j and j + w.
        scale: any number; default d ** -0.5.
        logit_softcap: c > 0: scaled logits x become c * tanh(x / c), before the bias is added (Gemma 2); None: no cap.
            "cuda" refuses it.
        dropout_p: in [0, 1), on the probabilities; rounded to a multiple of 2 ** -16.
        return_lse: also return the natural logarithm of the softmax's sum. It has a gradient,
            0 where nothing is visible.
        backend: "reference", "cpu", "triton" or "cuda"; None chooses, RETRO_KERNELS_BACKEND overrides None.

    Returns:
        [b, l, k, r, h, d_value] in the query's dtype, and with `return_lse` also [b, l, k, r, h] in fp32 (fp64 for
        fp64; -inf where nothing is visible).

    Raises:
        TypeError: an argument of the wrong type or dtype. ValueError: a wrong size, device or combination, an unknown
        backend, or an option that the named backend refuses. RuntimeError: the named backend cannot run here; a second
        derivative of a fused backend.
    """
    query_cos, query_sin = checks.pair(query_rotary)
    key_cos, key_sin = checks.pair(key_rotary)
    given = {
        "query": query,
        "key": key,
        "value": value,
        "mask": activation_mask,
        "attention_bias": attention_bias,
        "relative_key": relative_key,
        "content_bias": content_bias,
        "relative_bias": relative_bias,
        "query_cos": query_cos,
        "query_sin": query_sin,
        "key_cos": key_cos,
        "key_sin": key_sin,
    }
    signature = None
    if type(dropout_p) in (int, float) and dropout_p == 0:
        options = ("neighbour_cross_attention", rotary_interleaved, scale, logit_softcap, return_lse)
        signature = plans.signature(backend, options, given)
        plan = plans.get(signature)
        if plan is not None:
            out, lse = plan(given)
            return (out, plain_lse(lse)) if return_lse else out
    checks.tensor("query", query, checks.FLOATING)
    tensors = checks.autocast(given)
    query, key, value = (tensors[name] for name in ("query", "key", "value"))
    checks.heads(query, key, value, "b, l, k, r, h, d", "b, l, m, hk, d")
    b, l, _, r, _, d = query.shape
    _, _, m, hk, _ = key.shape
    d_value = value.shape[-1]
    checks.shape("key", key, "b, l, m, hk, d", (b, l, m, hk, d))
    checks.shape("value", value, "b, l, m, hk, d_value", (b, l, m, hk, d_value))
    checks.mask("activation_mask", activation_mask, query, "b, l, m", (b, l, m))
    checks.positions(
        tensors,
        checks.Tables(r, m, "r", "m"),
        query_rotary,
        key_rotary,
        rotary_interleaved,
    )
    dropout_p, dropout_seed = checks.dropout_of(dropout_p, query)
    mask = None if activation_mask is None else activation_mask.unsqueeze(2)
    call = Call(
        operation="neighbour_cross_attention",
        grouping=CHUNK,
        **{**tensors, "key": key.unsqueeze(2), "value": value.unsqueeze(2), "mask": mask},
        rotary_interleaved=rotary_interleaved,
        dropout_seed=dropout_seed,
        scale=checks.scale_of(scale, query),
        logit_softcap=checks.softcap_of(logit_softcap),
        dropout_p=dropout_p,
        rows=r,
        stride=max(r, 1),
        return_lse=return_lse,
    )
    chosen = backends.choose(backends.ATTENTION, call, backend)
    out, lse = plans.run(backends.ATTENTION, chosen, call, signature, given, (*query.shape[:-1], d_value))
    return (out, plain_lse(lse)) if return_lse else out
