"""Compiles the absorbed Triton kernels ahead of time, without a GPU, under the launch settings that `configs.py` ships.

    python tests/ops/projected_chunked_cross_attention/aot_absorbed.py              # all, into absorbed_settings.json
    python tests/ops/projected_chunked_cross_attention/aot_absorbed.py "sm_90 forward bf16 128 plain" ...   # only these

It must run without TRITON_INTERPRET.
"""

from __future__ import annotations

import concurrent.futures
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from retro_kernels.ops.projected_chunked_cross_attention import configs
from retro_kernels.ops.projected_chunked_cross_attention import triton as backend

TABLE = Path(__file__).with_name("absorbed_settings.json")
TARGETS = (90, 80, 100)
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
SHARED_LIMIT = {80: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
TRITON_TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.uint8: "u8", torch.int64: "i64"}


def identifiers() -> list[str]:
    return [
        f"sm_{sm} {kind} {dtype} 128 {options}"
        for sm in TARGETS
        for dtype in DTYPES
        for kind in configs.KINDS
        for options in ("plain", "options")
    ]


def launch_of(identifier: str):
    """The launch at the paper's chunk, plain (a mask at most) or with every option at once."""
    target, kind, dtype_name, width, options = identifier.split()
    sm, d, dtype, everything = int(target[3:]), int(width), DTYPES[dtype_name], options == "options"

    def empty(*shape, dtype=dtype):
        return torch.empty(*shape, dtype=dtype, device="meta")

    b, n, m, k, r, h, e = 2, 256, 64, 2, 128, 16, 896

    def maybe(*shape, dtype=dtype):
        return empty(*shape, dtype=dtype) if everything else None

    call = backend.Arguments(
        empty(b, n, h, d), empty(b, n // m, k, r, e), empty(h, d, e), empty(h, d, e), maybe(h, d), maybe(h, d),
        empty(b, n // m, k, r, dtype=torch.bool), maybe(h, m, r, dtype=torch.float32), maybe(h, m + r - 1, d),
        maybe(h, d), maybe(h, d), maybe(h, d), maybe(h, d), None, maybe(1, dtype=torch.int64),
        d**-0.5, 0.1 if everything else 0.0, m, m - 1,
    )  # fmt: skip
    out, lse = empty(b, n, h, d), empty(b, n, h, dtype=torch.float32)
    settings = configs.overrides.get(kind) or configs.rule(kind, sm, dtype, m, k * r, e, everything)
    parameters = [call[place] for place in backend.common.DIFFERENTIABLE[2:]]
    copies = tuple(None if x is None else empty(4, *x.shape, dtype=torch.float32) for x in parameters)
    with configs.override(**{kind: settings}):
        if kind == "forward":
            return sm, backend.plan_forward(out, lse, call)
        if kind == "backward_heads":
            return sm, backend.plan_heads(out, out, lse, call.query, copies, call)
        return sm, backend.plan_states(out, out, lse, call.encoded, call)


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
        "settings": f"{settings.block_rows}x{settings.block_slots}x{settings.block_encoder}, {settings.heads} heads, "
        f"{settings.num_warps} warps, {settings.num_stages} stages",
        "registers": registers,
        "stack": stack,
        "local": local + len(re.findall(r"\b(?:LDL|STL)\b", sass)),
        "shared": compiled.metadata.shared,
        "atomics": len(re.findall(r"\b(?:ATOM|ATOMG|RED|REDG)\b", sass)),
        "wgmma": len(re.findall(r"\bHGMMA\b", sass)),
    }


def faults(identifier: str, result: dict) -> list[str]:
    """What the gate forbids."""
    target, _, dtype, _, _ = identifier.split()
    sm = int(target[3:])
    found = []
    if result["stack"] or result["local"]:
        found.append(f"spills {result['stack']} bytes of stack, {result['local']} local accesses")
    if result["shared"] > SHARED_LIMIT[sm]:
        found.append(f"needs {result['shared']} bytes of shared memory, the limit is {SHARED_LIMIT[sm]}")
    if result["atomics"]:
        found.append(f"has {result['atomics']} atomic instructions")
    if sm == 90 and dtype == "bf16" and not result["wgmma"]:
        found.append("does not use WGMMA")
    return found


def main(arguments: list[str]) -> int:
    wanted = arguments or identifiers()
    results = {}
    with concurrent.futures.ProcessPoolExecutor(2) as pool:
        for identifier, made in zip(wanted, [pool.submit(compile_launch, x) for x in wanted], strict=True):
            if made.exception() is not None:
                print(identifier, "does not compile:", str(made.exception())[-300:], flush=True)
                continue
            result = made.result()
            results[identifier] = result
            print(f"{identifier:42} {result['settings']:38} {result['registers']:4} registers {result['shared']:7} shared"
                  f"  wgmma {result['wgmma']}  {'; '.join(faults(identifier, result))}", flush=True)  # fmt: skip
    if not arguments:
        import triton

        content = {"triton": triton.__version__, "results": results}
        TABLE.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return 1 if any(faults(identifier, result) for identifier, result in results.items()) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
