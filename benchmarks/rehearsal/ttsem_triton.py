"""The Triton kernels executed in bf16 on a CPU: `.venv-ttsem/bin/python -m benchmarks.rehearsal.ttsem_triton`.

ttsem compiles every launch with Triton's own front end for compute capability 9.0 and executes the IR. Shown of every
case: no access beyond a tensor's own memory, no two programs of a launch that touch the same element where one writes
it, nothing read that nothing wrote (all outputs and scratch begin as NaN), and values that follow the error rule of
retro_kernels/testing.py against fp64. The controls are kernels with a fault of each sort.

The environment: Python 3.12, ttsem 0.1.0, triton 3.8.0, torch 2.14.0, numpy.
"""

from __future__ import annotations

from unittest import mock

import torch
import triton
import triton.language as tl
from ttsem import sanitize

from benchmarks import fake_gpu, rehearsal
from retro_kernels import testing
from retro_kernels.ops import memory
from retro_kernels.testing import Case

PART = "ttsem"
SHOWN = "in bounds, no race between programs, nothing unwritten read, bf16 values by the error rule"

CCA = {"b": 1, "n": 70, "m": 32, "k": 2, "r": 24, "h": 2, "d": 32}
ENCODER = {"b": 1, "l": 1, "k": 2, "r": 40, "m": 32, "h": 2, "d": 32}
DECODE = {"b": 3, "m": 32, "k": 2, "r": 40, "h": 2, "d": 32, "t": 2, "positions": (70, 3, 31)}
CASES = (
    Case("plain", **CCA),
    Case("heads of 64, three row tiles, three key tiles", **CCA | {"n": 170, "m": 150, "r": 72, "d": 64}),
    Case("mask, grouped heads, heads of 20", **CCA | {"h": 4, "hk": 2, "d": 20}, options=("mask",)),
    Case("relative", **CCA, options=("mask", "relative", "relative_biases")),
    Case("bias and null slot", **CCA, options=("bias", "null")),
    Case("bias per neighbour", **CCA, options=("bias_per_neighbour",)),
    Case("rotary", **CCA, options=("rotary",)),
    Case("dropout", **CCA, dropout_p=0.25),
    Case("soft cap", **CCA, options=("softcap", "mask", "bias", "null")),
    Case("packed documents", **CCA, documents=(37, 33)),
    Case("plain", "self", **ENCODER),
    Case("relative, long", "self", **ENCODER | {"r": 140, "k": 1}, options=("mask", "relative", "relative_biases")),
    Case("causal, packed", "self", **ENCODER | {"l": 1, "k": 1, "r": 100}, causal=True, documents=(60, 40)),
    Case("plain", "cross", **ENCODER),
    Case("relative", "cross", **ENCODER, options=("mask", "relative", "relative_biases")),
    Case("absorbed", "projected", **CCA | {"e": 64}, strategy="absorb", options=("mask",)),
    Case(
        "absorbed, every option",
        "projected",
        **CCA | {"e": 64},
        strategy="absorb",
        dropout_p=0.25,
        options=("mask", "bias", "null", "relative", "relative_biases", "bias_key", "bias_value"),
    ),
    Case("plain", "decode", **DECODE),
    Case("mask, relative, null slot", "decode", **DECODE, options=("mask", "relative", "relative_biases", "null")),
    Case("soft cap", "decode", **DECODE, options=("softcap", "mask", "bias")),
    Case("int8 cache, one token", "decode", **DECODE | {"t": 1}, options=("int8",)),
    Case("float8 cache", "decode", **DECODE, options=("float8_e4m3fn",)),
    Case("from states", "projected_decode", **DECODE | {"e": 64}),
)
NAMES = {short: name for name, short in testing.SHORT_NAMES.items()}


def allocate(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """As `ops.memory.allocate`, filled with NaN."""
    empty = float("nan") if dtype.is_floating_point else torch.iinfo(dtype).min
    return torch.full(shape, empty, dtype=dtype, device=device)


def execute(case: Case) -> str:
    dtype = torch.bfloat16
    arguments = testing.make(case, dtype)
    grad_out = None
    if "decode" not in case.operation:
        grad_out = torch.randn(case.out_shape, generator=torch.Generator().manual_seed(3)).to(dtype)
    with (
        fake_gpu.kernels_on_cpu(90),
        mock.patch.object(memory, "allocate", allocate),
        sanitize.session(90, cuda_is_cpu=False) as state,
    ):
        given = testing.run(arguments, "triton", grad_out)
    if state.launches == 0 or state.races_unchecked:
        raise testing.Wrong(f"of {state.launches} launches {state.races_unchecked} were not checked for races")
    expected = testing.run(testing.as_dtype(arguments, torch.float64), "reference", grad_out)
    with testing.plain_precision():
        plain = testing.run(arguments, "reference", grad_out)
    largest = testing.assert_twice(given, plain, expected, dtype)
    return f"{state.launches} launches, largest error {largest:.1e}"


@triton.jit
def _past_the_end(x, size, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x + at, tl.zeros([BLOCK], tl.float32))


@triton.jit
def _same_element(x, size, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(x + at, tl.program_id(0).to(tl.float32), mask=at < size)


@triton.jit
def _unwritten(x, size, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x + at, tl.load(x + at, mask=at < size) + 1.0, mask=at < size)


def find(kernel, wanted: str) -> str:
    """Runs a kernel with a fault of that sort, on 100 elements that nothing wrote."""
    x = allocate((100,), torch.float32, torch.device("cpu"))
    with sanitize.session(90, cuda_is_cpu=False):
        try:
            kernel[(2,)](x, 100, BLOCK=64)
        except sanitize.KernelFault as stop:
            found = stop.fault.kind
        else:
            found = "NaN" if x.isnan().all() else "nothing"
    if found != wanted:
        raise testing.Wrong(f"found {found}, expected {wanted}")
    return f"found: {found}"


def main() -> None:
    with rehearsal.main(PART, __doc__) as part:
        for kernel, wanted in ((_past_the_end, "oob_write"), (_same_element, "race"), (_unwritten, "NaN")):
            part.check(
                "control",
                kernel.fn.__name__,
                "a fault that is there is found",
                lambda kernel=kernel, wanted=wanted: find(kernel, wanted),
            )
        for case in CASES:
            part.check(NAMES[case.operation], case.name, SHOWN, lambda case=case: execute(case))


if __name__ == "__main__":
    main()
