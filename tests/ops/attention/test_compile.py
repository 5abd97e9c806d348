"""The registered ops and PyTorch's machinery: opcheck, fake tensors, torch.compile, checkpointing, copies, DDP."""

from __future__ import annotations

import copy

import cases
import pytest
import torch
from torch._subclasses import FakeTensorMode

import retro_kernels as rk
from retro_kernels.ops.attention.common import CLOCK, Call
from retro_kernels.ops.backends import ATTENTION as BACKENDS
from retro_kernels.testing import FP32_TOLERANCE, error

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.gpu
CASE = cases.Case("", b=1, n=13, m=4, k=2, r=5, h=2, hk=1, d=8, options=cases.ALL)


@pytest.fixture(params=["reference", "cpu", "triton"])
def backend(request):
    reason = BACKENDS[request.param].unavailable()
    if reason is not None:
        pytest.skip(reason)
    return request.param


@pytest.fixture
def fused(backend):
    if backend == "reference":
        pytest.skip("the reference registers no op")
    return backend


def op_arguments():
    """The positional arguments of the private forward op for CASE, tensors then settings."""
    x = cases.make(CASE, torch.float32, DEVICE)
    query_cos, query_sin = x["query_rotary"]
    key_cos, key_sin = x["key_rotary"]
    given = {
        **{name: x[name].detach() for name in ("key", "value", "attention_bias", "null_key", "null_value")},
        "query": x["query"].detach()[:, None, None],
        "mask": x["neighbour_mask"],
        "query_cos": query_cos,
        "query_sin": query_sin,
        "key_cos": key_cos,
        "key_sin": key_sin,
        "dropout_seed": torch.tensor([5], device=DEVICE),
    }
    tensors = [given.get(name) for name in Call.form.tensors]
    settings = {"grouping": CLOCK, "scale": 0.3, "dropout_p": 0.25, "stride": 4, "first_token": 3}
    return tensors, [settings.get(name, 0) for name in Call.form.settings]


@pytest.mark.parametrize("test", ["test_schema", "test_faketensor"])
def test_opcheck(test, fused):
    """The schema tells the truth about mutation and aliasing, and the fake agrees with the kernel."""
    forward = getattr(torch.ops.retro_kernels, f"attention_forward_{fused}").default
    backward = getattr(torch.ops.retro_kernels, f"attention_backward_{fused}").default
    tensors, settings = op_arguments()
    torch.library.opcheck(forward, [*tensors, *settings], test_utils=test)
    out, lse = forward(*tensors, *settings)
    grad_lse = None if fused == "triton" else torch.ones(out.shape[:-1])
    torch.library.opcheck(
        backward, [torch.ones_like(out), grad_lse, *tensors, out, lse, *settings, True, True, True], test_utils=test
    )


def test_fake_tensors_have_the_real_shapes(backend):
    x = cases.make(CASE, torch.float32, DEVICE)
    real = cases.run(x, backend, torch.ones(1, 13, 2, 8, device=DEVICE))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:

        def fake(value):
            if isinstance(value, tuple):
                return tuple(fake(part) for part in value)
            return mode.from_tensor(value) if isinstance(value, torch.Tensor) else value

        given = cases.run({name: fake(value) for name, value in x.items()}, backend, torch.ones(1, 13, 2, 8))
    for name, expected in real.items():
        assert given[name].shape == expected.shape
        assert given[name].dtype == expected.dtype


@pytest.mark.parametrize("align", ["start", "end"])
def test_compiles_whole_with_a_dynamic_length(align, backend):
    torch._dynamo.reset()
    graphs = []

    def count(module, _):
        graphs.append(module)
        return module

    def call(query, key, value, bias, null_key, null_value):
        return rk.chunked_cross_attention(
            query,
            key,
            value,
            chunk_size=4,
            attention_bias=bias,
            null_key=null_key,
            null_value=null_value,
            align=align,
            backend=backend,
        ).sin()

    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend=count)
    for n in (13, 22) if backend == "triton" else (13, 22, 30, 17):  # the interpreter takes seconds a length
        x = cases.make(cases.Case("", b=2, n=n, m=4, r=5, align=align, options=("bias", "null")), torch.float32, DEVICE)
        inputs = list(cases.differentiable(x).values())
        given, expected = compiled(*inputs), call(*inputs)
        torch.testing.assert_close(given, expected)
        for g, e in zip(torch.autograd.grad(given.sum(), inputs), torch.autograd.grad(expected.sum(), inputs)):
            torch.testing.assert_close(g, e)
    assert len(graphs) <= 2, "a new length compiled again"


def test_compiles_with_inductor(fused):
    """Not the reference: a minute of Inductor's compiler for code of PyTorch's own."""
    torch._dynamo.reset()
    x = cases.make(cases.Case("", b=1, n=9, m=4, k=1, r=4, h=1, d=8, options=("mask",)), torch.float32, DEVICE)
    inputs = list(cases.differentiable(x).values())

    def call(query, key, value):
        return rk.chunked_cross_attention(
            query * 2, key, value, chunk_size=4, neighbour_mask=x["neighbour_mask"], backend=fused
        ).square()

    given = torch.compile(call, fullgraph=True)(*inputs)
    expected = call(*inputs)
    torch.testing.assert_close(given, expected)
    for g, e in zip(torch.autograd.grad(given.sum(), inputs), torch.autograd.grad(expected.sum(), inputs)):
        torch.testing.assert_close(g, e)


def test_one_tensor_given_twice_compiles(fused):
    """A self-attention's query is often its key and its value too; the gradient is the sum of the three."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    x = torch.randn(1, 2, 1, 5, 2, 8, device=DEVICE, requires_grad=True)

    def call(x):
        return rk.neighbour_self_attention(x, x, x, backend=fused)

    given, expected = torch.compile(call, fullgraph=True, backend="aot_eager")(x), call(x)
    torch.testing.assert_close(given, expected)
    ours, plain = (torch.autograd.grad(out.square().sum(), x)[0] for out in (given, expected))
    torch.testing.assert_close(ours, plain)
    reference = rk.neighbour_self_attention(x, x, x, backend="reference")
    assert error(plain, torch.autograd.grad(reference.square().sum(), x)[0]) <= FP32_TOLERANCE


ENCODER = (
    cases.Case(
        "self",
        "self",
        b=1,
        l=1,
        k=1,
        r=9,
        h=1,
        d=8,
        causal=True,
        dropout_p=0.4,
        options=("relative", "relative_biases"),
    ),
    cases.Case("cross", "cross", b=1, l=1, k=2, r=5, m=3, h=1, d=8, dropout_p=0.4, options=("mask",)),
    cases.Case("packed", b=1, n=13, m=4, k=1, r=5, h=1, d=8, documents=(7, 6)),
)


@pytest.mark.parametrize("case", ENCODER, ids=str)
def test_the_encoder_dropout_and_packing_compile_whole(case, backend):
    """Reproducibly: the generator's state decides what is dropped in the compiled graph as well."""
    torch._dynamo.reset()
    x = cases.make(case, torch.float32, DEVICE)
    call = cases.operation(x)
    compiled = torch.compile(lambda **kw: call(**kw, backend=backend), fullgraph=True, backend="aot_eager")
    results = []
    for run in (compiled, compiled, lambda **kw: call(**kw, backend=backend)):
        torch.manual_seed(3)
        out = run(**x)
        results.append((out, *torch.autograd.grad(out.square().sum(), list(cases.differentiable(x).values()))))
    for first, second, eager in zip(*results):
        assert torch.equal(first, second)
        torch.testing.assert_close(first, eager)


def test_the_default_choice_compiles():
    torch._dynamo.reset()
    x = cases.make(cases.Case("", b=1, n=9, m=4, k=1, r=4, h=1, d=8), torch.float32, DEVICE)
    call = torch.compile(rk.chunked_cross_attention, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(call(**x), rk.chunked_cross_attention(**x, backend="reference"), rtol=1e-4, atol=1e-5)


def test_gradients_only_where_wanted(fused):
    """Frozen neighbours, or a frozen model with a trainable null slot: no gradient is made for the rest."""
    x = cases.make(CASE, torch.float32, DEVICE)
    expected = cases.run(x, "reference", torch.ones(1, 13, 2, 8, device=DEVICE))
    for name in cases.differentiable(x):
        only = {n: v.detach() if isinstance(v, torch.Tensor) else v for n, v in x.items()}
        only[name].requires_grad_()
        out = rk.chunked_cross_attention(**only, backend=fused)
        out.sum().backward()
        torch.testing.assert_close(only[name].grad, expected[f"gradient of {name}"], rtol=1e-4, atol=1e-5)
        assert all(v.grad is None for n, v in only.items() if n != name and isinstance(v, torch.Tensor))


def test_inference_mode_and_no_grad(backend):
    x = cases.make(CASE, torch.float32, DEVICE)
    with torch.inference_mode():
        first = rk.chunked_cross_attention(**x, backend=backend)
    with torch.no_grad():
        second = rk.chunked_cross_attention(**x, backend=backend)
    assert not second.requires_grad
    assert torch.equal(first, second)


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_activation_checkpointing(dropout_p, backend):
    """The recomputed forward drops what the first one dropped."""
    x = cases.make(CASE, torch.float32, DEVICE) | {"dropout_p": dropout_p}

    def call(query):
        return rk.chunked_cross_attention(**{**x, "query": query}, backend=backend)

    torch.manual_seed(3)
    out = torch.utils.checkpoint.checkpoint(call, x["query"], use_reentrant=False)
    torch.rand(5)  # the generator has moved on when the backward recomputes
    (given,) = torch.autograd.grad(out.square().sum(), x["query"])
    torch.manual_seed(3)
    (expected,) = torch.autograd.grad(call(x["query"]).square().sum(), x["query"])
    assert torch.equal(given, expected)


class Layer(torch.nn.Module):
    def __init__(self, backend):
        super().__init__()
        x = cases.make(CASE, torch.float32, DEVICE)
        self.null_key, self.null_value = (torch.nn.Parameter(x[name].detach()) for name in ("null_key", "null_value"))
        self.fixed = {name: x[name].detach() for name in ("key", "value")}
        self.backend = backend

    def forward(self, query):
        return rk.chunked_cross_attention(
            query, **self.fixed, chunk_size=4, null_key=self.null_key, null_value=self.null_value, backend=self.backend
        )


def test_deep_copies_and_ddp_are_harmless(backend, tmp_path):
    layer, query = Layer(backend), cases.make(CASE, torch.float32, DEVICE)["query"].detach()
    expected = layer(query)
    assert torch.equal(copy.deepcopy(layer)(query), expected)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        parallel = torch.nn.parallel.DistributedDataParallel(layer)
        out = parallel(query)
        assert torch.equal(out, expected)
        out.sum().backward()
        assert layer.null_value.grad.abs().sum() > 0
    finally:
        torch.distributed.destroy_process_group()
