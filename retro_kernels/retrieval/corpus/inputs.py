"""What identifies the files of an input, so that a run that goes on, or is repeated, notices what changed."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .readers import find


@dataclasses.dataclass(frozen=True)
class InputFiles:
    """The files of an input, in their order."""

    entries: list[list[Any]]
    """[name, bytes, time of change in ns] each; JSON."""
    folder: str
    """Where the names begin."""

    @classmethod
    def of(cls, inputs: Sequence[str | os.PathLike[str]], format: str | None, exclude: Path) -> InputFiles:
        """Raises as `readers.find` does."""
        pieces, _ = find(inputs, format=format, exclude=exclude)
        folder = pieces[0].place if pieces else ""
        return cls([[piece.name, piece.file_size, piece.file_time] for piece in pieces], folder)

    def difference(self, earlier: Sequence[Sequence[Any]]) -> str | None:
        """What is not as it was, the first by name, or None."""
        old, new = ({name: rest for name, *rest in entries} for entries in (earlier, self.entries))
        for name in sorted(old.keys() | new.keys()):
            if name not in new:
                return f"{name} is missing now"
            if name not in old:
                return f"{name} is new"
            if list(old[name]) != new[name]:
                return f"{name} changed"
        return None


def unambiguous(name: str, known: set[str], folder: str) -> str:
    """`name`, or, where another input gave that name to a file already, with the folder's own name before it."""
    return f"{Path(folder).name}/{name}" if name in known else name
