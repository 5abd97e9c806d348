"""Builds the CUDA kernels' sources for the emulator with the host's compiler, and loads them.

The objects stay in build/emulator; only what changed since is compiled again.
"""

from __future__ import annotations

import fcntl
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[3]
SOURCES = ROOT / "csrc" / "cuda"
FOLDER = ROOT / "build" / "emulator"
FLAGS = [
    "-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", "-DRK_EMULATED", "-DRK_HAVE_SM90",
    "-DTORCH_TARGET_VERSION=0x020b000000000000", "-U_FORTIFY_SOURCE", "-Wall", "-Wno-unknown-pragmas",
]  # fmt: skip


def compiler() -> list[str] | None:
    """The C++ compiler of the CPU kernels, or None."""
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        if name and shutil.which(shlex.split(name)[0]):
            return shlex.split(name)
    return None


def build() -> Path:
    """The library; AssertionError with the compiler's output when it does not compile. Of several processes (pytest -n)
    one builds and the others wait."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    with open(FOLDER / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return _build()


def _build() -> Path:
    command, include = compiler(), Path(torch.__file__).parent / "include"
    assert command is not None, "there is no C++ compiler"
    newest = max(x.stat().st_mtime for pattern in ("*.h", "*.cuh") for x in SOURCES.rglob(pattern))
    running, objects = [], []
    for source in sorted([*SOURCES.rglob("*.cu"), *SOURCES.rglob("*.cpp")]):
        target = FOLDER / ("_".join(source.relative_to(SOURCES).parts) + ".o")
        objects.append(target)
        if target.exists() and target.stat().st_mtime > max(newest, source.stat().st_mtime):
            continue
        arguments = [*command, *FLAGS, f"-I{include}", "-x", "c++", "-c", str(source), "-o", f"{target}.new"]
        running.append((target, subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)))
    for target, process in running:
        output = process.communicate()[0].decode(errors="replace")
        assert process.returncode == 0, output
        Path(f"{target}.new").replace(target)
    library = FOLDER / "libretro_kernels_cuda_emulator.so"
    if running or not library.exists():
        fresh = library.with_suffix(f".{os.getpid()}")
        link = [*command, "-shared", "-o", str(fresh), *map(str, objects)]
        link += [f"-L{Path(torch.__file__).parent / 'lib'}", "-ltorch_cpu"]
        done = subprocess.run(link, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        fresh.replace(library)
    return library


if __name__ == "__main__":
    print(build(), file=sys.stderr)
