"""Opt-in search for launch settings: a short list of candidates, checked, timed once, remembered on disk.

Off unless RETRO_KERNELS_TUNE=1 (read at every call). Results are kept in `tuning.json` in RETRO_KERNELS_CACHE, by
default ~/.cache/retro_kernels, under a key of the device, the versions, a hash of the kernels and the kind of call,
never of batch or length. The rule in an operation's `configs.py` is what runs without it.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import statistics
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from .. import files

ENVIRONMENT_VARIABLE = "RETRO_KERNELS_TUNE"
CACHE_VARIABLE = "RETRO_KERNELS_CACHE"
FORMAT = 1


def enabled() -> bool:
    """Whether RETRO_KERNELS_TUNE asks for tuning."""
    return os.environ.get(ENVIRONMENT_VARIABLE, "0") not in ("", "0")


def cache_file() -> Path:
    folder = os.environ.get(CACHE_VARIABLE)
    return (Path(folder) if folder else Path.home() / ".cache" / "retro_kernels") / "tuning.json"


def source_hash(*files: str | Path) -> str:
    """Changes with the kernels, so that settings tuned for other code are not used."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(Path(file).read_bytes())
    return digest.hexdigest()[:16]


def key_of(**fields: Any) -> str:
    return json.dumps(fields, sort_keys=True, default=str)


def load(path: Path | None = None) -> dict[str, dict[str, Any]]:
    """Entries on disk by key. A file that cannot be read or is of another format is ignored with a warning."""
    path = path or cache_file()
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict) or content.get("format") != FORMAT or not isinstance(content["entries"], dict):
            raise ValueError(f"expected format {FORMAT}")
        return content["entries"]
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError) as error:
        warnings.warn(
            f"retro_kernels: the tuning cache {path} cannot be used ({type(error).__name__}: {error}) and is ignored; "
            "delete it to tune again",
            stacklevel=2,
        )
        return {}


def save(key: str, entry: dict[str, Any], path: Path | None = None) -> None:
    """Adds an entry. The file is replaced as a whole and under a lock, so that a reader never sees half of it and two
    processes that save at once lose no entry. Warns where the folder cannot be written."""
    path = path or cache_file()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with files.lock(path.with_name(f"{path.name}.lock"), wait=True):
            files.write_json(path, {"format": FORMAT, "entries": {**load(path), key: entry}}, concurrent=True)
    except OSError as error:
        warnings.warn(f"retro_kernels: the tuning cache {path} cannot be written ({error})", stacklevel=2)


def median_milliseconds(run: Callable[[], Any], repetitions: int = 20) -> float:
    """The median of CUDA-event times of `run` on the current stream, after two runs to warm up."""
    run()
    run()
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repetitions)]
    for start, end in pairs:
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in pairs)


def agrees(given: Iterable[torch.Tensor], expected: Iterable[torch.Tensor]) -> bool:
    """Whether two runs of a kernel computed the same up to another order of summation."""
    for x, y in zip(given, expected, strict=True):
        tolerance = 1e-4 if y.dtype == torch.float32 else 2e-2
        finite = torch.isfinite(y)
        if not torch.equal(torch.isfinite(x), finite):
            return False
        x, y = x[finite].float(), y[finite].float()
        if y.numel() and (x - y).abs().max() > tolerance * y.abs().max().clamp(min=1e-6):
            return False
    return True


def tune(
    candidates: Sequence[Any],
    run: Callable[[Any], Sequence[torch.Tensor]],
    timer: Callable[[Callable[[], Any]], float] | None = None,
) -> tuple[Any, dict[str, Any]]:
    """The fastest candidate whose results agree with the first's, and a record of all.

    The first candidate is the rule's choice and the standard of correctness. A candidate that does not compile, does
    not fit the device or computes something else is left out, with the reason in the record.
    """
    timer = timer or median_milliseconds
    expected = [x.clone() for x in run(candidates[0])]
    best, best_time = candidates[0], timer(functools.partial(run, candidates[0]))
    record: dict[str, Any] = {str(candidates[0]): best_time}
    for candidate in candidates[1:]:
        try:
            if not agrees(run(candidate), expected):
                record[str(candidate)] = "left out: its result differs"
                continue
            time = timer(functools.partial(run, candidate))
        except Exception as error:  # whatever a compiler raises: the candidate is left out, and the record says why
            record[str(candidate)] = f"left out: {type(error).__name__}: {error}"[:300]
            continue
        record[str(candidate)] = time
        if time < best_time:
            best, best_time = candidate, time
    return best, record
