"""Parameters in fp32 beside half-precision activations, one at a time and all: each gradient has its own dtype, and
every number is right by the oracle."""

from __future__ import annotations

import dataclasses

import cases
import pytest
import torch
from cases import Case

import retro_kernels as rk

SMALL = {"b": 2, "n": 11, "m": 4, "k": 2, "r": 3, "h": 2, "hk": 1, "d": 8, "d_value": 4, "e": 6, "l": 2}
SMALL |= {"positions": (4, 1)}
RELATIVE = ("relative", "relative_biases", "bias", "mask")
NAMES = ("attention_bias", "relative_key", "content_bias", "relative_bias")
NULL, BIASES = ("null_key", "null_value"), ("bias_key", "bias_value")
# Every operation with all parameters that may be in fp32, and their names.
CASES = (
    (Case("cca", "cca", **SMALL, options=(*RELATIVE, "null")), (*NAMES, *NULL)),
    (
        Case("absorb", "projected", **SMALL, strategy="absorb", options=(*RELATIVE, "null", *BIASES)),
        (*NAMES, *NULL, *BIASES),
    ),
    (Case("absorb without null", "projected", **{**SMALL, "d_value": 16}, strategy="absorb", options=BIASES), BIASES),
    (
        Case("materialise", "projected", **SMALL, strategy="materialise", options=(*RELATIVE, "null", *BIASES)),
        (*NAMES, *NULL, *BIASES),
    ),
    (Case("self", "self", **SMALL, options=RELATIVE), NAMES),
    (Case("cross", "cross", **SMALL, options=RELATIVE), NAMES),
    (Case("decode", "decode", **SMALL, options=(*RELATIVE, "null")), (*NAMES, *NULL)),
    (
        Case("decode states", "projected_decode", **SMALL, options=(*RELATIVE, "null", *BIASES)),
        (*NAMES, *NULL, *BIASES),
    ),
    (Case("rotary", "cca", **SMALL, options=("rotary", "null")), NULL),
    (Case("rotary, half tables", "cca", **SMALL, options=("rotary", "null", "half_tables")), NULL),
    (Case("self, half tables", "self", **SMALL, options=("rotary", "half_tables")), ()),
    (Case("decode, half tables", "decode", **SMALL, options=("rotary", "half_tables")), ()),
)


# The interpreter is slow: there in bf16, with everything in fp32, one operation of each kernel.
CHECKS = [
    (backend, case, names, dtype)
    for backend in ("reference", "cpu", "triton")
    for case, names in CASES
    for dtype in (torch.bfloat16, torch.float16)
    if backend != "triton" or (dtype == torch.bfloat16 and case.name in ("cca", "absorb", "self", "decode states"))
]


@pytest.mark.parametrize(
    ("backend", "case", "names", "dtype"), CHECKS, ids=lambda x: "" if type(x) is tuple else str(x)
)
def test_every_parameter_has_its_own_dtype(backend, case, names, dtype, guarded):
    status = rk.backends()[backend]
    if not status.available:
        pytest.skip(status.reason)
    if backend == "triton":
        case, some = dataclasses.replace(case, b=1, n=7, l=1), [names]
    else:
        some = [(), *((name,) for name in names), names]
    for fp32 in some:
        arguments = cases.make(dataclasses.replace(case, fp32=fp32), dtype)
        if "bias_value" in arguments:
            # As large as the values' differences and no larger: what a rounded output costs absorbed gradients beyond
            # that is said in ops/absorbed/cpu.py, and is not what this test is about.
            arguments["bias_value"].data.mul_(0.25)
        assert {name for name in names if arguments[name].dtype == torch.float32} == set(fp32)
        grad_out = torch.randn(case.out_shape, generator=torch.Generator().manual_seed(1)).to(dtype).double()
        expected, given = cases.expect(arguments, grad_out), cases.run(arguments, backend, grad_out)
        for name, x in given.items():
            like = {"out": dtype, "lse": torch.float32}.get(name)
            assert x.dtype == (like or arguments[name.removeprefix("gradient of ")].dtype), (fp32, name)
        plain = cases.same_precision(arguments, grad_out)
        cases.assert_twice(given, plain, {name: expected[name] for name in given}, dtype)
