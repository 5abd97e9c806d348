"""Decoding in CUDA C++ (csrc/cuda/decode): for NVIDIA GPUs from compute capability 8.0 on.

State: the kernels compile for every architecture they are built for and pass their checks in the emulator
(csrc/cuda/emulator). No GPU has run them yet. A GPU takes them by default after Triton's, once it has proved
them right (`ops/verification`).

What they take: float32, float16 and bfloat16, caches of the same dtype or quantised, every option but keys to be
turned; rows of a multiple of 8 numbers that begin at multiples of 16 bytes (8 where a number has one byte). `refusal`
names what they do not take. Floors, in bytes over bandwidth, are in the kernels' header comments.

Two launches, as in Triton: tiles of slots, then their combination in order. From compute capability 9.0 on each may
start while the kernel before it ends. From encoder states W_k and W_v have launches of their own for up to
`LARGEST_PROJECTED` rows a head; with more, the weights are no longer what bounds the time, and PyTorch multiplies.

Memory: fp32 sums of d_value + 2 numbers for every tile and row. How a call is cut depends on shapes alone, so that a
captured CUDA graph serves all positions; no atomics, results are bitwise reproducible. Everything is fp32 between the
loads and the result.
"""

from __future__ import annotations

import torch

from ... import cuda_extension
from .. import memory
from ..call import define
from . import common

LARGEST_HEAD = 4096  # kMostColumns in csrc/cuda/decode/problem.h
LARGEST_PROJECTED = 32  # rows of x that share a head's weight
LARGEST_ADDED = 256  # kMostAdded there
MOST_SLOTS, FEWEST_SLOTS = 64, 16  # of a tile
BLOCKS = 256  # wanted, two for each multiprocessor of an H100: with fewer sequences and heads, tiles get smaller


def unavailable() -> str | None:
    """Why the compiled kernels cannot be used in this process, with the remedy, or None."""
    return None if cuda_extension.emulating() else cuda_extension.why_not()


def refusal(call: common.DecodeCall) -> str | None:
    """Why this call cannot run here, or None."""
    reason = cuda_extension.device_refusal(call.query) or common.refusal("CUDA", call, LARGEST_HEAD)
    if reason is not None:
        return reason
    if call.logit_softcap > 0.0:
        return 'the CUDA kernels have no logit_softcap: use backend="triton"'
    if call.key_rotary is not None:
        return 'the CUDA kernels have no key_rotary: cache keys that are turned already, or use backend="triton"'
    for name, x in (("query", call.query), ("key", call.key), ("value", call.value)):
        if x.shape[-1] % 8:
            return (
                f"{name} has rows of {x.shape[-1]} numbers and the CUDA kernels take multiples of 8: use "
                'backend="triton"'
            )
        if not _aligned(x):
            return (
                f"{name} has strides {tuple(x.stride())}, and a row of it (or the first) does not begin at a multiple "
                "of 16 bytes (8 where a number has one byte), which the CUDA kernels need: use "
                f'backend="triton", or pass {name}.contiguous()'
            )
    return None


def _aligned(x: torch.Tensor) -> bool:
    """Whether every row begins where it can be loaded. A strided last axis is copied before."""
    strided = x.shape[-1] > 1 and x.stride(-1) != 1
    return strided or cuda_extension.rows_aligned(x, 4 if x.element_size() == 4 else 8)


def tile(rows: int, slots: int, shared_by: int) -> int:
    """Slots of a block: fewer where there are few (sequence, key/value head) pairs to share the GPU."""
    size, blocks = MOST_SLOTS, shared_by * -(-rows // 8)
    while size > FEWEST_SLOTS and blocks * -(-slots // size) < BLOCKS:
        size //= 2
    return size


def attend(call: common.Call) -> tuple[torch.Tensor, torch.Tensor]:
    query, key, value = call.query, call.key, call.value
    out, lse = common.allocate_outputs(query, value)
    b, t, h, _ = query.shape
    _, k, r, hk, d_value = value.shape
    slots = tile(t * (h // hk), k * r, b * hk)
    splits = -(-(k * r) // slots)
    sums = memory.allocate((splits, b, t, h, d_value), torch.float32, query.device)
    statistics = memory.allocate((2, splits, b, t, h), torch.float32, query.device)
    cuda_extension.ops(query).decode_attend(
        query,
        key,
        value,
        call.mask,
        call.logit_bias,
        call.null_logit,
        call.null_value,
        call.key_scale,
        call.value_scale,
        call.position,
        call.valid,
        call.chunk,
        call.scale,
        call.chunk_size,
        slots,
        sums,
        statistics,
        out,
        lse,
    )
    return out, lse


forward = common.register("cuda", attend, devices=("cpu", "cuda"))


def _allocate_projected(x, weight, transposed):
    return memory.allocate((*x.shape[:2], weight.shape[1 if transposed else 2]), x.dtype, x.device)


def _project(x, weight, transposed):
    out = _allocate_projected(x, weight, transposed)
    cuda_extension.ops(x).decode_project(x, weight, transposed, out)
    return out


_project_few = define(
    "decode_project_cuda(Tensor x, Tensor weight, bool transposed) -> Tensor",
    implementation=_project,
    fake=_allocate_projected,
    devices=("cpu", "cuda"),
    returns=("x",),
)


def project(x: torch.Tensor, weight: torch.Tensor, transposed: bool) -> torch.Tensor:
    """`common.project`: with few rows the weights are read once, while the kernel before still runs."""
    if x.stride(-1) != 1:
        x = x.contiguous()
    if weight.stride(-1) != 1:
        weight = weight.contiguous()
    rows = x.shape[0] * (x.shape[1] // weight.shape[0])
    fits = weight.shape[2] % 8 == 0 and weight.shape[2] <= LARGEST_HEAD and x.shape[2] % 8 == 0
    if rows > LARGEST_PROJECTED or not fits or not (transposed or weight.shape[1] <= LARGEST_ADDED):
        return common.project(x, weight, transposed)
    if not (_aligned(x) and _aligned(weight)):
        return common.project(x, weight, transposed)
    return _project_few(x, weight, transposed)
