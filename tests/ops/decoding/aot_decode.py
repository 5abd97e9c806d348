"""Compiles the Triton decode kernels ahead of time, without a GPU, under the launch settings that `configs.py` ships.

    python tests/ops/decoding/aot_decode.py                # all, into compiled_settings.json
    python tests/ops/decoding/aot_decode.py --list ID ...  # only these, as JSON

Run after a change of kernels or settings, with each Triton, without TRITON_INTERPRET. An identifier is target, kernel,
rows that share a key/value head, dtype of the query, cache, width, and options.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parents[1] / "attention"))
import aot

from retro_kernels.ops.attention.triton import arguments, tiles
from retro_kernels.ops.decoding import common
from retro_kernels.ops.decoding.triton import kernels
from retro_kernels.ops.decoding.triton import launch as backend

TABLE = Path(__file__).with_name("compiled_settings.json")
CACHES = {"own": None, "int8": torch.int8, "fp8": torch.float8_e4m3fn}
# One row, several tokens or grouped heads, and the 32 heads that share encoder states; every version takes the same.
LISTED = (
    "sm_90 attend 1 bf16 own 128 plain",
    "sm_90 attend 4 bf16 own 128 plain",
    "sm_90 attend 1 bf16 int8 128 plain",
    "sm_90 attend 4 bf16 own 128 rotary",
    "sm_90 attend 32 bf16 own 896 plain",
    "sm_90 combine 1 bf16 own 128 options",
    "sm_80 attend 4 bf16 fp8 128 options",
    "sm_100 attend 32 bf16 own 896 plain",
)


def identifiers(version: str | None = None) -> list[str]:
    """What is compiled."""
    return list(LISTED)


def launch_of(identifier: str):
    """The launch with a mask and positions; with every other option at once, but for turned keys, at "options"."""
    target, kind, rows, dtype_name, cache_name, width, options = identifier.split()
    sm, t, d, dtype = int(target[3:]), int(rows), int(width), aot.DTYPES[dtype_name]
    states = d > 256
    b, k, r, hk = 1 if options == "one" else 64, 2, 128, 1 if states else 32
    cache = CACHES[cache_name] or dtype

    def empty(*shape, dtype=dtype):
        return torch.empty(*shape, dtype=dtype, device="meta")

    def maybe(there, *shape, dtype=torch.float32):
        return empty(*shape, dtype=dtype) if there else None

    everything, turned = options == "options", options == "rotary"
    call = common.Call(
        query=empty(b, t, hk, d),
        key=empty(b, k, r, hk, d, dtype=cache),
        value=empty(b, k, r, hk, d, dtype=cache),
        mask=empty(b, k, r, dtype=torch.bool),
        logit_bias=maybe(everything, b, t, hk, r),
        null_logit=maybe(everything, b, t, hk),
        null_value=maybe(everything, hk, d, dtype=dtype),
        key_cos=maybe(turned, r, d // 2),
        key_sin=maybe(turned, r, d // 2),
        key_scale=maybe(cache != dtype, b, k, r),
        value_scale=maybe(cache != dtype, b, k, r),
        position=empty(b, dtype=torch.int64),
        valid=empty(b, dtype=torch.bool),
        chunk=maybe(everything, b, dtype=torch.int64),
        rotary_interleaved=False,
        scale=d**-0.5,
        chunk_size=64,
    )
    launches = backend.plan(empty(b, t, hk, d), empty(b, t, hk, dtype=torch.float32), call)
    return sm, next(launch for launch in launches if launch.kind == kind)


def described(identifier: str, version: str | None = None) -> str:
    x = launch_of(identifier)[1].settings
    return f"{x.block_rows}x{x.block_keys}x{x.block_dim}, {x.num_warps} warps, {x.num_stages} stages"


def compile_launch(identifier: str) -> dict[str, object]:
    return {"settings": described(identifier), **aot.machine_code(*launch_of(identifier))}


def faults(identifier: str, result: dict) -> list[str]:
    """What the gate forbids; products of several rows are matrix products except in fp32."""
    target, kind, rows, dtype = identifier.split()[:4]
    found = aot.machine_faults(result, 0, aot.SERVED_LIMIT[int(target[3:])])
    if (
        target == "sm_90"
        and kind == "attend"
        and rows != "1"
        and dtype != "fp32"
        and not result["mma"] + result["wgmma"]
    ):
        found.append("has no matrix instruction")
    return found


def kernels_hash() -> str:
    """Of the kernels' code."""
    return aot.hash_of((str(arguments.__file__), str(tiles.__file__), str(kernels.__file__)))


if __name__ == "__main__":
    sys.exit(aot.main(sys.modules[__name__], sys.argv[1:]))
