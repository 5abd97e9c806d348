"""The GPU suite in the time there is, in one command and without a network:

    python -m benchmarks.gpu --out DIR [--limit SECONDS] [--resume RESULTS] [PART ...]

Its checks are pytest's tests with the mark `gpu` (tests/gpu and others; `pytest -m gpu` runs them all). This command
puts them and the timings into an order: a smoke test and two timings in the first minute, correctness by importance,
then tables. `--list` prints the parts; each can be run alone, by its name or its group's; the sanitizers only so.

Into DIR go items.jsonl (a line when anything begins and when it ends), bench.json (all results; rewritten after every
check and every timing), log.txt, and at the end table.md and report.html. So a kill loses the item that was running.
SIGTERM ends it as Ctrl-C does, with table and report. `--limit` counts from the start of the process, a build of the
extension included. Every part runs in a process of its own; after an error that spoils the CUDA context, or a crash,
the rest of the part runs in a fresh one. `--resume RESULTS` (a former DIR, or its items.jsonl) goes on where that run
stopped.

A kit (`make gpu-kit`, in .gpu-kit/) brings the CUDA extension and compiled Triton kernels. Without one the extension is
built first, where there is an nvcc. `--wheel FILE` takes it out of a wheel.

Without a GPU the same parts run reduced, on the CPU's kernels.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
import traceback
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

from retro_kernels.bench import results

from . import gpu_kit
from .gpu_part import AGAIN, DONE, FAILED, LATE, OK, SKIPPED

LIMIT_SECONDS = 520.0
INCOMPLETE = "incomplete"
GRACE_SECONDS = 12.0  # between a part's deadline and its end by force
ROOT = Path(__file__).resolve().parents[1]
ITEMS, LOG = "items.jsonl", "log.txt"
CASES, EXECUTION = "tests/gpu/test_gpu_cases.py", "tests/gpu/test_gpu_execution.py"


@dataclass(frozen=True)
class Part:
    """Tests (what pytest is given, the first words their paths) or a function, and the most seconds they may take."""

    name: str
    group: str
    seconds: float
    tests: tuple[str, ...] = ()
    function: str = ""


def stages(targets: tuple[str, ...]) -> list[list[Part]]:
    """In order. The parts of one stage run side by side: checks do not mind company, timings do. A further part is a
    line here: tests with the mark `gpu`, or a function that is given a `gpu_part.Record`."""

    def cases(words: str) -> tuple[str, ...]:
        return (CASES, "-k", words)

    def correct(dtypes: tuple[str, ...], seconds: float) -> list[Part]:
        return [
            Part(f"{target} {dtype} {kind}", "correctness", seconds, cases(f"test_case and {target}-{dtype}-{kind}"))
            for dtype in dtypes
            for target in targets
            for kind in ("attention", "absorb", "decode")
            if not (dtype == "fp32" and target.startswith("cuda") and kind != "decode")
            and not (target == "cuda-sm80" and kind == "absorb")
        ]

    timings = "benchmarks.gpu_timings"
    small = (
        "tests/ops/attention/test_conformance.py",
        "tests/ops/attention/test_dropout.py",
        "tests/ops/attention/test_compile.py",
        "-m",
        "gpu",
    )
    return [
        [Part("smoke", "correctness", 45, cases("test_smoke"))],
        [Part("headline", "timings", 45, function=f"{timings}:headline")],
        [*correct(("bf16",), 100), Part("self-check", "correctness", 120, function=f"{timings}:self_check")],
        [
            *(Part(f"{target} execution", "execution", 100, (EXECUTION, "-k", target)) for target in targets),
            *correct(("fp16", "fp32"), 100),
        ],
        [Part("small cases", "correctness", 100, small)],
        [Part("retrieval correctness", "retrieval", 45, ("tests/retrieval/test_gpu_search.py", "-m", "gpu"))],
        [Part("retrieval timings", "retrieval", 90, function="benchmarks.retrieval_gpu:run")],
        [Part("tables", "timings", 270, function=f"{timings}:tables")],
        [Part("real text", "timings", 70, function=f"{timings}:real_text")],
    ]


def sanitizers(targets: tuple[str, ...]) -> list[Part]:
    return [
        Part(f"{target} {tool}", "sanitizers", 550, ("tests/gpu/test_gpu_sanitizer.py", "-k", f"{tool}-{target}]"))
        for tool in ("memcheck", "racecheck", "initcheck")
        for target in targets
    ]


def chosen(wanted: list[str], targets: tuple[str, ...]) -> list[list[Part]]:
    """The stages of the parts and groups that are named, or all but the sanitizers. ValueError for an unknown name."""
    every = [*stages(targets), sanitizers(targets)]
    if not wanted:
        return every[:-1]
    known = {name for stage in every for part in stage for name in (part.name, part.group)}
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise ValueError(f"got the part {unknown[0]!r}, expected one of: {', '.join(sorted(known))}")
    return [[part for part in stage if {part.name, part.group} & set(wanted)] for stage in every]


def targets_here(reduced: bool) -> tuple[str, ...]:
    """Whose kernels this machine runs, by the names of tests/gpu/gpu_problems.py."""
    if reduced:
        return ("cpu",)
    import torch

    return ("triton", *(("cuda-sm90",) if torch.cuda.get_device_capability() == (9, 0) else ()), "cuda-sm80")


def identity(reduced: bool) -> dict:
    """What must agree for two runs to be parts of one."""
    import platform

    import torch

    from retro_kernels import machine
    from retro_kernels.bench import environment

    return {
        "device": environment.device_name("cpu" if reduced else "cuda"),
        "reduced": reduced,
        "torch": torch.__version__,
        "triton": machine.package_version("triton"),
        "python": platform.python_version(),
        "sources": gpu_kit.source_hash(),
    }


@dataclass
class Items:
    """items.jsonl, and the document that it amounts to."""

    folder: Path
    settings: dict
    began: float
    order: list[str] = field(default_factory=list)
    interrupted: bool = True

    @property
    def file(self) -> Path:
        return self.folder / ITEMS

    def entries(self) -> list[dict]:
        return read(self.file)

    def size(self) -> int:
        return self.file.stat().st_size

    def document(self) -> dict:
        """Of what stands there now; a part that runs is incomplete."""
        entries = self.entries()
        document = results.new({}, self.settings) | {"checks": [], "verified": [], "retrieval": []}
        document["interrupted"] = self.interrupted
        ended = last_outcomes(entries)
        for (part, name), entry in ended.items():
            document["checks"].append(
                {"check": f"{part}: {name}", **{key: entry[key] for key in ("status", "detail", "seconds")}}
            )
            document["rows"] += entry.get("rows", [])
            document["retrieval"] += entry.get("retrieval", [])
            _merge_verdicts(document["verified"], entry.get("verified"))
            for key in ("environment", "ceilings", "real_text"):
                if entry.get(key):
                    document[key] = entry[key]
        states = {entry["part"]: entry["state"] for entry in entries if "state" in entry}
        running = dict.fromkeys(entry["part"] for entry in entries if entry.get("part"))
        for name in dict.fromkeys([*self.order, *running]):
            state = states.get(name) or {"status": INCOMPLETE, "detail": "it was not finished", "seconds": 0.0}
            document["parts"].append({"name": name, **state})
        document["environment"] = document["environment"] or {
            "device": "unknown",
            "device_slug": "unknown",
            "date": "",
            "commit": None,
            "packages": {},
        }
        document["seconds"] = round(time.monotonic() - self.began, 1)
        return document

    def save(self) -> None:
        results.save(results.finite(self.document()), self.folder / results.FILE)

    def add(self, **entry: object) -> None:
        with self.file.open("ab") as stream:
            stream.write((json.dumps(entry) + "\n").encode())


def read(file: Path) -> list[dict]:
    """The whole lines of an items.jsonl: of a suite that was killed the last may be cut off."""
    lines = file.read_bytes().split(b"\n")[:-1]
    found = []
    for line in lines:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def last_outcomes(entries: list[dict]) -> dict[tuple[str, str], dict]:
    """(part, item) -> its outcome, of those that have one."""
    return {(entry["part"], entry["item"]): entry for entry in entries if "item" in entry and "status" in entry}


def _merge_verdicts(records: list[dict], found: dict | None) -> None:
    """One record an identity."""
    if not found:
        return
    for record in records:
        if record["identity"] == found["identity"]:
            record["verdicts"] |= found["verdicts"]
            return
    records.append({"identity": found["identity"], "verdicts": dict(found["verdicts"])})


def resume(source: Path, target: Path, mine: dict) -> None:
    """Starts `target` with what a former run has finished. ValueError where that was a run of something else."""
    source = source / ITEMS if source.is_dir() else source
    if not source.exists():
        raise ValueError(f"--resume: {source} does not exist, expected the folder of a former run or its {ITEMS}")
    entries = read(source)
    before = next((entry["identity"] for entry in entries if "identity" in entry), None)
    if before != mine:
        other = {key: (before or {}).get(key) for key in mine if (before or {}).get(key) != mine[key]}
        raise ValueError(f"--resume: {source} is of another run ({other}), expected { ({k: mine[k] for k in other}) }")
    kept = [*last_outcomes(entries).values(), *(entry for entry in entries if "state" in entry)]
    fresh = target.with_name(f"{target.name}.new")
    fresh.write_text("".join(json.dumps(entry) + "\n" for entry in ({"identity": mine}, *kept)))
    fresh.replace(target)


class Running:
    """A part's process."""

    def __init__(self, part: Part, items: Items, until: float, reduced: bool) -> None:
        self.part, self.items, self.until, self.reduced = part, items, until, reduced
        self.began = time.monotonic()
        self.start()

    def start(self) -> None:
        """With what is left of its time, and without what is done."""
        outcomes = last_outcomes(self.items.entries())
        done = self.items.folder.resolve() / f".{self.part.name.replace(' ', '-')}.done"
        done.write_text(json.dumps([name for part, name in outcomes if part == self.part.name]))
        seconds = self.until - GRACE_SECONDS - time.monotonic()
        command = [sys.executable, "-m", "benchmarks.gpu_part", f"--part={self.part.name}", f"--done={done}"]
        command += [f"--file={self.items.file.resolve()}", f"--seconds={seconds:.1f}"]
        command += ["--reduced"] if self.reduced else []
        command += [f"--function={self.part.function}"] if self.part.function else ["--", *self.part.tests]
        variables = {**os.environ, "PYTHONUNBUFFERED": "1"}
        if self.reduced:
            variables["CUDA_VISIBLE_DEVICES"] = ""
        self.before = len(self.items.entries())
        with (self.items.folder / LOG).open("ab") as log:
            log.write(f"\n== {self.part.name}\n".encode())
            log.flush()
            self.process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=variables, cwd=ROOT)

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()

    def finished(self, say) -> bool:
        """Looks at the process: starts it anew where it must be; True when the part is over and its state known."""
        late = time.monotonic() > self.until
        if late:
            self.kill()
        code = self.process.poll()
        if code is None:
            return False
        mine = [entry for entry in self.items.entries()[self.before :] if entry.get("part") == self.part.name]
        how, detail = next(((x["ended"], x["detail"]) for x in mine if "ended" in x), (FAILED, f"it ended with {code}"))
        begun, over = ([x["item"] for x in mine if "item" in x and ("status" in x) == ended] for ended in (False, True))
        running = begun[-1] if begun and begun[-1] not in over else None
        if late:
            how, detail = LATE, f"its time was up while {running} ran" if running else "its time was up"
        elif running is not None:
            detail = f"the process ended with {code} while it ran (see {LOG})"
            self.items.add(part=self.part.name, item=running, status=FAILED, seconds=0.0, detail=detail)
            how, detail = AGAIN, f"{running} ended the process"
        if how == AGAIN and self.until - GRACE_SECONDS - time.monotonic() > 5:
            say(f"{self.part.name}: goes on in a fresh process: {detail}")
            self.start()
            return False
        self.conclude(how, detail)
        return True

    def conclude(self, how: str, why: str) -> None:
        """The part's state, by its items and how it ended."""
        outcomes = [x for (part, _), x in last_outcomes(self.items.entries()).items() if part == self.part.name]
        counts = {word: sum(x["status"] == word for x in outcomes) for word in (OK, FAILED, SKIPPED)}
        detail = ", ".join(f"{count} {word}" for word, count in counts.items() if count)
        status = OK
        if counts[FAILED] or how == FAILED:
            status = FAILED
        elif how != DONE:
            status = INCOMPLETE
        elif not counts[OK]:
            status, why = SKIPPED, "; ".join(dict.fromkeys(x["detail"] for x in outcomes))
        detail = "; ".join(filter(None, (detail, why)))[:500]
        seconds = round(time.monotonic() - self.began, 1)
        self.outcome = {"status": status, "detail": detail, "seconds": seconds}
        self.items.add(part=self.part.name, state=self.outcome)


def run_stage(stage: list[Part], items: Items, end: float, reduced: bool, say) -> None:
    waiting, running = list(stage), list[Running]()
    slots = 2 if reduced else min(8, os.cpu_count() or 1)
    size = -1
    try:
        while waiting or running:
            while waiting and len(running) < slots:
                part = waiting.pop(0)
                until = min(time.monotonic() + part.seconds * (4 if reduced else 1) + GRACE_SECONDS, end)
                if until - GRACE_SECONDS - time.monotonic() < 5:
                    late = {"status": INCOMPLETE, "detail": "the time was used up", "seconds": 0.0}
                    items.add(part=part.name, state=late)
                    say(f"{part.name}: the time was used up")
                    continue
                running.append(Running(part, items, until, reduced))
            for one in list(running):
                if one.finished(say):
                    running.remove(one)
                    outcome = one.outcome
                    say(f"{one.part.name}: {outcome['status']} in {outcome['seconds']:.0f} s: {outcome['detail']}")
                    size = -1
            if size != items.size():
                size = items.size()
                items.save()
            time.sleep(0.1)
    finally:
        for one in running:
            one.kill()
            one.conclude(LATE, "it was interrupted")


def run(
    out: Path,
    planned: list[list[Part]],
    reduced: bool,
    limit: float,
    spent: float = 0.0,
    former: Path | None = None,
    say=print,
    prepared: tuple[str, ...] = (),
) -> int:
    """The parts, in `limit` seconds since the process began, which was `spent` seconds ago -> the exit code.
    `prepared`: what was said of the kit and the extension, for the record."""
    from retro_kernels.bench import report

    began = time.monotonic() - spent
    out.mkdir(parents=True, exist_ok=True)
    items = Items(out, {"suite": "gpu", "reduced": reduced, "limit_seconds": limit, "prepared": prepared}, began)
    mine = identity(reduced)
    if former is not None:
        resume(former, items.file, mine)
    else:
        items.file.write_text(json.dumps({"identity": mine}) + "\n")
        (out / LOG).unlink(missing_ok=True)
    items.order = [part.name for stage in planned for part in stage]
    try:
        for stage in planned:
            run_stage(stage, items, began + limit, reduced, say)
        items.interrupted = False
    except KeyboardInterrupt:
        say("interrupted")
    for done in out.glob(".*.done"):
        done.unlink()
    document = items.document()
    items.save()
    try:
        report.write(document, out)
    except Exception:
        say(f"no report: {traceback.format_exc()}")
        return 1
    bad = [part for part in document["parts"] if part["status"] in (FAILED, INCOMPLETE)]
    for entry in document["checks"]:
        if entry["status"] == FAILED:
            say(f"{FAILED}: {entry['check']}: {entry['detail']}")
    say(
        f"{document['seconds']:.0f} s. "
        + (f"Failed or incomplete: {', '.join(part['name'] for part in bad)}" if bad else "No part failed.")
        + f" {out}"
    )
    return 1 if bad or items.interrupted else 0


def prepare(wheel: Path | None, out: Path, reduced: bool, seconds: float, say) -> None:
    """Sees to it that the parts find a CUDA C++ extension, if there can be one, and a kit's kernels. ValueError for a
    wheel without one; a build that fails is said, and the tests of these kernels skip with the reason."""
    from retro_kernels import cuda_extension

    if wheel is not None:
        with zipfile.ZipFile(wheel) as archive:
            name = f"retro_kernels/{cuda_extension.LIBRARY.name}"
            if name not in archive.namelist():
                raise ValueError(f"--wheel: {wheel} has no {name}: make it with RETRO_KERNELS_BUILD_CUDA=1")
            os.environ["RETRO_KERNELS_CUDA_LIBRARY"] = archive.extract(name, out / ".wheel")
    if reduced:
        return
    for message in gpu_kit.unpack():
        say(message)
    setup = ROOT / "setup.py"
    if "RETRO_KERNELS_CUDA_LIBRARY" in os.environ or cuda_extension.LIBRARY.exists() or not setup.exists():
        return
    say("CUDA extension: building it")
    variables = {**os.environ, "RETRO_KERNELS_BUILD_CUDA": "1", "RETRO_KERNELS_BUILD_CPU": "0"}
    command, began = [sys.executable, str(setup), "build_ext", "--inplace"], time.monotonic()
    try:
        done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        say(f"CUDA extension: not built within {seconds:.0f} s")
        return
    took = f"built in {time.monotonic() - began:.0f} s"
    say(f"CUDA extension: {took if done.returncode == 0 else done.stderr[-2000:]}")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.gpu", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help="a part or group; default: all but the sanitizers")
    parser.add_argument("--out", type=Path, default=Path("gpu-report"), help="folder for the results")
    parser.add_argument("--limit", type=float, default=LIMIT_SECONDS, metavar="SECONDS", help="builds included")
    parser.add_argument("--resume", type=Path, metavar="RESULTS", help="a former --out, or its items.jsonl")
    parser.add_argument("--wheel", type=Path, metavar="FILE", help="take the CUDA extension out of this wheel")
    parser.add_argument("--reduced", action="store_true", help="small, on the CPU (without a GPU always)")
    parser.add_argument("--list", action="store_true", help="print the parts with their groups")
    options = parser.parse_args(arguments)
    if not (ROOT / CASES).exists():
        parser.error(f"the suite's tests are not there ({ROOT / CASES}): run it in a source tree")
    import torch

    reduced = options.reduced or not torch.cuda.is_available()
    targets = targets_here(reduced)
    if options.list:
        for part in (part for stage in [*stages(targets), sanitizers(targets)] for part in stage):
            print(f"{part.group:12} {part.name}")
        return 0
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        planned = chosen(options.parts, targets)
        options.out.mkdir(parents=True, exist_ok=True)
        prepared: list[str] = []
        prepare(options.wheel, options.out, reduced, max(1.0, 0.6 * options.limit - since_start()), prepared.append)
        print("\n".join(prepared), flush=True)
        spent, notes = since_start(), tuple(prepared)
        return run(options.out, planned, reduced, options.limit, spent, options.resume, prepared=notes)
    except (ValueError, OSError, zipfile.BadZipFile) as error:
        parser.error(str(error))


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
