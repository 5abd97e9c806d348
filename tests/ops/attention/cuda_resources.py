"""What every CUDA kernel costs on every architecture that it is compiled for: registers, spills, stack and shared
memory, in cuda_resources.json beside this file.

    python tests/ops/attention/cuda_resources.py          compiles what has changed since, writes the table (minutes)

Registers, spills and stack are what `ptxas -v` says; shared memory is the dynamic memory of a launch at the paper's
sizes (m = 64, k = 2, r = 128), which cuda_shared.cpp computes from the kernels' own layout, and the static memory that
ptxas reports. The table is tied to the sources by a hash for each .cu file and all that it includes.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import emulator

TABLE = Path(__file__).with_suffix(".json")
FLAGS = ["-std=c++17", "-O3", "-DUSE_CUDA"]  # as setup.py compiles
LARGEST_SHARED = {"sm_80": 99 << 10, "sm_90a": 227 << 10}  # a block's, in bytes; sm_86 and sm_89 run sm_80's code
INCLUDE = re.compile(r'^#include "(.+)"', re.MULTILINE)


def architectures(source: str) -> list[str]:
    """Those that setup.py compiles a .cu file for by default."""
    return ["sm_90a"] if source.startswith("sm90/") else ["sm_80", "sm_90a"]


def sources() -> list[str]:
    return sorted(str(x.relative_to(emulator.SOURCES)) for x in emulator.SOURCES.rglob("*.cu"))


def source_hash(source: str) -> str:
    """Of a .cu file and everything of ours that it includes, but for the emulator."""
    digest, found, left = hashlib.sha256(), set(), [emulator.SOURCES / source]
    while left:
        file = left.pop().resolve()
        if file in found or file.parent.name == "emulator":
            continue
        found.add(file)
        left += [file.parent / name for name in INCLUDE.findall(file.read_text())]
    for file in sorted(found):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def compile_source(source: str, architecture: str) -> dict[str, dict[str, int]]:
    """Kernel -> its registers, stack, spills and static shared memory."""
    number = architecture.removeprefix("sm_")
    with tempfile.TemporaryDirectory() as folder:
        command = ["nvcc", *FLAGS, f"-gencode=arch=compute_{number},code=sm_{number}", "-Xptxas", "-v", "-cubin", "-o",
                   f"{folder}/kernels.cubin", str(emulator.SOURCES / source)]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode or "wgmma.mma_async instructions are serialized" in done.stderr:
        raise RuntimeError(done.stderr)
    return parse(subprocess.run(["c++filt"], input=done.stderr, capture_output=True, text=True, check=True).stdout)


def parse(report: str) -> dict[str, dict[str, int]]:
    """What `ptxas -v` reports, demangled."""
    kernels: dict[str, dict[str, int]] = {}
    name = ""
    for line in report.splitlines():
        if found := re.search(r"Compiling entry function '(.+)' for", line):
            name = re.sub(r"\bretro_kernels::|\bsm\d+::", "", found[1])
            name = re.sub(r"^void |\(Problem\)$|\([A-Za-z_:]*\)$|\((bool|int)\)", "", name)
        elif found := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            stack, stores, loads = map(int, found.groups())
            kernels[name] = {"stack": stack, "spills": stores + loads}
        elif found := re.search(r"Used (\d+) registers", line):
            static = re.search(r"(\d+) bytes smem", line)
            kernels[name] = {"registers": int(found[1]), "shared": int(static[1]) if static else 0, **kernels[name]}
    return dict(sorted(kernels.items()))


def dynamic_shared() -> dict[str, int]:
    """Kernel (without its element type) -> bytes of dynamic shared memory at the paper's sizes."""
    with tempfile.TemporaryDirectory() as folder:
        program = f"{folder}/shared"
        source = Path(__file__).with_name("cuda_shared.cpp")
        flags = [x for x in emulator.FLAGS if "visibility" not in x]
        command = [*(emulator.compiler() or ["c++"]), *flags, f"-I{emulator.SOURCES}", str(source), "-o", program]
        subprocess.run(command, check=True)
        text = subprocess.run([program], capture_output=True, text=True, check=True).stdout
    return {name: int(size) for name, size in (line.split("\t") for line in text.splitlines())}


def without_type(kernel: str) -> str:
    return re.sub(r"<(BFloat16|Float16), ", "<", kernel)


def measure(source: str, architecture: str, shared: dict[str, int]) -> dict[str, dict[str, int]]:
    kernels = compile_source(source, architecture)
    for name, costs in kernels.items():
        costs["shared"] += shared[without_type(name)]
    return kernels


def main() -> None:
    if shutil.which("nvcc") is None:
        sys.exit("there is no nvcc on the path")
    shared, table = dynamic_shared(), {}
    known = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    for source in sources():
        table[source] = {"hash": source_hash(source)}
        if known.get(source, {}).get("hash") == table[source]["hash"]:
            table[source] = known[source]
            continue
        for architecture in architectures(source):
            print(source, architecture, file=sys.stderr, flush=True)
            table[source][architecture] = measure(source, architecture, shared)
    lines = []
    for source, entry in table.items():
        inner = [f'  "hash": "{entry.pop("hash")}"']
        for architecture, kernels in entry.items():
            rows = ",\n".join(f"   {json.dumps(name)}: {json.dumps(costs)}" for name, costs in kernels.items())
            inner.append(f'  "{architecture}": {{\n{rows}\n  }}')
        lines.append(f" {json.dumps(source)}: {{\n" + ",\n".join(inner) + "\n }")
    TABLE.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    json.loads(TABLE.read_text())


if __name__ == "__main__":
    main()
