"""Decoding on the CPU: the kernels of csrc/cpu/decode.h.

Floor. One token of each head does 4 S d FLOPs on the 2 S d numbers of its cached keys and values, 1 FLOP per byte in
fp32, so the time cannot be less than the cache's bytes over the memory's bandwidth; the cache is read once, in the
order in which it lies in memory, whatever the number of new tokens, and what comes next is fetched ahead. From encoder
states, which all heads share, a token does 4 h S e FLOPs on S e numbers, and multiply-adds bound it; W_k and W_v are
read once for all tokens of a call (`project`), which bounds small batches.

Measured at retro-7.5b (32 heads of 128, S = 256, e = 896), one token a sequence, on 2 cores of an AMD EPYC with AVX-512
that others used too, caches and weights not in its caches: milliseconds, medians. "copy" is the bytes over the copy
bandwidth of the same run (20 to 29 GB/s; reading alone can be faster). Beside it what SDPA needs for a cache laid
out by heads, and what projecting anew for the token does.

    dtype, batch    keys and values (copy) int8 (copy)    SDPA     encoder states (copy)   projecting anew
    fp32, 1         0.42 (0.29)            0.15 (0.07)    0.62     1.52 (1.05)             27.7
    fp32, 8         2.74 (2.33)            0.85 (0.58)    5.19     3.59 (1.27)             214
    bf16, 1         0.24 (0.18)            0.17 (0.09)    1.34     0.93 (0.63)             13.0
    bf16, 8         1.30 (1.40)            0.85 (0.70)    8.10     3.12 (0.77)             106
    bf16, 64        7.65 (13.2)            3.89 (6.60)    62.2     16.3 (2.16)             835
    fp16, 1         0.33 (0.16)            0.25 (0.08)    2.37     1.22 (0.56)             126
    fp16, 8         1.63 (1.25)            0.82 (0.62)    12.0     2.64 (0.68)             975

A call of no size takes 0.08 ms.

Memory: the outputs, and where few sequences and heads leave threads idle, fp32 partial sums of up to 32 ranges of
slots.

Each level of instructions gives bitwise the same result on every run and for every number of threads: how the work is
cut is a function of shapes alone, and partial sums are added in order. There is one exception: from encoder states,
with more than `LARGEST_PROJECTED` (token, query head) rows to a key/value head, W_k and W_v are applied by PyTorch's
product, whose bits may depend on the number of threads.
"""

from __future__ import annotations

import torch

from ... import extension
from .. import memory
from ..call import define
from ..memory import unit_last_stride
from . import common

LARGEST_HEAD = 4096


def unavailable() -> str | None:
    """Why the compiled kernels cannot be used in this process, with the remedy, or None."""
    return extension.why_not()


def refusal(call: common.DecodeCall) -> str | None:
    """Why this call cannot run here, or None."""
    query = call.query
    if query.device.type != "cpu":
        return f"query is on {query.device}; the CPU kernels need CPU tensors"
    return common.refusal("CPU", call, LARGEST_HEAD)


def attend(call: common.Call) -> tuple[torch.Tensor, torch.Tensor]:
    query, key, value, kernels = call.query, call.key, call.value, torch.ops.retro_kernels_cpu
    out, lse = common.allocate_outputs(query, value)
    splits = kernels.decode_splits(query, key, value, call.key_cos)
    partial = None
    if splits > 1:
        shape = (splits, *lse.shape, value.shape[-1] + 2)
        partial = memory.allocate(shape, torch.float32, query.device)
    kernels.decode(
        query,
        key,
        value,
        call.mask,
        call.logit_bias,
        call.null_logit,
        call.null_value,
        call.key_cos,
        call.key_sin,
        call.key_scale,
        call.value_scale,
        call.position,
        call.valid,
        call.chunk,
        call.rotary_interleaved,
        call.scale,
        call.logit_softcap,
        call.chunk_size,
        out,
        lse,
        partial,
    )
    return out, lse


forward = common.register("cpu", attend, devices=("cpu",))


# Rows of a matrix up to which the weights are multiplied here; with more, PyTorch's own product was measured to be
# faster (but never in fp16).
LARGEST_PROJECTED = {torch.float32: 32, torch.bfloat16: 8}


def _allocate_projected(x, weight, transposed):
    return memory.allocate((*x.shape[:2], weight.shape[1 if transposed else 2]), x.dtype, x.device)


def _project(x, weight, transposed):
    out = _allocate_projected(x, weight, transposed)
    torch.ops.retro_kernels_cpu.decode_project(x, weight, transposed, out)
    return out


_project_few = define(
    "decode_project_cpu(Tensor x, Tensor weight, bool transposed) -> Tensor",
    implementation=_project,
    fake=_allocate_projected,
    devices=("cpu",),
    returns=("x",),
)


def project_few(x: torch.Tensor, weight: torch.Tensor, transposed: bool) -> torch.Tensor:
    """`common.project` in a kernel of csrc/cpu: the weights are read once, in place."""
    return _project_few(unit_last_stride(x), unit_last_stride(weight), transposed)


def project(x: torch.Tensor, weight: torch.Tensor, transposed: bool) -> torch.Tensor:
    """`common.project`: with few rows `project_few`, with more PyTorch's product."""
    rows = x.shape[0] * (x.shape[1] // weight.shape[0])
    product = common.project if rows > LARGEST_PROJECTED.get(x.dtype, rows) else project_few
    return product(x, weight, transposed)
