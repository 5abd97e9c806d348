"""Is decoding right on this machine? The checks of gpu_checks.py for both decode operations; used by gpu_suite.py."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from retro_kernels.testing import plain_precision

from . import verify
from .gpu_checks import GUARD, Wrong, allowed, banded, in_double
from .workloads import DTYPES, SEED

QUANTISED = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}


@dataclass(frozen=True)
class Case:
    """One call; sizes are letters of the design. `e`: from encoder states of that width."""

    name: str
    b: int = 5
    t: int = 1
    m: int = 64
    k: int = 2
    r: int = 128
    h: int = 8
    hk: int = 8
    d: int = 128
    d_value: int = 128
    e: int | None = None
    options: tuple[str, ...] = ()


EVERY = ("mask", "relative", "null")


def cases(reduced: bool) -> list[Case]:
    """Every option, every kind of cache, one row and several, sizes that fill no tile."""
    if reduced:
        tiny: dict[str, Any] = {"b": 5, "m": 8, "r": 11, "h": 4, "d": 16, "d_value": 16}
        return [
            Case("decode", **tiny, hk=4),
            Case("decode, every option, grouped heads, new tokens", **tiny, hk=2, t=3, options=EVERY),
            Case("decode, states, int8", **tiny, hk=4, e=24, options=("int8", *EVERY)),
        ]
    odd: dict[str, Any] = {"k": 3, "r": 37, "h": 6, "hk": 3, "d": 72, "d_value": 40, "m": 13}
    return [
        Case("decode"),
        Case("decode, every option, grouped heads, new tokens", hk=2, t=4, options=EVERY),
        Case("decode, mask, bias, null slot, one row", options=("mask", "bias", "null")),
        Case("decode, turned keys, one row", options=("rotary", "null")),
        Case("decode, turned keys, rows", t=3, options=("rotary", "mask")),
        Case("decode, head size 64", d=64, d_value=64, t=2),
        Case("decode, head size 256", d=256, d_value=256, h=4, hk=4, options=("mask",)),
        Case("decode, odd sizes", **odd, options=EVERY),
        Case("decode, odd sizes, new tokens", **odd, t=5, options=("mask", "rotary")),
        Case("decode, one sequence of many heads", b=1, h=32, hk=32),
        Case("decode, forty neighbours", b=3, k=40),
        Case("decode, batch 64", b=64, h=32, hk=32, options=("mask",)),
        Case("decode, one multi-query head", h=32, hk=1, options=("mask", "bias")),
        *(Case(f"decode, {kind}, {word}", hk=hk, options=(kind, "mask", *more))
          for kind in QUANTISED for word, hk, more in (("one row", 8, ()), ("rows", 2, ("null",)),
                                                       ("turned keys", 8, ("rotary",)))),
        Case("decode, states", h=32, hk=32, e=896),
        Case("decode, states, every option, biases", h=32, hk=8, e=896, t=2, options=("biases", *EVERY)),
        Case("decode, states, fp8", h=32, hk=32, e=896, options=("fp8", "mask")),
        Case("decode, states, int8, batch 64", b=64, h=32, hk=32, e=896, options=("int8",)),
        Case("decode, states of 4096", b=2, h=32, hk=32, e=4096),
    ]  # fmt: skip


def tensors(case: Case, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Keyword arguments of the call. Where there are more than two sequences, 0 is not valid, 1 is before its first
    chunk and 2 just at it; what they do not read holds NaN."""
    generator = torch.Generator().manual_seed(SEED)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).bfloat16().to(device=device, dtype=dtype)

    b, m, k, r, h, hk, d = case.b, case.m, case.k, case.r, case.h, case.hk, case.d
    position = torch.randint(2 * m - 1, 3 * m - case.t, (b,), generator=generator)
    valid = torch.ones(b, dtype=torch.bool)
    if b > 2:
        valid[0], position[0], position[1], position[2] = False, -7, 0, m - 1
    arguments: dict[str, Any] = {
        "query": draw(b, case.t, h, d), "position": position.to(device), "valid": valid.to(device), "chunk_size": m
    }  # fmt: skip
    kind = next((QUANTISED[x] for x in case.options if x in QUANTISED), None)
    shapes = {"key": (b, k, r, hk, d), "value": (b, k, r, hk, case.d_value)}
    for name, shape in shapes.items() if case.e is None else (("encoded", (b, k, r, case.e)),):
        cache = draw(*shape)
        if kind is None:
            if b > 2:
                cache[:2] = float("nan")
        else:
            scale = cache.float().abs().amax(tuple(range(3, cache.dim()))) / (448 if kind.is_floating_point else 127)
            arguments[f"{name}_scale"] = scale
            scaled = cache.float() / scale.view(*scale.shape, *(1,) * (cache.dim() - 3))
            cache = (scaled if kind.is_floating_point else scaled.round()).to(kind)
        arguments[name] = cache
    if case.e is not None:
        arguments |= {"w_key": draw(hk, d, case.e) / 32, "w_value": draw(hk, case.d_value, case.e) / 32}
        if "biases" in case.options:
            arguments |= {"bias_key": draw(hk, d), "bias_value": draw(hk, case.d_value)}
    if "mask" in case.options:
        arguments["neighbour_mask"] = (torch.rand(b, k, r, generator=generator) < 0.7).to(device)
    if "bias" in case.options:
        arguments["attention_bias"] = draw(h, m, k * r)
    if "null" in case.options:
        arguments |= {"null_key": draw(h, d), "null_value": draw(h, case.d_value)}
    if "relative" in case.options:
        arguments["relative_key"] = draw(h, m + r - 1, d)
        arguments |= {name: draw(h, d) for name in ("content_bias", "relative_bias")}
    if "rotary" in case.options:
        for name, length in (("query_rotary", m), ("key_rotary", r)):
            angles = torch.rand(length, d // 4, generator=generator) * 6
            arguments[name] = tuple(x.bfloat16().to(device=device, dtype=dtype) for x in (angles.cos(), angles.sin()))
    return arguments


def call(arguments: dict[str, Any], backend: str) -> dict[str, Tensor]:
    """Output and log-sum-exp."""
    import retro_kernels as rk

    operation: Callable[..., Any] = (
        rk.projected_chunked_cross_attention_decode if "encoded" in arguments else rk.chunked_cross_attention_decode
    )
    with torch.no_grad():
        out, lse = operation(**arguments, return_lse=True, backend=backend)
    return {"output": out, "lse": lse}


def truth_of(arguments: dict[str, Any]) -> dict[str, Tensor]:
    wide = in_double({name: x for name, x in arguments.items() if not name.endswith("_scale")})
    for name in ("key", "value", "encoded"):
        if f"{name}_scale" in arguments:
            scale = arguments[f"{name}_scale"].double()
            cache = arguments[name].to(torch.float32 if arguments[name].dtype == torch.float8_e4m3fn else torch.float64)
            wide[name] = cache.double() * scale.view(*scale.shape, *(1,) * (cache.dim() - 3))
    return call(wide, "reference")


def check_case(case: Case, dtype: str, device: torch.device, backend: str) -> str:
    """The error rule for the output and the log-sum-exp; what is idle is exactly 0 and -inf."""
    arguments = tensors(case, DTYPES[dtype], device)
    truth = truth_of(arguments)
    with plain_precision():
        plain = call(arguments, "reference")
    found = call(arguments, backend)
    largest = 0.0
    for name, value in found.items():
        if not torch.equal(value.isfinite(), truth[name].isfinite()):
            raise Wrong(f"{name} is not finite where it should be, or the other way round")
        x, y, z = (tensor.masked_fill(~truth[name].isfinite(), 0.0) for tensor in (value, truth[name], plain[name]))
        error = verify.compare(name, x, y)
        limit = allowed(verify.compare(name, z, y).relative, DTYPES[dtype])
        if not error.relative <= limit:
            raise Wrong(f"{name}: error {error.relative:.2e} at {list(error.worst)}, allowed {limit:.2e}")
        largest = max(largest, error.relative)
    if bool(found["output"][truth["output"] == 0].any()):
        raise Wrong("an idle token's output is not exactly 0")
    return f"largest error {largest:.1e}"


def check_memory(case: Case, dtype: str, device: torch.device, backend: str) -> str:
    """The same bits every time, whatever lies round the tensors and in the outputs beforehand; nothing beside the
    outputs is written."""
    common = importlib.import_module("retro_kernels.ops.common")
    arguments = tensors(case, DTYPES[dtype], device)
    expected = call(arguments, backend)
    bands: list[Tensor] = []
    guarded = dict(arguments)
    for name, x in arguments.items():
        if isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float8_e4m3fn:
            guarded[name] = banded(tuple(x.shape), x.dtype, device, bands).copy_(x)
    with mock.patch.object(common, "allocate", lambda shape, dtype, device: banded(shape, dtype, device, bands)):
        found = [call(guarded, backend) for _ in range(3)]
    for result in found:
        for name, value in result.items():
            if not torch.equal(value, expected[name]):
                raise Wrong(f"{name} changes between calls, or with what surrounds the tensors")
    for number, buffer in enumerate(bands):
        if not bool(buffer[:GUARD].isnan().all() and buffer[-GUARD:].isnan().all()):
            raise Wrong(f"the guard band of tensor {number} was written to")
    return f"{len(bands)} tensors with guard bands, three calls"


def check_border(case: Case, device: torch.device, backend: str) -> str:
    """Tokens past the border come out NaN and the others right; `validate` raises. (On a CPU every call raises.)"""
    import retro_kernels as rk

    arguments = tensors(Case(case.name, b=2, t=4, h=case.h, hk=case.hk), torch.float32, device)
    arguments["position"] = torch.tensor(
        [3 * case.m - 3, 2 * case.m - 1], device=device
    )  # the border is after 2 tokens
    arguments["valid"] = torch.ones(2, dtype=torch.bool, device=device)
    found = call(arguments, backend)
    short = {**arguments, "query": arguments["query"][:, :2]}
    for name, value in call(short, backend).items():
        if not torch.equal(found[name][0, :2], value[0]) or bool(found[name][1].isnan().any()):
            raise Wrong(f"{name} of tokens before the border changes with what is beyond it")
        if not bool(found[name][0, 2:].isnan().all()):
            raise Wrong(f"{name} beyond the border is not NaN")
    try:
        rk.chunked_cross_attention_decode(**arguments, validate=True, backend=backend)
    except ValueError:
        return "NaN beyond the border, validate raises"
    raise Wrong("validate=True does not raise beyond the border")


@contextlib.contextmanager
def no_synchronisation() -> Iterator[None]:
    """Within it whatever makes the host wait for the GPU raises."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def check_cuda_graph(case: Case, device: torch.device, backend: str) -> str:
    """Nothing waits for the GPU; a graph captured once and replayed for other positions, validity, queries and caches
    gives the bits of a plain call."""
    arguments = tensors(case, torch.bfloat16, device)
    with no_synchronisation():
        call(arguments, backend)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call(arguments, backend)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call(arguments, backend)
    arguments["position"].copy_(arguments["position"].flip(0).clamp(min=0))
    arguments["valid"].copy_(arguments["valid"].flip(0))
    for name in ("query", "key", "value", "encoded"):
        if name in arguments and arguments[name].dtype == torch.bfloat16:
            arguments[name].copy_(torch.randn_like(arguments[name]))
    graph.replay()
    torch.cuda.synchronize()
    for name, value in call(arguments, backend).items():
        if not torch.equal(value.nan_to_num(), captured[name].nan_to_num()):
            raise Wrong(f"{name} of a replay differs from a plain call's")
    return "captured, replayed for other positions and numbers"


def exercise(device: torch.device, backend: str) -> int:
    """Every decode kernel once on small shapes -> how many calls."""
    sizes: dict[str, Any] = {"b": 3, "m": 16, "r": 24, "h": 4, "d": 32, "d_value": 32}
    planned = [
        Case("", **sizes, hk=4, options=("mask", "bias", "null")),
        Case("", **sizes, hk=1, t=2, options=("relative", "int8")),
        Case("", **sizes, hk=2, t=2, options=("rotary", "fp8")),
        Case("", **sizes, hk=4, e=300, options=("mask", "null")),
    ]
    if backend == "cuda":  # whose caches hold keys turned already, in rows of multiples of 8
        planned = [replace(case, e=case.e and 304) for case in planned if "rotary" not in case.options]
    for dtype in (torch.float32, torch.bfloat16):
        for case in planned:
            call(tensors(case, dtype, device), backend)
    return 2 * len(planned)
