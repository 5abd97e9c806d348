"""Chunked cross-attention from the encoder's states, and the layer round it: what both strategies of
`rk.projected_chunked_cross_attention` and the alternatives are timed on.

On a CPU a case has as many chunks as keep one forward near CPU_FLOPS, each with all its rows: every cost but reading
the weights is proportional to the chunks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import sdpa_kernel

from . import attention
from .attention import Attention
from .operations import CCA, DTYPES, LAYER, PLAIN, PROJECTED, Workload
from .variants import SDPA_BACKENDS, Skipped, Variant, own_backends
from .variants import Attention as Call

CPU_FLOPS = {PROJECTED: 1.4e10, LAYER: 2.8e10}
LARGEST_FP64_KEY_VALUES = {"cpu": 4 << 30, "cuda": 16 << 30}
STRATEGIES = ("materialise", "absorb")
WHOLE = ("retro-7.5b",)
"""Whose memory is also told at the whole length, where one call of each strategy takes seconds: what absorbing saves
grows with the chunks, and what it needs for the weights' gradients does not."""


@dataclass(frozen=True)
class Projected(Workload):
    """`rk.projected_chunked_cross_attention`: queries, the states of all neighbours, and the projections' weights."""

    @property
    def leaves(self) -> tuple[str, ...]:
        return ("query", "encoded", "w_key", "w_value")

    def on(self, device: torch.device | str) -> Workload:
        return fit(self, device)

    def whole(self) -> Workload | None:
        return lengthen(self)

    def core(self) -> Attention:
        """The attention inside, for the ways that are given keys and values."""
        return Attention(**{**vars(self), "operation": CCA, "option": PLAIN})

    def shapes(self) -> tuple[tuple[int, ...], ...]:
        b, n, h, hk, d, e = (
            self._batch,
            self.sequence_length,
            self.num_heads,
            self.kv_heads,
            self.head_dim,
            self.encoder_dim,
        )
        encoded = (b, self.num_chunks, self.num_neighbours, self.retrieved_length, e)
        return ((b, n, h, d), encoded, (hk, d, e), (hk, d, e))

    def fans_in(self) -> tuple[int, ...]:
        """The fan-in of every leaf; 1 for what is no weight."""
        return (1, 1, self.encoder_dim, self.encoder_dim)

    def work(self, dtype: torch.dtype, mode: str):
        """The call's sizes for the cost model."""
        from retro_kernels.ops.absorbed.cost_model import Work

        b = self._batch
        return Work(
            b * self.attending_tokens,
            b * self.num_chunks,
            self.keys_per_chunk,
            self.encoder_dim,
            self.num_heads,
            self.kv_heads,
            self.head_dim,
            self.head_dim,
            dtype.itemsize,
            backward=mode != "forward",
        )

    def flops(self, mode: str) -> int:
        """Operations of the strategy that needs fewer: those of the task, whatever a way spends on it."""
        from retro_kernels.ops.absorbed.cost_model import phases

        work = self.work(torch.float32, mode)
        return int(min(sum(phase.flops for phase in phases(name, work)) for name in STRATEGIES))

    def bytes(self, mode: str, dtype: torch.dtype) -> int:
        return moved_bytes(self, mode, dtype)

    def attend(self, *tensors: Tensor, backend: str | None = None, strategy: str = "materialise") -> Any:
        import retro_kernels as rk

        return rk.projected_chunked_cross_attention(
            *tensors, chunk_size=self.chunk_size, strategy=strategy, backend=backend
        )

    def round_attention(self, attention: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        """The operation with `attention(query, encoded, w_key, w_value)` inside."""
        return attention(*tensors)

    def eager(self) -> Call:
        return functools.partial(project_then, self, attention.eager)

    def variants(
        self, device: torch.device, *, compiled: bool = True, backends: list[str] | None = None
    ) -> list[Variant | Skipped]:
        return variants(self, device, compiled=compiled, backends=backends)

    def check_room(self, device: torch.device) -> None:
        check_key_values(self, device)


@dataclass(frozen=True)
class Layer(Workload):
    """`hidden + w_out(attention(w_query(norm(hidden)), encoded))`."""

    @property
    def leaves(self) -> tuple[str, ...]:
        return ("hidden", "encoded", "w_key", "w_value", "gain", "w_query", "w_out")

    @property
    def width(self) -> int:
        return self.model_dim or self.num_heads * self.head_dim

    @property
    def inner(self) -> Projected:
        """The attention with its key and value projections."""
        return Projected(**{**vars(self), "operation": PROJECTED})

    def core(self) -> Attention:
        return self.inner.core()

    def on(self, device: torch.device | str) -> Workload:
        return fit(self, device)

    def whole(self) -> Workload | None:
        return lengthen(self)

    def shapes(self) -> tuple[tuple[int, ...], ...]:
        query, *states_and_weights = self.inner.shapes()
        inner = self.num_heads * self.head_dim
        hidden = (*query[:2], self.width)
        return (hidden, *states_and_weights, (self.width,), (inner, self.width), (self.width, inner))

    def fans_in(self) -> tuple[int, ...]:
        return (*self.inner.fans_in(), 1, self.width, self.num_heads * self.head_dim)

    def flops(self, mode: str) -> int:
        tokens = self._batch * self.sequence_length
        linear = 2 * 2 * tokens * self.width * self.num_heads * self.head_dim
        return self.inner.flops(mode) + linear * (1 if mode == "forward" else 3)

    def bytes(self, mode: str, dtype: torch.dtype) -> int:
        return moved_bytes(self, mode, dtype)

    def attend(self, *tensors: Tensor, backend: str | None = None, strategy: str = "materialise") -> Any:
        return self.round_attention(functools.partial(self.inner.attend, backend=backend, strategy=strategy), *tensors)

    def round_attention(self, attention: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        hidden, encoded, w_key, w_value, gain, w_query, w_out = tensors
        normed = F.rms_norm(hidden, (self.width,), gain, 1e-6)
        query = F.linear(normed, w_query).unflatten(-1, (self.num_heads, self.head_dim))
        return hidden + F.linear(attention(query, encoded, w_key, w_value).flatten(2), w_out)

    def eager(self) -> Call:
        return functools.partial(project_then, self, attention.eager)

    def variants(
        self, device: torch.device, *, compiled: bool = True, backends: list[str] | None = None
    ) -> list[Variant | Skipped]:
        return variants(self, device, compiled=compiled, backends=backends)

    def check_room(self, device: torch.device) -> None:
        check_key_values(self, device)


def fit(workload: Projected | Layer, device: torch.device | str) -> Workload:
    """Shortens the workload on a CPU; on a GPU takes as many sequences as the fp64 reference has room for."""
    if workload.batch is not None:
        return workload
    if torch.device(device).type == "cuda":
        sequence = _fp64_key_values(workload)
        return replace(workload, batch=max(1, min(8, LARGEST_FP64_KEY_VALUES["cuda"] // sequence)))
    m, length = workload.chunk_size, workload.sequence_length
    one, two = (replace(workload, batch=1, sequence_length=chunks * m - 1).flops("forward") for chunks in (2, 3))
    chunks = max(1, min(workload.num_chunks - 1, round(CPU_FLOPS[workload.operation] / (two - one))))
    return replace(workload, batch=1, sequence_length=(chunks + 1) * m - 1, whole_length=length)


def lengthen(workload: Projected | Layer) -> Workload | None:
    """One sequence of the whole length, for WHOLE; None for others and where this is as long."""
    length = workload.whole_length if workload.name in WHOLE else None
    if length is None or length <= workload.sequence_length:
        return None
    return replace(workload, batch=1, sequence_length=length, whole_length=None)


def moved_bytes(workload: Projected | Layer, mode: str, dtype: torch.dtype) -> int:
    """Every input and the output once; the backward reads them and the output's gradient and writes gradients."""
    inputs = sum(torch.Size(shape).numel() for shape in workload.shapes())
    out = torch.Size(workload.shapes()[0]).numel()
    lse = 4 * (workload.batch or 1) * workload.sequence_length * workload.num_heads
    forward = dtype.itemsize * (inputs + out) + lse
    return forward + (dtype.itemsize * 2 * (inputs + out) + lse if mode != "forward" else 0)


def _fp64_key_values(workload: Projected | Layer) -> int:
    """Bytes of one sequence's keys and values in fp64."""
    return 2 * 8 * workload.num_chunks * workload.keys_per_chunk * workload.kv_heads * workload.head_dim


def check_key_values(workload: Projected | Layer, device: torch.device) -> None:
    """Raises ValueError where the fp64 reference would not fit."""
    needed = (workload.batch or 1) * _fp64_key_values(workload)
    if needed > LARGEST_FP64_KEY_VALUES.get(device.type, 4 << 30):
        raise ValueError(f"its fp64 reference needs {needed / 1e9:.0f} GB of keys and values")


def project_then(workload: Projected | Layer, way: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """The operation with keys and values made by one matrix product each, as every peer does, and `way` of attention.py
    attending to them."""

    def inside(query: Tensor, encoded: Tensor, w_key: Tensor, w_value: Tensor) -> Tensor:
        key, value = (F.linear(encoded, w.flatten(0, 1)).unflatten(-1, w.shape[:2]) for w in (w_key, w_value))
        return way(workload.core(), query, key, value)

    return workload.round_attention(inside, *tensors)


def variants(
    workload: Projected | Layer, device: torch.device, *, compiled: bool, backends: list[str] | None
) -> list[Variant | Skipped]:
    """Every alternative, then both strategies of each fused backend."""
    eager, sdpa = (functools.partial(project_then, workload, way) for way in (attention.eager, attention.sdpa))
    result: list[Variant | Skipped] = [Variant("eager", workload, eager)]
    for name, backend in SDPA_BACKENDS[device.type].items():
        result.append(Variant(f"sdpa[{name}]", workload, sdpa, functools.partial(sdpa_kernel, backend)))
    if workload.operation == LAYER:
        for name, way in (("compile[sdpa]", sdpa), ("compile[eager]", eager)):
            if compiled:
                result.append(Variant(name, workload, torch.compile(way, dynamic=False), compiled=True))
            else:
                result.append(Skipped(name, "torch.compile was switched off for this run (--no-compile)"))
    for name, reason in own_backends(device, backends):
        if reason:
            result.append(Skipped(f"retro_kernels[{name}]", reason))
            continue
        for strategy in STRATEGIES if name != "reference" else STRATEGIES[:1]:
            own = f"retro_kernels[{name} {strategy}]"
            own_way = functools.partial(workload.attend, backend=name, strategy=strategy)
            extra = functools.partial(_predict, workload, device, name, strategy)
            refusal = functools.partial(_refusal, workload, device, name) if strategy == "absorb" else None
            result.append(Variant(own, workload, own_way, extra=extra, refusal=refusal))
    return result


def _explain(workload: Projected | Layer, device: torch.device, backend: str, dtype: str, mode: str):
    import retro_kernels as rk

    shapes = (workload.inner if isinstance(workload, Layer) else workload).shapes()
    return rk.explain(
        *shapes,
        chunk_size=workload.chunk_size,
        dtype=DTYPES[dtype],
        device=device,
        backward=mode != "forward",
        backend=backend,
    )


def _refusal(workload: Projected | Layer, device: torch.device, backend: str, dtype: str, mode: str) -> str | None:
    """Why this backend does not absorb here."""
    return _explain(workload, device, backend, dtype, mode).rows[-1].refused


def _predict(
    workload: Projected | Layer, device: torch.device, backend: str, strategy: str, dtype: str, mode: str
) -> dict:
    """Fields of the row that `rk.explain` gives for this strategy: its time, and whether `auto` takes it. The time of a
    layer's other parts is not predicted."""
    found = _explain(workload, device, backend, dtype, mode)
    seconds = next(row.seconds for row in found.rows if row.strategy == strategy)
    whole = seconds is not None and workload.operation != LAYER
    return {"strategy": strategy, "chosen": strategy == found.chosen, "predicted_ms": 1e3 * seconds if whole else None}
