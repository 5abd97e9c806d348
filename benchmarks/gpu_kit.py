"""What is built here for a GPU machine that has little time: see `pack` and `unpack`."""

from __future__ import annotations

import hashlib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def source_hash() -> str:
    """Of everything that decides what the kernels compute: the package and its C++."""
    digest = hashlib.sha256()
    for folder, endings in (("retro_kernels", (".py",)), ("csrc", (".cu", ".cuh", ".cpp", ".h"))):
        for file in sorted((ROOT / folder).rglob("*")):
            if file.suffix in endings:
                digest.update(f"{file.relative_to(ROOT)}\0".encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def unpack() -> list[str]:
    return []
