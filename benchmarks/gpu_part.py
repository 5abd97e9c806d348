"""One part of the GPU suite, in a process of its own: pytest on a selection of tests, or a function that times. Used by
`benchmarks.gpu`.

What it finds it appends to a file, a line of JSON for every item when it begins and when it ends, so that a kill at any
second loses the item that was running and no other.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

OK, FAILED, SKIPPED = "ok", "failed", "skipped"
DONE, AGAIN, LATE = "done", "again", "late"  # how a part's process ended by itself


class Skip(Exception):
    """The item has nothing to do here; the message is the reason."""


class Stop(Exception):
    """The part ends here. `how`: LATE, or AGAIN where the rest needs a fresh process."""

    def __init__(self, how: str, detail: str) -> None:
        super().__init__(detail)
        self.how = how


class Record:
    """Where a part's process says what it does. `done`: names of items that a process before this one has finished."""

    def __init__(self, file: Path, part: str, seconds: float, done: set[str] = frozenset(), reduced: bool = False):  # type: ignore[assignment]
        self.file, self.part, self.done, self.reduced = file, part, done, reduced
        self.deadline = time.monotonic() + seconds
        self.parent = os.getppid()

    def write(self, **entry: object) -> None:
        line = json.dumps({"part": self.part, **entry}, default=lambda value: value.tolist()) + "\n"
        with self.file.open("ab") as stream:
            stream.write(line.encode())  # one write: parts that run side by side share the file

    def begin(self, name: str) -> None:
        self.write(item=name)

    def end(self, name: str, status: str, detail: str, seconds: float, **found: object) -> None:
        self.write(item=name, status=status, detail=detail[:1000], seconds=round(seconds, 2), **found)

    def seconds_left(self) -> float:
        return self.deadline - time.monotonic()

    def late(self) -> bool:
        """Whether nothing new may begin: the time is up, or the suite is gone."""
        return self.seconds_left() < 0 or os.getppid() != self.parent

    @contextlib.contextmanager
    def item(self, name: str) -> Iterator[dict]:
        """One thing that is timed or checked. What is put into the dict is kept with its outcome; "detail" says it in
        words. A failure is recorded and swallowed, unless it has spoilt the CUDA context. The caller leaves out what
        is `done`."""
        if self.late():
            raise Stop(LATE, f"its time was up before {name}")
        self.begin(name)
        found: dict = {}
        began, status = time.monotonic(), OK
        try:
            yield found
            found.setdefault("detail", "")
        except Skip as reason:
            status, found["detail"] = SKIPPED, str(reason)
        except Exception as error:
            traceback.print_exc()
            status, found["detail"] = FAILED, f"{type(error).__name__}: {error}"
        self.end(name, status, found.pop("detail"), time.monotonic() - began, **found)
        if status == FAILED and not alive():
            raise Stop(AGAIN, f"{name} spoilt the CUDA context")


def alive() -> bool:
    """Whether this process's CUDA context, if it has one, still works."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return True
    try:
        torch.cuda.synchronize()
        return float(torch.ones(2, device="cuda").sum()) == 2.0
    except Exception:
        return False


class Plugin:
    """Makes pytest write every test's beginning and outcome, leave out what is done, and stop in time."""

    def __init__(self, record: Record) -> None:
        self.record = record
        self.stopped: Stop | None = None
        self.reports: list = []

    def pytest_collection_modifyitems(self, config, items) -> None:
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid in self.record.done])
        items[:] = [item for item in items if item.nodeid not in self.record.done]

    def pytest_runtest_protocol(self, item, nextitem) -> bool | None:
        if self.stopped is None and self.record.late():
            self.stopped = Stop(LATE, f"its time was up before {item.nodeid}")
        if self.stopped is not None:
            item.session.shouldstop = str(self.stopped)
            return True  # not run
        return None

    def pytest_runtest_logstart(self, nodeid) -> None:
        self.record.begin(nodeid)
        self.reports = []

    def pytest_runtest_logreport(self, report) -> None:
        self.reports.append(report)

    def pytest_runtest_logfinish(self, nodeid) -> None:
        failed = next((report for report in self.reports if report.failed), None)
        skipped = next((report for report in self.reports if report.skipped), None)
        status = OK
        detail = "; ".join(
            f"{name}: {value}" for x in self.reports if x.when == "call" for name, value in x.user_properties
        )
        if failed is not None:
            crash = getattr(failed.longrepr, "reprcrash", None)
            status, detail = FAILED, f"{failed.when}: {crash.message if crash else failed.longrepr}"
        elif skipped is not None:
            where = skipped.longrepr
            status, detail = SKIPPED, str(where[2] if isinstance(where, tuple) else where).removeprefix("Skipped: ")
        self.record.end(nodeid, status, detail, sum(report.duration for report in self.reports))
        if status == FAILED and not alive():
            self.stopped = Stop(AGAIN, f"{nodeid} spoilt the CUDA context")


def run_tests(record: Record, selection: list[str]) -> None:
    """pytest on a selection. Raises Stop."""
    import pytest

    plugin = Plugin(record)
    options = ["-p", "no:cacheprovider", "-o", "addopts=--strict-markers", "--tb=short", "-v"]
    code = pytest.main([*options, *selection], plugins=[plugin])
    if plugin.stopped is not None:
        raise plugin.stopped
    if code == pytest.ExitCode.NO_TESTS_COLLECTED and record.done:
        return
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        raise RuntimeError(f"pytest {' '.join(selection)} ended with {code!r} (see log.txt)")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.gpu_part")
    parser.add_argument("--part", required=True)
    parser.add_argument("--file", type=Path, required=True, help="where the items are appended")
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--done", type=Path, help="a file of names of items that need not be done")
    parser.add_argument("--reduced", action="store_true")
    parser.add_argument("--function", metavar="MODULE:NAME", help="instead of tests: is given the record")
    parser.add_argument("tests", nargs="*", help="what pytest is given")
    options = parser.parse_args(arguments)
    if "retrieval" in options.part:
        # Before torch: where torch's C++ library is in the process, index_factory of FAISS's build for CUDA 13 fails.
        with contextlib.suppress(ImportError):
            importlib.import_module("faiss")
    done = set(json.loads(options.done.read_text())) if options.done else set()
    record = Record(options.file, options.part, options.seconds, done, options.reduced)
    how, detail = DONE, ""
    try:
        if options.function:
            module, _, name = options.function.partition(":")
            getattr(importlib.import_module(module), name)(record)
        else:
            run_tests(record, options.tests)
    except Stop as stop:
        how, detail = stop.how, str(stop)
    except Exception as error:
        traceback.print_exc()
        how, detail = FAILED, f"{type(error).__name__}: {error}"[:1000]
    record.write(ended=how, detail=detail)
    return 0


if __name__ == "__main__":  # by its own name: what is timed imports Skip and Stop from there
    sys.exit(importlib.import_module("benchmarks.gpu_part").main())
