"""Compiles the absorbed Triton kernels ahead of time, without a GPU, under the launch settings that `configs.py` ships.

    python tests/ops/absorbed/aot_absorbed.py                # all, into compiled_settings.json
    python tests/ops/absorbed/aot_absorbed.py --list ID ...  # only these, as JSON

Run after a change of kernels or settings, with each Triton, without TRITON_INTERPRET. An identifier is target, kernel,
dtype, width of the head, and "plain" (a mask) or "options" (every option at once, with relative positions).
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parents[1] / "attention"))
import aot

from retro_kernels.ops.absorbed import common
from retro_kernels.ops.absorbed.triton import configs
from retro_kernels.ops.absorbed.triton import launch as backend
from retro_kernels.ops.attention.triton import arguments, tiles
from retro_kernels.ops.launching import Launch

TABLE = Path(__file__).with_name("compiled_settings.json")

# What is known to fall short: bytes of stack a thread that may spill, and what is not multiplied by WGMMA throughout on
# sm_90. All but one of it is every option at once, above all the gradients of relative positions in `backward_heads`,
# whose run of 16 distances is below a WGMMA's 64 rows.
MAY_SPILL = {
    "sm_80 backward_heads bf16 64 options": 216,
    "sm_80 backward_heads bf16 128 options": 632,
    "sm_80 backward_heads fp32 128 options": 248,
    "sm_90 backward_heads bf16 64 options": 584,
    "sm_90 backward_heads bf16 128 options": 1056,
    "sm_90 backward_states bf16 128 options": 48,
    "sm_90 backward_heads fp32 128 options": 16,
    "sm_100 backward_heads bf16 64 options": 624,
    "sm_100 backward_heads bf16 128 options": 1416,
    "sm_100 backward_states bf16 64 plain": 8,
    "sm_100 backward_states bf16 128 options": 168,
    "sm_100 backward_heads fp32 128 options": 32,
}
NOT_ALL_WGMMA = (
    "sm_90 backward_heads bf16 64 options",
    "sm_90 backward_heads bf16 128 options",
)


def identifiers(version: str | None = None) -> list[str]:
    """What is compiled; every version takes the same settings."""
    return [f"sm_90 {kind} bf16 128 plain" for kind in configs.KINDS]


def launch_of(identifier: str) -> tuple[int, Launch]:
    """The launch at the paper's chunk, plain (a mask at most) or with every option at once."""
    target, kind, dtype_name, width, options = identifier.split()
    sm, d, dtype, everything = int(target[3:]), int(width), aot.DTYPES[dtype_name], options == "options"

    def empty(*shape, dtype=dtype):
        return torch.empty(*shape, dtype=dtype, device="meta")

    b, n, m, k, r, h, e = 2, 256, 64, 2, 128, 16, 896

    def maybe(*shape, dtype=dtype):
        return empty(*shape, dtype=dtype) if everything else None

    call = common.Call(
        query=empty(b, n, h, d),
        encoded=empty(b, n // m, k, r, e),
        w_key=empty(h, d, e),
        w_value=empty(h, d, e),
        bias_key=maybe(h, d),
        bias_value=maybe(h, d),
        mask=empty(b, n // m, k, r, dtype=torch.bool),
        attention_bias=maybe(h, m, r, dtype=torch.float32),
        relative_key=maybe(h, m + r - 1, d),
        content_bias=maybe(h, d),
        relative_bias=maybe(h, d),
        null_key=maybe(h, d),
        null_value=maybe(h, d),
        dropout_seed=maybe(1, dtype=torch.int64),
        scale=d**-0.5,
        dropout_p=0.1 if everything else 0.0,
        stride=m,
        first_token=m - 1,
    )
    out, lse = common.allocate_forward(call.query, call.w_value, call.attention_bias)
    settings = configs.overrides.get(kind) or configs.rule(kind, sm, dtype, m, k * r, e, everything)
    copies = {
        name: empty(4, *getattr(call, name).shape, dtype=torch.float32)
        for name in backend.SUMMED
        if getattr(call, name) is not None
    }
    with configs.override(**{kind: settings}):
        if kind == "forward":
            return sm, backend.plan_forward(out, lse, call)
        if kind == "backward_heads":
            return sm, backend.plan_heads(out, None, out, lse, call.query, copies, call)
        return sm, backend.plan_states(out, None, out, lse, call.encoded, call)


def described(identifier: str, version: str | None = None) -> str:
    x = launch_of(identifier)[1].settings
    return f"{x.block_rows}x{x.block_slots}x{x.block_encoder}, {x.num_warps} warps, {x.num_stages} stages"


def compile_launch(identifier: str) -> dict[str, object]:
    return {"settings": described(identifier), **aot.machine_code(*launch_of(identifier))}


def faults(identifier: str, result: dict) -> list[str]:
    """What the gate forbids."""
    target, _, dtype, _, _ = identifier.split()
    found = aot.machine_faults(result, MAY_SPILL.get(identifier, 0), aot.SERVED_LIMIT[int(target[3:])])
    whole = result["wgmma"] and not result["mma"]
    if target == "sm_90" and dtype != "fp32" and not whole and identifier not in NOT_ALL_WGMMA:
        found.append(f"not every product is a WGMMA: {result['wgmma']} wgmma and {result['mma']} mma instructions")
    return found


def kernels_hash() -> str:
    """Of the kernels' code."""
    return aot.hash_of((str(arguments.__file__), str(tiles.__file__), *backend.SOURCES))


if __name__ == "__main__":
    sys.exit(aot.main(sys.modules[__name__], sys.argv[1:]))
