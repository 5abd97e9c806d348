"""Is a fused backend right on this machine? Used by gpu_suite.py; each check says what it found or raises Wrong.

The error rule: fp32 within FP32_LIMIT of the largest true value; fp16 and bf16 at most twice the error of the same
computation in PyTorch of the same precision, plus a floor (verify.FLOORS). The truth is the reference in fp64.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from . import verify
from .workloads import DTYPES, SEED

FP32_LIMIT = 2e-5
DIFFERENTIABLE = ("query", "key", "value", "attention_bias", "null_key", "null_value")


class Wrong(Exception):
    """A result that is not right; the message says which and by how much."""


@dataclass(frozen=True)
class Case:
    """One call of chunked_cross_attention. Sizes are letters of the design; `options` names what is passed besides."""

    name: str
    b: int = 2
    n: int = 200
    m: int = 64
    k: int = 2
    r: int = 128
    h: int = 4
    hk: int = 4
    d: int = 64
    d_value: int | None = None
    surplus: int = 0
    options: tuple[str, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)

    def num_chunks(self) -> int:
        if self.settings.get("align") == "end":
            return -(-self.n // self.m) + self.surplus
        stride = self.settings.get("stride", self.m)
        last = self.settings.get("query_offset", 0) + self.n - self.m
        return max(0, last // stride + 1 - self.settings.get("chunk_offset", 0)) + self.surplus


def cases(reduced: bool) -> list[Case]:
    """Every option that a fused backend honours, awkward sizes, and all options at once."""
    every = ("mask", "bias", "rotary", "null")
    if reduced:
        tiny = {"b": 1, "n": 21, "m": 8, "k": 2, "r": 8, "h": 2, "hk": 1, "d": 16}
        return [
            Case("plain", **tiny),
            Case("mask, bias, rotary, null slot, grouped heads", **tiny, options=every),
        ]
    small = {"b": 1, "n": 45, "m": 16, "r": 20, "h": 2, "hk": 1}
    return [
        Case("plain"),
        Case("everything at once", options=every, hk=2, d_value=96, d=128),
        Case("head size 128", d=128),
        Case("mask", options=("mask",)),
        Case("bias shared by the neighbours", options=("bias",)),
        Case("bias of its own for each neighbour", options=("bias of each",)),
        Case("null slot", options=("null",)),
        Case("rotary, halves", options=("rotary",)),
        Case("rotary, interleaved", options=("rotary",), settings={"rotary_interleaved": True}),
        Case("everything masked", options=("all masked",)),
        Case("everything masked, null slot", options=("all masked", "null")),
        Case("negative scale", settings={"scale": -0.3}),
        Case("grouped heads", hk=1),
        Case("value wider than key", d=32, d_value=80),
        Case("stride below the chunk size", n=150, settings={"stride": 24}, options=every),
        Case("aligned to the end", settings={"align": "end"}, options=every),
        Case("a slice of a longer sequence", settings={"query_offset": 100, "chunk_offset": 0}, n=90),
        Case("surplus chunks", surplus=2),
        Case("shorter than a chunk", n=40),
        Case("head size 256", d=256, **{**small, "h": 2}),
        Case("head size 72", d=72, **small, options=every),
        Case("head size 20, odd lengths", d=20, **{**small, "r": 37, "m": 13}, k=3, options=every),
        Case("chunks of 100", m=100, n=310, d=64, options=every),
        Case("ten neighbours", k=10, n=130),
        Case("one neighbour, one token", k=1, r=1, n=130),
    ]


def tensors(case: Case, dtype: torch.dtype, device: torch.device) -> tuple[dict[str, Any], Tensor]:
    """Keyword arguments of the call, and the output's gradient. Values are bf16 numbers in every precision."""
    generator = torch.Generator().manual_seed(SEED)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).bfloat16().to(device=device, dtype=dtype)

    l, d_value = case.num_chunks(), case.d_value or case.d
    arguments: dict[str, Any] = {
        "query": draw(case.b, case.n, case.h, case.d),
        "key": draw(case.b, l, case.k, case.r, case.hk, case.d),
        "value": draw(case.b, l, case.k, case.r, case.hk, d_value),
        "chunk_size": case.m,
        **case.settings,
    }
    if "mask" in case.options:
        mask = torch.rand(case.b, l, case.k, case.r, generator=generator) < 0.7
        if l:
            mask[:, 0] = False
        arguments["neighbour_mask"] = mask.to(device)
    if "all masked" in case.options:
        arguments["neighbour_mask"] = torch.zeros(case.b, l, case.k, case.r, dtype=torch.bool, device=device)
    if "bias" in case.options:
        arguments["attention_bias"] = draw(case.h, case.m, case.r)
    if "bias of each" in case.options:
        arguments["attention_bias"] = draw(case.h, case.m, case.k * case.r)
    if "null" in case.options:
        arguments |= {"null_key": draw(case.h, case.d), "null_value": draw(case.h, d_value)}
    if "rotary" in case.options:
        width = case.d // 4
        for name, rows in (("query_rotary", case.m), ("key_rotary", case.r)):
            angles = torch.rand(rows, width, generator=generator) * 6
            tables = (table.bfloat16().to(device=device, dtype=dtype) for table in (angles.cos(), angles.sin()))
            arguments[name] = tuple(tables)
    grad_out = draw(case.b, case.n, case.h, d_value)
    return arguments, grad_out


def call(arguments: dict[str, Any], grad_out: Tensor, backend: str) -> dict[str, Tensor]:
    """The output, and the gradient of every differentiable argument that is there."""
    import retro_kernels as rk

    arguments = dict(arguments)
    wanted = [name for name in DIFFERENTIABLE if name in arguments]
    for name in wanted:
        arguments[name] = arguments[name].detach().requires_grad_()
    out = rk.chunked_cross_attention(**arguments, backend=backend)
    gradients = torch.autograd.grad(out, [arguments[name] for name in wanted], grad_out)
    return {"output": out.detach(), **{f"{name} gradient": g for name, g in zip(wanted, gradients)}}


def in_double(arguments: dict[str, Any]) -> dict[str, Any]:
    def double(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(double, value))
        return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value

    return {name: double(value) for name, value in arguments.items()}


@contextlib.contextmanager
def same_precision() -> Iterator[None]:
    """Within it the reference computes in its inputs' own precision, as eager PyTorch does."""
    reference = importlib.import_module("retro_kernels.ops.chunked_cross_attention.reference")
    with mock.patch.object(reference, "accumulation_dtype", lambda dtype: dtype):
        yield


def check_case(case: Case, dtype: str, device: torch.device, backend: str) -> str:
    """The error rule for the output and every gradient. -> the largest error found."""
    arguments, grad_out = tensors(case, DTYPES[dtype], device)
    truth = call(in_double(arguments), grad_out.double(), "reference")
    with same_precision():
        plain = call(arguments, grad_out, "reference")
    found = call(arguments, grad_out, backend)
    largest = 0.0
    for name, value in found.items():
        error = verify.compare(name, value, truth[name])
        plain_error = verify.compare(name, plain[name], truth[name])
        allowed = FP32_LIMIT if dtype == "fp32" else 2 * plain_error.relative + verify.FLOORS[dtype]
        if not error.relative <= allowed:
            raise Wrong(
                f"{name}: error {error.relative:.2e} of the largest value at {list(error.worst)}, allowed {allowed:.2e}"
                f" (same-precision PyTorch has {plain_error.relative:.2e})"
            )
        largest = max(largest, error.relative)
    return f"largest error {largest:.1e}"


def check_deterministic(case: Case, dtype: str, device: torch.device, backend: str, trials: int) -> str:
    """Forward and backward give the same bits every time."""
    arguments, grad_out = tensors(case, DTYPES[dtype], device)
    first = call(arguments, grad_out, backend)
    for trial in range(1, trials):
        for name, value in call(arguments, grad_out, backend).items():
            if not torch.equal(value, first[name]):
                raise Wrong(f"{name} differs in trial {trial}")
    return f"{trials} trials, the same bits"


GUARD = 4096  # elements of NaN on each side of every tensor


def banded(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, bands: list[Tensor]) -> Tensor:
    """A NaN-filled contiguous tensor within guard bands; the whole buffer is added to `bands`."""
    count = 1
    for size in shape:
        count *= size
    buffer = torch.full((count + 2 * GUARD,), float("nan"), dtype=dtype, device=device)
    bands.append(buffer)
    return buffer[GUARD : GUARD + count].view(shape)


def check_guard_bands(case: Case, dtype: str, device: torch.device, backend: str) -> str:
    """Nothing outside the inputs is read into a result, nothing outside the outputs is written, and every element of
    the outputs is written."""
    common = importlib.import_module("retro_kernels.ops.common")
    arguments, grad_out = tensors(case, DTYPES[dtype], device)
    expected = call(arguments, grad_out, backend)
    bands: list[Tensor] = []

    def guard(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(guard, value))
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        copy = banded(tuple(value.shape), value.dtype, device, bands)
        return copy.copy_(value)

    guarded, guarded_grad = {name: guard(value) for name, value in arguments.items()}, guard(grad_out)
    with mock.patch.object(common, "allocate", lambda shape, dtype, device: banded(shape, dtype, device, bands)):
        found = call(guarded, guarded_grad, backend)
    for name, value in found.items():
        if not torch.equal(value, expected[name]):
            raise Wrong(f"{name} changes when NaN surrounds the tensors or fills the outputs beforehand")
    for number, buffer in enumerate(bands):
        if not bool(buffer[:GUARD].isnan().all() and buffer[-GUARD:].isnan().all()):
            raise Wrong(f"the guard band of tensor {number} was written to")
    return f"{len(bands)} tensors with guard bands"


def check_strides(dtype: str, device: torch.device, backend: str, case: Case) -> str:
    """Transposed, sliced, packed, expanded and element-aligned tensors give what contiguous ones give."""
    arguments, grad_out = tensors(case, DTYPES[dtype], device)
    for name in ("key", "value"):  # one batch entry for all: stride 0
        arguments[name] = arguments[name][:1].contiguous().expand(arguments[name].shape)
    contiguous = {k: v.contiguous() if isinstance(v, Tensor) else v for k, v in arguments.items()}
    expected = call(contiguous, grad_out, backend)
    strange = dict(arguments)
    strange["query"] = arguments["query"].transpose(1, 2).contiguous().transpose(1, 2)
    wide = torch.full((*arguments["value"].shape[1:-1], 2 * case.d + 3), float("nan"), device=device).to(DTYPES[dtype])
    wide[..., 1 : case.d + 1] = arguments["key"][0]
    strange["key"] = wide[..., 1 : case.d + 1].expand(arguments["key"].shape)  # an odd offset and an odd row length
    if "neighbour_mask" in strange:
        strange["neighbour_mask"] = arguments["neighbour_mask"].repeat_interleave(2, -1)[..., ::2]
    strange_grad = grad_out.transpose(1, 2).contiguous().transpose(1, 2)
    for name, value in call(strange, strange_grad, backend).items():
        error = verify.compare(name, value, expected[name])
        if not error.relative <= verify.FLOORS[dtype]:
            raise Wrong(f"{name} differs from the contiguous call's by {error.relative:.2e} at {list(error.worst)}")
    return "transposed, sliced at odd offsets, expanded"


def check_beyond_int32(device: torch.device, backend: str) -> str:
    """Keys and values of more than 2^31 elements: the last chunks' results are those of a slice."""
    import retro_kernels as rk

    m, k, r, h, d = 64, 2, 128, 32, 128
    chunks = 2**31 // (k * r * h * d) + 2
    n = m * chunks
    generator = torch.Generator(device=device).manual_seed(SEED)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16)

    key, value = draw(1, chunks, k, r, h, d).requires_grad_(), draw(1, chunks, k, r, h, d).requires_grad_()
    query, grad_out = draw(1, n, h, d).requires_grad_(), draw(1, n, h, d)
    out = rk.chunked_cross_attention(query, key, value, chunk_size=m, backend=backend)
    gradients = torch.autograd.grad(out, (query, key, value), grad_out)
    # The tokens that the last two chunks serve; token (chunks - 1) * m - 1 is the first of them.
    start = (chunks - 1) * m - 1
    part = {
        "query": query.detach()[:, start:], "key": key.detach()[:, -2:], "value": value.detach()[:, -2:],
        "chunk_size": m, "query_offset": start, "chunk_offset": chunks - 2,
    }  # fmt: skip
    truth = call(in_double(part), grad_out[:, start:].double(), "reference")
    with same_precision():
        plain = call(part, grad_out[:, start:], "reference")
    found = {
        "output": out.detach()[:, start:], "query gradient": gradients[0][:, start:],
        "key gradient": gradients[1][:, -2:], "value gradient": gradients[2][:, -2:],
    }  # fmt: skip
    for name, tensor in found.items():
        error = verify.compare(name, tensor, truth[name]).relative
        allowed = 2 * verify.compare(name, plain[name], truth[name]).relative + verify.FLOORS["bf16"]
        if not error <= allowed:
            raise Wrong(f"{name}: error {error:.2e} of the largest value, allowed {allowed:.2e}")
    return f"{key.numel():,} elements in key and in value"


def check_cuda_graph(case: Case, device: torch.device, backend: str) -> str:
    """Captured once, replayed on new numbers: the same bits as a plain call."""
    arguments, grad_out = tensors(case, torch.bfloat16, device)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call(arguments, grad_out, backend)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call(arguments, grad_out, backend)
    for name in ("query", "key", "value"):
        arguments[name].copy_(torch.randn_like(arguments[name]))
    graph.replay()
    torch.cuda.synchronize()
    for name, value in call(arguments, grad_out, backend).items():
        if not torch.equal(value, captured[name]):
            raise Wrong(f"{name} of a replay differs from a plain call's")
    return "forward and backward captured, replayed on new numbers"


def check_second_stream(case: Case, device: torch.device, backend: str) -> str:
    """On a stream of its own the call waits for what that stream was doing."""
    arguments, grad_out = tensors(case, torch.bfloat16, device)
    expected = call(arguments, grad_out, backend)
    late = torch.empty_like(arguments["query"])
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    big = torch.randn(4096, 4096, device=device)
    with torch.cuda.stream(stream):
        late.fill_(float("nan"))
        for _ in range(20):
            big = (big @ big).clamp_(-1, 1)
        late.copy_(arguments["query"])
        found = call({**arguments, "query": late}, grad_out, backend)
    torch.cuda.synchronize()
    for name, value in found.items():
        if not torch.equal(value, expected[name]):
            raise Wrong(f"{name} on a second stream differs")
    return "on a busy second stream, the same bits"


def check_compiled(case: Case, device: torch.device, backend: str, compiler: str) -> str:
    """torch.compile(fullgraph=True) with a dynamic length, forward and backward."""
    import retro_kernels as rk

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return rk.chunked_cross_attention(query, key, value, chunk_size=case.m, backend=backend)

    compiled: Callable[..., Tensor] = torch.compile(attend, fullgraph=True, dynamic=True, backend=compiler)
    lengths = (case.n, case.n + case.m + 3)
    for n in lengths:
        arguments, grad_out = tensors(replace(case, n=n, options=()), torch.float32, device)
        leaves = [arguments[name].requires_grad_() for name in ("query", "key", "value")]
        results = []
        for function in (attend, compiled):
            out = function(*leaves)
            results.append((out.detach(), *torch.autograd.grad(out, leaves, grad_out)))
        for name, plain, other in zip(verify.NAMES, *results):
            if not verify.compare(name, other, plain).relative <= 1e-6:
                raise Wrong(f"{name} of the compiled call differs at length {n}")
    return f"fullgraph, lengths {lengths[0]} and {lengths[1]}"
