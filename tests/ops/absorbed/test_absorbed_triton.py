"""The absorbed Triton kernels: the options of test_projected.py with every gradient against keys and values in fp64,
half precision, forms of tiles, refusals, and what the machine code of the shipped settings needs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from unittest import mock

import cases
import pytest
import torch

import retro_kernels as rk
from retro_kernels.ops.absorbed.triton import configs
from retro_kernels.ops.absorbed.triton import launch as backend
from retro_kernels.ops.absorbed.triton.configs import LaunchSettings
from retro_kernels.ops.attention import reference

pytest.importorskip("triton")

import aot
import aot_absorbed
from test_projected import OPTIONS, arguments, by_hand, run
from test_triton import INF, NAN, SCALE, M, chunk_by_chunk

runs = pytest.mark.skipif(backend.unavailable() is not None, reason=str(backend.unavailable()))
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ABSORB = {"strategy": "absorb", "backend": "triton"}
ALL = cases.Case(
    "all",
    b=1,
    n=14,
    m=5,
    k=2,
    r=9,
    h=4,
    hk=2,
    d=12,
    d_value=20,
    stride=3,
    options=("relative", "relative_biases", "mask", "empty_chunk", "null", "bias"),
)

CASES = [*(case for case in OPTIONS if case.name not in ("relative_all", "stride")), ALL]  # both are in ALL, smaller

FRESH = ("sm_90 forward bf16 128 plain", "sm_90 backward_heads bf16 128 plain", "sm_90 backward_states bf16 128 plain")


@pytest.fixture(autouse=True)
def _guarded(guarded):
    """Every call's memory, not some test's alone."""


def on_device(x):
    return {
        name: y.detach().to(DEVICE).requires_grad_(y.requires_grad) if isinstance(y, torch.Tensor) else y
        for name, y in x.items()
    }


WIDE = LaunchSettings(16, 64, 32, 4, 1, block_run=32)  # few tiles: the interpreter takes its time for each


def under(settings):
    return configs.override(**dict.fromkeys(configs.KINDS, settings) if settings else {})


def check(case, settings=WIDE, tolerance=2e-5):
    x = on_device(arguments(case, torch.float32))
    grad_out = torch.randn(case.out_shape, dtype=torch.float64).to(DEVICE)
    with under(settings):
        given = run(x, grad_out, **ABSORB)
    cases.assert_close(given, by_hand(cases.as_dtype(x, torch.float64), grad_out), tolerance)


@runs
@pytest.mark.parametrize("case", CASES, ids=str)
def test_fp32_is_tight(case):
    check(case)


TILES = {
    "two heads a program": (ALL, LaunchSettings(16, 32, 16, 4, 1, heads=2, block_run=16)),
    "neighbours of two tiles": (
        cases.Case("", b=1, n=9, m=5, r=19, h=1, options=("relative", "mask")),
        LaunchSettings(16, 16, 16, 4, 1),
    ),
    "two row tiles": (
        cases.Case("", b=1, n=38, m=19, h=1, r=5, options=("relative", "null")),
        LaunchSettings(16, 16, 16, 4, 1),
    ),
}


@runs
@pytest.mark.parametrize("name", TILES)
def test_tiles(name):
    check(*TILES[name])


@runs
def test_the_shipped_settings():
    check(cases.Case("", b=1, n=16, h=1, k=1, options=("mask",)), None)


@runs
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_half_precision_is_within_twice_the_error_of_pytorch(dtype):
    x = on_device(arguments(ALL, dtype))
    grad_out = torch.randn(ALL.out_shape, dtype=torch.float64).to(dtype).double().to(DEVICE)
    with under(WIDE):
        given = run(x, grad_out, **ABSORB)
    with mock.patch.object(reference, "accumulation_dtype", lambda dtype: dtype):
        plain = run(x, grad_out, strategy="absorb", backend="reference")
    cases.assert_twice(given, plain, by_hand(cases.as_dtype(x, torch.float64), grad_out), dtype)


@runs
def test_what_is_not_attended_reaches_nothing_and_results_are_bitwise_reproducible():
    x = on_device(arguments(ALL, torch.float32))
    grad_out = torch.randn(ALL.out_shape, device=DEVICE)
    with under(WIDE):
        first = run(x, grad_out, **ABSORB)
    poisoned = cases.as_dtype(x, torch.float32)
    with torch.no_grad():
        poisoned["encoded"][~x["neighbour_mask"]] = float("nan")
        poisoned["query"][:, : ALL.m - 1] = float("nan")
    with under(WIDE):
        given = run(poisoned, grad_out, **ABSORB)
    for name, expected in first.items():
        assert torch.equal(given[name], expected), name
    assert first["gradient of encoded"].any()
    assert not first["gradient of encoded"][~x["neighbour_mask"]].any()


NOT_FINITE = {
    "NaN in a query": ("query", (0, 5, 1, 2), NAN),
    "NaN in a state": ("encoded", (0, 1, 0, 2, 1), NAN),
    "+inf in a bias": ("attention_bias", (0, 1, 2), INF),
    "a row of -inf": ("attention_bias", (1, 2), -INF),
    "a row of -1e30": ("attention_bias", (1, 2), -1e30),
    "NaN in the null key": ("null_key", (1, 0), NAN),
    "NaN in a query, without a bias": ("query", (0, 5, 1, 2), NAN),
}


@runs
@pytest.mark.filterwarnings("ignore:All-NaN slice")  # NumPy's, in the interpreter
@pytest.mark.parametrize("name", NOT_FINITE)
def test_what_is_not_finite_reaches_all_that_depends_on_it_and_nothing_else(name):
    """As in PyTorch; masked tokens hold NaN, and their gradient is exactly 0 beside a query that is NaN."""
    torch.manual_seed(1)
    b, n, l, k, r, h, d, e = 1, 10, 2, 2, 3, 2, 4, 6
    x = {
        "query": torch.randn(b, n, h, d),
        "encoded": torch.randn(b, l, k, r, e),
        "w_key": torch.randn(h, d, e),
        "w_value": torch.randn(h, d, e),
    }
    if "without" not in name:
        x["attention_bias"] = torch.randn(h, M, r)
    if "null" in name:
        x |= {"null_key": torch.randn(h, d), "null_value": torch.randn(h, d)}
    mask = torch.ones(b, l, k, r, dtype=torch.bool)
    mask[0, 0, 1, 2] = mask[0, 1, 0, 0] = False
    x["encoded"][~mask], x["query"][:, : M - 1] = NAN, NAN
    target, place, value = NOT_FINITE[name]
    x[target][place] = value
    x = on_device({name: tensor.requires_grad_() for name, tensor in x.items()})
    grad_out = torch.randn(b, n, h, d)
    wide = {name: tensor.detach().cpu().double().requires_grad_() for name, tensor in x.items()}
    visible = torch.where(mask[..., None], wide["encoded"], 0.0)
    made = {name: torch.einsum("blkre,hde->blkrhd", visible, wide[f"w_{name}"]) for name in ("key", "value")}
    bias = wide.get("attention_bias", torch.zeros(h, M, r, dtype=torch.float64))
    out, lse = chunk_by_chunk({**wide, **made, "attention_bias": bias, "neighbour_mask": mask})
    expected = dict(zip(x, torch.autograd.grad(out, list(wide.values()), grad_out.double())), out=out, lse=lse)

    with under(LaunchSettings(16, 16, 16, 4, 1, block_run=16)):
        out, lse = rk.projected_chunked_cross_attention(
            **x, neighbour_mask=mask.to(DEVICE), chunk_size=M, scale=SCALE, return_lse=True, **ABSORB
        )
        given = dict(zip(x, torch.autograd.grad(out, list(x.values()), grad_out.to(DEVICE))), out=out, lse=lse)
    for what, tensor in expected.items():
        torch.testing.assert_close(
            given[what].cpu().float(),
            tensor.float(),
            rtol=2e-5,
            atol=2e-5,
            equal_nan=True,
            msg=lambda text, what=what: f"{what}: {text}",
        )


@runs
def test_scratch_does_not_grow_with_the_sequence():
    """Besides outputs and gradients: copies of the weights' gradients and tiles of the states', whose number is
    bounded."""
    sizes = []
    for chunks in (5, 9):
        case = cases.Case("", b=1, n=8 * chunks, m=8, k=1, r=16, h=1)
        x = on_device(arguments(case, torch.float16, biases=False))
        with (
            mock.patch.object(configs, "STATE_PROGRAMS", 2),
            mock.patch.object(backend.memory, "allocate", side_effect=backend.memory.allocate) as allocate,
        ):
            given = run(x, torch.randn(case.out_shape).to(DEVICE), **ABSORB)
        allocated = sum(torch.Size(call.args[0]).numel() for call in allocate.call_args_list)
        sizes.append(allocated - sum(value.numel() for value in given.values()))
    assert sizes[0] == sizes[1] > 0


@runs
def test_what_is_refused():
    x = arguments(cases.Case("", d=130), torch.float32)
    with pytest.raises(ValueError, match=r'at most 128.*use strategy="materialise"'):
        rk.projected_chunked_cross_attention(**x, **ABSORB)
    with pytest.raises(ValueError, match="float64"):
        rk.projected_chunked_cross_attention(**arguments(cases.Case(""), torch.float64), **ABSORB)
    row = rk.explain(**x, backend="triton").rows[-1]
    assert (row.strategy, row.backend) == ("absorb", None)
    assert "at most 128" in row.refused


@runs
def test_explain_names_the_backend():
    found = rk.explain(**arguments(cases.Case(""), torch.float32), strategy="absorb", backend="triton")
    assert (found.chosen, found.rows[-1].backend, found.rows[-1].refused) == ("absorb", "triton", None)


# Planned here, where no test guards memory: the tensors of a plan have none.
CHOSEN = {x: aot_absorbed.described(x) for x in aot_absorbed.identifiers()}


class TestMachineCode:
    """No atomic, shared memory that fits, WGMMA in every product on sm_90 and no spill, but for what `aot_absorbed`
    names: of every shipped setting in a committed table, which is tied to the kernels by a hash, and of a few compiled
    anew."""

    committed = aot.read(aot_absorbed)

    @pytest.fixture(scope="class")
    def fresh(self):
        environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
        command = [sys.executable, aot_absorbed.__file__, "--list", *FRESH]
        out = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert out.returncode == 0, out.stderr
        return json.loads(out.stdout.splitlines()[-1])

    @pytest.mark.parametrize("version", aot.VERSIONS)
    def test_everything_that_is_listed_is_compiled_as_it_is_chosen(self, version):
        """An empty table is of other kernels: run aot_absorbed.py with each Triton, without TRITON_INTERPRET."""
        assert {x: row["settings"] for x, row in self.committed[version].items()} == CHOSEN

    def test_every_setting_passed_the_gate(self):
        for rows in self.committed.values():
            assert {x: found for x in rows if (found := aot_absorbed.faults(x, rows[x]))} == {}

    @pytest.mark.parametrize("identifier", FRESH)
    def test_the_main_settings_compile_anew(self, identifier, fresh):
        assert aot_absorbed.faults(identifier, fresh[identifier]) == []
