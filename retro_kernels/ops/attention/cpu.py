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

import functools
import math
from collections.abc import Callable, Collection

import torch

from ... import extension
from .. import memory
from ..call import allocate_gradients
from . import common

# In the order in which the kernel takes their gradients, and then their partial sums.
PARAMETERS = ("attention_bias", "relative_key", "content_bias", "relative_bias", "null_key", "null_value")
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


def _copies(key: torch.Tensor, grouping: int, shapes: list[tuple[int, ...]]) -> int:
    """Partial sums of each parameter gradient. Tasks are (copy, range of kv heads): few heads get more, and long
    tables of distances fewer, so that one set of sums stays below COPIES_BYTES."""
    batch, num_chunks, neighbours, _, kv_heads, _ = key.shape
    groups = batch * num_chunks * (neighbours if grouping == common.NEIGHBOUR else 1)
    most = min(common.PARTIAL_COPIES, 8 if kv_heads >= 8 else 32)
    largest = max(map(math.prod, shapes), default=1)
    return max(1, min(groups, most, COPIES_BYTES // (4 * max(largest, 1))))


def _packed_table(relative_key: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Room for `relative_key` as the products read it: rows and columns are padded with zeros to whole register tiles,
    and bf16 takes two layouts."""
    heads, distances, d = relative_key.shape
    width = -(-d // 16) * 16
    if dtype == torch.bfloat16 or width % 128 == 0:
        width += 16
    return memory.allocate((heads, -(-distances // 8) * 8 + 8, width), torch.float32, relative_key.device)


@functools.cache
def _op(name: str) -> Callable[..., None]:
    """The compiled op itself: `torch.ops` looks its overloads through at every call."""
    return getattr(torch.ops.retro_kernels_cpu, name).default


def _tensors(call: common.Call) -> tuple[torch.Tensor | None, ...]:
    """In the order of the compiled ops."""
    return (
        call.query,
        call.key,
        call.value,
        call.mask,
        call.attention_bias,
        call.relative_key,
        call.content_bias,
        call.relative_bias,
        call.query_cos,
        call.query_sin,
        call.key_cos,
        call.key_sin,
        call.null_key,
        call.null_value,
        call.chunk_spans,
        call.first_visible,
        call.dropout_seed,
    )


def _settings(call: common.Call) -> tuple[int | float, ...]:
    return (
        call.grouping,
        call.causal,
        call.rotary_interleaved,
        call.scale,
        call.logit_softcap,
        call.dropout_p,
        call.stride,
        call.first_token,
    )


def attend(call: common.Call) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse = common.allocate_forward(call.query, call.value, call.attention_bias)
    packed = None if call.relative_key is None else _packed_table(call.relative_key, call.query.dtype)
    _op("attention_forward")(
        *_tensors(call),
        *_settings(call),
        packed,
        out,
        lse,
    )
    return out, lse


def gradients(
    call: common.Call,
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    wanted: Collection[str],
) -> dict[str, torch.Tensor]:
    found = allocate_gradients(call, wanted)
    packed = None if call.relative_key is None else _packed_table(call.relative_key, grad_out.dtype)
    partial = _partial_sums(call, found) if len(found) > 3 else {}
    _op("attention_backward")(
        grad_out,
        grad_lse,
        *_tensors(call),
        out.contiguous(),
        lse.contiguous(),
        *_settings(call),
        packed,
        found["query"],
        found["key"],
        found["value"],
        *map(found.get, PARAMETERS),
        *map(partial.get, PARAMETERS),
    )
    return found


def _partial_sums(call: common.Call, found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Room for the partial sums of the parameters' gradients."""
    shapes = {name: tuple(found[name].shape) for name in PARAMETERS if name in found}
    if "relative_key" in shapes:  # summed in whole vectors, which reach past the table's columns
        heads, distances, d = shapes["relative_key"]
        shapes["relative_key"] = (heads, distances, -(-d // 16) * 16)
    copies = _copies(call.key, call.grouping, list(shapes.values()))
    device = call.query.device
    return {name: memory.allocate((copies, *shape), torch.float32, device) for name, shape in shapes.items()}


forward, backward = common.register("cpu", attend, gradients, devices=("cpu",), two_planes=True)
