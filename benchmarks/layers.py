"""Chunked cross-attention from the encoder's states, and the layer round it: what both strategies of
`rk.projected_chunked_cross_attention` and the alternatives are timed on.

On a CPU a case has as many chunks as keep one forward near CPU_FLOPS, each with all its rows: every cost but reading
the weights is proportional to the chunks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from . import peers
from .peers import Skipped, Variant, sdpa_kernel
from .workloads import CCA, DTYPES, LAYER, PLAIN, PROJECTED, SEED, WORKLOADS, Workload

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
        """With fewer chunks on a CPU; on a GPU with as many sequences as the fp64 reference has room for."""
        kind = torch.device(device).type
        if self.batch is not None:
            return self
        if kind == "cuda":
            doubles = 2 * 8 * self.num_chunks * self.keys_per_chunk * self.kv_heads * self.head_dim
            return replace(self, batch=max(1, min(8, LARGEST_FP64_KEY_VALUES[kind] // doubles)))
        m = self.chunk_size
        one, two = (replace(self, batch=1, sequence_length=chunks * m - 1).flops("forward") for chunks in (2, 3))
        chunks = max(1, min(self.num_chunks - 1, round(CPU_FLOPS[self.operation] / (two - one))))
        return replace(self, batch=1, sequence_length=(chunks + 1) * m - 1)

    def whole(self) -> Workload | None:
        """One sequence of the whole length, for WHOLE; None for others and where this is as long."""
        length = WORKLOADS[self.name].sequence_length if self.name in WHOLE else self.sequence_length
        return replace(self, batch=1, sequence_length=length) if length > self.sequence_length else None

    def core(self) -> Workload:
        """The attention inside, for the ways that are given keys and values."""
        return Workload(**{**vars(self), "operation": CCA, "option": PLAIN})

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

    def output_shape(self) -> tuple[int, ...]:
        return self.shapes()[0]

    def inputs(self, dtype: torch.dtype, device: torch.device | str, seed: int = SEED) -> tuple[Tensor, ...]:
        """As in `Workload.inputs`; weights are scaled to keep the variance."""
        generator = torch.Generator(device=device).manual_seed(seed)

        def draw(shape: tuple[int, ...], scale: float = 1.0) -> Tensor:
            x = torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16)
            return (x * scale).to(dtype)

        scales = [fan_in**-0.5 for fan_in in self.fans_in()]
        grad_out = draw(self.output_shape())
        return (*(draw(shape, scale) for shape, scale in zip(self.shapes(), scales)), grad_out)

    def fans_in(self) -> tuple[int, ...]:
        """Of every leaf; 1 of what is no weight."""
        return (1, 1, self.encoder_dim, self.encoder_dim)

    def work(self, dtype: torch.dtype, mode: str):
        """The call's sizes for the cost model."""
        from retro_kernels.ops.projected_chunked_cross_attention.cost_model import Work

        b = self._batch
        return Work(
            b * self.attending_tokens, b * self.num_chunks, self.keys_per_chunk, self.encoder_dim, self.num_heads,
            self.kv_heads, self.head_dim, self.head_dim, dtype.itemsize, backward=mode != "forward",
        )  # fmt: skip

    def flops(self, mode: str) -> int:
        """Of the strategy that needs fewer: the task's, whatever a way spends on it."""
        from retro_kernels.ops.projected_chunked_cross_attention.cost_model import phases

        work = self.work(torch.float32, mode)
        return int(min(sum(phase.flops for phase in phases(name, work)) for name in STRATEGIES))

    def bytes(self, mode: str, dtype: torch.dtype) -> int:
        """Every input and the output once; the backward reads them and the output's gradient and writes gradients."""
        inputs = sum(torch.Size(shape).numel() for shape in self.shapes())
        out = torch.Size(self.output_shape()).numel()
        lse = 4 * self._batch * self.sequence_length * self.num_heads
        forward = dtype.itemsize * (inputs + out) + lse
        return forward + (dtype.itemsize * 2 * (inputs + out) + lse if mode != "forward" else 0)

    def attend(self, *tensors: Tensor, backend: str | None = None, strategy: str = "materialise") -> Tensor:
        import retro_kernels as rk

        return rk.projected_chunked_cross_attention(
            *tensors, chunk_size=self.chunk_size, strategy=strategy, backend=backend
        )

    def round_attention(self, attention: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        """The operation with `attention(query, encoded, w_key, w_value)` inside."""
        return attention(*tensors)

    def check_room(self, device: torch.device) -> None:
        """Raises ValueError where the fp64 reference would not fit."""
        needed = 2 * 8 * self._batch * self.num_chunks * self.keys_per_chunk * self.kv_heads * self.head_dim
        if needed > LARGEST_FP64_KEY_VALUES.get(device.type, 4 << 30):
            raise ValueError(f"its fp64 reference needs {needed / 1e9:.0f} GB of keys and values")


@dataclass(frozen=True)
class Layer(Projected):
    """`hidden + w_out(attention(w_query(norm(hidden)), encoded))`."""

    @property
    def leaves(self) -> tuple[str, ...]:
        return ("hidden", "encoded", "w_key", "w_value", "gain", "w_query", "w_out")

    @property
    def width(self) -> int:
        return self.model_dim or self.num_heads * self.head_dim

    def shapes(self) -> tuple[tuple[int, ...], ...]:
        query, encoded, w_key, w_value = super().shapes()
        inner = self.num_heads * self.head_dim
        hidden = (*query[:2], self.width)
        return (hidden, encoded, w_key, w_value, (self.width,), (inner, self.width), (self.width, inner))

    def fans_in(self) -> tuple[int, ...]:
        return (*super().fans_in(), 1, self.width, self.num_heads * self.head_dim)

    def flops(self, mode: str) -> int:
        tokens = self._batch * self.sequence_length
        linear = 2 * 2 * tokens * self.width * self.num_heads * self.head_dim
        return super().flops(mode) + linear * (1 if mode == "forward" else 3)

    def attend(self, *tensors: Tensor, backend: str | None = None, strategy: str = "materialise") -> Tensor:
        attention = functools.partial(super().attend, backend=backend, strategy=strategy)
        return self.round_attention(attention, *tensors)

    def round_attention(self, attention: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        hidden, encoded, w_key, w_value, gain, w_query, w_out = tensors
        normed = F.rms_norm(hidden, (self.width,), gain, 1e-6)
        query = F.linear(normed, w_query).unflatten(-1, (self.num_heads, self.head_dim))
        return hidden + F.linear(attention(query, encoded, w_key, w_value).flatten(2), w_out)


def projected(workload: Projected, way: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """The operation with keys and values made by one matrix product each, as every peer does, and `way` of peers.py
    attending to them."""

    def attention(query: Tensor, encoded: Tensor, w_key: Tensor, w_value: Tensor) -> Tensor:
        key, value = (F.linear(encoded, w.flatten(0, 1)).unflatten(-1, w.shape[:2]) for w in (w_key, w_value))
        return way(workload.core(), query, key, value)

    return workload.round_attention(attention, *tensors)


def variants(
    workload: Projected, device: torch.device, *, compiled: bool = True, backends: list[str] | None = None
) -> list[Variant | Skipped]:
    """Every alternative, then both strategies of each fused backend."""
    eager, sdpa = (functools.partial(projected, workload, way) for way in (peers.eager, peers.sdpa))
    result: list[Variant | Skipped] = [Variant("eager", workload, eager)]
    for name, backend in peers.SDPA_BACKENDS[device.type].items():
        result.append(Variant(f"sdpa[{name}]", workload, sdpa, functools.partial(sdpa_kernel, backend)))
    if workload.operation == LAYER:
        for name, way in (("compile[sdpa]", sdpa), ("compile[eager]", eager)):
            if compiled:
                result.append(Variant(name, workload, torch.compile(way, dynamic=False), compiled=True))
            else:
                result.append(Skipped(name, "torch.compile was switched off for this run (--no-compile)"))
    for name, reason in peers.own_backends(device, backends):
        if reason:
            result.append(Skipped(f"retro_kernels[{name}]", reason))
            continue
        for strategy in STRATEGIES if name != "reference" else STRATEGIES[:1]:
            own = f"retro_kernels[{name} {strategy}]"
            attention = functools.partial(workload.attend, backend=name, strategy=strategy)
            extra = functools.partial(_predict, workload, device, name, strategy)
            refusal = functools.partial(_refusal, workload, device, name) if strategy == "absorb" else None
            result.append(Variant(own, workload, attention, extra=extra, refusal=refusal))
    return result


def _explain(workload: Projected, device: torch.device, backend: str, dtype: str, mode: str):
    import retro_kernels as rk

    return rk.explain(
        *Projected.shapes(workload), chunk_size=workload.chunk_size, dtype=DTYPES[dtype], device=device,
        backward=mode != "forward", backend=backend,
    )  # fmt: skip


def _refusal(workload: Projected, device: torch.device, backend: str, dtype: str, mode: str) -> str | None:
    """Why this backend does not absorb here."""
    return _explain(workload, device, backend, dtype, mode).rows[-1].refused


def _predict(workload: Projected, device: torch.device, backend: str, strategy: str, dtype: str, mode: str) -> dict:
    """What `rk.explain` says of this strategy, for the row: its time, and whether `auto` takes it. The time of a
    layer's other parts is not predicted."""
    found = _explain(workload, device, backend, dtype, mode)
    seconds = next(row.seconds for row in found.rows if row.strategy == strategy)
    whole = seconds is not None and workload.operation != LAYER
    return {
        "strategy": strategy, "chosen": strategy == found.chosen, "predicted_ms": 1e3 * seconds if whole else None
    }  # fmt: skip
