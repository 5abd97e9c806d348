"""Other people's weights: which implementation a model or a file is of, and its tensors as those of a `Retro`."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from ..models.config import RetroConfig
from . import labml, megatron, norlund, retro_pytorch
from .megatron_checkpoint import is_folder, read_folder
from .tensors import Tensors, flat, load_pickle

PEERS: dict[str, ModuleType] = {module.NAME: module for module in (retro_pytorch, labml, megatron, norlund)}
PREFIXES = ("module.", "_orig_mod.", "model.", "retro.", "state_dict.")


@dataclass(frozen=True)
class Converted:
    """What `converted` found."""

    peer: str
    source: str
    config: RetroConfig
    weights: dict[str, torch.Tensor]
    """By the names of `Retro`. They may share memory with the source's."""


def converted(source: nn.Module | str | os.PathLike[str], *, peer: str | None = None, **changes: Any) -> Converted:
    """A peer's model or file as a config and the weights of a `Retro`; see `Retro.from_peer`."""
    if peer is not None and peer not in PEERS:
        raise ValueError(f"peer: got {peer!r}, expected one of {', '.join(PEERS)}")
    if isinstance(source, nn.Module):
        found, model = _find_model(source, peer)
        options, tensors = PEERS[found].describe(model), Tensors(model.state_dict(), f"the {type(model).__name__}")
    elif isinstance(source, (str, os.PathLike)):
        read, options = read_tensors(Path(source))
        found, read = _find_weights(read, peer, str(source))
        tensors = Tensors(read, str(source))
    else:
        raise TypeError(f"source: got {type(source).__name__}, expected a torch.nn.Module or the path of a checkpoint")
    known = {field.name for field in dataclasses.fields(RetroConfig)}
    unknown = sorted(set(changes) - known)
    if unknown:
        raise TypeError(f"changes: got {', '.join(unknown)}, expected fields of RetroConfig")
    config, weights = PEERS[found].convert(tensors, {**options, **changes})
    tensors.finish()
    return Converted(found, tensors.source, config, weights)


def exported(config: RetroConfig, weights: Mapping[str, torch.Tensor], peer: str) -> dict[str, torch.Tensor]:
    """The state dict of a peer's model; see `Retro.to_peer`."""
    able = [name for name, integration in PEERS.items() if hasattr(integration, "export")]
    if peer not in able:
        raise ValueError(f"peer: got {peer!r}, expected one of {', '.join(able)}")
    return PEERS[peer].export(config, weights)


def _find_model(module: nn.Module, peer: str | None) -> tuple[str, nn.Module]:
    """The implementation and the model inside `module`, which may be it."""
    found = [
        (name, part)
        for part in module.modules()
        for name, integration in PEERS.items()
        if peer in (None, name) and integration.is_model(part)
    ]
    if len(found) != 1:
        what = "none" if not found else f"{len(found)} ({', '.join(type(part).__name__ for _, part in found)})"
        raise ValueError(
            f"source: got a {type(module).__name__} with {what} of {', '.join(PEERS) if peer is None else peer}'s "
            "whole models in it, expected one"
        )
    return found[0]


def _find_weights(
    tensors: dict[str, torch.Tensor], peer: str | None, source: str
) -> tuple[str, dict[str, torch.Tensor]]:
    """The implementation whose names these are, without the prefixes that wrappers put before them."""
    while True:
        for name, integration in PEERS.items():
            if peer in (None, name) and integration.is_weights(tensors):
                return name, tensors
        prefix = next((x for x in PREFIXES if tensors and all(key.startswith(x) for key in tensors)), None)
        if prefix is None:
            break
        tensors = {key.removeprefix(prefix): x for key, x in tensors.items()}
    shown = ", ".join(sorted(tensors)[:5])
    raise ValueError(
        f"{source}: got tensors named {shown} ..., expected those of {', '.join(PEERS) if peer is None else peer}"
    )


def read_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The tensors of a file, by name, and what it says of the model besides. Nothing that a pickle could run is run.

    Raises FileNotFoundError; ValueError for a file that is no checkpoint, and for one that holds more than weights.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} is not there; expected a checkpoint")
    if path.is_dir():
        if not is_folder(path):
            raise ValueError(f"{path}: got a folder, expected a checkpoint's file, or a folder that Megatron saved")
        return read_folder(path)
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path), {}
        except SafetensorError as error:
            raise ValueError(f"{path}: broken or no safetensors file ({error})") from error
    loaded = load_pickle(path)
    if isinstance(loaded, Mapping) and isinstance(loaded.get("state_dict"), Mapping):  # Lightning
        loaded = loaded["state_dict"]
    elif isinstance(loaded, Mapping) and isinstance(loaded.get("model"), Mapping):
        loaded = loaded["model"]
    tensors = dict(flat(loaded)) if isinstance(loaded, Mapping) else {}
    if not tensors:
        raise ValueError(f"{path}: got {type(loaded).__name__} without tensors, expected a state dict")
    return tensors, {}
