"""Times chunked cross-attention: for every workload, precision and mode, all variants checked, then interleaved."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from typing import Protocol as Interface

import torch

from . import peers, verify
from .peers import CompileBudget, CompileTimeout, Skipped, Variant
from .timing import Ceilings, Protocol, Timed, interleaved, peak_extra_bytes
from .workloads import DTYPES, SEED, Workload

OK, SKIPPED, WRONG, FAILED = "ok", "skipped", "wrong", "failed"


@dataclass
class Row:
    """One variant of one case. Times, rates and memory are there only when `status` is "ok"."""

    workload: str
    shape: str
    dtype: str
    mode: str
    variant: str
    status: str
    reason: str | None = None
    p20_ms: float | None = None
    p50_ms: float | None = None
    p80_ms: float | None = None
    samples: int = 0
    cuda_graph: bool = False
    tflops: float | None = None
    gigabytes_per_second: float | None = None
    limit_ms: float | None = None
    percent_of_limit: float | None = None
    bound: str | None = None
    flops: int = 0
    bytes: int = 0
    peak_extra_bytes: int | None = None
    errors: list[dict] = field(default_factory=list)
    checked: str | None = None

    def to_json(self) -> dict:
        return asdict(self)


class Watcher(Interface):
    """What a run tells about itself while it goes on."""

    def case(self, text: str) -> None: ...

    def step(self, text: str) -> None: ...

    def row(self, row: Row) -> None: ...


@dataclass
class Settings:
    """How a run of the suite goes."""

    device: torch.device
    dtypes: list[str]
    modes: tuple[str, ...]
    protocol: Protocol
    budget: CompileBudget
    compiled: bool = True
    backends: list[str] | None = None
    memory: bool = True
    skip: Callable[[Workload, str, str, str], str | None] | None = None
    """(workload, dtype, mode, variant name) -> why this one is not run in this suite, or None."""


def run(workloads: Iterable[Workload], settings: Settings, ceilings: Ceilings, watcher: Watcher) -> list[Row]:
    """All rows, handed to `watcher.row` as they are made (what an interrupted run keeps)."""
    rows: list[Row] = []

    def add(new: list[Row]) -> None:
        for row in new:
            rows.append(row)
            watcher.row(row)

    for workload in workloads:
        workload = workload.on(settings.device)
        watcher.case(workload.name)
        try:
            watcher.step("fp64 reference")
            base = workload.inputs(torch.bfloat16, settings.device)
            truth = verify.Truth(workload, base)
        except torch.OutOfMemoryError as error:
            add([_row(workload, name, mode, "all", FAILED, f"out of memory: {error}")
                 for name in settings.dtypes for mode in settings.modes])  # fmt: skip
            continue
        for dtype in settings.dtypes:
            inputs = tuple(tensor.to(DTYPES[dtype]) for tensor in base)
            for mode in settings.modes:
                add(_case(workload, dtype, mode, inputs, truth, settings, ceilings, watcher))
            del inputs
        del base, truth
        _clean(settings.device)
    return rows


def _case(workload, dtype, mode, inputs, truth, settings: Settings, ceilings, watcher) -> list[Row]:
    device = settings.device
    torch._dynamo.reset()
    inputs = verify.leaves(inputs, mode != "forward")
    rows: dict[str, Row] = {}
    timed: dict[str, Timed] = {}
    eager_errors = None
    for variant in peers.variants(workload, device, compiled=settings.compiled, backends=settings.backends):
        why = settings.skip(workload, dtype, mode, variant.name) if settings.skip else None
        if isinstance(variant, Skipped) or why:
            reason = variant.reason if isinstance(variant, Skipped) else why
            rows[variant.name] = _row(workload, dtype, mode, variant.name, SKIPPED, reason)
            continue
        watcher.step(f"{dtype} {mode}: checking {variant.name}")
        status, reason, errors = _check(variant, inputs, mode, truth, settings.budget, dtype, eager_errors)
        row = _row(workload, dtype, mode, variant.name, status, reason)
        row.errors = verify.to_json(errors)
        row.checked = "every element" if truth.whole else "two corners of batch and heads; the rest finite"
        rows[variant.name] = row
        if variant.name == "eager" and errors:
            eager_errors = errors
        if status == OK:
            call = _call(variant, inputs, mode)
            timed[variant.name] = Timed(call, variant.context)
    if settings.memory:
        for name, entry in list(timed.items()):
            watcher.step(f"{dtype} {mode}: memory of {name}")
            with entry.context():
                rows[name].peak_extra_bytes = _peak(entry.call, device)
    watcher.step(f"{dtype} {mode}: timing {len(timed)} variants")
    flops, moved = workload.flops(mode), workload.bytes(mode, DTYPES[dtype])
    limit, bound = ceilings.floor_seconds(flops, moved, dtype)
    try:
        found = interleaved(timed, device, settings.protocol, seed=SEED)
    except torch.OutOfMemoryError:
        found = {}
        for name in timed:
            rows[name].status, rows[name].reason = FAILED, "out of memory while all variants were timed"
    for name, samples in found.items():
        row = rows[name]
        for key, value in samples.summary().items():
            setattr(row, key, value)
        seconds = samples.percentile(50) * 1e-3
        row.flops, row.bytes, row.bound, row.limit_ms = flops, moved, bound, limit * 1e3
        row.tflops, row.gigabytes_per_second = flops / seconds / 1e12, moved / seconds / 1e9
        row.percent_of_limit = 100 * limit / seconds
    return list(rows.values())


def _check(variant: Variant, inputs, mode, truth, budget: CompileBudget, dtype, eager_errors):
    """-> status, reason, errors of one call, which also warms the variant up and compiles it."""
    try:
        if not variant.compiled:
            with variant.context():
                result = verify.run(variant.attention, inputs, mode)
        elif budget.allowed <= 0:
            return SKIPPED, f"the run's compile budget of {budget.total:.0f} s was used up", []
        else:
            with warnings.catch_warnings(), budget.spend() as allowed:
                warnings.simplefilter("ignore")
                result = verify.run(variant.attention, inputs, mode)
    except CompileTimeout:
        torch._dynamo.reset()
        return SKIPPED, f"compile exceeded {allowed:.0f} s", []
    except torch.OutOfMemoryError:
        return FAILED, "out of memory", []
    except Exception as error:
        kind = SKIPPED if variant.compiled or variant.name.startswith("sdpa") else FAILED
        return kind, f"{type(error).__name__}: {_first_line(error)}", []
    errors = truth.errors(result)
    reason = verify.judge(errors, None if variant.name == "eager" else eager_errors, dtype)
    return (WRONG, reason, errors) if reason else (OK, None, errors)


def _call(variant: Variant, inputs, mode: str) -> Callable[[], object]:
    return lambda: verify.run(variant.attention, inputs, mode)


def _peak(call: Callable[[], object], device: torch.device) -> int | None:
    try:
        return peak_extra_bytes(call, device)
    except torch.OutOfMemoryError:
        return None


def _row(workload: Workload, dtype: str, mode: str, variant: str, status: str, reason: str | None) -> Row:
    return Row(workload.name, workload.describe(), dtype, mode, variant, status, reason)


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else "no message"


def _clean(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
