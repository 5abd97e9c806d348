"""Ways of computing a workload, and the time that torch.compile may take for them."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

if TYPE_CHECKING:
    from .operations import Workload

Attention = Callable[..., Tensor]

SDPA_BACKENDS = {
    "cpu": {"math": SDPBackend.MATH, "flash": SDPBackend.FLASH_ATTENTION},
    "cuda": {
        "math": SDPBackend.MATH,
        "flash": SDPBackend.FLASH_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
        "cudnn": SDPBackend.CUDNN_ATTENTION,
    },
}


@dataclass(frozen=True)
class Variant:
    """One way of computing a workload. `context` is entered round the call, outside the timed region."""

    name: str
    workload: Workload
    """The workload that the variant computes: the case's, or the case's without its option."""
    attention: Attention
    context: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext
    compiled: bool = False
    undropped: Attention | None = None
    """The variant without dropout, where dropout is PyTorch's own and so cannot be compared."""
    extra: Callable[[str, str], dict] | None = None
    """(dtype, mode) -> further fields of its row, asked once it was checked."""
    refusal: Callable[[str, str], str | None] | None = None
    """(dtype, mode) -> why it cannot run this case, or None."""


@dataclass(frozen=True)
class Skipped:
    """A variant that is not timed, and why."""

    name: str
    reason: str


WITHOUT = " without"
"""Ends the name of retro_kernels' own variants without the case's option."""


def own_backends(device: torch.device, backends: list[str] | None = None) -> list[tuple[str, str | None]]:
    """(name, why it does not run here or None) of the backends whose turn it is."""
    import retro_kernels as rk

    result: list[tuple[str, str | None]] = []
    for name, state in rk.backends().items():
        if (backends and name not in backends) or (name == "reference" and not backends):
            continue
        reason = None if state.available else str(state.reason)
        if not reason and {"cpu": "cpu", "triton": "cuda", "cuda": "cuda"}.get(name, device.type) != device.type:
            reason = f"computes on another kind of device than {device.type}"
        result.append((name, reason))
    if all(reason for _, reason in result) and not backends:
        result.append(("reference", None))
    return result


class CompileTimeout(BaseException):
    """torch.compile took longer than it was allowed. Not an Exception: the compiler would wrap it."""


@contextlib.contextmanager
def wall_clock_limit(seconds: float) -> Iterator[None]:
    """Raises CompileTimeout in the block after so many seconds; no limit off the main thread or off Unix."""
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def expire(signum, frame):
        raise CompileTimeout

    previous = signal.signal(signal.SIGALRM, expire)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


@dataclass
class CompileBudget:
    """Seconds left for all compilation of a run. What one variant does not use is left for the next."""

    total: float
    per_variant: float
    used: float = 0.0

    @property
    def allowed(self) -> float:
        return min(self.per_variant, self.total - self.used)

    @contextlib.contextmanager
    def spend(self) -> Iterator[float]:
        allowed, start = self.allowed, time.monotonic()
        try:
            with wall_clock_limit(allowed):
                yield allowed
        finally:
            self.used += time.monotonic() - start
