"""Folders that `torch.distributed.checkpoint` wrote (Megatron's format "torch_dist" too): their tensors, whole.

Such a folder has an index, `.metadata`, which is a pickle, and files of tensors, each as `torch.save` writes it. Here
every class that an index names is replaced by an empty one of our own, made for this one reading; an index that names
anything else is refused. So none of its code is run, and tensors are read weights-only.
"""

from __future__ import annotations

import io
import itertools
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

INDEX = ".metadata"
DCP = "torch.distributed.checkpoint."
RECORDS = (DCP, "megatron.core.dist_checkpointing.")  # of any of their classes
PLAIN: dict[tuple[str, str], Callable[..., Any]] = {
    ("torch", "Size"): lambda sizes=(): tuple(sizes),
    ("torch.serialization", "_get_layout"): lambda name: name,
    (DCP + "metadata", "_MEM_FORMAT_ENCODING"): lambda number: number,
    ("collections", "OrderedDict"): lambda pairs=(): dict(pairs),
    **{("pathlib", name): lambda *parts: parts for name in ("PosixPath", "PurePosixPath", "WindowsPath")},
    ("pathlib._local", "PosixPath"): lambda *parts: parts,
}


class Record:
    """Of any class: what its pickle says, a dictionary or (of a tensor's properties) a tuple that begins with dtype."""

    def __new__(cls, *_: Any) -> Record:
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        vars(self).update(state if isinstance(state, dict) else {"dtype": state[0]})


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, path: Path) -> None:
        super().__init__(file)
        self.path = path

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in PLAIN:
            return PLAIN[module, name]
        if module.startswith(RECORDS):
            return type(name, (Record,), {})
        if module == "torch" and isinstance(vars(torch).get(name), torch.dtype):
            return getattr(torch, name)
        raise ValueError(
            f"{self.path}: it holds more than an index ({module}.{name}), and loading such objects could run any code, "
            "so it is not done"
        )


def read_distributed(folder: Path, unwanted: Callable[[str], bool]) -> dict[str, torch.Tensor]:
    """Its whole tensors by name, those left out whose names are `unwanted`, and whatever is no tensor.

    Raises ValueError for an index that holds more than one or is broken, for parts of another shape or place than it
    says and for parts that do not make up a tensor, FileNotFoundError for a file that is missing.
    """
    path = folder / INDEX
    try:
        index = _Unpickler(io.BytesIO(path.read_bytes()), path).load()
        places = {
            (key.fqn, tuple(vars(key).get("offset") or ())): (
                place.relative_path,
                place.offset,
                place.length,
                vars(place),
            )
            for key, place in index.storage_data.items()
        }
        tensors = {
            name: (entry.properties.dtype, entry.size, [(part.offsets, part.sizes) for part in entry.chunks])
            for name, entry in index.state_dict_metadata.items()
            if hasattr(entry, "chunks") and not unwanted(name)
        }
    except ValueError:
        raise
    except Exception as error:  # whatever broken bytes make the unpickler raise, or an index lack
        raise ValueError(f"{path}: no index that can be read ({type(error).__name__}: {error})") from error
    found = {}
    for name, (dtype, size, parts) in tensors.items():
        if not _make_up(parts, size):
            raise ValueError(f"{path}: got parts of {name} that do not make up its shape {list(size)}")
        whole = torch.empty(size, dtype=dtype)
        for offsets, sizes in parts:
            if (name, tuple(offsets)) not in places:
                raise ValueError(f"{path}: got no place of {name} from {list(offsets)} on, expected one of every part")
            part = _read(folder, *places[name, tuple(offsets)])
            if not isinstance(part, torch.Tensor) or tuple(part.shape) != tuple(sizes):
                raise ValueError(f"{path}: got another part of {name} in its file, expected shape {list(sizes)}")
            whole[tuple(slice(start, start + length) for start, length in zip(offsets, sizes))] = part
        found[name] = whole
    return found


def _make_up(parts: list[tuple[Any, Any]], size: Any) -> bool:
    """Whether the boxes (offsets, sizes) lie within `size`, do not overlap and fill it."""
    boxes = [[(start, start + length) for start, length in zip(*part)] for part in parts]
    inside = all(begin >= 0 and end <= whole for box in boxes for (begin, end), whole in zip(box, size))
    overlap = any(
        all(max(x[0], y[0]) < min(x[1], y[1]) for x, y in zip(one, other))
        for one, other in itertools.combinations(boxes, 2)
    )
    return inside and not overlap and sum(math.prod(sizes) for _, sizes in parts) == math.prod(size)


def _read(folder: Path, name: str, offset: int, length: int, place: dict[str, Any]) -> Any:
    if Path(name).name != name:
        raise ValueError(f"{folder / INDEX}: got a part in {name!r}, expected a file of its folder")
    if place.get("transform_descriptors"):
        raise ValueError(
            f"{folder / INDEX}: got parts transformed by {place['transform_descriptors']}, expected plain ones"
        )
    if not (folder / name).is_file():
        raise FileNotFoundError(f"{folder / name} is not there; expected every file that the index names")
    with (folder / name).open("rb") as file:
        file.seek(offset)
        held = io.BytesIO(file.read(length))
    try:
        return torch.load(held, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a broken file makes torch raise
        raise ValueError(f"{folder / name}: no tensor at byte {offset} ({type(error).__name__})") from error
