"""Attention within groups on the CPU: the kernels of csrc/cpu.

Speed is bounded by multiply-adds: per (group, head) the forward does 4 rows S d FLOPs on 4 bytes x 2 S d of fp32 keys
and values, 32 FLOP per byte at 64 rows. Relative positions add 2 rows (r + 15) d: only the distances that 16 rows can
see are multiplied, and neighbours share them. csrc/README.md says what was measured and how far from the limit it is.

Memory: the outputs; with `relative_key` a packed copy of it; and for the gradients of parameters `_copies` fp32 partial
sums of each. Besides, each thread keeps a scratch buffer (about 1 MiB, whatever the size of the call) between calls.

Each level of instructions gives bitwise the same result on every run and for every number of threads: a (batch, group,
kv head) is computed by one thread in one order, and partial sums are assigned to them by a rule that knows only shapes.
"""

from __future__ import annotations

import math

import torch

from ... import extension
from .. import common as ops_common
from . import common

RELATIVE_KEY = common.DIFFERENTIABLE[4]  # its place among the slots
COPIES_BYTES = 128 << 20


def unavailable() -> str | None:
    """Why the compiled kernels cannot be used in this process, with the remedy, or None."""
    return extension.why_not()


def refusal(call: common.Call) -> str | None:
    """Why this call cannot run here, or None."""
    query, dims = call.query, (call.query.shape[-1], call.value.shape[-1])
    if query.device.type != "cpu":
        return f"query is on {query.device}; the CPU kernels need CPU tensors"
    if query.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f'query is {query.dtype}; the CPU kernels take float32, float16 and bfloat16: use backend="reference"'
    if not 1 <= min(dims) <= max(dims) <= 256:
        return f'head sizes are {dims[0]} and {dims[1]}; the CPU kernels take 1 to 256: use backend="reference"'
    return None


def _copies(key: torch.Tensor, grouping: int, shapes: list[tuple[int, ...] | None]) -> int:
    """Partial sums of each parameter gradient. Tasks are (copy, range of kv heads): few heads get more, and long
    tables of distances fewer, so that one set of sums stays below COPIES_BYTES."""
    batch, num_chunks, neighbours, _, kv_heads, _ = key.shape
    groups = batch * num_chunks * (neighbours if grouping == common.NEIGHBOUR else 1)
    most = min(common.PARTIAL_COPIES, 8 if kv_heads >= 8 else 32)
    largest = max((math.prod(shape) for shape in shapes if shape is not None), default=1)
    return max(1, min(groups, most, COPIES_BYTES // (4 * max(largest, 1))))


def _packed_table(relative_key: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """Room for `relative_key` as the products read it: rows and columns are padded with zeros to whole register tiles,
    and bf16 takes two layouts."""
    if relative_key is None:
        return None
    heads, distances, d = relative_key.shape
    width = -(-d // 16) * 16
    if dtype == torch.bfloat16 or width % 128 == 0:
        width += 16
    return ops_common.allocate((heads, -(-distances // 8) * 8 + 8, width), torch.float32, relative_key.device)


def _forward(query, key, value, mask, attention_bias, *arguments):
    out, lse = common.allocate_forward(query, value, attention_bias)
    packed = _packed_table(arguments[RELATIVE_KEY - 5], query.dtype)
    torch.ops.retro_kernels_cpu.attention_forward(query, key, value, mask, attention_bias, *arguments, packed, out, lse)
    return out, lse


def _backward(grad_out, grad_lse, *arguments):
    slots, (out, lse) = arguments[: common.TENSORS], arguments[common.TENSORS : common.TENSORS + 2]
    *settings, bias_gradient, relative_gradient, null_gradient = arguments[common.TENSORS + 2 :]
    flags = (bias_gradient, relative_gradient, null_gradient)
    gradients = common.allocate_backward(*[*(slots[place] for place in common.DIFFERENTIABLE), *flags])
    asked = (bias_gradient, *(3 * (relative_gradient,)), *(2 * (null_gradient,)))
    given = (slots[place] is not None for place in common.DIFFERENTIABLE[3:])
    totals = [total if wanted and there else None for total, wanted, there in zip(gradients[3:], asked, given)]
    packed = _packed_table(slots[RELATIVE_KEY], grad_out.dtype)
    shapes = [None if total is None else tuple(total.shape) for total in totals]
    if shapes[1] is not None:  # summed in whole vectors, which reach past the table's columns
        shapes[1] = (*shapes[1][:2], -(-shapes[1][2] // 16) * 16)
    copies = _copies(slots[1], settings[0], shapes)
    partial = [
        None if shape is None else ops_common.allocate((copies, *shape), torch.float32, grad_out.device)
        for shape in shapes
    ]
    torch.ops.retro_kernels_cpu.attention_backward(
        grad_out,
        grad_lse,
        *slots,
        out.contiguous(),
        lse.contiguous(),
        *settings,
        packed,
        *gradients[:3],
        *totals,
        *partial,
    )
    return gradients


forward, backward = common.register("cpu", _forward, _backward, devices=("cpu",), two_planes=True)
