"""Types that `swap` and the files of the peers share."""

from __future__ import annotations

import warnings
from typing import Any, Protocol

import torch
from torch import nn

from ..ops.verification.classes import Class

AS_TRAINED, PAPER = "as_trained", "paper"

_warned: set[str] = set()


class FusedForward:
    """The replacement of one module's `forward`: a callable that holds its module and reads its weights.

    It is an object, not a closure, so that a deep copy or a pickle of the module carries one bound to the copy.
    `positions` is None where swap's argument of that name makes no difference.
    """

    def __init__(self, module: nn.Module, positions: str | None) -> None:
        self.module = module
        self.positions = positions

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError


class Integration(Protocol):
    """The parts of one peer that `swap` can replace."""

    LOOKS_FOR: tuple[str, ...]

    def recognises(self, module: nn.Module) -> bool:
        """Whether the module claims to be what is looked for. Imports nothing of the peer."""

    def refusal(self, module: nn.Module) -> str | None:
        """Why it is not what this version was written for, or None."""

    def note(self, module: nn.Module) -> str | None:
        """A note for the user about the swapped module, or None."""

    def likely_class(self, module: nn.Module) -> Class:
        """The class of calls that the fused module makes, as far as the module tells."""

    def fused_forward(self, module: nn.Module, positions: str) -> FusedForward:
        """The forward to put on the instance."""


def class_names(module: nn.Module) -> list[str]:
    """The qualified names of the module's class and all its bases."""
    return [f"{kind.__module__}.{kind.__qualname__}" for kind in type(module).__mro__]


def warn_once(message: str) -> None:
    """A warning at the first call with this message in the process; none while torch.compile traces."""
    if not torch.compiler.is_compiling() and message not in _warned:
        _warned.add(message)
        warnings.warn(f"retro_kernels.swap: {message}", stacklevel=3)
