"""How kernels are run: the same bits a thousand times, replayed, on other streams and threads, compiled, and on tensors
beyond 2^31 elements. Without a GPU stand-ins for graphs and streams show that the tests themselves run."""

from __future__ import annotations

import contextlib
import threading

import gpu_problems as problems
import pytest
import torch

import retro_kernels as rk
from retro_kernels import testing

pytestmark = pytest.mark.gpu
BF16 = torch.bfloat16
# Of every kind of kernel one with much that could go wrong: sums over heads, neighbours and rows, masks, dropout.
WITH_MUCH = (
    "dropout, relative positions, null slot",
    "self dropout, relative positions",
    "cross dropout, relative positions",
    "causal, packed, relative positions",
    "absorb every option, grouped heads",
    "decode every option, grouped heads, new tokens",
    "projected_decode every option, biases",
)
PLAINER = (
    "head size 96, grouped heads, mask",
    "self head size 128",
    "cross head size 128",
    "absorb mask, grouped heads",
    "decode plain",
    "projected_decode plain",
)


def of(target) -> tuple[str, ...]:
    return PLAINER if target.backend == "cuda" else WITH_MUCH


PLANNED = [pytest.param(target, name, id=f"{target}-{name}") for target in problems.targets() for name in of(target)]
every_kind = pytest.mark.parametrize(("target", "name"), PLANNED, indirect=["target"])


def drawn(target, name, dtype=BF16):
    """The case, its arguments without anything to differentiate by where it has no gradient, and grad_out."""
    case = target.problem(problems.by_name(name))
    reason = target.takes(case, dtype)
    if reason is not None:
        pytest.skip(f"{target} does not take {reason}")
    arguments = testing.make(case, dtype, problems.DEVICE)
    if not testing.has_gradients(arguments, target.backend):
        return case, testing.poison_unread(arguments), None
    return case, arguments, testing.draw_grad_out(arguments)


def assert_same(given, expected, what):
    for name, x in expected.items():
        assert testing.same_bits(given[name], x), f"{name} {what}"


@every_kind
def test_a_thousand_times_the_same_bits(target, name):
    """Compared on the device, asked once at the end."""
    case, arguments, grad_out = drawn(target, name)
    with target.alone(case):
        first = testing.run(arguments, target.backend, grad_out)
        differing = {result: torch.zeros((), dtype=torch.int64, device=problems.DEVICE) for result in first}
        for _ in range(problems.TRIALS):
            for result, x in testing.run(arguments, target.backend, grad_out).items():
                differing[result] += (testing.bits(x) != testing.bits(first[result])).any()
    assert {result: int(count) for result, count in differing.items()} == dict.fromkeys(first, 0)


class Graph:
    """A captured call. Without a GPU a replay calls again and writes where the first results lie."""

    def __init__(self, call):
        self.call = call
        if not problems.ON_GPU:
            self.results = call()
            return
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            call()
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.results = call()

    def replay(self):
        if problems.ON_GPU:
            self.graph.replay()
            torch.cuda.synchronize()
        else:
            for name, x in self.call().items():
                self.results[name].copy_(x)


def call_without_seeding(arguments, backend, grad_out):
    """As `testing.run`; a generator may not be seeded while a graph is captured."""
    with torch.no_grad() if grad_out is None else contextlib.nullcontext():
        out, lse = testing.operation(arguments)(**arguments, return_lse=True, backend=backend)
    return testing.results(arguments, out, lse, grad_out)


@every_kind
def test_a_cuda_graph_replays_other_numbers(target, name):
    """Forward and backward captured once; replayed on new queries, keys and positions it gives a plain call's bits.
    Dropout is off: a graph advances the generator otherwise than a call."""
    case, arguments, grad_out = drawn(target, name)
    if "dropout_p" in arguments:
        arguments["dropout_p"] = 0.0
    with target.alone(case):
        graph = Graph(lambda: call_without_seeding(arguments, target.backend, grad_out))
        with torch.no_grad():
            for x in ("query", "key", "value", "encoded"):
                if x in arguments and arguments[x].dtype == BF16:
                    arguments[x].copy_(torch.randn_like(arguments[x]))
            for x in ("position", "valid"):  # the second sequence's in the place of the first's
                if x in arguments:
                    arguments[x].copy_(arguments[x].roll(1))
            for x in ("key", "value", "encoded"):
                if "valid" in arguments and x in arguments:
                    arguments[x][~arguments["valid"]] = float("nan")
        graph.replay()
        expected = call_without_seeding(arguments, target.backend, grad_out)
    assert_same(graph.results, expected, "of a replay differs from a plain call's")


@pytest.mark.parametrize("name", ["decode plain", "projected_decode plain"])
def test_decoding_never_waits_for_the_gpu(target, name):
    _, arguments, _ = drawn(target, name)
    if problems.ON_GPU:
        testing.run(arguments, target.backend)  # compiled and planned
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.no_grad():
            testing.operation(arguments)(**arguments, backend=target.backend)
    finally:
        if problems.ON_GPU:
            torch.cuda.set_sync_debug_mode("default")


@every_kind
def test_a_second_stream_is_waited_for(target, name):
    """The call reads what its own busy stream writes before it, and gives the first stream's bits."""
    case, arguments, grad_out = drawn(target, name)
    expected = testing.run(arguments, target.backend, grad_out)
    late, context = torch.full_like(arguments["query"], float("nan")), contextlib.nullcontext()
    big = torch.randn(4096 if problems.ON_GPU else 8, 4096 if problems.ON_GPU else 8, device=problems.DEVICE)
    if problems.ON_GPU:
        torch.cuda.synchronize()
        context = torch.cuda.stream(torch.cuda.Stream())
    with context, target.alone(case):
        for _ in range(20):
            big = (big @ big).clamp_(-1, 1)
        late = late.detach().copy_(arguments["query"].detach()).requires_grad_(arguments["query"].requires_grad)
        given = testing.run({**arguments, "query": late}, target.backend, grad_out)
    if problems.ON_GPU:
        torch.cuda.synchronize()
    assert_same(given, expected, "on a second stream differs")


@every_kind
def test_a_thread_that_never_called_cuda(target, name):
    """Forward and backward in a thread of their own, the backward besides in autograd's worker: neither has a current
    context of its own."""
    case, arguments, grad_out = drawn(target, name)
    expected, found = testing.run(arguments, target.backend, grad_out), []

    def work():
        try:
            with target.alone(case):
                found.append(testing.run(arguments, target.backend, grad_out))
                if problems.ON_GPU:
                    torch.cuda.synchronize()
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    if isinstance(found[0], Exception):
        raise found[0]
    assert_same(found[0], expected, "in another thread differs")


@pytest.mark.parametrize("dtype", [torch.float32, BF16] if problems.ON_GPU else [BF16], ids=str)
def test_inductor_compiles_whole_with_a_dynamic_length(target, dtype):
    """Chunked cross-attention and both attentions of the encoder in one graph, forward and backward, at two lengths,
    by the error rule: a compiler rounds otherwise. (Without a GPU aot_eager, and one length; more: test_compile.py.)"""
    if target.takes(target.problem(problems.by_name("plain")), dtype):
        pytest.skip(f"{target} does not take {dtype}")
    torch._dynamo.reset()

    def attend(query, key, value, backend=target.backend):
        out = rk.chunked_cross_attention(query, key, value, chunk_size=m, backend=backend)
        own = rk.neighbour_self_attention(key, key, value, backend=backend)
        cross = rk.neighbour_cross_attention(own, key[:, :, 0], value[:, :, 0], backend=backend)
        return out * cross.mean()

    def run(function, arguments, grad_out, **changes):
        inputs = [arguments[name] for name in ("query", "key", "value")]
        out = function(*inputs, **changes)
        return dict(zip(("out", "query", "key", "value"), (out, *torch.autograd.grad(out, inputs, grad_out.to(out)))))

    base = target.problem(problems.by_name("plain"))
    m, compiler = base.m, "inductor" if problems.ON_GPU else "aot_eager"
    compiled = torch.compile(attend, fullgraph=True, dynamic=True, backend=compiler)
    for n in (base.n, base.n + base.m + 3)[: 2 if problems.ON_GPU else 1]:
        case = problems.dataclasses.replace(base, n=n)
        arguments = testing.make(case, dtype, problems.DEVICE)
        grad_out = testing.draw_grad_out(arguments)
        with target.alone():
            given = run(compiled, arguments, grad_out)
        expected = run(attend, testing.as_dtype(arguments, torch.float64), grad_out, backend="reference")
        if dtype == torch.float32:
            testing.assert_close(given, expected)
        else:
            with testing.plain_precision():
                plain = run(attend, arguments, grad_out, backend="reference")
            testing.assert_twice(given, plain, expected, dtype)


def test_more_than_2_31_elements(target):
    """Of keys and of values: the last two chunks' results are those of a slice of them."""
    m, k, r, h, d = (64, 2, 128, 32, 128) if problems.ON_GPU else (8, 2, 4, 2, 16)
    chunks = 2**31 // (k * r * h * d) + 2 if problems.ON_GPU else 5
    if problems.ON_GPU and torch.cuda.mem_get_info()[0] < 36 << 30:
        pytest.skip("needs 36 GiB of free GPU memory")
    n = m * chunks
    generator = torch.Generator(device=problems.DEVICE).manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator, device=problems.DEVICE, dtype=BF16)

    arguments = {"query": draw(1, n, h, d), "key": draw(1, chunks, k, r, h, d), "value": draw(1, chunks, k, r, h, d)}
    arguments = {name: x.requires_grad_() for name, x in arguments.items()} | {"chunk_size": m}
    assert arguments["key"].numel() > 2**31 or not problems.ON_GPU
    grad_out = draw(1, n, h, d)
    with target.alone():
        found = testing.run(arguments, target.backend, grad_out)
    start = (chunks - 1) * m - 1  # the first of the tokens that the last two chunks serve
    part = {
        "query": arguments["query"].detach()[:, start:].requires_grad_(),
        "chunk_size": m,
        "query_offset": start,
        "chunk_offset": chunks - 2,
        **{name: arguments[name].detach()[:, -2:].requires_grad_() for name in ("key", "value")},
    }
    of_part = grad_out[:, start:]
    expected = testing.run(testing.as_dtype(part, torch.float64), "reference", of_part.double())
    plain = testing.same_precision(part, of_part)
    given = {name: x[:, -2:] if "key" in name or "value" in name else x[:, start:] for name, x in found.items()}
    testing.assert_twice(given, plain, expected, BF16)
