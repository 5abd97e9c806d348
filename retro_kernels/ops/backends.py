"""The choice of a backend: what can run in this process, what can run one call, and which is taken.

`call.py` says what a backend is: a module. A backend asked for by name runs or raises with that
reason. Without a name the first of the device's order is taken that can run and, on a GPU, has proved itself there
(`verification/`); when that is only the reference, a warning says why, once for each reason.
"""

from __future__ import annotations

import dataclasses
import os
import warnings
from types import ModuleType
from typing import Any

import torch

from .absorbed import cpu as absorbed_cpu
from .absorbed import cuda as absorbed_cuda
from .absorbed import reference as absorbed_reference
from .attention import cpu as attention_cpu
from .attention import cuda as attention_cuda
from .attention import reference as attention_reference
from .compiling import constant
from .decoding import cpu as decoding_cpu
from .decoding import cuda as decoding_cuda
from .decoding import reference as decoding_reference
from .later import import_later
from .plans import ENVIRONMENT_VARIABLE
from .verification import classes, evidence, verdicts

NAMES = ("reference", "cpu", "triton", "cuda")

# The backends of each kernel.
ATTENTION = {
    "reference": attention_reference,
    "cpu": attention_cpu,
    "cuda": attention_cuda,
    "triton": import_later(f"{__package__}.attention.triton", "launch"),
}
ABSORBED = {
    "reference": absorbed_reference,
    "cpu": absorbed_cpu,
    "cuda": absorbed_cuda,
    "triton": import_later(f"{__package__}.absorbed.triton", "launch"),
}
DECODING = {
    "reference": decoding_reference,
    "cpu": decoding_cpu,
    "cuda": decoding_cuda,
    "triton": import_later(f"{__package__}.decoding.triton", "launch"),
}

# Which is asked first, unless `evidence` has measured that another is faster.
DEFAULT_ORDER = {"cpu": ("cpu",), "cuda": ("triton", "cuda")}

_warned: set[str] = set()


@dataclasses.dataclass(frozen=True)
class BackendStatus:
    """Whether a backend can run in this process, and if not, why and what to do. `default`: what calls that name no
    backend do with it on this machine's devices, and why."""

    available: bool
    reason: str | None = None
    default: str = ""


def backends() -> dict[str, BackendStatus]:
    """Every backend's name -> whether it can run in this process (`available`) and if not why (`reason`)."""
    return status(ATTENTION)


def status(modules: dict[str, ModuleType]) -> dict[str, BackendStatus]:
    """The status of every backend of one operation, by name. Checks nothing: it says what is known."""
    found = {}
    for name in NAMES:
        reason = _unavailable(modules, name)
        found[name] = BackendStatus(reason is None, reason, "" if reason is not None else _default_words(modules, name))
    return found


def _default_words(modules: dict[str, ModuleType], name: str) -> str:
    if name == "reference":
        return "taken where no fused backend is, and a warning says why"
    words = []
    for device in devices():
        if name in DEFAULT_ORDER[device.type]:
            first, why = outlook(modules, device)
            where = f"on {verdicts.describe(device)}"
            if name == first:
                words.append(f"the default {where}: {why}")
            else:
                words.append(f"asked after {first} {where}; {verdicts.summary(name, device)[1]}")
    return "; ".join(words) or "taken by name only: it is the default of no device here"


def devices() -> list[torch.device]:
    """One device of each kind that is here."""
    cuda = [torch.device("cuda", torch.cuda.current_device())] if torch.cuda.is_available() else []
    return [device for device in (torch.device("cpu"), *cuda) if device.type in DEFAULT_ORDER]


def outlook(modules: dict[str, ModuleType], device: torch.device) -> tuple[str, str]:
    """The backend that calls on a device take when none is named, as far as is known, and why. Checks nothing."""
    reasons = []
    for name in DEFAULT_ORDER.get(device.type, ()):
        reason = _unavailable(modules, name)
        if reason is None:
            if not verdicts.needs_proof(device):
                return name, "it can run"
            hopeful, why = verdicts.summary(name, device)
            if hopeful:
                return name, why
            reason = why
        reasons.append(f"{name}: {reason}")
    return "reference", "; ".join(reasons) or f"no fused kernel exists for device type {device.type!r}"


def choose(modules: dict[str, ModuleType], call: Any, requested: str | None) -> str:
    """The name of the backend that runs `call`. `requested` (the argument) wins over RETRO_KERNELS_BACKEND.

    Raises ValueError for an unknown name or a call that the named backend refuses, RuntimeError when the named
    backend cannot run in this process.
    """
    name, source = requested_backend(requested)
    if name is not None:
        reason = _unavailable(modules, name)
        if reason is not None:
            raise RuntimeError(f"{source}={name!r} cannot run here: {reason}")
        reason = modules[name].refusal(call)
        if reason is not None:
            raise ValueError(f"{source}={name!r} cannot run this {call.operation}: {reason}")
        return name

    name, reasons = first_fused(modules, call)
    if name is not None:
        return name
    _warn_of_reference(call.operation, call.query.device.type, tuple(reasons))
    return "reference"


def requested_backend(requested: str | None) -> tuple[str | None, str]:
    """The backend that is asked for by name, if any, and by what: the argument or RETRO_KERNELS_BACKEND.

    Raises ValueError for an unknown name."""
    name, source = requested, "backend"
    if name is None:
        name, source = os.environ.get(ENVIRONMENT_VARIABLE) or None, ENVIRONMENT_VARIABLE
    if name is not None and name not in NAMES:
        raise ValueError(f"{source}: got {name!r}, expected one of {', '.join(NAMES)}")
    return name, source


def first_fused(modules: dict[str, ModuleType], call: Any) -> tuple[str | None, list[str]]:
    """The fused backend that runs `call` when none is named, or None, and the reasons of those that were passed over.
    On a GPU a class of calls that has not been checked yet is checked here."""
    device = call.query.device
    names, given = DEFAULT_ORDER.get(device.type, ()), None
    if verdicts.needs_proof(device):
        given = classes.features(call)
        names = evidence.order(call, names)
    reasons: list[str] = []
    unproved: list[str] = []
    for name in names:
        reason = _unavailable(modules, name) or modules[name].refusal(call)
        if reason is None and given is not None:
            proved, why = verdicts.verified(call.operation, name, device, given)
            if not proved:
                reason = why
                unproved.append(f"{name}: {why}")
        if reason is None:
            if unproved:
                _warn_of_another(call.operation, name, tuple(unproved))
            return name, reasons
        reasons.append(f"{name}: {reason}")
    return None, reasons


def why_not(modules: dict[str, ModuleType], name: str, call: Any) -> str | None:
    """Why this backend does not run `call` when it is asked for by name, or None."""
    return _unavailable(modules, name) or modules[name].refusal(call)


def default_of(modules: dict[str, ModuleType], wanted: classes.Class, device: torch.device) -> tuple[str, str]:
    """The backend that calls of a class on a GPU take when none is named, and why. Checks what is not known yet."""
    reasons = []
    names = DEFAULT_ORDER.get(device.type, ())
    for name in evidence.order_of(wanted.operation, device, getattr(torch, wanted.dtype), wanted.head_dim, names):
        reason = _unavailable(modules, name)
        if reason is None:
            proved, reason = verdicts.verified_class(wanted, name, device)
            if proved:
                return name, reason
        reasons.append(f"{name}: {reason}")
    return "reference", "; ".join(reasons) or f"no fused kernel exists for device type {device.type!r}"


@constant  # what can run does not change under a compiled graph
def _unavailable(modules: dict[str, ModuleType], name: str) -> str | None:
    if name not in modules:
        return "this version of retro_kernels does not have it"
    return modules[name].unavailable()


# Both are constants of a compiled graph, so that they warn while it is traced.
@constant
def _warn_of_reference(operation: str, device: str, reasons: tuple[str, ...]) -> None:
    why = "; ".join(reasons) or f"no fused kernel exists for device type {device!r}"
    _warn_once(
        why,
        f"retro_kernels: {operation} runs as the slow pure-PyTorch reference. {why}. "
        f'`retro-kernels doctor` tells more; backend="reference" silences this.',
    )


@constant
def _warn_of_another(operation: str, name: str, reasons: tuple[str, ...]) -> None:
    why = "; ".join(reasons)
    _warn_once(why, f"retro_kernels: {operation} runs on {name}, because what comes before it was not proved. {why}.")


def _warn_once(why: str, text: str) -> None:
    if why not in _warned:
        _warned.add(why)
        warnings.warn(text, stacklevel=5)
