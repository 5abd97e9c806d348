"""The absorbed Triton kernels against keys and values made in fp64, through autograd: options, dtypes, launch settings."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

import retro_kernels as rk
from retro_kernels.ops import common
from retro_kernels.ops.attention import reference as attention_reference
from retro_kernels.ops.projected_chunked_cross_attention import api, configs
from retro_kernels.ops.projected_chunked_cross_attention import triton as backend

pytestmark = pytest.mark.skipif(backend.unavailable() is not None, reason=str(backend.unavailable()))
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GUARD = 64
DIFFERENTIABLE = ("query", "encoded", "w_key", "w_value", "bias_key", "bias_value", "attention_bias", "relative_key",
                  "content_bias", "relative_bias", "null_key", "null_value")  # fmt: skip
ALL = ("mask", "biases", "bias", "relative", "null")


@pytest.fixture(autouse=True)
def guarded(monkeypatch):
    """Outputs and scratch are NaN at first and lie between guard bands."""
    bands = []

    def allocate(shape, dtype, device):
        size = int(torch.Size(shape).numel())
        memory = torch.full((size + 2 * GUARD,), float("nan"), dtype=dtype, device=device)
        memory[:GUARD] = memory[GUARD + size :] = 123.0
        bands.append((memory, size))
        return memory[GUARD : GUARD + size].view(shape)

    monkeypatch.setattr(common, "allocate", allocate)
    monkeypatch.setitem(api.BACKENDS, "triton", backend)
    yield
    for memory, size in bands:
        assert (torch.cat([memory[:GUARD], memory[GUARD + size :]]) == 123.0).all(), "a kernel wrote outside its output"


def make(options=(), dtype=torch.float32, b=2, n=12, m=5, k=2, r=9, h=2, hk=None, d=12, d_value=20, e=24, **more):
    generator = torch.Generator().manual_seed(0)
    hk = hk or h

    def draw(*shape, factor=1.0):
        return (factor * torch.randn(shape, generator=generator)).to(dtype).to(DEVICE).requires_grad_()

    l = more.pop("l", max(0, (n - m) // (more.get("stride") or m) + 1))
    x = {
        "query": draw(b, n, h, d), "encoded": draw(b, l, k, r, e), "w_key": draw(hk, d, e, factor=e**-0.5),
        "w_value": draw(hk, d_value, e, factor=e**-0.5), "chunk_size": m, **more,
    }  # fmt: skip
    if "mask" in options:
        x["neighbour_mask"] = torch.rand((b, l, k, r), generator=generator) > 0.3
        x["neighbour_mask"][0, 0] = False
        x["neighbour_mask"] = x["neighbour_mask"].to(DEVICE)
    if "biases" in options:
        x |= {"bias_key": draw(hk, d), "bias_value": draw(hk, d_value)}
    if "bias" in options:
        x["attention_bias"] = draw(h, m, r)
    if "bias_per_slot" in options:
        x["attention_bias"] = draw(h, m, k * r)
    if "relative" in options:
        x |= {"relative_key": draw(h, m + r - 1, d), "content_bias": draw(h, d), "relative_bias": draw(h, d)}
    if "null" in options:
        x |= {"null_key": draw(h, d), "null_value": draw(h, d_value)}
    return x


def run(x, name, dtype=None):
    x = {
        key: v.detach().to(dtype or v.dtype).requires_grad_()
        if isinstance(v, torch.Tensor) and v.is_floating_point() else v
        for key, v in x.items()
    }  # fmt: skip
    torch.manual_seed(7)
    out, lse = rk.projected_chunked_cross_attention(**x, strategy="absorb", return_lse=True, backend=name)
    inputs = {key: x[key] for key in DIFFERENTIABLE if key in x}
    grad_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    gradients = torch.autograd.grad(out, list(inputs.values()), grad_out)
    return {"out": out.detach(), "lse": lse, **dict(zip(inputs, gradients))}


def error(given, expected):
    finite = expected.isfinite()
    assert torch.equal(given.isfinite(), finite)
    difference = (given.double() - expected.double())[finite].abs()
    return (difference.max() / expected[finite].abs().max().clamp(min=0.1)).item() if difference.numel() else 0.0


def agree(given, expected, tolerance):
    for name, x in expected.items():
        assert (e := error(given[name], x)) <= tolerance, f"{name}: error {e:.1e}, expected at most {tolerance:.0e}"


SETTINGS = {
    "small": configs.LaunchSettings(16, 16, 16, 4, 1, block_run=16),
    "two heads": configs.LaunchSettings(16, 32, 16, 4, 1, heads=2, block_run=16),
}


def under(settings):
    return configs.override(**dict.fromkeys(configs.KINDS, settings))


CASES = {
    "plain": {},
    "all": {"options": ALL, "n": 14, "h": 4, "hk": 2, "stride": 3},
    "per slot": {"options": ("mask", "bias_per_slot"), "n": 11, "k": 3, "r": 7},
    "long neighbours": {"options": ("relative", "mask"), "b": 1, "n": 9, "r": 19, "h": 1},
    "dropout": {"options": ALL, "dropout_p": 0.3},
    "slice": {"options": ("null",), "n": 9, "l": 3, "query_offset": 6, "chunk_offset": 0},
    "surplus": {"b": 1, "n": 7, "l": 3},
    "rows": {"options": ("relative",), "b": 1, "n": 20, "m": 19, "h": 1, "r": 5},
    "null only": {"options": ("null",), "k": 0, "l": 2},
    "nothing attends": {"n": 3, "l": 1},
}


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("name", CASES)
def test_fp32_is_tight(name, settings):
    x = make(**CASES[name])
    with under(SETTINGS[settings]):
        given = run(x, "triton")
    agree(given, run(x, "reference", torch.float64), 2e-5)


@pytest.mark.parametrize(("dtype", "floor"), [(torch.float16, 1e-3), (torch.bfloat16, 8e-3)])
def test_half_precision_is_within_twice_the_error_of_pytorch(dtype, floor):
    x = make(ALL, dtype)
    with under(SETTINGS["small"]):
        given = run(x, "triton")
    with mock.patch.object(attention_reference, "accumulation_dtype", lambda dtype: dtype):
        plain = run(x, "reference")
    for name, expected in run(x, "reference", torch.float64).items():
        e, limit = error(given[name], expected), 2 * error(plain[name], expected) + floor
        assert e <= limit, f"{name}: error {e:.1e}, expected at most {limit:.1e}"


def test_packed_documents():
    x = make(("null",), n=16, l=3)
    starts = torch.zeros(2, 16, dtype=torch.bool, device=DEVICE)
    starts[0, [0, 7]] = starts[1, [0, 3]] = True
    x["sequence_starts"] = starts
    with under(SETTINGS["small"]):
        agree(run(x, "triton"), run(x, "reference", torch.float64), 2e-5)


def test_masked_states_reach_nothing_and_results_are_bitwise_reproducible():
    x = make(ALL)
    with under(SETTINGS["small"]):
        first, again = run(x, "triton"), run(x, "triton")
        poisoned = dict(x, encoded=x["encoded"].detach().clone())
        poisoned["encoded"][~x["neighbour_mask"]] = float("nan")
        poisoned["query"] = x["query"].detach().clone()
        poisoned["query"][:, : x["chunk_size"] - 1] = float("nan")
        third = run(poisoned, "triton")
    for name, expected in first.items():
        assert torch.equal(again[name], expected), name
        assert torch.equal(third[name], expected), name
    assert not first["encoded"][~x["neighbour_mask"]].any()


def test_no_gpu_has_verified_the_kernels_and_wide_heads_are_refused():
    assert backend.VERIFIED_ON_GPU == ()
    call = mock.Mock(query=torch.empty(1, 1, 1, 4), w_value=torch.empty(1, 200, 4))
    assert "materialise" in backend.refusal(call)
