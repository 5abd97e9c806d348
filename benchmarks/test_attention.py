"""pytest-benchmark over the workloads: `pytest benchmarks -k "retro-172m and bf16"`. Each variant is checked first."""

import pytest
import torch

from retro_kernels.bench import environment, suite, verify
from retro_kernels.bench.operations import DTYPES, MODES, PLAIN
from retro_kernels.bench.timing import peak_extra_bytes
from retro_kernels.bench.variants import CompileBudget, Variant
from retro_kernels.bench.workloads import DEFAULT, QUICK, select

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CASES = [workload.on(DEVICE) for workload in select(default=QUICK if DEVICE.type == "cpu" else DEFAULT)]
VARIANTS = [
    (workload, variant.name)
    for workload in CASES
    for variant in workload.variants(DEVICE, compiled=False)
    if isinstance(variant, Variant) and not variant.name.startswith("sdpa[math")
]


@pytest.fixture(scope="module")
def prepared():
    """Makes a workload's inputs as bf16 numbers and its fp64 truths, with its option and without; keeps the last."""
    kept = {}

    def prepare(workload):
        if workload not in kept:
            kept.clear()
            inputs = workload.inputs(torch.bfloat16, DEVICE)
            plain = workload.with_option(PLAIN)
            truths = {case: verify.Truth(case, suite.inputs_of(case, inputs)) for case in (workload, plain)}
            kept[workload] = inputs, truths
        return kept[workload]

    return prepare


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("workload", "name"), VARIANTS, ids=lambda x: x if isinstance(x, str) else f"{x.operation}-{x.option}-{x.name}"
)
def test_attention(benchmark, prepared, workload, name, dtype, mode):
    if mode not in workload.modes:
        pytest.skip("it has no backward")
    base, truths = prepared(workload)
    (variant,) = (v for v in workload.variants(DEVICE, compiled=False) if v.name == name)
    reason = variant.refusal and variant.refusal(dtype, mode)
    if reason:
        pytest.skip(reason)
    inputs = verify.leaves(tuple(t.to(DTYPES[dtype]) for t in base), mode != "forward")
    inputs = suite.inputs_of(variant.workload, inputs)
    status, reason, errors = suite.check(variant, inputs, mode, truths, CompileBudget(0.0, 0.0), dtype, {})
    if status == suite.SKIPPED:
        pytest.skip(reason)
    assert status == suite.OK, f"not timed, because it is not right: {reason}"

    def call():
        verify.run(variant.workload, variant.attention, inputs, mode)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    with variant.context():
        benchmark.group = f"{workload.operation} {workload.option} {workload.name} {dtype} {mode}"
        benchmark.extra_info.update(
            flops=workload.flops(mode),
            bytes=workload.bytes(mode, DTYPES[dtype]),
            peak_extra_bytes=peak_extra_bytes(call, DEVICE),
            environment=environment.collect(DEVICE),
            errors=verify.to_json(errors),
        )
        benchmark.pedantic(call, rounds=5, warmup_rounds=1)
