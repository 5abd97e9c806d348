"""Megatron's checkpoint folders. Format "torch": `iter_0000100/mp_rank_00/model_optim_rng.pt` for each tensor-parallel
rank, Megatron-core's and legacy Megatron's. Format "torch_dist": `iter_0000100/.metadata`, the parts beside it, and
`common.pt` with the arguments. Nothing of Megatron is imported, and no pickle is run.

A training run's file holds more than weights and arguments: the optimizer's state, random states (of NumPy, too),
enumerations and dtypes among the arguments, and under "model" Transformer Engine's `_extra_state`. Tensors that are not
wanted are not read, since the file is mapped; of what is no tensor nothing is made (see `tensors.Stand`), and where it
would be needed it is refused.
"""

from __future__ import annotations

import argparse
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from .distributed_checkpoint import INDEX, read_distributed
from .megatron import describe_arguments, is_legacy, modern_names
from .tensors import load_pickle

LATEST = "latest_checkpointed_iteration.txt"
FILE, COMMON = "model_optim_rng.pt", "common.pt"
NO_WEIGHTS = re.compile(r"optimizer\.|chained_\d+\.|rng_state|rerun_state|.*_extra_state")
BY_ROWS = (
    ".linear_qkv.",
    ".linear_q.",
    ".linear_kv.",
    ".linear_fc1.",
    "embedding.word_embeddings.",
    "output_layer.",
)
BY_COLUMNS = (".linear_proj.weight", ".linear_fc2.weight")
DRIFT = 0.01  # by which copies in the shards of one run may differ, as a part of their largest element


def is_folder(path: Path) -> bool:
    """Whether it is a checkpoint's folder, or one of several iterations."""
    return (path / LATEST).is_file() or any(path.glob("mp_rank_*")) or (path / INDEX).is_file()


def read_folder(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """-> the model's whole tensors, by Megatron-core's or by legacy names, and what its arguments say.

    Raises ValueError or FileNotFoundError for shards that are missing or of different runs, and for a format or a model
    that is not read.
    """
    folder = _iteration(path)
    if (folder / INDEX).is_file():
        tensors = read_distributed(folder, lambda name: NO_WEIGHTS.match(name) is not None)
        common = folder / COMMON  # other trainers' distributed checkpoints have none
        if not common.is_file():
            return tensors, {}
        return tensors, describe_arguments(_load(common, ("args",))["args"], is_legacy(tensors))
    ranks = sorted(folder.glob("mp_rank_*"))
    staged = [x.name for x in ranks if not re.fullmatch(r"mp_rank_\d+", x.name)]
    if not ranks or staged:
        what = f"{staged[0]}, a part of a pipeline" if staged else "no mp_rank_00"
        raise ValueError(f"{folder}: got {what}, expected mp_rank_00, mp_rank_01 ... for each rank, or .metadata")
    if [int(x.name[8:]) for x in ranks] != list(range(len(ranks))):
        raise ValueError(f"{folder}: got {', '.join(x.name for x in ranks)}, expected every rank from 0 on")
    loaded = [_load(x / FILE, ("model", "args")) for x in ranks]
    first, args = loaded[0], loaded[0]["args"]
    size = getattr(args, "tensor_model_parallel_size", 1)
    if size != len(ranks):
        raise ValueError(f"{folder}: got {len(ranks)} shards, expected {size}, by the checkpoint's arguments")
    for rank, other in enumerate(loaded):
        for name in ("iteration", "checkpoint_version"):
            if other.get(name) != first.get(name):
                raise ValueError(
                    f"{folder}: got {name} {other.get(name)} in rank {rank} and {first.get(name)} in rank 0, expected "
                    "shards of one run"
                )
    version = first.get("checkpoint_version", 3.0)
    if not isinstance(version, (int, float)) or version < 2.0:
        raise ValueError(f"{folder}: got checkpoint_version {version}, expected 2 or 3: its heads lie in another order")
    shards = [dict(_weights(y["model"], str(x / FILE))) for x, y in zip(ranks, loaded)]
    for rank, shard in enumerate(shards):
        if shard.keys() != shards[0].keys():
            odd = sorted(shard.keys() ^ shards[0].keys())
            raise ValueError(f"{folder}: got {odd[0]} in some of the shards only, expected it in all (rank {rank})")
    new = modern_names(shards[0])
    gated = bool(getattr(args, "swiglu", False))
    apart: dict[str, float] = {}
    merged = {name: merge(str(folder), new[name], [x[name] for x in shards], gated, apart) for name in shards[0]}
    if apart:
        worst = max(apart, key=lambda name: apart[name])
        warnings.warn(
            f"{folder}: the shards' copies of {len(apart)} tensors have drifted apart, those of {worst} by "
            f"{apart[worst]:.1e} of the largest element: their means are taken",
            stacklevel=2,
        )
    return merged, describe_arguments(args, is_legacy(merged))


def _iteration(path: Path) -> Path:
    if not (path / LATEST).is_file():
        return path
    latest = (path / LATEST).read_text().strip()
    name = "release" if latest == "release" else f"iter_{int(latest):07d}" if latest.isdigit() else latest
    if not (path / name).is_dir() or Path(name).name != name:
        raise FileNotFoundError(f"{path / name} is not there; expected the folder that {LATEST} names")
    return path / name


def _load(path: Path, parts: tuple[str, ...]) -> Mapping[str, Any]:
    """A file of it, which must have these parts, and an `argparse.Namespace` of arguments."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there; expected a shard")
    loaded = load_pickle(path, stand_in=True)
    if not isinstance(loaded, Mapping) or any(part not in loaded for part in parts):
        raise ValueError(f"{path}: got no {' and '.join(parts)}, expected a file that Megatron saved")
    if not isinstance(loaded["args"], argparse.Namespace):
        raise ValueError(f"{path}: got args that are no argparse.Namespace, expected a file that Megatron saved")
    return loaded


def _weights(tree: Mapping[str, Any], source: str, prefix: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of nested dictionaries, names joined with dots; what is neither is refused, but for the state that
    Transformer Engine keeps for fp8."""
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from _weights(value, source, f"{name}.")
        elif name.endswith("_extra_state"):
            continue
        elif isinstance(value, torch.Tensor):
            yield name, value
        else:
            raise ValueError(
                f"{source}: got {name} that is no tensor, expected nothing else under model: an object of another "
                "class is not made, since that could run any code"
            )


def merge(folder: str, name: str, parts: list[torch.Tensor], gated: bool, apart: dict[str, float]) -> torch.Tensor:
    """The tensor of which these are the shards. Of one that every shard has whole, copies may have drifted apart in
    training; then it is their mean, and `apart` is told. Raises ValueError where they are not of one run."""
    if len(parts) == 1:
        return parts[0]
    if any(x.shape != parts[0].shape for x in parts):
        shapes = " and ".join(str(list(x.shape)) for x in parts)
        raise ValueError(f"{folder}: got {name} of shapes {shapes} in its shards, expected shards of one run")
    if any(mark in name for mark in BY_ROWS) and ".layer_norm_" not in name:
        if gated and ".linear_fc1." in name:  # each shard holds its part of the gate and of the rest
            return torch.cat([x.chunk(2)[i] for i in range(2) for x in parts])
        return torch.cat(parts)
    if name.endswith(BY_COLUMNS):
        return torch.cat(parts, dim=1)
    if all(torch.equal(x, parts[0]) for x in parts):
        return parts[0]
    copies = torch.stack([x.double() for x in parts])
    drift = ((copies - copies[0]).abs().max() / copies.abs().max()).item()
    if not drift <= DRIFT:
        raise ValueError(f"{folder}: got {name} that differs between shards, expected shards of one run")
    apart[name] = drift
    return copies.mean(0).to(parts[0].dtype)
