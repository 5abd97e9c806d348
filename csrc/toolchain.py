"""Finds torch, compilers and CUDA, and compiles C++ and CUDA sources into a library. setup.py builds the kernels with
it, and the tests their emulator.

torch is found, not imported: build isolation hides it from the process that builds.
"""

from __future__ import annotations

import concurrent.futures
import functools
import importlib.util
import os
import platform
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from importlib.machinery import PathFinder
from pathlib import Path
from typing import NamedTuple

from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parents[1]
OLDEST_TORCH = (2, 11)
TORCH_TARGET = "0x020b000000000000"  # OLDEST_TORCH, as torch's stable ABI spells it
MEMORY_PER_JOB = {"CPU": 1 << 30, "CUDA": 2 << 30}
CUDA_ARCHITECTURES = "8.0;9.0a"
TOOLKITS = ("/usr/local/cuda", "/usr/local/cuda-*")
LAUNCHERS = ("ccache", "sccache", "distcc", "icecc")  # as in CXX="ccache g++"; nvcc must have the compiler itself
SDIST = (ROOT / "PKG-INFO").exists()
AGAIN = "run `pip install --no-build-isolation -e .` in the source tree"
if SDIST:  # pip keeps the wheel that it has made from an archive
    AGAIN = "install the archive again, `pip install --no-build-isolation --no-cache-dir --force-reinstall --no-deps`"

AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = AVX2 + ["-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mprefer-vector-width=512"]
AVX512_BF16 = AVX512 + ["-mavx512bf16"]
LEVELS = {
    "portable": [],
    "avx2": AVX2,
    "avx512": AVX512,
    "avx512_bf16": AVX512_BF16,
    "amx_bf16": AVX512_BF16 + ["-mamx-tile", "-mamx-bf16"],
}
# A compiler may be newer than the assembler that it calls, and emit what that does not know.
NEWEST = {"avx512_bf16": "vdpbf16ps %zmm0, %zmm0, %zmm0", "amx_bf16": "tdpbf16ps %tmm0, %tmm1, %tmm2"}


class CannotBuild(Exception):
    """Why kernels cannot be built here, and what to do about it, in a sentence each."""

    def __init__(self, reason: str, remedy: str):
        super().__init__(reason)
        self.remedy = remedy


class Torch(NamedTuple):
    version: str
    cuda: str | None  # such as "13.0"
    folder: Path


def say(message: str) -> None:
    print(f"retro_kernels: {message}", file=sys.stderr, flush=True)


def major(version: str) -> str:
    return version.split(".")[0]


@functools.cache
def torch_installation() -> Torch:
    """The torch that Python would import, or that of the environment which an isolated build is for."""
    site = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    found = importlib.util.find_spec("torch") or PathFinder.find_spec("torch", site)
    facts = Path(found.origin).with_name("version.py") if found and found.origin else None
    if facts is None or not facts.exists():
        where = found.origin if found and found.origin else f"there is none in {site[0]}"
        raise CannotBuild(
            f"torch cannot be imported in the build environment ({where})", f"install torch >= 2.11, then {AGAIN}"
        )
    names = runpy.run_path(str(facts))
    version = names["__version__"]
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST_TORCH:
        raise CannotBuild(f"torch is {version}, and the kernels need 2.11 or newer", f"upgrade torch, then {AGAIN}")
    return Torch(version, names.get("cuda"), facts.parent)


@functools.cache
def compiler() -> tuple[list[str], str]:
    """(command, first line of its --version)."""
    remedy = f"install g++ >= 9 or clang++ >= 11, or name it in CXX, then {AGAIN}"
    if platform.system() == "Windows":
        raise CannotBuild("the kernels need GCC or Clang, which is not supported on Windows", "use Linux, or WSL")
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    for name in names:
        command = shlex.split(name)
        if command and shutil.which(command[0]):
            if not accepts(command, ["-std=c++17"]):
                raise CannotBuild(f"{name} does not compile C++17", remedy)
            version = subprocess.run([*command, "--version"], capture_output=True, text=True, check=False).stdout
            return command, (version.splitlines() or ["unknown"])[0]
    raise CannotBuild(f"there is no C++ compiler ({', '.join(names)})", remedy)


def accepts(command: list[str], flags: list[str], instruction: str = "") -> bool:
    result = subprocess.run(
        [*command, *flags, "-x", "c++", "-c", "-", "-o", os.devnull],
        input=f'int main() {{ __asm__("{instruction}"); }}',
        capture_output=True,
        text=True,
        check=False,
    )
    return result.returncode == 0


def levels(command: list[str]) -> dict[str, list[str]]:
    """Instruction-set level -> flags, of those this compiler knows."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return {"portable": []}
    return {name: flags for name, flags in LEVELS.items() if accepts(command, flags, NEWEST.get(name, ""))}


@functools.cache
def nvcc() -> tuple[Path, str]:
    """(path, release such as "13.0") of the first nvcc of torch's CUDA major, or else of the first one."""
    torch = torch_installation()
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home:
        places = [Path(home) / "bin" / "nvcc"]
    else:
        on_path = shutil.which("nvcc")
        places = [Path(on_path)] if on_path else []
        for site in (torch.folder.parent, Path(sysconfig.get_path("purelib"))):
            places += sorted(site.glob("nvidia/cu*/bin/nvcc"))
        for pattern in TOOLKITS:
            places += sorted(Path("/").glob(f"{pattern[1:]}/bin/nvcc"), reverse=True)
    found: dict[str, Path] = {}
    for path in filter(Path.exists, places):
        text = subprocess.run([path, "--version"], capture_output=True, text=True, check=False).stdout
        release = re.search(r"release (\d+\.\d+)", text)
        if release:
            found.setdefault(release[1], path)
    if not found:
        where = f"in {home}/bin (CUDA_HOME)" if home else "on the path, among pip's packages or in /usr/local/cuda"
        raise CannotBuild(f"there is no nvcc {where}", nvcc_remedy(torch.cuda))
    release = next((name for name in found if torch.cuda and major(name) == major(torch.cuda)), next(iter(found)))
    return found[release], release


def nvcc_remedy(cuda: str | None) -> str:
    """How to get the nvcc of torch's CUDA. pip has one from CUDA 13 on."""
    cuda = cuda or "13.0"
    toolkit = f"install NVIDIA's toolkit of CUDA {major(cuda)} (and set CUDA_HOME)"
    if int(major(cuda)) >= 13:
        toolkit = f'`pip install "cuda-toolkit[nvcc,nvvm,crt,cudart]=={cuda}.*"`, or {toolkit}'
    return f"{toolkit}, then {AGAIN}"


def nvcc_command(path: Path) -> list[str]:
    """nvcc with the host compiler that the CPU kernels have. CannotBuild where the two do not work together."""
    words = list(compiler()[0])
    while len(words) > 1 and Path(words[0]).name in LAUNCHERS:
        words.pop(0)
    command = [str(path), "-ccbin", words[0], *(f"-Xcompiler={word}" for word in words[1:])]
    done = subprocess.run(
        [*command, "-x", "cu", "-E", os.devnull, "-o", os.devnull],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode:
        raise CannotBuild(
            f"{path} with {words[0]} does not compile an empty file: {' '.join(done.stdout.split())[-500:]}",
            f"name a compiler that it takes in CXX, or another toolkit in CUDA_HOME, then {AGAIN}",
        )
    return command


def architectures() -> list[str]:
    """Compute capabilities such as "8.0" or "9.0a", and what gets PTX, such as "8.0+PTX", last."""
    variables = ("RETRO_KERNELS_CUDA_ARCHS", "TORCH_CUDA_ARCH_LIST")
    variable = next((name for name in variables if os.environ.get(name, "").strip()), variables[0])
    given = os.environ.get(variable, "").strip() or CUDA_ARCHITECTURES
    names, portable, ptx = [], [], []
    for word in re.split(r"[;,\s]+", " ".join(gpus()) if given == "native" else given):
        parts = re.fullmatch(r"(\d+?)\.?(\d)(a?)(\+PTX)?", word)
        capability = (int(parts[1]), int(parts[2])) if parts else (0, 0)
        if parts and capability < (8, 0) and variable == "TORCH_CUDA_ARCH_LIST":
            say(f"{variable}: {word} is left out, since the CUDA kernels need 8.0 or newer")
            continue
        if not (8, 0) <= capability < (20, 0):
            raise SystemExit(
                f"retro_kernels: {variable} is {given!r}; expected compute capabilities from 8.0 on, such as "
                f"{CUDA_ARCHITECTURES!r} or '8.0+PTX', or 'native'"
            )
        names.append(f"{parts[1]}.{parts[2]}{'a' if capability == (9, 0) else parts[3]}")
        portable += [capability] if not parts[3] else []
        ptx += [capability] if parts[4] else []
    if not names:
        raise SystemExit(f"retro_kernels: {variable} is {given!r}, and the CUDA kernels need 8.0 or newer")
    ptx = ptx or [max(portable)] if portable else ptx
    return list(dict.fromkeys([*names, *(f"{a}.{b}+PTX" for a, b in ptx)]))


def gpus() -> list[str]:
    """The compute capabilities of the GPUs here, from the driver, since an isolated build cannot import torch."""
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    except (OSError, subprocess.CalledProcessError):
        found = []
    if not found:
        raise SystemExit(
            "retro_kernels: the CUDA architectures are to be 'native', but nvidia-smi shows no GPU here: set "
            f"RETRO_KERNELS_CUDA_ARCHS to its compute capability, such as {CUDA_ARCHITECTURES!r}"
        )
    return sorted(set(found))


def generate_code(names: list[str]) -> list[str]:
    """nvcc's flags for them."""
    flags = []
    for name in names:
        number = name.removesuffix("+PTX").replace(".", "")
        kind = "compute" if name.endswith("+PTX") else "sm"
        flags.append(f"-gencode=arch=compute_{number},code={kind}_{number}")
    return flags


def check(kind: str, wanted: str) -> None:
    """CannotBuild for what is to be left out, or cannot be made as asked. SystemExit for what must be mended first."""
    torch = torch_installation()
    if kind == "CPU":
        compiler()
        return
    if torch.cuda is None and wanted == "auto":
        raise CannotBuild(
            f"torch {torch.version} is a build without CUDA",
            f"with a CUDA build of PyTorch, {AGAIN} (RETRO_KERNELS_BUILD_CUDA=1 compiles them now, for other machines)",
        )
    path, cuda = nvcc()
    if torch.cuda is not None and major(torch.cuda) != major(cuda):
        raise CannotBuild(
            f"nvcc ({path}) is of CUDA {cuda} and torch of CUDA {torch.cuda}, another major version, so that torch "
            "cannot load what it compiles",
            nvcc_remedy(torch.cuda),
        )
    architectures()
    try:
        nvcc_command(path)
    except CannotBuild as error:  # nothing else is missing for a build with CUDA: do not go on without it
        raise SystemExit(
            f"retro_kernels: the CUDA kernels cannot be built with {path}: {error}. Remedy: {error.remedy}; or set "
            "RETRO_KERNELS_BUILD_CUDA=0 to install without them."
        ) from error


def jobs(memory: int) -> int:
    """Compilations at once, each of which takes that much memory. Available memory counts the page cache."""
    if os.environ.get("MAX_JOBS", "").isdigit():
        return max(1, int(os.environ["MAX_JOBS"]))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        available = re.search(r"MemAvailable:\s*(\d+) kB", Path("/proc/meminfo").read_text())
    except OSError:
        available = None
    return max(1, min(cores, int(available[1]) * 1024 // memory)) if available else cores


def run(kind: str, command: list[str]) -> None:
    """Runs a compiler; CompileError with its last lines, and with the first that names an error."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    if done.returncode == 0:
        return
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    shown = lines[-25:]
    first = next((line for line in lines if "error" in line.lower()), None)
    if first is not None and first not in shown:
        shown = [first, "...", *shown]
    killed = done.returncode < 0 or "illed" in done.stdout
    raise CompileError(
        f"compiling the {kind} kernels failed, so that nothing is installed. (RETRO_KERNELS_BUILD_{kind}=0 installs "
        f"without them.){' Memory may have run out: set MAX_JOBS=1.' * killed} `{shlex.join(command)}` ended with "
        f"status {done.returncode}:\n" + "\n".join(shown)
    )


def make_object(kind: str, command: list[str], source: Path, output: Path) -> None:
    """Compiles a file, unless this command has made the object from what the file and its headers are now."""
    command = [*command, "-MMD", "-MF", f"{output}.d", "-c", str(source), "-o", str(output)]
    stamp, text = Path(f"{output}.command"), shlex.join(command)
    try:
        headers = shlex.split(Path(f"{output}.d").read_text().partition(": ")[2].replace("\\\n", " "))
        made = output.stat().st_mtime
        if stamp.read_text() == text and all(os.stat(name).st_mtime <= made for name in (source, *headers)):
            return
    except (OSError, ValueError):
        pass
    stamp.unlink(missing_ok=True)
    say(f"compiling {source.relative_to(ROOT)}")
    began = time.time()
    run(kind, command)
    os.utime(output, (began, began))  # what is edited meanwhile is newer
    stamp.write_text(text)


def make_library(kind: str, target: Path, objects: list[tuple[list[str], Path, Path]], link: list[str]) -> None:
    """From (command, source, object) each and the command that links them."""
    with concurrent.futures.ThreadPoolExecutor(jobs(MEMORY_PER_JOB[kind])) as pool:
        futures = [pool.submit(make_object, kind, *each) for each in objects]
        try:
            for future in concurrent.futures.as_completed(futures):
                future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    # A process that has the old library mapped must keep its file: replace, do not overwrite.
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = target.with_suffix(".new")
    run(kind, [*link, "-o", str(fresh)])
    fresh.replace(target)
