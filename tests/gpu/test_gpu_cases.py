"""Every kernel in every option against the fp64 reference, at RETRO's sizes: outputs poisoned, memory guarded, the same
bits twice, and by the launches of the kernels that the test is for."""

from __future__ import annotations

import gpu_problems as problems
import pytest
import torch

from retro_kernels import testing

pytestmark = pytest.mark.gpu
FLOORS = testing.KERNEL_FLOOR if problems.ON_GPU else testing.HALF_FLOOR


def check(target, case, dtype):
    arguments = testing.poison_unread(testing.make(case, dtype, problems.DEVICE))
    with target.alone(case):
        testing.check_call(arguments, target.backend, FLOORS)


PLANNED = [
    pytest.param(target, dtype, case, id=f"{target}-{name}-{part}-{case}")
    for target in problems.targets()
    for name, dtype in problems.DTYPES.items()
    for part, cases in problems.PARTS.items()
    for case in problems.problems(target, dtype, cases)
]


@pytest.mark.parametrize("d", [64, 128])
def test_smoke(target, d):
    """The first thing that a GPU is asked: plain chunked cross-attention in bf16, forward and backward."""
    check(target, target.problem(problems.case("smoke", d=d)), torch.bfloat16)


@pytest.mark.parametrize(("target", "dtype", "case"), PLANNED, indirect=["target"])
def test_case(target, dtype, case):
    check(target, case, dtype)


def test_every_option_is_among_the_cases_of_every_kind_of_kernel():
    """What the suite says about a backend is said of every option that it takes."""
    on = {part: {option for case in cases for option in case.options} for part, cases in problems.PARTS.items()}
    common = {"mask", "bias", "null", "relative", "relative_biases"}
    assert common | {"rotary", "rotary_interleaved", "rotary_partial", "bias_per_neighbour"} <= on["attention"]
    assert common | {"bias_key", "bias_value", "bias_per_neighbour"} <= on["absorb"]
    assert common | {"int8", "float8_e4m3fn", "turned", "rotary", "valid", "bias_key"} <= on["decode"]
    hopper = problems.SM90
    taken = [case for case in map(hopper.fit, problems.CASES) if hopper.takes(case, torch.bfloat16) is None]
    assert {case.operation for case in taken} == {"cca", "self", "cross", "projected", "decode", "projected_decode"}
    assert {case.d for case in taken if case.operation == "cca"} == {64, 96, 128}
