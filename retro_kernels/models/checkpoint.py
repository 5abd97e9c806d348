"""A model's folder: `config.json` and its weights as safetensors, in one file or in shards with an index. No pickle."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..files import replaced, usual_mode, write_bytes, write_json
from ..nn import RotaryPositions
from ..ops import checks
from .config import RetroConfig

if TYPE_CHECKING:
    from .retro import Retro

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
PATTERN = "model{suffix}.safetensors"
MODEL_TYPE = "retro_kernels.Retro"


def save(model: Retro, folder: str | os.PathLike[str], *, max_shard_size: int = 5_000_000_000) -> None:
    """Writes the folder. Weights larger than `max_shard_size` bytes go into several files, named in an index. Every
    file appears whole or not at all; `config.json` comes last, so that a folder with one is complete.

    Raises ValueError for a `max_shard_size` that is no positive integer, and for weights on the meta device.
    """
    write(model.config, model.state_dict(), folder, max_shard_size=max_shard_size)


def write(
    config: RetroConfig,
    weights: Mapping[str, torch.Tensor],
    folder: str | os.PathLike[str],
    *,
    max_shard_size: int = 5_000_000_000,
    writes: bool = True,
) -> None:
    """Does what `save` does, with weights that processes may share (DTensors): then every process calls this, and one
    `writes`. Of divided weights it holds one file's at a time, not all.
    """
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    checks.integer("max_shard_size", max_shard_size, 1)
    for name, tensor in weights.items():
        if tensor.is_meta:
            raise ValueError(f"model: got {name} on the meta device, which holds no weights, expected a real device")
    folder = Path(folder)
    shapes = {name: torch.empty(x.shape, dtype=x.dtype, device="meta") for name, x in weights.items()}
    split = split_torch_state_dict_into_shards(shapes, filename_pattern=PATTERN, max_shard_size=max_shard_size)
    if writes:
        folder.mkdir(parents=True, exist_ok=True)
    for file, names in split.filename_to_tensors.items():
        shard = {name: _whole(weights[name]) for name in names}
        if writes:
            with replaced(folder / file) as temporary:
                try:
                    save_file(shard, temporary, metadata={"format": "pt"})
                except SafetensorError as error:  # which wraps what the system said
                    raise OSError(f"{folder / file} cannot be written ({error})") from error
                usual_mode(temporary)  # save_file makes it the owner's alone
    if not writes:
        return
    if split.is_sharded:
        write_json(folder / INDEX, {"metadata": split.metadata, "weight_map": split.tensor_to_filename})
    _remove_others(folder, {*split.filename_to_tensors, *([INDEX] if split.is_sharded else [])})
    stored = {"model_type": MODEL_TYPE, **config.to_dict()}
    write_bytes(folder / CONFIG, (json.dumps(stored, indent=1) + "\n").encode())


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor that processes may hold in parts; on a CPU then."""
    from torch.distributed.tensor import DTensor  # brings sympy, which takes longer than all the rest

    if isinstance(tensor, DTensor):
        return tensor.full_tensor().detach().cpu()
    return tensor.detach().contiguous()


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
    tensors = (
        (path, name, tensor if dtype is None else tensor.to(dtype))
        for path in _weight_files(folder)
        for name, tensor in _tensors(path, "cpu" if device is None else str(device))
    )
    return assemble(kind, stored, tensors, folder, backend=backend)


def assemble(
    kind: type[Retro],
    config: RetroConfig,
    tensors: Iterable[tuple[Any, str, torch.Tensor]],
    source: Any,
    *,
    backend: str | None = None,
) -> Retro:
    """A model in evaluation mode whose parameters are the tensors themselves: (where it is from, its name, it). Raises
    ValueError, naming `source`, unless they are all that the model has."""
    model = kind(config, backend=backend, device="meta")
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    weights: dict[str, torch.Tensor] = {}
    for origin, name, tensor in tensors:
        if name not in wanted:
            raise ValueError(f"{origin}: got {name}, which a model of its config does not have")
        if tuple(tensor.shape) != wanted[name]:
            raise ValueError(
                f"{origin}: got {name} of shape {list(tensor.shape)}, expected {list(wanted[name])}, by its config"
            )
        weights[name] = tensor
    missing = sorted(set(wanted) - set(weights))
    if missing:
        shown = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        raise ValueError(f"{source}: {shown} missing, expected the weights of every part of the model")
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
