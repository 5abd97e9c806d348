"""The absorbed kernels on the CPU, forward and backward, against keys and values made in fp64."""

from __future__ import annotations

from unittest import mock

import cases
import pytest
import torch

import retro_kernels as rk
from retro_kernels import extension
from retro_kernels.ops.attention import reference
from retro_kernels.ops.projected import projected_chunked_cross_attention

pytestmark = pytest.mark.skipif(extension.why_not() is not None, reason=str(extension.why_not()))

# Of a single key alone, the gradients of queries and w_key are zero, the rounding of a difference of equal terms: it
# comes with a null slot here.
CASES = [
    case
    for case in cases.CASES
    if not set(case.options) & {"rotary", "rotary_interleaved", "rotary_partial"} and case.name != "one_key"
] + [
    cases.Case("one_key", k=1, r=1, options=("null",)),
    cases.Case("all", n=45, m=10, k=3, r=9, h=4, hk=2, d=12, d_value=20, stride=7, options=("mask", "bias", "null")),
    cases.Case("several_calls", b=1, n=21, k=9, r=130, h=2, options=("mask", "null", "bias")),
    cases.Case("several_calls_relative", b=1, n=21, k=5, r=270, h=2, options=("mask", "relative", "relative_biases")),
    cases.Case("many_slots", n=40, k=9, r=70, h=4, hk=2, options=("mask", "null", "bias")),
    cases.Case("many_slots_relative", n=40, k=9, r=70, options=("mask", "relative", "relative_biases"), dropout_p=0.2),
]
WIDTHS = (20, 48, 130, 257)


def make(case, e, dtype, biases):
    arguments = cases.make(case, torch.float64)
    key, value = arguments.pop("key"), arguments.pop("value")
    generator = torch.Generator().manual_seed(1)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    arguments["encoded"] = draw(*key.shape[:4], e).requires_grad_()
    for name, like in (("key", key), ("value", value)):
        arguments[f"w_{name}"] = (draw(*like.shape[4:], e) / e**0.5).requires_grad_()
        if biases:
            arguments[f"bias_{name}"] = draw(*like.shape[4:]).requires_grad_()
    return cases.as_dtype(arguments, dtype)


def results(arguments, function, **settings):
    """out, lse, and the gradient of every differentiable argument."""
    torch.manual_seed(7)
    out, lse = function(**arguments, return_lse=True, **settings)
    inputs = cases.differentiable(arguments)
    grad_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out.dtype)
    gradients = torch.autograd.grad(out, list(inputs.values()), grad_out)
    return {"out": out.detach(), "lse": lse.detach()} | {f"gradient of {x}": g for x, g in zip(inputs, gradients)}


def run(arguments, backend="cpu"):
    return results(arguments, projected_chunked_cross_attention, strategy="absorb", backend=backend)


def make_and_attend(encoded, w_key, w_value, bias_key=None, bias_value=None, **options):
    """K and V are made by a plain product, and attended to by the specification of the core."""
    made = []
    for weight, bias in ((w_key, bias_key), (w_value, bias_value)):
        x = torch.einsum("blkre,hde->blkrhd", encoded, weight)
        made.append(x if bias is None else x + bias)
    return rk.chunked_cross_attention(key=made[0], value=made[1], backend="reference", **options)


def materialised(arguments):
    return results(arguments, make_and_attend)


@pytest.fixture(params=extension.usable_isas() if extension.why_not() is None else ())
def isa(request):
    extension.set_isa(request.param)
    yield request.param
    extension.set_isa("")


@pytest.mark.parametrize(("place", "case"), enumerate(CASES), ids=[str(case) for case in CASES])
def test_fp32_is_tight(place, case, isa, guarded):
    arguments = make(case, WIDTHS[place % 4], torch.float32, biases=place % 3 == 0)
    cases.assert_close(run(arguments), materialised(cases.as_dtype(arguments, torch.float64)), 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize(("place", "case"), enumerate(CASES), ids=[str(case) for case in CASES])
def test_half_precision_is_within_twice_the_error_of_pytorch(place, case, dtype, guarded):
    arguments = make(case, WIDTHS[place % 4], dtype, biases=place % 3 == 0)
    with mock.patch.object(reference, "accumulation_dtype", lambda dtype: dtype):
        plain = materialised(arguments)
    expected = materialised(cases.as_dtype(arguments, torch.float64))
    cases.assert_twice(run(arguments), plain, expected, dtype)


def test_both_biases_cost_no_more_than_in_pytorch(isa, guarded):
    """bias_value makes the output large, whose rounding moves all of a row's dS alike; bias_key times their sum must
    not reach the query's gradient."""
    case = cases.Case("", b=1, n=61, m=16, k=2, r=32, h=2, hk=1, d=64, l=3)
    arguments = make(case, 512, torch.bfloat16, biases=True)
    with mock.patch.object(reference, "accumulation_dtype", lambda dtype: dtype):
        plain = materialised(arguments)
    expected = materialised(cases.as_dtype(arguments, torch.float64))
    cases.assert_twice(run(arguments), plain, expected, torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_number_of_threads_changes_no_bit(dtype):
    case = cases.Case("", n=200, h=4, hk=2, k=5, r=60, options=("mask", "null", "relative", "relative_biases"))
    arguments = make(case, 130, dtype, biases=True)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(run(arguments))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(x[name], results[0][name]) for x in results for name in x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", ["masked states", "surplus chunks", "tokens before the first chunk"])
def test_what_is_not_attended_reaches_nothing(name, dtype):
    case = cases.Case("", n=21, l=4, h=4, hk=2, options=("mask", "empty_chunk", "null"))
    arguments = make(case, 48, dtype, biases=True)
    clean = run(arguments)
    with torch.no_grad():
        if name == "masked states":
            arguments["encoded"][~arguments["neighbour_mask"]] = float("nan")
        elif name == "surplus chunks":
            arguments["encoded"][:, 2:] = float("nan")
        else:
            arguments["query"][:, :7] = float("nan")
    given = run(arguments)
    assert all(torch.equal(given[x], clean[x]) for x in clean)


def test_nothing_of_the_size_of_keys_is_allocated():
    """In the forward the outputs alone; in the backward the gradients, one fp32 sum of each weight's, and 8 of a
    chunk's states'."""
    case = cases.Case("", b=1, n=520, m=64, k=2, r=128, h=8, d=64)
    arguments = make(case, 256, torch.float32, biases=False)

    def peak(function):
        with torch.profiler.profile(profile_memory=True) as profile:
            made = function()
        size = sum(x.numel() * x.element_size() for x in made)
        return sum(max(event.self_cpu_memory_usage, 0) for event in profile.events()) - size

    out, _ = projected_chunked_cross_attention(**arguments, strategy="absorb", backend="cpu", return_lse=True)
    inputs, grad_out = list(cases.differentiable(arguments).values()), torch.randn_like(out)
    with torch.no_grad():
        assert (
            peak(
                lambda: projected_chunked_cross_attention(
                    **arguments, strategy="absorb", backend="cpu", return_lse=True
                )
            )
            <= 4096
        )
    sums = 4 * (2 * 8 * 256 * 64 + 8 * 256 * (256 + 16))
    zeros = 4 * 8 * 520  # the gradient of lse, which autograd makes
    assert peak(lambda: torch.autograd.grad(out, inputs, grad_out)) <= sums + zeros + 4096


def test_gradients_not_asked_for_are_not_computed():
    arguments = make(cases.Case("", n=29, m=8, k=2, r=9, options=("null", "bias")), 20, torch.float32, biases=True)
    whole = run(arguments)
    for kept in ("query", "encoded", "w_key", "attention_bias", "null_key"):
        alone = {n: x.detach() if isinstance(x, torch.Tensor) and n != kept else x for n, x in arguments.items()}
        assert torch.equal(run(alone)[f"gradient of {kept}"], whole[f"gradient of {kept}"])
