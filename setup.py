"""Builds the C++ extension where it can be built; everything else is in pyproject.toml.

`pip install .` builds in an environment without torch: the result is pure Python (and Triton), and complete as such.
`pip install --no-build-isolation .` (or `-e .`) builds the CPU kernels against the torch that is installed.

Environment:
  RETRO_KERNELS_BUILD_CPU    auto (default: build if possible, else say why not), 1 (fail if not possible), 0 (do not)
  RETRO_KERNELS_BUILD_CUDA   the same for CUDA, whose C++ sources come later: auto and 0 skip, 1 fails
  CXX                        the C++ compiler, g++ >= 9 or clang++ >= 11
  MAX_JOBS                   compilations at once; by default bounded by cores and free memory
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
SOURCES = ROOT / "csrc" / "cpu"
OLDEST_TORCH = (2, 11)
TORCH_TARGET = "0x020b000000000000"  # OLDEST_TORCH, as torch's stable ABI spells it
MEMORY_PER_JOB = 1 << 30
REMEDY = "install torch >= 2.11 and ninja, then run `pip install --no-build-isolation .` in the source tree"

COMMON_FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden"]
# GCC before 13 warns about its own AVX-512 headers. The kernels view packed pairs of bf16 as floats.
KERNEL_FLAGS = ["-fno-strict-aliasing", "-ffp-contract=fast", "-Wno-maybe-uninitialized", "-Wno-uninitialized"]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = AVX2 + ["-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mprefer-vector-width=512"]
LEVELS = {"portable": [], "avx2": AVX2, "avx512": AVX512, "avx512_bf16": AVX512 + ["-mavx512bf16"]}


class CannotBuild(Exception):
    """Why the extension cannot be built here, in one sentence."""


def setting(name: str) -> str:
    value = os.environ.get(name, "auto").strip().lower() or "auto"
    if value not in ("auto", "0", "1"):
        raise SystemExit(f"retro_kernels: {name} is {value!r}; expected auto, 1 or 0")
    return value


def say(message: str) -> None:
    print(f"retro_kernels: {message}", file=sys.stderr, flush=True)


def torch_installation() -> tuple[str, Path]:
    """(version, folder) of the torch to build against."""
    try:
        import torch
    except ImportError as error:
        raise CannotBuild(
            f"torch cannot be imported in the build environment ({error}), as always without --no-build-isolation"
        ) from error
    version = torch.__version__
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST_TORCH:
        raise CannotBuild(f"torch is {version}, and the extension needs 2.11 or newer")
    return version, Path(torch.__file__).parent


def compiler() -> tuple[list[str], str]:
    """(command, first line of its --version)."""
    if platform.system() == "Windows":
        raise CannotBuild("the kernels need GCC or Clang, which is not supported on Windows")
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    for name in names:
        command = shlex.split(name)
        if command and shutil.which(command[0]):
            if not accepts(command, ["-std=c++17"]):
                raise CannotBuild(f"{name} does not compile C++17: use g++ >= 9 or clang++ >= 11")
            version = subprocess.run([*command, "--version"], capture_output=True, text=True, check=False).stdout
            return command, (version.splitlines() or ["unknown"])[0]
    raise CannotBuild(f"there is no C++ compiler ({', '.join(names)}): install g++ >= 9 or clang++ >= 11, or set CXX")


def accepts(command: list[str], flags: list[str]) -> bool:
    result = subprocess.run(
        [*command, *flags, "-x", "c++", "-fsyntax-only", "-"], input="int main() {}", capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    return result.returncode == 0


def levels(command: list[str]) -> dict[str, list[str]]:
    """Instruction-set level -> flags, of those this compiler knows."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return {"portable": []}
    return {name: flags for name, flags in LEVELS.items() if accepts(command, flags)}


def git_commit() -> str | None:
    if not (ROOT / ".git").exists():
        return None
    try:
        result = subprocess.run(
            ["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
        )
    except OSError:
        return None
    return result.stdout.strip() or None


def jobs() -> int:
    if os.environ.get("MAX_JOBS", "").isdigit():
        return max(1, int(os.environ["MAX_JOBS"]))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return cores
    return max(1, min(cores, free // MEMORY_PER_JOB))


def ninja_command() -> str | None:
    try:
        import ninja
    except ImportError:
        return shutil.which("ninja")
    return str(Path(ninja.BIN_DIR) / "ninja")


def write_if_changed(path: Path, text: str) -> None:
    if not path.exists() or path.read_text() != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


class BuildKernels(build_ext):
    """Compiles csrc/cpu with ninja into retro_kernels/_cpu.abi3.so. Objects stay in build/cpu between builds."""

    def build_extension(self, ext: Extension) -> None:
        try:
            self.build_cpu(Path(self.get_ext_fullpath(ext.name)).resolve())
        except (CannotBuild, subprocess.CalledProcessError, OSError) as error:
            message = f"building the CPU kernels failed: {error}"
            say(message if not ext.optional else f"{message}; going on without them")
            raise CompileError(message) from error

    def build_cpu(self, target: Path) -> None:
        version, torch = torch_installation()
        command, compiler_version = compiler()
        flags = levels(command)
        folder = ROOT / "build" / "cpu"
        include = torch / "include"
        metadata = {
            "torch": version,
            "oldest_torch": ".".join(map(str, OLDEST_TORCH)),
            "compiler": compiler_version,
            "machine": platform.machine(),
            "levels": list(flags),
            "flags": " ".join(COMMON_FLAGS + KERNEL_FLAGS),
            "git_commit": git_commit(),
        }
        embedded = json.dumps("RETRO_KERNELS_BUILD" + json.dumps(metadata, sort_keys=True))
        write_if_changed(
            folder / "build_info.cpp",
            "namespace retro_kernels {\nextern const char* const kBuildInfo;\n"
            f"const char* const kBuildInfo = {embedded};\n}}\n",
        )
        have = [f"-DRK_HAVE_{name.upper()}" for name in flags if name != "portable"]
        objects: list[tuple[Path, Path, list[str]]] = [
            *((SOURCES / f"{name}.cpp", folder / f"{name}.o",
               [f"-DTORCH_TARGET_VERSION={TORCH_TARGET}", f"-DRK_TORCH_BUILT={version}", f"-I{include}"])
              for name in ("bindings", "decode_bindings")),
            (SOURCES / "dispatch.cpp", folder / "dispatch.o", have),
            (folder / "build_info.cpp", folder / "build_info.o", []),
        ]  # fmt: skip
        objects += [
            (SOURCES / f"level_{name}.cpp", folder / f"level_{name}.o", KERNEL_FLAGS + extra)
            for name, extra in flags.items()
        ]
        built = folder / target.name
        compile_command = shlex.join([*command, *COMMON_FLAGS])
        link = shlex.join([*command, "-shared"])
        libraries = f"-L{torch / 'lib'} -ltorch_cpu"
        ninja = ninja_command()
        folder.mkdir(parents=True, exist_ok=True)
        if ninja is None:
            say("ninja is not installed: compiling everything, one file after the other")
            for source, obj, extra in objects:
                self.call([*command, *COMMON_FLAGS, *extra, "-c", str(source), "-o", str(obj)])
            self.call([*command, "-shared", "-o", str(built), *(str(o) for _, o, _ in objects), *libraries.split()])
        else:
            lines = [
                "ninja_required_version = 1.5",
                "rule compile",
                f"  command = {ninja_text(compile_command)} $flags -MMD -MF $out.d -c $in -o $out",
                "  depfile = $out.d",
                "  deps = gcc",
                "  description = $in",
                "rule link",
                f"  command = {ninja_text(link)} -o $out $in {ninja_text(libraries)}",
            ]
            for source, obj, extra in objects:
                lines += [f"build {ninja_path(obj)}: compile {ninja_path(source)}", f"  flags = {shlex.join(extra)}"]
            lines.append(f"build {ninja_path(built)}: link {' '.join(ninja_path(o) for _, o, _ in objects)}")
            write_if_changed(folder / "build.ninja", "\n".join(lines) + "\n")
            self.call([ninja, "-C", str(folder), "-j", str(jobs())])
        target.parent.mkdir(parents=True, exist_ok=True)
        # A process that has the old library mapped must keep its file: replace, do not overwrite.
        fresh = target.with_suffix(".new")
        shutil.copyfile(built, fresh)
        fresh.replace(target)
        say(f"built the CPU kernels ({', '.join(flags)}) against torch {version}")

    def copy_extensions_to_source(self) -> None:
        build_py = self.get_finalized_command("build_py")
        for ext in self.extensions:
            inplace, regular = self._get_inplace_equivalent(build_py, ext)
            if Path(regular).exists():
                fresh = Path(inplace).with_suffix(".new")
                shutil.copyfile(regular, fresh)
                fresh.replace(inplace)

    def call(self, command: list[str]) -> None:
        result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
        if result.returncode:
            print(result.stdout, file=sys.stderr)
            raise CannotBuild(f"`{command[0]}` ended with status {result.returncode}; its output is above")


def ninja_text(text: str) -> str:
    return text.replace("$", "$$")


def ninja_path(path: Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


SKIPPED: list[str] = []


def skip(reason: str) -> None:
    """pip hides what a build prints, so the reason is kept in the package too (see BuildPython)."""
    SKIPPED.append(reason)
    say(f"the CPU kernels are skipped: {reason}. Everything else is installed. To get them, {REMEDY}.")


class BuildPython(build_py):
    """Writes why the library was skipped beside where it would be; `extension.why_not` and the doctor repeat it."""

    def run(self) -> None:
        super().run()
        package = (ROOT if self.editable_mode else Path(self.build_lib)) / "retro_kernels"
        if SKIPPED:
            package.mkdir(parents=True, exist_ok=True)
            (package / "_skipped.txt").write_text(SKIPPED[0])


def extensions() -> list[Extension]:
    cpu, cuda = setting("RETRO_KERNELS_BUILD_CPU"), setting("RETRO_KERNELS_BUILD_CUDA")
    if cuda == "1":
        raise SystemExit(
            "retro_kernels: RETRO_KERNELS_BUILD_CUDA=1 was asked for, but this version has no CUDA C++ sources yet; "
            "on a GPU the Triton kernels run. Unset it, or set it to auto or 0."
        )
    if cpu == "0":
        skip("RETRO_KERNELS_BUILD_CPU was 0")
        return []
    try:
        torch_installation()
        compiler()
    except CannotBuild as reason:
        if cpu == "1":
            raise SystemExit(f"retro_kernels: RETRO_KERNELS_BUILD_CPU=1, but {reason}. Remedy: {REMEDY}.") from reason
        skip(str(reason))
        return []
    return [Extension("retro_kernels._cpu", sources=[], py_limited_api=True, optional=cpu == "auto")]


MODULES = extensions()
setup(
    ext_modules=MODULES,
    cmdclass={"build_ext": BuildKernels, "build_py": BuildPython},
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if MODULES else {},
)
