"""What a machine without a GPU can show of GPU code, in parts: `python -m benchmarks.rehearsal.PART --out FILE`.

A part writes a list of `Row`s as JSON after each of them, so that one that is stopped leaves what it has shown, and
exits with 1 where something that had to be shown was not. What FILE says was shown already is not shown again.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path


@dataclasses.dataclass
class Row:
    """What one check showed. `ok`: it came out as it had to; a control, which has a fault built in, by finding it."""

    part: str
    operation: str
    case: str
    shown: str
    ok: bool
    detail: str
    seconds: float


class Part:
    """Runs checks, writes their rows and prints them."""

    def __init__(self, name: str, out: Path | None, only: str = ".*") -> None:
        self.name, self.out, self.only, self.rows = name, out, only, list[Row]()
        if out is not None and out.exists():
            self.rows = [row for row in (Row(**x) for x in json.loads(out.read_text())) if row.ok]

    def check(self, operation: str, case: str, shown: str, run: Callable[[], str]) -> None:
        """`run` returns the detail of a row that is ok, and raises otherwise."""
        shown_already = any((row.operation, row.case, row.shown) == (operation, case, shown) for row in self.rows)
        if shown_already or not re.fullmatch(self.only, f"{operation}: {case}"):
            return
        begin = time.monotonic()
        try:
            ok, detail = True, run()
        except Exception as error:
            ok, detail = False, f"{type(error).__name__}: {error}"
        seconds = round(time.monotonic() - begin, 1)
        self.rows.append(Row(self.name, operation, case, shown, ok, detail, seconds))
        print(f"{'ok' if ok else 'NOT SHOWN'}  {operation}: {case} ({seconds} s): {detail}", flush=True)
        self.write()

    def write(self) -> None:
        if self.out is not None:
            self.out.write_text(json.dumps([dataclasses.asdict(row) for row in self.rows], indent=1) + "\n")


@contextlib.contextmanager
def main(name: str, description: str) -> Iterator[Part]:
    """The command line of a part; its end ends the process."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", type=Path, help="JSON file of the rows")
    parser.add_argument("--only", default=".*", help='a regular expression that "operation: case" must match')
    arguments = parser.parse_args()
    part = Part(name, arguments.out, arguments.only)
    yield part
    part.write()
    failed = sum(not row.ok for row in part.rows)
    print(f"{name}: {len(part.rows) - failed} of {len(part.rows)} shown")
    sys.exit(1 if failed or not part.rows else 0)
