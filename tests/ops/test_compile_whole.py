"""torch.compile(fullgraph=True) of every operation and strategy: with gradients, without, under inference_mode, with
one tensor given twice, at lengths that change; and what it asks of the backends' choice."""

from __future__ import annotations

import types

import pytest
import torch
from small_calls import HK, OPERATIONS, B, D, E, H, K, L, M, N, R, draw, operation

import retro_kernels as rk
from retro_kernels.ops import compiling
from retro_kernels.ops.verification import evidence


@pytest.fixture(autouse=True)
def _nothing_compiled():
    torch._dynamo.reset()


def whole(function, **options):
    return torch.compile(function, fullgraph=True, backend="aot_eager", **options)


@pytest.mark.parametrize("mode", ["gradients", "nothing requires one", "no_grad", "inference_mode"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_every_operation_with_and_without_gradients(name, mode):
    call, tensors, options = operation(name)
    if mode != "nothing requires one":
        tensors = {name: x.requires_grad_() for name, x in tensors.items()}
    compiled = whole(lambda **x: call(**x, **options, backend="cpu"))
    context = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}.get(mode, torch.enable_grad)
    with context():
        given, expected = compiled(**tensors), call(**tensors, **options, backend="cpu")
    assert torch.equal(given, expected)
    assert given.requires_grad == (mode == "gradients")
    if mode == "gradients":
        gradients = (torch.autograd.grad(out.square().sum(), list(tensors.values())) for out in (given, expected))
        for of_compiled, eager in zip(*gradients):
            torch.testing.assert_close(of_compiled, eager)


@pytest.mark.parametrize("wanted", [True, False])
@pytest.mark.parametrize("strategy", ["auto", "materialise", "absorb"])
def test_one_weight_for_keys_and_values(strategy, wanted):
    q, encoded, w = draw(B, N, H, D), draw(B, L, K, R, E), draw(HK, D, E).requires_grad_(wanted)

    def call(q, encoded, w):
        return rk.projected_chunked_cross_attention(
            q, encoded, w, w, chunk_size=M, strategy=strategy, backend="cpu"
        ).square()

    given, expected = whole(call)(q, encoded, w), call(q, encoded, w)
    torch.testing.assert_close(given, expected)
    if wanted:
        torch.testing.assert_close(*(torch.autograd.grad(out.sum(), w)[0] for out in (given, expected)))


@pytest.mark.parametrize("wanted", [True, False])
def test_one_tensor_for_query_key_and_value(wanted):
    x = draw(B, L, K, R, H, D).requires_grad_(wanted)
    y = draw(B, N, H, D).requires_grad_(wanted)

    def call(x, y):
        mine = rk.neighbour_self_attention(x, x, x, backend="cpu")
        kv = y[:, : L * M].unflatten(1, (L, M))
        cross = rk.neighbour_cross_attention(x, kv, kv, backend="cpu")
        return (
            rk.chunked_cross_attention(y, x, x, chunk_size=M, backend="cpu").sum() + mine.sum() + cross.sum()
        ).square()

    given, expected = whole(call)(x, y), call(x, y)
    torch.testing.assert_close(given, expected)
    if wanted:
        for of_compiled, eager in zip(*(torch.autograd.grad(out, (x, y)) for out in (given, expected))):
            torch.testing.assert_close(of_compiled, eager)


@pytest.mark.parametrize("wanted", [True, False])
@pytest.mark.parametrize("strategy", ["materialise", "absorb"])
def test_a_length_that_changes_compiles_once_or_twice(strategy, wanted):
    graphs = []

    def count(module, _):
        graphs.append(module)
        return module

    w_key, w_value = draw(HK, D, E).requires_grad_(wanted), draw(HK, D, E)

    def call(q, encoded):
        return rk.projected_chunked_cross_attention(
            q, encoded, w_key, w_value, chunk_size=M, strategy=strategy, backend="cpu"
        )

    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend=count)
    for n in (13, 22, 30, 17):
        q, encoded = draw(B, n, H, D), draw(B, n // M, K, R, E)
        torch.testing.assert_close(compiled(q, encoded), call(q, encoded))
    assert len(graphs) <= 2, "a new length compiled again"


def test_a_constant_is_what_pytorch_marks_as_one():
    """`compiling.constant` sets by hand what the public decorator sets, which would import torch._dynamo."""

    def marked(x):
        return x

    def by_hand(x):
        return x

    assert torch.compiler.assume_constant_result(marked) is marked
    by_hand._dynamo_marked_constant = True
    assert vars(marked) == vars(by_hand)
    assert vars(compiling.constant(lambda x: x)) == vars(marked)


def test_the_order_of_gpu_backends_is_a_constant(monkeypatch):
    """On a GPU the default call asks what was measured on it; that is no part of the graph. Faked: no CUDA here."""
    device, table = torch.device("cuda", 0), {"A100": {evidence.key("chunked_cross_attention", "bfloat16", 64): "cuda"}}
    query = types.SimpleNamespace(device=device, dtype=torch.bfloat16, shape=(1, 8, 2, 64))
    call = types.SimpleNamespace(operation="chunked_cross_attention", query=query)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A100")

    def ordered(x):
        return x + len(evidence.order(call, ("triton", "cuda"))), evidence.order(call, ("triton", "cuda"))

    evidence._device_name.cache_clear()
    try:
        assert whole(ordered)(torch.zeros(1))[1] == ("triton", "cuda")  # of the file, which has no device
        torch._dynamo.reset()
        monkeypatch.setattr(evidence, "table", lambda: table)
        assert whole(ordered)(torch.zeros(1))[1] == ("cuda", "triton")
    finally:
        evidence._device_name.cache_clear()
