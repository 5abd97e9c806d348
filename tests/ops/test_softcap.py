"""`logit_softcap`: scaled logits x become c tanh(x / c) before the bias is added. The reference is held against the
loop of oracle.py, the CPU and Triton kernels against the reference in fp64, and what has no cap refuses it by name."""

from __future__ import annotations

import oracle
import pytest
import torch

import retro_kernels as rk
from retro_kernels import testing
from retro_kernels.testing import Case

ALL = ("softcap", "mask", "bias", "rotary", "null")
RELATIVE = ("softcap", "relative", "relative_biases", "mask", "bias", "null")
FULL = (
    Case("plain", options=("softcap",)),
    Case("all", n=45, m=10, k=3, r=9, h=4, hk=2, d=12, d_value=20, stride=7, l=9, options=ALL),
    Case("relative", n=45, m=10, k=3, r=9, h=4, hk=2, options=RELATIVE),
    Case("dropout", n=29, m=7, k=3, r=11, h=3, d=20, d_value=12, dropout_p=0.3, options=("softcap", "mask", "null")),
    Case("empty rows", options=("softcap", "mask", "empty_chunk", "bias")),
    Case("many keys", n=9, m=4, k=3, r=150, b=1, h=1, options=("softcap", "bias_per_neighbour")),
    Case("packed", n=45, documents=(17, 3, 8, 17), options=("softcap",)),
    Case("self", "self", r=37, options=("softcap", "mask", "relative", "relative_biases", "bias")),
    Case("causal", "self", l=1, k=1, r=150, h=1, causal=True, options=("softcap", "bias")),
    Case("cross", "cross", h=4, hk=2, options=("softcap", "mask", "bias", "rotary")),
)
DECODE = (
    Case("decode", "decode", options=("softcap",)),
    Case("decode bias", "decode", h=4, hk=2, k=3, r=50, options=("softcap", "mask", "bias", "null", "valid")),
    Case("decode many rows", "decode", h=8, hk=1, t=3, d=20, options=("softcap", "bias_per_neighbour", "rotary")),
    Case("decode int8", "decode", options=("softcap", "int8", "mask")),
)


def names(cases):
    return pytest.mark.parametrize("case", cases, ids=str)


@names([case for case in (*FULL, *DECODE) if not case.dropout_p and "int8" not in case.options])
def test_the_reference_is_the_loop(case):
    arguments = testing.make(case, torch.float64)
    grad_out = testing.draw_grad_out(arguments)
    found = testing.run(arguments, "reference", grad_out)
    out, lse = getattr(oracle, testing.name_of(arguments))(**arguments)
    expected = testing.results(arguments, out, lse, grad_out)
    testing.assert_close(found, expected, 1e-12)
    uncapped = testing.run({**arguments, "logit_softcap": None}, "reference", grad_out)
    assert testing.error(uncapped["out"], found["out"]) > 1e-2


@names((*FULL, *DECODE))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def test_the_cpu_kernels(case, dtype):
    testing.check_call(testing.make(case, dtype), "cpu", testing.HALF_FLOOR)


TRITON = (
    Case("all", b=1, n=25, m=10, k=2, r=9, h=2, hk=1, d=12, d_value=20, stride=7, options=ALL),
    Case("relative", b=1, n=21, m=10, k=2, r=9, h=2, options=RELATIVE),
    Case("dropout", b=1, n=19, m=7, k=2, r=11, h=2, d=20, d_value=12, dropout_p=0.3, options=("softcap", "null")),
    Case("causal", "self", b=1, l=1, k=1, r=37, h=1, causal=True, options=("softcap", "bias")),
    Case("cross", "cross", b=1, l=1, h=2, hk=1, options=("softcap", "mask", "relative", "relative_biases")),
)


@names((*TRITON, *DECODE))
def test_the_triton_kernels(case):
    pytest.importorskip("triton")
    arguments = testing.make(case, torch.float32)
    grad_out = None if "decode" in case.operation else testing.draw_grad_out(arguments)
    expected = testing.run(testing.as_dtype(arguments, torch.float64), "reference", grad_out)
    testing.assert_close(testing.run(arguments, "triton", grad_out), expected)


def test_huge_logits_end_at_the_cap():
    """x / c overflows to infinity, whose tanh is 1: results and gradients stay finite."""
    arguments = testing.make(Case("huge", options=("softcap",)), torch.float32)
    arguments["scale"] = 1e37
    grad_out = testing.draw_grad_out(arguments)
    for backend in ("reference", "cpu", "triton"):
        found = testing.run(arguments, backend, grad_out)
        assert all(x.isfinite().all() or name == "lse" for name, x in found.items())


def test_what_a_row_does_not_see_reaches_nothing():
    """NaN in masked slots, whose slope under the cap is NaN."""
    arguments = testing.make(Case("nan", options=("softcap", "mask", "bias", "relative")), torch.float32)
    expected = testing.run(arguments, "cpu", testing.draw_grad_out(arguments))
    hidden = ~arguments["neighbour_mask"]
    for name in ("key", "value"):
        arguments[name] = arguments[name].detach().masked_fill(hidden[..., None, None], float("nan")).requires_grad_()
    for name, x in testing.run(arguments, "cpu", testing.draw_grad_out(arguments)).items():
        assert torch.equal(x, expected[name]), name


@pytest.mark.parametrize(
    ("given", "raised"),
    [(0.0, ValueError), (-1.0, ValueError), (float("nan"), ValueError), (float("inf"), ValueError), ("50", TypeError)],
)
@pytest.mark.parametrize("operation", ["cca", "self", "cross", "decode"])
def test_the_cap_is_checked(operation, given, raised):
    arguments = testing.make(Case("bad", operation, options=("softcap",)), torch.float32)
    with pytest.raises(raised, match="logit_softcap: got"):
        testing.run({**arguments, "logit_softcap": given}, "reference")


def test_decode_kernels_refuse_relative_positions_under_a_cap():
    arguments = testing.make(Case("both", "decode", options=("softcap", "relative")), torch.float32)
    with pytest.raises(ValueError, match="logit_softcap with relative_key"):
        testing.run(arguments, "cpu")
    assert testing.run(arguments, "reference")["out"].isfinite().all()


def test_a_plan_of_another_cap_is_not_taken():
    arguments = testing.make(Case("plan"), torch.float32)
    with torch.no_grad():
        outs = [
            rk.chunked_cross_attention(**{**arguments, "logit_softcap": cap}, backend="cpu")
            for cap in (None, 1.5, 3.0, None)
        ]
    assert not torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[1], outs[2])
    assert torch.equal(outs[0], outs[3])
