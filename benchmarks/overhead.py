"""Measures what a call costs beside its arithmetic: eager calls of no size, SDPA and ours in one run, in microseconds.

    python -m benchmarks.overhead [--device cuda] [--json FILE]

Each figure is the median of the quietest tenth of many calls on one thread, tensors of one chunk. "kernel" is the raw
operation of the compiled library (CPU only), so that what is above it is this library's Python. On a CPU the Triton
path is timed too, up to its launches, which a fake driver takes (`fake_gpu.py`): what a launch costs in CUDA's own
driver comes on top.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import time
from collections.abc import Callable, Iterable, Iterator

import torch
import torch.nn.functional as F

import retro_kernels as rk
from retro_kernels.bench import environment

B, N, M, K, R, H, D, E = 1, 8, 4, 2, 4, 2, 16, 24


def microseconds(call: Callable[[], object], seconds: float = 1.0) -> float:
    """Microseconds of one call: the median of the quietest tenth, since others use the machine too."""
    for _ in range(50):
        call()
    times, end = [], time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.thread_time_ns()
        for _ in range(10):
            call()
        times.append((time.thread_time_ns() - start) / 10_000)
    quiet = sorted(times)[: max(1, len(times) // 10)]
    return quiet[len(quiet) // 2]


def calls(
    device: str, backend: str | None = None, dtype: torch.dtype = torch.float32
) -> dict[str, Callable[[], object]]:
    """Name -> a call; those that end with "backward" run both directions. With a `backend` only what it has."""

    def draw(*shape: int, gradient: bool = False) -> torch.Tensor:
        return torch.randn(*shape, device=device, dtype=dtype, requires_grad=gradient)

    q, kv = draw(B, N, H, D), draw(B, N // M, K, R, H, D)
    encoded, w = draw(B, N // M, K, R, E), draw(H, D, E)
    position = torch.full((B,), 5, device=device)
    layer = rk.nn.ChunkedCrossAttention(H * D, context_dim=E, num_heads=H, chunk_size=M).to(device, dtype)
    hidden = draw(B, N, H * D)
    sdpa = [draw(B, H, N, D) for _ in range(3)]
    trained = [draw(B, N, H, D, gradient=True), *(draw(*kv.shape, gradient=True) for _ in range(2))]
    sdpa_trained = [draw(B, H, N, D, gradient=True) for _ in range(3)]
    self_q = draw(B, N // M, K, R, H, D)

    def no_grad(call: Callable[[], object]) -> Callable[[], object]:
        def wrapped() -> object:
            with torch.no_grad():
                return call()

        return wrapped

    def both(call: Callable[[], torch.Tensor], inputs: list[torch.Tensor]) -> Callable[[], object]:
        gradient = torch.ones_like(call())
        return lambda: torch.autograd.grad(call(), inputs, gradient)

    found = {
        "SDPA forward": lambda: F.scaled_dot_product_attention(*sdpa),
        "CCA forward": lambda: rk.chunked_cross_attention(q, kv, kv, chunk_size=M, backend=backend),
        "CCA forward, kernel": _kernel(q, kv) if device == "cpu" and backend is None else None,
        "self-attention forward": lambda: rk.neighbour_self_attention(self_q, kv, kv, backend=backend),
        "decode": lambda: rk.chunked_cross_attention_decode(
            q[:, :1], kv[:, 0], kv[:, 0], chunk_size=M, position=position, backend=backend
        ),
        "projected decode": lambda: rk.projected_chunked_cross_attention_decode(
            q[:, :1], encoded[:, 0], w, w, chunk_size=M, position=position, backend=backend
        ),
        "projected forward, absorb": lambda: rk.projected_chunked_cross_attention(
            q, encoded, w, w, chunk_size=M, strategy="absorb", backend=backend
        ),
        "projected forward, auto": lambda: rk.projected_chunked_cross_attention(q, encoded, w, w, chunk_size=M),
        "layer forward": no_grad(lambda: layer(hidden, encoded)),
        "SDPA forward and backward": both(lambda: F.scaled_dot_product_attention(*sdpa_trained), sdpa_trained),
        "CCA forward and backward": both(
            lambda: rk.chunked_cross_attention(*trained, chunk_size=M, backend=backend), trained
        ),
    }
    without = () if backend is None else ("SDPA", "layer", "projected forward, auto")
    return {name: call for name, call in found.items() if call is not None and not name.startswith(without or "-")}


def of_triton() -> Iterator[tuple[str, float]]:
    """The Triton path in bf16, launched nowhere."""
    from .fake_gpu import fake_driver

    with fake_driver(90) as driver:
        for name, call in calls("cpu", "triton", torch.bfloat16).items():

            def forgetful(call: Callable[[], object] = call) -> None:
                call()
                driver.launches.clear()

            yield f"Triton: {name}", microseconds(forgetful)


def _kernel(q: torch.Tensor, kv: torch.Tensor) -> Callable[[], object]:
    """The raw operation with its outputs allocated anew, as the op does."""
    absent = (None,) * 14
    settings = (0, False, False, D**-0.5, 0.0, 0.0, M, M - 1)  # scale, no soft cap, no dropout, stride, first token
    assert rk.backends()["cpu"].available, rk.backends()["cpu"].reason
    query, raw = q[:, None, None], torch.ops.retro_kernels_cpu.attention_forward.default

    def call() -> object:
        out, lse = torch.empty(B, 1, 1, N, H, D), torch.empty(B, 1, 1, N, H)
        raw(query, kv, kv, *absent, *settings, None, out, lse)
        return out

    return call


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", help="write the figures here too")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    figures = {}
    measured: Iterable[tuple[str, float]] = (
        (name, microseconds(call)) for name, call in calls(arguments.device).items()
    )
    if arguments.device == "cpu" and importlib.util.find_spec("triton") is not None:
        measured = itertools.chain(measured, of_triton())
    for name, figure in measured:
        figures[name] = figure
        print(f"{name:<38} {figure:8.1f} us", flush=True)
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as file:
            document = {
                "environment": environment.collect(torch.device(arguments.device)),
                "microseconds": figures,
            }
            json.dump(document, file, indent=1)


if __name__ == "__main__":
    main()
