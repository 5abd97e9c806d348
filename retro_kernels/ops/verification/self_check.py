"""The check of a class of calls on this very device: in this process, or in a child where an illegal access might spoil
the CUDA context. `retro_kernels/testing.py` has the problems and the rule."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from . import records
from .classes import Class

PASSED, FAILED, UNKNOWN = "passed", "failed", "unknown"
PATIENCE = 300.0  # seconds for one check in a child process, compilation included


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What is known of a class and backend on a device. UNKNOWN: it could not be checked, and is not remembered."""

    status: str
    detail: str
    seconds: float = 0.0
    source: str = ""

    def to_json(self) -> dict[str, Any]:
        return {"status": self.status, "detail": self.detail, "seconds": round(self.seconds, 1)}

    @classmethod
    def from_json(cls, entry: dict[str, Any], source: str) -> Verdict:
        return cls(entry["status"], str(entry.get("detail", "")), float(entry.get("seconds", 0.0)), source)


def apart(capability: str) -> bool:
    """Whether a check must run in a process of its own: no evidence ships for this compute capability ("9.0")."""
    return capability not in records.shipped_capabilities()


Wanted = tuple[Class, str]


def check(wanted: Iterable[Wanted], device: torch.device, capability: str) -> Iterator[Verdict]:
    """Checks classes one after the other on a device, in a child process where it must be (`apart`)."""
    wanted = list(wanted)
    if apart(capability):
        yield from check_in_children(wanted, device)
    else:
        for one, backend in wanted:
            yield _in_thread(functools.partial(check_here, one, backend, device))


def _in_thread(work: Callable[[], Verdict]) -> Verdict:
    """In a thread of its own, which has none of the modes of this one. What interrupts the caller is passed on."""
    found: list[Verdict] = []
    thread = threading.Thread(target=lambda: found.append(work()), name="retro_kernels check", daemon=True)
    thread.start()
    thread.join()
    return found[0] if found else Verdict(UNKNOWN, "the checking thread was interrupted")


def check_here(wanted: Class, backend: str, device: torch.device) -> Verdict:
    """One class in this process and thread. Whatever goes wrong is the verdict."""
    from ... import testing

    began = time.monotonic()
    devices = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices), torch.enable_grad():
            if device.type == "cuda":
                torch.cuda.set_device(device)
            status, detail = PASSED, testing.check_class(wanted, backend, device)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
    except testing.Refused as error:
        status, detail = UNKNOWN, f"its kernels refuse every problem of the check: {error}"
    except torch.OutOfMemoryError as error:
        status, detail = UNKNOWN, _first_line(error)
    except testing.Wrong as error:
        status, detail = FAILED, str(error)
    except Exception as error:
        status, detail = FAILED, f"{type(error).__name__}: {_first_line(error)}"
    return Verdict(status, detail, time.monotonic() - began, "checked now")


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:400]


MARK = "retro_kernels verdict "
NEXT_CHILD = 75  # a child's exit code: the last verdict's kernel has spoilt its context


def check_in_children(wanted: list[Wanted], device: torch.device) -> Iterator[Verdict]:
    """In one child process; when it dies, the class that it was at has failed, and another goes on with the rest."""
    done = 0
    while done < len(wanted):
        with contextlib.closing(_child(wanted[done:], device)) as verdicts:
            for verdict in verdicts:
                done += 1
                yield verdict


def child_command() -> list[str]:
    return [sys.executable, "-c", "from retro_kernels.ops.verification.self_check import child; child()"]


def _child(wanted: list[Wanted], device: torch.device) -> Generator[Verdict]:
    """Verdicts of a child as they come; at its death one more, of the class it was at."""
    root = str(Path(__file__).resolve().parents[3])
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    try:
        process = subprocess.Popen(
            child_command(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": path},
        )
    except OSError as error:
        yield Verdict(UNKNOWN, f"no child process can be started: {error}")
        return
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    clock = _Clock(process)
    tail: list[str] = []
    reader = threading.Thread(target=lambda: tail.append((process.stderr.read() or "")[-4000:]), daemon=True)  # type: ignore[union-attr]
    reader.start()
    left = len(wanted)
    try:
        task = {"device": str(device), "checks": [[dataclasses.asdict(one), backend] for one, backend in wanted]}
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(json.dumps(task))
            process.stdin.close()
        for line in process.stdout:
            if line.startswith(MARK):
                clock.wind()
                left -= 1
                yield Verdict.from_json(json.loads(line[len(MARK) :]), "checked now")
        process.wait()
        reader.join(5)
        if left and process.returncode != NEXT_CHILD:
            yield _death(process.returncode, clock, "".join(tail))
    finally:
        clock.stop()
        if process.poll() is None:
            process.kill()
        process.wait()


def _death(code: int, clock: _Clock, words: str) -> Verdict:
    last = next((line.strip() for line in reversed(words.splitlines()) if line.strip()), "it said nothing")[-300:]
    if clock.ran_out:
        return Verdict(FAILED, f"its check did not end within {PATIENCE:.0f} s", PATIENCE, "checked now")
    busy = any(text in words for text in ("all CUDA-capable devices are busy", "out of memory", "OutOfMemory"))
    how = f"ended by signal {-code}" if code < 0 else f"ended with {code}"
    return Verdict(UNKNOWN if busy else FAILED, f"the process of its check {how}: {last}", 0.0, "checked now")


class _Clock:
    """Kills a process that is silent for PATIENCE seconds."""

    def __init__(self, process: subprocess.Popen) -> None:
        self.process, self.ran_out = process, False
        self.timer: threading.Timer | None = None
        self.wind()

    def wind(self) -> None:
        self.stop()
        self.timer = threading.Timer(PATIENCE, self._strike)
        self.timer.daemon = True
        self.timer.start()

    def _strike(self) -> None:
        self.ran_out = True
        self.process.kill()

    def stop(self) -> None:
        if self.timer is not None:
            self.timer.cancel()


def child() -> None:
    """The child's side: checks what stdin asks for. A broken context ends it, and the next child goes on."""
    task = json.loads(sys.stdin.read())
    device = torch.device(task["device"])
    for fields, backend in task["checks"]:
        wanted = Class(**{**fields, "options": tuple(fields["options"])})
        verdict = check_here(wanted, backend, device)
        print(MARK + json.dumps(verdict.to_json()), flush=True)
        if verdict.status == FAILED and not _alive(device):
            os._exit(NEXT_CHILD)


def _alive(device: torch.device) -> bool:
    """Whether the CUDA context still works."""
    try:
        return device.type != "cuda" or float(torch.ones(2, device=device).sum()) == 2.0
    except Exception:
        return False
