"""What every CUDA kernel costs on every architecture that it is compiled for: registers, spills, stack and shared
memory, in cuda_resources.json beside this file, and what a reader of its machine code would look for.

    python tests/ops/attention/cuda_resources.py          compiles what has changed since, writes the table (minutes)

Registers, spills and stack are what `ptxas -v` says; shared memory is the dynamic memory of a launch at the paper's
sizes (m = 64, k = 2, r = 128), which cuda_shared.cpp computes from the kernels' own layout, and the static memory that
ptxas reports. The PTX of 8.0 is also compiled for the newer GPUs that run it. Of the machine code (cuobjdump, which
triton's wheel has too) the table has:

    loop_fences     fences of all memory (MEMBAR of the GPU) inside loops
    loop_divisions  divisions of integers by numbers known at run time inside loops
    dummy_products  HGMMA.64x8x16, which stands for an empty group of wgmma
    setmaxnreg      moves of registers from producers to consumers
    waits           griddepcontrol.wait: what a kernel that may overlap its predecessor must do

The table is tied to the sources by a hash for each .cu file and all that it includes.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[3] / "csrc"))  # as pytest's settings have it
import emulator

TABLE = Path(__file__).with_suffix(".json")
FLAGS = ["-std=c++17", "-O3", "-DUSE_CUDA"]  # as setup.py compiles
# A block's, in bytes; sm_86, sm_89 and sm_120 run sm_80's code.
LARGEST_SHARED = {"sm_80": 99 << 10, "sm_90a": 227 << 10, "sm_100": 99 << 10, "sm_120": 99 << 10}
VIRTUAL = {"compute_80": ["sm_80", "sm_100", "sm_120"], "compute_90a": ["sm_90a"]}
INCLUDE = re.compile(r'^#include "(.+)"', re.MULTILINE)
STRING_OR_COMMENT = re.compile(r'("(?:\\.|[^"\\\n])*")|//.*')
INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/ +(.*?;)", re.MULTILINE)
BRANCH = re.compile(r"\bBRA(?:\.\w+)* .*?0x([0-9a-f]+)")
FENCE = re.compile(r"\bMEMBAR\S*\.(GPU|SYS)\b")
DIVISION = re.compile(r"\bI2F\S*\.RP\b")  # how a division of integers by a number known at run time begins


def virtual_architectures(source: str) -> list[str]:
    """Those that setup.py compiles a .cu file for by default."""
    return ["compute_90a"] if source.startswith("sm90/") else ["compute_80", "compute_90a"]


def architectures(source: str) -> list[str]:
    """Those that run what it compiles."""
    return [real for virtual in virtual_architectures(source) for real in VIRTUAL[virtual]]


def disassembler() -> str | None:
    """cuobjdump, of CUDA or of triton's wheel."""
    if found := shutil.which("cuobjdump"):
        return found
    spec = importlib.util.find_spec("triton")
    for root in (spec.submodule_search_locations or []) if spec else []:
        if (found := Path(root) / "backends" / "nvidia" / "bin" / "cuobjdump").exists():
            return str(found)
    return None


def sources() -> list[str]:
    return sorted(str(x.relative_to(emulator.SOURCES)) for x in emulator.SOURCES.rglob("*.cu"))


def source_hash(source: str) -> str:
    """Of a .cu file and everything of ours that it includes, but for the emulator; comments and blank lines apart."""
    digest, found, left = hashlib.sha256(), set(), [emulator.SOURCES / source]
    while left:
        file = left.pop().resolve()
        if file in found or file.parent.name == "emulator":
            continue
        found.add(file)
        left += [file.parent / name for name in INCLUDE.findall(file.read_text())]
    for file in sorted(found):
        text = STRING_OR_COMMENT.sub(r"\1", file.read_text())
        digest.update("\n".join(line.rstrip() for line in text.splitlines() if line.strip()).encode())
    return digest.hexdigest()[:16]


def command(*arguments: str) -> subprocess.CompletedProcess:
    done = subprocess.run(arguments, capture_output=True, text=True)
    if done.returncode or "wgmma.mma_async instructions are serialized" in done.stderr:
        raise RuntimeError(done.stderr)
    return done


def demangle(text: str) -> str:
    return subprocess.run(["c++filt"], input=text, capture_output=True, text=True, check=True).stdout


def compile_source(source: str, virtual: str, reals: list[str]) -> dict[str, dict[str, dict[str, int]]]:
    """Architecture -> kernel -> its registers, stack, spills and static shared memory, and what its code has."""
    table = {}
    with tempfile.TemporaryDirectory() as folder:
        ptx = f"{folder}/kernels.ptx"
        command("nvcc", *FLAGS, f"-arch={virtual}", "-ptx", "-o", ptx, str(emulator.SOURCES / source))
        for real in reals:
            report = command("ptxas", "-v", f"-arch={real}", "-o", f"{ptx}.cubin", ptx).stderr
            table[real] = parse(demangle(report))
            code = command(disassembler() or "cuobjdump", "-sass", f"{ptx}.cubin").stdout
            for name, found in inspect(demangle(code)).items():
                table[real][name] |= found
    return table


def kernel_name(demangled: str) -> str:
    name = re.sub(r"\bretro_kernels::|\bsm\d+::", "", demangled)
    return re.sub(r"^void |\(Problem\)$|\([A-Za-z_:]*\)$|\((bool|int)\)", "", name)


def inspect(code: str) -> dict[str, dict[str, int]]:
    """What `cuobjdump -sass` shows, demangled."""
    kernels: dict[str, dict[str, int]] = {}
    for part in code.split("Function : ")[1:]:
        lines = {int(address, 16): line for address, line in INSTRUCTION.findall(part)}
        loops = in_loops(lines)
        kernels[kernel_name(part.split("\n", 1)[0])] = {
            "loop_fences": sum(bool(FENCE.search(lines[address])) for address in loops),
            "loop_divisions": sum(bool(DIVISION.search(lines[address])) for address in loops),
            "dummy_products": sum("HGMMA.64x8x16" in line for line in lines.values()),
            "setmaxnreg": sum("USETMAXREG" in line for line in lines.values()),
            "waits": sum("ACQBULK" in line for line in lines.values()),
        }
    return kernels


def in_loops(lines: dict[int, str]) -> set[int]:
    """The instructions from which control can come back to them, but for jumps to themselves (the end of a kernel).
    Calls return; jumps through a register are none of ours."""
    following: dict[int, list[int]] = {}
    addresses = list(lines)
    for address, after in zip(addresses, [*addresses[1:], None]):
        line = lines[address]
        branch = BRANCH.search(line)
        ends = not line.startswith("@") and (branch or re.match(r"(EXIT|RET|BRX)\b", line))
        following[address] = [] if ends or after is None else [after]
        if branch and int(branch[1], 16) != address:
            following[address].append(int(branch[1], 16))
    preceding: dict[int, list[int]] = {address: [] for address in addresses}
    for address, targets in following.items():
        for target in targets:
            preceding.setdefault(target, []).append(address)

    # Kosaraju: strongly connected components of more than one instruction
    order: list[int] = []
    seen: set[int] = set()
    for start in addresses:
        walk = [(start, iter(following[start]))] if start not in seen else []
        seen.add(start)
        while walk:
            address, targets = walk[-1]
            if (target := next((x for x in targets if x not in seen), None)) is None:
                order.append(address)
                walk.pop()
            else:
                seen.add(target)
                walk.append((target, iter(following.get(target, []))))
    loops: set[int] = set()
    seen.clear()
    for start in reversed(order):
        component, walk_back = [], [start] if start not in seen else []
        seen.add(start)
        while walk_back:
            address = walk_back.pop()
            component.append(address)
            fresh = [x for x in preceding[address] if x not in seen]
            seen.update(fresh)
            walk_back += fresh
        if len(component) > 1:
            loops.update(component)
    return loops


def parse(report: str) -> dict[str, dict[str, int]]:
    """What `ptxas -v` reports, demangled."""
    kernels: dict[str, dict[str, int]] = {}
    name = ""
    for line in report.splitlines():
        if found := re.search(r"Compiling entry function '(.+)' for", line):
            name = kernel_name(found[1])
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


def measure(source: str, virtual: str, reals: list[str], shared: dict[str, int]) -> dict[str, dict]:
    table = compile_source(source, virtual, reals)
    for kernels in table.values():
        for name, costs in kernels.items():
            costs["shared"] += shared[without_type(name)]
    return table


def main() -> None:
    if shutil.which("nvcc") is None or shutil.which("ptxas") is None:
        sys.exit("there is no nvcc, or no ptxas, on the path")
    if disassembler() is None:
        sys.exit("there is no cuobjdump, neither on the path nor in triton's wheel")
    shared, table = dynamic_shared(), {}
    known = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    for source in sources():
        table[source] = {"hash": source_hash(source)}
        if known.get(source, {}).get("hash") == table[source]["hash"]:
            table[source] = known[source]
            continue
        for virtual in virtual_architectures(source):
            print(source, virtual, file=sys.stderr, flush=True)
            table[source] |= measure(source, virtual, VIRTUAL[virtual], shared)
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
