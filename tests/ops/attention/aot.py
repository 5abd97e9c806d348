"""Compiles the Triton kernels ahead of time, without a GPU, under the launch settings that `configs.py` ships.

    python tests/ops/chunked_cross_attention/aot.py                # all, into compiled_settings.json beside this file
    python tests/ops/chunked_cross_attention/aot.py --list ID ...  # only these, as JSON on the standard output

Run after a change of kernels or settings. It must run without TRITON_INTERPRET.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import inspect
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from retro_kernels.ops.chunked_cross_attention import configs
from retro_kernels.ops.chunked_cross_attention import triton as backend

TABLE = Path(__file__).with_name("compiled_settings.json")
TARGETS = (80, 90, 100)
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
SHARED_LIMIT = {80: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes a program; sm_80's also serves sm_86 and sm_89
TRITON_TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.uint8: "u8"}


# Heads above 128 whose operands fill the registers whatever the tile: what they may spill, in bytes of stack a thread.
# Their backward is right but slower than it could be; splitting the head over programs would cure it.
MAY_SPILL = {
    "sm_80 backward_queries bf16 256 options": 16,
    "sm_100 backward_bias bf16 256 options": 64,
    **{f"sm_{sm} backward_keys bf16 256 options": 96 for sm in TARGETS},
    **{f"sm_{sm} backward_queries fp32 256 {options}": 208 for sm in TARGETS for options in ("plain", "options")},
}


def identifiers() -> list[str]:
    """One for every setting shipped: target, kind, dtype, width of the widest tile, options."""
    found = []
    for sm in TARGETS:
        for kind in configs.KINDS:
            for dtype in DTYPES:
                for width in (64, 128, 256):
                    for options in (False, True):
                        needed = kind in ("backward_bias", "backward_null")
                        if configs.rule(kind, sm, DTYPES[dtype], width, options, 64) and (options or not needed):
                            found.append(f"sm_{sm} {kind} {dtype} {width} {'options' if options else 'plain'}")
    return found


def launch_of(identifier: str) -> tuple[int, backend.Launch]:
    """The launch at the paper's chunk, plain (a mask at most) or with every option at once."""
    target, kind, dtype_name, width, options = identifier.split()
    sm, d, dtype, everything = int(target[3:]), int(width), DTYPES[dtype_name], options == "options"

    def empty(*shape, dtype=dtype):
        return torch.empty(*shape, dtype=dtype, device="meta")

    b, n, m, k, r, h = 2, 256, 64, 2, 128, 16
    hk = 4 if kind in ("backward_queries", "backward_keys") else h
    table = empty(m, d // 2, dtype=torch.float32), empty(r, d // 2, dtype=torch.float32)
    inputs = (
        empty(b, n, h, d), empty(b, n // m, k, r, hk, d), empty(b, n // m, k, r, hk, d),
        empty(b, n // m, k, r, dtype=torch.bool),
        empty(h, m, r, dtype=torch.float32) if everything else None,
        *((table[0], table[0], table[1], table[1]) if everything else (None,) * 4),
        *((empty(h, d), empty(h, d)) if everything else (None, None)),
        False, d**-0.5, m, m - 1,
    )  # fmt: skip
    out, lse = empty(b, n, h, d), empty(b, n, h, dtype=torch.float32)
    settings = configs.rule(kind, sm, dtype, d, everything, m)
    if kind == "forward":
        return sm, backend.plan_forward(out, lse, inputs, settings)
    copies = tuple(
        None if x is None else empty(32, *x.shape, dtype=torch.float32) for x in (inputs[4], inputs[9], inputs[10])
    )
    gradients = tuple(torch.empty_like(x) for x in inputs[:3])
    with configs.override(**{kind: settings}):
        launches = backend.plan_backward(torch.empty_like(out), out, lse, gradients, copies, inputs)
    return sm, next(launch for launch in launches if launch.kind == kind)


def compile_launch(identifier: str) -> dict[str, object]:
    """Registers, stack and shared memory of the machine code, and which instructions are in it."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    sm, launch = launch_of(identifier)
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(launch.kernel.params):
        name, x = parameter.name, launch.arguments[parameter.name]
        specialised = not parameter.do_not_specialize
        if parameter.is_constexpr or x is None or (specialised and isinstance(x, int) and x == 1):
            signature[name], constants[(index,)] = "constexpr", x
            continue
        if isinstance(x, torch.Tensor):
            signature[name] = "*" + TRITON_TYPES[x.dtype]
        else:
            signature[name] = "fp32" if isinstance(x, float) else "i32"
        if isinstance(x, torch.Tensor) or (specialised and isinstance(x, int) and x % 16 == 0):
            attributes[(index,)] = [["tt.divisibility", 16]]
    settings = launch.settings
    compiled = triton.compile(
        ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes),
        target=GPUTarget("cuda", sm, 32),
        options={"num_warps": settings.num_warps, "num_stages": settings.num_stages},
    )
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, sass = (
            subprocess.run([cuobjdump, option, file.name], capture_output=True, text=True, check=True).stdout
            for option in ("-res-usage", "-sass")
        )
    registers, stack, local = (int(re.search(rf"{word}:(\d+)", usage)[1]) for word in ("REG", "STACK", "LOCAL"))
    return {
        "settings": f"{settings.block_rows}x{settings.block_keys}, {settings.num_warps} warps, "
        f"{settings.num_stages} stages" + ("" if settings.precision == "ieee" else f", {settings.precision}"),
        "registers": registers,
        "stack": stack,
        "local": local + len(re.findall(r"\b(?:LDL|STL)\b", sass)),
        "shared": compiled.metadata.shared,
        # Of global memory: on sm_100 the allocator of tensor memory keeps its bits by ATOMS in shared memory.
        "atomics": len(re.findall(r"\b(?:ATOM|ATOMG|RED|REDG)\b", sass)),
        "wgmma": len(re.findall(r"\bHGMMA\b", sass)),
    }


def faults(identifier: str, result: dict) -> list[str]:
    """What the gate forbids."""
    target, kind, dtype, _, _ = identifier.split()
    sm = int(target[3:])
    found = []
    if result["stack"] > MAY_SPILL.get(identifier, 0) or (result["local"] and identifier not in MAY_SPILL):
        found.append(f"spills {result['stack']} bytes of stack, {result['local']} local accesses")
    if result["shared"] > SHARED_LIMIT[sm]:
        found.append(f"needs {result['shared']} bytes of shared memory, the limit is {SHARED_LIMIT[sm]}")
    if result["atomics"]:
        found.append(f"has {result['atomics']} atomic instructions")
    if sm == 90 and kind in ("forward", "backward") and dtype == "bf16" and not result["wgmma"]:
        found.append("does not use WGMMA")
    return found


def kernels_hash() -> str:
    """Of everything that decides what is compiled: the kernels' source and the settings of every identifier."""
    functions = [x for x in vars(backend).values() if type(x).__name__ in ("JITFunction", "InterpretedFunction")]
    text = "".join(inspect.getsource(x.fn) for x in functions if x.fn.__module__ == backend.__name__)
    for identifier in identifiers():
        target, kind, dtype, width, options = identifier.split()
        text += str(configs.rule(kind, int(target[3:]), DTYPES[dtype], int(width), options == "options", 64))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def compile_all(wanted: list[str], workers: int = 2) -> dict[str, dict]:
    with concurrent.futures.ProcessPoolExecutor(workers) as pool:
        return dict(zip(wanted, pool.map(compile_launch, wanted), strict=True))


def main(arguments: list[str]) -> int:
    if os.environ.get("TRITON_INTERPRET") == "1":
        print("aot.py must run without TRITON_INTERPRET", file=sys.stderr)
        return 2
    if arguments[:1] == ["--list"]:
        print(json.dumps(compile_all(arguments[1:])))
        return 0
    import triton

    results = compile_all(identifiers())
    bad = {identifier: faults(identifier, result) for identifier, result in results.items()}
    for identifier, result in results.items():
        print(f"{identifier:42} {result['settings']:32} {result['registers']:4} registers {result['shared']:7} shared"
              f"  {'; '.join(bad[identifier])}")  # fmt: skip
    content = {"kernels": kernels_hash(), "triton": triton.__version__, "results": results}
    TABLE.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return 1 if any(bad.values()) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
