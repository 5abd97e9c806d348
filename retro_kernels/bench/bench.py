"""`retro-kernels bench`: ceilings, the workloads against the alternatives, and a real RETRO on real text."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch

from . import environment, real_text, report, results, suite, timing
from .operations import ATTENTIONS, CCA, DECODE, LAYER, MODES, PLAIN, PROJECTED, SEED, STEP, Workload
from .variants import CompileBudget
from .workloads import DEFAULT, GOALS, QUICK, select

QUICK_MINUTES = 2.65  # a quick run starts no new measurement after so long; it must end within 3 minutes
# Parts of the run in order: their operations, and their shares of a limited time and of the compiler's. What a part
# leaves over is the next one's.
PARTS = (
    ("attentions", tuple(ATTENTIONS), 0.28, 0.6),
    ("projections", (PROJECTED,), 0.2, 0.0),
    ("layer", (LAYER,), 0.15, 0.4),
    ("generation", (DECODE, STEP), 0.24, 0.0),
)
TEXT_SHARE = 0.13  # for the model on real text


@dataclass
class Options:
    """The cases of a run and its limits of time."""

    quick: bool = False
    operations: list[str] = field(default_factory=list)
    options: list[str] = field(default_factory=list)
    workloads: list[str] = field(default_factory=list)
    dtypes: list[str] = field(default_factory=list)
    modes: list[str] = field(default_factory=list)
    device: str | None = None
    compiled: bool = True
    real_text: bool = True
    backends: list[str] | None = None
    seconds: float | None = None
    """Seconds of timing a case, all variants together. None: 2 in a quick run, else 8."""
    minutes: float | None = None
    """After so many no new measurement starts. None: 2.65 in a quick run, else no limit."""
    text_length: int | None = None
    """Tokens of real text. None: 2048; in a quick run on a CPU 256."""

    def resolved(self) -> Options:
        """Fills in the defaults of this kind of run. Raises ValueError for an unknown name."""
        device = torch.device(self.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if device.type == "cuda" and not torch.cuda.is_available():
            raise ValueError("device: got 'cuda', but torch sees no usable GPU")
        dtypes = self.dtypes or ["fp32", "bf16"]
        unknown = [name for name in dtypes if name not in ("fp32", "bf16", "fp16")]
        if unknown:
            raise ValueError(f"dtype: got {unknown[0]!r}, expected fp32, bf16 or fp16")
        if "fp16" in dtypes and device.type == "cpu":
            raise ValueError("dtype: got 'fp16' on a CPU, where nothing computes fast in it; expected fp32 or bf16")
        unknown = [name for name in self.modes if name not in MODES]
        if unknown:
            raise ValueError(f"mode: got {unknown[0]!r}, expected {' or '.join(MODES)}")
        if self.seconds is not None and not self.seconds >= 0:
            raise ValueError(f"seconds: got {self.seconds}, expected 0 or more")
        self.cases()
        modes = [mode for mode in MODES if not self.modes or mode in self.modes]
        seconds = (2.0 if self.quick else 8.0) if self.seconds is None else self.seconds
        minutes = QUICK_MINUTES if self.minutes is None and self.quick else self.minutes
        if minutes is not None and not minutes >= 0:
            raise ValueError(f"minutes: got {minutes}, expected 0 or more")
        length = self.text_length
        if length is None:
            length = 256 if self.quick and device.type == "cpu" else 2048
        if not 64 <= length <= 2048:
            raise ValueError(f"text length: got {length}, expected 64 to 2048 tokens, the model's longest")
        return replace(
            self, dtypes=dtypes, modes=modes, device=str(device), seconds=seconds, minutes=minutes, text_length=length
        )

    def cases(self) -> list[Workload]:
        """The workloads to measure, in every dtype and mode. Raises ValueError for an unknown name."""
        found = select(self.workloads, self.operations, self.options, QUICK if self.quick else DEFAULT)
        # What a limited time should not lose comes first: a quick run is in QUICK's order; another begins with what a
        # quick run has, then where goals are stated, then the small before the large. The options of one workload
        # stay together.
        quick = {(operation, name) for (operation, _), names in QUICK.items() for name in names}
        if self.quick:
            order = {what: place for place, what in enumerate(QUICK)}
            return sorted(found, key=lambda case: order.get((case.operation, case.option), len(order)))

        def place(case: Workload) -> tuple:
            what = case.operation, case.name
            return what not in quick, what not in GOALS, case.on("cpu").with_option(PLAIN).flops("forward")

        return sorted(found, key=lambda case: (*place(case), case.operation, case.name))


class Progress:
    """Receives the progress of a run; this one ignores it."""

    def case(self, text: str) -> None:
        """A workload or part begins."""

    def step(self, text: str) -> None:
        """The next action begins."""

    def row(self, row: suite.Row) -> None:
        """A result is there."""


def run(options: Options, progress: Progress | None = None) -> dict:
    """The document of results.py. On Ctrl-C what is finished is returned, marked as interrupted."""
    options, progress = options.resolved(), progress or Progress()
    device, started = torch.device(options.device or "cpu"), time.monotonic()
    document = results.new(environment.collect(device), {**asdict(options), "seed": SEED})
    try:
        progress.case("ceilings")
        progress.step("copy bandwidth and multiply-add rate")
        ceilings = timing.measure_ceilings(device, options.dtypes, options.quick)
        document["ceilings"] = ceilings.to_json()
        _core(options, device, ceilings, document, progress, started)
        progress.step("the ceilings again: what disturbed the first measurement is gone, or was not there")
        ceilings = ceilings.or_better(timing.measure_ceilings(device, options.dtypes, options.quick))
        document["ceilings"] = ceilings.to_json()
        _set_limits(document["rows"], ceilings)
        if options.real_text:
            _real_text(options, device, document, progress, started)
        else:
            document["skipped"].append({"what": "real text", "reason": "switched off for this run (--no-real-text)"})
        left = _untimed_cases(options)
        if left:
            run_all = "; `retro-kernels bench` has them" if options.quick else ""
            document["skipped"].append({"what": "; ".join(left), "reason": f"not asked for in this run{run_all}"})
    except KeyboardInterrupt:
        document["interrupted"] = True
    document["seconds"] = round(time.monotonic() - started, 1)
    return document


def _set_limits(rows: list[dict], ceilings: timing.Ceilings) -> None:
    for row in rows:
        if row["status"] == suite.OK:
            limit, row["bound"] = ceilings.floor_seconds(row["flops"], row["bytes"], row["dtype"])
            row["limit_ms"], row["percent_of_limit"] = limit * 1e3, 100 * limit * 1e3 / row["p50_ms"]


def _untimed_cases(options: Options) -> list[str]:
    """Lists the operations, workloads and options that this run does not time."""
    timed = {(case.operation, case.option, case.name) for case in options.cases()}
    left = []
    for (operation, option), names in DEFAULT.items():
        missing = [name for name in names if (operation, option, name) not in timed]
        if missing:
            left.append(f"{operation} {option}: {', '.join(missing)}")
    return left


def _core(options: Options, device, ceilings, document: dict, progress: Progress, started: float) -> None:
    cases = options.cases()
    parts = [part for part in PARTS if any(case.operation in part[1] for case in cases)]
    whole = sum(part[2] for part in parts) + (TEXT_SHARE if options.real_text else 0.0)
    spent = 0.0
    for _, operations, share, compiling in parts:
        spent += share / whole
        mine = [case for case in cases if case.operation in operations]
        deadline = started + 60 * (float("inf") if options.minutes is None else options.minutes) * spent
        _part(options, mine, compiling, device, ceilings, document, progress, deadline)


def _part(options: Options, cases, compiling: float, device, ceilings, document: dict, progress, deadline) -> None:
    def in_time() -> Iterator[Workload]:
        for case in cases:
            if time.monotonic() < deadline:
                yield case
            else:
                what = f"{case.operation} {case.option} {case.name}"
                document["skipped"].append({"what": what, "reason": "the time given to this run was used up"})

    class Keep(Progress):
        case, step = staticmethod(progress.case), staticmethod(progress.step)  # type: ignore[assignment]

        def row(self, row: suite.Row) -> None:
            document["rows"].append(row.to_json())
            progress.row(row)

    quick = options.quick
    on_device = _too_large_on_cpu if device.type == "cpu" else None
    settings = suite.Settings(
        device=device,
        dtypes=options.dtypes,
        modes=tuple(options.modes),
        protocol=timing.Protocol(
            seconds=options.seconds or 0.0,
            min_rounds=2 if cases[0].operation in (DECODE, STEP) else 3,
            max_rounds=20 if quick else 50,
            warm_up=1 if cases[0].operation in ATTENTIONS else 0,  # the others' check is a whole call
        ),
        budget=CompileBudget(
            total=compiling * (30.0 if quick else 900.0 if options.minutes is None else 15 * options.minutes),
            per_variant=15.0 if quick else 90.0,
        ),
        compiled=options.compiled,
        backends=options.backends,
        skip=_quick_skip if quick else on_device if options.minutes is None else _limited_skip,
    )
    suite.run(in_time(), settings, ceilings, Keep())


def _quick_skip(workload: Workload, dtype: str, mode: str, variant: str) -> str | None:
    """A quick run compiles the folded form where it is worth most; the rest of torch.compile's time buys little."""
    if workload.operation == DECODE and variant == "eager":
        return "left out of a quick run: SDPA's way of projecting again is faster"
    if variant.startswith("flex"):
        return "left out of a quick run: compiling it takes longer than everything else"
    if variant == "compile[eager]":
        return "left out of a quick run, which compiles the folded SDPA form only"
    if variant == "compile[sdpa]" and (workload.option != PLAIN or workload.operation != CCA):
        return "left out of a quick run: one operation shows what compiling the folded form gives"
    if variant.startswith("sdpa[math") and workload.option == PLAIN:
        return "left out of a quick run: it is eager attention under another name, and no faster"
    return None


def _limited_skip(workload: Workload, dtype: str, mode: str, variant: str) -> str | None:
    """A run of limited time compiles only what has no option, and not FlexAttention; of the layer two shapes."""
    if variant.startswith("compile") and workload.operation == LAYER:
        if variant != "compile[sdpa]" or workload.name not in ("retro-172m", "retro-7.5b"):
            return "left out of a run of limited time (--minutes), which compiles SDPA's form of two layers"
        return None
    if workload.operation == PROJECTED and (variant == "eager" or variant.startswith("sdpa[math")):
        return "left out of a run of limited time (--minutes): it differs from sdpa[flash] in the core alone"
    if variant.startswith("flex") or (variant.startswith("compile") and workload.option != PLAIN):
        return "left out of a run of limited time (--minutes): compiling it takes longer than its case"
    return _too_large_on_cpu(workload, dtype, mode, variant)


def _too_large_on_cpu(workload: Workload, dtype: str, mode: str, variant: str) -> str | None:
    """Leaves out the slowest ways but one where a call takes seconds."""
    if workload.operation in (DECODE, STEP):
        if variant == "eager" and (workload.operation == STEP or (workload.batch or 1) > 8):
            return "left out on a CPU at this size: SDPA's way of projecting again is faster and stands for it"
        return None
    slow = ("sdpa[math", "compile[eager]", "flex", "compile[sdpa]")
    if workload.flops("forward") > 2e11 and variant.startswith(slow):
        return "left out on a CPU at this size: eager and folded SDPA stand for it"
    if workload.flops("forward") > 2e10 and variant.startswith(slow[:2]) and dtype == "fp32":
        return "left out on a CPU at this size: eager stands for it"
    return None


def _real_text(options: Options, device, document: dict, progress: Progress, started: float) -> None:
    progress.case("real text")

    def keep(found: real_text.Report) -> None:
        document["real_text"] = found

    quick = options.quick
    try:
        real_text.run(
            device,
            length=2048 if options.text_length is None else options.text_length,
            dtypes=[name for name in options.dtypes if name in ("fp32", "bf16")],
            protocol=timing.Protocol(seconds=8.0 if quick else 60.0, min_rounds=2 if quick else 3, max_rounds=10),
            memory=not quick,
            characters=60_000 if quick else None,
            step=progress.step,
            report=keep,
            deadline=started + 60 * (float("inf") if options.minutes is None else options.minutes),
        )
    except real_text.Unavailable as error:
        document["skipped"].append({"what": "real text", "reason": str(error)})
    except Exception as error:
        document["skipped"].append({"what": "real text", "reason": f"failed: {type(error).__name__}: {error}"})
    finally:
        if isinstance(document["real_text"], real_text.Report):
            document["real_text"] = document["real_text"].to_json()


def write(document: dict, folder: Path) -> list[Path]:
    """The raw results, the page and the table, in `folder`."""
    return report.write(document, folder)
