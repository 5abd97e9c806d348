"""Attention within groups in CUDA C++ (csrc/cuda): for NVIDIA GPUs from compute capability 8.0 on.

State: the kernels compile for every architecture they are built for and pass their checks in the emulator
(csrc/cuda/emulator, every CUDA thread a fiber of the CPU). No GPU has run them yet. A GPU takes them by default after
Triton's, once it has proved them right (`ops/verification`).

What they take: float16 and bfloat16, one head size of 64, 96 or 128 for keys and values, a mask, grouped heads, packed
documents and everything that the clock says (stride, alignment, offsets); rows that begin at multiples of 16 bytes.
`refusal` names what they do not take. Floors, in bytes over bandwidth, are in the kernels' header comments.

On compute capability 9.0 forward and backward are the Hopper kernels' (csrc/cuda/sm90) where those take the call; what
they do not take is the work of csrc/cuda/sm80 there too.

The kernels read the inputs where they are and allocate nothing but their outputs. One program computes all of a
(group, head) in one order, without atomics: results are bitwise reproducible.
"""

from __future__ import annotations

from collections.abc import Collection

import torch

from ... import cuda_extension
from ..call import allocate_gradients
from . import common

HEAD_DIMS = (64, 96, 128)
MOST_SLOTS = 32768  # of a group; kMostSlots in csrc/cuda/common/problem.h


def unavailable() -> str | None:
    """Why the compiled kernels cannot be used in this process, with the remedy, or None."""
    return None if cuda_extension.emulating() else cuda_extension.why_not()


def refusal(call: common.Call) -> str | None:
    """Why this call cannot run here, or None."""
    return cuda_extension.device_refusal(call.query) or _refused_option(call) or _refused_shape(call)


def _refused_option(call: common.Call) -> str | None:
    given = {
        "attention_bias": call.attention_bias,
        "relative_key": call.relative_key,
        "query_rotary": call.query_cos,
        "null_key": call.null_key,
        "logit_softcap": call.logit_softcap or None,
        "dropout_p": call.dropout_seed,
        "causal": call.causal or None,
    }
    for name, value in given.items():
        if value is not None:
            return f'the CUDA kernels have no {name}: use backend="triton"'
    return None


def _refused_shape(call: common.Call) -> str | None:
    query, key, value = call.query, call.key, call.value
    if query.dtype not in (torch.float16, torch.bfloat16):
        return f'query is {query.dtype}; the CUDA kernels take float16 and bfloat16: use backend="triton"'
    dims = (query.shape[-1], value.shape[-1])
    if dims[0] != dims[1] or dims[0] not in HEAD_DIMS:
        return (
            f"head sizes are {dims[0]} and {dims[1]}; the CUDA kernels take one of 64, 96 and 128 for keys and values: "
            'use backend="triton"'
        )
    slots = key.shape[2] * key.shape[3]
    if slots > MOST_SLOTS:
        return f'a group has {slots} slots and the CUDA kernels take at most {MOST_SLOTS}: use backend="triton"'
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if not cuda_extension.rows_aligned(tensor):
            return (
                f"{name} has strides {tuple(tensor.stride())} and begins at element {tensor.storage_offset()}; the "
                "CUDA kernels need rows that begin at multiples of 16 bytes (8 elements): use "
                f'backend="triton", or pass {name}.contiguous()'
            )
    return None


def attend(call: common.Call) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse = common.allocate_forward(call.query, call.value)
    if call.chunk_spans is not None:  # tokens in no span belong to no program
        out.zero_()
        lse.fill_(float("-inf"))
    cuda_extension.ops(call.query).attention_forward(
        call.query,
        call.key,
        call.value,
        call.mask,
        call.chunk_spans,
        call.grouping,
        call.scale,
        call.stride,
        call.first_token,
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
    if call.chunk_spans is not None:
        found["query"].zero_()
    if not cuda_extension.rows_aligned(grad_out) or grad_out.data_ptr() % 16:  # (an expanded sum's, say) a copy
        grad_out = grad_out.clone(memory_format=torch.contiguous_format)
    cuda_extension.ops(call.query).attention_backward(
        grad_out,
        grad_lse,
        call.query,
        call.key,
        call.value,
        call.mask,
        call.chunk_spans,
        out.contiguous(),
        lse.contiguous(),
        call.grouping,
        call.scale,
        call.stride,
        call.first_token,
        found["query"],
        found["key"],
        found["value"],
    )
    return found


forward, backward = common.register("cuda", attend, gradients, devices=("cpu", "cuda"))
