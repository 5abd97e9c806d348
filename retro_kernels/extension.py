"""The compiled CPU kernels: loads `_cpu.abi3.so` when first needed, and knows how it was built.

Importing this module loads nothing and never raises; `why_not()` says in one sentence what is wrong, and what to do.
The library touches no Python: it registers `torch.ops.retro_kernels_cpu` through torch's stable ABI, so one file
serves every Python >= 3.10 and every torch from the one it was built for (2.11) on.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
from pathlib import Path
from typing import Any

import torch

LIBRARY = Path(__file__).with_name("_cpu.abi3.so")
SKIPPED = "_skipped.txt"
MARK = b"RETRO_KERNELS_BUILD"
REBUILD = "run `pip install --no-build-isolation -e .` in the source tree, with torch >= 2.11 and a C++ compiler"


def build_metadata() -> dict[str, Any]:
    """How the library was built: torch, oldest_torch, compiler, machine, levels, flags, git_commit.

    Empty when there is no library or it carries no metadata.
    """
    return read_metadata(LIBRARY)


def read_metadata(library: Path) -> dict[str, Any]:
    """What setup.py embedded in a library, read without loading it, so that it explains one that does not load."""
    try:
        content = library.read_bytes()
    except OSError:
        return {}
    start = content.find(MARK)
    if start < 0:
        return {}
    start += len(MARK)
    try:
        return json.loads(content[start : content.index(b"\0", start)])
    except ValueError:
        return {}


def read_skipped(file: Path) -> tuple[str, str] | None:
    """Why setup.py left a library out and what to do about it, from the file that it writes where the library would be;
    None where there is none."""
    try:
        reason, _, remedy = file.read_text().strip().partition("\n")
    except OSError:
        return None
    return (reason, remedy) if reason else None


def built_copy(library: Path) -> Path | None:
    """The same library in an installed copy of the package, where this one is a source folder, which hides that copy
    from a Python that runs there."""
    if not library.parent.with_name("setup.py").exists():
        return None
    for distribution in importlib.metadata.distributions(name="retro_kernels"):
        found = Path(str(distribution.locate_file(f"retro_kernels/{library.name}")))
        if found.exists():
            return found
    return None


def why_missing(what: str, library: Path, skipped: str, rebuild: str) -> str:
    """Why a library is not there, with the remedy, in one sentence."""
    copy = built_copy(library)
    if copy is not None:
        return (
            f"{what} was not built in {library.parent}, but in the installed copy {copy.parent}, which the source "
            "folder hides: run Python in another folder, or `pip install --no-build-isolation -e .` in this one"
        )
    reason, remedy = read_skipped(library.with_name(skipped)) or (f"{library} is not there", "")
    return f"{what} was not built ({reason}): {remedy or rebuild}"


def version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("+")[0].split(".")[:2])


@functools.lru_cache(maxsize=1)
def why_not() -> str | None:
    """Loads the library once; why it cannot be used, with the remedy, or None."""
    if not LIBRARY.exists():
        return why_missing("the C++ extension", LIBRARY, SKIPPED, REBUILD)
    built = build_metadata()
    oldest = built.get("oldest_torch")
    if oldest and version(torch.__version__) < version(oldest):
        return (
            f"the C++ extension was built for torch {oldest} or newer (against {built['torch']}) and this is torch "
            f"{torch.__version__}: upgrade torch"
        )
    against = f"built against torch {built.get('torch', 'unknown')}, found torch {torch.__version__}"
    try:
        torch.ops.load_library(str(LIBRARY))
    except (OSError, RuntimeError, ImportError) as error:
        return f"the C++ extension {LIBRARY} does not load ({' '.join(str(error).split())}; {against}): {REBUILD}"
    try:
        torch.ops.retro_kernels_cpu.isa()
    except (AttributeError, RuntimeError) as error:
        return f"the C++ extension loads but cannot run here: {_first_line(error)} ({against})"
    return None


def _first_line(error: Exception) -> str:
    return str(error).split("\n", 1)[0]


def isa() -> str:
    """The instruction-set level in use: "portable", "avx2", "avx512", "avx512_bf16" or "amx_bf16".

    The highest this CPU runs, unless the environment variable RETRO_KERNELS_CPU_ISA names one, read when the library is
    first used. RuntimeError when the library cannot be used.
    """
    _require()
    return torch.ops.retro_kernels_cpu.isa()


def usable_isas() -> tuple[str, ...]:
    """The levels that were built and that this CPU runs, lowest first. RuntimeError when the library cannot be used."""
    _require()
    return tuple(torch.ops.retro_kernels_cpu.isas().split())


def set_isa(name: str) -> None:
    """Switches this process to a level ("" for the highest). RuntimeError when it cannot run here."""
    _require()
    torch.ops.retro_kernels_cpu.set_isa(name)


def _require() -> None:
    reason = why_not()
    if reason is not None:
        raise RuntimeError(reason)
