"""Decoding on the CPU: the kernels of csrc/cpu/decode.h.

Floor. One token of each head does 4 S d FLOPs on the 2 S d numbers of its cached keys and values, 1 FLOP per byte in
fp32, so the time cannot be less than the cache's bytes over the memory's bandwidth; the cache is read once, in the
order in which it lies in memory, whatever the number of new tokens. csrc/README.md says how far from it the kernels
are. From encoder states, which all heads share, a token does 4 h S e FLOPs on S e numbers, and multiply-adds bound it.

Memory: the outputs, and where few sequences and heads leave threads idle, fp32 partial sums of up to 32 ranges of
slots.

Each level of instructions gives bitwise the same result on every run and for every number of threads: how the work is
cut is a function of shapes alone, and partial sums are added in order.
"""

from __future__ import annotations

import torch

from ... import extension
from .. import common as ops_common
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


def _decode(query, key, value, mask, logit_bias, null_logit, null_value, key_cos, *rest):
    out, lse = common.allocate_outputs(query, value)
    splits = torch.ops.retro_kernels_cpu.decode_splits(query, key, value, key_cos)
    partial = None
    if splits > 1:
        shape = (splits, *lse.shape, value.shape[-1] + 2)
        partial = ops_common.allocate(shape, torch.float32, query.device)
    torch.ops.retro_kernels_cpu.decode(
        query, key, value, mask, logit_bias, null_logit, null_value, key_cos, *rest, out, lse, partial
    )
    return out, lse


decode = common.register("cpu", _decode, devices=("cpu",))
