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
from .base import class_names, describe_additions
from .megatron_checkpoint import FILE, is_folder, read_folder
from .tensors import DIVIDED, DTYPES, Tensors, load_pickle, named, whole

PEERS: dict[str, ModuleType] = {module.NAME: module for module in (retro_pytorch, labml, megatron, norlund)}
FSDP1 = "torch.distributed.fsdp.fully_sharded_data_parallel.FullyShardedDataParallel"
SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")


@dataclass(frozen=True)
class Converted:
    """What `converted` found."""

    peer: str
    source: str
    config: RetroConfig
    weights: dict[str, torch.Tensor]
    """By the names of `Retro`. They may share memory with the source's."""
    assumed: dict[str, Any]
    """Fields of the config that neither the source nor the caller told."""


def converted(
    source: nn.Module | str | os.PathLike[str],
    *,
    peer: str | None = None,
    prefix: str | None = None,
    dtype: torch.dtype | None = None,
    **changes: Any,
) -> Converted:
    """A peer's model or file as a config and the weights of a `Retro`; see `Retro.from_peer`."""
    if peer is not None and peer not in PEERS:
        raise ValueError(f"peer: got {peer!r}, expected one of {', '.join(PEERS)}")
    if not isinstance(prefix, (str, type(None))):
        raise TypeError(f"prefix: got {type(prefix).__name__}, expected text, or None")
    if dtype not in (None, *DTYPES):
        raise ValueError(f"dtype: got {dtype!r}, expected one of {', '.join(map(str, DTYPES))}")
    if isinstance(source, nn.Module):
        if prefix is not None:
            raise ValueError(f"prefix: got {prefix!r} with a module, expected None: give the part that you mean")
        if any(FSDP1 in class_names(part) for part in source.modules()):
            raise ValueError(
                f"source: got a {type(source).__name__} with FullyShardedDataParallel in it, where a process has a "
                "part of the weights, expected them whole: save a full state dict (torch.distributed.checkpoint."
                "state_dict.get_model_state_dict with StateDictOptions(full_state_dict=True)) and give that file"
            )
        found, model = _find_model(source, peer)
        reason = describe_additions(model)
        if reason is not None:
            raise ValueError(
                f"source: got a {type(model).__name__} with more than {found}'s weights: {reason}; take that back, or "
                "give a file with its state dict, where the weights are meant alone"
            )
        options, tensors = (
            PEERS[found].describe(model),
            Tensors(whole(named(model.state_dict())), f"the {type(model).__name__}"),
        )
    elif isinstance(source, (str, os.PathLike)):
        tree, options = read_tensors(Path(source))
        found, read = _find_weights(tree, peer, prefix, str(source))
        tensors = Tensors(read, str(source))
    else:
        raise TypeError(f"source: got {type(source).__name__}, expected a torch.nn.Module or the path of a checkpoint")
    known = {field.name for field in dataclasses.fields(RetroConfig)}
    unknown = sorted(set(changes) - known)
    if unknown:
        raise TypeError(f"changes: got {', '.join(unknown)}, expected fields of RetroConfig")
    config, weights = PEERS[found].convert(tensors, {**options, **changes})
    tensors.finish()
    if dtype is None:
        first = {x.dtype: name for name, x in reversed(weights.items()) if x.is_floating_point()}
        if len(first) > 1:
            kinds = " and ".join(f"{kind} ({name})" for kind, name in first.items())
            raise ValueError(
                f"dtype: got none, and {tensors.source} has {kinds}, expected one for all: give it to Retro.from_peer "
                "or to retro-kernels convert"
            )
    untold = getattr(PEERS[found], "UNTOLD", ())
    assumed = {name: getattr(config, name) for name in untold if name not in {**options, **changes}}
    return Converted(found, tensors.source, config, weights, assumed)


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
    tree: Mapping[str, Any], peer: str | None, prefix: str | None, source: str
) -> tuple[str, dict[str, torch.Tensor]]:
    """The implementation whose names these are, and the tensors without what stands before their names: the wrappers'
    attributes, and the keys under which a trainer saves a model among other things."""
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for name, x in named(tree).items():
        for cut in [0, *(i + 1 for i, letter in enumerate(name) if letter == ".")]:
            parts.setdefault(name[:cut], {})[name[cut:]] = x
    given = f"{prefix}." if prefix and not prefix.endswith(".") else prefix or ""
    parts = {start: x for start, x in parts.items() if start.startswith(given)}
    found: dict[str, str] = {}
    for start in sorted(parts, key=len):
        if not start.startswith(tuple(found)):
            for name, integration in PEERS.items():
                if peer in (None, name) and integration.is_weights(parts[start]):
                    found.setdefault(start, name)
    if not found:
        shown = ", ".join(sorted(parts.get(given, {}))[:5]) or "none"
        where = "" if prefix is None else f" under {prefix!r}"
        expected = ", ".join(PEERS) if peer is None else peer
        raise ValueError(f"{source}: got tensors named {shown} ...{where}, expected those of {expected}")
    if len(found) > 1:
        given = "none" if prefix is None else repr(prefix)
        raise ValueError(
            f"prefix: got {given}, and {source} holds {len(found)} models, expected which: "
            + " or ".join(f"{start!r} ({len(parts[start])} tensors)" for start in found)
        )
    ((start, name),) = found.items()
    beside = [] if prefix is not None else _beside(tree, start)
    if beside:
        shown = ", ".join(sorted(beside)[:6]) + (f" and {len(beside) - 6} more" if len(beside) > 6 else "")
        raise ValueError(
            f"{source}: {shown} left over beside the model, expected no tensor without a place in it: give "
            f"prefix={start!r} to leave them aside"
        )
    return name, parts[start]


def _beside(tree: Mapping[str, Any], start: str) -> list[str]:
    """The tensors that are no part of the model under `start`, and stand in the same dictionary as its tensors do."""
    while True:
        inner = (key for key, value in tree.items() if isinstance(value, Mapping) and start.startswith(f"{key}."))
        key = next(inner, None)
        if key is None:
            return [name for name in named(tree) if not name.startswith(start)]
        tree, start = tree[key], start.removeprefix(f"{key}.")


def read_tensors(path: Path) -> tuple[Mapping[str, Any], dict[str, Any]]:
    """The tensors of a file, in the dictionaries in which they were saved, and what it says of the model besides.
    Nothing that a pickle could run is run.

    Raises FileNotFoundError; ValueError for a file that is no checkpoint, and for one that holds more than weights.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} is not there; expected a checkpoint")
    if path.is_dir():
        if not is_folder(path):
            files = sorted(x.name for x in path.iterdir() if x.suffix in SUFFIXES)
            hint = f"; {', '.join(files[:5])} there may be one" if files else ""
            raise ValueError(
                f"{path}: got a folder, expected a checkpoint's file, or a folder that Megatron or "
                f"torch.distributed.checkpoint saved{hint}"
            )
        return read_folder(path)
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path), {}
        except SafetensorError as error:
            raise ValueError(f"{path}: broken or no safetensors file ({error})") from error
    if path.name == FILE:
        raise ValueError(
            f"{path}: got a shard that Megatron saved, expected the checkpoint's folder, {path.parents[1]}"
        )
    loaded = load_pickle(path)
    if not isinstance(loaded, Mapping) or not named(loaded):
        raise ValueError(f"{path}: got {type(loaded).__name__} without tensors, expected a state dict")
    if any(hasattr(x, "full_tensor") for x in named(loaded).values()):  # read where DTensor is imported already
        raise ValueError(f"{path}: {DIVIDED}")
    return loaded, {}
