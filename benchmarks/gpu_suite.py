"""Everything that wants a GPU, in one command, without a network and in under 9 minutes:

    python -m benchmarks.gpu_suite --out DIR [--limit SECONDS]

Writes bench.json (raw numbers and every check), table.md, report.html and log.txt into DIR. Each part runs in a process
of its own, so that one which fails, hangs or breaks its CUDA context does not stop the rest; what failed is said at the
end, and the exit code is then 1. A further part is one function and one entry in STAGES.

It may be killed at any time: bench.json is rewritten after every check and every timing, so that a kill loses the item
that was running. SIGTERM ends it as Ctrl-C does, with table and report. `--limit` counts from the start of the process,
a build of the extension included. After an error that spoils the CUDA context a part goes on in a fresh process.

`--reduced` (the default without a GPU) runs the same parts on tiny shapes, Triton's kernels in its interpreter and, if
RETRO_KERNELS_CUDA_EMULATOR names its library, the CUDA C++ kernels in their emulator.

The CUDA C++ extension is the installed one; `--wheel FILE` takes it out of a wheel instead; where there is neither, but
its sources and an nvcc, it is built first (that time is the suite's own, not the parts').
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

LIMIT_SECONDS = 520.0
REDUCED_LIMIT_SECONDS = 900.0
OK, FAILED, SKIPPED, INCOMPLETE, AGAIN = "ok", "failed", "skipped", "incomplete", "again"


EMULATOR = "RETRO_KERNELS_CUDA_EMULATOR"
LIBRARY = "RETRO_KERNELS_CUDA_LIBRARY"


class Skip(Exception):
    """This part has nothing to do here; the message is the reason."""


class Spoilt(Exception):
    """The CUDA context is: the rest of the part needs another process."""


@dataclass
class Context:
    """What a part is given, and where it leaves what it found. Saved after every step, so that a part which is killed
    keeps what it had."""

    reduced: bool
    deadline: float
    """Of time.monotonic(); a part starts nothing new after it."""
    file: Path
    shared: dict
    """Findings of the parts of earlier stages."""
    found: dict = field(default_factory=dict)

    @property
    def device(self):
        import torch

        return torch.device("cpu" if self.reduced else "cuda")

    def seconds_left(self) -> float:
        return self.deadline - time.monotonic()

    def add(self, name: str, *entries: dict) -> None:
        self.found.setdefault(name, []).extend(entries)
        self.save()

    def save(self) -> None:
        from . import results

        results.save(results.finite(self.found), self.file)

    def log(self, text: str) -> None:
        print(text, flush=True)


def machine(context: Context) -> str:
    """Versions and device, copy bandwidth and matrix rates."""
    from . import environment, timing

    context.found["environment"] = environment.collect(context.device)
    context.save()
    dtypes = ["fp32", "bf16"] if context.reduced else ["fp32", "bf16", "fp16"]
    ceilings = timing.measure_ceilings(context.device, dtypes, quick=context.reduced)
    context.found["ceilings"] = ceilings.to_json()
    rates = ", ".join(f"{name} {rate / 1e12:.3g}" for name, rate in ceilings.matrix_flops_per_second.items())
    return f"copy {ceilings.copy_bytes_per_second / 1e9:,.0f} GB/s; matrix {rates} TFLOP/s"


def backend_of(context: Context, name: str = "triton") -> str:
    """The backend whose kernels the checks are for. Skips when it cannot run, with its reason."""
    import retro_kernels as rk

    if name == "cuda" and context.reduced and os.environ.get(EMULATOR):
        from retro_kernels import cuda_extension

        cuda_extension.emulate(Path(os.environ[EMULATOR]))
    state = rk.backends()[name]
    if not state.available:
        raise Skip(f"the {name} backend cannot run here: {state.reason}")
    return name


def checks(context: Context, planned: list[tuple[str, Callable[[], str]]]) -> str:
    """Runs named checks until the time is up; every outcome is kept. Raises when one failed or was not reached."""
    done = {entry["check"] for entry in context.found.get("checks", [])}  # by the process before this one
    for name, check in planned:
        if name in done:
            continue
        if context.seconds_left() < 0:
            break
        done.add(name)
        try:
            entry = {"check": name, "status": OK, "detail": check()}
        except Skip as reason:
            entry = {"check": name, "status": SKIPPED, "detail": str(reason)}
        except Exception as error:
            refused = isinstance(error, ValueError) and "cannot run this" in str(error)  # the backend named its reason
            status, kind = (SKIPPED, "refused") if refused else (FAILED, type(error).__name__)
            entry = {"check": name, "status": status, "detail": f"{kind}: {error}"[:600]}
        context.add("checks", entry)
        context.log(f"{entry['status']:8} {name}: {entry['detail']}")
        if entry["status"] == FAILED and not alive(context):
            raise Spoilt(name)
    failed = sum(entry["status"] == FAILED for entry in context.found.get("checks", []))
    reached = sum(name in done for name, _ in planned)
    if failed:
        raise RuntimeError(f"{failed} of {len(planned)} checks failed: see the report's checks")
    if reached < len(planned):
        raise TimeoutError(f"time for {reached} of {len(planned)} checks only, all of them passed")
    return f"{len(planned)} checks passed"


def alive(context: Context) -> bool:
    """Whether the CUDA context still works."""
    if context.reduced:
        return True
    import torch

    try:
        torch.cuda.synchronize()
        return float(torch.ones(2, device=context.device).sum()) == 2.0
    except Exception:
        return False


def self_checks(context: Context) -> str:
    """What a first call checks by itself (`retro-kernels verify`), for every class of calls that RETRO's own sizes use.
    Its verdicts are what `benchmarks.evidence` ships."""
    import torch

    import retro_kernels as rk
    from retro_kernels.cli.verify import classes
    from retro_kernels.ops import self_check, verification
    from retro_kernels.ops.call_classes import Class

    device = context.device if context.reduced else torch.device("cuda", torch.cuda.current_device())
    # Without a GPU it is tried on the CPU kernels: in Triton's interpreter a class takes minutes.
    names = [name for name in (("cpu",) if context.reduced else ("triton", "cuda")) if rk.backends()[name].available]
    if not names:
        raise Skip("no fused backend can run here")
    small = [Class("chunked_cross_attention", "bfloat16", 64, 64, 64)]
    wanted = [(one, name) for name in names for one in (small if context.reduced else classes(name, False))]
    records = {
        name: {"identity": verification.identity(device, name), "verdicts": {}} for name in names
    }  # fmt: skip
    context.found["verified"] = list(records.values())
    if context.reduced:  # a child process is for what may spoil a CUDA context
        verdicts = (self_check.check_here(*one, device) for one in wanted)
    else:
        verdicts = self_check.check_in_children(wanted, device)
    failed = reached = 0
    for (one, name), verdict in zip(wanted, verdicts):
        reached += 1
        failed += verdict.status == self_check.FAILED
        if verdict.status != self_check.UNKNOWN:
            records[name]["verdicts"][verification.entry_of(one, name)] = verdict.to_json()
            if not context.reduced:
                verification.remember(one, name, device, verdict)
        context.save()
        context.log(f"{verdict.status:8} {name}: {one}: {verdict.detail}")
        if context.seconds_left() < 0:
            break
    if failed:
        raise RuntimeError(f"{failed} of {len(wanted)} classes failed their self-check")
    if reached < len(wanted):
        raise TimeoutError(f"time for {reached} of {len(wanted)} classes only, all of them passed")
    return f"{len(wanted)} classes of calls checked"


def correctness(dtype: str) -> Callable[[Context], str]:
    """All options against the fp64 reference in one precision, then determinism, guard bands and strides."""

    def part(context: Context) -> str:
        from . import gpu_checks as c

        if context.reduced and dtype == "bf16":
            raise Skip("Triton's interpreter computes bf16 wrongly; fp32 and fp16 are checked")
        backend, device = backend_of(context), context.device
        cases = c.cases(context.reduced)
        full = cases[1]
        planned = [
            (f"{dtype} deterministic",
             lambda: c.check_deterministic(full, dtype, device, backend, 2 if context.reduced else 20)),
            (f"{dtype} guard bands", lambda: c.check_guard_bands(full, dtype, device, backend)),
            (f"{dtype} odd strides", lambda: c.check_strides(dtype, device, backend, full)),
        ]  # fmt: skip
        # Of the other operations, too: parameter gradients are sums over groups, which have to be of a fixed order.
        for operation in ("self", "cross"):
            own = [case for case in cases if case.operation == operation]
            case = next((case for case in own if "dropout" in case.name and "relative" in case.options), own[0])
            planned += [
                (f"{dtype} deterministic, {case.name}",
                 functools.partial(c.check_deterministic, case, dtype, device, backend, 2 if context.reduced else 20)),
                (f"{dtype} guard bands, {case.name}",
                 functools.partial(c.check_guard_bands, case, dtype, device, backend)),
            ]  # fmt: skip
        for case in cases:
            planned.append((f"{dtype} {case.name}", functools.partial(c.check_case, case, dtype, device, backend)))
        return checks(context, planned)

    return part


def execution(context: Context) -> str:
    """CUDA graphs, a second stream, torch.compile with a full graph, and which probabilities dropout keeps."""
    from . import gpu_checks as c

    backend, device = backend_of(context), context.device
    case = c.cases(context.reduced)[1]

    def on_gpu(check: Callable[[], str]) -> Callable[[], str]:
        def run() -> str:
            if context.reduced:
                raise Skip("there is no CUDA device")
            return check()

        return run

    compiler = "aot_eager" if context.reduced else "inductor"
    sizes = {"b": 1, "n": 21, "m": 8, "r": 16, "h": 2, "hk": 1, "d": 16} if context.reduced else {}
    dropout_masks = [
        (f"dropout mask, {operation}",
         functools.partial(c.check_dropout_mask, c.Case("", operation, **sizes), device, backend))
        for operation in ("cca", "self", "cross")
    ]  # fmt: skip
    return checks(
        context,
        [
            ("CUDA graph", on_gpu(lambda: c.check_cuda_graph(case, device, backend))),
            ("second stream", on_gpu(lambda: c.check_second_stream(case, device, backend))),
            (f"torch.compile, {compiler}", lambda: c.check_compiled(case, device, backend, compiler)),
            *dropout_masks,
        ],
    )


def cuda_correctness(dtype: str) -> Callable[[Context], str]:
    """The CUDA C++ kernels through the same checks as Triton's, in every case that they take."""

    def part(context: Context) -> str:
        from retro_kernels import cuda_extension

        from . import gpu_checks as c

        backend, device = backend_of(context, "cuda"), context.device
        cases, trials = c.cuda_cases(context.reduced), 2 if context.reduced else 20
        ops = cuda_extension.ops(c.torch.empty(0, device=device))
        full, planned = cases[1], []

        def with_kernels(name: str, check: Callable[..., str], *arguments) -> Callable[[], str]:
            def run() -> str:
                ops.set_kernels(name)
                return check(*arguments)

            return run

        for name in c.cuda_kernel_names(device):
            checks_of = [
                (full, "deterministic", c.check_deterministic, (full, dtype, device, backend, trials)),
                (full, "guard bands", c.check_guard_bands, (full, dtype, device, backend)),
                (full, "odd strides", c.check_strides, (dtype, device, backend, full)),
            ]
            for operation in ("self", "cross"):
                case = next(case for case in cases if case.operation == operation)
                checks_of += [
                    (case, "deterministic", c.check_deterministic, (case, dtype, device, backend, trials)),
                    (case, "guard bands", c.check_guard_bands, (case, dtype, device, backend)),
                ]
            checks_of += [(case, "", c.check_case, (case, dtype, device, backend)) for case in cases]
            planned += [
                (f"{name} {dtype} {case.name}{', ' if what else ''}{what}", with_kernels(name, check, *arguments))
                for case, what, check, arguments in checks_of
            ]
        return checks(context, planned)

    return part


def cuda_execution(context: Context) -> str:
    """The CUDA C++ kernels in CUDA graphs, on a second stream, under torch.compile, on more than 2^31 elements."""
    from . import gpu_checks as c

    backend, device = backend_of(context, "cuda"), context.device
    case = c.cuda_cases(context.reduced)[1]
    compiler = "aot_eager" if context.reduced else "inductor"
    planned = [(f"cuda, torch.compile, {compiler}", lambda: c.check_compiled(case, device, backend, compiler, "bf16"))]
    if not context.reduced:
        planned += [
            ("cuda, CUDA graph", lambda: c.check_cuda_graph(case, device, backend)),
            ("cuda, second stream", lambda: c.check_second_stream(case, device, backend)),
        ]
        if c.torch.cuda.mem_get_info()[0] > 36 << 30:
            planned.append(("cuda, more than 2^31 elements", lambda: c.check_beyond_int32(device, backend)))
    return checks(context, planned)


def decoding(name: str = "triton") -> Callable[[Context], str]:
    """Both decode operations: all options and caches against the fp64 reference, guard bands, the border, CUDA graphs
    without any synchronisation. What the backend refuses is skipped with its reason."""

    def part(context: Context) -> str:
        from . import gpu_decode as c

        backend, device, cases = backend_of(context, name), context.device, c.cases(context.reduced)
        dtypes = ("fp32",) if context.reduced else ("fp32", "fp16", "bf16")
        planned = [
            (f"{name} {dtype} {case.name}", functools.partial(c.check_case, case, dtype, device, backend))
            for dtype in dtypes
            for case in cases
        ]
        for case in (cases[1], next(case for case in cases if case.e is not None)):
            memory = functools.partial(c.check_memory, case, "fp32", device, backend)
            planned.append((f"{name} guard bands, {case.name}", memory))
            if not context.reduced:
                graph = functools.partial(c.check_cuda_graph, case, device, backend)
                planned.append((f"{name} CUDA graph, {case.name}", graph))
        if not context.reduced:
            planned.append((f"{name} decode, border", functools.partial(c.check_border, cases[0], device, backend)))
        return checks(context, planned)

    return part


def absorbing(name: str = "triton") -> Callable[[Context], str]:
    """Projected chunked cross-attention, absorbed: all options (and, where the backend has them, gradients) against the
    fp64 reference, determinism, guard bands, a CUDA graph."""

    def part(context: Context) -> str:
        from . import gpu_checks as c

        backend, device = backend_of(context, name), context.device
        cases = c.cuda_projected_cases(context.reduced) if name == "cuda" else c.projected_cases(context.reduced)
        dtypes = ("fp32",) if context.reduced else ("bf16", "fp32", "fp16")
        if name == "cuda":
            dtypes = ("bf16", "fp16")
        planned = [
            (f"{name} {dtype} {case.name}", functools.partial(c.check_case, case, dtype, device, backend))
            for dtype in dtypes
            for case in cases
        ]
        full, trials = cases[1], 2 if context.reduced else 20
        planned += [
            (f"{name} deterministic, {full.name}",
             lambda: c.check_deterministic(full, dtypes[0], device, backend, trials)),
            (f"{name} guard bands, {full.name}", lambda: c.check_guard_bands(full, dtypes[0], device, backend)),
        ]  # fmt: skip
        if not context.reduced:
            planned.append((f"{name} CUDA graph, {full.name}", lambda: c.check_cuda_graph(full, device, backend)))
        return checks(context, planned)

    return part


def beyond_int32(context: Context) -> str:
    """Tensors of more than 2^31 elements."""
    from . import gpu_checks as c

    if context.reduced:
        raise Skip("needs about 40 GB of GPU memory")
    import torch

    backend = backend_of(context)
    free, _ = torch.cuda.mem_get_info()
    if free < 36 << 30:
        raise Skip(f"needs about 36 GiB of free GPU memory, {free / 2**30:.0f} are free")
    return checks(context, [("more than 2^31 elements", lambda: c.check_beyond_int32(context.device, backend))])


def sanitized(tool: str, name: str = "triton") -> Callable[[Context], str]:
    """Every kernel of a backend once under one tool of NVIDIA's compute-sanitizer."""

    def part(context: Context) -> str:
        if context.reduced:
            raise Skip("there is no CUDA device")
        program = shutil.which("compute-sanitizer") or shutil.which(
            "compute-sanitizer", path=os.pathsep.join(("/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer"))
        )
        if program is None:
            raise Skip("compute-sanitizer is not installed (it is part of the CUDA toolkit)")
        backend = backend_of(context, name)
        package = __package__ or "benchmarks"
        command = [program, "--tool", tool, "--error-exitcode", "9", "--launch-timeout", "120"]
        if tool == "initcheck":
            command += ["--kernel-name", "regex:.*(attention|forward|backward|attend|combine).*"]
        # torch's caching allocator would hide what lies beyond a tensor.
        variables = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "RETRO_KERNELS_BACKEND": backend}
        seconds = max(1.0, context.seconds_left())
        try:
            done = subprocess.run([*command, sys.executable, "-m", f"{package}.gpu_checks"], env=variables,
                                  capture_output=True, text=True, timeout=seconds)  # fmt: skip
        except subprocess.TimeoutExpired as error:
            raise TimeoutError(f"{tool} did not finish within {seconds:.0f} s") from error
        context.log((done.stdout + done.stderr)[-20_000:])
        summary = [line for line in done.stdout.splitlines() if "ERROR SUMMARY" in line or "RACECHECK SUMMARY" in line]
        detail = "; ".join(line.strip("= ") for line in summary) or f"exit code {done.returncode}, no summary"
        entry = {
            "check": f"compute-sanitizer {tool}, {backend}",
            "status": FAILED if done.returncode else OK,
            "detail": detail,
        }
        context.add("checks", entry)
        if done.returncode:
            raise RuntimeError(f"{tool}: {detail}: see log.txt")
        return detail

    return part


def benchmarks(context: Context) -> str:
    """The workloads of design section 6 against SDPA, FlexAttention and torch.compile."""
    from . import peers, suite, timing
    from .workloads import (
        CAUSAL_SELF,
        CCA,
        ENCODER_CROSS,
        ENCODER_SELF,
        MODES,
        OPTIONS,
        PLAIN,
        RELATIVE,
        Workload,
        select,
    )  # fmt: skip

    ceilings = context.shared.get("ceilings")
    if ceilings is None:
        raise Skip("there are no ceilings: the part 'machine' failed")
    known = list(ceilings["matrix_flops_per_second"])

    def in_time(workloads: list[Workload]) -> Iterator[Workload]:
        for workload in workloads:
            if context.seconds_left() < 0:
                what = f"{workload.operation} {workload.option} {workload.name}"
                context.add("skipped", {"what": what, "reason": "the suite's time was used up"})
            else:
                yield workload

    class Keep:
        def case(self, text: str) -> None:
            context.log(text)

        def step(self, text: str) -> None:
            pass

        def row(self, row: suite.Row) -> None:
            context.add("rows", row.to_json())
            took = f"{row.p50_ms:.4f} ms" if row.p50_ms is not None else row.reason
            context.log(f"  {row.dtype} {row.mode} {row.variant}: {row.status} {took}")

    # What matters most comes first, in case the time ends.
    encoder = [ENCODER_SELF, ENCODER_CROSS]
    first = [
        *select(["retro-425m"], [CCA], [PLAIN, RELATIVE]), *select(["encoder-896"], encoder, list(OPTIONS)),
        *select(["retro-172m"], [CCA], list(OPTIONS)), *select(["retro-172m"], [CAUSAL_SELF], [PLAIN, RELATIVE]),
    ]  # fmt: skip
    rest = [workload for workload in select() if workload not in first]
    rounds: list[tuple[list[Workload], list[str], float]] = (
        [(select(["tiny"], [CCA, ENCODER_CROSS], [PLAIN]), ["fp32"], 0.1)]
        if context.reduced
        else [
            (first, ["bf16"], 0.55),
            (rest, ["bf16"], 0.3),
            (select(["retro-172m", "encoder-896"], [CCA, *encoder], [PLAIN]),
             [name for name in ("fp16", "fp32") if name in known], 0.15),
        ]
    )  # fmt: skip
    compile_seconds = 0.5 * context.seconds_left()
    for workloads, dtypes, share in rounds:
        settings = suite.Settings(
            device=context.device,
            dtypes=dtypes,
            modes=MODES,
            protocol=timing.Protocol(seconds=0.3 if context.reduced else 0.8, min_rounds=3, max_rounds=100),
            budget=peers.CompileBudget(compile_seconds * share, 20.0),
            compiled=not context.reduced,
            backends=["triton", "cuda"] if not context.reduced else None,  # side by side, in the same rounds
        )
        suite.run(in_time(workloads), settings, timing.Ceilings(**ceilings), Keep())
    rows = context.found.get("rows", [])
    bad = [row for row in rows if row["status"] in ("wrong", "failed")]
    timed = sum(row["status"] == "ok" for row in rows)
    if any(row["variant"].startswith("retro_kernels") for row in bad):
        names = {f"{row['workload']} {row['dtype']} {row['mode']}: {row['reason']}" for row in bad}
        raise RuntimeError("; ".join(sorted(names))[:600])
    return f"{timed} rows timed, {len(bad)} of the alternatives failed or were wrong"


def real_text(context: Context) -> str:
    """A retro-pytorch model on real text, with and without rk.swap, where its packages are there."""
    from . import real_text as real
    from . import timing

    small = dict(real.README, max_seq_len=256, enc_dim=64, enc_depth=1, dec_dim=64, dec_depth=2, heads=2,
                 dec_cross_attn_layers=(1, 2))  # fmt: skip

    def keep(report: real.Report) -> None:
        reports.append(report)

    reports: list[real.Report] = []
    if not context.reduced:
        os.environ["RETRO_KERNELS_BACKEND"] = backend_of(context)  # not the default choice until a GPU verified it
    try:
        report = real.run(
            context.device,
            length=128 if context.reduced else 2048,
            dtypes=["fp32"] if context.reduced else ["fp32", "bf16"],
            protocol=timing.Protocol(seconds=0.5 if context.reduced else 10.0, min_rounds=2, max_rounds=20),
            characters=4_000 if context.reduced else None,
            step=context.log,
            configuration=small if context.reduced else None,
            report=keep,
        )
    except real.Unavailable as error:
        raise Skip(str(error)) from error
    finally:
        if reports:
            context.found["real_text"] = reports[0].to_json()
            context.save()
    wrong = [comparison.worst for comparison in report.comparisons if not comparison.passed]
    if wrong:
        raise RuntimeError(f"the swapped model differs: {wrong[0]}")
    return f"{len(report.rows)} rows timed, all comparisons passed"


@dataclass(frozen=True)
class Part:
    """One section of the suite: a function, and the most seconds it may take. Reduced it may take four times as long:
    that is for tests, which share a few cores and judge no speed."""

    name: str
    run: Callable[[Context], str]
    seconds: float
    absent: Callable[[bool], str | None] = lambda reduced: None
    """Given `reduced`: why the part has nothing to do, where that is known without starting a process for it."""


def _no_device(reduced: bool) -> str | None:
    return "there is no CUDA device" if reduced else None


def _no_kernels(reduced: bool) -> str | None:
    if reduced and not os.environ.get(EMULATOR):
        return f"there is no CUDA device, and {EMULATOR} names no library"
    return None


# The parts of one stage run side by side (checks do not mind company); stages run one after another.
STAGES: tuple[tuple[Part, ...], ...] = (
    (Part("machine", machine, 60),),
    (
        Part("self-check", self_checks, 150),
        Part("correctness fp32", correctness("fp32"), 150),
        Part("correctness fp16", correctness("fp16"), 150),
        Part("correctness bf16", correctness("bf16"), 150),
        Part("execution", execution, 120),
        Part("decoding", decoding(), 120),
        Part("absorbing", absorbing(), 150),
        Part("beyond 2^31 elements", beyond_int32, 100),
        Part("sanitizer memcheck", sanitized("memcheck"), 150, _no_device),
        Part("sanitizer racecheck", sanitized("racecheck"), 150, _no_device),
        Part("sanitizer initcheck", sanitized("initcheck"), 150, _no_device),
        Part("cuda correctness bf16", cuda_correctness("bf16"), 150, _no_kernels),
        Part("cuda correctness fp16", cuda_correctness("fp16"), 150, _no_kernels),
        Part("cuda execution", cuda_execution, 120, _no_kernels),
        Part("cuda decoding", decoding("cuda"), 120, _no_kernels),
        Part("cuda absorbing", absorbing("cuda"), 120, _no_kernels),
        Part("cuda sanitizer memcheck", sanitized("memcheck", "cuda"), 150, _no_device),
        Part("cuda sanitizer racecheck", sanitized("racecheck", "cuda"), 150, _no_device),
        Part("cuda sanitizer initcheck", sanitized("initcheck", "cuda"), 150, _no_device),
    ),
    (Part("benchmarks", benchmarks, 270),),
    (Part("real text", real_text, 70),),
)
GRACE_SECONDS = 12.0  # between a part's deadline and its end by force


def parts() -> dict[str, Part]:
    return {part.name: part for stage in STAGES for part in stage}


def run_part(name: str, work: Path, seconds: float, reduced: bool) -> int:
    """In the part's own process: runs it and writes its findings, its status and its detail. What a process before this
    one has found is kept and not done again."""
    began = time.monotonic()
    shared_file = work / "shared.json"
    shared = json.loads(shared_file.read_text()) if shared_file.exists() else {}
    file = _file(work, name)
    found = json.loads(file.read_text()) if file.exists() else {}
    before = (found.pop("part", None) or {}).get("seconds", 0.0)
    context = Context(reduced, began + seconds, file, shared, found)
    try:
        status, detail = OK, parts()[name].run(context)
    except Skip as reason:
        status, detail = SKIPPED, str(reason)
    except TimeoutError as error:
        status, detail = INCOMPLETE, str(error)
    except Spoilt as error:
        status, detail = AGAIN, f"{error} spoilt the CUDA context"
    except BaseException as error:
        traceback.print_exc()
        status, detail = FAILED, f"{type(error).__name__}: {error}"[:600]
    context.found["part"] = {
        "name": name, "status": status, "detail": detail, "seconds": round(before + time.monotonic() - began, 1)
    }  # fmt: skip
    context.save()
    return 0


def _file(work: Path, name: str) -> Path:
    return work / (name.replace(" ", "-").replace("^", "") + ".json")


def _start(part: Part, work: Path, seconds: float, reduced: bool) -> subprocess.Popen:
    package = __package__ or "benchmarks"
    variables = {**os.environ, "PYTHONUNBUFFERED": "1"}
    root = Path(__file__).resolve().parents[1 + package.count(".")]
    variables["PYTHONPATH"] = os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH"))))
    if reduced:
        variables |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", f"{package}.gpu_suite", "--part", part.name, "--work", str(work),
               "--seconds", str(seconds)]  # fmt: skip
    log = (work / "log.txt").open("a")
    log.write(f"\n== {part.name}\n")
    log.flush()
    return subprocess.Popen(
        [*command, "--reduced" if reduced else "--full"], stdout=log, stderr=subprocess.STDOUT, env=variables
    )


def prepare_extension(
    wheel: Path | None, folder: Path, reduced: bool, say: Callable[[str], None], seconds: float = 600.0
) -> None:
    """Sees to it that the parts find a CUDA C++ extension, if there can be one: see the module's docstring. Raises
    ValueError for a wheel without one; a build that fails is said and the parts skip with the reason."""
    from retro_kernels import cuda_extension

    if wheel is not None:
        with zipfile.ZipFile(wheel) as archive:
            name = f"retro_kernels/{cuda_extension.LIBRARY.name}"
            if name not in archive.namelist():
                raise ValueError(f"{wheel} has no {name}: make it with RETRO_KERNELS_BUILD_CUDA=1")
            os.environ[LIBRARY] = archive.extract(name, folder)
        say(f"CUDA extension: from {wheel.name}")
        return
    setup = Path(__file__).resolve().parents[1] / "setup.py"
    if reduced or cuda_extension.LIBRARY.exists() or not setup.exists():
        return
    say("CUDA extension: building it")
    variables = {**os.environ, "RETRO_KERNELS_BUILD_CUDA": "1", "RETRO_KERNELS_BUILD_CPU": "0"}
    began = time.monotonic()
    try:
        done = subprocess.run([sys.executable, str(setup), "build_ext", "--inplace"], cwd=setup.parent, env=variables,
                              capture_output=True, text=True, timeout=seconds)  # fmt: skip
    except subprocess.TimeoutExpired:
        say(f"CUDA extension: not built within {seconds:.0f} s")
        return
    took = f"{time.monotonic() - began:.0f} s"
    say(f"CUDA extension: built in {took}" if done.returncode == 0 else f"CUDA extension: {done.stderr[-2000:]}")


def run(
    out: Path, reduced: bool, only: list[str] | None = None, say: Callable[[str], None] = print,
    limit: float | None = None, spent: float = 0.0,
) -> int:  # fmt: skip
    """The whole suite; returns the exit code. `only`: names of the parts to run. It ends `limit` seconds after the
    process began, which was `spent` seconds ago."""
    from . import report, results

    began = time.monotonic() - spent
    limit = limit or (REDUCED_LIMIT_SECONDS if reduced else LIMIT_SECONDS)
    document = results.new({}, {"suite": "gpu_suite", "reduced": reduced, "limit_seconds": limit})
    document |= {"checks": [], "verified": []}
    work = out / "parts"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    recorder = Recorder(document, out / results.FILE, work, began)
    try:
        for stage in STAGES:
            _run_stage([p for p in stage if not only or p.name in only], began + limit, reduced, recorder, say)
    except KeyboardInterrupt:
        document["interrupted"] = True
    document["seconds"] = round(time.monotonic() - began, 1)
    log = (work / "log.txt").read_text(errors="replace") if (work / "log.txt").exists() else ""
    document["environment"] = document["environment"] or _unknown_environment()
    (out / "log.txt").write_text(log[-2_000_000:])
    try:
        report.write(document, out)
    except Exception:
        document["parts"].append({"name": "report", "status": FAILED, "detail": traceback.format_exc(), "seconds": 0.0})
        results.save(results.finite(document), out / results.FILE)
    shutil.rmtree(work, ignore_errors=True)
    failed = [part for part in document["parts"] if part["status"] in (FAILED, INCOMPLETE)]
    say(f"\n{document['seconds']:.0f} s. " + (f"{len(failed)} parts failed:" if failed else "No part failed."))
    for part in failed:
        say(f"  {part['name']}: {part['status']}: {part['detail']}")
    for entry in document["checks"]:
        if entry["status"] == FAILED:
            say(f"    {entry['check']}: {entry['detail']}")
    say(str(out))
    return 1 if failed or document["interrupted"] else 0


@dataclass
class Recorder:
    """Keeps the results' file true to what the parts have left so far."""

    document: dict
    file: Path
    work: Path
    began: float
    seen: dict[str, int] = field(default_factory=dict)

    def look(self, running: list[Part]) -> None:
        """Rewrites the results when a running part has left something new."""
        times = {part.name: _file(self.work, part.name).stat().st_mtime_ns
                 for part in running if _file(self.work, part.name).exists()}  # fmt: skip
        if any(self.seen.get(name) != changed for name, changed in times.items()):
            self.seen |= times
            self.write(running)

    def write(self, running: list[Part]) -> None:
        """The results as they are, as if the suite had been interrupted now."""
        from . import results

        document = {**self.document, "interrupted": True, "seconds": round(time.monotonic() - self.began, 1)}
        for name in ("parts", *LISTS):
            document[name] = list(document[name])
        for part in running:
            _add(document, part, _found(self.work, part), "it was running")
        document["environment"] = document["environment"] or _unknown_environment()
        results.save(results.finite(document), self.file)


LISTS = ("rows", "skipped", "checks", "verified")


def _found(work: Path, part: Part) -> dict:
    file = _file(work, part.name)
    return json.loads(file.read_text()) if file.exists() else {}


def _run_stage(stage: list[Part], end: float, reduced: bool, recorder: Recorder, say) -> None:
    document, work = recorder.document, recorder.work
    running: dict[str, tuple[Part, subprocess.Popen, float]] = {}
    for part in stage:
        if reason := part.absent(reduced):
            document["parts"].append({"name": part.name, "status": SKIPPED, "detail": reason, "seconds": 0.0})
            document["skipped"].append({"what": part.name, "reason": reason})
            say(f"{part.name}: {SKIPPED}: {reason}")
            continue
        left = end - time.monotonic() - GRACE_SECONDS
        seconds = min(4 * part.seconds if reduced else part.seconds, left)
        if seconds < 5:
            document["parts"].append(
                {"name": part.name, "status": INCOMPLETE, "detail": "the suite's time was used up", "seconds": 0.0}
            )
            say(f"{part.name}: the suite's time was used up")
            continue
        until = time.monotonic() + seconds + GRACE_SECONDS
        running[part.name] = (part, _start(part, work, seconds, reduced), until)
    recorder.write([part for part, _, _ in running.values()])
    try:
        while running:
            for name, (part, process, until) in list(running.items()):
                if process.poll() is None and time.monotonic() > until:
                    process.kill()
                    process.wait()
                if process.poll() is None:
                    continue
                left = until - time.monotonic() - GRACE_SECONDS
                if (_found(work, part).get("part") or {}).get("status") == AGAIN and left >= 5:
                    say(f"{name}: goes on in a fresh process: {_found(work, part)['part']['detail']}")
                    running[name] = (part, _start(part, work, left, reduced), until)
                    continue
                del running[name]
                _merge(part, process, work, document, say)
                recorder.write([part for part, _, _ in running.values()])
            recorder.look([part for part, _, _ in running.values()])
            time.sleep(0.2)
    finally:
        for part, process, _ in running.values():
            process.kill()
            process.wait()
            _merge(part, process, work, document, say)
    (work / "shared.json").write_text(json.dumps({"ceilings": document["ceilings"]}))


def _merge(part: Part, process: subprocess.Popen, work: Path, document: dict, say) -> None:
    """A part's findings into the document; a part that left no verdict was killed or crashed."""
    why = f"its process ended with {process.poll()} before it was done (see log.txt)"
    verdict = _add(document, part, _found(work, part), why)
    if verdict["status"] == SKIPPED:
        document["skipped"].append({"what": part.name, "reason": verdict["detail"]})
    say(f"{part.name}: {verdict['status']} in {verdict['seconds']:.0f} s: {verdict['detail']}")


def _add(document: dict, part: Part, found: dict, why: str) -> dict:
    """A part's findings, and its verdict: failed for this reason where it left none."""
    verdict = found.pop("part", None) or {}
    if verdict.get("status") in (None, AGAIN):
        seconds = verdict.get("seconds", part.seconds)
        verdict = {"name": part.name, "status": FAILED, "seconds": seconds, "detail": verdict.get("detail", why)}
    document["parts"].append(verdict)
    for name in LISTS:
        document[name] += found.get(name, [])
    for name in ("environment", "ceilings", "real_text"):
        if found.get(name):
            document[name] = found[name]
    return verdict


def _unknown_environment() -> dict:
    return {"device": "unknown", "device_slug": "unknown", "date": "", "commit": None, "packages": {}}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.gpu_suite", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("gpu-report"), help="folder for the results")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--reduced", action="store_true", help="tiny shapes on the CPU (the default without a GPU)")
    size.add_argument("--full", action="store_true", help="the real thing (the default with a GPU)")
    parser.add_argument("--only", action="append", metavar="PART", help="run this part; may be repeated")
    parser.add_argument("--limit", type=float, metavar="SECONDS", help="of the whole run, builds included")
    parser.add_argument("--wheel", type=Path, metavar="FILE", help="take the CUDA extension out of this wheel")
    parser.add_argument("--list", action="store_true", help="print the names of the parts")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=60.0, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.list:
        print("\n".join(parts()))
        return 0
    unknown = [name for name in options.only or [] if name not in parts()]
    if unknown:
        parser.error(f"--only: unknown part {unknown[0]!r}; there are: {', '.join(parts())}")
    if options.part:
        return run_part(options.part, options.work, options.seconds, options.reduced)
    reduced = options.reduced
    if not options.full and not reduced:
        import torch

        reduced = not torch.cuda.is_available()
    signal.signal(signal.SIGTERM, _interrupt)
    with tempfile.TemporaryDirectory() as folder:
        try:
            limit = options.limit or (REDUCED_LIMIT_SECONDS if reduced else LIMIT_SECONDS)
            prepare_extension(options.wheel, Path(folder), reduced, print, max(1.0, 0.6 * limit - since_start()))
        except (ValueError, OSError, zipfile.BadZipFile) as error:
            parser.error(f"--wheel: {error}")
        return run(options.out, reduced, options.only, limit=options.limit, spent=since_start())


def _interrupt(*_) -> None:
    raise KeyboardInterrupt


def since_start() -> float:
    """Seconds since this process began, as far as the system tells."""
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        up = float(Path("/proc/uptime").read_text().split()[0])
        return max(0.0, up - int(fields[19]) / os.sysconf("SC_CLK_TCK"))
    except (OSError, ValueError, IndexError):
        return 0.0


if __name__ == "__main__":
    sys.exit(main())
