"""A kit for a GPU machine that has little time: what takes minutes to compile, built on a machine without a GPU.

    make gpu-kit        makes .gpu-kit/: kit.json, the CUDA extension, and what Triton compiles for the suite's calls

It must be made with the GPU machine's own versions (torch 2.11, Triton 3.6 and Python 3.12, in .venv-gpu): Triton's
cache asks for the same Triton, byte for byte, and the same Python minor. Its entries are made by making the suite's own
calls under a driver that compiles and launches nothing (fake_gpu.py); with them go the launchers, which Triton has the
C compiler build one by one where it runs. `benchmarks.gpu` calls `unpack` when it begins.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
KIT = ROOT / ".gpu-kit"  # all of it travels
WORK = ROOT / "build" / "gpu-kit"
CAPABILITY = 90
MOST_BYTES = 60 << 20  # the machine takes 64 MiB, the sources among them
EXTENSION, CACHE, KEY = "_cuda.abi3.so", "triton-cache.tar.xz", "kit.json"


def source_hash(*folders: str) -> str:
    """Of the package and its C++, or of one of them."""
    digest = hashlib.sha256()
    for folder in folders or ("retro_kernels", "csrc"):
        for file in sorted((ROOT / folder).rglob("*")):
            if file.suffix in (".py", ".cu", ".cuh", ".cpp", ".h"):
                digest.update(f"{file.relative_to(ROOT)}\0".encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def key() -> dict[str, Any]:
    """What a kit depends on, of this machine. `compiler`: of Triton's whole package, its library included."""
    import torch

    found = {
        "python": "{}.{}".format(*sys.version_info),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": None,
        "compiler": None,
        "kernels": source_hash("retro_kernels"),
        "csrc": source_hash("csrc"),
    }
    with contextlib.suppress(ImportError):
        import triton
        from triton.runtime.cache import triton_key

        found["triton"] = triton.__version__
        found["compiler"] = hashlib.sha256(triton_key().encode()).hexdigest()[:16]
    return found


# ---------------------------------------------------------------- where the GPU is


def unpack(kit: Path = KIT, folder: Path | None = None) -> list[str]:
    """Makes this process and its children use a kit -> what is to be said: what fits this machine and what does not."""
    file = kit / KEY
    if not file.exists():
        return [f"no kit in {kit.name}/: kernels are compiled here, which takes minutes (`make gpu-kit`)"]
    wanted, here, said = json.loads(file.read_text()), key(), []

    def differing(*names: str) -> str:
        other = [f"{name} {wanted.get(name)}, here {here[name]}" for name in names if wanted.get(name) != here[name]]
        return "; ".join(other)

    other = differing("csrc")
    if wanted.get("cuda", "0").split(".")[0] != str(here["cuda"]).split(".")[0]:
        other = differing("cuda") + ("; " if other else "") + other
    if not (kit / EXTENSION).exists():
        said.append("kit: it has no CUDA extension")
    elif other:
        said.append(f"kit: its CUDA extension is not used, it was built for {other}")
    else:
        os.environ["RETRO_KERNELS_CUDA_LIBRARY"] = str(kit / EXTENSION)
        said.append("kit: its CUDA extension is used")
    if not (kit / CACHE).exists():
        return [*said, "kit: it has no Triton kernels"]
    folder = folder or Path(tempfile.mkdtemp(prefix="retro-kernels-triton-"))
    with tarfile.open(kit / CACHE) as archive:
        archive.extractall(folder, filter="data")
    for group in folder.glob("*/__grp__*.json"):  # Triton looks for an entry's files where they lay when it was made
        names = json.loads(group.read_text())["child_paths"]
        group.write_text(json.dumps({"child_paths": {name: str(group.with_name(name)) for name in names}}))
    os.environ["TRITON_CACHE_DIR"] = str(folder)
    other = differing("python", "triton", "compiler")
    if other:
        return [*said, f"kit: its {wanted['entries']} Triton kernels will not be found, they were compiled by {other}"]
    said.append(f"kit: {wanted['entries']} Triton kernels are used")
    if wanted["kernels"] != here["kernels"]:
        said.append("kit: the package has changed since it was made; kernels that changed are compiled here")
    return said


def entries(folder: Path) -> int:
    """How many kernels a Triton cache holds."""
    return sum(1 for _ in folder.glob("*/*.cubin"))


# ---------------------------------------------------------------- where the kit is made


@contextlib.contextmanager
def compiling(capability: int = CAPABILITY) -> Iterator[Any]:
    """Within it backend="triton" takes CPU tensors, compiles for a GPU of that capability and builds the launchers. The
    entries of Triton's cache that are used, made before or not, get the present time."""
    from triton import knobs
    from triton.backends.nvidia import driver as nvidia
    from triton.runtime import build

    from .fake_gpu import fake_driver

    def kernel(*, metadata_group: dict[str, str], **_: Any) -> None:
        os.utime(Path(next(iter(metadata_group.values()))).parent)

    def load(name: str, path: str) -> mock.MagicMock:
        os.utime(Path(path).parent)
        return mock.MagicMock()  # there is no driver to load it for

    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(nvidia, "library_dirs", return_value=[nvidia.libdevice_dir, folder]),
        mock.patch.object(build, "_load_module_from_path", load),
        mock.patch.object(knobs.compilation, "listener", kernel),
        fake_driver(capability) as driver,
    ):
        # An empty library of the driver's name, which what is built here is linked with.
        library = ["-Wl,-soname,libcuda.so.1", "-o", f"{folder}/libcuda.so.1"]
        subprocess.run(["cc", "-shared", *library, "-x", "c", os.devnull], check=True)
        nvidia.CudaUtils()
        fake = driver.launcher_cls

        def launcher(source: Any, metadata: Any) -> Any:
            nvidia.CudaLauncher(source, metadata)
            return fake(source, metadata)

        driver.launcher_cls = launcher  # type: ignore[method-assign]
        yield driver


@dataclasses.dataclass(frozen=True)
class Call:
    """One call that the suite makes of Triton kernels; `run` makes it, on a CPU's tensors, with its gradients."""

    group: str
    operation: str
    name: str
    run: Callable[[], None]


def suite_calls(groups: tuple[str, ...] = ()) -> list[Call]:
    """The suite's calls, or those of the groups, what matters most first."""
    sys.path[:0] = [str(ROOT / "tests" / folder) for folder in ("gpu", "ops", "ops/attention")]
    import cases
    import gpu_problems as problems
    import sanitized
    import test_conformance as small
    import torch

    from retro_kernels import testing
    from retro_kernels.cli.verify import classes

    bf16, fp16, fp32 = (problems.DTYPES[name] for name in ("bf16", "fp16", "fp32"))
    named = {short: name for name, short in testing.SHORT_NAMES.items()}
    found = _timed("timed", ("bf16",))

    def add(group: str, operation: str, name: str, make: Callable[[], dict]) -> None:
        def run() -> None:
            arguments = make()
            grad_out = None
            if testing.has_gradients(arguments, "triton"):
                grad_out = torch.empty(testing.draw_grad_out(arguments).shape, dtype=arguments["query"].dtype)
            testing.run(arguments, "triton", grad_out)

        found.append(Call(group, operation, name, run))

    def add_case(group: str, case: testing.Case, dtype: torch.dtype) -> None:
        add(group, named[case.operation], f"{case}, {str(dtype)[6:]}", lambda: testing.make(case, dtype))

    for name, dtype in problems.DTYPES.items():
        for case in problems.CASES:
            add_case(name, case, dtype)
    for one in classes("triton", False):
        for odd in (True, False):
            make = functools.partial(testing.class_problem, one, odd)
            add("self-check", one.operation, f"self-check of {one}, {'odd' if odd else 'even'}", make)
    found += _timed("timed besides", ("fp16", "fp32"))
    add("beyond 2^31", "chunked_cross_attention", "more than 2^31 elements", _beyond_2_31)
    for case, dtype in sanitized.calls(problems.Target("triton", "triton")):
        add_case("sanitized", case, dtype)
    for case in cases.EVERY:
        for dtype in (fp32, bf16, fp16) if case.name in small.HALF else (fp32,):
            add_case("small", case, dtype)
    for case in small.PAPER:
        for dtype in (fp32, bf16):
            add_case("small", case, dtype)
    if groups:  # in their order
        return [call for group in groups for call in found if call.group == group]
    return found


def _timed(group: str, dtypes: tuple[str, ...]) -> list[Call]:
    """The attentions that the suite times, forward and backward, on memory that nothing was written to."""
    import torch

    from retro_kernels.bench.operations import ATTENTIONS, DTYPES, PLAIN
    from retro_kernels.bench.workloads import select

    def run(workload: Any, dtype: str) -> None:
        inputs = [torch.empty(shape, dtype=DTYPES[dtype]).requires_grad_() for shape in workload.shapes()]
        with torch.no_grad():
            workload.attend(*inputs, backend="triton")
        out = workload.attend(*inputs, backend="triton")
        torch.autograd.grad(out, inputs, torch.empty_like(out))

    found = []
    for workload in (one.on("cuda") for one in select(operations=list(ATTENTIONS))):
        if "k40" in workload.name:  # 10 GB each of keys and values
            continue
        for dtype in dtypes:
            if dtype == "bf16" or (workload.option == PLAIN and workload.name in ("retro-172m", "encoder-896")):
                name = f"{workload.name} {workload.option}, {dtype}"
                found.append(Call(group, workload.operation, name, functools.partial(run, workload, dtype)))
    return found


def _beyond_2_31() -> dict:
    import torch

    m, k, r, h, d = 64, 2, 128, 32, 128
    chunks = 2**31 // (k * r * h * d) + 2
    x = torch.empty(1, chunks, k, r, h, d, dtype=torch.bfloat16)
    query = torch.empty(1, m * chunks, h, d, dtype=torch.bfloat16)
    return {
        "query": query.requires_grad_(),
        "key": x.requires_grad_(),
        "value": x.detach().requires_grad_(),
        "chunk_size": m,
    }


def compile_calls(shard: int, shards: int, most: int | None, cache: Path) -> None:
    """Makes every shards-th of the first calls; one that fails is said."""
    import torch

    torch.set_num_threads(1)
    with compiling():
        calls = suite_calls()[:most]
        for number in range(shard, len(calls), shards):
            call = calls[number]
            began, before = time.monotonic(), entries(cache)
            try:
                call.run()
            except Exception as error:
                print(f"FAILED {call.name}: {type(error).__name__}: {error}"[:300], flush=True)
            took, new = time.monotonic() - began, entries(cache) - before
            print(f"{number + 1} of {len(calls)}: {call.name}: {took:.1f} s, {new} kernels", flush=True)


def pack(kit: Path, shards: int, most: int | None = None) -> int:
    """Compiles, packs, writes the key -> how many calls failed. RuntimeError for a kit that is too large to travel."""
    cache = WORK / "cache"
    for folder in (kit, cache):
        folder.mkdir(parents=True, exist_ok=True)
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(cache), "TRITON_STORE_BINARY_ONLY": "1", "PYTHONPATH": str(ROOT)}
    began, failed = time.time(), 0
    command = [sys.executable, "-m", "benchmarks.gpu_kit", "--shards", str(shards)]
    command += [] if most is None else ["--calls", str(most)]
    logs = [(WORK / f"shard-{number}.log").open("w+") for number in range(shards)]
    running = [
        subprocess.Popen(
            [*command, "--shard", str(number)], env=environment, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT
        )
        for number, log in enumerate(logs)
    ]
    for process, log in zip(running, logs):
        code = process.wait()
        log.seek(0)
        lines = [line for line in log.read().splitlines() if line.startswith("FAILED") or code]
        print("\n".join(lines[-30:]), flush=True)
        failed += len(lines)
    used = [folder for folder in sorted(cache.iterdir()) if folder.is_dir() and folder.stat().st_mtime >= began - 1]
    with tarfile.open(kit / CACHE, "w:xz", preset=6) as archive:
        for folder in used:
            archive.add(folder, folder.name)
    kernels = sum(any(folder.glob("*.cubin")) for folder in used)
    made = {**key(), "capability": CAPABILITY, "entries": kernels, "seconds": round(time.time() - began)}
    (kit / KEY).write_text(json.dumps(made, indent=1) + "\n")
    size = sum((kit / name).stat().st_size for name in (EXTENSION, CACHE, KEY) if (kit / name).exists())
    print(f"{kit}: {made['entries']} Triton kernels, {size / 2**20:.1f} MiB, {made['seconds']} s")
    if size > MOST_BYTES:
        raise RuntimeError(f"the kit has {size / 2**20:.1f} MiB, expected at most {MOST_BYTES / 2**20:.0f}")
    return failed


def main() -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.gpu_kit", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--kit", type=Path, default=KIT)
    parser.add_argument("--shards", type=int, default=2, help="processes side by side")
    parser.add_argument("--calls", type=int, help="only so many of the suite's calls, the most important ones")
    parser.add_argument("--shard", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.shard is not None:
        compile_calls(options.shard, options.shards, options.calls, WORK / "cache")
        return 0
    return 1 if pack(options.kit.resolve(), options.shards, options.calls) else 0


if __name__ == "__main__":
    sys.exit(main())
