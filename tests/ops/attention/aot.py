"""Compiles the Triton kernels ahead of time, without a GPU, under the launch settings that `configs.py` ships.

    python tests/ops/attention/aot.py [--seconds S] [PATTERN ...]  # what the table lacks, into compiled_settings.json
    python tests/ops/attention/aot.py --page               # the table of docs/gpu.md, of compiled_settings.json
    python tests/ops/attention/aot.py --list ID ...  # only these, as JSON on the standard output (ID throughout: of
                                                     # sm_89, by Triton and not from sm_86's PTX)

An entry of the table is kept while the kernels' code and its setting are what they were, so that a run that was cut
short goes on. It must run without TRITON_INTERPRET, and once with each version (`VERSIONS`): another version's
environment needs this one's packages on its path. An identifier is target, kind of launch, shape (`SHAPES`), dtype,
width of the head, features (`FEATURES`), and perhaps `long`, 64-bit offsets, or `rows16`, a stride of 16.
"""

from __future__ import annotations

import contextlib
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
import tokenize
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch

from retro_kernels import files
from retro_kernels.bench.report import replace_block
from retro_kernels.ops.attention import common
from retro_kernels.ops.attention.triton import configs
from retro_kernels.ops.attention.triton import launch as backend

TABLE = Path(__file__).with_name("compiled_settings.json")
VERSIONS = ("3.6.0", "3.9.0")  # of torch 2.11, the oldest supported, and the newest
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# Bytes a program.
SHARED_LIMIT = {80: 163 * 1024, **dict.fromkeys((86, 89, 120), 99 * 1024), 90: 227 * 1024, 100: 227 * 1024}
SERVED_LIMIT = {**SHARED_LIMIT, 80: 99 * 1024}  # where sm_80's settings were compiled for the others, too
# Targets for which a Triton makes the PTX of another, its target line apart, and ptxas another machine code. (From 3.9
# on LLVM vectorises for sm_86 and not for sm_80.)
SAME_PTX = {"3.6.0": {86: 80, 89: 80}, "3.9.0": {89: 86}}
TRITON_TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.uint8: "u8",
    torch.int8: "i8",
    torch.int32: "i32",
    torch.int64: "i64",
}

# Groupings at the paper's sizes: chunked cross-attention, the same packed, encoder self-attention, encoder
# cross-attention, a decoder's packed self-attention.
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


class Options(NamedTuple):
    """Which options a call has, and by which of `configs.FEATURES` its setting is chosen."""

    chosen_by: str
    bias: bool = False
    rotary: bool = False
    null: bool = False
    relative: bool = False
    dropout: bool = False
    softcap: bool = False
    lse: bool = False  # a gradient of the log-sum-exp comes, too


FEATURES = {  # the lighter first
    "plain": Options("plain"),
    "plain_all": Options("plain", softcap=True, lse=True),
    "bias": Options("options", bias=True),
    "rotary": Options("options", rotary=True),
    "options": Options("options", bias=True, rotary=True, null=True),
    "options_all": Options("options_dropout", True, True, True, dropout=True, softcap=True, lse=True),
    "distances": Options("relative", relative=True),  # the paper's relative positions
    "relative": Options("relative", bias=True, null=True, relative=True),
    "relative_all": Options("relative_dropout", True, False, True, True, dropout=True, softcap=True, lse=True),
}

# Bytes of stack a thread that what is known to fall short may spill, in one version of Triton at least.
MAY_SPILL = {
    r"sm_\d+ backward_relative \w+ bf16 128 \w+": 96,  # every other tile spills more
    "sm_80 backward clock bf16 64 options": 8,  # all options at once
    r"sm_120 \w+ clock bf16 (64|128) \w+_all": 168,
    r"sm_(86|89) \w+ clock bf16 (64|128) \w+_all": 64,  # with dropout, a soft cap and a gradient of lse besides
    r"sm_80 \w+ clock bf16 (64|128) \w+_all": 80,
    r"sm_100 \w+ \w+ bf16 (64|128) \w+_all": 88,
    r"sm_90 \w+ clock bf16 (64|128) \w+_all": 104,
    # ptxas' own choice, for more programs at a time: 80 and 128 registers are far from 255
    "sm_100 backward_keys clock bf16 64 plain": 16,
    "sm_100 backward_(queries|keys) clock bf16 128 options": 24,
}


def all_by_wgmma(kind: str, settings: configs.LaunchSettings) -> bool:
    """Whether sm_90 multiplies by WGMMA throughout: a WGMMA makes at least 64 rows of a product, which are rows or keys
    of the tile by what a kernel sums, and both where it makes all gradients."""
    rows, keys = settings.block_rows >= 64, settings.block_keys >= 64
    by_kind = {"forward": rows, "backward_queries": rows, "backward_bias": rows, "backward_keys": keys}
    if kind in ("backward_relative", "backward_null"):  # tiles of 16, and no product
        return False
    return by_kind.get(kind, rows and keys)


def below_wgmma(version: str) -> set[str]:
    """Of bf16 in chunked cross-attention on sm_90, the kinds, widths and features that do not."""
    chosen = product((90,), CLOCK, ("bf16",), (64, 128), ("plain", "options", "relative"), version)
    others = ("backward_null", "backward_relative")  # which never do
    found = {
        x for x in chosen if x.split()[1] not in others and not all_by_wgmma(x.split()[1], settings_of(x, version))
    }
    return {" ".join(x.split()[i] for i in (1, 4, 5)) for x in found}


def settings_of(identifier: str, version: str | None = None) -> configs.LaunchSettings | None:
    """Of a version of Triton, by default the one installed."""
    target, kind, _, dtype, width, features, *others = identifier.split()
    rows = 16 if "rows16" in others else ROWS.get(kind, 64)
    kind = "backward" if kind == "backward_rows" else kind
    numbers = None if version is None else tuple(map(int, version.split(".")[:2]))
    width = configs.tile_width(int(width), int(width), 0)
    return configs.rule(kind, int(target[3:]), DTYPES[dtype], width, FEATURES[features].chosen_by, rows, numbers)


CLOCK = ("clock",)
# What is compiled besides: targets, shapes, dtypes, widths, features.
PAPER = ((90, 80, 100), CLOCK, ("bf16",), (64, 128), ("plain", "distances", "options", "relative"))
PART = {"3.6.0": (PAPER, ((86,), SHAPES, ("bf16",), (64, 128), ("plain",))), "3.9.0": (PAPER,)}


def identifiers(version: str | None = None) -> list[str]:
    """What is compiled of what a version may choose."""
    parts = PART[version or installed()]
    return list(dict.fromkeys(cover(version) + [x for part in parts for x in product(*part, version)]))


def cover(version: str | None = None) -> list[str]:
    """Every setting that a version may choose, with the heaviest features for which it is chosen: those with relative
    positions and those without. bf16 stands for fp16, whose settings are the same."""
    version = version or installed()
    chosen = product(tuple(SHARED_LIMIT), SHAPES, ("bf16", "fp32"), (64, 128, 256), FEATURES, version)
    found: dict[tuple, str] = {}
    for identifier in sorted(chosen, key=lambda x: -list(FEATURES).index(x.split()[5])):
        found.setdefault((setting(identifier, version), FEATURES[identifier.split()[5]].relative), identifier)
    return sorted(found.values(), key=chosen.index)


def installed() -> str:
    import triton

    return triton.__version__


def only_fitted(identifier: str) -> bool:
    """Whether but Triton's front end compiles it, which tells its shared memory: 256 wide and fp32."""
    return "fp32" in identifier.split() or "256" in identifier.split()


def setting(identifier: str, version: str | None) -> tuple:
    """What `cover` tells apart, relative positions aside."""
    target, kind, _, dtype, width, _ = identifier.split()
    return target, kind, dtype.replace("fp16", "bf16"), width, described(identifier, version)


EVERY = (tuple(DTYPES), (64, 128, 256), tuple(FEATURES))


def universe(version: str | None = None) -> list[str]:
    """All that a version may choose at the paper's sizes, 64-bit offsets apart."""
    return product(tuple(SHARED_LIMIT), SHAPES, *EVERY, version)


def product(targets, shapes, dtypes, widths, features, version: str | None) -> list[str]:
    found = []
    for sm, dtype, width, feature in itertools.product(targets, dtypes, widths, features):
        for kind, shipped in SHIPPED.items():
            for shape in shipped:
                identifier = f"sm_{sm} {kind} {shape} {dtype} {width} {feature}"
                if shape not in shapes or not applies(kind, shape, feature) or settings_of(identifier, version) is None:
                    continue
                if FEATURES[feature].relative and dtype == "fp32" and width == 256 and divmod(sm, 10) in REFUSED:
                    continue
                alone = ONE_LAUNCH.get(shape) if kind in ("backward_queries", "backward_keys") else None
                if alone and settings_of(identifier.replace(kind, alone), version) is not None:
                    continue
                found.append(identifier)
    return found


REFUSED = backend.SMALL_SHARED


def applies(kind: str, shape: str, features: str) -> bool:
    options = FEATURES[features]
    if shape == "packed":  # spans change nothing but two loads
        return features == "plain"
    needed = {"backward_bias": options.bias, "backward_null": options.null, "backward_relative": options.relative}
    return needed.get(kind, True)


def launch_of(identifier: str, settings: configs.LaunchSettings | None = None) -> tuple[int, backend.Launch]:
    """The launch at the paper's sizes with a mask."""
    target, kind, shape, dtype_name, width, features, *others = identifier.split()
    sm, d, dtype, options = int(target[3:]), int(width), DTYPES[dtype_name], FEATURES[features]

    def empty(*shape, dtype=dtype):
        return torch.empty(*shape, dtype=dtype, device="meta")

    b, l, k, h, m, r = 2, 4, 2, 16, 16 if "rows16" in others else 64, 128
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
    table = (empty(rows, d // 2, dtype=torch.float32), empty(slots, d // 2, dtype=torch.float32))
    query_table, key_table = table if options.rotary else (None, None)

    def where(wanted, *shape, dtype=dtype):
        return empty(*shape, dtype=dtype) if wanted else None

    call = common.Call(
        query=empty(*query),
        key=empty(*key),
        value=empty(*key),
        mask=empty(*key[:4], dtype=torch.bool),
        attention_bias=where(options.bias and not causal, h, rows, slots, dtype=torch.float32),
        relative_key=where(options.relative, h, rows + slots - 1, d),
        content_bias=where(options.relative, h, d),
        relative_bias=where(options.relative, h, d),
        query_cos=query_table,
        query_sin=query_table,
        key_cos=key_table,
        key_sin=key_table,
        null_key=where(options.null, h, d),
        null_value=where(options.null, h, d),
        chunk_spans=spans,
        first_visible=first_visible,
        dropout_seed=where(options.dropout, 1, dtype=torch.int64),
        grouping=grouping,
        causal=causal,
        rotary_interleaved=False,
        scale=d**-0.5,
        logit_softcap=50.0 if options.softcap else 0.0,
        dropout_p=0.1 if options.dropout else 0.0,
        stride=stride,
        first_token=m - 1 if grouping == common.CLOCK else 0,
    )
    out, lse = common.allocate_forward(call.query, call.value, call.attention_bias)
    settings = settings or settings_of(identifier)
    name = "backward" if kind == "backward_rows" else kind
    parameters = ("backward_bias", "backward_relative", "backward_null")
    copies = tuple(
        None if x is None or kind not in parameters else empty(32, *x.shape, dtype=torch.float32)
        for x in (
            call.attention_bias,
            call.relative_key,
            call.content_bias,
            call.relative_bias,
            call.null_key,
            call.null_value,
        )
    )
    passes = backend.backward_kinds if kind in parameters else lambda _: (name,)
    with (
        configs.override(**{name: settings}),
        mock.patch.object(backend, "_needs_long_offsets", return_value="long" in others),
        mock.patch.object(backend, "backward_kinds", passes),
    ):
        if kind == "forward":
            return sm, backend.plan_forward(out, lse, call, settings)
        launches = backend.plan_backward(
            empty(*query),
            torch.empty_like(backend.planes(lse, call)[0]) if options.lse else None,
            out,
            lse,
            tuple(empty(*x.shape) for x in (call.query, call.key, call.value)),
            copies,
            call,
        )
    return sm, next(launch for launch in launches if launch.kind == name)


def described(identifier: str, version: str | None = None) -> str | None:
    """The settings as the table has them; None where the version chooses none."""
    settings = settings_of(identifier, version)
    return None if settings is None else in_words(settings)


def in_words(settings: configs.LaunchSettings) -> str:
    tile = f"{settings.block_rows}x{settings.block_keys}, {settings.num_warps} warps, {settings.num_stages} stages"
    return tile if settings.precision == "ieee" else f"{tile}, {settings.precision}"


def from_words(words: str) -> configs.LaunchSettings:
    """What `in_words` put in words."""
    return configs.LaunchSettings(*map(int, re.findall(r"\d+", words)[:4]))


def compile_launch(identifier: str, settings: configs.LaunchSettings | None = None) -> dict[str, object]:
    sm, launch = launch_of(identifier, settings)
    if settings is None and only_fitted(identifier):
        found = dict.fromkeys(COLUMNS) | {"shared": shared_memory(sm, launch)}
    else:
        found = machine_code(sm, launch)
    return {**found, "settings": in_words(launch.settings)}


def shared_memory(sm: int, launch: backend.Launch) -> int:
    """Of a launch, in bytes: known before LLVM makes anything of it."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia import compiler

    known: list[int] = []
    make = compiler.CUDABackend.make_llir

    def stopped(self, module, *others):
        with mock.patch.object(compiler.llvm, "init_targets", side_effect=InterruptedError):
            try:
                make(self, module, *others)
            finally:
                known.append(module.get_int_attr("ttg.shared"))

    with mock.patch.object(compiler.CUDABackend, "make_llir", stopped), contextlib.suppress(InterruptedError):
        found = triton.compile(source_of(launch), target=GPUTarget("cuda", sm, 32), options=launch.options())
        known.append(found.metadata.shared)  # it was compiled before
    return known[0]


def source_of(launch: backend.Launch):
    """What Triton compiles of a launch."""
    from triton.compiler import ASTSource
    from triton.language import constexpr

    signature, constants, attributes = {}, {}, {}

    def describe(x, place: tuple[int, ...], specialised: bool, constant: bool):
        """The type of an argument; notes what is known of it when compiling."""
        if isinstance(x, constexpr):
            x, constant = x.value, True
        if isinstance(x, tuple) and not constant:
            return type(x)(*(describe(y, (*place, i), True, False) for i, y in enumerate(x)))
        if constant or x is None or (specialised and isinstance(x, int) and x == 1):
            constants[place] = x
            return "constexpr"
        if isinstance(x, torch.Tensor) or (specialised and isinstance(x, int) and x % 16 == 0):
            attributes[place] = [["tt.divisibility", 16]]
        if isinstance(x, torch.Tensor):
            return "*" + TRITON_TYPES[x.dtype]
        return "fp32" if isinstance(x, float) else "i32"

    for index, parameter in enumerate(launch.kernel.params):
        x = launch.arguments[parameter.name]
        signature[parameter.name] = describe(x, (index,), not parameter.do_not_specialize, parameter.is_constexpr)
    return ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes)


def machine_code(sm: int, launch: backend.Launch) -> dict[str, object]:
    """Registers, stack and shared memory of a launch's machine code, and which instructions are in it."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend

    same_ptx = SAME_PTX[triton.__version__]
    compiled = triton.compile(
        source_of(launch),
        target=GPUTarget("cuda", same_ptx.get(sm, sm), 32),
        options=launch.options(),
    )
    ptx, cubin = compiled.asm["ptx"], compiled.asm["cubin"]
    if sm in same_ptx:
        ptx = ptx.replace(f".target sm_{same_ptx[sm]}", f".target sm_{sm}")
        compiler = make_backend(GPUTarget("cuda", sm, 32))
        cubin = compiler.make_cubin(ptx, {}, compiler.parse_options(launch.options()), sm)
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run([cuobjdump, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack, local = (int(re.search(rf"{word}:(\d+)", usage)[1]) for word in ("REG", "STACK", "LOCAL"))
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
    target, kind, _, dtype, _, features = identifier.split()[:6]
    if result["registers"] is None:
        return fits(result, SHARED_LIMIT[int(target[3:])])
    found = machine_faults(result, may_spill(identifier), SHARED_LIMIT[int(target[3:])])
    whole, counts = bool(result["wgmma"] and not result["mma"]), f"{result['wgmma']} wgmma and {result['mma']} mma"
    if target == "sm_90" and dtype != "fp32" and whole != all_by_wgmma(kind, from_words(result["settings"])):
        found.append(f"all_by_wgmma says otherwise of {counts} instructions")
    if target == "sm_90" and dtype != "fp32" and kind == "forward" and FEATURES[features].relative:
        threads = 32 * from_words(result["settings"]).num_warps
        if 2 * (result["shared"] + 1024) > 228 * 1024 or 2 * threads * result["registers"] > 65536:
            found.append("a multiprocessor has no room for two programs")
    return found


def may_spill(identifier: str) -> int:
    return max((bytes for pattern, bytes in MAY_SPILL.items() if re.fullmatch(pattern, identifier)), default=0)


def machine_faults(result: dict, may_spill: int, shared_limit: int) -> list[str]:
    """What the gate forbids to every kernel: spills beyond `may_spill` bytes, shared memory that does not fit,
    atomics."""
    found = fits(result, shared_limit)
    if result["stack"] > may_spill:
        found.append(f"spills {result['stack']} bytes of stack")
    if result.get("contracted"):  # which the first entries of the tables do not say
        found.append(f"{result['contracted']} exponentials have no bound")
    if result["atomics"]:
        found.append(f"has {result['atomics']} atomic instructions")
    return found


def fits(result: dict, shared_limit: int) -> list[str]:
    if result["shared"] <= shared_limit:
        return []
    return [f"needs {result['shared']} bytes of shared memory, the limit is {shared_limit}"]


def kernels_hash() -> str:
    """Of the kernels' code."""
    return hash_of(backend.SOURCES)


@lru_cache
def hash_of(files: tuple[str, ...]) -> str:
    """Of the tokens of Python files, comments, docstrings and imports apart."""
    digest = hashlib.sha256()
    for file in files:
        with tokenize.open(file) as lines:
            statement: list[str] = []
            for token in tokenize.generate_tokens(lines.readline):
                if token.type in (tokenize.COMMENT, tokenize.NL):
                    continue
                statement.append(token.string)
                if token.type == tokenize.NEWLINE:
                    words = [word for word in statement if word.strip()]
                    if words[0] not in ("import", "from") and not (len(words) == 1 and words[0].endswith(('"', "'"))):
                        digest.update("\0".join(statement).encode())
                    statement = []
    return digest.hexdigest()[:16]


def page(versions: dict[str, dict[str, dict]]) -> str:
    """A table in Markdown of what a table says: of the settings that can be chosen how many were compiled, what spills,
    and the most shared memory of a launch."""
    lines = [
        "| GPU | Triton | 16 bits, heads of 64 and 128 | 16 bits, 256: fits | fp32: fits | launches | spill | "
        "most shared memory |",
        "| --- | --- | ---: | ---: | ---: | ---: | --- | --- |",
    ]
    groups = (("bf16", ("64", "128")), ("bf16", ("256",)), ("fp32", ("64", "128", "256")))
    for sm, limit in sorted(SHARED_LIMIT.items()):
        for version, found in versions.items():
            rows = {x: row for x, row in found.items() if x.startswith(f"sm_{sm} ")}
            known = {setting(x, version) for x in rows if len(x.split()) == 6}
            compiled = [row for row in rows.values() if row["registers"] is not None]
            wanted = {setting(x, version) for x in product((sm,), SHAPES, *EVERY, version)}
            cells = []
            for dtype, widths in groups:
                of = {x for x in wanted if x[2] == dtype and x[3] in widths}
                cells.append(f"{len(of & known)} of {len(of)}")
            spilt = [row["stack"] for row in compiled if row["stack"]]
            cells += [str(len(compiled)), f"{len(spilt)}, at most {max(spilt)} bytes" if spilt else "none"]
            cells.append(f"{max((row['shared'] for row in rows.values()), default=0) >> 10} of {limit >> 10} KB")
            lines.append(" | ".join([f"| sm_{sm}", version, *cells]) + " |")
    return "\n".join(lines) + "\n"


PAGE = Path(__file__).resolve().parents[3] / "docs" / "gpu.md"
COLUMNS = ("settings", "registers", "stack", "shared", "atomics", "wgmma", "mma", "contracted")


def read(module) -> dict[str, dict[str, dict]]:
    """By version and identifier, what the table of an aot module has of the kernels as they are."""
    versions: dict[str, dict[str, dict]] = {version: {} for version in VERSIONS}
    content = json.loads(module.TABLE.read_text(encoding="utf-8")) if module.TABLE.exists() else {}
    if content.get("kernels") == module.kernels_hash():
        for name, found in content["compiled"].items():
            for place, row in found.items():
                version, target = place.split()
                versions[version][f"{target} {name}"] = dict(zip(COLUMNS, row, strict=True))
    return versions


def write(module, versions: dict[str, dict[str, dict]]) -> None:
    """A line has what was compiled of one launch: for every version and target its `COLUMNS`."""
    lines: dict[str, dict[str, list]] = {}
    for version, rows in versions.items():
        for identifier, row in rows.items():
            target, name = identifier.split(maxsplit=1)
            lines.setdefault(name, {})[f"{version} {target}"] = [row[column] for column in COLUMNS]
    start = f'{{"kernels": "{module.kernels_hash()}", "columns": {json.dumps(COLUMNS)}, "compiled": {{\n'
    body = ",\n".join(f"{json.dumps(name)}: {json.dumps(found)}" for name, found in sorted(lines.items()))
    files.write_bytes(module.TABLE, f"{start}{body}\n}}}}\n".encode(), concurrent=True)  # others read it meanwhile


def main(module, arguments: list[str]) -> int:
    """The command line of this and the other aot modules."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        print("it must run without TRITON_INTERPRET", file=sys.stderr)
        return 2
    if arguments[:1] == ["--page"]:
        text = replace_block(PAGE.read_text(), page(read(module)), name="compiled", file=PAGE.name)
        files.write_bytes(PAGE, text.encode())
        return 0
    import triton

    if arguments[:1] == ["--list"]:
        found = {}
        for identifier in arguments[1:]:
            with mock.patch.dict(SAME_PTX[triton.__version__], clear=identifier.endswith(" throughout")):
                found[identifier] = module.compile_launch(identifier)
        print(json.dumps(found))
        return 0
    limited = arguments[:1] == ["--seconds"]
    end = time.monotonic() + float(arguments[1]) if limited else float("inf")
    patterns = arguments[2 if limited else 0 :] or [".*"]
    version = triton.__version__
    wanted = module.identifiers(version)
    for identifier in dict.fromkeys(x for pattern in patterns for x in wanted if re.fullmatch(pattern, x)):
        if read(module).get(version, {}).get(identifier, {}).get("settings") == module.described(identifier):
            continue
        if time.monotonic() > end:
            break
        row = module.compile_launch(identifier)
        with open(module.__file__) as lock:  # another version may be compiled at the same time
            fcntl.flock(lock, fcntl.LOCK_EX)
            versions = read(module)
            rows = {**versions[version], identifier: row}
            write(module, {**versions, version: {name: rows[name] for name in wanted if name in rows}})
        found = module.faults(identifier, row)
        if found:
            print(f"{identifier}: {row['settings']}, {row['registers']} registers: {'; '.join(found)}", flush=True)
    rows = read(module)[version]
    bad = [x for x in rows if module.faults(x, rows[x])]
    print(f"{version}: {len(rows)} of {len(wanted)} compiled, {len(bad)} fall short")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.modules[__name__], sys.argv[1:]))
