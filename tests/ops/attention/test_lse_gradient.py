"""The log-sum-exp has a gradient: dS = P * (dP - delta + dlse). Every operation, option and backend."""

from __future__ import annotations

import cases
import pytest
import torch

import retro_kernels as rk

PROJECTED = (
    cases.Case("absorbed", "projected", strategy="absorb", options=("bias_key", "bias_value", "null", "mask")),
    cases.Case(
        "absorbed without a null slot",
        "projected",
        h=4,
        hk=2,
        strategy="absorb",
        options=("bias_key", "bias_value", "relative", "relative_biases", "bias"),
    ),
    cases.Case("materialised", "projected", strategy="materialise", options=("bias_key", "bias_value", "null", "mask")),
)
NAMES = (
    "plain",
    "no_token_attends",
    "odd_sizes",
    "grouped",
    "mask_rows_empty",
    "mask_rows_empty_null",
    "bias_per_neighbour",
    "bias_fp32",
    "everything",
    "relative_all",
    "dropout_odd",
    "packed_surplus",
    "end",
    "offset_chunks",
    "strided",
    "no_neighbours_null",
    "many_neighbours",
    "long_keys",
    "self_relative_all",
    "self_dropout",
    "causal_packed_rotary",
    "causal_mask",
    "cross_relative_all",
    "cross_dropout",
)
CASES = (*(case for case in cases.EVERY if case.name in NAMES), *PROJECTED)


def gradients_of(case: cases.Case, arguments: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """Of out, and of an lse that rows which see nothing have at -inf."""
    generator = torch.Generator().manual_seed(3)
    grad_out = torch.randn(case.out_shape, generator=generator, dtype=torch.float64)
    return grad_out, 2 * torch.randn(case.out_shape[:-1], generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_reference_s_is_that_of_a_loop(case):
    arguments = cases.make(case, torch.float64)
    grads = gradients_of(case, arguments)
    cases.assert_close(cases.run(arguments, "reference", *grads), cases.expect(arguments, *grads), 1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_cpu_s_is_the_reference_s(case, dtype, guarded):
    arguments = cases.make(case, dtype)
    grads = [grad.to(kind) for grad, kind in zip(gradients_of(case, arguments), (dtype, torch.float32))]
    expected = cases.run(cases.as_dtype(arguments, torch.float64), "reference", *grads)
    for _ in range(2):  # the second call has a plan
        given = cases.run(arguments, "cpu", *grads)
        if dtype == torch.float32:
            cases.assert_close(given, expected)
        else:
            cases.assert_twice(given, cases.same_precision(arguments, *grads), expected, dtype)


SMALL = {"b": 1, "n": 13, "m": 5, "k": 2, "r": 6, "h": 2, "hk": 1, "d": 8}
TRITON = (
    cases.Case("options", **SMALL, options=("mask", "empty_chunk", "bias", "rotary", "null")),
    cases.Case("relative", **SMALL, dropout_p=0.3, options=("relative", "relative_biases", "null")),
    cases.Case("packed", **SMALL, documents=(7, 6)),
    cases.Case("self", "self", **SMALL, l=1, options=("mask", "relative", "relative_biases")),
    cases.Case("causal", "self", **SMALL | {"k": 1, "r": 13}, l=1, causal=True, documents=(7, 6)),
    cases.Case("cross", "cross", **SMALL, l=1, options=("bias",)),
    cases.Case(
        "absorbed",
        "projected",
        **SMALL,
        e=16,
        strategy="absorb",
        options=("bias_key", "bias_value", "null", "mask", "bias"),
    ),
    cases.Case("no null slot", "projected", **SMALL, e=16, strategy="absorb", options=("bias_key", "relative")),
)


@pytest.mark.parametrize("case", TRITON, ids=str)
def test_triton_s_is_the_reference_s(case, guarded):
    pytest.importorskip("triton")
    arguments = cases.make(case, torch.float32)
    grads = gradients_of(case, arguments)
    expected = cases.run(cases.as_dtype(arguments, torch.float64), "reference", *grads)
    cases.assert_close(cases.run(arguments, "triton", *(grad.float() for grad in grads)), expected)


@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
def test_the_lse_alone(backend):
    """out is used for nothing: its gradient is None. The derivative of the log-sum-exp is the softmax."""
    query, key = torch.randn(1, 11, 2, 8, requires_grad=True), torch.randn(1, 2, 2, 5, 2, 8)
    _, lse = rk.chunked_cross_attention(query, key, key, chunk_size=4, return_lse=True, backend=backend)
    (gradient,) = torch.autograd.grad(lse[:, 3:].sum(), query)
    out = rk.chunked_cross_attention(query, key, key, chunk_size=4, backend=backend)
    torch.testing.assert_close(gradient, out * 8**-0.5, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
def test_an_lse_that_nobody_differentiates_changes_no_bit(backend):
    case = TRITON[0]
    arguments = cases.make(case, torch.float32)
    grad_out = torch.randn(case.out_shape)
    with_lse = cases.run(arguments, backend, grad_out)
    torch.manual_seed(7)
    out = rk.chunked_cross_attention(**arguments, backend=backend)
    for name, gradient in cases.results(arguments, out, with_lse["lse"], grad_out).items():
        assert torch.equal(gradient, with_lse[name]), name


@pytest.mark.parametrize("names", [("mask", "empty_chunk", "bias", "null"), ("relative", "relative_biases", "mask")])
def test_gradcheck(names):
    case = cases.Case("", b=1, n=9, m=4, k=1, r=3, h=2, d=3, options=names)
    arguments = cases.make(case, torch.float64)
    inputs = cases.differentiable(arguments)

    def call(*values):
        given = arguments | dict(zip(inputs, values))
        out, lse = rk.chunked_cross_attention(**given, return_lse=True, backend="reference")
        return out, torch.where(lse.isfinite(), lse, 0.0)

    assert torch.autograd.gradcheck(call, tuple(inputs.values()))


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_compiled_and_under_func(backend):
    query, key = torch.randn(1, 11, 2, 8), torch.randn(1, 2, 2, 5, 2, 8)

    def loss(query, key):
        out, lse = rk.chunked_cross_attention(query, key, key, chunk_size=4, return_lse=True, backend=backend)
        return (out.sum(-1) * lse.masked_fill(lse.isinf(), 0.0).cos()).sum()

    expected = torch.func.grad(loss, argnums=(0, 1))(query, key)
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaves = query.clone().requires_grad_(), key.clone().requires_grad_()
        given = torch.autograd.grad(function(*leaves), leaves)
        for x, y in zip(given, expected, strict=True):
            torch.testing.assert_close(x, y)
