"""Compiles the Triton kernels ahead of time, without a GPU, under the launch settings that `configs.py` ships.

    python tests/ops/attention/aot.py [--seconds S] [PATTERN ...]  # what the table lacks, into compiled_settings.json
    python tests/ops/attention/aot.py --list ID ...                # only these, as JSON on the standard output

The table has a part for each version of Triton; an entry is kept while the kernels' source and its setting are what
they were, so that a run that was cut short goes on. It must run without TRITON_INTERPRET, and once with each version
(`VERSIONS`): another version's environment needs this one's packages on its path. An identifier is target, kind of
launch, shape (`SHAPES`), dtype, width of the head, features (`configs.FEATURES`), and perhaps `long`: 64-bit offsets.
"""

from __future__ import annotations

import fcntl
import hashlib
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import torch

from retro_kernels.ops.attention import common, configs
from retro_kernels.ops.attention import triton as backend

TABLE = Path(__file__).with_name("compiled_settings.json")
TARGETS = (80, 90, 100)
VERSIONS = ("3.6.0", "3.9.0")  # of torch 2.11, the oldest supported, and the newest
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# Bytes a program. sm_80's own is 163 KB, but its settings serve the others.
SHARED_LIMIT = {**dict.fromkeys((80, 86, 89, 120), 99 * 1024), 90: 227 * 1024, 100: 227 * 1024}
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

# What is known to fall short: bytes of stack a thread that may spill.
MAY_SPILL = {
    "sm_90 backward_relative clock bf16 128 relative": 40,
    "sm_90 backward_relative chunk bf16 128 relative": 48,
    "sm_90 backward_relative causal bf16 128 relative": 48,
}


def all_by_wgmma(kind: str, width: str, features: str) -> bool:
    """Whether sm_90 multiplies by WGMMA throughout. Relative positions, whose run of distances and its products stand
    beside the tile, and rotary tables at 128 wide leave room for tiles below a WGMMA's 64 rows only, going back."""
    if kind == "backward_null":
        return False
    return kind == "forward" or features == "plain" or (width == "64" and features == "options")


def settings_of(identifier: str, version: str | None = None) -> configs.LaunchSettings | None:
    """Of a version of Triton, by default the one installed."""
    target, kind, _, dtype, width, features = identifier.split()[:6]
    rows = ROWS.get(kind, 64)
    kind = "backward" if kind == "backward_rows" else kind
    numbers = None if version is None else tuple(map(int, version.split(".")[:2]))
    return configs.rule(kind, int(target[3:]), DTYPES[dtype], int(width), features, rows, numbers)


# What is compiled, in the order of importance: targets, shapes, dtypes, widths, features.
CLOCKS = ("clock",)
PART = (
    ((90,), CLOCKS, ("bf16",), (64, 128), ("plain", "options", "relative")),
    ((80, 100), CLOCKS, ("bf16",), (64, 128), ("plain", "options", "relative")),
    ((90,), SHAPES, ("bf16",), (64, 128), ("plain", "relative")),
    ((90,), CLOCKS, ("bf16",), (64, 128), ("options_dropout", "relative_dropout")),
    ((80, 100), SHAPES, ("bf16",), (64,), ("plain",)),
    ((86, 89, 120), CLOCKS, ("bf16",), (64, 128), ("plain", "relative")),
    ((80, 90), CLOCKS, ("fp32",), (64, 128), ("plain",)),
    ((80, 90, 100), CLOCKS, ("bf16",), (256,), ("plain",)),
    ((90,), CLOCKS, ("fp16",), (64,), ("plain",)),
)


def identifiers(version: str | None = None) -> list[str]:
    """What is compiled of what a version may choose. (`universe` counts all of that.)"""
    found = [identifier for part in PART for identifier in product(*part, version)]
    return list(dict.fromkeys((*found, *EXTRA)))


def universe(version: str | None = None) -> list[str]:
    """All that a version may choose, 64-bit offsets apart."""
    return product(tuple(SHARED_LIMIT), SHAPES, tuple(DTYPES), (64, 128, 256), configs.FEATURES, version)


def product(targets, shapes, dtypes, widths, features, version: str | None) -> list[str]:
    found = []
    for sm, dtype, width, feature in itertools.product(targets, dtypes, widths, features):
        for kind, shipped in SHIPPED.items():
            for shape in shipped:
                identifier = f"sm_{sm} {kind} {shape} {dtype} {width} {feature}"
                if shape not in shapes or not applies(kind, shape, feature) or settings_of(identifier, version) is None:
                    continue
                alone = ONE_LAUNCH.get(shape) if kind in ("backward_queries", "backward_keys") else None
                if alone and settings_of(identifier.replace(kind, alone), version) is not None:
                    continue
                found.append(identifier)
    return found


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
    call = common.Call(
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
            empty(*query), out, lse, tuple(empty(*x.shape) for x in (call.query, call.key, call.value)), copies, call
        )
    return sm, next(launch for launch in launches if launch.kind == name)


def described(identifier: str, version: str | None = None) -> str | None:
    """The settings as the table has them; None where the version chooses none."""
    settings = settings_of(identifier, version)
    return None if settings is None else in_words(settings)


def in_words(settings: configs.LaunchSettings) -> str:
    tile = f"{settings.block_rows}x{settings.block_keys}, {settings.num_warps} warps, {settings.num_stages} stages"
    return tile if settings.precision == "ieee" else f"{tile}, {settings.precision}"


def compile_launch(identifier: str, settings: configs.LaunchSettings | None = None) -> dict[str, object]:
    sm, launch = launch_of(identifier, settings)
    return {"settings": in_words(launch.settings), **machine_code(sm, launch)}


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
        usage = subprocess.run([cuobjdump, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack, local = (int(re.search(rf"{word}:(\d+)", usage)[1]) for word in ("REG", "STACK", "LOCAL"))
    ptx = compiled.asm["ptx"]
    return {
        "registers": registers,
        "stack": stack + local,
        "shared": compiled.metadata.shared,
        "atomics": len(re.findall(r"\b(?:atom|red)\.(?!shared)", ptx)),
        "wgmma": len(re.findall(r"\bwgmma\.mma_async\b", ptx)),
        "mma": len(re.findall(r"\bmma\.sync\b", ptx)),
        "contracted": contracted(ptx),
    }


def contracted(ptx: str) -> int:
    """Exponentials of a difference that is contracted with a multiplication: it could exceed 0 by any amount."""
    made_by, count = {}, 0
    for line in ptx.splitlines():
        found = re.match(r"\s*(?:@!?%p\d+\s+)?([a-z][\w.:]*)\s+(%\w+),\s*(.*);", line)
        if found:
            operation, result, operand = found.groups()
            count += operation.startswith("ex2") and made_by.get(operand.strip(), "").startswith("fma")
            made_by[result] = operation
    return count


def faults(identifier: str, result: dict) -> list[str]:
    """What the gate forbids."""
    target, kind, _, dtype, width, features = identifier.split()[:6]
    found = machine_faults(int(target[3:]), result, MAY_SPILL.get(identifier, 0))
    whole = result["wgmma"] and not result["mma"]
    if target == "sm_90" and dtype != "fp32" and all_by_wgmma(kind, width, features) and not whole:
        found.append(f"not every product is a WGMMA: {result['wgmma']} wgmma and {result['mma']} mma instructions")
    return found


def machine_faults(sm: int, result: dict, may_spill: int = 0) -> list[str]:
    """What the gate forbids to every kernel: spills beyond `may_spill` bytes, shared memory that does not fit,
    atomics."""
    found = []
    if result["stack"] > may_spill:
        found.append(f"spills {result['stack']} bytes of stack")
    if result["shared"] > SHARED_LIMIT[sm]:
        found.append(f"needs {result['shared']} bytes of shared memory, the limit is {SHARED_LIMIT[sm]}")
    if result.get("contracted"):  # which the first entries of the tables do not say
        found.append(f"{result['contracted']} exponentials have no bound")
    if result["atomics"]:
        found.append(f"has {result['atomics']} atomic instructions")
    return found


def kernels_hash() -> str:
    """Of the kernels' source."""
    digest = hashlib.sha256()
    for file in backend.SOURCES:
        digest.update(Path(file).read_bytes())
    return digest.hexdigest()[:16]


def read(module) -> dict[str, dict[str, dict]]:
    """By version, what the table of an aot module has of the kernels as they are."""
    content = json.loads(module.TABLE.read_text(encoding="utf-8")) if module.TABLE.exists() else {}
    return content.get("versions", {}) if content.get("kernels") == module.kernels_hash() else {}


def write(module, versions: dict[str, dict[str, dict]]) -> None:
    """One line an entry."""
    parts = [
        f' "{version}": {{\n' + ",\n".join(f"  {json.dumps(x)}: {json.dumps(row)}" for x, row in rows.items()) + "\n }"
        for version, rows in sorted(versions.items())
    ]
    start = f'{{"kernels": "{module.kernels_hash()}", "versions": {{\n'
    module.TABLE.write_text(start + ",\n".join(parts) + "\n}}\n", encoding="utf-8")


def main(module, arguments: list[str]) -> int:
    """The command line of this and the other aot modules."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        print("it must run without TRITON_INTERPRET", file=sys.stderr)
        return 2
    if arguments[:1] == ["--list"]:
        print(json.dumps({identifier: module.compile_launch(identifier) for identifier in arguments[1:]}))
        return 0
    import triton

    limited = arguments[:1] == ["--seconds"]
    end = time.monotonic() + float(arguments[1]) if limited else float("inf")
    patterns = arguments[2 if limited else 0 :] or [".*"]
    version, wanted = triton.__version__, module.identifiers()
    for identifier in (x for pattern in patterns for x in wanted if re.fullmatch(pattern, x)):
        if read(module).get(version, {}).get(identifier, {}).get("settings") == module.described(identifier):
            continue
        if time.monotonic() > end:
            break
        row = module.compile_launch(identifier)
        with open(module.__file__) as lock:  # another version may be compiled at the same time
            fcntl.flock(lock, fcntl.LOCK_EX)
            versions = read(module)
            rows = {**versions.get(version, {}), identifier: row}
            write(module, {**versions, version: {name: rows[name] for name in wanted if name in rows}})
        print(f"{identifier:56} {row['settings']:30} {row['registers']:4} registers {row['shared']:7} shared"
              f"  {'; '.join(module.faults(identifier, row))}", flush=True)  # fmt: skip
    rows = read(module).get(version, {})
    bad = [x for x in rows if module.faults(x, rows[x])]
    print(f"{version}: {len(rows)} of {len(wanted)} compiled, {len(bad)} fall short: {bad}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.modules[__name__], sys.argv[1:]))
