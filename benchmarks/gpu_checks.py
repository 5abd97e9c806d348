"""Is a fused backend right on this machine? Used by gpu_suite.py; each check says what it found or raises Wrong.

The error rule, its limits, guard bands and what counts as wrong are `retro_kernels/testing.py`'s. The truth is the
reference in fp64.

`python -m benchmarks.gpu_checks` calls every kernel once on small shapes and checks nothing: what compute-sanitizer
watches.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from retro_kernels.testing import FP32_TOLERANCE, KERNEL_FLOOR, Wrong, plain_precision

from . import verify
from .workloads import DTYPES, SEED

DIFFERENTIABLE = (
    "query", "key", "value", "encoded", "w_key", "w_value", "bias_key", "bias_value", "attention_bias", "relative_key",
    "content_bias", "relative_bias", "null_key", "null_value",
)  # fmt: skip
BY_CLOCK = ("cca", "projected")


@dataclass(frozen=True)
class Case:
    """One call of "cca", "projected" (the same from encoder states of width `e`, absorbed), "self" (neighbour
    self-attention) or "cross" (neighbour cross-attention). Sizes are letters of the design; `options` names what is
    passed besides. `documents`: lengths of those packed into every row."""

    name: str
    operation: str = "cca"
    b: int = 2
    n: int = 200
    m: int = 64
    k: int = 2
    r: int = 128
    h: int = 4
    hk: int = 4
    d: int = 64
    d_value: int | None = None
    e: int = 896
    chunks: int = 2
    """Of the encoder; a decoder's row has as many as it needs."""
    surplus: int = 0
    documents: tuple[int, ...] = ()
    options: tuple[str, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)

    def num_chunks(self) -> int:
        if self.operation not in BY_CLOCK:
            return self.chunks
        if self.settings.get("align") == "end":
            return -(-self.n // self.m) + self.surplus
        stride = self.settings.get("stride", self.m)
        if self.documents:
            return sum(max(0, (length - self.m) // stride + 1) for length in self.documents)
        last = self.settings.get("query_offset", 0) + self.n - self.m
        return max(0, last // stride + 1 - self.settings.get("chunk_offset", 0)) + self.surplus

    def rows_and_slots(self) -> tuple[int, int]:
        """Of the tables of positions."""
        if self.operation in BY_CLOCK:
            return self.m, self.r
        return {"self": (self.r, self.r), "cross": (self.r, self.m)}[self.operation]


EVERY = ("mask", "bias", "rotary", "null")
DROPOUT = {"dropout_p": 0.25}


def cases(reduced: bool) -> list[Case]:
    """Every option that a fused backend honours, awkward sizes, and all options at once. The second one has many
    options: it is the one that determinism, guard bands and strides are tried on."""
    if reduced:
        tiny: dict[str, Any] = {"b": 1, "n": 21, "m": 8, "k": 2, "r": 8, "h": 2, "hk": 1, "d": 16}
        return [
            Case("plain", **tiny),
            Case("mask, bias, rotary, null slot, grouped heads", **tiny, options=EVERY),
            Case("relative positions, dropout", **tiny, options=("relative",), settings=DROPOUT),
            Case("encoder self-attention, mask, dropout", "self", **tiny, options=("mask",), settings=DROPOUT),
            Case("encoder cross-attention, relative positions", "cross", **tiny, options=("relative",)),
            Case("packed", **{**tiny, "n": 30}, documents=(11, 3, 16)),
        ]
    small = {"b": 1, "n": 45, "m": 16, "r": 20, "h": 2, "hk": 1}
    return [*_cca_cases(small), *_encoder_cases(small), *_decoder_cases(small)]


def _cca_cases(small: dict[str, Any]) -> list[Case]:
    return [
        Case("plain"),
        Case("everything at once", options=EVERY, hk=2, d_value=96, d=128),
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
        Case("stride below the chunk size", n=150, settings={"stride": 24}, options=EVERY),
        Case("aligned to the end", settings={"align": "end"}, options=EVERY),
        Case("a slice of a longer sequence", settings={"query_offset": 100, "chunk_offset": 0}, n=90),
        Case("surplus chunks", surplus=2),
        Case("shorter than a chunk", n=40),
        Case("head size 256", d=256, **{**small, "h": 2}),
        Case("head size 72", d=72, **small, options=EVERY),
        Case("head size 20, odd lengths", d=20, **{**small, "r": 37, "m": 13}, k=3, options=EVERY),
        Case("chunks of 100", m=100, n=310, d=64, options=EVERY),
        Case("ten neighbours", k=10, n=130),
        Case("one neighbour, one token", k=1, r=1, n=130),
        Case("relative positions", options=("relative",)),
        Case("relative positions, head size 128, null slot", d=128, options=("relative", "null", "mask")),
        Case("relative positions, odd lengths", d=20, **{**small, "r": 37, "m": 13}, k=3, options=("relative",)),
        Case("dropout", settings=DROPOUT),
        Case("dropout, relative positions, null slot", options=("relative", "null", "mask"), settings=DROPOUT),
        Case("packed", n=330, documents=(70, 40, 156, 64), options=("mask", "null")),
        Case("packed, relative positions, dropout", n=330, documents=(133, 197), options=("relative",),
             settings=DROPOUT),
    ]  # fmt: skip


def _encoder_cases(small: dict[str, Any]) -> list[Case]:
    found = []
    for operation, word in (("self", "encoder self-attention"), ("cross", "encoder cross-attention")):
        found += [
            Case(word, operation),
            Case(f"{word}, head size 128", operation, d=128),
            Case(f"{word}, mask, bias, rotary, grouped heads", operation, hk=2, options=("mask", "bias", "rotary")),
            Case(f"{word}, everything masked", operation, options=("all masked",)),
            Case(f"{word}, relative positions", operation, options=("relative",)),
            Case(f"{word}, relative positions, head size 128, mask", operation, d=128, options=("relative", "mask")),
            Case(f"{word}, dropout", operation, settings=DROPOUT),
            Case(f"{word}, dropout, relative positions", operation, options=("relative", "mask"), settings=DROPOUT),
            Case(f"{word}, odd lengths", operation, d=20, **{**small, "r": 37, "m": 13}, k=3, options=("relative",)),
            Case(f"{word}, r of 300", operation, b=1, k=1, r=300, m=70, h=2, hk=2, options=("relative",)),
            Case(f"{word}, ten neighbours", operation, b=1, k=10, h=2, hk=2),
        ]
    return found


def _decoder_cases(small: dict[str, Any]) -> list[Case]:
    row = {"b": 1, "k": 1, "chunks": 1, "h": 2, "hk": 2}
    causal = {"causal": True}
    return [
        Case("causal", "self", **row, r=200, settings=causal),
        Case("causal, relative positions, dropout", "self", **row, r=333, options=("relative",),
             settings={**causal, **DROPOUT}),
        Case("causal, n = 4096, relative positions", "self", **{**row, "h": 1, "hk": 1}, r=4096, options=("relative",),
             settings=causal),
        Case("causal, packed", "self", **row, r=300, documents=(70, 1, 129, 100), options=("mask",), settings=causal),
        Case("causal, packed, relative positions", "self", **row, r=300, documents=(150, 150), options=("relative",),
             settings=causal),
        Case("causal, packed, rotary", "self", **row, r=300, documents=(33, 267), options=("rotary",),
             settings=causal),
    ]  # fmt: skip


def projected_cases(reduced: bool) -> list[Case]:
    """Of the absorbed strategy. The second one has every option: determinism and guard bands are tried on it."""
    every = ("mask", "relative", "null", "bias", "biases")
    if reduced:
        tiny: dict[str, Any] = {"b": 1, "n": 13, "m": 5, "k": 2, "r": 8, "h": 2, "d": 16, "e": 24}
        return [
            Case("absorbed", "projected", **tiny, hk=2),
            Case("absorbed, every option, grouped heads", "projected", **tiny, hk=1, options=every),
        ]
    odd: dict[str, Any] = {"b": 1, "n": 80, "m": 13, "k": 3, "r": 37, "h": 2, "hk": 1, "d": 20, "d_value": 40, "e": 100}
    return [
        Case("absorbed, head size 128", "projected", d=128),
        Case("absorbed, every option, grouped heads, head size 128", "projected", d=128, hk=2, options=every),
        Case("absorbed", "projected"),
        Case("absorbed, mask", "projected", options=("mask",), d=128),
        Case("absorbed, everything masked, null slot", "projected", options=("all masked", "null")),
        Case("absorbed, bias of its own for each neighbour", "projected", options=("bias of each", "biases")),
        Case("absorbed, relative positions", "projected", options=("relative",), d=128),
        Case("absorbed, stride below the chunk size", "projected", n=150, settings={"stride": 24}, options=("null",)),
        Case("absorbed, a slice of a longer sequence", "projected", n=90,
             settings={"query_offset": 100, "chunk_offset": 0}),
        Case("absorbed, surplus chunks", "projected", surplus=2),
        Case("absorbed, odd sizes", "projected", **odd, options=every),
        Case("absorbed, states of 4096", "projected", b=1, n=130, d=128, e=4096),
        Case("absorbed, ten neighbours", "projected", k=10, n=130),
        Case("absorbed, dropout", "projected", settings=DROPOUT, options=("relative", "mask", "null")),
        Case("absorbed, packed", "projected", n=330, documents=(70, 40, 156, 64), options=("mask", "null")),
        Case("absorbed, one multi-query head", "projected", hk=1, h=8),
    ]  # fmt: skip


CUDA_TAKES = ("mask", "all masked")


def cuda_cases(reduced: bool) -> list[Case]:
    """The same cases as far as the CUDA C++ kernels take them (one head size of 64, 96 or 128): each without the
    options that they refuse, once. The second one is what determinism, guard bands and strides are tried on."""
    if reduced:
        tiny: dict[str, Any] = {"b": 1, "n": 21, "m": 8, "k": 2, "r": 8, "h": 2, "hk": 1, "d": 64}
        return [
            Case("plain", **tiny),
            Case("mask, grouped heads", **tiny, options=("mask",)),
            Case("encoder self-attention, mask", "self", **tiny, options=("mask",)),
            Case("encoder cross-attention", "cross", **tiny),
            Case("packed", **{**tiny, "n": 30}, documents=(11, 3, 16)),
        ]
    found: dict[str, Case] = {}
    for case in cases(reduced):
        d = 128 if case.d > 96 else 96 if case.d == 72 else 64
        settings = {name: value for name, value in case.settings.items() if name in ("scale", "stride", "align",
                    "query_offset", "chunk_offset")}  # fmt: skip
        options = tuple(option for option in case.options if option in CUDA_TAKES)
        if not case.settings.get("causal"):
            taken = replace(case, d=d, d_value=None, options=options, settings=settings)
            key = repr(replace(taken, name=""))
            found.setdefault(key, taken)
    extra = [
        Case("head size 96, mask", d=96, options=("mask",)),
        Case("head size 128, grouped heads, mask", d=128, hk=2, options=("mask",)),
        Case("encoder self-attention, long", "self", b=1, k=1, r=700, h=2, hk=1, options=("mask",)),
        Case("encoder cross-attention, head size 96", "cross", d=96, options=("mask",)),
    ]
    first, *rest = found.values()
    return [first, extra[1], *rest, extra[0], *extra[2:]]


def cuda_projected_cases(reduced: bool) -> list[Case]:
    """Of `projected_cases` what the absorbed CUDA C++ kernel takes; the second one is what determinism and guard bands
    are tried on."""
    if reduced:
        tiny: dict[str, Any] = {"b": 1, "n": 13, "m": 5, "k": 2, "r": 8, "h": 2, "d": 64, "e": 64}
        return [
            Case("absorbed", "projected", **tiny, hk=2),
            Case("absorbed, mask, grouped heads", "projected", **tiny, hk=1, options=("mask",)),
        ]
    first, *rest = (
        case for case in projected_cases(reduced)
        if set(case.options) <= set(CUDA_TAKES) and not case.documents and case.settings != DROPOUT
        and case.d in (64, 128) and case.k * case.r <= 256
    )  # fmt: skip
    return [first, Case("absorbed, mask, grouped heads", "projected", d=128, hk=2, options=("mask",)), *rest]


def tensors(case: Case, dtype: torch.dtype, device: torch.device) -> tuple[dict[str, Any], Tensor]:
    """Keyword arguments of the call, and the output's gradient. Values are bf16 numbers in every precision."""
    generator = torch.Generator().manual_seed(SEED)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).bfloat16().to(device=device, dtype=dtype)

    l, d_value = case.num_chunks(), case.d_value or case.d
    retrieved = (case.b, l, case.k, case.r)
    query, key = {
        "cca": ((case.b, case.n), retrieved),
        "projected": ((case.b, case.n), retrieved),
        "self": (retrieved, retrieved),
        "cross": (retrieved, (case.b, l, case.m)),
    }[case.operation]
    arguments: dict[str, Any] = {"query": draw(*query, case.h, case.d), **case.settings}
    widths = {"key": case.d, "value": d_value}
    if case.operation == "projected":
        arguments |= {"encoded": draw(*key, case.e), "strategy": "absorb"}
        arguments |= {f"w_{name}": draw(case.hk, width, case.e) / 32 for name, width in widths.items()}
        if "biases" in case.options:
            arguments |= {f"bias_{name}": draw(case.hk, width) for name, width in widths.items()}
    else:
        arguments |= {name: draw(*key, case.hk, width) for name, width in widths.items()}
    if case.operation in BY_CLOCK:
        arguments["chunk_size"] = case.m
    rows, slots = case.rows_and_slots()
    mask_name = "activation_mask" if case.operation == "cross" else "neighbour_mask"
    if "mask" in case.options:
        mask = torch.rand(key, generator=generator) < 0.7
        if l and not case.settings.get("causal"):
            mask[:, 0] = False
        arguments[mask_name] = mask.to(device)
    if "all masked" in case.options:
        arguments[mask_name] = torch.zeros(key, dtype=torch.bool, device=device)
    if "bias" in case.options:
        arguments["attention_bias"] = draw(case.h, rows, slots)
    if "bias of each" in case.options:
        arguments["attention_bias"] = draw(case.h, rows, case.k * slots)
    if "null" in case.options:
        arguments |= {"null_key": draw(case.h, case.d), "null_value": draw(case.h, d_value)}
    if "relative" in case.options:
        arguments["relative_key"] = draw(case.h, rows + slots - 1, case.d)
        arguments |= {name: draw(case.h, case.d) for name in ("content_bias", "relative_bias")}
    if "rotary" in case.options:
        width = case.d // 4
        for name, length in (("query_rotary", rows), ("key_rotary", slots)):
            angles = torch.rand(length, width, generator=generator) * 6
            tables = (table.bfloat16().to(device=device, dtype=dtype) for table in (angles.cos(), angles.sin()))
            arguments[name] = tuple(tables)
    if case.documents:
        starts = torch.zeros(case.b, sum(case.documents), dtype=torch.bool)
        starts[:, [sum(case.documents[:i]) for i in range(len(case.documents))]] = True
        arguments["sequence_starts"] = starts.to(device)
    grad_out = draw(*query, case.h, d_value)
    return arguments, grad_out


def call(case: Case, arguments: dict[str, Any], grad_out: Tensor, backend: str) -> dict[str, Tensor]:
    """The output, and the gradient of every differentiable argument that is there. Seeded: dropout drops the same.
    (The absorbed CUDA C++ kernel has no gradient: its output alone.)"""
    import retro_kernels as rk

    operation: Callable[..., Any] = {
        "cca": rk.chunked_cross_attention,
        "projected": rk.projected_chunked_cross_attention,
        "self": rk.neighbour_self_attention,
        "cross": rk.neighbour_cross_attention,
    }[case.operation]
    arguments = dict(arguments)
    if backend == "cuda" and case.operation == "projected":
        with torch.no_grad():
            return {"output": operation(**arguments, backend=backend)}
    wanted = [name for name in DIFFERENTIABLE if name in arguments]
    for name in wanted:
        arguments[name] = arguments[name].detach().requires_grad_()
    if arguments.get("dropout_p"):  # (seeding is not allowed while a CUDA graph is captured)
        torch.manual_seed(SEED)
    out = operation(**arguments, backend=backend)
    gradients = torch.autograd.grad(out, [arguments[name] for name in wanted], grad_out)
    return {"output": out.detach(), **{f"{name} gradient": g for name, g in zip(wanted, gradients)}}


def in_double(arguments: dict[str, Any]) -> dict[str, Any]:
    def double(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(double, value))
        return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value

    return {name: double(value) for name, value in arguments.items()}


def allowed(plain_error: float, dtype: torch.dtype) -> float:
    """How far off the truth a result may be, over the largest true value, where PyTorch's of the same precision is
    `plain_error` off."""
    return FP32_TOLERANCE if dtype == torch.float32 else 2 * plain_error + KERNEL_FLOOR[dtype]


def check_case(case: Case, dtype: str, device: torch.device, backend: str) -> str:
    """The error rule for the output and every gradient. -> the largest error found."""
    arguments, grad_out = tensors(case, DTYPES[dtype], device)
    truth = call(case, in_double(arguments), grad_out.double(), "reference")
    with plain_precision():
        plain = call(case, arguments, grad_out, "reference")
    found = call(case, arguments, grad_out, backend)
    largest = 0.0
    for name, value in found.items():
        error = verify.compare(name, value, truth[name])
        plain_error = verify.compare(name, plain[name], truth[name])
        limit = allowed(plain_error.relative, DTYPES[dtype])
        if not error.relative <= limit:
            raise Wrong(
                f"{name}: error {error.relative:.2e} of the largest value at {list(error.worst)}, allowed {limit:.2e}"
                f" (same-precision PyTorch has {plain_error.relative:.2e})"
            )
        largest = max(largest, error.relative)
    return f"largest error {largest:.1e}"


def check_deterministic(case: Case, dtype: str, device: torch.device, backend: str, trials: int) -> str:
    """Forward and backward give the same bits every time."""
    arguments, grad_out = tensors(case, DTYPES[dtype], device)
    first = call(case, arguments, grad_out, backend)
    for trial in range(1, trials):
        for name, value in call(case, arguments, grad_out, backend).items():
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
    expected = call(case, arguments, grad_out, backend)
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
        found = call(case, guarded, guarded_grad, backend)
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
    expected = call(case, contiguous, grad_out, backend)
    strange = dict(arguments)
    strange["query"] = arguments["query"].transpose(1, 2).contiguous().transpose(1, 2)
    # An odd offset and an odd row length; of whole 16 bytes where a backend refuses others.
    offset, more = (8, 24) if backend == "cuda" else (1, 3)
    wide = torch.full((*arguments["value"].shape[1:-1], 2 * case.d + more), float("nan"), device=device)
    wide = wide.to(DTYPES[dtype])
    wide[..., offset : case.d + offset] = arguments["key"][0]
    strange["key"] = wide[..., offset : case.d + offset].expand(arguments["key"].shape)
    if "neighbour_mask" in strange:
        strange["neighbour_mask"] = arguments["neighbour_mask"].repeat_interleave(2, -1)[..., ::2]
    strange_grad = grad_out.transpose(1, 2).contiguous().transpose(1, 2)
    for name, value in call(case, strange, strange_grad, backend).items():
        error = verify.compare(name, value, expected[name])
        if not error.relative <= verify.FLOORS[dtype]:
            raise Wrong(f"{name} differs from the contiguous call's by {error.relative:.2e} at {list(error.worst)}")
    return f"transposed, sliced at an offset of {offset}, expanded"


def check_beyond_int32(device: torch.device, backend: str) -> str:
    """Keys and values of more than 2^31 elements: the last chunks' results are those of a slice."""
    import retro_kernels as rk

    m, k, r, h, d = 64, 2, 128, 32, 128
    chunks = 2**31 // (k * r * h * d) + 2
    n = m * chunks
    whole = Case("more than 2^31 elements", n=n, m=m, k=k, r=r, h=h, hk=h, d=d)
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
    truth = call(whole, in_double(part), grad_out[:, start:].double(), "reference")
    with plain_precision():
        plain = call(whole, part, grad_out[:, start:], "reference")
    found = {
        "output": out.detach()[:, start:], "query gradient": gradients[0][:, start:],
        "key gradient": gradients[1][:, -2:], "value gradient": gradients[2][:, -2:],
    }  # fmt: skip
    for name, tensor in found.items():
        error = verify.compare(name, tensor, truth[name]).relative
        limit = allowed(verify.compare(name, plain[name], truth[name]).relative, torch.bfloat16)
        if not error <= limit:
            raise Wrong(f"{name}: error {error:.2e} of the largest value, allowed {limit:.2e}")
    return f"{key.numel():,} elements in key and in value"


def check_cuda_graph(case: Case, device: torch.device, backend: str) -> str:
    """Captured once, replayed on new numbers: the same bits as a plain call."""
    arguments, grad_out = tensors(case, torch.bfloat16, device)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call(case, arguments, grad_out, backend)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call(case, arguments, grad_out, backend)
    for name in ("query", "key", "value", "encoded"):
        if name in arguments:
            arguments[name].copy_(torch.randn_like(arguments[name]))
    graph.replay()
    torch.cuda.synchronize()
    for name, value in call(case, arguments, grad_out, backend).items():
        if not torch.equal(value, captured[name]):
            raise Wrong(f"{name} of a replay differs from a plain call's")
    return "forward and backward captured, replayed on new numbers"


def check_second_stream(case: Case, device: torch.device, backend: str) -> str:
    """On a stream of its own the call waits for what that stream was doing."""
    arguments, grad_out = tensors(case, torch.bfloat16, device)
    expected = call(case, arguments, grad_out, backend)
    late = torch.empty_like(arguments["query"])
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    big = torch.randn(4096, 4096, device=device)
    with torch.cuda.stream(stream):
        late.fill_(float("nan"))
        for _ in range(20):
            big = (big @ big).clamp_(-1, 1)
        late.copy_(arguments["query"])
        found = call(case, {**arguments, "query": late}, grad_out, backend)
    torch.cuda.synchronize()
    for name, value in found.items():
        if not torch.equal(value, expected[name]):
            raise Wrong(f"{name} on a second stream differs")
    return "on a busy second stream, the same bits"


def check_dropout_mask(case: Case, device: torch.device, backend: str) -> str:
    """Which probabilities are dropped, read off the output one by one: queries of 0 give every slot the same
    probability, and value t of a neighbour is the t-th unit vector (times 2 for the second neighbour, and so on)."""
    _, slots = case.rows_and_slots()
    neighbours = case.k if case.operation == "cca" else 1
    case = replace(case, d_value=slots, options=(), settings={**case.settings, **DROPOUT})
    arguments, grad_out = tensors(case, torch.float32, device)
    arguments["query"] = torch.zeros_like(arguments["query"])
    unit = torch.eye(slots, device=device)[:, None]  # [slots, 1 head, d_value]
    value = torch.zeros_like(arguments["value"]) + unit
    if case.operation == "cca":
        value = value * (2.0 ** torch.arange(neighbours, device=device))[:, None, None, None]
    arguments["value"] = value
    outputs = [call(case, arguments, grad_out, name)["output"] for name in ("reference", backend)]
    # Of a row with probability p = scale / (all slots), every element is p times a sum of distinct powers of 2.
    unitary = outputs[0][outputs[0] > 0].min()
    kept = [(output / unitary).round().long() for output in outputs]
    different = int((kept[0] != kept[1]).sum())
    if different:
        raise Wrong(f"{different} of {kept[0].numel()} elements tell of other dropped slots than the reference's")
    share = sum(((kept[0] >> j) & 1).double().mean().item() for j in range(neighbours)) / neighbours
    return f"{kept[0].numel() * neighbours:,} slots, the same kept as by the reference ({share:.3f} of all)"


def check_compiled(case: Case, device: torch.device, backend: str, compiler: str, dtype: str = "fp32") -> str:
    """torch.compile(fullgraph=True) with a dynamic length, forward and backward, the encoder's attentions after
    chunked cross-attention."""
    import retro_kernels as rk

    def attend(query: Tensor, key: Tensor, value: Tensor, name: str = backend) -> Tensor:
        out = rk.chunked_cross_attention(query, key, value, chunk_size=case.m, backend=name)
        own = rk.neighbour_self_attention(key, key, value, backend=name)
        cross = rk.neighbour_cross_attention(own, key[:, :, 0], value[:, :, 0], backend=name)
        return out * cross.mean()

    def run(function: Callable[..., Tensor], leaves: list[Tensor], grad_out: Tensor, *name: str) -> tuple[Tensor, ...]:
        out = function(*leaves, *name)
        return (out.detach(), *torch.autograd.grad(out, leaves, grad_out.to(out.dtype)))

    compiled: Callable[..., Tensor] = torch.compile(attend, fullgraph=True, dynamic=True, backend=compiler)
    lengths = (case.n, case.n + case.m + 3)
    for n in lengths:
        # Self-attention's output is cross-attention's query: one size for keys and values.
        arguments, grad_out = tensors(replace(case, n=n, options=(), d_value=None), DTYPES[dtype], device)
        leaves = [arguments[name].requires_grad_() for name in ("query", "key", "value")]
        doubles = [leaf.detach().double().requires_grad_() for leaf in leaves]
        truth = run(attend, doubles, grad_out.double(), "reference")
        with plain_precision():
            plain = run(attend, leaves, grad_out, "reference")
        found = run(compiled, leaves, grad_out)
        for name, *results in zip(("output", "query", "key", "value"), found, plain, truth):
            errors = [verify.compare(name, result, results[-1]).relative for result in results[:-1]]
            if not errors[0] <= allowed(errors[1], DTYPES[dtype]):
                raise Wrong(f"{name} of the compiled call: error {errors[0]:.2e} at length {n}")
    return f"fullgraph, lengths {lengths[0]} and {lengths[1]}"


def exercise(device: torch.device, backend: str) -> str:
    """Every kernel once, forward and backward, on small shapes with every option that the backend takes."""
    if backend == "cuda":
        return exercise_cuda(device)
    every = ("mask", "bias", "rotary", "null")
    sizes: dict[str, Any] = {"b": 1, "n": 45, "m": 16, "k": 2, "r": 24, "h": 2, "hk": 1, "d": 32}
    row = {**sizes, "k": 1, "chunks": 1, "r": 70, "hk": 2}
    planned = [
        Case("cca", **sizes, options=every),
        Case("cca, relative", **sizes, options=("relative", "mask"), settings=DROPOUT),
        Case("cca, packed", **sizes, documents=(20, 5, 20)),
        Case("self", "self", **sizes, options=("mask", "bias", "rotary")),
        Case("self, relative", "self", **sizes, options=("relative",), settings=DROPOUT),
        Case("cross", "cross", **sizes, options=("mask", "bias", "rotary")),
        Case("cross, relative", "cross", **sizes, options=("relative",), settings=DROPOUT),
        Case("causal, packed", "self", **row, documents=(30, 40), options=("relative",), settings={"causal": True}),
        Case("absorbed", "projected", **sizes, e=48, options=("mask",)),
        Case("absorbed, every option", "projected", **sizes, e=40,
             options=("relative", "null", "bias", "biases"), settings=DROPOUT),
    ]  # fmt: skip
    for dtype in ("fp32", "bf16"):
        for case in planned:
            arguments, grad_out = tensors(case, DTYPES[dtype], device)
            call(case, arguments, grad_out, backend)
    from . import gpu_decode

    decoded = gpu_decode.exercise(device, backend)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return f"{2 * len(planned)} calls, forward and backward; {decoded} decode calls"


def exercise_cuda(device: torch.device) -> str:
    """Every CUDA C++ kernel once, under each name that the device runs (`set_kernels`)."""
    from retro_kernels import cuda_extension

    sizes: dict[str, Any] = {"b": 1, "n": 45, "m": 16, "k": 2, "r": 24, "h": 2, "hk": 2}
    planned = [
        replace(case, d=d)
        for d in (64, 96, 128)
        for case in (
            Case("cca", **sizes, options=("mask",)),
            Case("cca, grouped, keys of two tiles", **{**sizes, "hk": 1, "r": 40}),
            Case("cca, packed", **sizes, documents=(20, 5, 20)),
            Case("cca, rows of two tiles", **{**sizes, "n": 150, "m": 70}),
            Case("self, two tiles", "self", **{**sizes, "r": 100}, options=("mask",)),
            Case("self, sweeps", "self", **{**sizes, "r": 150, "k": 1, "hk": 1}),
            Case("cross", "cross", **sizes, options=("mask",)),
        )
    ]
    names = cuda_kernel_names(device)
    ops = cuda_extension.ops(torch.empty(0, device=device))
    for name in names:
        ops.set_kernels(name)
        for dtype in ("bf16", "fp16"):
            for case in planned:
                arguments, grad_out = tensors(case, DTYPES[dtype], device)
                call(case, arguments, grad_out, "cuda")
    ops.set_kernels("")
    if "sm90" in names:
        for case in cuda_projected_cases(reduced=True):
            arguments, grad_out = tensors(case, torch.bfloat16, device)
            call(case, arguments, grad_out, "cuda")
    from . import gpu_decode

    decoded = gpu_decode.exercise(device, "cuda")
    if device.type == "cuda":
        torch.cuda.synchronize()
    return f"{len(names) * 2 * len(planned)} calls, forward and backward ({', '.join(names)}); {decoded} decode calls"


def cuda_kernel_names(device: torch.device) -> list[str]:
    """The sets of CUDA C++ kernels that this device runs: "sm80", and on Hopper "sm90"."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0):
        return ["sm80", "sm90"]
    return ["sm80"]


if __name__ == "__main__":
    import os

    print(exercise(torch.device("cuda"), os.environ.get("RETRO_KERNELS_BACKEND", "triton")))
