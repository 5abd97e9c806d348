"""Builds the C++ and CUDA kernels; everything else is in pyproject.toml.

The kernels are compiled against the torch of the environment that pip installs into. It is found, not imported, so that
build isolation, which hides it (`pip install .`), is no obstacle. What cannot be built here (no torch, no C++ compiler,
a torch without CUDA, no nvcc of its major) is left out, and the package says why. A compilation that fails fails the
install. Neither a GPU nor a torch with CUDA is needed to compile the CUDA kernels: RETRO_KERNELS_BUILD_CUDA=1 asks for
them beside a CPU torch, for a wheel that other machines install.

The version says what a wheel holds, and pip replaces one by another: 0.1.0+cpu, 0.1.0+cpu.cu130, or 0.1.0 without
kernels. A wheel made from an sdist keeps the sdist's version, because pip compares it with the file's name.
How torch, compilers and CUDA are found, and files compiled, stands in csrc/toolchain.py.

Environment:
  RETRO_KERNELS_BUILD_CPU    auto (default: build if possible, else say why not), 1 (fail if not possible), 0 (do not)
  RETRO_KERNELS_BUILD_CUDA   the same for the CUDA kernels; auto builds them only if torch has CUDA
  RETRO_KERNELS_CUDA_ARCHS   compute capabilities to build for, such as the default "8.0;9.0a", "80 90", "8.0+PTX" or
                             "native" (the GPUs here); without a "+PTX" the PTX of the newest without "a" is added,
                             which the driver compiles for newer GPUs; 9.0 is built as 9.0a, as every such GPU runs it
  TORCH_CUDA_ARCH_LIST       taken where RETRO_KERNELS_CUDA_ARCHS is not set, but for what is older than 8.0
  CUDA_HOME                  the CUDA toolkit; by default the first of torch's major of: nvcc on the path, pip's
                             (cuda-toolkit[nvcc,nvvm,crt,cudart]), /usr/local/cuda
  CXX                        the C++ compiler, g++ >= 9 or clang++ >= 11; nvcc takes it too
  MAX_JOBS                   compilations at once; by default bounded by cores and available memory
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "csrc"))

import toolchain  # noqa: E402

VERSION = "0.1.0"
SOURCES = ROOT / "csrc" / "cpu"
CUDA_SOURCES = ROOT / "csrc" / "cuda"
SKIPPED_FILES = {"CPU": "_skipped.txt", "CUDA": "_cuda_skipped.txt"}
CUDA_FLAGS = ["-std=c++17", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden", "-DUSE_CUDA"]
COMMON_FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden"]
# GCC before 13 warns about its own AVX-512 headers. The kernels view packed pairs of bf16 as floats.
KERNEL_FLAGS = ["-fno-strict-aliasing", "-ffp-contract=fast", "-Wno-maybe-uninitialized", "-Wno-uninitialized"]


def setting(name: str) -> str:
    value = os.environ.get(name, "auto").strip().lower() or "auto"
    if value not in ("auto", "0", "1"):
        raise SystemExit(f"retro_kernels: {name} is {value!r}; expected auto, 1 or 0")
    return value


def git_commit() -> str | None:
    if not (ROOT / ".git").exists():
        return None
    command = ["git", "-C", str(ROOT), "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+changes"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or None
    except OSError:
        return None


def build_info(folder: Path, torch: toolchain.Torch, metadata: dict[str, object]) -> Path:
    """A source file that carries how the library is built, for `extension.read_metadata`."""
    metadata |= {
        "torch": torch.version,
        "oldest_torch": ".".join(map(str, toolchain.OLDEST_TORCH)),
        "machine": platform.machine(),
        "git_commit": git_commit(),
    }
    embedded = json.dumps("RETRO_KERNELS_BUILD" + json.dumps(metadata, sort_keys=True))
    source = folder / "build_info.cpp"
    text = (
        "namespace retro_kernels {\nextern const char* const kBuildInfo;\n"
        f"const char* const kBuildInfo = {embedded};\n}}\n"
    )
    folder.mkdir(parents=True, exist_ok=True)
    if not source.exists() or source.read_text() != text:
        source.write_text(text)
    return source


def build_cpu(target: Path) -> None:
    torch, (command, compiler_version) = toolchain.torch_installation(), toolchain.compiler()
    flags = toolchain.levels(command)
    folder = ROOT / "build" / "cpu"
    info = build_info(
        folder,
        torch,
        {"compiler": compiler_version, "levels": list(flags), "flags": " ".join(COMMON_FLAGS + KERNEL_FLAGS)},
    )
    of_torch = [
        f"-DTORCH_TARGET_VERSION={toolchain.TORCH_TARGET}",
        f"-DRK_TORCH_BUILT={torch.version}",
        f"-I{torch.folder / 'include'}",
    ]
    sources = [
        *((SOURCES / f"level_{name}.cpp", KERNEL_FLAGS + extra) for name, extra in flags.items()),
        *((SOURCES / f"{name}.cpp", of_torch) for name in ("bindings", "decode_bindings")),
        (SOURCES / "dispatch.cpp", [f"-DRK_HAVE_{name.upper()}" for name in flags if name != "portable"]),
        (info, []),
    ]
    objects = [([*command, *COMMON_FLAGS, *extra], source, folder / f"{source.stem}.o") for source, extra in sources]
    link = [*command, "-shared", *(str(each[-1]) for each in objects), f"-L{torch.folder / 'lib'}", "-ltorch_cpu"]
    toolchain.make_library("CPU", target, objects, link)


def build_cuda(target: Path) -> None:
    """The same with nvcc. The CUDA runtime is linked statically."""
    torch, (path, cuda) = toolchain.torch_installation(), toolchain.nvcc()
    command, names = toolchain.nvcc_command(path), toolchain.architectures()
    folder = ROOT / "build" / "cuda"
    info = build_info(
        folder, torch, {"cuda": cuda, "compiler": f"nvcc {cuda}", "architectures": names, "flags": " ".join(CUDA_FLAGS)}
    )
    of_torch = [f"-DTORCH_TARGET_VERSION={toolchain.TORCH_TARGET}", f"-I{torch.folder / 'include'}"]
    sm90 = ["9.0a"] if "9.0a" in names else []
    if sm90:
        of_torch.append("-DRK_HAVE_SM90")
    objects = []
    for source in sorted([*CUDA_SOURCES.rglob("*.cu"), *CUDA_SOURCES.rglob("*.cpp"), info], key=lambda x: x.suffix):
        parts = source.relative_to(folder if source == info else CUDA_SOURCES).parts
        chosen = sm90 if parts[0] == "sm90" else names  # what uses wgmma and TMA exists for sm_90a alone
        if source.suffix == ".cpp" or chosen:
            extra = of_torch if source.suffix == ".cpp" else toolchain.generate_code(chosen)
            objects.append(([*command, *CUDA_FLAGS, *extra], source, folder / ("_".join(parts) + ".o")))
    link = [*command, "-shared", "-cudart=static", *(str(each[-1]) for each in objects), f"-L{torch.folder / 'lib'}"]
    link.append(f"-L{path.resolve().parents[1] / 'lib'}")  # of pip's packages; nvcc knows that of a toolkit
    toolchain.make_library("CUDA", target, objects, [*link, "-ltorch_cpu", *torch_cuda(command, folder)])


def torch_cuda(command: list[str], folder: Path) -> list[str]:
    """How to link torch_cuda, which a CPU torch lacks: an empty library stands in for it, so that the extension
    names it as needed and finds its symbols in the one that Python has loaded."""
    stand_in = folder / "stand_in" / "libtorch_cuda.so"
    stand_in.parent.mkdir(parents=True, exist_ok=True)
    soname = ["-Xlinker", f"-soname={stand_in.name}"]
    toolchain.run("CUDA", [*command, "-shared", "-cudart=none", *soname, "-o", str(stand_in), "-x", "c++", os.devnull])
    return ["-Xlinker", "--no-as-needed", f"-L{stand_in.parent}", "-ltorch_cuda"]


class BuildKernels(build_ext):
    """Compiles csrc/cpu into retro_kernels/_cpu.abi3.so and csrc/cuda into retro_kernels/_cuda.abi3.so. Objects stay in
    build/cpu and build/cuda between builds."""

    def build_extension(self, ext: Extension) -> None:
        build = build_cpu if ext.name.endswith("_cpu") else build_cuda
        try:
            build(Path(self.get_ext_fullpath(ext.name)).resolve())
        except toolchain.CannotBuild as error:
            raise CompileError(f"{error}: {error.remedy}") from error
        BUILT.append(ext)

    def copy_extensions_to_source(self) -> None:
        build_py = self.get_finalized_command("build_py")
        for ext in self.extensions:
            inplace, regular = self._get_inplace_equivalent(build_py, ext)
            fresh = Path(inplace).with_suffix(".new")
            shutil.copyfile(regular, fresh)
            fresh.replace(inplace)


class BuildPython(build_py):
    """Begins with an empty folder, so that no module or library of an earlier build is packed, and writes why kernels
    were left out beside where they would be; `why_not` of their module and the doctor repeat it."""

    def run(self) -> None:
        package = (ROOT if self.editable_mode else Path(self.build_lib).resolve()) / "retro_kernels"
        if package.parent != ROOT:
            for stale in (package, *(ROOT / "build").glob("bdist.*")):
                shutil.rmtree(stale, ignore_errors=True)
        super().run()
        for kind, file in SKIPPED_FILES.items():
            if kind in SKIPPED:
                package.mkdir(parents=True, exist_ok=True)
                (package / file).write_text("\n".join(SKIPPED[kind]))
                (package / f"_{kind.lower()}.abi3.so").unlink(missing_ok=True)
            else:
                (package / file).unlink(missing_ok=True)


BUILT: list[Extension] = []
SKIPPED: dict[str, tuple[str, str]] = {}  # what is left out, why, and what to do


def extensions() -> list[Extension]:
    found = []
    for kind in SKIPPED_FILES:
        variable = f"RETRO_KERNELS_BUILD_{kind}"
        wanted = setting(variable)
        try:
            if wanted == "0":
                raise toolchain.CannotBuild(f"{variable} was 0", f"without that setting, {toolchain.AGAIN}")
            toolchain.check(kind, wanted)
        except toolchain.CannotBuild as error:
            if wanted == "1":
                raise SystemExit(f"retro_kernels: {variable}=1, but {error}. Remedy: {error.remedy}.") from error
            SKIPPED[kind] = (str(error), error.remedy)
            toolchain.say(
                f"the {kind} kernels are skipped: {error}. Everything else is installed. To get them, {error.remedy}."
            )
        else:
            found.append(Extension(f"retro_kernels._{kind.lower()}", sources=[], py_limited_api=True))
    return found


def version(modules: list[Extension]) -> str:
    if toolchain.SDIST or not modules:
        return VERSION
    tags = ["cpu" if ext.name.endswith("_cpu") else f"cu{toolchain.nvcc()[1].replace('.', '')}" for ext in modules]
    return f"{VERSION}+{'.'.join(tags)}"


def summary(modules: list[Extension]) -> str:
    """What was built and what was not, in one sentence."""
    built = " and ".join(f"the {ext.name.rpartition('_')[2].upper()} kernels" for ext in modules) or "no kernels"
    left_out = "; ".join(f"left out the {kind} kernels ({reason})" for kind, (reason, _) in SKIPPED.items())
    return f"built {built}" + (f"; {left_out}" if left_out else "")


def main() -> None:
    wheel = {"dist_info", "bdist_wheel", "editable_wheel"} & set(sys.argv)
    if wheel and not any(map(importlib.util.find_spec, ("setuptools.command.bdist_wheel", "wheel"))):
        raise SystemExit(
            f"retro_kernels: setuptools {setuptools.__version__} makes no wheels without the package wheel. Remedy: "
            "pip install --upgrade setuptools wheel, or pip install without --no-build-isolation."
        )
    modules = [] if "sdist" in sys.argv else extensions()
    setup(
        version=version(modules),
        license="Apache-2.0",
        ext_modules=modules,
        cmdclass={"build_ext": BuildKernels, "build_py": BuildPython},
        options={"bdist_wheel": {"py_limited_api": "cp310"}} if modules else {},
    )
    if BUILT or "bdist_wheel" in sys.argv:
        toolchain.say(summary(modules))


if __name__ == "__main__":
    main()
