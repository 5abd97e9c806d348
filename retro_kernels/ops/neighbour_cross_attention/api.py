"""`neighbour_cross_attention`: checks the arguments and runs them as groups of one chunk each
(`ops/attention/common.py`) on the backend that `ops/backends.py` chooses."""

from __future__ import annotations

from typing import Any

import torch

from .. import validate
from ..attention import arguments
from ..attention.common import CHUNK, Call
from ..attention.run import autocast, planned, rotary, run


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
    if type(dropout_p) in (int, float) and dropout_p == 0:
        signature, known = planned(
            ("neighbour_cross_attention", rotary_interleaved, scale, return_lse, backend),
            (query, key, value, activation_mask, attention_bias, relative_key, content_bias, relative_bias,
             *rotary(query_rotary), *rotary(key_rotary), None, None),
        )  # fmt: skip
        if known is not None:
            return known if return_lse else known[0]
    validate.tensor("query", query, validate.FLOATING)
    query, key, value, attention_bias, relative_key, content_bias, relative_bias = autocast(
        query, key, value, attention_bias, relative_key, content_bias, relative_bias
    )
    arguments.check_heads(query, key, value, "b, l, k, r, h, d", "b, l, m, hk, d")
    b, l, _, r, _, d = query.shape
    _, _, m, hk, _ = key.shape
    d_value = value.shape[-1]
    validate.shape("key", key, "b, l, m, hk, d", (b, l, m, hk, d))
    validate.shape("value", value, "b, l, m, hk, d_value", (b, l, m, hk, d_value))
    arguments.check_mask("activation_mask", activation_mask, query, "b, l, m", (b, l, m))
    arguments.check_positions(
        query, arguments.Tables(r, m, "r", "m"), attention_bias, relative_key, content_bias, relative_bias,
        query_rotary, key_rotary, rotary_interleaved,
    )  # fmt: skip
    dropout_p, dropout_seed = arguments.checked_dropout(dropout_p, query)
    call = Call(
        operation="neighbour_cross_attention", grouping=CHUNK, query=query, key=key.unsqueeze(2),
        value=value.unsqueeze(2), mask=None if activation_mask is None else activation_mask.unsqueeze(2),
        attention_bias=attention_bias, relative_key=relative_key, content_bias=content_bias,
        relative_bias=relative_bias, query_rotary=arguments.pair(query_rotary), key_rotary=arguments.pair(key_rotary),
        rotary_interleaved=rotary_interleaved, null_key=None, null_value=None, chunk_spans=None, first_visible=None,
        dropout_seed=dropout_seed, causal=False, scale=arguments.checked_scale(scale, query), dropout_p=dropout_p,
        rows=r, stride=max(r, 1), first_token=0, return_lse=return_lse,
    )  # fmt: skip
    out, lse = run(call, backend, signature, arrange=_add_neighbour_axis)
    return (out, lse) if return_lse else out


def _add_neighbour_axis(slots: list[Any]) -> None:
    for place in (1, 2, 3):
        if slots[place] is not None:
            slots[place] = slots[place].unsqueeze(2)
