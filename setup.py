"""Builds the C++ extension where it can be built; everything else is in pyproject.toml.

`pip install .` builds in an environment without torch: the result is pure Python (and Triton), and complete as such.
`pip install --no-build-isolation .` (or `-e .`) builds the CPU kernels against the torch that is installed, and the
CUDA kernels where that torch has CUDA and there is an nvcc of the same major. Neither a GPU nor a torch with CUDA is
needed to build them: RETRO_KERNELS_BUILD_CUDA=1 asks for them anywhere, so that a wheel can be made on any machine.

Environment:
  RETRO_KERNELS_BUILD_CPU    auto (default: build if possible, else say why not), 1 (fail if not possible), 0 (do not)
  RETRO_KERNELS_BUILD_CUDA   the same for the CUDA kernels; auto builds them only if torch has CUDA
  RETRO_KERNELS_CUDA_ARCHS   compute capabilities to build for, default "8.0;9.0a"; PTX of the newest without "a" is
                             added, which the driver compiles for newer GPUs
  CUDA_HOME                  the CUDA toolkit; by default that of the nvcc on the path
  CXX                        the C++ compiler, g++ >= 9 or clang++ >= 11
  MAX_JOBS                   compilations at once; by default bounded by cores and free memory
"""

from __future__ import annotations

import json
import os
import platform
import re
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
CUDA_SOURCES = ROOT / "csrc" / "cuda"
OLDEST_TORCH = (2, 11)
TORCH_TARGET = "0x020b000000000000"  # OLDEST_TORCH, as torch's stable ABI spells it
MEMORY_PER_JOB = {"cpu": 1 << 30, "cuda": 2 << 30}
CUDA_ARCHITECTURES = "8.0;9.0a"
CUDA_FLAGS = ["-std=c++17", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden", "-DUSE_CUDA"]
CUDA_REMEDY = (
    "install torch >= 2.11, ninja and a CUDA toolkit with nvcc, then run `RETRO_KERNELS_BUILD_CUDA=1 pip install "
    "--no-build-isolation .` in the source tree"
)
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


def nvcc() -> tuple[list[str], str]:
    """(command, version such as "13.0")."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    path = shutil.which("nvcc", path=str(Path(home) / "bin")) if home else shutil.which("nvcc")
    if path is None:
        raise CannotBuild(f"there is no nvcc in {home}/bin (CUDA_HOME)" if home else "there is no nvcc on the path")
    text = subprocess.run([path, "--version"], capture_output=True, text=True, check=False).stdout
    found = re.search(r"release (\d+\.\d+)", text)
    if found is None:
        raise CannotBuild(f"{path} --version does not name a release")
    command = [path]
    if os.environ.get("CXX"):
        command += ["-ccbin", shlex.split(os.environ["CXX"])[0]]
    return command, found[1]


def architectures() -> list[str]:
    """Compute capabilities such as "8.0" or "9.0a", and "8.0+PTX" last."""
    given = os.environ.get("RETRO_KERNELS_CUDA_ARCHS") or CUDA_ARCHITECTURES
    names = [name for name in re.split(r"[;,\s]+", given.strip()) if name]
    for name in names:
        if not re.fullmatch(r"([89]|1[0-9])\.[0-9]a?", name):
            raise SystemExit(
                f"retro_kernels: RETRO_KERNELS_CUDA_ARCHS is {given!r}; expected compute capabilities from 8.0 on, "
                f"such as {CUDA_ARCHITECTURES!r}"
            )
    portable = [name for name in names if not name.endswith("a")]
    newest = max(portable, key=lambda name: [int(part) for part in name.split(".")], default=None)
    return [*names, f"{newest}+PTX"] if newest else names


def generate_code(names: list[str]) -> list[str]:
    """nvcc's flags for them."""
    flags = []
    for name in names:
        number = name.removesuffix("+PTX").replace(".", "")
        kind = "compute" if name.endswith("+PTX") else "sm"
        flags.append(f"-gencode=arch=compute_{number},code={kind}_{number}")
    return flags


def cuda_of_torch() -> str | None:
    import torch

    return torch.version.cuda


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


def jobs(memory: int) -> int:
    if os.environ.get("MAX_JOBS", "").isdigit():
        return max(1, int(os.environ["MAX_JOBS"]))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return cores
    return max(1, min(cores, free // memory))


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


def build_info(folder: Path, metadata: dict[str, object]) -> Path:
    """A source file that carries how the library is built, for `extension.read_metadata`."""
    embedded = json.dumps("RETRO_KERNELS_BUILD" + json.dumps(metadata, sort_keys=True))
    source = folder / "build_info.cpp"
    write_if_changed(
        source,
        "namespace retro_kernels {\nextern const char* const kBuildInfo;\n"
        f"const char* const kBuildInfo = {embedded};\n}}\n",
    )
    return source


class BuildKernels(build_ext):
    """Compiles csrc/cpu into retro_kernels/_cpu.abi3.so and csrc/cuda into retro_kernels/_cuda.abi3.so, with ninja.
    Objects stay in build/cpu and build/cuda between builds."""

    def build_extension(self, ext: Extension) -> None:
        kind = ext.name.rsplit("_", 1)[-1]
        try:
            {"cpu": self.build_cpu, "cuda": self.build_cuda}[kind](Path(self.get_ext_fullpath(ext.name)).resolve())
        except (CannotBuild, subprocess.CalledProcessError, OSError) as error:
            message = f"building the {NAMES[kind]} kernels failed: {error}"
            say(message if not ext.optional else f"{message}; going on without them")
            raise CompileError(message) from error

    def build_cpu(self, target: Path) -> None:
        version, torch = torch_installation()
        command, compiler_version = compiler()
        flags = levels(command)
        folder = ROOT / "build" / "cpu"
        metadata = {
            "torch": version,
            "oldest_torch": ".".join(map(str, OLDEST_TORCH)),
            "compiler": compiler_version,
            "machine": platform.machine(),
            "levels": list(flags),
            "flags": " ".join(COMMON_FLAGS + KERNEL_FLAGS),
            "git_commit": git_commit(),
        }
        have = [f"-DRK_HAVE_{name.upper()}" for name in flags if name != "portable"]
        objects: list[tuple[Path, Path, list[str]]] = [
            *((SOURCES / f"{name}.cpp", folder / f"{name}.o",
               [f"-DTORCH_TARGET_VERSION={TORCH_TARGET}", f"-DRK_TORCH_BUILT={version}", f"-I{torch / 'include'}"])
              for name in ("bindings", "decode_bindings")),
            (SOURCES / "dispatch.cpp", folder / "dispatch.o", have),
            (build_info(folder, metadata), folder / "build_info.o", []),
        ]  # fmt: skip
        objects += [
            (SOURCES / f"level_{name}.cpp", folder / f"level_{name}.o", KERNEL_FLAGS + extra)
            for name, extra in flags.items()
        ]
        libraries = [f"-L{torch / 'lib'}", "-ltorch_cpu"]
        self.compile("cpu", target, [*command, *COMMON_FLAGS], objects, [*command, "-shared"], libraries)
        say(f"built the CPU kernels ({', '.join(flags)}) against torch {version}")

    def build_cuda(self, target: Path) -> None:
        """The same with nvcc. The CUDA runtime is linked statically."""
        version, torch = torch_installation()
        command, cuda = nvcc()
        names = architectures()
        folder = ROOT / "build" / "cuda"
        metadata = {
            "torch": version,
            "oldest_torch": ".".join(map(str, OLDEST_TORCH)),
            "cuda": cuda,
            "compiler": f"nvcc {cuda}",
            "machine": platform.machine(),
            "architectures": names,
            "flags": " ".join(CUDA_FLAGS),
            "git_commit": git_commit(),
        }
        of_torch = [f"-DTORCH_TARGET_VERSION={TORCH_TARGET}", f"-I{torch / 'include'}"]
        sm90 = ["9.0a"] if "9.0a" in names else []
        if sm90:
            of_torch.append("-DRK_HAVE_SM90")
        objects = [(build_info(folder, metadata), folder / "build_info.o", [])]
        for source in sorted([*CUDA_SOURCES.rglob("*.cpp"), *CUDA_SOURCES.rglob("*.cu")]):
            parts = source.relative_to(CUDA_SOURCES).parts
            chosen = sm90 if parts[0] == "sm90" else names  # what uses wgmma and TMA exists for sm_90a alone
            if source.suffix == ".cpp" or chosen:
                flags = of_torch if source.suffix == ".cpp" else generate_code(chosen)
                objects.append((source, folder / ("_".join(parts) + ".o"), flags))
        link = [*command, "-shared", "-cudart=static"]
        libraries = [f"-L{torch / 'lib'}", "-ltorch_cpu", *self.torch_cuda(command, folder)]
        self.compile("cuda", target, [*command, *CUDA_FLAGS], objects, link, libraries)
        say(f"built the CUDA kernels ({', '.join(names)}) with nvcc {cuda} against torch {version}")

    def torch_cuda(self, command: list[str], folder: Path) -> list[str]:
        """How to link torch_cuda, which a CPU torch lacks: an empty library stands in for it, so that the extension
        names it as needed and finds its symbols in the one that Python has loaded."""
        stand_in = folder / "stand_in" / "libtorch_cuda.so"
        if not stand_in.exists():
            source = stand_in.with_suffix(".cpp")
            write_if_changed(source, "")
            soname = ["-Xlinker", f"-soname={stand_in.name}"]
            self.call([*command, "-shared", "-cudart=none", *soname, "-o", str(stand_in), str(source)])
        return ["-Xlinker", "--no-as-needed", f"-L{stand_in.parent}", "-ltorch_cuda"]

    def compile(
        self, kind: str, target: Path, compile_command: list[str], objects: list[tuple[Path, Path, list[str]]],
        link: list[str], libraries: list[str],
    ) -> None:  # fmt: skip
        """(source, object, flags of its own) each, then the library, copied to `target`."""
        folder = ROOT / "build" / kind
        folder.mkdir(parents=True, exist_ok=True)
        built = folder / target.name
        ninja = ninja_command()
        if ninja is None:
            say("ninja is not installed: compiling everything, one file after the other")
            for source, obj, extra in objects:
                self.call([*compile_command, *extra, "-c", str(source), "-o", str(obj)])
            self.call([*link, "-o", str(built), *(str(o) for _, o, _ in objects), *libraries])
        else:
            lines = [
                "ninja_required_version = 1.5",
                "rule compile",
                f"  command = {ninja_text(shlex.join(compile_command))} $flags -MMD -MF $out.d -c $in -o $out",
                "  depfile = $out.d",
                "  deps = gcc",
                "  description = $in",
                "rule link",
                f"  command = {ninja_text(shlex.join(link))} -o $out $in {ninja_text(shlex.join(libraries))}",
            ]
            for source, obj, extra in objects:
                lines += [f"build {ninja_path(obj)}: compile {ninja_path(source)}", f"  flags = {shlex.join(extra)}"]
            lines.append(f"build {ninja_path(built)}: link {' '.join(ninja_path(o) for _, o, _ in objects)}")
            write_if_changed(folder / "build.ninja", "\n".join(lines) + "\n")
            self.call([ninja, "-C", str(folder), "-j", str(jobs(MEMORY_PER_JOB[kind]))])
        target.parent.mkdir(parents=True, exist_ok=True)
        # A process that has the old library mapped must keep its file: replace, do not overwrite.
        fresh = target.with_suffix(".new")
        shutil.copyfile(built, fresh)
        fresh.replace(target)

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


NAMES = {"cpu": "CPU", "cuda": "CUDA"}
REMEDIES = {"cpu": REMEDY, "cuda": CUDA_REMEDY}
SKIPPED_FILES = {"cpu": "_skipped.txt", "cuda": "_cuda_skipped.txt"}
SKIPPED: dict[str, str] = {}


def skip(kind: str, reason: str) -> None:
    """pip hides what a build prints, so the reason is kept in the package too (see BuildPython)."""
    SKIPPED[kind] = reason
    name, remedy = NAMES[kind], REMEDIES[kind]
    say(f"the {name} kernels are skipped: {reason}. Everything else is installed. To get them, {remedy}.")


class BuildPython(build_py):
    """Writes why a library was skipped beside where it would be; `why_not` of its module and the doctor repeat it."""

    def run(self) -> None:
        super().run()
        package = (ROOT if self.editable_mode else Path(self.build_lib)) / "retro_kernels"
        for kind, reason in SKIPPED.items():
            package.mkdir(parents=True, exist_ok=True)
            (package / SKIPPED_FILES[kind]).write_text(reason)


def check_cpu() -> None:
    torch_installation()
    compiler()


def check_cuda() -> None:
    """Raises CannotBuild where `auto` would not build the CUDA kernels, or no setting could."""
    torch_installation()
    _, cuda = nvcc()
    architectures()
    if setting("RETRO_KERNELS_BUILD_CUDA") == "1":
        return
    of_torch = cuda_of_torch()
    if of_torch is None:
        raise CannotBuild("this torch has no CUDA (RETRO_KERNELS_BUILD_CUDA=1 builds them all the same)")
    if of_torch.split(".")[0] != cuda.split(".")[0]:
        raise CannotBuild(f"nvcc is of CUDA {cuda} and torch of CUDA {of_torch}, another major version")


def extensions() -> list[Extension]:
    found = []
    for kind, check in (("cpu", check_cpu), ("cuda", check_cuda)):
        variable = f"RETRO_KERNELS_BUILD_{NAMES[kind]}"
        wanted = setting(variable)
        if wanted == "0":
            skip(kind, f"{variable} was 0")
            continue
        try:
            check()
        except CannotBuild as reason:
            if wanted == "1":
                raise SystemExit(f"retro_kernels: {variable}=1, but {reason}. Remedy: {REMEDIES[kind]}.") from reason
            skip(kind, str(reason))
            continue
        found.append(Extension(f"retro_kernels._{kind}", sources=[], py_limited_api=True, optional=wanted == "auto"))
    return found


MODULES = extensions()
setup(
    ext_modules=MODULES,
    cmdclass={"build_ext": BuildKernels, "build_py": BuildPython},
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if MODULES else {},
)
