"""Verdicts on disk: `verified.json` in RETRO_KERNELS_CACHE (default ~/.cache/retro_kernels), and those that ship with
the library, in `evidence.json`. Both hold records {"identity": what they hold for, "verdicts": {entry: verdict}}."""

from __future__ import annotations

import functools
import json
import warnings
from pathlib import Path
from typing import Any

from ... import files
from .. import tuning
from . import evidence

FORMAT = 1
# A shipped verdict holds for these of its fields: what decides which machine code runs, and on what.
SHIPPED_FIELDS = ("device", "capability", "triton", "kernels")

Verdicts = dict[str, dict[str, Any]]


def path() -> Path:
    return tuning.cache_file().with_name("verified.json")


def load(identity: dict[str, str]) -> Verdicts:
    """The verdicts on disk for this identity. A file that cannot be used is ignored, with a warning."""
    return next((record["verdicts"] for record in _records() if record["identity"] == identity), {})


def _records() -> list[dict[str, Any]]:
    try:
        content = json.loads(path().read_text(encoding="utf-8"))
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise ValueError(f"expected a JSON object of format {FORMAT}")
        return checked(content.get("devices"))
    except (FileNotFoundError, NotADirectoryError):
        return []
    except (OSError, ValueError) as error:
        warnings.warn(
            f"retro_kernels: {path()}, which remembers what kernels are verified, cannot be used ({error}); what it "
            "held is checked again, and it is replaced",
            stacklevel=2,
        )
        return []


def checked(records: Any) -> list[dict[str, Any]]:
    """The records, if they are some; ValueError otherwise."""
    if not isinstance(records, list):
        raise ValueError("expected a list of devices")
    for record in records:
        if not isinstance(record, dict) or not isinstance(record.get("identity"), dict):
            raise ValueError("expected every device to have an identity")
        verdicts = record.get("verdicts")
        if not isinstance(verdicts, dict) or not all(
            isinstance(verdict, dict) and verdict.get("status") in ("passed", "failed") for verdict in verdicts.values()
        ):
            raise ValueError('expected every verdict to be "passed" or "failed"')
    return records


def add(identity: dict[str, str], entry: str, verdict: dict[str, Any]) -> None:
    """Adds a verdict to the file, which is replaced as a whole and under a lock: no reader sees half of it, and of two
    processes that write at once neither loses anything. Warns where the folder cannot be written."""
    file = path()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with files.lock(file.with_name(f"{file.name}.lock"), wait=True):
            records = _records()
            mine = next((record for record in records if record["identity"] == identity), None)
            if mine is None:
                mine = {"identity": identity, "verdicts": {}}
                records.append(mine)
            mine["verdicts"][entry] = verdict
            files.write_json(file, {"format": FORMAT, "devices": records}, concurrent=True)
    except OSError as error:
        warnings.warn(
            f"retro_kernels: {file} cannot be written ({error}), so what was just checked is checked again by the next "
            f"process; {tuning.CACHE_VARIABLE} names another folder",
            stacklevel=2,
        )


@functools.lru_cache(maxsize=1)
def _shipped() -> list[dict[str, Any]]:
    return checked(json.loads(evidence.TABLE.read_text(encoding="utf-8"))["verified"])


def all_shipped(identity: dict[str, str]) -> Verdicts:
    """The verdicts that ship with the library for this device."""
    wanted = [identity[field] for field in SHIPPED_FIELDS]
    found: Verdicts = {}
    for record in _shipped():
        if [record["identity"].get(field) for field in SHIPPED_FIELDS] == wanted:
            found |= record["verdicts"]
    return found


def shipped_capabilities() -> frozenset[str]:
    """The compute capabilities on which some kernel was verified: of them it is known that the kernels run."""
    return frozenset(
        str(record["identity"]["capability"])
        for record in _shipped()
        if any(verdict["status"] == "passed" for verdict in record["verdicts"].values())
    )
