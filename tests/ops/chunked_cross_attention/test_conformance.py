"""Every fused backend against the specification: all options, every dtype, outputs poisoned, memory guarded."""

from __future__ import annotations

import cases
import pytest
import torch

import retro_kernels as rk
from retro_kernels.ops import common
from retro_kernels.ops.chunked_cross_attention.api import BACKENDS

FUSED = [name for name in BACKENDS if name != "reference"]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GUARD = 64  # elements before and after every output


@pytest.fixture(params=FUSED)
def backend(request):
    reason = BACKENDS[request.param].unavailable()
    if reason is not None:
        pytest.skip(reason)
    if request.param == "cpu" and DEVICE != "cpu":
        pytest.skip("the cases are on the GPU")
    return request.param


@pytest.fixture(autouse=True)
def guarded(monkeypatch):
    """Outputs are filled with NaN and lie between guard bands, which must be untouched afterwards."""
    bands = []

    def allocate(shape, dtype, device):
        size = int(torch.Size(shape).numel())
        memory = torch.full((size + 2 * GUARD,), float("nan"), dtype=dtype, device=device)
        memory[:GUARD] = memory[GUARD + size :] = 123.0
        bands.append((memory, size))
        return memory[GUARD : GUARD + size].view(shape)

    monkeypatch.setattr(common, "allocate", allocate)
    yield
    for memory, size in bands:
        outside = torch.cat([memory[:GUARD], memory[GUARD + size :]])
        assert (outside == 123.0).all(), "a kernel wrote outside its output"


def check(case, dtype, backend):
    arguments = cases.make(case, dtype, DEVICE)
    wide = cases.as_dtype(arguments, torch.float64)
    d_value = arguments["value"].shape[-1]
    grad_out = torch.randn(case.b, case.n, case.h, d_value, dtype=torch.float64).to(dtype).double().to(DEVICE)
    expected = cases.run(wide, "reference", grad_out)
    given = cases.run(arguments, backend, grad_out)
    for name, x in given.items():
        like = {"out": "query", "lse": None}.get(name, name.removeprefix("gradient of "))
        assert x.dtype == (arguments[like].dtype if like else torch.float32), name
    if dtype == torch.float32:
        cases.assert_close(given, expected, 1e-5)
    else:
        cases.assert_twice(given, cases.same_precision(arguments, grad_out), expected, dtype)


@pytest.mark.parametrize("case", cases.CASES, ids=str)
def test_fp32_is_tight(case, backend):
    check(case, torch.float32, backend)


HALF = ("plain", "odd_sizes", "head_of_one", "grouped", "mask_rows_empty", "bias_fp32", "bias_per_neighbour", "rotary",
        "rotary_partial_interleaved", "end", "offset_chunks", "everything", "strided", "no_neighbours_null",
        "many_neighbours", "long_keys", "one_key")  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("case", [c for c in cases.CASES if c.name in HALF], ids=str)
def test_half_precision_is_within_twice_the_error_of_pytorch(case, dtype, backend):
    check(case, dtype, backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_paper_s_shapes(dtype, backend):
    """m = 64, k = 2, r = 128 and a head of 64, as the kernels are tuned for."""
    check(cases.Case("", b=1, n=130, m=64, k=2, r=128, h=1, d=64, options=cases.ALL), dtype, backend)


@pytest.mark.parametrize("name", ["masked tokens", "surplus chunks", "tokens before the first chunk"])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_what_is_not_attended_reaches_nothing(name, poison, backend):
    case = cases.Case("", n=21, l=4, h=4, hk=2, options=("mask", "empty_chunk", "bias", "rotary", "null"))
    arguments = cases.make(case, torch.float32, DEVICE)
    grad_out = torch.randn(2, 21, 4, 16, device=DEVICE)
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


def test_twice_the_same_is_bitwise_the_same(backend):
    case = next(c for c in cases.CASES if c.name == "everything")
    arguments = cases.make(case, torch.float32, DEVICE)
    grad_out = torch.randn(case.b, case.n, case.h, case.d_value, device=DEVICE)
    first = cases.run(arguments, backend, grad_out)
    for _ in range(3):
        again = cases.run(arguments, backend, grad_out)
        assert all(torch.equal(first[name], again[name]) for name in first)


def test_the_inputs_are_read_in_place(backend, monkeypatch):
    """No padded, shifted, folded or transposed copy: beyond its outputs a forward allocates nothing, a backward only
    the fp32 partial sums of parameter gradients, at most 32 copies of each."""
    if backend == "triton" and DEVICE == "cpu":
        pytest.skip("Triton's interpreter moves its data through torch")
    monkeypatch.setattr(common, "allocate", lambda shape, dtype, device: torch.empty(shape, dtype=dtype, device=device))
    case = cases.Case("", b=3, n=200, options=(*cases.ALL, "strided"))
    x = cases.make(case, torch.float32, DEVICE)

    def allocated(call):
        with torch.profiler.profile(profile_memory=True) as profile:
            result = call()
        return result, sum(
            max(event.self_device_memory_usage, event.self_cpu_memory_usage, 0) for event in profile.events()
        )

    def size(*tensors):
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    (out, lse), forward = allocated(lambda: rk.chunked_cross_attention(**x, backend=backend, return_lse=True))
    assert forward <= size(out, lse) + 1024
    inputs = list(cases.differentiable(x).values())
    grad_out = torch.randn_like(out)
    gradients, backward = allocated(lambda: torch.autograd.grad(out, inputs, grad_out))
    partial_sums = 32 * size(x["attention_bias"], x["null_key"], x["null_value"])
    assert backward <= size(*gradients) + partial_sums + 8192


def test_no_second_derivative(backend):
    arguments = cases.make(cases.Case("", b=1, n=9, m=4, r=3, d=4), torch.float32, DEVICE)
    out = rk.chunked_cross_attention(**arguments, backend=backend)
    (gradient,) = torch.autograd.grad(out.square().sum(), arguments["query"], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        gradient.sum().backward()


@pytest.mark.parametrize(("option", "words"), [("relative", "relative"), ("dropout", "dropout"), ("fp64", "float64")])
def test_what_is_refused_is_refused_with_a_reason(option, words, backend):
    case = cases.Case("", options=("relative",) if option == "relative" else ())
    arguments = cases.make(case, torch.float64 if option == "fp64" else torch.float32, DEVICE)
    if option == "dropout":
        arguments["dropout_p"] = 0.1
    with pytest.raises(ValueError, match=words):
        rk.chunked_cross_attention(**arguments, backend=backend)
