"""`retro-kernels train`: trains a RETRO on a stream of tokens with precomputed neighbours."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Any

import typer

SECTIONS = ("model", "data", "training")
PATHS = ("output", "retrofit", "start_from")


def read(path: Path) -> tuple[Any, Any, Any, Any]:
    """-> RetroConfig, TokenStream, TrainingConfig of a YAML file, and the TokenStream of held-out text or None. Paths
    in it are relative to it. Raises ValueError or FileNotFoundError."""
    import dataclasses
    import difflib

    import yaml

    from ..models import PRESETS, RetroConfig
    from ..models.data import TokenStream, facts_of
    from ..models.training_config import TrainingConfig
    from ..retrieval.training_data import FACTS, HELD_OUT

    class Loader(yaml.SafeLoader):
        """Reads 2e-4 as a number, which YAML 1.1 does not."""

    Loader.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
    )
    try:
        document = yaml.load(path.read_text(), Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: no valid YAML ({error})") from error
    if not isinstance(document, dict) or set(document) != set(SECTIONS):
        found = sorted(document) if isinstance(document, dict) else type(document).__name__
        raise ValueError(f"{path}: got {found}, expected the sections {', '.join(SECTIONS)}")
    data = document["data"] if isinstance(document["data"], dict) else {"folder": document["data"]}
    if "folder" not in data or set(data) - {"folder", "database", "held_out"}:
        raise ValueError(
            f"{path}: got data with {', '.join(data)}, expected a folder, and at most a database and held_out with it"
        )
    for section in ("model", "training"):
        if not isinstance(document[section], dict):
            raise ValueError(f"{path}: got {section} {document[section]!r}, expected settings, as name: value")
    known = {
        section: {field.name for field in dataclasses.fields(of)}
        for section, of in (("model", RetroConfig), ("training", TrainingConfig))
    }
    known["model"].add("preset")
    for section, names in known.items():
        for name in document[section]:
            if name not in names:
                meant = difflib.get_close_matches(str(name), names) or sorted(names)
                raise ValueError(
                    f"{path}: {section}: got the setting {name!r}, expected one such as {', '.join(meant)}"
                )
    if document["model"].get("preset") not in (None, *PRESETS):
        raise ValueError(f"{path}: preset: got {document['model']['preset']!r}, expected one of {', '.join(PRESETS)}")
    where = {key: path.parent / str(value) for key, value in data.items()}  # absolute paths stay
    model = dict(document["model"])
    model = {key: tuple(value) if isinstance(value, list) else value for key, value in model.items()}
    try:
        facts = facts_of(where["folder"])
        for name in ("tokenizer", "vocab_size", "eos_token_id"):
            if facts.get(name) is not None:
                model.setdefault(name, facts[name])
        preset = model.pop("preset", None)
        config = RetroConfig(**model) if preset is None else RetroConfig.preset(preset, **model)
        training: dict[str, Any] = {
            key: tuple(x) if isinstance(x, list) else x for key, x in document["training"].items()
        }
        where |= {key: path.parent / str(training[key]) for key in PATHS if training.get(key) is not None}
        training |= {key: str(where[key]) for key in PATHS if key in where}
        settings = TrainingConfig(**training)
    except TypeError as error:  # an unknown or a missing name
        raise ValueError(
            f"{path}: {str(error).replace('.__init__()', '').replace('keyword argument', 'setting')}"
        ) from error
    stream = TokenStream(where["folder"], config, where.get("database"))
    beside = where["folder"] / HELD_OUT
    if (beside / FACTS).is_file():
        where.setdefault("held_out", beside)
    held_out = TokenStream(where["held_out"], config, where.get("database")) if "held_out" in where else None
    return config, stream, settings, held_out


def train(
    config: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="A YAML file: model, data, training.")],
    device: Annotated[str | None, typer.Option(help="'cpu' or 'cuda'. Default: the GPU if there is one.")] = None,
) -> None:
    """Trains a RETRO, or continues the run in the folder that CONFIG names as its output.

    CONFIG has three sections: `model` (a `preset` and changes, or all fields of RetroConfig; tokenizer and vocab_size
    are by default the data's), `data` (the folder that `retro-kernels db neighbours` wrote, or `{folder: ...,
    held_out: ..., database: ...}`; by default what is held out in the folder is evaluated on) and `training` (fields of
    TrainingConfig). Paths are relative to CONFIG. Under torchrun several processes train together. Ctrl-C loses what
    came after the last checkpoint.
    """
    import torch

    from ..models.training import NonFiniteLoss, Trainer
    from ..retrieval.index.devices import find_device
    from .db_common import say, show_errors

    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    try:
        with show_errors(code=2):
            device = str(find_device(device or "auto"))
            if several:
                if device == "cuda":
                    device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
                    torch.cuda.set_device(device)
                torch.distributed.init_process_group("nccl" if device.startswith("cuda") else "gloo")
            of_model, stream, settings, held_out = read(config)
            Trainer(of_model, stream, settings, held_out=held_out, device=device, say=say).run()
    except NonFiniteLoss as error:
        typer.echo(f"Stopped: {error}", err=True)
        raise typer.Exit(3) from error
    finally:
        if several and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
