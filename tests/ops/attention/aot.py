"""Compiles the Triton kernels ahead of time, without a GPU, under the launch settings that `configs.py` ships.

    python tests/ops/attention/aot.py                # all, into compiled_settings.json beside this file
    python tests/ops/attention/aot.py --list ID ...  # only these, as JSON on the standard output

Run after a change of kernels or settings. It must run without TRITON_INTERPRET. An identifier is target, kind of
launch, shape (`SHAPES`), dtype, width of the head, features (`configs.FEATURES`), and perhaps `long`: 64-bit offsets.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

import torch

from retro_kernels.ops.attention import common, configs
from retro_kernels.ops.attention import triton as backend

TABLE = Path(__file__).with_name("compiled_settings.json")
TARGETS = (80, 90, 100)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SHARED_LIMIT = {80: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes a program; sm_80's also serves sm_86 and sm_89
TRITON_TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.uint8: "u8",
                torch.int8: "i8", torch.int32: "i32", torch.int64: "i64"}  # fmt: skip

# Groupings at the paper's sizes: chunked cross-attention, the same packed, encoder self-attention, encoder
# cross-attention, a decoder's packed self-attention; `wide` ones are beyond one tile.
SHAPES = ("clock", "packed", "neighbour", "chunk", "causal")
SHIPPED = {
    "forward": ("clock", "neighbour", "chunk", "causal"),
    "backward": ("clock", "packed"),
    "backward_rows": ("neighbour",),
    "backward_shared": ("chunk",),
    "backward_sweeps": ("neighbour",),
    "backward_queries": ("clock", "neighbour", "chunk", "causal"),
    "backward_keys": ("clock", "neighbour", "chunk", "causal"),
    "backward_bias": ("clock", "neighbour"),
    "backward_relative": ("clock", "chunk", "causal"),
    "backward_null": ("clock",),
}
# The encoder's shapes take two launches only where the one that stands before them does not fit.
ONE_LAUNCH = {"neighbour": "backward_sweeps", "chunk": "backward_shared"}
ROWS = {"backward_rows": 128, "backward_sweeps": 256}
EXTRA = (
    *(f"sm_{sm} {kind} {shape} fp16 64 plain" for sm in (90,)
      for kind, shape in (("forward", "clock"), ("backward", "clock"), ("backward_shared", "chunk"))),
    *(f"sm_{sm} {kind} {shape} bf16 64 plain long" for sm in (90,)
      for kind, shape in (("forward", "clock"), ("backward", "clock"), ("backward_shared", "chunk"))),
)  # fmt: skip

# What is known to fall short: bytes of stack a thread that may spill, and what is not multiplied by WGMMA throughout on
# sm_90. All of it is relative positions, whose run of distances and its products stand beside the tile itself, so that
# tiles which do not spill are smaller than WGMMA's.
MAY_SPILL = {
    "sm_90 backward_relative clock bf16 128 relative": 40,
    "sm_90 backward_relative chunk bf16 128 relative": 48,
    "sm_90 backward_relative causal bf16 128 relative": 48,
}
NOT_ALL_WGMMA = (
    *(f"sm_90 {kind} {shape} bf16 128 relative" for kind in ("backward_queries", "backward_keys")
      for shape in ("clock", "neighbour", "chunk", "causal")),
    *(f"sm_90 backward_bias {shape} bf16 128 relative" for shape in ("clock", "neighbour")),
    *(f"sm_90 backward_relative {shape} bf16 {width} relative" for shape in ("clock", "chunk", "causal")
      for width in (64, 128)),
)  # fmt: skip


def settings_of(identifier: str) -> configs.LaunchSettings | None:
    target, kind, _, dtype, width, features = identifier.split()[:6]
    rows = ROWS.get(kind, 64)
    kind = "backward" if kind == "backward_rows" else kind
    return configs.rule(kind, int(target[3:]), DTYPES[dtype], int(width), features, rows)


def identifiers() -> list[str]:
    """What is compiled, in bf16: every kind in every shape that it is shipped for; plain for every target, for sm_90
    also with relative positions and with the other options. (fp32, heads of 256, dropout, options on sm_80 and sm_100
    are not.)"""
    compiled = {80: {64: ("plain",)}, 90: {64: ("plain", "options", "relative"), 128: ("plain", "relative")},
                100: {64: ("plain",)}}  # fmt: skip
    found = [
        f"sm_{sm} {kind} {shape} bf16 {width} {features}"
        for sm in TARGETS
        for kind, shapes in SHIPPED.items()
        for shape in shapes
        for width, wanted in compiled[sm].items()
        for features in wanted
        if applies(kind, shape, features)
        and (
            kind not in ("backward_queries", "backward_keys")
            or shape not in ONE_LAUNCH
            or settings_of(f"sm_{sm} {ONE_LAUNCH[shape]} {shape} bf16 {width} {features}") is None
        )
    ]
    return [identifier for identifier in (*found, *EXTRA) if settings_of(identifier) is not None]


def applies(kind: str, shape: str, features: str) -> bool:
    if kind in ("backward_bias", "backward_null") and features == "plain":
        return False
    if shape == "packed" and features != "plain":  # spans change nothing but two loads
        return False
    return kind != "backward_relative" or features.startswith("relative")


def launch_of(identifier: str, settings: configs.LaunchSettings | None = None) -> tuple[int, backend.Launch]:
    """The launch at the paper's sizes with a mask; with every option at once that a feature stands for."""
    target, kind, shape, dtype_name, width, features, *offsets = identifier.split()
    sm, d, dtype = int(target[3:]), int(width), DTYPES[dtype_name]

    def empty(*shape, dtype=dtype):
        return torch.empty(*shape, dtype=dtype, device="meta")

    b, l, k, h, m, r = 2, 4, 2, 16, 64, 128
    hk = 4 if kind in ("backward_queries", "backward_keys") else h
    causal, spans, first_visible = shape == "causal", None, None
    if shape in ("clock", "packed"):
        grouping, query, key, rows, stride = common.CLOCK, (b, 1, 1, l * m, h, d), (b, l, k, r, hk, d), m, m
        spans = empty(b, l, 2, dtype=torch.int32) if shape == "packed" else None
    elif shape == "chunk":
        grouping, query, key, rows, stride = common.CHUNK, (b, l, k, r, h, d), (b, l, 1, m, hk, d), r, r
    else:
        rows = stride = 2048 if causal else ROWS.get(kind, r)
        lk = (1, 1) if causal else (l, k)
        grouping, query, key = common.NEIGHBOUR, (b, *lk, rows, h, d), (b, *lk, rows, hk, d)
        first_visible = empty(b, rows, dtype=torch.int32) if causal else None
    slots = key[3]
    relative, rotary = features.startswith("relative"), features.startswith("options")
    table = (empty(rows, d // 2, dtype=torch.float32), empty(slots, d // 2, dtype=torch.float32)) if rotary else ()
    others = relative or rotary
    call = backend.Arguments(
        query=empty(*query), key=empty(*key), value=empty(*key), mask=empty(*key[:4], dtype=torch.bool),
        attention_bias=empty(h, rows, slots, dtype=torch.float32) if others and not causal else None,
        relative_key=empty(h, rows + slots - 1, d) if relative else None,
        content_bias=empty(h, d) if relative else None, relative_bias=empty(h, d) if relative else None,
        query_cos=table[0] if table else None, query_sin=table[0] if table else None,
        key_cos=table[1] if table else None, key_sin=table[1] if table else None,
        null_key=empty(h, d) if others else None, null_value=empty(h, d) if others else None,
        chunk_spans=spans, first_visible=first_visible,
        dropout_seed=empty(1, dtype=torch.int64) if features.endswith("dropout") else None,
        grouping=grouping, causal=causal, rotary_interleaved=False, scale=d**-0.5,
        dropout_p=0.1 if features.endswith("dropout") else 0.0, stride=stride,
        first_token=m - 1 if grouping == common.CLOCK else 0,
    )  # fmt: skip
    out, lse = common.allocate_forward(call.query, call.value, call.attention_bias)
    settings = settings or settings_of(identifier)
    name = "backward" if kind == "backward_rows" else kind
    parameters = ("backward_bias", "backward_relative", "backward_null")
    copies = tuple(
        None if x is None or kind not in parameters else empty(32, *x.shape, dtype=torch.float32)
        for x in (call.attention_bias, call.relative_key, call.content_bias, call.relative_bias, call.null_key,
                  call.null_value)
    )  # fmt: skip
    passes = backend.backward_kinds if kind in parameters else lambda _: (name,)
    with (
        configs.override(**{name: settings}),
        mock.patch.object(backend, "_needs_long_offsets", return_value=bool(offsets)),
        mock.patch.object(backend, "backward_kinds", passes),
    ):
        if kind == "forward":
            return sm, backend.plan_forward(out, lse, call, settings)
        launches = backend.plan_backward(
            empty(*query), out, lse, tuple(empty(*x.shape) for x in call[:3]), copies, call
        )
    return sm, next(launch for launch in launches if launch.kind == name)


def compile_launch(identifier: str, settings: configs.LaunchSettings | None = None) -> dict[str, object]:
    sm, launch = launch_of(identifier, settings)
    settings = launch.settings
    precision = "" if settings.precision == "ieee" else f", {settings.precision}"
    return {
        "settings": f"{settings.block_rows}x{settings.block_keys}, {settings.num_warps} warps, "
        f"{settings.num_stages} stages{precision}",
        **machine_code(sm, launch),
    }


def machine_code(sm: int, launch: backend.Launch) -> dict[str, object]:
    """Registers, stack and shared memory of a launch's machine code, and which instructions are in it."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

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
    compiled = triton.compile(
        ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes),
        target=GPUTarget("cuda", sm, 32),
        options=launch.options(),
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
        "registers": registers,
        "stack": stack,
        "local": local + len(re.findall(r"\b(?:LDL|STL)\b", sass)),
        "shared": compiled.metadata.shared,
        # Of global memory: on sm_100 the allocator of tensor memory keeps its bits by ATOMS in shared memory.
        "atomics": len(re.findall(r"\b(?:ATOM|ATOMG|RED|REDG)\b", sass)),
        "wgmma": len(re.findall(r"\bHGMMA\b", sass)),
        "mma": len(re.findall(r"\bHMMA\b", sass)),
    }


def faults(identifier: str, result: dict) -> list[str]:
    """What the gate forbids."""
    target, kind, _, dtype = identifier.split()[:4]
    sm = int(target[3:])
    found = machine_faults(sm, result, MAY_SPILL.get(identifier, 0))
    if (
        sm == 90
        and dtype != "fp32"
        and kind != "backward_null"
        and identifier not in NOT_ALL_WGMMA
        and (result["mma"] or not result["wgmma"])
    ):
        found.append(f"not every product is a WGMMA: {result['wgmma']} HGMMA and {result['mma']} HMMA instructions")
    return found


def machine_faults(sm: int, result: dict, may_spill: int = 0) -> list[str]:
    """What the gate forbids to every kernel: spills beyond `may_spill` bytes, shared memory that does not fit,
    atomics."""
    found = []
    if result["stack"] > may_spill or (result["local"] and not may_spill):
        found.append(f"spills {result['stack']} bytes of stack, {result['local']} local accesses")
    if result["shared"] > SHARED_LIMIT[sm]:
        found.append(f"needs {result['shared']} bytes of shared memory, the limit is {SHARED_LIMIT[sm]}")
    if result["atomics"]:
        found.append(f"has {result['atomics']} atomic instructions")
    return found


def kernels_hash() -> str:
    """Of everything that decides what is compiled: the kernels' source and the settings of every identifier."""
    digest = hashlib.sha256()
    for file in backend.SOURCES:
        digest.update(Path(file).read_bytes())
    for identifier in identifiers():
        digest.update(f"{identifier} {settings_of(identifier)}".encode())
    return digest.hexdigest()[:16]


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
        print(f"{identifier:56} {result['settings']:26} {result['registers']:4} registers {result['shared']:7} shared"
              f"  {'; '.join(bad[identifier])}")  # fmt: skip
    content = {"kernels": kernels_hash(), "triton": triton.__version__, "results": results}
    TABLE.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return 1 if any(bad.values()) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
