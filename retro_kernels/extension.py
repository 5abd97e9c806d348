"""The C++ extension: loaded when it is first asked for, and if it cannot be, the reason in one sentence."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import torch

_HERE = Path(__file__).parent
LIBRARY = _HERE / "_cpu.abi3.so"
REMEDY = "build it with `pip install --no-build-isolation .` from the source tree (needs torch, ninja and g++ or clang++)"


@functools.cache
def build_metadata() -> dict[str, Any]:
    """What setup.py recorded: built, skipped (name -> why), commit, machine, and of a built library also torch,
    compiler, flags and levels. Empty in a source tree that was never installed."""
    try:
        return json.loads((_HERE / "_build.json").read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        return {"error": f"_build.json cannot be read: {error}"}


@functools.cache
def why_not() -> str | None:
    """Loads the library; None when it works, otherwise why not and what to do."""
    if not LIBRARY.exists():
        skipped = build_metadata().get("skipped", {}).get("cpu")
        return f"the C++ extension is not built{f' ({skipped})' if skipped else ''}; {REMEDY}"
    try:
        torch.ops.load_library(str(LIBRARY))
        torch.ops.retro_kernels_cpu.isa()
    except (OSError, RuntimeError, AttributeError) as error:
        built = build_metadata()
        return (
            f"{LIBRARY.name} does not work here: {str(error).splitlines()[0]} (built for torch "
            f"{built.get('torch', 'unknown')} on {built.get('machine', 'unknown')}, found torch {torch.__version__}); "
            f"{REMEDY}"
        )
    return None


def isa() -> str | None:
    """The instruction-set level in use ("avx512_bf16", "avx512", "avx2", "portable"), None without the library.
    RETRO_KERNELS_CPU_ISA names a lower one before the library is loaded."""
    return None if why_not() is not None else torch.ops.retro_kernels_cpu.isa()
