"""Clocks. All variants of a case are timed in interleaved rounds, so that a drift of the machine meets all of them.

On a CPU: `perf_counter` round one call; the caches are what the variant before it left there. On a GPU: events round
one replay of a captured CUDA graph (or one launch where capture fails, which is recorded), after the L2 cache was
overwritten; the flush also keeps the queue full, so launches are never waited for. Since that hides what a call costs
in Python, every round also times a few eager calls, one after the other, on the wall's clock.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field

import torch
from torch.utils._pytree import tree_leaves


@dataclass(frozen=True)
class Samples:
    """Times of one variant in milliseconds. `eager`: of calls as a program makes them, on the wall's clock."""

    milliseconds: list[float]
    graphed: bool = False
    eager: list[float] = field(default_factory=list)

    def percentile(self, percent: float) -> float:
        """Linear between the two nearest samples."""
        ordered = sorted(self.milliseconds)
        position = percent / 100 * (len(ordered) - 1)
        low = int(position)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (position - low) * (ordered[high] - ordered[low])

    def summary(self) -> dict:
        return {
            "p20_ms": self.percentile(20),
            "p50_ms": self.percentile(50),
            "p80_ms": self.percentile(80),
            "samples": len(self.milliseconds),
            "cuda_graph": self.graphed,
            "wall_ms": sorted(self.eager)[len(self.eager) // 2] if self.eager else self.percentile(50),
        }


@dataclass(frozen=True)
class Timed:
    """A call to time; `context` is entered round each call, outside the clock."""

    call: Callable[[], object]
    context: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext


@dataclass
class Protocol:
    """The duration of timing a case: until `seconds` have passed for all variants together, within the round limits."""

    seconds: float = 10.0
    min_rounds: int = 3
    max_rounds: int = 50
    warm_up: int = 1
    graphs: bool = True
    eager_rounds: int = 10
    """How many rounds also time eager calls on the wall's clock (a GPU's; on a CPU every time is one)."""


def interleaved(
    variants: dict[str, Timed], device: torch.device, protocol: Protocol, seed: int = 0
) -> dict[str, Samples]:
    """Times every variant once a round, in an order shuffled anew each round (seeded)."""
    order = random.Random(seed)
    clock: _CpuClock | _GpuClock = _GpuClock(device) if device.type == "cuda" else _CpuClock()
    calls = {name: clock.prepare(timed, protocol) for name, timed in variants.items()}
    times: dict[str, list[float]] = {name: [] for name in variants}
    eager: dict[str, list[float]] = {name: [] for name in variants}
    collecting = gc.isenabled()
    gc.disable()
    try:
        start = time.monotonic()
        for round_number in range(protocol.max_rounds):
            if round_number >= protocol.min_rounds and time.monotonic() - start > protocol.seconds:
                break
            names = list(variants)
            order.shuffle(names)
            for name in names:
                with variants[name].context():
                    times[name].append(clock.time(calls[name].run))
                    if round_number < protocol.eager_rounds:
                        eager[name] += clock.eager(variants[name].call)
    finally:
        if collecting:
            gc.enable()
    return {name: Samples(times[name], calls[name].graphed, eager[name]) for name in variants if times[name]}


@dataclass
class _Prepared:
    run: Callable[[], object]
    graphed: bool = False
    keep: list = field(default_factory=list)


class _CpuClock:
    def prepare(self, timed: Timed, protocol: Protocol) -> _Prepared:
        with timed.context():
            for _ in range(protocol.warm_up):
                timed.call()
        return _Prepared(timed.call)

    def time(self, run: Callable[[], object]) -> float:
        start = time.perf_counter()
        run()
        return (time.perf_counter() - start) * 1e3

    def eager(self, call: Callable[[], object]) -> list[float]:
        return []


class _GpuClock:
    def __init__(self, device: torch.device) -> None:
        cache = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0) or 64 << 20
        # One pool for all graphs: only their time matters, so they may overwrite one another's results.
        self.pool = torch.cuda.graph_pool_handle()
        self.flush = torch.empty(2 * cache, dtype=torch.int8, device=device)

    def prepare(self, timed: Timed, protocol: Protocol) -> _Prepared:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with timed.context(), torch.cuda.stream(side):
            for _ in range(max(3, protocol.warm_up)):
                timed.call()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        if protocol.graphs:
            graph = torch.cuda.CUDAGraph()
            try:
                with timed.context(), torch.cuda.graph(graph, pool=self.pool):
                    timed.call()
                graph.replay()
                torch.cuda.synchronize()
                return _Prepared(graph.replay, graphed=True, keep=[graph])
            except RuntimeError:
                torch.cuda.synchronize()
        return _Prepared(timed.call)

    def time(self, run: Callable[[], object]) -> float:
        before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self.flush.zero_()
        before.record()
        run()
        after.record()
        torch.cuda.synchronize()
        return before.elapsed_time(after)

    def eager(self, call: Callable[[], object], calls: int = 4) -> list[float]:
        """Of a call among several without a wait between them, as in a model: the host's time or the device's,
        whichever is longer."""
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        torch.cuda.synchronize()
        return [(time.perf_counter() - start) / calls * 1e3]


@dataclass(frozen=True)
class Memory:
    """The most bytes alive at once during one call, above what was alive before it."""

    peak: int
    """Results count."""
    scratch: int
    """What the call returns does not count, from the moment when it was allocated. On a GPU, where that moment is not
    known, from the start: there it may be more than this."""


def memory(call: Callable[[], object], device: torch.device) -> Memory | None:
    """Of one call.

    On a GPU, the caching allocator's own peak. On a CPU, the running sum of every allocation and release that the
    profiler reports for torch's allocator: scratch that a library takes from malloc (oneDNN's, MKL's) is not seen.
    None when the profiler cannot tell.
    """
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        result = call()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated(device) - before
        return Memory(peak, max(0, peak - sum(_storages(result).values())))
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler otherwise prints its own start and stop
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = call()
    found = getattr(profile.profiler, "kineto_results", None)
    if found is None or not hasattr(found, "experimental_event_tree"):
        return None
    changes = sorted(_allocations(found.experimental_event_tree()))
    # A result's storage is what was allocated last at its address.
    returned = _storages(result)
    last = {address: index for index, (_, address, size) in enumerate(changes) if size > 0 and address in returned}
    alive = kept = peak = scratch = 0
    for index, (_, address, size) in enumerate(changes):
        alive += size
        kept += size if last.get(address) == index else 0
        peak, scratch = max(peak, alive), max(scratch, alive - kept)
    return Memory(peak, scratch) if changes else None


def peak_extra_bytes(call: Callable[[], object], device: torch.device) -> int | None:
    """`memory`'s peak."""
    found = memory(call, device)
    return None if found is None else found.peak


def _storages(result: object) -> dict[int, int]:
    """Bytes of every storage of a call's result, by address."""
    tensors = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}


def _allocations(events) -> Iterator[tuple[int, int, int]]:
    """(time, address, bytes) of what the profiler saw; bytes are negative for a release."""
    for event in events:
        if event.tag == torch._C._profiler._EventType.Allocation:
            yield event.start_time_ns, event.extra_fields.ptr, event.extra_fields.alloc_size
        yield from _allocations(event.children)


def saved_bytes(call: Callable[[], torch.Tensor], inputs: tuple[torch.Tensor, ...]) -> int:
    """Bytes that autograd keeps of a forward for its backward, each storage once, without those of the inputs and of
    the output. What a node keeps without telling autograd is not seen."""
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = call()
    known = {tensor.untyped_storage().data_ptr() for tensor in (*inputs, out)}
    return sum(storage.nbytes() for address, storage in kept.items() if address not in known)


@dataclass(frozen=True)
class Ceilings:
    """The rates of this device, measured here and now: the two numbers a floor is made of."""

    copy_bytes_per_second: float
    matrix_flops_per_second: dict[str, float]
    """By dtype name: the fastest of the probes below."""
    matrix_product_flops_per_second: dict[str, float]
    """By dtype name: torch's own matrix product alone."""
    multiply_add_flops_per_second: dict[str, float]
    """By dtype name: a loop of independent multiply-adds on registers (CPU with a C compiler; else empty)."""

    def to_json(self) -> dict:
        return asdict(self)

    def or_better(self, other: Ceilings) -> Ceilings:
        """The higher of each number in two measurements of the same device."""

        def higher(a: dict[str, float], b: dict[str, float]) -> dict[str, float]:
            return {name: max(a.get(name, 0.0), b.get(name, 0.0)) for name in {**a, **b}}

        return Ceilings(
            max(self.copy_bytes_per_second, other.copy_bytes_per_second),
            higher(self.matrix_flops_per_second, other.matrix_flops_per_second),
            higher(self.matrix_product_flops_per_second, other.matrix_product_flops_per_second),
            higher(self.multiply_add_flops_per_second, other.multiply_add_flops_per_second),
        )

    def floor_seconds(self, flops: int, moved: int, dtype: str) -> tuple[float, str]:
        """The least time for these operations and bytes, and which of the two binds."""
        arithmetic = flops / self.matrix_flops_per_second[dtype]
        memory = moved / self.copy_bytes_per_second
        return max(arithmetic, memory), "memory" if memory >= arithmetic else "arithmetic"


def measure_ceilings(device: torch.device, dtypes: list[str], quick: bool = False) -> Ceilings:
    """Copy bandwidth (bytes read plus written) of a buffer far beyond the caches, and the matrix rate per dtype."""
    from retro_kernels.bench.cpu_peak import multiply_add_rates

    from .operations import DTYPES

    on_gpu = device.type == "cuda"
    size = (4 << 30) if on_gpu else (128 << 20 if quick else 512 << 20)
    source = torch.ones(size // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    protocol = Protocol(seconds=1.0 if quick else 3.0, min_rounds=5, max_rounds=30, graphs=False)
    copy = interleaved({"copy": Timed(functools.partial(target.copy_, source))}, device, protocol)["copy"]
    bandwidth = 2 * size / (copy.percentile(20) * 1e-3)
    del source, target

    products = {}
    for name in dtypes:
        dtype = DTYPES[name]
        n = 8192 if on_gpu else (1024 if quick else 2048)
        left, right = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        timed = interleaved({"mm": Timed(functools.partial(torch.mm, left, right))}, device, protocol)["mm"]
        products[name] = 2 * n**3 / (timed.percentile(20) * 1e-3)
    loops = {} if on_gpu else {name: rate for name, rate in multiply_add_rates().items() if name in dtypes}
    best = {name: max(products[name], loops.get(name, 0.0)) for name in dtypes}
    return Ceilings(bandwidth, best, products, loops)
