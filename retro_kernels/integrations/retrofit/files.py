"""What was added to a model, in a folder: `retro.json` and `retro.safetensors`."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch

from ...files import replaced, write_json

SETTINGS, TENSORS = "retro.json", "retro.safetensors"
FORMAT = 1
SAMPLED = 256
"""Numbers of each tensor that the hash of a base reads."""


def fingerprint(model: Any) -> str:
    """A hash of the base's weights: names, shapes and numbers spread over every tensor, as bf16, so that a base loaded
    in half precision is the same. Adapters and what we add are not read."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.named_parameters()):
        name = name.replace(".base_layer.", ".")
        if ".retro." in name or name.startswith("retro.") or "lora_" in name or "modules_to_save" in name:
            continue
        flat = tensor.detach().reshape(-1)
        index = torch.linspace(0, max(flat.numel() - 1, 0), min(SAMPLED, flat.numel()), dtype=torch.float64).long()
        sample = flat[index.to(flat.device)].to("cpu", torch.bfloat16).view(torch.int16)
        digest.update(f"{name} {list(tensor.shape)}\n".encode() + sample.numpy().tobytes())
    return digest.hexdigest()


def save(retro: Any, folder: Any) -> None:
    from safetensors.torch import save_file

    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    tensors = {name: x.detach().cpu().contiguous().clone() for name, x in retro.added().items()}
    with replaced(path / TENSORS) as partial:
        save_file(tensors, partial, metadata={"format": "pt"})
    written = {"format": FORMAT, "base": fingerprint(retro.model), "base_class": type(retro.model).__name__}
    written |= {"settings": retro.settings}
    write_json(path / SETTINGS, written)


def read_settings(folder: Any) -> dict[str, Any]:
    path = Path(folder) / SETTINGS
    if not path.is_file():
        raise FileNotFoundError(
            f"layers: got {os.fspath(folder)!r}, where there is no {SETTINGS}; expected numbers of layers, or a folder "
            "that model.retro.save_pretrained wrote"
        )
    try:
        written = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: cannot be read ({error})") from error
    if not isinstance(written, dict) or written.get("format") != FORMAT:
        found = written.get("format") if isinstance(written, dict) else type(written).__name__
        raise ValueError(f"{path}: got format {found!r}, expected {FORMAT}")
    return written


def check_base(written: dict[str, Any], model: Any) -> None:
    if written["base"] != fingerprint(model):
        raise ValueError(
            f"model: its weights are not those of the base ({written['base_class']}) that this folder was made for: "
            "gates trained for one decoder say nothing about another"
        )


def load_tensors(retro: Any, folder: Any) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(Path(folder) / TENSORS)
    except (SafetensorError, FileNotFoundError) as error:
        raise ValueError(f"{Path(folder) / TENSORS}: cannot be read ({error})") from error
    expected = retro.added()
    if set(tensors) != set(expected):
        missing, surplus = sorted(set(expected) - set(tensors)), sorted(set(tensors) - set(expected))
        raise ValueError(f"{Path(folder) / TENSORS}: {missing} are missing, {surplus} are not known")
    with torch.no_grad():
        for name, tensor in tensors.items():
            expected[name].copy_(tensor)
