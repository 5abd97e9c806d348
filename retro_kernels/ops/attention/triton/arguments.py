"""What the Triton kernels take: tensors with their strides, lengths, and what they are compiled for.

A tensor is a NamedTuple of its pointer and the strides of its leading axes, in elements; the last axis is contiguous. A
tensor that is absent is None as a whole. `data` is the tensor that the argument is named after; other pointers are
named as `Call` or the backend names them (`launching.py` goes by these names).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import_error: str | None = None
try:
    import triton
except ImportError as error:
    triton = None
    import_error = f"{type(error).__name__}: {error}"

# Never specialised: a kernel is not compiled again for another batch, length or number of neighbours. They are
# arguments of their own, because Triton specialises whatever is in a tuple.
LENGTHS = (
    "num_tokens",
    "num_neighbours",
    "retrieved_length",
    "num_heads",
    "heads_per_key",
    "num_chunks",
    "first_group",
    "num_groups",
    "stride",
    "first_token",
    "table_rows",
    "num_items",
    "num_copies",
    "num_slots",
    "num_rows",
    "chunk_size",
    "threshold",
)


def jit(function: Callable) -> Any:
    if triton is None:
        return function
    names = function.__code__.co_varnames[: function.__code__.co_argcount]
    return triton.jit(function, do_not_specialize=[name for name in names if name in LENGTHS])


def constants(spec: Any) -> Any:
    """What is known when compiling, as kernels take it: Triton 3.6 takes a NamedTuple of constants, and no constant
    NamedTuple."""
    return type(spec)(*map(triton.language.constexpr, spec))


class Rows(NamedTuple):
    """query and grad_out [b, l, k, n, h, d]; l and k are 0 under CLOCK, where a group's rows are tokens."""

    data: Any
    b: int
    l: int
    k: int
    n: int
    h: int


class Slots(NamedTuple):
    """key and value [b, l, k, r, h, d]."""

    data: Any
    b: int
    l: int
    k: int
    r: int
    h: int


class Mask(NamedTuple):
    """[b, l, k, r] as bytes: Triton's interpreter cannot use a bool that was loaded as a mask."""

    data: Any
    b: int
    l: int
    k: int
    r: int


class Table(NamedTuple):
    """attention_bias [h, M, r | k * r]."""

    data: Any
    h: int
    m: int


class Relative(NamedTuple):
    """relative_key [h, M + r - 1, d] and the biases [h, d] of the two queries, which may be None."""

    relative_key: Any
    content_bias: Any
    relative_bias: Any
    h: int
    x: int
    content_bias_h: int
    relative_bias_h: int


class Rotary(NamedTuple):
    """Tables by row [M, w] and by token [r, w]."""

    query_cos: Any
    query_sin: Any
    key_cos: Any
    key_sin: Any
    query_cos_m: int
    query_sin_m: int
    key_cos_r: int
    key_sin_r: int


class Null(NamedTuple):
    """null_key [h, d] and null_value [h, d_value]."""

    null_key: Any
    null_value: Any
    key_h: int
    value_h: int


class Results(NamedTuple):
    """What the forward stores and the backward reads, contiguous: out [b, lq, kq, n, h, d_value]; lse [b, lq, kq, n,
    h], where there is an attention_bias its first plane, and log_sum the second; grad_lse, of the natural log-sum-exp,
    or None."""

    out: Any
    lse: Any
    log_sum: Any
    grad_lse: Any = None


class Gradients(NamedTuple):
    """Contiguous."""

    grad_query: Any
    grad_key: Any
    grad_value: Any


class Copies(NamedTuple):
    """Partial sums of the parameters' gradients [copies, ...], contiguous fp32; None where not wanted."""

    attention_bias_copies: Any
    relative_key_copies: Any
    content_bias_copies: Any
    relative_bias_copies: Any
    null_key_copies: Any
    null_value_copies: Any


class Spec(NamedTuple):
    """What a kernel is compiled for.

    PER_NEIGHBOUR: no key tile holds slots of two neighbours, so that its tokens are a run. PHILOX_SLOTS: how many slots
    one evaluation of Philox serves, 8 where every tile begins at a multiple of 8, else 1. WIDTH: rotary pairs, 0
    without rotation. FLAT_SLOTS: neighbours lie behind one another, so that a slot's offset needs no division. INT64:
    an offset inside a group may pass 2^31. BIAS_PER_SLOT: the bias has k * r columns. DOCUMENTS: there is a
    first_visible. TWO_PLANES: of the log-sum-exp. SOFTCAP: there is a soft cap. A tile is BLOCK_ROWS x
    BLOCK_KEYS, its distances are at most BLOCK_RUN, and its columns are BLOCK_PAIR and BLOCK_REST of queries and keys
    (`tiles.py`), BLOCK_VALUE of values.
    """

    GROUPING: int
    CAUSAL: bool
    PER_NEIGHBOUR: bool
    PHILOX_SLOTS: int
    DIM: int
    VALUE_DIM: int
    WIDTH: int
    INTERLEAVED: bool
    FLAT_SLOTS: bool
    INT64: bool
    BIAS_PER_SLOT: bool
    SOFTCAP: bool
    DROPOUT: bool
    DOCUMENTS: bool
    TWO_PLANES: bool
    BLOCK_ROWS: int
    BLOCK_KEYS: int
    BLOCK_RUN: int
    BLOCK_PAIR: int
    BLOCK_REST: int
    BLOCK_VALUE: int
    PRECISION: str
