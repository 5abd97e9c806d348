"""Which fused kernels a GPU has proved right, class of calls by class: by a check of their own, made once.

`verified(operation, backend, device, features)` is the one question. A class of calls (`classes.py`) is an
operation, a dtype, head sizes, tile sizes and a set of options. The first call of a class on a GPU runs a small fixed
problem of that class there (`self_check.py`): odd sizes with a mask and even sizes without, forward and gradients,
outputs filled with NaN between guard bands, twice for the same bits, against the reference in fp64, judged by the rule
of the tests (`retro_kernels/testing.py`). What passes is fused from then on; for what fails the next backend is asked,
and a failure is remembered too.

Memory. In this process a dictionary; on disk `verified.json` (`records.py`) by device, driver, versions and a
hash of the kernels; before it is asked what ships with the library, made from the committed results of GPUs.

Where. An illegal access spoils a CUDA context for good. So where no evidence ships for a device's compute capability, a
check runs in a child process; where some does, in a thread of this one (which has neither the caller's modes, such as
autocast, no_grad or a tracing compiler's, nor its stream).

When not. While a CUDA graph is captured nothing can be checked: what is not known by then raises. Under `torch.compile`
the answer is a constant of the graph, and the check is made while it is traced.

With several processes (`torch.distributed`) all ranks must take the same backend. The first rank that asks about a
class claims it in the job's key-value store, answers from its own memory or check, and writes the verdict there; every
other rank waits for that and takes it. No collective is involved, so ranks may ask in any order or not at all. (GPUs of
another kind are asked about apart: a job that mixes kinds names its backend.)
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import sys
import threading
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from ..compiling import constant
from . import records, self_check
from .classes import Class, Features
from .self_check import FAILED, PASSED, UNKNOWN, Verdict

REMEDY = (
    "`retro-kernels verify` checks again and prints all verdicts; RETRO_KERNELS_BACKEND or backend= takes a backend by "
    "name, checked or not"
)

_lock = threading.RLock()
_answers: dict[tuple[Any, ...], tuple[bool, str]] = {}  # by `verified`'s arguments and whether there are other ranks
_verdicts: dict[tuple[Any, ...], Verdict] = {}  # the same by class


def needs_proof(device: torch.device) -> bool:
    """Whether kernels on this device are taken by default only once they have proved themselves. (Those of a CPU are
    checked before a release.)"""
    return device.type == "cuda"


@constant  # a compiled graph is made for one answer; the check, if there must be one, is made while it is traced
def verified(operation: str, backend: str, device: torch.device, given: Features) -> tuple[bool, str]:
    """Whether a call with these features may run on that backend by default, and why (not): a look-up, but the first
    time."""
    try:
        return _answers[operation, backend, device, given, _has_peers()]
    except KeyError:
        return _ask(operation, backend, device, given)


def _has_peers() -> bool:
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def _ask(operation: str, backend: str, device: torch.device, given: Features) -> tuple[bool, str]:
    peers = _has_peers()
    answer = verified_class(Class.of(operation, given), backend, device)
    _answers[operation, backend, device, given, peers] = answer
    return answer


def verified_class(wanted: Class, backend: str, device: torch.device) -> tuple[bool, str]:
    """`verified` of a class."""
    with _lock:
        peers = _has_peers()
        key = (backend, device, wanted, peers)
        if key not in _verdicts:
            _verdicts[key] = _agreed(wanted, backend, device) if peers else _decided(wanted, backend, device)
        verdict = _verdicts[key]
    where = f"on {describe(device)} ({wanted})"
    if verdict.status == PASSED:
        return True, f"it has passed its check {where}, {verdict.source}"
    what = "its check failed" if verdict.status == FAILED else "it could not be checked"
    return False, f"{what} {where}: {verdict.detail}. {REMEDY}"


def forget() -> None:
    """Empties this process's memory; what is on disk stays."""
    with _lock:
        _answers.clear()
        _verdicts.clear()


def look_up(wanted: Class, backend: str, device: torch.device) -> Verdict | None:
    """The verdict that ships with the library or is on disk, or None. Touches no GPU but for its name."""
    here = identity(device, backend)
    shipped = records.all_shipped(here).get(entry_of(wanted, backend))
    if shipped is not None:
        return Verdict.from_json(shipped, "ships with the library")
    entry = records.load(here).get(entry_of(wanted, backend))
    return None if entry is None else Verdict.from_json(entry, str(records.path()))


def summary(backend: str, device: torch.device) -> tuple[bool, str]:
    """Whether some class of calls may take a backend on a device, as far as is known, and what is. Checks nothing."""
    here = identity(device, backend)
    entries = {**records.load(here), **records.all_shipped(here)}
    mine = {entry: x["status"] for entry, x in entries.items() if entry.startswith(f"{backend} ")}
    if not mine:
        return True, "nothing is checked yet: every class of calls is at its first call, or by `retro-kernels verify`"
    passed = [entry for entry, status in mine.items() if status == PASSED]
    failed = [entry for entry, status in mine.items() if status == FAILED]
    words = f"{len(passed)} classes of calls passed their check"
    if failed:
        more = "; ..." if len(failed) > 3 else ""
        words += f", {len(failed)} failed and do not take it ({'; '.join(failed[:3])}{more})"
    return bool(passed), f"{words}; others are checked at their first call"


def entry_of(wanted: Class, backend: str) -> str:
    return f"{backend} {wanted}"


def _decided(wanted: Class, backend: str, device: torch.device) -> Verdict:
    """From memory, or by a check."""
    verdict = look_up(wanted, backend, device)
    if verdict is not None:
        return verdict
    if capturing(device):
        raise RuntimeError(
            f"{wanted.operation}: whether the {backend} kernels are right on {describe(device)} is not known yet "
            f"({wanted}), and nothing can be checked while a CUDA graph is captured. Run `retro-kernels verify` first, "
            "or call it once before the capture, or name a backend"
        )
    say(f"checking the {backend} kernels on {describe(device)}, once: {wanted}. `retro-kernels verify` does it ahead")
    (verdict,) = self_check.check([(wanted, backend)], device, capability(device))
    remember(wanted, backend, device, verdict)
    return verdict


def remember(wanted: Class, backend: str, device: torch.device, verdict: Verdict) -> None:
    if verdict.status != UNKNOWN:
        records.add(identity(device, backend), entry_of(wanted, backend), verdict.to_json())


def say(text: str) -> None:
    print(f"retro_kernels: {text}", file=sys.stderr, flush=True)


def _agreed(wanted: Class, backend: str, device: torch.device) -> Verdict:
    """The verdict of the first rank that asks; see the module's docstring."""
    from torch.distributed import distributed_c10d as c10d

    store, rank = c10d._get_default_store(), torch.distributed.get_rank()
    here = json.dumps(identity(device, backend), sort_keys=True)
    name = "retro_kernels/" + hashlib.sha256(f"{here} {entry_of(wanted, backend)}".encode()).hexdigest()[:32]
    if capturing(device) and not store.check([f"{name}/verdict"]):
        _decided(wanted, backend, device)  # raises unless it is known
    if store.add(f"{name}/asked", 1) == 1:
        verdict = Verdict(UNKNOWN, f"rank {rank} was to check it and was interrupted")
        try:
            verdict = _decided(wanted, backend, device)
        finally:
            store.set(f"{name}/verdict", json.dumps({**verdict.to_json(), "rank": rank}))
        return verdict
    store.wait([f"{name}/verdict"], timedelta(seconds=2 * self_check.PATIENCE))
    entry = json.loads(store.get(f"{name}/verdict"))
    mine = look_up(wanted, backend, device)
    if entry["status"] == PASSED and mine is not None and mine.status == FAILED:
        raise RuntimeError(
            f"rank {rank} remembers that the {backend} kernels failed their check on its {describe(device)} ({wanted}: "
            f"{mine.detail}), and rank {entry['rank']} has found them right on its own, which all ranks would take. "
            f"Run `retro-kernels verify` on the machine of rank {rank}, or name a backend for all ranks "
            "(RETRO_KERNELS_BACKEND)"
        )
    return Verdict.from_json(entry, f"rank {entry['rank']}")


def capturing(device: torch.device) -> bool:
    """Whether the calling thread's stream is being captured into a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


@functools.lru_cache(maxsize=64)
def describe(device: torch.device) -> str:
    """The device's name."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


@functools.lru_cache(maxsize=64)
def capability(device: torch.device) -> str:
    """ "9.0" for sm_90."""
    return "{}.{}".format(*torch.cuda.get_device_capability(device)) if device.type == "cuda" else "none"


def identity(device: torch.device, backend: str) -> dict[str, str]:
    """What a verdict holds for."""
    return {
        "device": describe(device),
        "capability": capability(device),
        "driver": driver(),
        "torch": torch.__version__,
        "triton": triton_version(),
        "kernels": kernels_hash(backend),
    }


@functools.lru_cache(maxsize=1)
def driver() -> str:
    """Of NVIDIA: "550.54.15"."""
    with contextlib.suppress(OSError):
        return Path("/sys/module/nvidia/version").read_text().strip()
    version = getattr(torch._C, "_cuda_getDriverVersion", None)
    return "none" if version is None else str(version())


@functools.lru_cache(maxsize=1)
def triton_version() -> str:
    try:
        import triton
    except Exception:  # not installed, or broken: `unavailable` says which
        return "none"
    return triton.__version__


@functools.lru_cache(maxsize=8)
def kernels_hash(backend: str) -> str:
    """Changes with the kernels, their settings and the check: with the sources, and with the compiled library."""
    folder = Path(__file__).parents[1]
    digest = hashlib.sha256()
    names = (
        "cuda.py" if backend == "cuda" else "triton/*.py",
        "common.py",
        "call.py",
        "launching.py",
        "decode.py",
        "dropout.py",
    )
    sources = [file for name in names for file in folder.rglob(name)]
    for file in sorted([*sources, folder.parent / "testing.py"]):
        digest.update(file.relative_to(folder.parent).as_posix().encode() + b"\0" + file.read_bytes())
    if backend == "cuda":
        from ... import cuda_extension

        with contextlib.suppress(OSError):
            digest.update(cuda_extension.LIBRARY.read_bytes())
    return digest.hexdigest()[:16]
