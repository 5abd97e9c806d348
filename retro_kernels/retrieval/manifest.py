"""The files of a database: their entries in its manifest, paths that stay in its folder, and what goes wrong."""

from __future__ import annotations

import errno
import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from ..errors import DatabaseError
from ..files import lock, sha256


def read_json(path: Path, of: str = "retrieval database (`retro-kernels db build` makes one)") -> Any:
    """-> the parsed file. Raises DatabaseError where it is missing, with what its folder should be, or is no JSON."""
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise DatabaseError(f"{path} does not exist: {path.parent} holds no finished {of}") from None
    except (ValueError, RecursionError) as error:
        raise DatabaseError(f"{path} is not valid JSON ({error}): the file is damaged; rebuild or restore it") from None


def map_array(path: Path) -> np.ndarray:
    """-> the array of a `.npy` file, mapped. Raises DatabaseError where it is none, or one of objects."""
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except OSError:
        raise
    except Exception as error:  # of a damaged header NumPy says so by whatever its parser of Python says
        raise DatabaseError(
            f"{path} holds no array of numbers ({type(error).__name__}: {error}): restore it, or make it anew"
        ) from None


def inside(folder: Path, name: object) -> Path:
    """-> folder / name. Raises DatabaseError where `name` is no plain relative path or leads out of `folder`."""
    if not isinstance(name, str) or not name or "\\" in name or "\0" in name:
        raise DatabaseError(f"the manifest names a file {name!r}; expected a relative path with forward slashes")
    parts = PurePosixPath(name)
    if parts.is_absolute() or ".." in parts.parts:
        raise DatabaseError(f"the manifest names {name!r}, which lies outside the database's folder {folder}")
    path = folder / parts
    if not path.resolve().is_relative_to(folder.resolve()):
        raise DatabaseError(f"{name!r} is a link that leads out of the database's folder {folder}")
    return path


def describe(folder: Path, path: Path) -> dict[str, Any]:
    """A file's entry in a manifest: its path below `folder`, its size in bytes and its SHA-256."""
    return {"path": path.relative_to(folder).as_posix(), "bytes": path.stat().st_size, "sha256": sha256(path)}


def problem_with(folder: Path, entry: dict[str, Any]) -> str | None:
    """Compares a file with its manifest entry, reading all of it. -> the difference, or None."""
    path = inside(folder, entry.get("path"))
    if not path.is_file():
        return f"{entry['path']}: missing"
    size = path.stat().st_size
    if size != entry["bytes"]:
        return f"{entry['path']}: {size:,} bytes, the manifest says {entry['bytes']:,}"
    if sha256(path) != entry["sha256"]:
        return f"{entry['path']}: altered, its SHA-256 is not the manifest's"
    return None


@contextmanager
def name_full_disk(folder: Path) -> Iterator[None]:
    """Turns the operating system's "no space left" into an error that says where and what to do."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise DatabaseError(
            f"the disk of {folder} is full ({error.strerror}). What is finished was kept: free space and run the same "
            "build again, it resumes"
        ) from error


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Holds `folder` for one builder. Raises DatabaseError where another process holds it.

    The lock is on the folder itself and ends with its process: a killed builder leaves nothing to clean up."""
    with ExitStack() as stack:
        try:
            stack.enter_context(lock(folder, wait=False))
        except BlockingIOError:
            raise DatabaseError(f"another process is building {folder}: wait for it, or build elsewhere") from None
        yield
