"""Files that are whole or absent: written beside their place, made durable, and renamed into it."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def replaced(path: Path, *, concurrent: bool = False) -> Iterator[Path]:
    """Gives the block a temporary path to write a file to, which takes the place of `path` when the block ends.

    After a crash at any moment `path` holds what it held before, or the whole new file. When the block raises, the
    temporary file is removed. A killed process leaves it behind, and the next writer overwrites it.

    concurrent: whether several processes may write `path` at once; each then has a temporary file of its own.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp" if concurrent else f"{path.name}.tmp")
    try:
        yield temporary
        move(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def usual_mode(path: Path) -> None:
    """Gives a file the mode that a new one has by the umask, where a library made it readable for its owner alone."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)


def move(source: Path, target: Path) -> None:
    """Renames a file or folder within a file system so that the rename, and what a file holds, survive a power cut."""
    sync(source)
    os.replace(source, target)
    sync(target.parent)


def write_bytes(path: Path, content: bytes, *, concurrent: bool = False) -> None:
    """Replaces `path` as a whole (see `replaced`)."""
    with replaced(path, concurrent=concurrent) as temporary:
        temporary.write_bytes(content)


def write_json(path: Path, value: Any, *, concurrent: bool = False) -> None:
    """Replaces `path` as a whole by `json_bytes(value)`."""
    write_bytes(path, json_bytes(value), concurrent=concurrent)


def json_bytes(value: Any) -> bytes:
    """JSON with sorted keys, so that equal values are equal bytes. Raises ValueError for NaN and infinity."""
    return (json.dumps(value, sort_keys=True, indent=1, allow_nan=False) + "\n").encode()


def sha256(path: Path) -> str:
    """The file's SHA-256 in hexadecimal, read in blocks of 4 MiB."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def lock(path: Path, *, wait: bool) -> Iterator[None]:
    """Holds an exclusive lock on a folder, or on a file, which is made if it is absent. The lock ends with its process.

    wait: until another holder is done; otherwise BlockingIOError is raised at once. With `wait`, a system that cannot
    lock (Windows, some network file systems) locks nothing.
    """
    try:
        import fcntl
    except ImportError:
        if not wait:
            raise
        yield
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError as error:
            if not wait or error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
                raise
        yield
    finally:
        os.close(descriptor)


def sync(path: Path) -> None:
    """Waits until a file's content, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
