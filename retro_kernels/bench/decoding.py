"""Generation: one new token of every sequence against the neighbours of its chunk, and the decoder step round it.

What is compared: projecting the neighbours again for every token (as NeMo and PipeRAG do), a cache of keys and values
with scaled_dot_product_attention, and retro_kernels' two forms of cache. Caches are filled before the clock starts.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import sdpa_kernel

from .operations import DECODE, DTYPES, PLAIN, RETRIEVAL, SEED, Workload
from .variants import SDPA_BACKENDS, WITHOUT, Skipped, Variant, own_backends
from .variants import Attention as Call

PAST = 1024  # tokens in the self-attention's cache of a decoder step
CPU_STEP_BYTES = 2.6e9  # of fp32 weights: a larger decoder is timed as its last layers
POOL = (1 << 24) - 3
KEPT: dict = {}  # caches and weights of the case at hand, shared by its variants


@dataclass(frozen=True)
class Decode(Workload):
    """One token of each of `batch` sequences, which stand at all rows of a chunk."""

    @property
    def leaves(self) -> tuple[str, ...]:
        return ("query", "encoded", "w_key", "w_value")

    @property
    def modes(self) -> tuple[str, ...]:
        return ("forward",)

    def on(self, device: torch.device | str) -> Workload:
        return self if self.batch is not None else replace(self, batch=1)

    def fans_in(self) -> tuple[int, ...]:
        return (1, 1, self.encoder_dim, self.encoder_dim)

    def shapes(self) -> tuple[tuple[int, ...], ...]:
        b, h, hk, d, e = self._batch, self.num_heads, self.kv_heads, self.head_dim, self.encoder_dim
        return ((b, 1, h, d), (b, self.num_neighbours, self.retrieved_length, e), (hk, d, e), (hk, d, e))

    def positions(self, query: Tensor) -> Tensor:
        """The position of every sequence; all attend to their first chunk."""
        m = self.chunk_size
        return m - 1 + torch.arange(query.shape[0], device=query.device) % m

    def flops(self, mode: str) -> int:
        return self.counts("kv", torch.float32)["flops"]

    def bytes(self, mode: str, dtype: torch.dtype) -> int:
        return self.counts("kv", dtype)["bytes"]

    def counts(self, form: str, dtype: torch.dtype) -> dict[str, int]:
        """FLOPs and bytes that a token of every sequence needs at least, by what is kept: "kv", "states", or nothing
        ("none": the states are projected, and read)."""
        b, h, hk, d, e = self._batch, self.num_heads, self.kv_heads, self.head_dim, self.encoder_dim
        slots, size = self.keys_per_chunk, dtype.itemsize
        rows, weights = 2 * b * h * d * size, 2 * hk * d * e * size
        key_values, states = 2 * b * slots * hk * d * size, b * slots * e * size
        core = 4 * b * slots * h * d
        if form == "kv":
            return {"flops": core, "bytes": rows + key_values, "cache_bytes": key_values}
        if form == "states":
            return {"flops": 4 * b * h * e * (d + slots), "bytes": rows + states + weights, "cache_bytes": states}
        return {"flops": core + 4 * b * slots * e * hk * d, "bytes": rows + states + weights, "cache_bytes": states}

    def attend(self, *tensors: Tensor, backend: str | None = None, strategy: str = "absorb") -> Any:
        import retro_kernels as rk

        query, encoded, w_key, w_value = tensors
        return rk.projected_chunked_cross_attention_decode(
            query, encoded, w_key, w_value, chunk_size=self.chunk_size, position=self.positions(query), backend=backend
        )

    def eager(self) -> Call:
        return functools.partial(eager, self)

    def variants(
        self, device: torch.device, *, compiled: bool = True, backends: list[str] | None = None
    ) -> list[Variant | Skipped]:
        return variants(self, device, backends=backends)

    def release(self) -> None:
        KEPT.clear()


def cached(name: str, source: Tensor, make: Callable[[], object]) -> object:
    """Calls `make` once for each name as long as `source` is the same tensor."""
    found = KEPT.get(name)
    if found is None or found[0] is not source:
        KEPT[name] = found = (source, make())
    return found[1]


def key_values(encoded: Tensor, w_key: Tensor, w_value: Tensor) -> tuple[Tensor, Tensor]:
    """[b, S, hk, d] each, two tensors."""
    states = encoded.flatten(1, 2)
    return tuple(F.linear(states, w.flatten(0, 1)).unflatten(-1, w.shape[:2]) for w in (w_key, w_value))  # type: ignore[return-value]


def _einsum(workload: Workload, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    group = query.shape[2] // key.shape[2]
    if group > 1:
        key, value = (x.repeat_interleave(group, dim=2) for x in (key, value))
    logits = torch.einsum("bihd,bjhd->bhij", query * workload.head_dim**-0.5, key)
    return torch.einsum("bhij,bjhd->bihd", logits.softmax(-1), value)


def _sdpa(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """key, value [b, hk, S, d]"""
    gqa = key.shape[1] != query.shape[2]
    return F.scaled_dot_product_attention(query.transpose(1, 2), key, value, enable_gqa=gqa).transpose(1, 2)


def reproject_eager(workload: Workload, query: Tensor, encoded: Tensor, w_key: Tensor, w_value: Tensor) -> Tensor:
    """(a) Keys and values are made for every token."""
    return _einsum(workload, query, *key_values(encoded, w_key, w_value))


def reproject_sdpa(query: Tensor, encoded: Tensor, w_key: Tensor, w_value: Tensor) -> Tensor:
    """(a) with scaled_dot_product_attention."""
    return _sdpa(query, *(x.transpose(1, 2) for x in key_values(encoded, w_key, w_value)))


def cached_sdpa(query: Tensor, encoded: Tensor, w_key: Tensor, w_value: Tensor, name: str = "sdpa") -> Tensor:
    """(b) Keys and values are kept, in the layout that scaled_dot_product_attention likes best."""

    def make():
        return [x.transpose(1, 2).contiguous() for x in key_values(encoded, w_key, w_value)]

    return _sdpa(query, *cached(name, encoded, make))  # type: ignore[misc]


def own_kv(workload: Decode, backend: str, query, encoded, w_key, w_value, name: str = "kv") -> Any:
    """retro_kernels' decode operation on keys and values that are kept."""
    import retro_kernels as rk

    k, r = encoded.shape[1:3]

    def make():
        return [x.unflatten(1, (k, r)) for x in key_values(encoded, w_key, w_value)]

    stored: Any = cached(name, encoded, make)
    key, value = stored
    return rk.chunked_cross_attention_decode(
        query, key, value, chunk_size=workload.chunk_size, position=workload.positions(query), backend=backend
    )


def own_states(workload: Decode, backend: str, query, encoded, w_key, w_value) -> Tensor:
    """retro_kernels' decode operation on the encoder's states themselves."""
    return workload.attend(query, encoded, w_key, w_value, backend=backend)


@dataclass(frozen=True)
class Step(Workload):
    """One token of every sequence through a decoder: self-attention with a cache of PAST tokens and feed-forward in
    every layer, and with the option RETRIEVAL chunked cross-attention in every third. Weights are made here, not
    given: `leaves` are the token's activations and the neighbours' states."""

    @property
    def inner(self) -> Decode:
        """The chunked cross-attention inside."""
        return Decode(**{**vars(self), "operation": DECODE, "option": PLAIN})

    @property
    def modes(self) -> tuple[str, ...]:
        return ("forward",)

    def on(self, device: torch.device | str) -> Workload:
        return self if self.batch is not None else replace(self, batch=1)

    @property
    def leaves(self) -> tuple[str, ...]:
        return ("hidden", "encoded")

    @property
    def width(self) -> int:
        return self.model_dim or self.num_heads * self.head_dim

    @property
    def layers(self) -> int:
        """12 (172M, 425M) or as many, at least three, of the last of 32 as CPU_STEP_BYTES allows."""
        whole = 32 if self.width >= 4096 else 12
        return min(whole, max(3, int(CPU_STEP_BYTES / 4 / self.layer_parameters) // 3 * 3))

    @property
    def layer_parameters(self) -> int:
        return 4 * self.width * self.num_heads * self.head_dim + 2 * self.width * 4 * self.width

    @property
    def retrieving(self) -> tuple[int, ...]:
        return tuple(range(2, self.layers, 3)) if self.option == RETRIEVAL else ()

    def describe(self) -> str:
        return (
            f"b={self.batch}, {self.layers} layers of width {self.width}, {self.num_heads} heads of {self.head_dim}, "
            f"{PAST} past tokens; chunked cross-attention in {len(self.retrieving)} layers"
        )

    def shapes(self) -> tuple[tuple[int, ...], ...]:
        return ((self._batch, 1, self.width), self.inner.shapes()[1])

    def flops(self, mode: str) -> int:
        return self.counts("kv", torch.float32)["flops"]

    def bytes(self, mode: str, dtype: torch.dtype) -> int:
        return self.counts("kv", dtype)["bytes"]

    def parameters_of(self) -> dict[str, tuple[int, ...]]:
        """Shapes of one layer's, and of its chunked cross-attention's."""
        inner, kv = self.num_heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "qkv": (3 * inner, self.width),
            "out": (self.width, inner),
            "up": (4 * self.width, self.width),
            "down": (self.width, 4 * self.width),
            "w_query": (inner, self.width),
            "w_out": (self.width, inner),
            "w_key": (kv, self.encoder_dim),
            "w_value": (kv, self.encoder_dim),
        }

    def counts(self, form: str, dtype: torch.dtype) -> dict[str, int]:
        sizes = {name: torch.Size(shape).numel() for name, shape in self.parameters_of().items()}
        own = {"w_query", "w_out"} | ({"w_key", "w_value"} if form != "kv" else set())
        layer = sum(sizes[name] for name in ("qkv", "out", "up", "down"))
        parameters = self.layers * layer + len(self.retrieving) * sum(sizes[name] for name in own)
        inner = self.num_heads * self.head_dim
        past = 2 * self.layers * self._batch * PAST * inner
        if not self.retrieving:
            flops, cache = 0, 0
        else:
            one = self.inner.counts(form, dtype)
            flops, cache = len(self.retrieving) * one["flops"], one["cache_bytes"]
            cache *= len(self.retrieving) if form == "kv" else 1
        size = dtype.itemsize
        return {
            "flops": 2 * self._batch * parameters + 2 * past + flops,
            "bytes": size * (parameters + past) + cache,
            "cache_bytes": cache,
            "parameter_bytes": size * parameters,
        }

    def weights(self, layer: int, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        """One layer's parameters and its cache of past tokens: the same numbers in every precision."""

        def make():
            past = (self._batch, self.num_heads, PAST, self.head_dim)
            shapes = {**self.parameters_of(), "past_key": past, "past_value": past}
            found = {}
            for place, (name, shape) in enumerate(shapes.items()):
                scale = 1.0 if name.startswith("past") else shape[-1] ** -0.5
                found[name] = (_random(shape, 1000 * layer + place, device) * scale).to(dtype)
            return found

        if dtype == torch.float64:  # the reference goes through the layers once
            return make()
        key = (self.name, layer)
        held = KEPT.get(key)
        if held is None or held[0] != dtype:
            KEPT[key] = held = (dtype, make())
        return held[1]

    def step(self, attention: Callable[..., Tensor], hidden: Tensor, encoded: Tensor) -> Tensor:
        """`attention(query, encoded, w_key, w_value, layer)` is the chunked cross-attention inside."""
        h, d = self.num_heads, self.head_dim
        x = hidden
        for layer in range(self.layers):
            w = self.weights(layer, hidden.dtype, hidden.device)
            query, key, value = F.linear(_norm(x), w["qkv"]).unflatten(-1, (3, h, d)).unbind(2)
            w["past_key"][:, :, -1], w["past_value"][:, :, -1] = key[:, 0], value[:, 0]
            mixed = F.scaled_dot_product_attention(query.transpose(1, 2), w["past_key"], w["past_value"])
            x = x + F.linear(mixed.transpose(1, 2).flatten(2), w["out"])
            if layer in self.retrieving:
                query = F.linear(_norm(x), w["w_query"]).unflatten(-1, (h, d))
                w_key, w_value = (w[name].unflatten(0, (self.kv_heads, d)) for name in ("w_key", "w_value"))
                x = x + F.linear(attention(query, encoded, w_key, w_value, layer).flatten(2), w["w_out"])
            x = x + F.linear(F.gelu(F.linear(_norm(x), w["up"])), w["down"])
        return x

    def attend(self, *tensors: Tensor, backend: str | None = None, strategy: str = "absorb") -> Any:
        return self.step(lambda query, *x: self.inner.attend(query, *x[:-1], backend=backend), *tensors)

    def eager(self) -> Call:
        return functools.partial(eager, self)

    def variants(
        self, device: torch.device, *, compiled: bool = True, backends: list[str] | None = None
    ) -> list[Variant | Skipped]:
        return variants(self, device, backends=backends)

    def release(self) -> None:
        KEPT.clear()


def _random(shape: tuple[int, ...], seed: int, device: torch.device) -> Tensor:
    """Normal numbers in bf16, from a pool that is read from another place for every seed: drawing them all anew would
    take longer than what is timed."""
    count = torch.Size(shape).numel()

    found = KEPT.get(("pool", str(device)))
    if found is None:
        generator = torch.Generator(device=device).manual_seed(SEED)
        found = torch.randn(POOL, generator=generator, device=device, dtype=torch.bfloat16)
        KEPT["pool", str(device)] = found
    start = seed * 7919 % POOL
    if start + count > POOL:
        found = found.repeat(-(-(start + count) // POOL))
    return found[start : start + count].view(shape)


def _norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], None, 1e-6)


def eager(workload: Decode | Step, *tensors: Tensor, **_) -> Tensor:
    """The operation with every token's keys and values made anew, in eager PyTorch."""
    if isinstance(workload, Decode):
        return reproject_eager(workload, *tensors)
    return workload.step(lambda *x: reproject_eager(workload, *x[:-1]), *tensors)


def variants(workload: Decode | Step, device: torch.device, *, backends: list[str] | None) -> list[Variant | Skipped]:
    """Projecting again, caches with scaled_dot_product_attention, then retro_kernels' forms, and without retrieval."""
    step = isinstance(workload, Step)
    inner = workload.inner if isinstance(workload, Step) else workload

    def variant(
        name: str, attention: Callable[..., Tensor], form: str, *, layered: bool = False, **settings
    ) -> Variant:
        """`layered`: it keeps something of every layer, by `name`."""

        def inside(query, encoded, w_key, w_value, layer):
            own = {"name": f"{form} {name} {layer}"} if layered else {}
            return attention(query, encoded, w_key, w_value, **own)

        way = functools.partial(workload.step, inside) if isinstance(workload, Step) else attention
        return Variant(name, workload, way, extra=_counts(workload, form, device if layered else None), **settings)

    result: list[Variant | Skipped] = [
        Variant("eager", workload, functools.partial(eager, workload), extra=_counts(workload, "none"))
    ]
    for name, backend in SDPA_BACKENDS[device.type].items():
        context = functools.partial(sdpa_kernel, backend)
        if not step and name != "math":
            result.append(variant(f"sdpa[{name}, projected again]", reproject_sdpa, "none", context=context))
            result.append(variant(f"sdpa[{name}, kv]", cached_sdpa, "kv", context=context))
    if step:
        result.append(variant("sdpa[projected again]", reproject_sdpa, "none"))
        result.append(variant("sdpa[kv]", cached_sdpa, "kv", layered=True))
    from retro_kernels.ops.backends import DECODING as BACKENDS

    for name, reason in own_backends(device, backends):
        if name not in BACKENDS:
            reason = reason or "this version of retro_kernels does not decode in it"
        if reason:
            result.append(Skipped(f"retro_kernels[{name}]", reason))
            continue
        own = f"retro_kernels[{name} kv]"
        result.append(variant(own, functools.partial(own_kv, inner, name), "kv", layered=True))
        result.append(variant(f"retro_kernels[{name} states]", functools.partial(own_states, inner, name), "states"))
    if step:
        off: Any = workload.with_option(PLAIN)
        way = functools.partial(off.attend)
        result.append(Variant("retro_kernels" + WITHOUT, off, way, extra=_counts(off, "kv")))
    return result


def _counts(workload: Decode | Step, form: str, device: torch.device | None = None) -> Callable[[str, str], dict]:
    """`device`: where filling the caches of a step is timed, too."""

    def extra(dtype: str, mode: str) -> dict:
        found: dict = workload.counts(form, DTYPES[dtype])
        if device is not None and isinstance(workload, Step):
            found["border_ms"] = _border_ms(workload, DTYPES[dtype], device)
        return found

    return extra


def _border_ms(workload: Step, dtype: torch.dtype, device: torch.device) -> float:
    """The fastest of three times that keys and values of all layers are made of a chunk's states in one product."""
    from retro_kernels.ops.materialise import project

    encoded = workload.inputs(dtype, device)[1]
    weights = [
        workload.weights(layer, dtype, device)[name].unflatten(0, (workload.kv_heads, workload.head_dim))
        for layer in workload.retrieving
        for name in ("w_key", "w_value")
    ]
    times = []
    for _ in range(3):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        with torch.no_grad():
            project(encoded, weights, [None] * len(weights))
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - start))
    return min(times)
