"""Projected chunked cross-attention: both strategies are chunked cross-attention on projected keys and values."""

from __future__ import annotations

import weakref

import cases
import pytest
import torch

import retro_kernels as rk
from retro_kernels.ops import materialise
from retro_kernels.ops.backends import ABSORBED
from retro_kernels.ops.backends import ATTENTION as CORE

E = 24
OPTIONS = [
    cases.Case("plain"),
    cases.Case("no_token_attends", n=5, l=2),
    cases.Case("surplus_chunks", l=5),
    cases.Case("odd_sizes", n=29, m=7, k=3, r=11, h=3, d=20, d_value=12),
    cases.Case("grouped", h=6, hk=2, options=("mask", "null")),
    cases.Case("mask_rows_empty", options=("mask", "empty_chunk")),
    cases.Case("bias_per_neighbour", options=("bias_per_neighbour", "mask")),
    cases.Case("stride", n=40, stride=3, options=("bias", "null")),
    cases.Case("end", align="end", options=("mask",)),
    cases.Case("offset_chunks", query_offset=37, chunk_offset=3, options=("mask",)),
    cases.Case("offset_skips_chunks", n=13, query_offset=37, chunk_offset=1),
    cases.Case(
        "relative_all",
        n=45,
        m=10,
        k=3,
        r=9,
        h=4,
        hk=2,
        stride=7,
        options=("relative", "relative_biases", "mask", "null", "bias"),
    ),
    cases.Case("packed", n=45, documents=(17, 3, 8, 17), options=("mask",)),
    cases.Case("dropout", dropout_p=0.3, options=("mask", "null")),
    cases.Case("empty_batch", b=0),
    cases.Case("no_chunks", n=5, l=0),
    cases.Case("no_neighbours_null", k=0, options=("null",)),
]


def arguments(case, dtype, biases=True):
    """The projected call: `cases.make`'s, with states and weights in place of keys and values."""
    x = cases.make(case, dtype)
    generator = torch.Generator().manual_seed(1)
    hk, d, d_value = case.hk or case.h, case.d, case.d_value or case.d

    def draw(*shape, scale=1.0):
        return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype).requires_grad_()

    del x["key"], x["value"]
    x["encoded"] = draw(case.b, case.chunks, case.k, case.r, E)
    x["w_key"], x["w_value"] = draw(hk, d, E, scale=E**-0.5), draw(hk, d_value, E, scale=E**-0.5)
    if biases:
        x["bias_key"], x["bias_value"] = draw(hk, d), draw(hk, d_value)
    return x


def run(x, grad_out, **how):
    torch.manual_seed(7)
    out, lse = rk.projected_chunked_cross_attention(**x, return_lse=True, **how)
    inputs = cases.differentiable(x)
    gradients = torch.autograd.grad(out, list(inputs.values()), grad_out.to(out.dtype), allow_unused=True)
    results = {"out": out.detach(), "lse": lse}
    return results | {
        f"gradient of {name}": torch.zeros_like(inputs[name]) if g is None else g for name, g in zip(inputs, gradients)
    }


def by_hand(x, grad_out):
    """Keys and values made one product at a time, and `chunked_cross_attention` of them in fp64."""
    rest = {name: value for name, value in x.items() if name not in ("encoded", "w_key", "w_value")}
    biases = [rest.pop(name, None) for name in ("bias_key", "bias_value")]
    encoded = x["encoded"]
    if "neighbour_mask" in x:
        encoded = encoded * x["neighbour_mask"][..., None]
    made = [
        torch.einsum("blkre,hde->blkrhd", encoded, weight) + (0 if bias is None else bias)
        for weight, bias in zip((x["w_key"], x["w_value"]), biases)
    ]
    torch.manual_seed(7)
    out, lse = rk.chunked_cross_attention(key=made[0], value=made[1], **rest, return_lse=True, backend="reference")
    inputs = cases.differentiable(x)
    gradients = torch.autograd.grad(out, list(inputs.values()), grad_out, allow_unused=True)
    results = {"out": out.detach(), "lse": lse}
    return results | {
        f"gradient of {name}": torch.zeros_like(inputs[name]) if g is None else g for name, g in zip(inputs, gradients)
    }


WAYS = {
    "reference": {"strategy": "absorb", "backend": "reference"},
    "materialise": {"strategy": "materialise", "backend": "reference"},
    "recompute": {"strategy": "materialise", "recompute": True, "backend": "reference"},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", OPTIONS, ids=str)
def test_equals_attention_to_projected_keys_and_values(case, way):
    x = arguments(case, torch.float64)
    if way == "recompute" and case.dropout_p:
        pytest.skip("every slice draws its own seed")
    grad_out = torch.randn(case.out_shape, dtype=torch.float64)
    given, expected = run(x, grad_out, **WAYS[way]), by_hand(x, grad_out)
    for name, value in expected.items():
        torch.testing.assert_close(given[name], value, rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("backend", [name for name in CORE if name != "reference"])
@pytest.mark.parametrize("recompute", [False, True])
def test_materialised_in_fp32_on_the_fused_core(backend, recompute):
    reason = CORE[backend].unavailable()
    if reason is not None:
        pytest.skip(reason)
    case = cases.Case("", n=29, m=7, k=3, r=11, h=4, hk=2, d=20, d_value=12, options=("mask", "null"))
    x = arguments(case, torch.float32)
    grad_out = torch.randn(case.out_shape, dtype=torch.float64)
    given = run(x, grad_out, strategy="materialise", recompute=recompute, backend=backend)
    cases.assert_close(given, by_hand(cases.as_dtype(x, torch.float64), grad_out), 2e-5)


def test_rotary_positions_with_materialise():
    case = cases.Case("", options=("rotary", "mask"))
    x = arguments(case, torch.float64)
    grad_out = torch.randn(case.out_shape, dtype=torch.float64)
    given, expected = run(x, grad_out, strategy="materialise", backend="reference"), by_hand(x, grad_out)
    for name, value in expected.items():
        torch.testing.assert_close(given[name], value, rtol=1e-10, atol=1e-10)


def test_recomputing_keeps_no_keys_and_values(monkeypatch):
    """After the forward the keys and values of no slice are alive; without recompute they are."""
    made = []
    project = materialise.project

    def watch(*given):
        parts = project(*given)
        made.extend(weakref.ref(part.untyped_storage()) for part in parts)
        return parts

    monkeypatch.setattr(materialise, "project", watch)
    x = arguments(cases.Case("", b=2, n=129, m=8), torch.float32)
    alive = {}
    for recompute in (False, True):
        made.clear()
        out = rk.projected_chunked_cross_attention(**x, strategy="materialise", recompute=recompute)
        alive[recompute] = sum(storage() is not None for storage in made)
        forward = len(made)
        out.sum().backward()
        assert len(made) == forward * (2 if recompute else 1)
    assert forward == 2 * 16
    assert alive == {False: 2, True: 0}


def test_nan_in_masked_states_reaches_no_weight():
    case = cases.Case("", options=("mask", "empty_chunk"))
    x = arguments(case, torch.float32)
    grad_out = torch.randn(case.out_shape)
    for how in WAYS.values():
        clean = run(x, grad_out, **how)
        poisoned = cases.as_dtype(x, torch.float32)
        with torch.no_grad():
            poisoned["encoded"][~x["neighbour_mask"]] = float("nan")
        for name, value in run(poisoned, grad_out, **how).items():
            assert torch.equal(value, clean[name]), name


def test_slices_recomputed_under_dropout_agree_with_their_forward():
    """<out(v), g> = <w_value, its gradient> with a linear output: what was dropped is dropped again."""
    case = cases.Case("", b=1, n=129, m=8, r=5, dropout_p=0.5)
    x = arguments(case, torch.float64, biases=False)
    grad_out = torch.randn(case.out_shape, dtype=torch.float64)
    given = run(x, grad_out, strategy="materialise", recompute=True, backend="reference")
    left = (given["out"] * grad_out).sum()
    torch.testing.assert_close(left, (x["w_value"] * given["gradient of w_value"]).sum().detach())


def zeros(*shape):
    return torch.zeros(shape)


SHAPE = cases.Case("", b=2, n=21, m=8, k=2, r=16, h=4, hk=2, d=16, d_value=12)
BAD = {
    "encoded of rank 4": ({"encoded": zeros(2, 2, 32, E)}, ValueError, ("encoded", "b, l, k, r, e")),
    "encoded of another dtype": ({"encoded": zeros(2, 2, 2, 16, E).half()}, TypeError, ("encoded", "float16")),
    "too few chunks": ({"encoded": zeros(2, 1, 2, 16, E)}, ValueError, ("encoded", "l = 1", "at least 2")),
    "w_key of rank 2": ({"w_key": zeros(32, E)}, ValueError, ("w_key", "hk, d, e")),
    "w_key of another width": ({"w_key": zeros(2, 16, E + 1)}, ValueError, ("w_key", "25", "24")),
    "w_key of heads that do not divide": ({"w_key": zeros(3, 16, E)}, ValueError, ("w_key", "3", "divisor", "4")),
    "w_value of other heads": ({"w_value": zeros(4, 12, E)}, ValueError, ("w_value", "[4, 12, 24]", "[2, 12, 24]")),
    "bias_key of another shape": ({"bias_key": zeros(32)}, ValueError, ("bias_key", "[32]", "[2, 16]")),
    "unknown strategy": ({"strategy": "fuse"}, ValueError, ("strategy", "fuse", "materialise")),
    "absorbed rotary": (
        {"strategy": "absorb", "query_rotary": (zeros(8, 4),) * 2, "key_rotary": (zeros(16, 4),) * 2},
        ValueError,
        ("absorb", "rotary", "materialise"),
    ),
    "absorbed and recomputed": ({"strategy": "absorb", "recompute": True}, ValueError, ("recompute", "absorb")),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name):
    changes, error, words = BAD[name]
    with pytest.raises(error) as raised:
        rk.projected_chunked_cross_attention(**{**arguments(SHAPE, torch.float32), **changes})
    for word in words:
        assert word in str(raised.value), f"{word!r} is not in {str(raised.value)!r}"


def test_every_absorbing_backend_is_known():
    assert set(ABSORBED) <= {"reference", "cpu", "triton", "cuda"}
