"""Every kernel of a target once, on small shapes: what compute-sanitizer watches.

python tests/gpu/sanitized.py TARGET [--control]
"""

from __future__ import annotations

import dataclasses
import sys

import gpu_problems as problems
import torch

from retro_kernels import testing
from retro_kernels.testing import Case

SIZES = {"b": 1, "n": 45, "m": 16, "k": 2, "r": 24, "h": 2, "d": 32}
ROW = {**SIZES, "l": 1, "k": 1, "r": 70, "causal": True, "documents": (30, 40)}
TOKEN = {"b": 3, "m": 16, "r": 24, "h": 4, "d": 32, "positions": (32, 0, 15)}
RELATIVE = problems.RELATIVE
OPTIONED = (
    Case("cca", **SIZES, hk=1, options=problems.ALL),
    Case("cca, relative", **SIZES, dropout_p=0.25, options=(*RELATIVE, "mask")),
    Case("cca, packed", **SIZES, documents=(20, 5, 20)),
    Case("self", "self", **SIZES, options=("mask", "bias", "rotary")),
    Case("self, relative", "self", **SIZES, dropout_p=0.25, options=RELATIVE),
    Case("causal, packed", "self", **ROW, options=RELATIVE),
    Case("cross", "cross", **SIZES, options=("mask", "bias", "rotary")),
    Case("cross, relative", "cross", **SIZES, dropout_p=0.25, options=RELATIVE),
    Case("absorb", "projected", **SIZES, e=48, strategy="absorb", options=("mask",)),
    Case("absorb, relative", "projected", **SIZES, e=40, strategy="absorb", dropout_p=0.25, options=problems.EVERY),
)
# For CUDA C++, with each of its head sizes: tiles of rows and of slots, one and two and many, sweeps, groups.
PLAINER = (
    Case("cca", **SIZES, options=("mask",)),
    Case("cca, grouped, keys of two tiles", **{**SIZES, "r": 40}, hk=1),
    Case("cca, packed", **SIZES, documents=(20, 5, 20)),
    Case("cca, rows of two tiles", **{**SIZES, "n": 150, "m": 70}),
    Case("cca, rows of two whole tiles", **{**SIZES, "n": 260, "m": 128}),
    Case("self, two tiles", "self", **{**SIZES, "r": 100}, options=("mask",)),
    Case("self, sweeps", "self", **{**SIZES, "r": 150, "k": 1}, hk=1),
    Case("cross", "cross", **SIZES, options=("mask",)),
    Case("absorb", "projected", **SIZES, e=64, strategy="absorb", options=("mask",)),
)
DECODING = (
    Case("decode", "decode", **TOKEN, options=("mask", "bias", "null")),
    Case("decode, int8, rows", "decode", **TOKEN, hk=1, t=2, options=("relative", "int8")),
    Case("decode, float8, turned keys", "decode", **TOKEN, hk=2, t=2, options=("rotary", "float8_e4m3fn")),
    Case("decode, states", "projected_decode", **TOKEN, e=304, options=("mask", "null")),
)


def calls(target: problems.Target) -> list[tuple[Case, torch.dtype]]:
    found = []
    if target.backend == "cuda":
        cases = [dataclasses.replace(case, d=d) for d in (64, 96, 128) for case in PLAINER]
        dtypes = (torch.bfloat16, torch.float16)
    else:
        cases, dtypes = list(OPTIONED), (torch.float32, torch.bfloat16)
    for dtype in dtypes:
        found += [(case, dtype) for case in cases]
    found += [(case, dtype) for dtype in (torch.float32, torch.bfloat16) for case in DECODING]
    return [(case, dtype) for case, dtype in found if target.takes(case, dtype) is None]


def main(name: str, control: bool) -> int:
    """-> how many calls were made."""
    target = next(x for x in problems.targets() if x.name == name)
    if control:  # a kernel of NVIDIA's own with copies by the same engine, for what the tool says of it
        x = torch.randn(512, 512, device=problems.DEVICE, dtype=torch.bfloat16)
        (x @ x).sum().item()
    planned = calls(target)
    for case, dtype in planned:
        arguments = testing.make(case, dtype, problems.DEVICE)
        grad_out = testing.draw_grad_out(arguments) if testing.has_gradients(arguments, target.backend) else None
        with target.alone(case):
            testing.run(arguments, target.backend, grad_out)
    if problems.ON_GPU:
        torch.cuda.synchronize()
    print(f"{len(planned)} calls of {target}", flush=True)
    return len(planned)


if __name__ == "__main__":
    main(sys.argv[1], "--control" in sys.argv)
