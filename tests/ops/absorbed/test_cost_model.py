"""The cost model counts what the strategies do, "auto" takes what it says, and `rk.explain` says it too."""

from __future__ import annotations

import dataclasses
import types

import cases
import pytest
import torch

import retro_kernels as rk
from retro_kernels.ops import projected as api
from retro_kernels.ops.absorbed import cost_model
from retro_kernels.ops.absorbed.cost_model import Constants, Phase, Work
from retro_kernels.ops.backends import ATTENTION as CORE

CPU = torch.device("cpu")
M, K, R, E, H, HK, D, DV = 8, 2, 16, 24, 4, 2, 16, 12
SHAPES = {"query": (2, 21, H, D), "encoded": (2, 2, K, R, E), "w_key": (HK, D, E), "w_value": (HK, DV, E)}


def call(gradient=True, **changes):
    x = {name: torch.randn(shape, requires_grad=gradient) for name, shape in SHAPES.items()}
    return {**x, "chunk_size": M, **changes}


def work_of(x, **changes):
    return api.work(api.prepare(**{**x, **changes}))


def flops(strategy, work):
    return {phase.kind: phase.flops for phase in cost_model.phases(strategy, work)}


def test_counts_by_hand():
    """2 sequences of 21 tokens: 14 of each attend, to 2 chunks of 32 slots."""
    work = work_of(call())
    queries, chunks, slots = 2 * 14, 2 * 2, K * R
    assert (work.queries, work.chunks, work.slots, work.backward) == (queries, chunks, slots, True)
    projection = 2 * chunks * slots * E * HK * (D + DV)
    core = 2 * queries * slots * H * (D + DV)
    assert flops("materialise", work) == {
        "project_forward": projection,
        "core_forward": core,
        "core_backward": 2.5 * core,
        "project_backward": 2 * projection,
    }
    weights, states = 2 * queries * H * E * (D + DV), 2 * 2 * queries * H * E * slots
    assert flops("absorb", work) == {
        "absorb_forward_weights": weights,
        "absorb_forward_states": states,
        "absorb_backward_weights": 2.5 * weights,
        "absorb_backward_states": 3 * states,
    }
    key_values, lse = 4 * chunks * slots * HK * (D + DV), 4 * queries * H
    assert cost_model.saved_bytes("materialise", work) == key_values + lse
    assert cost_model.saved_bytes("absorb", work) == lse
    assert cost_model.memory("absorb", work._replace(backward=False)) == 0
    moved = cost_model.phases("materialise", work)[0].bytes
    assert moved == 4 * (chunks * slots * E + HK * (D + DV) * E) + key_values


@pytest.mark.parametrize(
    ("h", "hk", "d", "e", "slots", "expected"),
    [
        (12, 12, 128, 896, 256, 0.70),
        (16, 16, 64, 896, 256, 1.17),
        (32, 32, 128, 896, 5120, 0.48),
        (32, 8, 128, 4096, 256, 2.82),
    ],
)
def test_the_ratio_of_flops_at_the_shapes_of_the_design(h, hk, d, e, slots, expected):
    work = Work(2048, 32, slots, e, h, hk, d, d, 2)
    ratio = sum(flops("absorb", work).values()) / sum(flops("materialise", work).values())
    assert ratio == pytest.approx(expected, abs=0.005)
    assert ratio == pytest.approx((64 * h * (d + slots)) / (slots * (hk * d + 64 * h * d / e)))


def test_what_is_not_wanted_is_not_counted():
    """Frozen parameters, frozen states, no gradient at all, and what recomputing adds."""
    x = call()
    whole = flops("materialise", work_of(x))
    frozen = {name: x[name].detach() for name in ("w_key", "w_value")}
    assert flops("materialise", work_of(x, **frozen))["project_backward"] == whole["project_backward"] / 2
    absorbed = flops("absorb", work_of(x))
    without = flops("absorb", work_of(x, **frozen))
    assert without["absorb_backward_weights"] == absorbed["absorb_backward_weights"] * 1.5 / 2.5
    assert without["absorb_backward_states"] == absorbed["absorb_backward_states"] * 2.5 / 3
    with torch.no_grad():
        assert not work_of(x).backward
    assert not work_of(call(gradient=False)).backward
    twice = cost_model.phases("materialise", work_of(x, recompute=True))
    assert sum(phase.flops for phase in twice) == sum(whole.values()) + whole["project_forward"] + whole["core_forward"]


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
def test_saved_bytes_are_what_autograd_keeps(recompute, mask):
    """Keys, values and the lse of the fused core, counted by what is packed; masked states are not copied."""
    if CORE["cpu"].unavailable() is not None:
        pytest.skip(CORE["cpu"].unavailable())
    x = call(neighbour_mask=torch.rand(2, 2, K, R) > 0.3 if mask else None)
    kept = {}
    out = None

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = rk.projected_chunked_cross_attention(**x, strategy="materialise", recompute=recompute)
    for given in (*x.values(), out):
        if isinstance(given, torch.Tensor):
            kept.pop(given.untyped_storage().data_ptr(), None)
    work = work_of(x, recompute=recompute)
    found = sum(storage.nbytes() for storage in kept.values())
    lse_of_idle_tokens = 4 * 2 * 7 * H  # the tokens before the first chunk have an lse too
    expected = cost_model.saved_bytes("materialise", work) + lse_of_idle_tokens
    assert found <= expected if recompute else found == expected


def test_rates_between_widths_and_beyond():
    known = Constants("", True, "", {"a": ((1024, 100.0), (4096, 50.0))}, 10.0)
    assert [known.rate("a", e) for e in (64, 1024, 2048, 4096, 8192)] == [100.0, 100.0, 75.0, 50.0, 50.0]
    assert known.seconds([Phase("a", 200.0, 1.0), Phase("a", 1.0, 40.0)], 1024) == 2.0 + 4.0
    assert known.seconds([Phase("not measured", 1.0, 1.0)], 1024) is None


def test_the_pick():
    assert cost_model.pick({"materialise": 1.0, "absorb": 1.2}, {"materialise": 5, "absorb": 0}) == "materialise"
    assert cost_model.pick({"materialise": 1.0, "absorb": 1.02}, {"materialise": 5, "absorb": 0}) == "absorb"
    assert cost_model.pick({"materialise": 1.0, "absorb": None}, {"materialise": 5, "absorb": 0}) == "materialise"
    assert cost_model.pick({"materialise": None, "absorb": None}, {"materialise": 5, "absorb": 0}) == "materialise"


def test_the_committed_constants_are_complete():
    for entry in cost_model.table():
        assert entry["commit"], entry["device"]
        assert entry["bandwidth"] > 1e9
        for precision, rates in entry["rates"].items():
            assert set(rates) <= set(cost_model.KINDS), precision
            assert {"project_forward", "core_forward"} <= set(rates)
            for points in rates.values():
                assert points == sorted(points)
                assert all(rate > 1e8 for _, rate in points)


def test_a_device_that_was_not_measured_is_said(monkeypatch):
    entry = next(entry for entry in cost_model.table() if entry["type"] == "cpu")
    monkeypatch.setattr(cost_model, "device_name", lambda device: entry["device"])
    known = cost_model.constants(CPU, torch.float32)
    assert known.measured
    assert entry["commit"] in known.source
    assert not cost_model.constants(CPU, torch.float64).measured
    monkeypatch.setattr(cost_model, "device_name", lambda device: "another CPU")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3 * entry["threads"])
    scaled = cost_model.constants(CPU, torch.float32)
    assert not scaled.measured
    assert "NOT measured for fp32 on another CPU" in scaled.source
    assert scaled.rate("core_forward", 64) == 3 * known.rate("core_forward", 64)


def test_a_gpu_that_was_not_measured_is_assumed_from_its_properties(monkeypatch):
    found = types.SimpleNamespace(
        major=9, multi_processor_count=100, clock_rate=2_000_000, memory_clock_rate=1_000_000, memory_bus_width=8000
    )
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
    known = cost_model.constants(torch.device("cuda"), torch.bfloat16)
    assert not known.measured
    assert "NOT measured on a GPU: assumed shares" in known.source
    assert known.rate("project_forward", 896) == pytest.approx(0.7 * 100 * 2e9 * 4096)
    assert known.bandwidth == pytest.approx(0.8 * 2e12)
    work = Work(2048, 32, 256, 896, 32, 32, 128, 128, 2, backward=True)
    assert all(known.seconds(cost_model.phases(name, work), 896) > 0 for name in cost_model.STRATEGIES)


@pytest.mark.parametrize("taken", cost_model.STRATEGIES)
def test_auto_takes_what_the_model_says(taken, monkeypatch):
    """And with it the same numbers, dropped probabilities included, as when it is asked for by name."""
    monkeypatch.setattr(api, "absorb_refusal", lambda given: None)
    monkeypatch.setattr(cost_model, "pick", lambda times, memory: taken)
    cost_model._faster.cache_clear()
    x = call(dropout_p=0.5, backend="reference")
    results = []
    for strategy in ("auto", taken):
        torch.manual_seed(3)
        results.append(rk.projected_chunked_cross_attention(**x, strategy=strategy))
    cost_model._faster.cache_clear()
    assert torch.equal(*results)
    other = next(name for name in cost_model.STRATEGIES if name != taken)
    monkeypatch.setattr(api, f"_{other}", None)
    rk.projected_chunked_cross_attention(**x)


def test_auto_does_not_absorb_on_the_reference():
    reason = api.absorb_refusal(api.prepare(**call(), backend="reference"))
    assert "reference" in reason
    doubles = {name: value.double() if isinstance(value, torch.Tensor) else value for name, value in call().items()}
    assert "no fused kernel" in api.absorb_refusal(api.prepare(**doubles))
    tables = {"query_rotary": (torch.ones(M, 4),) * 2, "key_rotary": (torch.ones(R, 4),) * 2}
    assert "turned" in api.absorb_refusal(api.prepare(**call(), **tables))


def test_auto_compiles_once_for_every_length():
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph

    weights = [torch.randn(SHAPES[name], requires_grad=True) for name in ("w_key", "w_value")]

    def attend(query, encoded, mask):
        return rk.projected_chunked_cross_attention(query, encoded, *weights, chunk_size=M, neighbour_mask=mask)

    torch._dynamo.reset()
    compiled = torch.compile(attend, fullgraph=True, dynamic=True, backend=keep)
    for l in (5, 7, 9):
        x = torch.randn(2, M * l, H, D), torch.randn(2, l, K, R, E), torch.rand(2, l, K, R) > 0.3
        torch.testing.assert_close(compiled(*x), attend(*x))
    assert len(graphs) == 1


def test_explain_of_tensors_meta_tensors_and_shapes_is_the_same():
    x = call()
    explained = [
        rk.explain(**x),
        rk.explain(**{name: x[name].to("meta") for name in SHAPES}, chunk_size=M, device="cpu"),
        rk.explain(**SHAPES, chunk_size=M, dtype=torch.float32, device="cpu"),
        rk.explain(x["query"], *list(SHAPES.values())[1:], chunk_size=M),
    ]
    for other in explained[1:3]:
        assert dataclasses.replace(other, rows=()) == dataclasses.replace(explained[0], rows=())
        assert other.rows == explained[0].rows
    assert explained[3].backward
    assert not rk.explain(**SHAPES, chunk_size=M, backward=False, device="cpu").backward


def test_explain_is_a_table():
    found = rk.explain(**SHAPES, chunk_size=M, dtype=torch.float32, device="cpu", neighbour_mask=(2, 2, K, R))
    assert [(row.strategy, row.recompute) for row in found.rows] == [
        ("materialise", False),
        ("materialise", True),
        ("absorb", False),
    ]
    text = str(found)
    for part in (
        "b 2, n 21, m 8, l 2, k 2, r 16, e 24, 4 heads of 16 (2 key/value), fp32; forward and backward",
        "GFLOP",
        "MB saved",
        "predicted",
        f"chosen: {found.chosen}",
        found.why,
        found.source,
    ):
        assert part in text
    assert text.count("<- chosen") == 1
    (line,) = [line for line in text.splitlines() if "<- chosen" in line]
    assert line.startswith(found.chosen)


def test_explain_says_why_a_strategy_is_refused():
    tables = {"query_rotary": ((M, 4), (M, 4)), "key_rotary": ((R, 4), (R, 4))}
    found = rk.explain(**SHAPES, chunk_size=M, device="cpu", **tables)
    assert found.chosen == "materialise"
    assert "turned by its own angle" in found.rows[-1].refused
    assert "turned by its own angle" in str(found)
    with pytest.raises(ValueError, match="turned by its own angle"):
        rk.explain(**SHAPES, chunk_size=M, device="cpu", strategy="absorb", **tables)
    by_reference = rk.explain(**call(), backend="reference")
    assert [row.backend for row in by_reference.rows] == ["reference"] * 3
    assert all(row.seconds is None for row in by_reference.rows)


def test_explain_refuses_what_the_call_refuses():
    with pytest.raises(ValueError, match=r"w_value: got shape \[2, 12, 25\]"):
        rk.explain(**{**SHAPES, "w_value": (HK, DV, E + 1)}, chunk_size=M, device="cpu")
    with pytest.raises(TypeError, match="query: got str"):
        rk.explain(**{**SHAPES, "query": "query"}, chunk_size=M, device="cpu")
    with pytest.raises(TypeError, match="chunks"):
        rk.explain(**SHAPES, chunk_size=M, device="cpu", chunks=3)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_nan_that_no_query_sees_reaches_nothing(backend):
    """In masked tokens and in chunks that no document of a packed row needs, on the core's own backends."""
    if CORE[backend].unavailable() is not None:
        pytest.skip(CORE[backend].unavailable())
    case = cases.Case("", n=45, l=6, documents=(17, 3, 8, 17), options=("mask", "null"))
    x = {**cases.make(case, torch.float32)}
    del x["key"], x["value"]
    generator = torch.Generator().manual_seed(2)
    h, d = case.h, case.d
    x["encoded"] = torch.randn(case.b, case.l, case.k, case.r, E, generator=generator)
    for name in ("w_key", "w_value"):
        x[name] = torch.randn(h, d, E, generator=generator).requires_grad_()
    results = []
    for fill in (0.0, float("nan")):
        encoded = x["encoded"].clone()
        encoded[~x["neighbour_mask"]] = fill
        encoded[:, 5:] = fill  # the documents need five chunks
        leaves = {**x, "encoded": encoded.requires_grad_()}
        out = rk.projected_chunked_cross_attention(**leaves, strategy="materialise", backend=backend)
        names = ("query", "encoded", "w_key", "w_value", "null_key")
        grads = torch.autograd.grad(out.square().sum(), [leaves[name] for name in names])
        results.append([out.detach(), *grads])
    for name, clean, poisoned in zip(("out", *names), *results):
        assert bool(torch.isfinite(poisoned).all()), name
        assert torch.equal(clean, poisoned), name
