"""Rates are fitted to times, and written without touching those of other devices."""

import json

import pytest
import torch

from benchmarks import rates
from retro_kernels.bench.timing import Protocol
from retro_kernels.ops.absorbed.cost_model import KINDS, Constants


def test_the_fit_recovers_the_rates_that_made_the_times():
    """Two rates of an absorbed pass are told apart by shapes whose heads and slots differ."""
    true = {kind: tuple((e, (i + 1) * 1e9 * e) for e in (896, 4096)) for i, kind in enumerate(KINDS)}
    true |= {kind: tuple((e, 3e10) for e in (896, 4096)) for kind in KINDS if kind.startswith("core")}
    known = Constants("", True, "", true, float("inf"))
    labels = (
        "project_forward",
        "project_backward",
        "core_forward",
        "core_backward",
        "absorb_forward",
        "absorb_backward",
    )
    found = [
        (shape, {label: known.seconds(rates.phases_of(label, shape, 4), shape.encoder_dim) for label in labels})
        for shape in rates.SHAPES
    ]
    fitted = rates.fit(found, 4)
    assert set(fitted) == set(KINDS)
    for kind, points in fitted.items():
        assert len(points) == (1 if kind.startswith("core") else 2)
        for e, rate in points:
            assert rate == pytest.approx(dict(true[kind])[e], rel=2e-3), kind


def test_shapes_that_cannot_tell_the_kinds_apart_give_one_rate():
    shape = rates.SHAPES[0]
    fitted = rates.fit([(shape, {"absorb_forward": 2.0}), (shape, {"absorb_forward": 2.0})], 4)
    weights, states = fitted["absorb_forward_weights"][0][1], fitted["absorb_forward_states"][0][1]
    flops = [phase.flops for phase in rates.phases_of("absorb_forward", shape, 4)]
    assert flops[0] / weights + flops[1] / states == pytest.approx(2.0, rel=1e-2)


def test_every_pass_that_can_run_is_timed():
    shape = rates.Shape(32, 2, 16, 8, 2)
    found = rates.times(shape, torch.float32, torch.device("cpu"), Protocol(seconds=0.0, min_rounds=2, max_rounds=2))
    assert set(found) >= {"project_forward", "project_backward", "core_forward", "core_backward"}


def test_writing_replaces_one_device(tmp_path):
    path = tmp_path / "constants.json"
    rates.write({"device": "a", "rates": {"fp32": {"core_forward": [[896, 1.0]]}}}, path)
    rates.write({"device": "b", "rates": {}}, path)
    rates.write({"device": "a", "rates": {"fp32": {"core_forward": [[896, 2.0]]}}}, path)
    devices = json.loads(path.read_text())["devices"]
    assert [entry["device"] for entry in devices] == ["b", "a"]
    assert devices[1]["rates"]["fp32"]["core_forward"] == [[896, 2.0]]
    assert "[896, 2.0]" in path.read_text()
    assert sorted(tmp_path.iterdir()) == [path]
