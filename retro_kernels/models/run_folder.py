"""The folder of a run: one trainer at a time, checkpoints that are whole or passed over, a log that mends itself."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from ..files import lock, move, sha256, sync, write_bytes, write_json

METRICS, STATE, PROGRESS, SETTINGS, CHECKSUMS = (
    "metrics.jsonl",
    "optimiser",
    "progress.json",
    "settings.json",
    "checksums.json",
)
BEST = "best"
_STEP = re.compile(r"step-(\d{8})")


@contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Makes the folder and holds it for one trainer. Raises BlockingIOError where another process holds it."""
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        try:
            stack.enter_context(lock(folder, wait=False))
        except BlockingIOError as error:
            raise BlockingIOError(
                error.errno, "another process trains there: wait for it, or give another output", str(folder)
            ) from None
        except ImportError:  # a system without such locks
            pass
        yield


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted(path for path in found if _STEP.fullmatch(path.name) and (path / PROGRESS).exists())


def complete(partial: Path, target: Path) -> None:
    """Notes the checksum of every file of a checkpoint, waits until all are on the disk, and gives it its name."""
    files = sorted(path for path in partial.rglob("*") if path.is_file())
    entries = {
        path.relative_to(partial).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in files
    }
    write_json(partial / CHECKSUMS, entries)
    for path in (*files, *(path for path in partial.rglob("*") if path.is_dir())):
        sync(path)
    shutil.rmtree(target, ignore_errors=True)
    move(partial, target)


def problem_of(checkpoint: Path) -> str | None:
    """Reads every file of a checkpoint. -> what is wrong with it, None where every checksum holds."""
    entries = read_json(checkpoint / CHECKSUMS)
    if isinstance(entries, str):
        return entries
    if PROGRESS not in entries:
        return f"{CHECKSUMS}: does not name {PROGRESS}"
    for name, entry in entries.items():
        path = checkpoint / name
        try:
            if not path.is_file():
                return f"{name}: missing"
            if not isinstance(entry, dict) or path.stat().st_size != entry.get("bytes"):
                return f"{name}: {path.stat().st_size:,} bytes, not as many as were written"
            if sha256(path) != entry.get("sha256"):
                return f"{name}: altered, its SHA-256 is another one"
        except OSError as error:
            return f"{name}: cannot be read ({error.strerror})"
    return None


def read_json(path: Path) -> dict[str, Any] | str:
    """-> the object in a file, or what is wrong with it."""
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        return f"{path.name}: missing"
    except (ValueError, RecursionError) as error:
        return f"{path.name}: no valid JSON ({error})"
    return found if isinstance(found, dict) else f"{path.name}: no JSON object"


def newest_whole(folder: Path, say: Callable[[str], None]) -> Path | None:
    """The newest checkpoint of which every checksum holds; newer ones are set aside, with a sentence. None: there is no
    checkpoint. Raises ValueError where there are some and none is whole."""
    found = checkpoints(folder)
    for checkpoint in reversed(found):
        problem = problem_of(checkpoint)
        if problem is None:
            return checkpoint
        aside = folder / f"broken-{checkpoint.name}"
        shutil.rmtree(aside, ignore_errors=True)
        move(checkpoint, aside)
        say(f"{checkpoint} is broken ({problem}); it is now {aside.name}, and the one before it is taken")
    if found:
        raise ValueError(
            f"{folder}: no checkpoint is whole; expected one to continue from. Restore one, or give another output to "
            "start anew"
        )
    return None


def mend_metrics(folder: Path, step: int, say: Callable[[str], None]) -> None:
    """Leaves out of the log what came after `step`, and what cannot be read."""
    path = folder / METRICS
    lines = path.read_bytes().splitlines() if path.exists() else []
    kept, broken = [], 0
    for line in lines:
        try:
            entry = json.loads(line)
            if entry["step"] <= step:
                kept.append(line + b"\n")
        except (ValueError, TypeError, KeyError, RecursionError):
            broken += 1
    if broken:
        say(f"{path}: {broken} broken line{'s' if broken > 1 else ''} left out (of a crash or a full disk)")
    write_bytes(path, b"".join(kept))


def point_to_best(folder: Path, checkpoint: Path) -> None:
    """Makes the link `best` in the run's folder name this checkpoint."""
    link = folder / f"{BEST}.tmp"
    link.unlink(missing_ok=True)
    link.symlink_to(checkpoint.name)
    move(link, folder / BEST)
