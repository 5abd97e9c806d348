"""A peer's tensors, each of which must be accounted for, and the files they are in."""

from __future__ import annotations

import argparse
import contextlib
import math
import re
import threading
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
DIVIDED = (
    "it holds what one process had of a model that torch.distributed divided, expected all of it: save a full state "
    "dict (torch.distributed.checkpoint.state_dict.get_model_state_dict with StateDictOptions(full_state_dict=True)), "
    "or a folder (torch.distributed.checkpoint.save)"
)


_loading = threading.Lock()


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
            stem = name.rpartition(".")[0] + "."
            near = sorted(x for x in self.left if x.startswith(stem) and "." in x.removeprefix(stem))[:3]
            hint = f", got {', '.join(near)} in its place: are adapters not merged?" if near else ""
            raise ValueError(f"{self.source}: {name} missing, expected every tensor of the model{hint}")
        found = self.left[name]
        if found.is_meta:
            raise ValueError(f"{self.source}: got {name} on the meta device, expected its values: load them first")
        if found.dtype not in DTYPES or found.layout != torch.strided:
            kinds = ", ".join(map(str, DTYPES))
            what = found.dtype if found.dtype not in DTYPES else found.layout
            raise ValueError(f"{self.source}: got {name} of {what}, expected a dense tensor of {kinds}")
        return found


class Stand:
    """Stands for an object of a class that a pickle names: the class is not looked for, made or run."""

    def __new__(cls, *_: Any) -> Stand:
        return super().__new__(cls)

    def __setstate__(self, _: Any) -> None:
        pass


def load_pickle(path: Path, *, stand_in: bool = False) -> Any:
    """`torch.load`, weights only, mapped into memory where the format allows: what is not used is not read.

    A file with more than tensors, numbers, names, containers of these and an argparse.Namespace is refused; with
    `stand_in` a Stand takes the place of whatever else there is.
    """
    try:
        with _declared(path, stand_in):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # whatever a broken file makes the unpickler raise
        cause = error.__context__ or error  # torch's own message would advise to run what the file holds
        reason = str(cause).split("\n")[0][:300]
        foreign = set() if stand_in else _foreign(path)
        if any(name.startswith("torch.distributed.") for name in foreign):
            raise ValueError(f"{path}: {DIVIDED}") from error
        if foreign:
            raise ValueError(
                f"{path}: it holds more than weights ({', '.join(sorted(foreign)[:5])}), and loading such objects "
                "could run any code, so it is not done; where you trust it, load it yourself with "
                "torch.load(path, weights_only=False), and give the model, or a file with its state dict alone: "
                "torch.save(model.state_dict(), path)"
            ) from error
        raise ValueError(f"{path}: no checkpoint that can be read ({type(cause).__name__}: {reason})") from error


@contextlib.contextmanager
def _declared(path: Path, stand_in: bool) -> Iterator[None]:
    """Within it torch makes an argparse.Namespace; with `stand_in` a Stand of all else that it does not know itself,
    even if this process has declared it harmless: importing Megatron-core does that with its enumerations, which need
    not have the members that the file names. A process has one list of what is harmless: loads of other threads
    meanwhile go by this one."""
    with _loading:
        before = torch.serialization.get_safe_globals()
        try:
            if stand_in:
                torch.serialization.clear_safe_globals()
            stands = [(Stand, name) for name in _foreign(path)] if stand_in else []
            torch.serialization.add_safe_globals([argparse.Namespace, *stands])
            yield
        finally:
            torch.serialization.clear_safe_globals()
            torch.serialization.add_safe_globals(before)


def _foreign(path: Path) -> set[str]:
    """The classes and functions that its pickle names and that torch does not know as harmless."""
    try:
        return set(torch.serialization.get_unsafe_globals_in_checkpoint(path)) - {"argparse.Namespace"}
    except Exception:  # a broken file, or one of before torch 1.6
        return set()


def flat(tree: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, torch.Tensor]]:
    """(name, tensor) of nested dictionaries, names joined with dots. What is no tensor is left out."""
    for key, value in tree.items():
        if isinstance(value, torch.Tensor):
            yield f"{prefix}{key}", value
        elif isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}.")


def named(tree: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The same as one dictionary, by the names that the tensors have without wrappers around parts."""
    return {plain_name(name): x for name, x in flat(tree)}


def plain_name(name: str) -> str:
    """A tensor's or a part's name without what torch.compile, FSDP and activation checkpointing put into it."""
    return re.sub(r"(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)(\.|$)", "", name).removesuffix(".")


def whole(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """With those that FSDP2 or tensor parallelism divide (DTensor) put together, for which every process must call."""
    return {name: x.full_tensor() if hasattr(x, "full_tensor") else x for name, x in tensors.items()}
