"""Every fused backend against the specification: all options, every dtype, outputs poisoned, memory guarded."""

from __future__ import annotations

import dataclasses

import cases
import pytest
import torch

import retro_kernels as rk
from retro_kernels.ops import memory as common
from retro_kernels.ops.backends import ATTENTION as BACKENDS

# The CUDA kernels take few of the cases and have theirs in test_cuda.py.
FUSED = [name for name in BACKENDS if name not in ("reference", "cuda")]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("guarded")]


@pytest.fixture(params=FUSED)
def backend(request):
    reason = BACKENDS[request.param].unavailable()
    if reason is not None:
        pytest.skip(reason)
    if request.param == "cpu" and DEVICE != "cpu":
        pytest.skip("the cases are on the GPU")
    return request.param


# In Triton's interpreter, where a program takes a tenth of a second, the other cases are of one sequence.
TWO_SEQUENCES = (
    "plain",
    "everything",
    "strided",
    "relative_strided",
    "packed",
    "self",
    "self_strided",
    "self_dropout",
    "cross",
    "cross_strided",
)


def interpreted(backend):
    return backend == "triton" and DEVICE == "cpu"


def fewer(case, backend):
    """The case with one sequence, where it is interpreted and a second shows nothing new."""
    one = interpreted(backend) and case.b > 1 and case.name not in TWO_SEQUENCES
    return dataclasses.replace(case, b=1) if one else case


def check(case, dtype, backend):
    case = fewer(case, backend)
    arguments = cases.make(case, dtype, DEVICE)
    wide = cases.as_dtype(arguments, torch.float64)
    grad_out = torch.randn(case.out_shape, dtype=torch.float64).to(dtype).double().to(DEVICE)
    expected = cases.run(wide, "reference", grad_out)
    given = cases.run(arguments, backend, grad_out)
    for name, x in given.items():
        like = {"out": "query", "lse": None}.get(name, name.removeprefix("gradient of "))
        assert x.dtype == (arguments[like].dtype if like else torch.float32), name
    if dtype == torch.float32:
        cases.assert_close(given, expected, 1e-5)
    else:
        cases.assert_twice(given, cases.same_precision(arguments, grad_out), expected, dtype)


@pytest.mark.parametrize("case", cases.EVERY, ids=str)
def test_fp32_is_tight(case, backend):
    check(case, torch.float32, backend)


HALF = (
    "plain",
    "odd_sizes",
    "head_of_one",
    "grouped",
    "mask_rows_empty",
    "bias_fp32",
    "bias_per_neighbour",
    "rotary",
    "rotary_partial_interleaved",
    "end",
    "offset_chunks",
    "everything",
    "strided",
    "no_neighbours_null",
    "many_neighbours",
    "long_keys",
    "one_key",
    "relative_odd",
    "relative_all",
    "dropout_odd",
    "packed_surplus",
    "self_odd",
    "self_relative_all",
    "self_dropout",
    "self_rotary",
    "causal_relative",
    "causal_packed_rotary",
    "cross_odd",
    "cross_relative_all",
    "cross_grouped",
    "cross_dropout",
)


# Interpreted, options are fp32's to show. (bf16 is fp32 on copies there.)
INTERPRETED = {
    torch.bfloat16: ("plain", "bias_fp32", "self_dropout", "cross_odd"),
    torch.float16: (
        "plain",
        "odd_sizes",
        "grouped",
        "rotary",
        "everything",
        "relative_all",
        "dropout_odd",
        "self_relative_all",
        "causal_packed_rotary",
        "cross_relative_all",
    ),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("case", [c for c in cases.EVERY if c.name in HALF], ids=str)
def test_half_precision_is_within_twice_the_error_of_pytorch(case, dtype, backend):
    if interpreted(backend) and case.name not in INTERPRETED[dtype]:
        pytest.skip("interpreted, fp32 shows this option")
    check(case, dtype, backend)


PAPER = (
    cases.Case("cca", b=1, n=130, m=64, k=2, r=128, h=1, d=64, options=cases.ALL),
    cases.Case("cca relative", b=1, n=127, m=64, k=2, r=128, h=1, d=64, options=("relative", "relative_biases")),
    cases.Case("self", "self", b=1, l=1, r=128, h=1, d=64, options=("mask", "relative", "relative_biases")),
    cases.Case("cross", "cross", b=1, l=1, m=64, r=128, h=1, d=64, options=("mask", "relative", "relative_biases")),
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("case", PAPER, ids=str)
def test_the_paper_s_shapes(case, dtype, backend):
    """m = 64, k = 2, r = 128 and a head of 64, as the kernels are tuned for."""
    if interpreted(backend) and dtype == torch.bfloat16:
        pytest.skip("the interpreter computes bf16 as fp32 on copies")
    check(case, dtype, backend)


@pytest.mark.parametrize("name", ["masked tokens", "surplus chunks", "tokens before the first chunk"])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_what_is_not_attended_reaches_nothing(name, poison, backend):
    case = cases.Case("", n=21, l=4, h=4, hk=2, options=("mask", "empty_chunk", "bias", "rotary", "null"))
    case = fewer(case, backend)
    arguments = cases.make(case, torch.float32, DEVICE)
    grad_out = torch.randn(case.out_shape, device=DEVICE)
    grad_poisoned = grad_out.clone()
    clean = cases.run(arguments, backend, grad_out)
    poisoned = cases.as_dtype(arguments, torch.float32)
    with torch.no_grad():
        if name == "masked tokens":
            for x in (poisoned["key"], poisoned["value"]):
                x[~arguments["neighbour_mask"]] = poison
        elif name == "surplus chunks":
            for x in (poisoned["key"], poisoned["value"]):
                x[:, 2:] = poison
        else:
            poisoned["query"][:, :7] = poison
            grad_poisoned[:, :7] = poison
    given = cases.run(poisoned, backend, grad_poisoned)
    for result, x in clean.items():
        assert torch.equal(given[result], x), f"{result} was touched by {poison} in {name}"
    assert not clean["gradient of key"][:, 2:].any()
    assert not clean["gradient of key"][~arguments["neighbour_mask"]].any()
    assert not clean["gradient of query"][:, :7].any()


@pytest.mark.parametrize("operation", ["self", "cross"])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_what_is_masked_reaches_nothing_in_the_encoder(operation, poison, backend):
    """Nor does the query or the output gradient of a row that sees nothing."""
    case = cases.Case("", operation, options=("mask", "empty_chunk", "relative", "relative_biases"))
    case = fewer(case, backend)
    arguments = cases.make(case, torch.float32, DEVICE)
    mask = arguments["neighbour_mask" if operation == "self" else "activation_mask"]
    grad_out = torch.randn(case.out_shape, device=DEVICE)
    clean = cases.run(arguments, backend, grad_out)
    poisoned = cases.as_dtype(arguments, torch.float32)
    grad_poisoned = grad_out.clone()
    with torch.no_grad():
        poisoned["key"][~mask] = poisoned["value"][~mask] = poison
        poisoned["query"][:, 0] = grad_poisoned[:, 0] = poison
    given = cases.run(poisoned, backend, grad_poisoned)
    for result, x in clean.items():
        assert torch.equal(given[result], x), f"{result} was touched by {poison}"
    assert not clean["out"][:, 0].any()
    assert not clean["gradient of query"][:, 0].any()
    assert not clean["gradient of key"][~mask].any()


def test_packed_documents_do_not_see_each_other(backend):
    """Another second document changes no bit of the first and the third: neither of what they put out nor, through
    them, of any gradient."""
    decoder = cases.make(
        cases.Case("", "self", b=1, l=1, k=1, r=40, causal=True, documents=(13, 19, 8), options=("rotary",)),
        torch.float32,
        DEVICE,
    )
    chunks = cases.make(cases.Case("", b=1, n=40, m=8, documents=(13, 19, 8), options=("null",)), torch.float32, DEVICE)
    second = slice(13, 32)
    for arguments, axis, keys in ((decoder, 3, second), (chunks, 1, slice(1, 3))):
        changed = cases.as_dtype(arguments, torch.float32)
        with torch.no_grad():
            changed["query"].narrow(axis, 13, 19).mul_(-3)
            for name in ("key", "value"):
                changed[name].narrow(axis, keys.start, keys.stop - keys.start).add_(5)
        others = torch.tensor([*range(13), *range(32, 40)], device=DEVICE)
        grad_out = torch.randn(cases.run(arguments, backend)["out"].shape, device=DEVICE)
        grad_out.narrow(axis, 13, 19).zero_()
        clean, given = (cases.run(x, backend, grad_out) for x in (arguments, changed))
        assert torch.equal(given["out"].index_select(axis, others), clean["out"].index_select(axis, others))
        assert not torch.equal(given["out"].narrow(axis, 13, 19), clean["out"].narrow(axis, 13, 19))
        for name in cases.differentiable(arguments):
            assert torch.equal(given[f"gradient of {name}"], clean[f"gradient of {name}"]), name


@pytest.mark.parametrize(
    "name", ["everything", "dropout_all", "self_relative_all", "causal_packed_relative", "cross_relative_all"]
)
def test_twice_the_same_is_bitwise_the_same(name, backend):
    if interpreted(backend) and name != "causal_packed_relative":
        pytest.skip("the interpreter runs one program after the other: one case shows that nothing unwritten is read")
    case = cases.by_name(name)
    arguments = cases.make(case, torch.float32, DEVICE)
    grad_out = torch.randn(case.out_shape, device=DEVICE)
    first = cases.run(arguments, backend, grad_out)
    for _ in range(2):
        again = cases.run(arguments, backend, grad_out)
        assert all(torch.equal(first[result], again[result]) for result in first)


IN_PLACE = (
    cases.Case("cca", b=3, n=200, options=(*cases.ALL, "strided")),
    cases.Case("self", "self", b=3, l=8, options=("mask", "relative", "relative_biases", "strided")),
    cases.Case("cross", "cross", b=3, l=8, options=("mask", "relative", "relative_biases", "strided")),
    cases.Case("decoder", "self", b=1, l=1, k=1, r=700, causal=True, options=("relative", "relative_biases")),
)


@pytest.mark.parametrize("case", IN_PLACE, ids=str)
def test_the_inputs_are_read_in_place(case, backend, monkeypatch):
    """No padded, shifted, folded, repeated or transposed copy, and nothing of queries times keys: beyond its outputs a
    forward allocates no more than a packed copy of `relative_key`, a backward only the fp32 partial sums of parameter
    gradients besides, at most 32 copies of each."""
    if interpreted(backend):
        pytest.skip("Triton's interpreter moves its data through torch")
    monkeypatch.setattr(common, "allocate", lambda shape, dtype, device: torch.empty(shape, dtype=dtype, device=device))
    x = cases.make(case, torch.float32, DEVICE)
    call = cases.operation(x)

    def allocated(work):
        with torch.profiler.profile(profile_memory=True) as profile:
            result = work()
        return result, sum(
            max(event.self_device_memory_usage, event.self_cpu_memory_usage, 0) for event in profile.events()
        )

    def size(*tensors):
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    (out, lse), forward = allocated(lambda: call(**x, backend=backend, return_lse=True))
    packed = 2 * size(x["relative_key"]) if "relative_key" in x else 0
    planes = 3 * size(lse) if "attention_bias" in x else 0  # two of it, and their sum
    assert forward <= size(out, lse) + planes + packed + 1024
    inputs = cases.differentiable(x)
    grad_out = torch.randn_like(out)
    gradients, backward = allocated(lambda: torch.autograd.grad(out, list(inputs.values()), grad_out))
    parameters = [value for name, value in inputs.items() if name not in ("query", "key", "value")]
    copies = 1 if case.name == "decoder" else 32
    assert backward <= size(*gradients) + copies * size(*parameters) + planes + packed + 8192


def test_no_second_derivative(backend):
    arguments = cases.make(cases.Case("", b=1, n=9, m=4, r=3, d=4), torch.float32, DEVICE)
    out = rk.chunked_cross_attention(**arguments, backend=backend)
    (gradient,) = torch.autograd.grad(out.square().sum(), arguments["query"], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        gradient.sum().backward()


def test_what_is_refused_is_refused_with_a_reason(backend):
    arguments = cases.make(cases.Case(""), torch.float64, DEVICE)
    with pytest.raises(ValueError, match="float64"):
        rk.chunked_cross_attention(**arguments, backend=backend)
