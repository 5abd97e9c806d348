"""The choice of a backend: what can run in this process, what can run one call, and which is taken.

A backend of an operation is a module with `unavailable() -> str | None` (why it cannot run in this process) and
`refusal(call) -> str | None` (why it cannot run this call). A backend asked for by name runs or raises with that
reason. Without a name the first of the device's order that can run is taken; when that is only the reference, a
warning says why, once for each reason.
"""

from __future__ import annotations

import dataclasses
import os
import warnings
from types import ModuleType
from typing import Any

import torch

from . import evidence
from .compiling import constant

NAMES = ("reference", "cpu", "triton", "cuda")
ENVIRONMENT_VARIABLE = "RETRO_KERNELS_BACKEND"

# Which is asked first, unless `evidence` has measured that another is faster. A kernel that no GPU has verified yet is
# passed over on a GPU (see `unverified`).
DEFAULT_ORDER = {"cpu": ("cpu",), "cuda": ("triton", "cuda")}

_warned: set[str] = set()


@dataclasses.dataclass(frozen=True)
class BackendStatus:
    """Whether a backend can run in this process, and if not, why and what to do."""

    available: bool
    reason: str | None = None


def status(modules: dict[str, ModuleType]) -> dict[str, BackendStatus]:
    """The status of every backend of one operation, by name."""
    return {name: BackendStatus(reason is None, reason) for name in NAMES for reason in [_unavailable(modules, name)]}


def choose(operation: str, modules: dict[str, ModuleType], call: Any, requested: str | None) -> str:
    """The name of the backend that runs `call`. `requested` (the argument) wins over RETRO_KERNELS_BACKEND.

    Raises ValueError for an unknown name or a call that the named backend refuses, RuntimeError when the named
    backend cannot run in this process.
    """
    name, source = named(requested)
    if name is not None:
        reason = _unavailable(modules, name)
        if reason is not None:
            raise RuntimeError(f"{source}={name!r} cannot run here: {reason}")
        reason = modules[name].refusal(call)
        if reason is not None:
            raise ValueError(f"{source}={name!r} cannot run this {operation}: {reason}")
        return name

    name, reasons = first_fused(modules, call)
    if name is not None:
        return name
    if not torch.compiler.is_compiling():
        _warn_once(operation, call.query.device.type, reasons)
    return "reference"


def named(requested: str | None) -> tuple[str | None, str]:
    """The backend that is asked for by name, if any, and by what: the argument or RETRO_KERNELS_BACKEND.

    Raises ValueError for an unknown name."""
    name, source = requested, "backend"
    if name is None:
        name, source = os.environ.get(ENVIRONMENT_VARIABLE) or None, ENVIRONMENT_VARIABLE
    if name is not None and name not in NAMES:
        raise ValueError(f"{source}: got {name!r}, expected one of {', '.join(NAMES)}")
    return name, source


def first_fused(modules: dict[str, ModuleType], call: Any) -> tuple[str | None, list[str]]:
    """The fused backend that runs `call` when none is named, or None with every one's reason."""
    reasons = []
    for name in evidence.order(call, DEFAULT_ORDER.get(call.query.device.type, ())):
        reason = why_not(modules, name, call)
        if reason is None:
            return name, []
        reasons.append(f"{name}: {reason}")
    return None, reasons


def why_not(modules: dict[str, ModuleType], name: str, call: Any, by_name: bool = False) -> str | None:
    """Why this backend does not run `call`, or None. `by_name`: asked for by name, so unverified ones do."""
    reason = _unavailable(modules, name)
    if reason is None and not by_name:
        reason = unverified(modules[name], name)
    return reason or modules[name].refusal(call)


def unverified(module: ModuleType, name: str) -> str | None:
    """Why a GPU backend that can run is still not taken by default: no GPU has run its checks yet."""
    if getattr(module, "VERIFIED_ON_GPU", True):
        return None
    checked_in = getattr(module, "CHECKED_IN", "the interpreter")
    return (
        f"its kernels have passed their checks in {checked_in} and compile ahead of time, but no GPU has run them yet; "
        f"take them by name with backend={name!r} or {ENVIRONMENT_VARIABLE}={name}, and check them with "
        "`python -m benchmarks.gpu_suite`"
    )


@constant  # what can run does not change under a compiled graph
def _unavailable(modules: dict[str, ModuleType], name: str) -> str | None:
    if name not in modules:
        return "this version of retro_kernels does not have it"
    return modules[name].unavailable()


def _warn_once(operation: str, device: str, reasons: list[str]) -> None:
    why = "; ".join(reasons) or f"no fused kernel exists for device type {device!r}"
    if why not in _warned:
        _warned.add(why)
        warnings.warn(
            f"retro_kernels: {operation} runs as the slow pure-PyTorch reference. {why}. "
            f'`retro-kernels doctor` tells more; backend="reference" silences this.',
            stacklevel=4,
        )
