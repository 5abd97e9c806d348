"""Decoding in Triton, for NVIDIA GPUs from compute capability 8.0 on.

State: these kernels have run in Triton's interpreter and compile ahead of time for sm_80, sm_90 and sm_100 without a
spill; no GPU has run them yet. A GPU takes them by default once it has proved them right (`ops/verification`).

Floor. Every number of the cache is multiplied once for each row (a token and a query head) that shares it: in bf16 1
FLOP a byte with one row, and 2 h = 64 of encoder states, which are key and value both, against the 295 that keep an
H100 busy. So the time cannot be less than the cache's bytes over the bandwidth. In bf16, at 3.35 TB/s, for k r = 256
slots and 32 heads of 128 (retro-7.5b):

    batch             1           8           64          256
    keys and values   4.2 MB      33.6 MB     268 MB      1.07 GB
                      0.001 ms    0.010 ms    0.080 ms    0.32 ms
    encoder states    0.46 MB     3.7 MB      29 MB       117 MB     and the weights W_k and W_v, 14.7 MB, once
                      0.005 ms    0.005 ms    0.013 ms    0.039 ms   (weights included)

How close the kernels come is unmeasured.

Two launches. A program of the first has one tile of slots of one (sequence, key/value head) and all its rows, up to 32;
it leaves sums relative to the tile's own maximum. The second adds the tiles of every row in order, then the null slot,
and writes every row: 0 where it is idle, NaN beyond the border. The smaller batch and heads are, the smaller are the
tiles, down to 16 slots, so that one sequence fills a GPU. How a call is cut depends on shapes alone, so a captured CUDA
graph serves all positions, and there are no atomics: results are bitwise reproducible. Positions and validity are read
by the kernels; nothing waits for the device.

Memory: fp32 sums of d_value + 2 numbers for every tile and row; per tile of 64 keys of 128 dimensions with one row 2 %
of the bytes read.

Precision. Sums and softmax are fp32. With one row nothing is rounded before it is multiplied; with more, weights and
turned keys are rounded to the query's dtype, and fp32 is multiplied as IEEE fp32, outside the tensor cores. Quantised
caches become numbers of the query's dtype, exactly, in registers.

In the interpreter bf16 is computed as fp32 on copies, because the interpreter multiplies bit patterns of bf16.
"""

from __future__ import annotations

import torch

from ... import memory
from ...attention.triton.arguments import Results, constants
from ...attention.triton.launch import (
    _compute_capability,
    _interpretable,
    _on_device_of,
    interpreting,
    stride_of,
    strided,
    unavailable,  # noqa: F401 - what ops/backends.py asks
)
from ...launching import Launch, launch_all, launched
from .. import common
from ..common import Call
from . import configs, kernels

LARGEST_HEAD = 4096
LARGEST_TURNED = 256  # a key that is turned is held whole

_TILES_AT_ONCE = 16  # of the second launch
_VALUES_AT_ONCE = 128


def _scratch(call: Call, settings: configs.LaunchSettings) -> dict[str, torch.Tensor]:
    """What the first launch leaves for the second."""
    b, t, h, _ = call.query.shape
    _, k, r, _, d_value = call.value.shape
    key_tiles, device = -(-k * r // settings.block_keys), call.query.device
    return {
        "sums": memory.allocate((key_tiles, b, t, h, d_value), torch.float32, device),
        "statistics": memory.allocate((2, key_tiles, b, t, h), torch.float32, device),
    }


def _choose(call: Call) -> configs.LaunchSettings:
    _, t, h, d = call.query.shape
    b, k, r, hk, d_value = call.value.shape
    width = 0 if call.key_cos is None else call.key_cos.shape[1]
    return configs.choose(call.query.dtype, t * (h // hk), max(d, d_value), width, k * r, b * hk)


def plan(out, lse, call: Call, scratch: dict[str, torch.Tensor] | None = None) -> list[Launch]:
    """The two launches; no size may be 0 but that of the cache's slots."""
    b, t, h, d = call.query.shape
    _, k, r, hk, d_value = call.value.shape
    rows, slots = t * (h // hk), k * r
    width = 0 if call.key_cos is None else call.key_cos.shape[1]
    settings = _choose(call)
    scratch = scratch or _scratch(call, settings)
    row_tiles, key_tiles = -(-rows // settings.block_rows), -(-slots // settings.block_keys)
    rotary = (call.key_cos, call.key_sin)
    spec = kernels.Spec(
        DIM=d,
        VALUE_DIM=d_value,
        WIDTH=width,
        INTERLEAVED=call.rotary_interleaved,
        KEY_FLOAT8=call.key.dtype == torch.float8_e4m3fn,
        VALUE_FLOAT8=call.value.dtype == torch.float8_e4m3fn,
        BIAS_PER_SLOT=k > 1 and call.logit_bias is not None and call.logit_bias.shape[3] == slots,
        SOFTCAP=call.logit_softcap > 0.0,
        SINGLE=settings.block_rows == 1,
        BLOCK_ROWS=settings.block_rows,
        BLOCK_KEYS=settings.block_keys,
        BLOCK_DIM=min(configs.power_of_two(d), settings.block_dim),
        BLOCK_VALUE=min(configs.power_of_two(d_value), settings.block_dim),
        BLOCK_PAIR=configs.power_of_two(width),
        BLOCK_REST=configs.power_of_two(d - 2 * width),
        PRECISION=settings.precision,
    )
    shared = {
        "positions": kernels.Positions(call.position, _as_bytes(call.valid), call.chunk),
        "scratch": kernels.Scratch(**scratch),
        "num_tokens": t,
        "num_heads": h,
        "num_slots": slots,
        "chunk_size": call.chunk_size,
        "num_rows": b * t * h,
    }
    attend = {
        **shared,
        "query": strided(kernels.Query, call.query),
        "key": _cache(call.key),
        "value": _cache(call.value),
        "mask": _per_slot(call.mask),
        "logit_bias": call.logit_bias,
        "rotary": None if call.key_cos is None else kernels.KeyRotary(*rotary, *map(stride_of, rotary)),
        "key_scale": _per_slot(call.key_scale),
        "value_scale": _per_slot(call.value_scale),
        "scale": float(call.scale),
        "softcap": float(call.logit_softcap) if call.logit_softcap > 0.0 else None,
        "heads_per_key": h // hk,
        "retrieved_length": r,
        "SPEC": constants(spec),
    }
    block_value = min(configs.power_of_two(d_value), _VALUES_AT_ONCE)
    combine = {
        **shared,
        "null_logit": call.null_logit,
        "null_value": strided(kernels.NullValue, call.null_value),
        "results": Results(out, lse, None),
        "BLOCK_KEYS": settings.block_keys,
        "VALUE_DIM": d_value,
        "BLOCK_TILES": _TILES_AT_ONCE,
        "BLOCK_VALUE": block_value,
    }
    programs = b * t * h * -(-d_value // block_value)
    combining = configs.LaunchSettings(1, _TILES_AT_ONCE, block_value, 4, 1)
    return [
        Launch("attend", kernels.attend_kernel, b * hk * key_tiles * row_tiles, attend, settings),
        Launch("combine", kernels.combine_kernel, programs, combine, combining),
    ]


def _as_bytes(x: torch.Tensor | None) -> torch.Tensor | None:
    """The interpreter cannot mask a load with a bool that was loaded, and sm_80 knows no float8."""
    return x.view(torch.uint8) if x is not None and x.dtype in (torch.bool, torch.float8_e4m3fn) else x


def _cache(x: torch.Tensor) -> kernels.Cache:
    return kernels.Cache(_as_bytes(x), *x.stride()[:-1])


def _per_slot(x: torch.Tensor | None) -> kernels.PerSlot | None:
    return None if x is None else kernels.PerSlot(_as_bytes(x), *x.stride())


def attend(call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse = common.allocate_outputs(call.query, call.value)
    if out.numel() == 0:
        return out, lse
    with _on_device_of(out):
        if interpreting() and call.query.dtype == torch.bfloat16:
            wide = torch.zeros_like(out, dtype=torch.float32)
            for launch in plan(wide, lse, call.mapped(_interpretable)):
                launch()
            out.copy_(wide)
            return out, lse
        kept, settled = {} if call.memory is None else call.memory, not configs._override
        settings = kept.get("settings") if settled else None
        scratch = _scratch(call, settings or _choose(call))
        if settings is None or not launched(call, "decode", {"out": out, "lse": lse, **scratch}):
            launch_all(call, "decode", plan(out, lse, call, scratch), keep=settled)
            if settled:
                kept["settings"] = _choose(call)
    return out, lse


def refusal(call: common.DecodeCall) -> str | None:
    """Why this call cannot run here, or None."""
    if call.key_rotary is not None and call.query.shape[-1] > LARGEST_TURNED:
        return (
            f"key_rotary turns keys of {call.query.shape[-1]} dimensions; the Triton kernels turn keys of at most "
            f"{LARGEST_TURNED}: cache keys that are turned already"
        )
    reason = common.refusal("Triton", call, LARGEST_HEAD)
    if reason is not None or interpreting():
        return reason
    if call.query.device.type != "cuda":
        return (
            f"query is on {call.query.device}; the Triton kernels need a CUDA tensor (or TRITON_INTERPRET=1 set before "
            "retro_kernels is imported)"
        )
    if _compute_capability(call.query.device) < 80:
        return f"{call.query.device} has a compute capability below 8.0, which the Triton kernels need"
    return None


project = common.project
forward = common.register("triton", attend, devices=("cpu", "cuda"))
