"""The absorbed strategy on the CPU: the forward of csrc/cpu/absorbed.h. There is no backward yet.

A chunk's states are packed once for all heads that a thread computes of it (256 slots at a time, 128 beyond e = 4096),
a head's weights once for all its rows. FLOPs per (chunk, head) of m rows and S slots: 4 m e (d + S), against
4 S d (e + m) with keys and values made.

Memory: the outputs, and with relative positions a packed copy of `relative_key`. Besides, each thread keeps a scratch
buffer between calls, which does not grow with batch, chunks, slots or heads: about 3 MiB at e = 896, d = 128.

Each level of instructions gives bitwise the same result on every run and for every number of threads: a (batch, chunk,
kv head) is computed by one thread in one order.
"""

from __future__ import annotations

import torch

from ... import extension
from ..attention import common as attention_common
from ..attention.cpu import _packed_table
from . import common

MOST_WIDTH = 8192


def unavailable() -> str | None:
    """Why the compiled kernels cannot be used in this process, with the remedy, or None."""
    return extension.why_not()


def refusal(call: common.Call) -> str | None:
    """Why this call cannot run here, or None."""
    query, dims, e = call.query, (call.query.shape[-1], call.w_value.shape[1]), call.encoded.shape[-1]
    if query.device.type != "cpu":
        return f"query is on {query.device}; the CPU kernels need CPU tensors"
    if query.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f'query is {query.dtype}; the CPU kernels take float32, float16 and bfloat16: use backend="reference"'
    if not 1 <= min(dims) <= max(dims) <= 256:
        return f'head sizes are {dims[0]} and {dims[1]}; the CPU kernels take 1 to 256: use backend="reference"'
    if not 1 <= e <= MOST_WIDTH:
        return f'e is {e}; the absorbed CPU kernel takes 1 to {MOST_WIDTH}: use strategy="materialise"'
    tensors = (
        query, call.encoded, call.w_key, call.w_value, call.bias_key, call.bias_value, call.attention_bias,
        call.relative_key, call.content_bias, call.relative_bias, call.null_key, call.null_value,
    )  # fmt: skip
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
        return (
            "a gradient is wanted, and the absorbed CPU kernel has no backward yet: use torch.no_grad(), "
            'strategy="materialise" or backend="reference"'
        )
    return None


def _forward(
    query, encoded, w_key, w_value, bias_key, bias_value, mask, attention_bias, relative_key, content_bias,
    relative_bias, null_key, null_value, chunk_spans, dropout_seed, scale, dropout_p, stride, first_token,
):  # fmt: skip
    out, lse = common.allocate_forward(query, w_value)
    # the shapes of what is never made
    key, value = (w.new_empty(w.shape[1]).expand(*encoded.shape[:4], *w.shape[:2]) for w in (w_key, w_value))
    torch.ops.retro_kernels_cpu.absorbed_forward(
        query[:, None, None], key, value, mask, attention_bias, relative_key, content_bias, relative_bias,
        None, None, None, None, null_key, null_value, chunk_spans, None, dropout_seed,
        attention_common.CLOCK, False, False, scale, dropout_p, stride, first_token,
        _packed_table(relative_key, query.dtype),
        encoded, w_key, w_value, bias_key, bias_value, out[:, None, None], lse[:, None, None],
    )  # fmt: skip
    return out, lse


def _backward(*_):
    raise RuntimeError('the absorbed CPU kernel has no backward yet: use strategy="materialise" or backend="reference"')


forward, backward = common.register("cpu", _forward, _backward, devices=("cpu",))
