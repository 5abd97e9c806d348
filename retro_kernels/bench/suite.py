"""Times the attentions: for every workload, precision and mode, all variants checked, then interleaved."""

from __future__ import annotations

import functools
import gc
import warnings
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from typing import Protocol as Interface

import torch

from . import verify
from .operations import ATTENTIONS, DROPOUT, DTYPES, PLAIN, SEED, Workload
from .timing import Ceilings, Memory, Protocol, Timed, interleaved, memory, saved_bytes
from .variants import WITHOUT, CompileBudget, CompileTimeout, Skipped, Variant

OK, SKIPPED, WRONG, FAILED = "ok", "skipped", "wrong", "failed"


@dataclass
class Row:
    """One variant of one case. Times, rates and memory are there only when `status` is "ok"."""

    operation: str
    option: str
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
    wall_ms: float | None = None
    """Median on the wall's clock of calls as a program makes them, Python included. On a CPU p50_ms."""
    tflops: float | None = None
    gigabytes_per_second: float | None = None
    limit_ms: float | None = None
    percent_of_limit: float | None = None
    bound: str | None = None
    flops: int = 0
    bytes: int = 0
    peak_extra_bytes: int | None = None
    scratch_bytes: int | None = None
    """`peak_extra_bytes` without the output and the returned gradients."""
    whole_scratch_bytes: int | None = None
    """`scratch_bytes` of one call at the workload's whole length (one sequence), where a CPU times fewer chunks."""
    errors: list[dict] = field(default_factory=list)
    checked: str | None = None
    saved_bytes: int | None = None
    """Kept from the forward for the backward, besides the inputs and the output."""
    strategy: str | None = None
    chosen: bool = False
    """Whether `strategy="auto"` takes this row's strategy."""
    predicted_ms: float | None = None
    cache_bytes: int | None = None
    """Bytes that decoding keeps of a chunk's neighbours, for all sequences."""
    parameter_bytes: int | None = None
    border_ms: float | None = None
    """Milliseconds of filling the cache when a chunk ends, beside the decoder step."""

    def to_json(self) -> dict:
        return asdict(self)


class Watcher(Interface):
    """Receives the progress of a run."""

    def case(self, text: str) -> None: ...

    def step(self, text: str) -> None: ...

    def row(self, row: Row) -> None: ...


@dataclass
class Settings:
    """The settings of a run of the suite."""

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

    truths: dict[Workload, verify.Truth] = {}
    for workload in workloads:
        workload = workload.on(settings.device)
        plain = workload.with_option(PLAIN)
        watcher.case(f"{workload.operation} {workload.option} {workload.name}")
        base = reason = None
        status = FAILED
        try:
            watcher.step("fp64 reference")
            base = workload.inputs(torch.bfloat16, settings.device)
            truths = {known: truth for known, truth in truths.items() if known == plain}
            for needed in (workload, plain):  # what the option costs is told beside it, and checked as well
                if needed not in truths:
                    truths[needed] = verify.Truth(needed, inputs_of(needed, base))
        except ValueError as error:
            reason, status = str(error), SKIPPED
        except Exception as error:  # the rest of a run of many minutes must not be lost
            reason = f"fp64 reference: {type(error).__name__}: {_first_line(error)}"
        if base is None or reason is not None:
            add(
                [
                    _row(workload, name, mode, "all", status, reason)
                    for name in settings.dtypes
                    for mode in settings.modes
                ]
            )
            del base
            continue
        for dtype in settings.dtypes:
            reason = _too_large(workload, dtype, settings.device)
            if reason:
                add([_row(workload, dtype, mode, "all", SKIPPED, reason) for mode in settings.modes])
                continue
            inputs = tuple(tensor.to(DTYPES[dtype]) for tensor in base)
            for mode in settings.modes:
                if mode not in workload.modes:
                    continue
                add(_case(workload, dtype, mode, inputs, truths, settings, ceilings, watcher))
            del inputs
        del base
        workload.release()
        _clean(settings.device)
    return rows


def _too_large(workload: Workload, dtype: str, device: torch.device) -> str | None:
    """Why this computer's memory is too small; a GPU says so itself."""
    if device.type == "cuda":
        return None
    needed, free = 1.5 * workload.bytes("forward+backward", DTYPES[dtype]), available_memory()
    if needed <= free:
        return None
    return f"needs about {needed / 1e9:.0f} GB of memory, {free / 1e9:.0f} are free"


def available_memory() -> float:
    """Bytes of main memory that a process may still take; infinity where the system does not tell."""
    try:
        with open("/proc/meminfo") as lines:
            return next(float(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return float("inf")


def inputs_of(workload: Workload, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Selects the inputs that this workload takes of a case's: its leaves and the output's gradient."""
    return (*inputs[: len(workload.leaves)], inputs[-1])


def _case(workload, dtype, mode, inputs, truths, settings: Settings, ceilings, watcher) -> list[Row]:
    device = settings.device
    torch._dynamo.reset()
    inputs = verify.leaves(inputs, mode != "forward")
    rows: dict[str, Row] = {}
    timed: dict[str, Timed] = {}
    ways: dict[str, Variant] = {}
    eager_errors: dict[Workload, list[verify.Error]] = {}
    for variant in workload.variants(device, compiled=settings.compiled, backends=settings.backends):
        why = settings.skip(workload, dtype, mode, variant.name) if settings.skip else None
        if isinstance(variant, Variant) and variant.refusal:
            why = why or variant.refusal(dtype, mode)
        if isinstance(variant, Skipped) or why:
            reason = variant.reason if isinstance(variant, Skipped) else why
            rows[variant.name] = _row(workload, dtype, mode, variant.name, SKIPPED, reason)
            continue
        watcher.step(f"{dtype} {mode}: checking {variant.name}")
        own_inputs = inputs_of(variant.workload, inputs)
        status, reason, errors = check(variant, own_inputs, mode, truths, settings.budget, dtype, eager_errors)
        row = _row(workload, dtype, mode, variant.name, status, reason)
        row.errors = verify.to_json(errors)
        row.checked = truths[workload].what()
        if variant.undropped is not None:
            row.checked += " without dropout; with it, mean and noise"
        rows[variant.name] = row
        if status == OK:
            timed[variant.name] = Timed(_call(variant, own_inputs, mode), variant.context)
            ways[variant.name] = variant
            for key, value in variant.extra(dtype, mode).items() if variant.extra else ():
                setattr(row, key, value)
            if settings.memory and mode != "forward" and workload.operation not in ATTENTIONS:
                with variant.context():
                    row.saved_bytes = saved_bytes(functools.partial(variant.attention, *own_inputs[:-1]), own_inputs)
    if settings.memory:
        for name, entry in list(timed.items()):
            watcher.step(f"{dtype} {mode}: memory of {name}")
            with entry.context():
                found = _memory(entry.call, device)
            if found is not None:
                rows[name].peak_extra_bytes, rows[name].scratch_bytes = found.peak, found.scratch
        watcher.step(f"{dtype} {mode}: memory at the whole length")
        for name, scratch in _whole_scratch(workload, dtype, mode, ways, device):
            rows[name].whole_scratch_bytes = scratch
    watcher.step(f"{dtype} {mode}: timing {len(timed)} variants")
    try:
        samples_of = interleaved(timed, device, settings.protocol, seed=SEED)
    except torch.OutOfMemoryError:
        samples_of = {}
        for name in timed:
            rows[name].status, rows[name].reason = FAILED, "out of memory while all variants were timed"
    for name, samples in samples_of.items():
        row = rows[name]
        computed = workload.with_option(PLAIN) if name.endswith(WITHOUT) else workload
        # Decoding's ways differ in what they must do; each was given the counts of its own.
        flops, moved = row.flops or computed.flops(mode), row.bytes or computed.bytes(mode, DTYPES[dtype])
        limit, bound = ceilings.floor_seconds(flops, moved, dtype)
        for key, value in samples.summary().items():
            setattr(row, key, value)
        seconds = samples.percentile(50) * 1e-3
        row.flops, row.bytes, row.bound, row.limit_ms = flops, moved, bound, limit * 1e3
        row.tflops, row.gigabytes_per_second = flops / seconds / 1e12, moved / seconds / 1e9
        row.percent_of_limit = 100 * limit / seconds
    return list(rows.values())


def check(variant: Variant, inputs, mode, truths, budget: CompileBudget, dtype, eager_errors):
    """-> status, reason, errors of one call, which also warms the variant up and compiles it. The errors of eager
    PyTorch, which judge those of the rest, are kept in `eager_errors` by what was computed."""
    plain = variant.workload.with_option(PLAIN)
    try:
        if not variant.compiled:
            with variant.context():
                result, undropped = _results(variant, inputs, mode)
        elif budget.allowed <= 0:
            return SKIPPED, f"the run's compile budget of {budget.total:.0f} s was used up", []
        else:
            with warnings.catch_warnings(), budget.spend() as allowed:
                warnings.simplefilter("ignore")
                result, undropped = _results(variant, inputs, mode)
        if variant.workload not in eager_errors:
            eager_errors.update(_eager_errors(variant, inputs, mode, truths))
    except CompileTimeout:
        torch._dynamo.reset()
        return SKIPPED, f"compile exceeded {allowed:.0f} s", []
    except torch.OutOfMemoryError:
        return FAILED, "out of memory", []
    except Exception as error:
        refused = isinstance(error, ValueError) and "cannot run this" in str(error)  # a backend named its reason
        kind = SKIPPED if variant.compiled or variant.name.startswith("sdpa") or refused else FAILED
        return kind, f"{type(error).__name__}: {_first_line(error)}", []
    eager = None if variant.name == "eager" else eager_errors[variant.workload]
    if undropped is None:
        errors = truths[variant.workload].errors(result)
        reason = verify.judge(errors, eager, dtype)
    else:
        errors = truths[plain].errors(undropped)
        reason = verify.judge(errors, eager, dtype) or truths[plain].judge_own_dropout(result)
    return (WRONG, reason, errors) if reason else (OK, None, errors)


def _results(variant: Variant, inputs, mode):
    """Runs the variant, and once more without dropout where its dropout is PyTorch's."""
    torch.manual_seed(SEED)
    result = verify.run(variant.workload, variant.attention, inputs, mode)
    if variant.undropped is None:
        return result, None
    return result, verify.run(variant.workload, variant.undropped, inputs, mode)


def _eager_errors(variant: Variant, inputs, mode, truths) -> dict[Workload, list[verify.Error]]:
    """The errors of eager PyTorch for what this variant computes; with dropout, those without it."""
    computed = variant.workload.with_option(PLAIN) if variant.workload.option == DROPOUT else variant.workload
    result = verify.run(computed, computed.eager(), inputs, mode)
    return {variant.workload: truths[computed].errors(result)}


def _call(variant: Variant, inputs, mode: str) -> Callable[[], object]:
    return lambda: verify.run(variant.workload, variant.attention, inputs, mode)


def _memory(call: Callable[[], object], device: torch.device) -> Memory | None:
    try:
        return memory(call, device)
    except torch.OutOfMemoryError:
        return None


def _whole_scratch(workload: Workload, dtype: str, mode: str, ways: dict[str, Variant], device: torch.device):
    """(variant, bytes) of one call of each of our strategies at the whole length, where what is timed is shorter."""
    whole = workload.whole()
    if whole is None or _too_large(whole, dtype, device):
        return
    inputs = verify.leaves(whole.inputs(DTYPES[dtype], device), mode != "forward")
    for name, variant in ways.items():
        if name.startswith("retro_kernels"):
            found = _memory(functools.partial(verify.run, whole, variant.attention, inputs, mode), device)
            if found is not None:
                yield name, found.scratch


def _row(workload: Workload, dtype: str, mode: str, variant: str, status: str, reason: str | None) -> Row:
    shape = workload.describe()
    return Row(workload.operation, workload.option, workload.name, shape, dtype, mode, variant, status, reason)


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else "no message"


def _clean(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
