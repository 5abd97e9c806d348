"""torch.func over every fused operation and layer: grad, vjp, jacrev, vmap and per-sample gradients are what autograd,
or a loop over the samples, gives; forward mode and second derivatives refuse in a sentence."""

from __future__ import annotations

import pytest
import torch
from small_calls import HK, OPERATIONS, B, D, E, H, K, L, M, N, R, draw, null, operation, tables
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

import retro_kernels as rk
from retro_kernels.ops.attention import cpu
from retro_kernels.ops.backends import ATTENTION as BACKENDS

SAMPLES = 3


@pytest.fixture(params=["cpu", "triton"])
def backend(request):
    reason = BACKENDS[request.param].unavailable()
    if reason is not None:
        pytest.skip(reason)
    return request.param


def loss_of(call, names, **options):
    """A scalar that every element of the output enters differently."""

    def loss(*values):
        out = call(**dict(zip(names, values)), **options)
        return (out * torch.linspace(0.5, 1.5, out.numel()).view(out.shape)).sum()

    return loss


def close(given, expected):
    torch.testing.assert_close(given, expected, rtol=2e-4, atol=2e-5)


def supported(name, backend):
    if name != "self" and backend == "triton":
        pytest.skip("the interpreter takes a minute for each of these; the Python round the kernels is one for all")


@pytest.mark.parametrize("name", OPERATIONS)
def test_gradients_are_those_of_autograd_and_of_the_reference(name, backend):
    supported(name, backend)
    call, tensors, options = operation(name)
    places = tuple(range(len(tensors)))
    loss = loss_of(call, tensors, backend=backend, **options)
    given = grad(loss, places)(*tensors.values())
    leaves = [x.clone().requires_grad_() for x in tensors.values()]
    for of_func, plain in zip(given, torch.autograd.grad(loss(*leaves), leaves)):
        assert torch.equal(of_func, plain)
    reference = loss_of(call, tensors, backend="reference", **options)
    for of_func, expected in zip(given, torch.autograd.grad(reference(*leaves), leaves)):
        close(of_func, expected)


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("batched", ["all", "query", "parameters"])
def test_per_sample_gradients_are_those_of_a_loop(name, batched):
    """Samples that share parameters, that differ in the query alone, and that differ in the parameters alone."""
    call, tensors, options = operation(name)
    per_sequence = ("query", "key", "value", "encoded")
    mapped = {
        "all": per_sequence,
        "query": ("query",),
        "parameters": tuple(x for x in tensors if x not in per_sequence),
    }
    in_dims = tuple(0 if x in mapped[batched] else None for x in tensors)
    if not any(dim == 0 for dim in in_dims):
        pytest.skip("it has no parameters")
    values = [
        torch.stack([torch.randn_like(x) for _ in range(SAMPLES)]) if dim == 0 else x
        for x, dim in zip(tensors.values(), in_dims)
    ]
    loss = loss_of(call, tensors, backend="cpu", **options)
    places = tuple(range(len(tensors)))
    given = vmap(grad(loss, places), in_dims)(*values)
    for i in range(SAMPLES):
        leaves = [(x[i] if dim == 0 else x).clone().requires_grad_() for x, dim in zip(values, in_dims)]
        for of_func, expected in zip(given, torch.autograd.grad(loss(*leaves), leaves)):
            close(of_func[i], expected)


@pytest.mark.parametrize("name", OPERATIONS)
def test_the_gradient_through_vmap_and_vmap_at_any_axis(name):
    """Plain autograd and grad outside of a vmap, samples on the last axis; two vmaps, one inside the other."""
    call, tensors, options = operation(name)
    loss = loss_of(call, tensors, backend="cpu", **options)
    first, *rest = tensors.values()
    samples = torch.stack([torch.randn_like(first) for _ in range(SAMPLES)], dim=-1)

    def total(x):
        return vmap(lambda one: loss(one, *rest), in_dims=-1)(x).square().sum()

    expected_of = samples.clone().requires_grad_()
    expected = torch.stack([loss(expected_of[..., i], *rest) for i in range(SAMPLES)]).square().sum()
    (expected,) = torch.autograd.grad(expected, expected_of)
    close(grad(total)(samples), expected)
    leaf = samples.clone().requires_grad_()
    close(torch.autograd.grad(total(leaf), leaf)[0], expected)
    pairs = torch.stack([samples, -samples], dim=1).movedim(-1, 0)  # [samples, b, 2, ...]
    out = vmap(vmap(lambda one: loss(one, *rest), in_dims=1))(pairs)
    for i in range(SAMPLES):
        for j, sign in enumerate((1, -1)):
            close(out[i, j], loss(sign * samples[..., i], *rest))


def test_vmap_folds_samples_into_the_batch_and_makes_one_call(monkeypatch):
    """A loop is for what the kernel takes one of."""
    calls = []
    assert cpu.unavailable() is None  # which loads the compiled ops
    kernel = cpu._op("attention_forward")
    q, kv, bias = draw(SAMPLES, B, N, H, D), draw(SAMPLES, B, L, K, R, HK, D), draw(SAMPLES, H, M, R)

    def count(*arguments):
        calls.append(arguments[0].shape[0])
        return kernel(*arguments)

    monkeypatch.setattr(cpu, "_op", lambda name: count)
    vmap(lambda q, kv: rk.chunked_cross_attention(q, kv, kv, chunk_size=M, backend="cpu"))(q, kv)
    assert calls == [SAMPLES * B]
    calls.clear()
    vmap(lambda q, kv, bias: rk.chunked_cross_attention(q, kv, kv, chunk_size=M, attention_bias=bias, backend="cpu"))(
        q, kv, bias
    )
    assert calls == [B] * SAMPLES


@pytest.mark.parametrize("name", OPERATIONS)
def test_jacobians_and_the_lse(name):
    call, tensors, options = operation(name)
    first, *rest = tensors.values()

    def some(x):
        out, lse = call(**dict(zip(tensors, (x, *rest))), **options, backend="cpu", return_lse=True)
        return torch.cat([part.flatten()[:: part.numel() // 5][-4:] for part in (out, lse)])

    close(jacrev(some)(first), torch.autograd.functional.jacobian(some, first))
    out, pull = vjp(some, first)  # pulled after the transform has ended, and twice
    close(pull(torch.ones_like(out))[0], jacrev(some)(first).sum(0))
    close(pull(torch.ones_like(out))[0], jacrev(some)(first).sum(0))


@pytest.mark.parametrize("name", OPERATIONS)
def test_dropout_follows_the_randomness_that_vmap_was_given(name):
    call, tensors, options = operation(name)
    first, *rest = tensors.values()
    same = torch.stack([first] * SAMPLES)

    def out(x):
        return call(**dict(zip(tensors, (x, *rest))), **options, dropout_p=0.5, backend="cpu")

    with pytest.raises(RuntimeError, match="randomness"):
        vmap(out)(same)
    torch.manual_seed(3)
    alike = vmap(out, randomness="same")(same)
    torch.manual_seed(3)
    expected = out(first)
    assert all(torch.equal(x, expected) for x in alike)
    differing = vmap(out, randomness="different")(same)
    assert not torch.equal(differing[0], differing[1])
    torch.manual_seed(5)
    gradients = vmap(grad(lambda x: out(x).sum()), randomness="same")(same)
    torch.manual_seed(5)
    leaf = first.clone().requires_grad_()
    close(gradients[1], torch.autograd.grad(out(leaf).sum(), leaf)[0])


@pytest.mark.parametrize("name", OPERATIONS)
def test_forward_mode_and_second_derivatives_refuse(name):
    call, tensors, options = operation(name)
    loss = loss_of(call, tensors, backend="cpu", **options)
    first, *rest = tensors.values()

    def of_first(x):
        return loss(x, *rest)

    for forward in (
        lambda: jvp(of_first, (first,), (first,)),
        lambda: jacfwd(of_first)(first),
        lambda: hessian(of_first)(first),
        lambda: jvp(lambda x: vmap(of_first)(x).sum(), (first[None],), (first[None],)),
        lambda: dual(of_first, first),
    ):
        with pytest.raises(RuntimeError, match=r'no forward-mode derivative.*backend="reference"'):
            forward()
    for second in (
        lambda: grad(lambda x: grad(of_first)(x).square().sum())(first),
        lambda: twice(of_first, first.clone().requires_grad_()),
    ):
        with pytest.raises(RuntimeError, match="second derivative"):
            second()
    assert jvp(lambda x: x.sum() + of_first(first), (first,), (first,))[1] == first.sum()  # it has no tangent


def dual(function, x):
    with torch.autograd.forward_ad.dual_level():
        return function(torch.autograd.forward_ad.make_dual(x, x))


def twice(function, x):
    (gradient,) = torch.autograd.grad(function(x), x, create_graph=True)
    return torch.autograd.grad(gradient.square().sum(), x)


def test_the_reference_has_all_derivatives():
    call, tensors, options = operation("cca")
    loss = loss_of(call, tensors, backend="reference", **options)
    first, *rest = tensors.values()
    _, tangent = jvp(lambda x: loss(x, *rest), (first,), (first,))
    close(tangent, (grad(lambda x: loss(x, *rest))(first) * first).sum())


DECODE = ("given", "states")


def decode_call(form, **options):
    if form == "given":
        cache = draw(SAMPLES, B, K, R, HK, D), draw(SAMPLES, B, K, R, HK, D)

        def call(q, position, a, b, **more):
            return rk.chunked_cross_attention_decode(q, a, b, chunk_size=M, position=position, **options, **more)

    else:
        cache = draw(SAMPLES, B, K, R, E), draw(HK, D, E)

        def call(q, position, a, b, **more):
            return rk.projected_chunked_cross_attention_decode(
                q, a, b, b, chunk_size=M, position=position, **options, **more
            )

    return call, cache, (0, 0, 0, 0 if form == "given" else None)


@pytest.mark.parametrize("form", DECODE)
@pytest.mark.parametrize("positions", ["shared", "own"])
def test_decoding_under_vmap(form, positions, backend):
    options = tables(M, R) | null() | {"neighbour_mask": torch.rand(B, K, R) > 0.3, "backend": backend}
    call, (first, second), in_dims = decode_call(form, **options)
    q, position = draw(SAMPLES, B, 1, H, D), torch.randint(0, 12, (SAMPLES, B))
    if positions == "shared":
        position, in_dims = position[0], (0, None, *in_dims[2:])
    given = vmap(call, in_dims)(q, position, first, second)
    for i in range(SAMPLES):
        one = [x[i] if dim == 0 else x for x, dim in zip((q, position, first, second), in_dims)]
        close(given[i], call(*one))
    with pytest.raises(ValueError, match="requires a gradient"):
        grad(lambda q: vmap(call, in_dims)(q, position, first, second).sum())(q)
    with pytest.raises(ValueError, match="requires a gradient"):
        vmap(grad(lambda *x: call(*x).sum()), in_dims)(q, position, first, second)
    with pytest.raises(RuntimeError, match="forward-mode"):
        jvp(lambda q: vmap(call, in_dims)(q, position, first, second), (q,), (q,))


def test_a_token_past_the_border_comes_out_nan_under_vmap():
    call, (key, value), in_dims = decode_call("given", backend="cpu")
    q, position = draw(SAMPLES, B, 2, H, D), torch.full((SAMPLES, B), 3)
    position[1, 0] = 2 * M - 2  # its second token attends to the next chunk
    out = vmap(call, in_dims)(q, position, key, value)
    assert out[1, 0, 1].isnan().all()
    assert out.isnan().sum() == H * D


def test_documents_differ_between_samples():
    starts = torch.zeros(SAMPLES, B, N, dtype=torch.bool)
    starts[1, :, 5] = True
    q, kv = draw(SAMPLES, B, N, H, D), draw(SAMPLES, B, L, K, R, HK, D)

    def call(q, kv, starts):
        return rk.chunked_cross_attention(q, kv, kv, chunk_size=M, sequence_starts=starts, backend="cpu")

    given = vmap(call)(q, kv, starts)
    for i in range(SAMPLES):
        close(given[i], call(q[i], kv[i], starts[i]))


LAYERS = {
    "relative": lambda: rk.nn.ChunkedCrossAttention(
        16, context_dim=12, chunk_size=M, num_heads=2, positions="relative", retrieved_length=R
    ),
    "rotary": lambda: rk.nn.ChunkedCrossAttention(
        16, context_dim=12, chunk_size=M, num_heads=2, null_slot=True, positions="rotary", biases=True
    ),
    "encoder": lambda: rk.nn.NeighbourEncoder(12, context_dim=16, num_heads=2, chunk_size=M, retrieved_length=R),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_give_per_sample_gradients_of_their_parameters(name):
    layer = LAYERS[name]()
    inputs = draw(SAMPLES, N, 16), draw(SAMPLES, L, K, R, 12)
    check_module(layer, inputs[::-1] if name == "encoder" else inputs)


def test_the_model_gives_per_sample_gradients():
    """All of it: decoder, encoder, projections shared by layers, and the loss."""
    model = rk.models.Retro(rk.models.RetroConfig.preset("tiny")).eval()
    size = (SAMPLES, 22 // model.config.chunk_size, 2, 8)
    check_module(model, tuple(torch.randint(model.config.vocab_size, s) for s in ((SAMPLES, 22), size)))


@pytest.mark.parametrize("backend", [None, "cpu"])
def test_a_swapped_model_gives_per_sample_gradients(backend, monkeypatch):
    """Of retro-pytorch, which could before it was swapped; by default and with the kernels asked for by name."""
    peer = pytest.importorskip("retro_pytorch", reason="the peer is not installed (extra `peers`)")
    if backend is not None:
        monkeypatch.setenv("RETRO_KERNELS_BACKEND", backend)
    model = peer.RETRO(
        num_tokens=50,
        max_seq_len=64,
        enc_dim=36,
        enc_depth=1,
        dec_dim=24,
        dec_depth=3,
        dec_cross_attn_layers=(1, 3),
        dim_head=32,
        chunk_size=8,
    )
    rk.swap(model)
    tokens, retrieved = torch.randint(1, 50, (SAMPLES, 24)), torch.randint(1, 50, (SAMPLES, 3, 2, 16))
    retrieved[1, 0, -1, 5:] = 0  # padding
    check_module(model, (tokens, retrieved))


def check_module(module, inputs, **options):
    """`vmap(grad)` through functional_call over samples of one sequence = a loop of backward calls."""
    parameters = {name: x.detach() for name, x in module.named_parameters()}

    def loss(parameters, *sample):
        out = functional_call(module, parameters, tuple(x[None] for x in sample), options)
        return out.square().sum()

    given = vmap(grad(loss), (None, *(0 for _ in inputs)))(parameters, *inputs)
    for i in range(len(inputs[0])):
        module.zero_grad()
        module(*(x[i : i + 1] for x in inputs), **options).square().sum().backward()
        for name, x in module.named_parameters():
            expected = torch.zeros_like(x) if x.grad is None else x.grad
            scale = max(expected.abs().max().item(), 1.0)
            close(given[name][i] / scale, expected / scale)
