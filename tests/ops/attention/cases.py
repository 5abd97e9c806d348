"""The cases that every backend must get right. `retro_kernels/testing.py` has what makes them and how their results are
compared.

The same cases run on the reference (against the oracle, `tests/ops/oracle.py`) and on every fused backend (against the
reference in fp64). What runs against the oracle on every backend is in `tests/ops/test_matrix.py` and beside it.
"""

from __future__ import annotations

from typing import Any

import oracle
import torch

from retro_kernels.ops import dropout
from retro_kernels.testing import (  # noqa: F401 - what the tests take from here
    Case,
    as_dtype,
    assert_close,
    assert_twice,
    differentiable,
    error,
    make,
    name_of,
    operation,
    results,
    run,
    same_precision,
)

ALL = ("mask", "bias", "rotary", "null")

# Options that every fused backend honours.
CASES = (
    Case("plain"),
    Case("one_chunk", n=8),
    Case("last_token_only", n=8, m=8, l=1),
    Case("no_token_attends", n=5, l=2),
    Case("whole_chunks", n=24),
    Case("incomplete_chunk", n=30),
    Case("surplus_chunks", n=21, l=5),
    Case("one_neighbour", k=1),
    Case("many_neighbours", k=7, r=5),
    Case("chunk_of_one", m=1, n=5, r=3),
    Case("one_key", k=1, r=1),
    Case("odd_sizes", n=29, m=7, k=3, r=11, h=3, d=20, d_value=12),
    Case("wider_value", d=8, d_value=40),
    Case("head_of_one", d=1, d_value=1),
    Case("long_rows", n=150, m=70, k=1, r=9, b=1),
    Case("long_keys", n=9, m=4, k=3, r=150, b=1, h=1),
    Case("grouped", h=6, hk=2),
    Case("multi_query", h=4, hk=1, options=("mask", "null")),
    Case("mask", options=("mask",)),
    Case("mask_rows_empty", options=("mask", "empty_chunk")),
    Case("mask_rows_empty_null", options=("mask", "empty_chunk", "null")),
    Case("bias_shared", options=("bias",)),
    Case("bias_per_neighbour", options=("bias_per_neighbour",)),
    Case("bias_fp32", options=("bias", "fp32_parameters", "null")),
    Case("null", options=("null",)),
    Case("rotary", options=("rotary",)),
    Case("rotary_interleaved", options=("rotary_interleaved",)),
    Case("rotary_partial", d=24, options=("rotary_partial",)),
    Case("rotary_partial_interleaved", d=24, options=("rotary_partial", "rotary_interleaved")),
    Case("scale", scale=-0.7, options=("null", "bias")),
    Case("scale_zero", scale=0.0, options=("mask",)),
    Case("stride", n=40, m=8, stride=3, options=("bias", "rotary")),
    Case("stride_one", n=12, m=4, stride=1, k=1, r=5),
    Case("end", n=21, align="end", options=ALL),
    Case("end_whole", n=24, align="end"),
    Case("end_short", n=3, align="end"),
    Case("offset", n=21, query_offset=11, options=ALL),
    Case("offset_chunks", n=21, query_offset=37, chunk_offset=3, options=ALL),
    Case("offset_skips_chunks", n=13, query_offset=37, chunk_offset=1),
    Case("offset_one_token", n=1, query_offset=20, chunk_offset=1, options=("null",)),
    Case("offset_stride", n=21, m=8, stride=5, query_offset=22, chunk_offset=2, options=("bias",)),
    Case("everything", n=45, m=10, k=3, r=9, h=4, hk=2, d=12, d_value=20, stride=7, l=9, options=ALL),
    Case("everything_per_neighbour", n=45, k=3, r=9, h=4, hk=2, options=("mask", "bias_per_neighbour", "null")),
    Case("empty_batch", b=0),
    Case("empty_sequence", n=0, l=1),
    Case("no_neighbours", k=0),
    Case("no_neighbours_null", k=0, options=("null", "bias")),
    Case("no_tokens_retrieved_null", r=0, options=("null",)),
    Case("no_chunks", n=5, l=0),
    Case("strided", n=29, options=(*ALL, "strided")),
    Case("broadcast", options=("mask", "bias", "expanded")),
    Case("relative", options=("relative",)),
    Case("relative_u_v", options=("relative", "relative_biases")),
    Case("relative_u_only", options=("relative", "content_bias", "null")),
    Case("relative_odd", n=29, m=7, k=3, r=11, h=3, d=20, d_value=12, options=("relative", "relative_biases")),
    Case("relative_long_rows", n=150, m=70, k=1, r=9, b=1, options=("relative", "relative_biases")),
    Case("relative_long_keys", n=9, m=4, k=2, r=150, b=1, h=1, options=("relative", "relative_biases")),
    Case(
        "relative_all",
        n=45,
        m=10,
        k=3,
        r=9,
        h=4,
        hk=2,
        stride=7,
        options=("relative", "relative_biases", "mask", "null", "bias"),
    ),
    Case("relative_per_neighbour", b=1, n=9, m=4, r=19, h=1, options=("relative", "bias_per_neighbour", "null")),
    Case("relative_end", align="end", options=("relative", "relative_biases")),
    Case("relative_offset", query_offset=11, options=("relative", "relative_biases", "mask", "empty_chunk")),
    Case("relative_strided", n=29, options=("relative", "relative_biases", "strided")),
    Case("dropout", dropout_p=0.3),
    Case("dropout_odd", n=29, m=7, k=3, r=11, h=3, d=20, d_value=12, dropout_p=0.5, options=("mask", "null")),
    Case(
        "dropout_all",
        n=45,
        m=10,
        k=3,
        r=9,
        h=4,
        hk=2,
        stride=7,
        dropout_p=0.2,
        options=("relative", "relative_biases", "mask", "null", "bias"),
    ),
    Case("dropout_long_keys", n=9, m=4, k=3, r=150, b=1, h=1, dropout_p=0.9),
    Case("packed", n=45, documents=(17, 3, 8, 17)),
    Case("packed_short", n=21, l=2, documents=(7, 7, 7), options=("null",)),
    Case("packed_stride", n=50, stride=3, documents=(11, 20, 19), options=ALL),
    Case("packed_surplus", n=45, l=9, documents=(23, 22), options=("relative", "relative_biases", "mask")),
    Case("packed_one_token_over", n=18, m=8, documents=(9, 9), dropout_p=0.4),
)

SELF = (
    Case("self", "self"),
    Case("self_one_token", "self", r=1),
    Case("self_odd", "self", l=2, k=3, r=19, h=3, d=20, d_value=12),
    Case("self_long", "self", b=1, l=1, k=2, r=150, h=1),
    Case("self_very_long", "self", b=1, l=1, k=1, r=530, h=1),
    Case("self_grouped", "self", h=6, hk=2, options=("mask",)),
    Case("self_mask", "self", options=("mask", "empty_chunk")),
    Case("self_bias", "self", options=("bias",)),
    Case("self_rotary", "self", options=("rotary", "mask")),
    Case("self_rotary_interleaved", "self", d=24, options=("rotary_partial", "rotary_interleaved")),
    Case("self_relative", "self", options=("relative",)),
    Case("self_relative_all", "self", r=21, h=4, hk=2, options=("relative", "relative_biases", "mask", "bias")),
    Case("self_relative_long", "self", b=1, l=1, k=1, r=150, h=1, options=("relative", "relative_biases")),
    Case("self_scale", "self", scale=-0.7),
    Case("self_dropout", "self", dropout_p=0.3, options=("mask", "relative", "relative_biases")),
    Case("self_strided", "self", options=("mask", "bias", "rotary", "strided")),
    Case("self_strided_relative", "self", options=("mask", "relative", "relative_biases", "strided")),
    Case("self_expanded", "self", options=("mask", "bias", "expanded")),
    Case("self_empty_batch", "self", b=0),
    Case("self_no_chunks", "self", l=0),
    Case("self_no_neighbours", "self", k=0),
    Case("self_no_tokens", "self", r=0),
    Case("causal", "self", causal=True),
    Case("causal_decoder", "self", l=1, k=1, r=150, causal=True, options=("rotary",)),
    Case("causal_mask", "self", causal=True, options=("mask", "empty_chunk", "bias")),
    Case("causal_grouped", "self", b=1, l=1, k=1, r=70, h=6, hk=2, causal=True),
    Case("causal_relative", "self", l=1, k=1, r=150, h=1, causal=True, options=("relative", "relative_biases")),
    Case("causal_dropout", "self", l=1, k=1, r=37, causal=True, dropout_p=0.3),
    Case("causal_packed", "self", l=1, k=1, r=45, causal=True, documents=(17, 3, 1, 24)),
    Case("causal_packed_long", "self", b=1, l=1, k=1, r=180, h=1, causal=True, documents=(100, 80), options=("mask",)),
    Case("causal_packed_rotary", "self", l=1, k=1, r=45, causal=True, documents=(17, 28), options=("rotary", "mask")),
    Case(
        "causal_packed_relative",
        "self",
        l=1,
        k=1,
        r=45,
        h=4,
        hk=2,
        causal=True,
        documents=(17, 28),
        dropout_p=0.2,
        options=("relative", "relative_biases"),
    ),
)

CROSS = (
    Case("cross", "cross"),
    Case("cross_one_activation", "cross", m=1, r=3, d=8),
    Case("cross_one_token", "cross", r=1, k=3),
    Case("cross_odd", "cross", l=2, k=3, r=19, m=7, h=3, d=20, d_value=12),
    Case("cross_long", "cross", b=1, l=1, k=2, r=150, m=70, h=1),
    Case("cross_many_activations", "cross", b=1, l=1, k=1, r=9, m=300, h=1),
    Case("cross_many_neighbours", "cross", b=1, l=2, k=9, r=7),
    Case("cross_grouped", "cross", h=6, hk=2, options=("mask",)),
    Case("cross_mask", "cross", options=("mask", "empty_chunk")),
    Case("cross_bias", "cross", options=("bias",)),
    Case("cross_rotary", "cross", options=("rotary", "mask")),
    Case("cross_rotary_interleaved", "cross", d=24, options=("rotary_partial", "rotary_interleaved")),
    Case("cross_relative", "cross", options=("relative",)),
    Case("cross_relative_all", "cross", r=21, h=4, hk=2, options=("relative", "relative_biases", "mask", "bias")),
    Case("cross_relative_long", "cross", b=1, l=1, r=150, m=70, h=1, options=("relative", "relative_biases")),
    Case("cross_scale", "cross", scale=-0.7),
    Case("cross_dropout", "cross", dropout_p=0.3, options=("mask", "relative", "relative_biases")),
    Case("cross_strided", "cross", options=("mask", "bias", "rotary", "strided")),
    Case("cross_strided_relative", "cross", options=("mask", "relative", "relative_biases", "strided")),
    Case("cross_expanded", "cross", options=("mask", "bias", "expanded")),
    Case("cross_empty_batch", "cross", b=0),
    Case("cross_no_chunks", "cross", l=0),
    Case("cross_no_neighbours", "cross", k=0),
    Case("cross_no_tokens", "cross", r=0),
    Case("cross_no_activations", "cross", m=0),
)

EVERY = (*CASES, *SELF, *CROSS)


def by_name(name: str) -> Case:
    return next(case for case in EVERY if case.name == name)


def expect(
    arguments: dict[str, Any], grad_out: torch.Tensor | None = None, grad_lse: torch.Tensor | None = None
) -> dict[str, torch.Tensor]:
    """What `run` must give, in fp64, by the oracle; its gradients also where a decoding kernel has none."""
    wide = as_dtype({name: x for name, x in arguments.items() if name != "strategy"}, torch.float64)
    if wide.get("dropout_p"):
        wide["kept"] = kept(arguments)
    out, lse = getattr(oracle, name_of(arguments))(**wide)
    return results(wide, out, lse, grad_out, grad_lse)


def kept(arguments: dict[str, Any]) -> torch.Tensor:
    """bool [*query.shape[:-1], 1 + slots]: the probabilities that `run` keeps, by the rule of ops/dropout.py.
    The number of a row counts b * h + head, and the row's place in the axes of the query between them."""
    torch.manual_seed(7)
    query, h = arguments["query"], arguments["query"].shape[-2]
    b, places = query.shape[0], query[0, ..., 0, 0].numel() if query.shape[0] else 0
    seed = dropout.draw_seed(query.device)
    of = arguments["encoded"] if "encoded" in arguments else arguments["key"][..., 0, 0]
    if "encoded" in arguments:
        slots = of.shape[2] * of.shape[3]
    else:  # of neighbour self-attention, of the cross-attention, and of the chunked one
        slots = of.shape[-1] if "chunk_size" not in arguments else of.shape[2] * of.shape[3]
    head = torch.arange(b)[:, None, None] * h + torch.arange(h)
    stays = dropout.survivors(seed, arguments["dropout_p"], head, torch.arange(places)[:, None], slots)
    return stays.view(*query.shape[:-1], 1 + slots)
