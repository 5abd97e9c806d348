"""The alternatives: chunked cross-attention as others compute it, each from the same query, key and value.

Every function takes query [b, n, h, d], key and value [b, l, k, r, hk, d] and the chunk size, and returns [b, n, h, d]
with zeros before the first chunk: whatever shifting, padding and folding a way of computing needs is inside and is
timed, because its user pays for it.
"""

from __future__ import annotations

import contextlib
import functools
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .workloads import Workload

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]

SDPA_BACKENDS = {
    "cpu": {"math": SDPBackend.MATH, "flash": SDPBackend.FLASH_ATTENTION},
    "cuda": {
        "math": SDPBackend.MATH,
        "flash": SDPBackend.FLASH_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
        "cudnn": SDPBackend.CUDNN_ATTENTION,
    },
}


def fold_query(query: Tensor, chunk_size: int) -> Tensor:
    """[b, n, h, d] -> [b * l, h, m, d]: the queries shifted by m - 1 so that row i of fold u attends to chunk u."""
    b, n, h, d = query.shape
    chunks = n // chunk_size
    shifted = F.pad(query, (0, 0, 0, 0, 1 - chunk_size, chunk_size - 1))[:, : chunks * chunk_size]
    return shifted.reshape(b * chunks, chunk_size, h, d).transpose(1, 2)


def fold_key(key: Tensor) -> Tensor:
    """[b, l, k, r, hk, d] -> [b * l, hk, k * r, d], a view of a contiguous key."""
    return key.flatten(0, 1).flatten(1, 2).transpose(1, 2)


def unfold(out: Tensor, batch: int, length: int) -> Tensor:
    """[b * l, h, m, d] -> [b, n, h, d]: the shift undone, zeros before the first chunk."""
    folds, h, m, d = out.shape
    out = out.transpose(1, 2).reshape(batch, folds // batch * m, h, d)
    return F.pad(out, (0, 0, 0, 0, m - 1, length - out.shape[1] - (m - 1)))


def eager(query: Tensor, key: Tensor, value: Tensor, chunk_size: int) -> Tensor:
    """retro-pytorch's way: fold, scale the query, einsum, softmax, einsum, unfold, logits in the inputs' dtype."""
    b, n, h, d = query.shape
    queries, keys, values = fold_query(query * d**-0.5, chunk_size), fold_key(key), fold_key(value)
    if keys.shape[1] != h:
        keys, values = (t.repeat_interleave(h // t.shape[1], dim=1) for t in (keys, values))
    probabilities = torch.einsum("bhid,bhjd->bhij", queries, keys).softmax(dim=-1)
    return unfold(torch.einsum("bhij,bhjd->bhid", probabilities, values), b, n)


def folded_sdpa(query: Tensor, key: Tensor, value: Tensor, chunk_size: int) -> Tensor:
    b, n, h, _ = query.shape
    keys = fold_key(key)
    out = F.scaled_dot_product_attention(
        fold_query(query, chunk_size), keys, fold_key(value), enable_gqa=keys.shape[1] != h
    )
    return unfold(out, b, n)


def folded_flex(query: Tensor, key: Tensor, value: Tensor, chunk_size: int) -> Tensor:
    """FlexAttention on the folded tensors; to be compiled, eager FlexAttention materialises everything."""
    from torch.nn.attention.flex_attention import flex_attention

    b, n, h, _ = query.shape
    keys = fold_key(key)
    out = flex_attention(fold_query(query, chunk_size), keys, fold_key(value), enable_gqa=keys.shape[1] != h)
    return unfold(out, b, n)


def masked_flex(query: Tensor, key: Tensor, value: Tensor, chunk_size: int, block_mask) -> Tensor:
    """FlexAttention's own idiom: the sequence unfolded, chunks as a block mask; nothing is shifted or padded."""
    from torch.nn.attention.flex_attention import flex_attention

    keys, values = (t.flatten(1, 3).transpose(1, 2) for t in (key, value))
    gqa = keys.shape[1] != query.shape[2]
    return flex_attention(query.transpose(1, 2), keys, values, block_mask=block_mask, enable_gqa=gqa).transpose(1, 2)


def chunk_block_mask(workload: Workload, device: torch.device):
    from torch.nn.attention.flex_attention import create_block_mask

    m, keys = workload.chunk_size, workload.keys_per_chunk
    first = m - 1

    def same_chunk(batch, head, token, slot):
        return (token >= first) & ((token - first) // m == slot // keys)

    return create_block_mask(
        same_chunk, None, None, workload.sequence_length, workload.num_chunks * keys, device=str(device)
    )


class CompileTimeout(BaseException):
    """torch.compile took longer than it was allowed. Not an Exception: the compiler would wrap it."""


@contextlib.contextmanager
def wall_clock_limit(seconds: float) -> Iterator[None]:
    """Raises CompileTimeout in the block after so many seconds; no limit off the main thread or off Unix."""
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def expire(signum, frame):
        raise CompileTimeout

    previous = signal.signal(signal.SIGALRM, expire)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


@dataclass
class CompileBudget:
    """Seconds left for all compilation of a run. What one variant does not use is left for the next."""

    total: float
    per_variant: float
    used: float = 0.0

    @property
    def allowed(self) -> float:
        return min(self.per_variant, self.total - self.used)

    @contextlib.contextmanager
    def spend(self) -> Iterator[float]:
        allowed, start = self.allowed, time.monotonic()
        try:
            with wall_clock_limit(allowed):
                yield allowed
        finally:
            self.used += time.monotonic() - start


@dataclass(frozen=True)
class Variant:
    """One way of computing a workload. `context` is entered round the call, outside the timed region."""

    name: str
    attention: Attention
    context: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext
    compiled: bool = False
    ours: bool = False


@dataclass(frozen=True)
class Skipped:
    """A variant that is not timed, and why."""

    name: str
    reason: str


def variants(
    workload: Workload, device: torch.device, *, compiled: bool = True, backends: list[str] | None = None
) -> list[Variant | Skipped]:
    """Every alternative for this workload on this device, retro_kernels' own backends last."""
    m = workload.chunk_size

    def way(function: Callable, **fixed) -> Attention:
        return functools.partial(_keyword_call, function, {"chunk_size": m, **fixed})

    result: list[Variant | Skipped] = [Variant("eager", way(eager))]
    for name, backend in SDPA_BACKENDS[device.type].items():
        result.append(Variant(f"sdpa[{name}]", way(folded_sdpa), context=functools.partial(sdpa_kernel, backend)))
    if device.type == "cuda":
        result.append(Variant("sdpa[default]", way(folded_sdpa)))
    names = ("compile[sdpa]", "compile[eager]", "flex[folded]", "flex[block mask]")
    if not compiled:
        result += [Skipped(name, "torch.compile was switched off for this run (--no-compile)") for name in names]
    else:
        result.append(Variant(names[0], _compile(way(folded_sdpa)), compiled=True))
        result.append(Variant(names[1], _compile(way(eager)), compiled=True))
        result.append(Variant(names[2], _compile(way(folded_flex)), compiled=True))
        if device.type == "cuda":
            try:
                mask = chunk_block_mask(workload, device)
            except Exception as error:
                result.append(Skipped(names[3], f"its block mask cannot be made: {type(error).__name__}: {error}"))
            else:
                result.append(Variant(names[3], _compile(way(masked_flex, block_mask=mask)), compiled=True))
        else:
            result.append(Skipped(names[3], "measured on a GPU only: its block mask is built for GPU tiles"))
    return result + own_variants(workload, device, backends)


def own_variants(workload: Workload, device: torch.device, backends: list[str] | None = None) -> list:
    """retro_kernels[<backend>] for every backend but the reference, which judges and does not compete. It is timed
    when it is asked for by name, or when nothing else can run."""
    import retro_kernels as rk

    result: list[Variant | Skipped] = []
    states = rk.backends()
    for name, state in states.items():
        if backends and name not in backends:
            continue
        if name == "reference" and not (backends and name in backends):
            continue
        if not state.available:
            result.append(Skipped(f"retro_kernels[{name}]", str(state.reason)))
            continue
        if {"cpu": "cpu", "triton": "cuda", "cuda": "cuda"}.get(name, device.type) != device.type:
            result.append(Skipped(f"retro_kernels[{name}]", f"computes on another kind of device than {device.type}"))
            continue
        result.append(own_variant(workload, name))
    if not any(isinstance(variant, Variant) for variant in result) and not backends:
        result.append(own_variant(workload, "reference"))
    return result


def own_variant(workload: Workload, backend: str) -> Variant:
    import retro_kernels as rk

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return rk.chunked_cross_attention(query, key, value, chunk_size=workload.chunk_size, backend=backend)

    return Variant(f"retro_kernels[{backend}]", attention, ours=True)


def _keyword_call(function: Callable, fixed: dict, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return function(query, key, value, **fixed)


def _compile(attention: Attention) -> Attention:
    return torch.compile(attention, dynamic=False)
