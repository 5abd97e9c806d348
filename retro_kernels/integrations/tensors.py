"""A peer's tensors, each of which must be accounted for, and the files they are in."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch


class Tensors:
    """Tensors by name; whoever converts them takes each once.

    Args:
        tensors: name -> tensor.
        source: what they are of, for messages.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor], source: str) -> None:
        self.source = source
        self.left = {name: x for name, x in tensors.items() if isinstance(x, torch.Tensor)}

    def __contains__(self, name: str) -> bool:
        return name in self.left

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._find(name).shape)

    def take(self, name: str, shape: tuple[int, ...] | None = None) -> torch.Tensor:
        """It, in the shape given. Raises ValueError where there is none (any more), or one of another size."""
        found = self._find(name)
        if shape is not None:
            if found.numel() != math.prod(shape):
                raise ValueError(f"{self.source}: got {name} of shape {list(found.shape)}, expected {list(shape)}")
            found = found.reshape(shape)
        del self.left[name]
        return found

    def look(self, name: str) -> torch.Tensor:
        """It, without taking it."""
        return self._find(name)

    def move(self, theirs: str, ours: str, into: dict[str, torch.Tensor]) -> None:
        """Takes a layer's weight, and its bias if it has one."""
        into[f"{ours}.weight"] = self.take(f"{theirs}.weight")
        if f"{theirs}.bias" in self:
            into[f"{ours}.bias"] = self.take(f"{theirs}.bias")

    def count(self, pattern: str) -> int:
        """How many numbers from 0 on the pattern's {} can be, so that a name begins with it."""
        number = 0
        while any(name.startswith(pattern.format(number)) for name in self.left):
            number += 1
        return number

    def finish(self) -> None:
        """Raises ValueError where a tensor was not taken."""
        if self.left:
            names = sorted(self.left)
            shown = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
            raise ValueError(
                f"{self.source}: {shown} left over, expected no tensor without a place in the model: is it another "
                "version, or are adapters not merged?"
            )

    def _find(self, name: str) -> torch.Tensor:
        if name not in self.left:
            raise ValueError(f"{self.source}: {name} missing, expected every tensor of the model")
        return self.left[name]


def load_pickle(path: Path, known: Iterable[Any] = ()) -> Any:
    """`torch.load`, weights only, mapped into memory where the format allows. `known`: harmless classes that it may
    hold besides."""
    try:
        with torch.serialization.safe_globals(list(known)):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a broken file makes the unpickler raise
        reason = str(error).split("\n")[0][:300]
        try:
            with torch.serialization.safe_globals(list(known)):
                foreign = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        except Exception:
            foreign = []
        if foreign:
            raise ValueError(
                f"{path}: it holds more than weights ({', '.join(sorted(foreign)[:5])}), and loading such objects "
                "could run any code, so it is not done; save its state dict alone, where you trust it: "
                "torch.save(model.state_dict(), path)"
            ) from error
        raise ValueError(f"{path}: no checkpoint that can be read ({type(error).__name__}: {reason})") from error


def flat(tree: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, torch.Tensor]]:
    """(name, tensor) of nested dictionaries, names joined with dots. What is no tensor is left out."""
    for key, value in tree.items():
        if isinstance(value, torch.Tensor):
            yield f"{prefix}{key}", value
        elif isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}.")
