"""What the decoder makes of a database's chunks, kept: since a neighbour is read alone, its keys and values depend on
nothing else and need to be made once.

A folder with `encoded.json` (what it is of) and two arrays of one row a chunk, so that a neighbour is one read of each:

    codes.bin    int8 [chunks, numbers], of every layer the keys [r, hk, d], then the values [r, hk, d_value]
    scales.bin   float32 [chunks, 2 * layers * r], of every layer one a token for its keys, then one for its values
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence, Set
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...errors import DatabaseError
from ...files import lock, write_json
from ...nn.neighbour_cache import quantise
from ...retrieval.database import Database
from ...retrieval.manifest import read_json
from .call import KeysAndValues
from .files import fingerprint

FACTS, CODES, SCALES = "encoded.json", "codes.bin", "scales.bin"
FORMAT = 1
RESERVE = 1.05
"""A disk has this many times the size free, or nothing is begun."""


class EncodedChunks:
    """A finished folder. `store(ids, layers)` -> keys and values [n, r, hk, d] of each of these layers, fp32.

    Raises DatabaseError for a folder that is unfinished or cut short.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        facts = read_json(self.folder / FACTS)
        if not isinstance(facts, dict) or facts.get("format") != FORMAT:
            raise DatabaseError(f"{self.folder / FACTS} is not of format {FORMAT}: make the folder anew")
        if facts["done"] != facts["chunks"]:
            raise DatabaseError(
                f"{self.folder} has {facts['done']:,} of {facts['chunks']:,} chunks: run the same `db encode` again"
            )
        self.facts = facts
        self.shapes = {int(layer): tuple(x) for layer, x in facts["layers"].items()}
        self.codes, self.scales = _map(self.folder, facts, "r")

    def __call__(self, ids: torch.Tensor, layers: Set[int] | None = None) -> KeysAndValues:
        index = ids.cpu().numpy()
        codes, scales = (torch.from_numpy(np.array(x[index])) for x in (self.codes, self.scales))
        r, place, found = self.facts["retrieved_length"], 0, {}
        for i, (layer, (hk, d, d_value)) in enumerate(self.shapes.items()):
            if layers is not None and layer not in layers:
                place += r * hk * (d + d_value)
                continue
            pair = []
            for j, width in enumerate((d, d_value)):
                x = codes[:, place : place + r * hk * width].view(-1, r, hk, width).float()
                scale = scales[:, (2 * i + j) * r : (2 * i + j + 1) * r]
                pair.append(x * scale[..., None, None])
                place += r * hk * width
            found[layer] = (pair[0], pair[1])
        return found


def size_of(model: Any, database: Database, layers: Sequence[int] | None = None) -> int:
    """Bytes of the folder that `encode_database` makes."""
    facts = _facts(model, database, layers)
    return facts["chunks"] * sum(_widths(facts))


@torch.no_grad()
def encode_database(
    model: Any,
    database: Database,
    folder: str | os.PathLike[str],
    *,
    layers: Sequence[int] | None = None,
    batch_size: int = 16,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> EncodedChunks:
    """Has a retrofitted decoder, whose encoder is its own, read every chunk of a database with its continuation, or
    goes on where an earlier call was stopped. `model.retro.use(EncodedChunks(folder))` then reads no neighbour again.

    Args:
        model: retrofitted; gates and maps do not matter.
        layers: those to keep; default all that see neighbours.
        batch_size: chunks that are read at a time.
        progress: called with chunks done and all.

    Raises ValueError for another encoder, other layers than the model has, or too small a disk; DatabaseError for a
    folder of another model or database.
    """
    retro, root = model.retro, Path(folder)
    facts = _facts(model, database, layers)
    root.mkdir(parents=True, exist_ok=True)
    try:
        with lock(root, wait=False):
            _begin(root, facts)
            codes, scales = _map(root, facts, "r+")
            for first in range(facts["done"], len(database), batch_size):
                ids = torch.arange(first, min(first + batch_size, len(database)))
                tokens, mask = database.chunks(ids, retro.retrieved_length)
                device = retro.device
                made = retro.encode(tokens.long().to(device), mask.to(device))
                rows = [[], []]  # type: ignore[var-annotated]
                for layer in facts["layers"]:
                    for x in made[int(layer)]:
                        code, scale = quantise(x[:, None].float(), torch.int8)
                        rows[0].append(code.flatten(1).cpu())
                        rows[1].append(scale.flatten(1).cpu())
                codes[first : first + len(ids)] = torch.cat(rows[0], 1).numpy()
                scales[first : first + len(ids)] = torch.cat(rows[1], 1).numpy()
                codes.flush()
                scales.flush()
                facts["done"] = first + len(ids)
                write_json(root / FACTS, facts)
                progress(facts["done"], len(database))
    except BlockingIOError:
        raise ValueError(f"{root}: another process writes there; wait for it, or name another folder") from None
    return EncodedChunks(root)


def _facts(model: Any, database: Database, layers: Sequence[int] | None) -> dict[str, Any]:
    retro = model.retro
    if retro.settings["encoder"] != "own":
        raise ValueError(
            f'encoder: got {retro.settings["encoder"]!r}, expected "own", which stays as it is and sees nothing '
            "but the neighbour"
        )
    if database.chunk_size != retro.chunk_size:
        raise ValueError(
            f"database: has chunks of {database.chunk_size} tokens, expected chunk_size = {retro.chunk_size}"
        )
    parts = {part.layer: part for part in retro.parts()}
    chosen = list(parts) if layers is None else sorted(layers)
    for layer in chosen:
        if layer not in parts:
            raise ValueError(f"layers: got {layer}, expected some of {list(parts)}, which see neighbours")
    return {
        "format": FORMAT,
        "base": fingerprint(retro.model),
        "database_sha256": database.content_hash(),
        "chunks": len(database),
        "retrieved_length": retro.retrieved_length,
        "layers": {
            str(layer): [parts[layer].num_kv_heads, parts[layer].head_dim, parts[layer].value_head_dim]
            for layer in chosen
        },
        "done": 0,
    }


def _widths(facts: dict[str, Any]) -> tuple[int, int]:
    """Bytes of a chunk's codes and of its scales."""
    r = facts["retrieved_length"]
    return sum(r * hk * (d + d_value) for hk, d, d_value in facts["layers"].values()), 8 * r * len(facts["layers"])


def _begin(root: Path, facts: dict[str, Any]) -> None:
    """Makes the files, or takes up what is there into `facts`."""
    if (root / FACTS).exists():
        there = read_json(root / FACTS)
        same = isinstance(there, dict) and all(there.get(name) == x for name, x in facts.items() if name != "done")
        if not same:
            raise DatabaseError(f"{root} is of another model, database or other layers: name another folder")
        facts["done"] = there["done"]
        return
    size, free = facts["chunks"] * sum(_widths(facts)), shutil.disk_usage(root).free
    if size * RESERVE > free:
        raise ValueError(
            f"{root}: {size:,} bytes are needed and {free:,} are free; choose fewer layers (those whose gates are most "
            "open), or another disk"
        )
    for name, width in zip((CODES, SCALES), _widths(facts)):
        with (root / name).open("wb") as stream:
            stream.truncate(facts["chunks"] * width)
    write_json(root / FACTS, facts)


def _map(root: Path, facts: dict[str, Any], mode: Any) -> tuple[np.memmap, np.memmap]:
    code, scale = _widths(facts)
    for name, width in ((CODES, code), (SCALES, scale)):
        size = (root / name).stat().st_size if (root / name).is_file() else -1
        if size != facts["chunks"] * width:
            raise DatabaseError(f"{root / name}: {size:,} bytes, expected {facts['chunks'] * width:,}: make it anew")
    return (
        np.memmap(root / CODES, np.int8, mode, shape=(facts["chunks"], code)),
        np.memmap(root / SCALES, np.float32, mode, shape=(facts["chunks"], scale // 4)),
    )
