"""The dispatcher's table is what the committed results say, and says nothing that was not measured and checked."""

import copy
import json
from types import SimpleNamespace

import pytest
import torch

from benchmarks import evidence as generator
from retro_kernels.bench import results
from retro_kernels.ops import backends
from retro_kernels.ops.verification import evidence

DEVICE = "NVIDIA H100"


def document(times, **changes):
    """A run in full; `times`: (workload, mode, backend) -> ms."""
    made = results.new({"device": DEVICE}, {"suite": "gpu", "reduced": False})
    made["parts"] = [{"name": name, "status": "ok"} for name in generator.REQUIRED]
    made["rows"] = [
        {
            "operation": "cca",
            "option": "plain",
            "workload": workload,
            "shape": "b=8 n=2048 16 heads of 64; no",
            "dtype": "bf16",
            "mode": mode,
            "variant": f"retro_kernels[{backend}]",
            "status": "ok",
            "p50_ms": ms,
        }
        for (workload, mode, backend), ms in times.items()
    ]
    return {**made, **changes}


FASTER = {
    ("a", "forward", "triton"): 2.0,
    ("a", "forward", "cuda"): 1.0,
    ("b", "forward", "triton"): 1.0,
    ("b", "forward", "cuda"): 1.1,
}


def test_the_committed_table_is_generated_from_the_committed_results():
    assert json.loads(evidence.TABLE.read_text())["devices"] == generator.collect(generator.RESULTS)


def test_the_winner_takes_less_time_over_all():
    assert generator.winners(document(FASTER)) == {"chunked_cross_attention bfloat16 64": "cuda"}
    slower = {key: 1 / ms for key, ms in FASTER.items()}
    assert generator.winners(document(slower)) == {"chunked_cross_attention bfloat16 64": "triton"}


def test_what_was_not_timed_side_by_side_has_no_winner():
    assert generator.winners(document({("a", "forward", "cuda"): 1.0, ("b", "forward", "triton"): 9.0})) == {}


@pytest.mark.parametrize("fault", ["reduced", "interrupted", "failed", "missing"])
def test_a_run_that_does_not_verify_the_device_counts_nothing(fault):
    made = copy.deepcopy(document(FASTER))
    if fault == "reduced":
        made["settings"]["reduced"] = True
    elif fault == "interrupted":
        made["interrupted"] = True
    elif fault == "failed":
        made["parts"][0]["status"] = "failed"
    else:
        del made["parts"][0]
    assert generator.winners(made) is None


def test_the_dispatcher_follows_the_table(monkeypatch):
    query = SimpleNamespace(device=torch.device("cuda:0"), dtype=torch.bfloat16, shape=(1, 1, 1, 8, 2, 64))
    call = SimpleNamespace(operation="chunked_cross_attention", query=query)
    default = backends.DEFAULT_ORDER["cuda"]
    assert default == ("triton", "cuda")
    assert evidence.order(call, default) == default
    monkeypatch.setattr(evidence, "table", lambda: {DEVICE: {"chunked_cross_attention bfloat16 64": "cuda"}})
    monkeypatch.setattr(evidence, "_device_name", lambda device: DEVICE)
    assert evidence.order(call, default) == ("cuda", "triton")
    query.dtype = torch.float16
    assert evidence.order(call, default) == default
    monkeypatch.setattr(evidence, "_device_name", lambda device: "another")
    query.dtype = torch.bfloat16
    assert evidence.order(call, default) == default
