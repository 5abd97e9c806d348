"""What the absorbed kernels take beyond ops/attention/triton/arguments.py."""

from __future__ import annotations

from typing import Any, NamedTuple


class States(NamedTuple):
    """encoded [b, l, k, r, e]."""

    data: Any
    b: int
    l: int
    k: int
    r: int


class Weight(NamedTuple):
    """w_key [hk, d, e], w_value [hk, d_value, e]."""

    data: Any
    h: int
    d: int


class Vectors(NamedTuple):
    """bias_key [hk, d], bias_value [hk, d_value]."""

    data: Any
    h: int


class Sums(NamedTuple):
    """Partial sums of the gradients of weights and parameters [copies, ...], contiguous fp32; None where not wanted."""

    w_key_copies: Any
    w_value_copies: Any
    bias_key_copies: Any
    bias_value_copies: Any
    attention_bias_copies: Any
    relative_key_copies: Any
    content_bias_copies: Any
    relative_bias_copies: Any
    null_key_copies: Any
    null_value_copies: Any


class Spec(NamedTuple):
    """What a kernel is compiled for: see ops/attention/triton/arguments.py. The encoder's width is walked in blocks of
    BLOCK_ENCODER columns, distances in blocks of BLOCK_RUN."""

    GROUPING: int
    PER_NEIGHBOUR: bool
    PHILOX_SLOTS: int
    DIM: int
    VALUE_DIM: int
    ENCODER_DIM: int
    FLAT_SLOTS: bool
    INT64: bool
    BIAS_PER_SLOT: bool
    DROPOUT: bool
    TWO_PLANES: bool
    BLOCK_ROWS: int
    BLOCK_KEYS: int
    BLOCK_ENCODER: int
    BLOCK_RUN: int
    BLOCK_DIM: int
    BLOCK_VALUE: int
    PRECISION: str
