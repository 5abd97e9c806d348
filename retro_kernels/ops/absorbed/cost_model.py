"""Which strategy is faster: FLOPs and bytes of each over rates measured on the device. docs/projections.md derives it.

With Q query tokens that attend, C chunks attended to (both over all sequences), S = k * r slots of a chunk, states of
width e, h query heads and hk key/value heads of sizes d and d_value, and D = d + d_value, a forward costs in FLOPs

    materialise    projection  2 C S e hk D                 core  2 Q S h D
    absorb         over weights  2 Q e h D                  over states  4 Q S h e

Both grow alike with batch and length, so with Q = m C the choice depends on one chunk: absorbing is cheaper with many
slots and wide heads, dearer with grouped heads, whose keys and values are few. The backward of `materialise` is two
products of the projection's size, one for the states' gradient and one for the weights', and two and a half of the
core's; that of `absorb` is five products over weights (forward: two) and six over states (forward: two).

A phase takes the longer of its FLOPs over the rate measured for its kind and its bytes over the measured bandwidth;
phases add up. Rates are measured by `python -m benchmarks.rates --write`, by device, dtype and width of the states.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import json
import math
from pathlib import Path
from typing import NamedTuple

import torch

from ... import extension, machine
from ..compiling import constant

CONSTANTS = Path(__file__).with_name("constants.json")
STRATEGIES = ("materialise", "absorb")
KINDS = (
    "project_forward",
    "project_backward",
    "core_forward",
    "core_backward",
    "absorb_forward_weights",
    "absorb_forward_states",
    "absorb_backward_weights",
    "absorb_backward_states",
)
DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}
TIE = 1.03  # predicted times closer than this are alike: the strategy that needs less memory is taken

# Of a GPU that was not measured: FLOPs per clock and multiprocessor of its tensor cores in half precision (dense), by
# compute capability, and the share of that peak (and of the memory's) that each kind is assumed to reach.
TENSOR_FLOPS = {8: 2048, 9: 4096, 10: 8192, 12: 2048}
ASSUMED_SHARES = {
    "project_forward": 0.7,
    "project_backward": 0.7,
    "core_forward": 0.4,
    "core_backward": 0.3,
    "absorb_forward_weights": 0.5,
    "absorb_forward_states": 0.5,
    "absorb_backward_weights": 0.35,
    "absorb_backward_states": 0.35,
}
ASSUMED_BANDWIDTH = 0.8


class Work(NamedTuple):
    """The sizes of one call, by the letters above, and which gradients are wanted of it."""

    queries: int
    chunks: int
    slots: int
    encoder_dim: int
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    itemsize: int
    backward: bool = False
    encoded_gradient: bool = True
    weight_gradient: bool = True
    recompute: bool = False


@dataclasses.dataclass(frozen=True)
class Phase:
    """A kernel, or kernels of one kind: `kind` names the rate that it runs at."""

    kind: str
    flops: float
    bytes: float


def phases(strategy: str, work: Work) -> list[Phase]:
    """What `strategy` does: the forward's phases, then those of the backward where one is wanted."""
    w = work
    widths, size = w.head_dim + w.value_dim, w.itemsize
    states = w.chunks * w.slots * w.encoder_dim * size
    weights = w.kv_heads * widths * w.encoder_dim * size
    key_values = w.chunks * w.slots * w.kv_heads * widths * size
    rows = w.queries * w.heads * widths * size  # the query and the output
    products = int(w.encoded_gradient) + int(w.weight_gradient)
    if strategy == "materialise":
        projection = 2.0 * w.chunks * w.slots * w.encoder_dim * w.kv_heads * widths
        core = 2.0 * w.queries * w.slots * w.heads * widths
        project = Phase("project_forward", projection, states + weights + key_values)
        forward = [project, Phase("core_forward", core, key_values + rows)]
        if not w.backward:
            return forward
        return [
            *forward,
            *(forward if w.recompute else []),
            Phase("core_backward", 2.5 * core, 2 * key_values + 2 * rows),
            Phase("project_backward", products * projection, products * (key_values + states + weights)),
        ]
    over_weights = 2.0 * w.queries * w.encoder_dim * w.heads * widths
    over_states = 4.0 * w.queries * w.slots * w.heads * w.encoder_dim
    # The backward's products: over weights the two of the forward's size, the query's gradient and the weights' two;
    # over states scores, their gradient, the query's share, the states' gradient twice, and the weighted sum.
    backward_weights = (1.5 + w.weight_gradient) * over_weights
    backward_states = (1.5 + w.encoded_gradient + 0.5 * w.weight_gradient) * over_states
    moved = states + weights + rows
    forward = [
        Phase("absorb_forward_weights", over_weights, weights + rows),
        Phase("absorb_forward_states", over_states, states),
    ]
    if not w.backward:
        return forward
    return [
        *forward,
        Phase("absorb_backward_weights", backward_weights, 2 * moved - 2 * states),
        Phase("absorb_backward_states", backward_states, 2 * states),
    ]


def saved_bytes(strategy: str, work: Work) -> int:
    """Bytes kept from the forward for the backward, besides the arguments and the output: K and V, and the lse."""
    if not work.backward:
        return 0
    lse = 4 * work.queries * work.heads
    if strategy == "absorb" or work.recompute:
        return lse
    return lse + _key_value_bytes(work)


def _key_value_bytes(work: Work) -> int:
    return work.chunks * work.slots * work.kv_heads * (work.head_dim + work.value_dim) * work.itemsize


@dataclasses.dataclass(frozen=True)
class Constants:
    """Rates of one device and dtype. `measured` is False where they come from a rule instead; `source` says which.

    `rates`: by kind of phase, FLOP/s at some widths e, ascending: (e, rate) pairs; a kind that could not be measured is
    not there. `bandwidth`: bytes/s."""

    device: str
    measured: bool
    source: str
    rates: dict[str, tuple[tuple[int, float], ...]]
    bandwidth: float

    def rate(self, kind: str, encoder_dim: int) -> float:
        """Linear in log e between the measured widths, constant beyond them."""
        points = self.rates[kind]
        place = bisect.bisect_left([width for width, _ in points], encoder_dim)
        if place == 0 or place == len(points):
            return points[min(place, len(points) - 1)][1]
        (low, slow), (high, fast) = points[place - 1], points[place]
        share = math.log(encoder_dim / low) / math.log(high / low)
        return slow + share * (fast - slow)

    def seconds(self, found: list[Phase], encoder_dim: int) -> float | None:
        """The predicted time of these phases, None where a kind of theirs has no rate."""
        if any(phase.kind not in self.rates for phase in found):
            return None
        return sum(
            max(phase.flops / self.rate(phase.kind, encoder_dim), phase.bytes / self.bandwidth) for phase in found
        )


def device_name(device: torch.device) -> str:
    """What rates are kept by: on a CPU its model, torch's threads and instruction set; on a GPU its name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return _cpu_name(torch.get_num_threads())


@functools.cache
def _cpu_name(threads: int) -> str:
    tiles = ", AMX" if extension.why_not() is None and extension.isa() == "amx_bf16" else ""  # torch's word is silent
    return f"{machine.cpu_model()}, {threads} threads, {torch.backends.cpu.get_cpu_capability()}{tiles}"


@functools.lru_cache(maxsize=1)
def table() -> list[dict]:
    """The measured devices of `constants.json`."""
    return json.loads(CONSTANTS.read_text())["devices"]


def constants(device: torch.device, dtype: torch.dtype) -> Constants:
    """The rates of this device where it was measured, else those of the stated rule."""
    name, precision = device_name(device), DTYPES[dtype]
    for entry in table():
        if entry["device"] == name and precision in entry["rates"]:
            source = f"rates measured on this device, {entry['date']}, commit {entry['commit']}"
            return _of(entry, precision, True, source, 1.0)
    if device.type == "cuda":
        return _assumed_gpu(device, name, dtype)
    # Another CPU: only the ratios of the rates decide, and those are taken to be the same.
    entry = next(entry for entry in table() if entry["type"] == "cpu")
    factor = torch.get_num_threads() / entry["threads"] * (0.5 if dtype == torch.float64 else 1.0)
    known = "fp32" if dtype == torch.float64 else precision
    source = (
        f"NOT measured for {precision} on {name}: rates of {entry['device']} in {known} times {factor:.2g}; measure "
        "with `python -m benchmarks.rates --write`"
    )
    return _of(entry, known, False, source, factor)


def _of(entry: dict, precision: str, measured: bool, source: str, factor: float) -> Constants:
    rates = {
        kind: tuple((int(e), factor * float(rate)) for e, rate in points)
        for kind, points in entry["rates"][precision].items()
    }
    return Constants(entry["device"], measured, source, rates, factor * entry["bandwidth"])


def _assumed_gpu(device: torch.device, name: str, dtype: torch.dtype) -> Constants:
    """Shares of the peaks that the device's properties give."""
    found = torch.cuda.get_device_properties(device)
    clock = 1e3 * getattr(found, "clock_rate", 1_700_000)  # kHz
    per_clock = TENSOR_FLOPS.get(found.major, 2048) * {torch.float32: 0.5, torch.float64: 1 / 16}.get(dtype, 1.0)
    peak = found.multi_processor_count * clock * per_clock
    bandwidth = 2e3 * getattr(found, "memory_clock_rate", 2_600_000) * getattr(found, "memory_bus_width", 5120) / 8
    source = (
        f"NOT measured on {name}: assumed shares of {peak / 1e12:.0f} TFLOP/s and {bandwidth / 1e12:.2f} TB/s, from "
        "the device's properties; measure with `python -m benchmarks.rates --write`"
    )
    rates: dict[str, tuple[tuple[int, float], ...]]
    rates = {kind: ((1, share * peak),) for kind, share in ASSUMED_SHARES.items()}
    return Constants(name, False, source, rates, ASSUMED_BANDWIDTH * bandwidth)


def faster(device: torch.device, dtype: torch.dtype, work: Work) -> str:
    """The strategy that `auto` takes where both can run."""
    return _constant(str(device), dtype, *work)


@constant  # sizes in, a name out: a compiled graph has nothing to trace here
def _constant(device: str, dtype: torch.dtype, *sizes: int) -> str:
    found = torch.device(device)
    return _faster(found, dtype, Work._make(sizes), device_name(found))


@functools.lru_cache(maxsize=1024)
def _faster(device: torch.device, dtype: torch.dtype, work: Work, _name: str) -> str:
    known = constants(device, dtype)
    times = {name: known.seconds(phases(name, work), work.encoder_dim) for name in STRATEGIES}
    return pick(times, {name: memory(name, work) for name in STRATEGIES})


def memory(strategy: str, work: Work) -> int:
    """Bytes of keys and values that exist at one time, or are kept, whichever this call is judged by."""
    return saved_bytes(strategy, work) if work.backward else int(strategy == "materialise") * _key_value_bytes(work)


def pick(times: dict[str, float | None], memory: dict[str, int]) -> str:
    """The fastest, but the one with the least memory among those within `TIE` of it. What has no prediction is not
    taken; where nothing has one, `materialise` is."""
    known = {name: time for name, time in times.items() if time is not None}
    if not known:
        return "materialise"
    least = min(known.values())
    return min((name for name in known if known[name] <= TIE * least), key=lambda name: (memory[name], known[name]))
