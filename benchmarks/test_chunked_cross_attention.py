"""pytest-benchmark over the workloads: `pytest benchmarks -k "retro-172m and bf16"`. Each variant is checked first."""

import pytest
import torch

from . import environment, peers, verify
from .timing import peak_extra_bytes
from .workloads import DTYPES, MODES, QUICK, WORKLOADS

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NAMES = QUICK if DEVICE.type == "cpu" else tuple(WORKLOADS)


@pytest.fixture(scope="module", params=NAMES)
def prepared(request):
    """The workload, its inputs as bf16 numbers and its fp64 truth, made once for all of its cases."""
    workload = WORKLOADS[request.param].on(DEVICE)
    inputs = workload.inputs(torch.bfloat16, DEVICE)
    return workload, inputs, verify.Truth(workload, inputs)


def variants():
    found = peers.variants(WORKLOADS[NAMES[0]].on(DEVICE), DEVICE, compiled=False)
    return [v.name for v in found if isinstance(v, peers.Variant) and v.name != "sdpa[math]"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", variants())
def test_chunked_cross_attention(benchmark, prepared, name, dtype, mode):
    workload, base, truth = prepared
    found = {v.name: v for v in peers.variants(workload, DEVICE, compiled=False)}
    inputs = verify.leaves(tuple(t.to(DTYPES[dtype]) for t in base), mode != "forward")
    eager = truth.errors(verify.run(found["eager"].attention, inputs, mode))
    variant = found[name]
    with variant.context():
        errors = truth.errors(verify.run(variant.attention, inputs, mode))
        reason = verify.judge(errors, None if name == "eager" else eager, dtype)
        assert reason is None, f"not timed, because it is not right: {reason}"

        def call():
            verify.run(variant.attention, inputs, mode)
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()

        benchmark.group = f"{workload.name} {dtype} {mode}"
        benchmark.extra_info.update(
            flops=workload.flops(mode), bytes=workload.bytes(mode, DTYPES[dtype]),
            peak_extra_bytes=peak_extra_bytes(call, DEVICE), environment=environment.collect(DEVICE),
            errors=verify.to_json(errors),
        )  # fmt: skip
        benchmark.pedantic(call, rounds=5, warmup_rounds=1)
