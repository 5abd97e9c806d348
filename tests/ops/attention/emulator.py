"""Builds the CUDA kernels' sources for the emulator with the host's compiler, and loads them.

The objects stay in build/emulator; only what changed since is compiled again.
"""

from __future__ import annotations

import fcntl
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT / "csrc"))  # for the scripts that import this file; pytest has it

import toolchain  # noqa: E402

SOURCES = ROOT / "csrc" / "cuda"
FOLDER = ROOT / "build" / "emulator"
FLAGS = [
    "-std=c++17",
    "-O2",
    "-fPIC",
    "-fvisibility=hidden",
    "-DRK_EMULATED",
    "-DRK_HAVE_SM90",
    f"-DTORCH_TARGET_VERSION={toolchain.TORCH_TARGET}",
    "-U_FORTIFY_SOURCE",
    "-Wall",
    "-Wno-unknown-pragmas",
]


def compiler() -> list[str] | None:
    """The C++ compiler of the CPU kernels, or None."""
    try:
        return toolchain.compiler()[0]
    except toolchain.CannotBuild:
        return None


def build() -> Path:
    """The library; CompileError with the compiler's output when it does not compile. Of several processes (pytest -n)
    one builds and the others wait."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    with open(FOLDER / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return _build()


def _build() -> Path:
    command, torch_folder = compiler(), Path(torch.__file__).parent
    assert command is not None, "there is no C++ compiler"
    compiling = [*command, *FLAGS, f"-I{torch_folder / 'include'}", "-x", "c++"]
    sources = sorted([*SOURCES.rglob("*.cu"), *SOURCES.rglob("*.cpp")])
    objects = [(compiling, x, FOLDER / ("_".join(x.relative_to(SOURCES).parts) + ".o")) for x in sources]
    library = FOLDER / "libretro_kernels_cuda_emulator.so"
    link = [*command, "-shared", *(str(made) for _, _, made in objects), f"-L{torch_folder / 'lib'}", "-ltorch_cpu"]
    toolchain.make_library("CUDA", library, objects, link)
    return library


if __name__ == "__main__":
    print(build(), file=sys.stderr)
