"""Classes of calls: what of a call decides which machine code runs it, so that a check of one says little of others."""

from __future__ import annotations

import dataclasses
import operator
from typing import Any

from ..attention.common import CHUNK

# What `features` gives: (dtype, head_dim, value_dim, rows, slots, encoder_dim, options).
Features = tuple[Any, ...]


def features(call: Any) -> Features:
    """What decides which kernels run a call: of `ops/attention`, the absorbed strategy or decoding. Asked at every call
    on a GPU, so it is kept cheap."""
    query = call.query
    options: list[str] = []
    encoded: Any = getattr(call, "encoded", None)
    w_value: Any = getattr(call, "w_value", None)
    if encoded is not None:
        k, r, kv_heads, value_dim = encoded.shape[2], encoded.shape[3], call.w_key.shape[0], w_value.shape[1]
    elif w_value is not None:
        (k, r), (kv_heads, value_dim) = call.key.shape[1:3], w_value.shape[:2]
    else:
        (k, r, kv_heads), value_dim = call.key.shape[-4:-1], call.value.shape[-1]
    heads, dtype = query.shape[-2], query.dtype
    bias = call.attention_bias
    if bias is not None:
        options.append("bias_per_neighbour" if k > 1 and bias.shape[2] != r else "bias")
    if call.relative_key is not None:
        options.append("relative")
    if call.relative_bias is not None:
        options.append("relative_biases")
    elif call.content_bias is not None:
        options.append("content_bias")
    if call.null_key is not None:
        options.append("null")
    if getattr(call, "query_cos", None) is not None:
        partial = call.query_cos.shape[-1] * 2 != query.shape[-1]
        options.append("rotary_partial" if partial else "rotary")
        if call.rotary_interleaved:
            options.append("rotary_interleaved")
    if getattr(call, "dropout_p", 0.0) > 0.0:
        options.append("dropout")
    if getattr(call, "logit_softcap", 0.0) > 0.0:
        options.append("softcap")
    if getattr(call, "causal", False):
        options.append("causal")
    if getattr(call, "first_visible", None) is not None or getattr(call, "chunk_spans", None) is not None:
        options.append("packed")
    if kv_heads != heads:
        options.append("grouped")
    for parameter in (bias, call.relative_key, call.null_key):
        if parameter is not None and parameter.dtype != dtype:
            options.append("fp32_parameters")
            break
    if encoded is not None:
        if call.bias_key is not None or call.bias_value is not None:
            options.append("projection_biases")
        sizes = (tile(call.stride), tile(k * r), encoded.shape[-1])
    elif call.operation.endswith("decode"):
        options += _decode_options(call)
        rows = query.shape[1] * (heads // call.key.shape[3])  # that share a cache's row
        sizes = (1 if rows == 1 else 16 if rows <= 16 else 32, 0, call.key.shape[-1] if w_value is not None else 0)
    else:
        # of CHUNK, whose keys are a chunk's activations, a tile may hold all keys
        sizes = (tile(call.stride), 0 if call.grouping != CHUNK else 64 if r <= 64 else 128, 0)
    rows, slots, encoder_dim = sizes
    # Sizes of a model are constants of a compiled graph; eagerly `fixed` does nothing.
    fixed = operator.index
    return (dtype, fixed(query.shape[-1]), fixed(value_dim), rows, slots, fixed(encoder_dim), tuple(options))


def tile(size: Any) -> int:
    """The tile that so many rows or slots want: a power of two, 512, or 1024 for everything beyond."""
    for wanted in (16, 32, 64, 128, 512):
        if size <= wanted:
            return wanted
    return 1024


def _decode_options(call: Any) -> list[str]:
    options = []
    if call.key_rotary is not None:
        options.append("key_rotary")
    if call.key.dtype != call.query.dtype:
        options.append(str(call.key.dtype).removeprefix("torch."))
        if call.value.dtype != call.key.dtype:
            options.append("unlike_caches")
    elif call.value.dtype != call.query.dtype:
        options.append("unlike_caches")
    if call.bias_key is not None or call.bias_value is not None:
        options.append("projection_biases")
    return options


@dataclasses.dataclass(frozen=True)
class Class:
    """A class of calls. `rows` and `slots` are tiles (`tile`), `encoder_dim` is 0 where there are no encoder states;
    sizes of heads and states stand for themselves where they are a power of two, else for all below the next."""

    operation: str
    dtype: str
    head_dim: int
    value_dim: int
    rows: int
    slots: int = 0
    encoder_dim: int = 0
    options: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "options", tuple(sorted(self.options)))

    @classmethod
    def of(cls, operation: str, given: Features) -> Class:
        dtype, head_dim, value_dim, rows, slots, encoder_dim, options = given
        return cls(
            operation,
            str(dtype).removeprefix("torch."),
            representative(head_dim),
            representative(value_dim),
            rows,
            slots,
            representative(encoder_dim),
            tuple(options),
        )

    def __str__(self) -> str:
        heads = f"{self.head_dim}" if self.head_dim == self.value_dim else f"{self.head_dim} and {self.value_dim}"
        words = [self.dtype, f"heads of {heads}", f"rows {self.rows}"]
        words += [f"slots {self.slots}"] if self.slots else []
        words += [f"states of {self.encoder_dim}"] if self.encoder_dim else []
        return f"{self.operation}: {', '.join((*words, *self.options))}"


def representative(size: int) -> int:
    """The size that is checked for it: itself where it is a power of two (or tiny), else three quarters of the next."""
    upper = 1 << max(0, size - 1).bit_length()
    return size if size == upper or size < 4 else 3 * upper // 4
