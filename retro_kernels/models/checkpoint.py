"""A model's folder: `config.json` and its weights as safetensors, in one file or in shards with an index. No pickle."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..files import replaced, write_bytes, write_json
from ..nn import RotaryPositions
from ..ops import validate
from .config import RetroConfig

if TYPE_CHECKING:
    from .retro import Retro

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
MODEL_TYPE = "retro_kernels.Retro"


def save(model: Retro, folder: str | os.PathLike[str], *, max_shard_size: int = 5_000_000_000) -> None:
    """Writes the folder. Weights larger than `max_shard_size` bytes go into several files, named in an index. Every
    file appears whole or not at all; `config.json` comes last, so that a folder with one is complete.

    Raises ValueError for a `max_shard_size` that is no positive integer, and for weights on the meta device.
    """
    from safetensors.torch import save_file

    validate.integer("max_shard_size", max_shard_size, 1)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    shards: list[dict[str, torch.Tensor]] = [{}]
    size = 0
    for name, tensor in model.state_dict().items():
        if tensor.is_meta:
            raise ValueError(f"model: got {name} on the meta device, which holds no weights, expected a real device")
        if shards[-1] and size + tensor.nbytes > max_shard_size:
            shards.append({})
            size = 0
        shards[-1][name] = tensor.detach().contiguous()
        size += tensor.nbytes
    count = len(shards)
    names = [WEIGHTS] if count == 1 else [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    for name, shard in zip(names, shards):
        with replaced(folder / name) as temporary:
            save_file(shard, temporary, metadata={"format": "pt"})
    if count > 1:
        where = {key: name for name, shard in zip(names, shards) for key in shard}
        total = sum(tensor.nbytes for shard in shards for tensor in shard.values())
        index = {"metadata": {"total_size": total}, "weight_map": where}
        write_json(folder / INDEX, index)
    _remove_others(folder, {*names, *([INDEX] if count > 1 else [])})
    config = {"model_type": MODEL_TYPE, **model.config.to_dict()}
    write_bytes(folder / CONFIG, (json.dumps(config, indent=1) + "\n").encode())


def load(
    kind: type[Retro],
    folder: str | os.PathLike[str],
    *,
    config: RetroConfig | None = None,
    backend: str | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Retro:
    """The model in the folder, of the class `kind`, in evaluation mode. `config`: what it must be; None takes the
    folder's. `dtype`: to convert to; None keeps what is stored.

    Raises FileNotFoundError for a file that is not there; ValueError for another model or config, and for weights that
    are missing, unknown, of another shape or in a broken file. Every message names the file.
    """
    folder = Path(folder)
    stored = read_config(folder)
    if config is not None and config != stored:
        mine, theirs = config.to_dict(), stored.to_dict()
        different = ", ".join(
            f"{name} = {theirs[name]!r}, not {mine[name]!r}" for name in mine if mine[name] != theirs[name]
        )
        raise ValueError(f"config: {folder / CONFIG} has {different}; expected the same everywhere")
    model = kind(stored, backend=backend, device="meta")
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    weights: dict[str, torch.Tensor] = {}
    for path in _weight_files(folder):
        for name, tensor in _tensors(path, "cpu" if device is None else str(device)):
            if name not in wanted:
                raise ValueError(f"{path}: got {name}, which a model of {folder / CONFIG} does not have")
            if tuple(tensor.shape) != wanted[name]:
                raise ValueError(
                    f"{path}: got {name} of shape {list(tensor.shape)}, expected {list(wanted[name])}, by {CONFIG}"
                )
            weights[name] = tensor if dtype is None else tensor.to(dtype)
    missing = sorted(set(wanted) - set(weights))
    if missing:
        shown = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        raise ValueError(f"{folder}: {shown} missing, expected the weights of every part of the model")
    model.load_state_dict(weights, assign=True)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    _materialise_tables(model, weights[next(iter(weights))].device)
    return model.eval()


def read_config(folder: str | os.PathLike[str]) -> RetroConfig:
    """The config in the folder. Raises FileNotFoundError or ValueError."""
    path = Path(folder) / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there; expected the folder of a model that save_pretrained wrote")
    try:
        values = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: no valid JSON ({error})") from error
    if not isinstance(values, dict) or values.pop("model_type", None) != MODEL_TYPE:
        raise ValueError(f"{path}: expected a model of this library, with model_type = {MODEL_TYPE!r}")
    try:
        return RetroConfig.from_dict(values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def _materialise_tables(model: Retro, device: torch.device) -> None:
    """Rotary tables are buffers that no file holds: a model that was built on the meta device makes them here."""
    for module in model.modules():
        if isinstance(module, RotaryPositions):
            module.to_empty(device=device)


def _weight_files(folder: Path) -> list[Path]:
    if (folder / INDEX).is_file():
        try:
            where = json.loads((folder / INDEX).read_text())["weight_map"]
            names = sorted(set(where.values()))
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{folder / INDEX}: no index of shards ({type(error).__name__}: {error})") from error
    else:
        names = [WEIGHTS]
    for name in names:
        if Path(name).name != name:
            raise ValueError(f"{folder / INDEX}: got file name {name!r}, expected one in the same folder")
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name} is not there; expected the model's weights")
    return [folder / name for name in names]


def _tensors(path: Path, device: str) -> Iterable[tuple[str, torch.Tensor]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt", device=device) as file:
            for name in file.keys():  # noqa: SIM118 (not a dict)
                yield name, file.get_tensor(name)
    except SafetensorError as error:
        raise ValueError(f"{path}: broken or no safetensors file ({error})") from error


def _remove_others(folder: Path, kept: set[str]) -> None:
    """Weights of an earlier model in the folder, which `load` might take for this one's."""
    for path in [*folder.glob("model*.safetensors"), folder / INDEX]:
        if path.name not in kept:
            path.unlink(missing_ok=True)
