"""Builds the C++ extension beside the pure-Python package, or says why it does not.

    RETRO_KERNELS_BUILD_CPU=auto|1|0     csrc/cpu -> retro_kernels/_cpu.abi3.so. auto builds it where it can be built.
    RETRO_KERNELS_BUILD_CUDA=auto|1|0    csrc/cuda: its kernels are not written yet, so auto skips it.

1 fails where it cannot build, 0 skips. What was built, with what, and what was skipped and why is kept in
retro_kernels/_build.json, which `retro-kernels doctor` shows. The library uses only torch's stable ABI (2.11), so one
binary serves every Python >= 3.10 and torch >= 2.11.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent.resolve()
TORCH_TARGET = (2, 11)
HOW = "install torch, ninja and a C++ compiler, then run `pip install --no-build-isolation .`"

# One kernel source, compiled once for each level; the highest that the CPU runs is chosen when the library is loaded.
AVX2 = ("-mavx2", "-mfma", "-mf16c")
AVX512 = (*AVX2, "-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mprefer-vector-width=512")
LEVELS = {"portable": (), "avx2": AVX2, "avx512": AVX512, "avx512_bf16": (*AVX512, "-mavx512bf16")}
COMMON_FLAGS = ("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall")
KERNEL_FLAGS = ("-fno-strict-aliasing", "-ffp-contract=fast", "-Wno-maybe-uninitialized", "-Wno-uninitialized")


def wanted(name: str) -> str:
    value = os.environ.get(f"RETRO_KERNELS_BUILD_{name}", "auto").lower()
    if value not in ("auto", "1", "0"):
        raise SystemExit(f"RETRO_KERNELS_BUILD_{name}: got {value!r}, expected auto, 1 or 0")
    return value


def compiler() -> str | None:
    candidates = (os.environ.get("CXX"), "g++", "clang++", "c++")
    return next((found for name in candidates if name and (found := shutil.which(name))), None)


def first_line(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout.split("\n", 1)[0]
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def cannot_build_cpu() -> str | None:
    """Why csrc/cpu cannot be built here, or None."""
    if sys.platform != "linux":
        return f"the C++ extension is built on Linux only so far, this is {sys.platform}"
    try:
        import torch
    except ImportError as error:
        return f"torch cannot be imported while building ({error}); pip's build isolation hides it: {HOW}"
    found = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if found < TORCH_TARGET:
        return f"found torch {torch.__version__}, expected 2.11 or newer: {HOW}"
    if compiler() is None:
        return f"no C++ compiler was found (CXX, g++, clang++, c++): {HOW}"
    if shutil.which("ninja") is None:
        return f"ninja was not found: {HOW}"
    return None


def decide() -> tuple[list[str], dict[str, str]]:
    """-> the libraries to build, and of the others why they are skipped. Raises SystemExit for an impossible 1."""
    build, skipped = [], {}
    reasons = {"CPU": cannot_build_cpu, "CUDA": lambda: "the CUDA C++ kernels are not written yet; Triton serves GPUs"}
    for name, reason in reasons.items():
        choice = wanted(name)
        why = f"RETRO_KERNELS_BUILD_{name}=0" if choice == "0" else reason()
        if why is None:
            build.append(name)
        elif choice == "1":
            raise SystemExit(f"RETRO_KERNELS_BUILD_{name}=1 cannot be honoured: {why}")
        else:
            skipped[name.lower()] = why
            print(f"retro_kernels: the {name} extension is skipped: {why}", file=sys.stderr)
    return build, skipped


def usable_levels(cxx: str) -> dict[str, tuple[str, ...]]:
    """The levels that this compiler can target (g++ 9 has no -mavx512bf16; other processors have the portable one)."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return {"portable": ()}
    probe = [cxx, "-x", "c++", "-fsyntax-only", "-"]
    return {
        name: flags
        for name, flags in LEVELS.items()
        if subprocess.run([*probe, *flags], input="int main() {}", text=True, capture_output=True).returncode == 0
    }


def ninja_file(cxx: str, levels: dict[str, tuple[str, ...]], folder: Path, library: Path) -> str:
    """One rule to compile and one to link; depfiles make a rebuild touch only what changed."""
    import torch

    torch_root = Path(torch.__file__).parent
    sources = ROOT / "csrc" / "cpu"
    target = f"-DTORCH_TARGET_VERSION=0x{TORCH_TARGET[0]:02x}{TORCH_TARGET[1]:02x}000000000000"
    have = [f"-DRK_HAVE_{name.upper()}" for name in levels if name != "portable"]
    units = {"bindings": [target, f"-isystem {torch_root / 'include'}"], "dispatch": have}
    units |= {f"level_{name}": [*KERNEL_FLAGS, *flags] for name, flags in levels.items()}
    lines = [
        f"builddir = {folder}",
        "rule compile",
        f"  command = {cxx} {' '.join(COMMON_FLAGS)} $flags -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {cxx} -shared $in -o $out -L{torch_root / 'lib'} -ltorch_cpu -lc10",
    ]
    for name, flags in units.items():
        lines += [f"build {folder / name}.o: compile {sources / name}.cpp", f"  flags = {' '.join(flags)}"]
    lines.append(f"build {library}: link {' '.join(f'{folder / name}.o' for name in units)}")
    return "\n".join(lines) + "\n"


def jobs() -> int:
    """MAX_JOBS, else the cores, with 1.5 GB of memory for each compiler."""
    if os.environ.get("MAX_JOBS"):
        return max(1, int(os.environ["MAX_JOBS"]))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1.5e9
    return max(1, min(os.cpu_count() or 1, int(memory)))


class BuildNative(build_ext):
    """Drives ninja instead of distutils, whose flags cannot differ between the files of one extension."""

    def build_extension(self, ext: Extension) -> None:
        cxx = compiler()
        assert cxx is not None  # decide() has looked
        folder = ROOT / "build" / "native"
        folder.mkdir(parents=True, exist_ok=True)
        library = folder / "_cpu.abi3.so"
        (folder / "build.ninja").write_text(ninja_file(cxx, usable_levels(cxx), folder, library))
        subprocess.run(["ninja", "-C", str(folder), "-j", str(jobs())], check=True)
        destination = Path(self.get_ext_fullpath(ext.name))
        destination.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(library, destination)


class BuildPythonWithMetadata(build_py):
    """Writes _build.json into the package (the source tree for an editable install)."""

    def run(self) -> None:
        super().run()
        package = ROOT / "retro_kernels" if self.editable_mode else Path(self.build_lib) / "retro_kernels"
        package.mkdir(parents=True, exist_ok=True)
        (package / "_build.json").write_text(json.dumps(metadata(), indent=2) + "\n")


def metadata() -> dict:
    """Without a date, so that the same sources give the same file."""
    record: dict = {
        "built": [name.lower() for name in BUILD],
        "skipped": SKIPPED,
        "commit": first_line("git", "rev-parse", "HEAD"),
        "machine": platform.machine(),
    }
    if "CPU" in BUILD:
        import torch

        cxx = compiler()
        assert cxx is not None
        record |= {
            "torch": torch.__version__,
            "torch_target": ".".join(map(str, TORCH_TARGET)),
            "compiler": first_line(cxx, "--version"),
            "flags": " ".join((*COMMON_FLAGS, *KERNEL_FLAGS)),
            "levels": {name: " ".join(flags) for name, flags in usable_levels(cxx).items()},
        }
    return record


BUILD, SKIPPED = decide()
setup(
    ext_modules=[Extension("retro_kernels._cpu", sources=[], py_limited_api=True)] if "CPU" in BUILD else [],
    cmdclass={"build_ext": BuildNative, "build_py": BuildPythonWithMetadata},
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if "CPU" in BUILD else {},
)
