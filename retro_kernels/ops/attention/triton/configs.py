"""Launch settings of the Triton kernels: which tile, how many warps and pipeline stages, by rule."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib import metadata

import torch

KINDS = (
    "forward",
    "backward",
    "backward_shared",
    "backward_sweeps",
    "backward_queries",
    "backward_keys",
    "backward_bias",
    "backward_relative",
    "backward_null",
)


@dataclass(frozen=True)
class LaunchSettings:
    """How one kernel is launched. `block_rows` query rows and `block_keys` retrieved tokens make a tile."""

    block_rows: int
    block_keys: int
    num_warps: int
    num_stages: int
    precision: str = "ieee"


overrides: dict[str, LaunchSettings] = {}
tuned: dict[tuple, LaunchSettings] = {}  # by the arguments of `choose`


@contextmanager
def override(**settings: LaunchSettings) -> Iterator[None]:
    """Within the block, the passes named use these settings instead of the rule's (tests, tuning)."""
    saved = dict(overrides)
    overrides.update(settings)
    try:
        yield
    finally:
        overrides.clear()
        overrides.update(saved)


def power_of_two(size: int, smallest: int = 16) -> int:
    """The smallest power of two that is at least `size` and `smallest` (a tile of tl.dot is at least 16 wide)."""
    return max(smallest, 1 << max(0, size - 1).bit_length())


def tile_width(head_dim: int, value_dim: int, rotary_width: int) -> int:
    """Columns of the widest tile: of the key, rotary pairs and the rest apart, or of the value."""
    key = power_of_two(head_dim) if rotary_width == 0 else 2 * power_of_two(rotary_width)
    if 0 < 2 * rotary_width < head_dim:
        key += power_of_two(head_dim - 2 * rotary_width)
    return max(key, power_of_two(value_dim))


def features(relative: bool, dropout: bool, options: bool) -> str:
    """What a call asks of a kernel beyond a mask, as far as registers go: relative positions, dropout, and `options`,
    a bias, rotary tables or a null slot."""
    name = "relative" if relative else "options" if options or dropout else "plain"
    return f"{name}_dropout" if dropout else name


FEATURES = ("plain", "options", "options_dropout", "relative", "relative_dropout")
_S = LaunchSettings

# (kind, precision, generation or None for any) -> width -> settings at 64 rows without and with options. Spills,
# registers and shared memory of what was compiled are listed in tests/ops/attention/compiled_settings.json, made by
# aot.py beside it; docs/gpu.md says what that is. No GPU has measured a speed.
_TABLE: dict[tuple[str, str, int | None], dict[int, tuple[LaunchSettings | None, LaunchSettings | None]]] = {
    # 64 x 64: 2 or 3 programs share a multiprocessor; at 128 wide 3 stages spill 64 bytes where causal
    ("forward", "half", 90): {
        64: (_S(64, 64, 4, 3), _S(64, 64, 4, 2)),
        128: (_S(64, 64, 4, 2), _S(64, 32, 8, 2)),
        256: (_S(64, 64, 8, 2), _S(64, 32, 8, 2)),
    },
    # as sm_90, accumulators in tensor memory
    ("forward", "half", 100): {
        64: (_S(64, 64, 4, 3), _S(64, 64, 4, 2)),
        128: (_S(64, 64, 4, 3), _S(64, 64, 4, 2)),
        256: (_S(64, 64, 8, 2), _S(64, 32, 8, 2)),
    },
    # no WGMMA: operands sit in registers, so 32 keys from 128 wide or with options on; at most 99 KiB, as sm_86 has:
    # 2 stages take 108 with relative positions at 256 wide
    ("forward", "half", 80): {
        64: (_S(64, 64, 4, 3), _S(64, 32, 4, 3)),
        128: (_S(64, 32, 4, 3), _S(64, 32, 8, 1)),
        256: (_S(64, 32, 8, 2), _S(32, 32, 8, 1)),
    },
    # IEEE products run outside the tensor cores and hold whole rows in registers: 64 x 64 spills 1.5 KB at 64 wide
    ("forward", "fp32", None): {
        64: (_S(32, 32, 4, 1), _S(32, 32, 4, 1)),
        128: (_S(32, 16, 8, 1), _S(32, 16, 8, 1)),
        256: (_S(32, 16, 8, 1), _S(16, 16, 8, 1)),
    },
    # 32 x 16 spills 8 bytes at 128 wide on sm_80
    ("forward", "fp32", 80): {
        64: (_S(32, 32, 4, 1), _S(32, 32, 4, 1)),
        128: (_S(16, 16, 8, 1), _S(32, 16, 8, 1)),
        256: (_S(32, 16, 8, 1), _S(16, 16, 8, 1)),
    },
    # one pass: 244 registers at 128 wide; options spill 72 bytes there with 64 keys. At 256 wide dQ does not fit
    ("backward", "half", 90): {
        64: (_S(64, 64, 4, 2), _S(64, 64, 8, 1)),
        128: (_S(64, 64, 4, 2), _S(64, 32, 8, 1)),
    },
    # 4 warps spill 96 and 160 bytes at 128 wide
    ("backward", "half", 100): {
        64: (_S(64, 64, 4, 2), _S(64, 64, 8, 1)),
        128: (_S(64, 64, 8, 1), _S(64, 32, 8, 1)),
    },
    # without WGMMA 64 keys spill, with options 32 keys too
    ("backward", "half", 80): {
        64: (_S(64, 32, 4, 2), _S(64, 16, 8, 1)),
        128: (_S(64, 32, 8, 1), _S(64, 16, 8, 1)),
    },
    # in fp32 one pass fits only at 64 wide without options: 8 bytes spill with them, 504 at 128 wide
    ("backward", "fp32", None): {
        64: (_S(64, 16, 8, 1), None),
    },
    # dQ alone: 186 registers at 128 wide, where options spill 56 bytes with 64 keys
    ("backward_queries", "half", None): {
        64: (_S(64, 64, 4, 2), _S(64, 64, 8, 1)),
        128: (_S(64, 64, 4, 2), _S(64, 32, 8, 1)),
        256: (_S(32, 32, 4, 1), _S(16, 16, 8, 1)),
    },
    # 64 keys spill 48 bytes at 128 wide where causal
    ("backward_queries", "half", 90): {
        64: (_S(64, 64, 4, 2), _S(64, 64, 8, 1)),
        128: (_S(64, 32, 4, 2), _S(64, 32, 8, 1)),
        256: (_S(32, 32, 4, 1), _S(16, 16, 8, 1)),
    },
    # without WGMMA half the tile
    ("backward_queries", "half", 80): {
        64: (_S(64, 64, 4, 2), _S(64, 32, 4, 2)),
        128: (_S(64, 32, 4, 2), _S(32, 32, 8, 1)),
        256: (_S(32, 32, 4, 1), _S(16, 16, 8, 1)),
    },
    # IEEE products; 256 wide spills 140 to 200 bytes in every tile, this one least
    ("backward_queries", "fp32", None): {
        64: (_S(32, 16, 8, 1), _S(16, 16, 8, 1)),
        128: (_S(16, 16, 8, 1), _S(16, 16, 8, 1)),
        256: (_S(16, 16, 8, 1), _S(16, 16, 8, 1)),
    },
    # dK and dV, two accumulators: 64 rows spill 56 bytes at 128 wide, and 32 at 64 wide with a bias; at 256 with
    # options all spill, this least
    ("backward_keys", "half", None): {
        64: (_S(64, 64, 4, 2), _S(32, 64, 8, 1)),
        128: (_S(32, 64, 8, 1), _S(16, 64, 8, 1)),
        256: (_S(32, 32, 8, 1), _S(16, 16, 8, 1)),
    },
    # without WGMMA key and value stay in registers: 32 x 32 spills 232 bytes at 64 wide with options
    ("backward_keys", "half", 80): {
        64: (_S(32, 32, 4, 2), _S(16, 16, 4, 1)),
        128: (_S(32, 32, 8, 1), _S(32, 32, 8, 1)),
        256: (_S(32, 32, 8, 1), _S(16, 16, 8, 1)),
    },
    # IEEE products
    ("backward_keys", "fp32", None): {
        64: (_S(16, 32, 8, 1), _S(16, 32, 8, 1)),
        128: (_S(16, 32, 8, 1), _S(16, 32, 8, 1)),
        256: (_S(16, 32, 8, 1), _S(16, 32, 8, 1)),
    },
    # 16 x 32 spills 8 bytes with options on sm_80, and takes 100 KiB of sm_86's 99 at 256 wide
    ("backward_keys", "fp32", 80): {
        64: (_S(16, 32, 8, 1), _S(16, 16, 8, 1)),
        128: (_S(16, 32, 8, 1), _S(16, 16, 8, 1)),
        256: (_S(16, 16, 8, 1), _S(16, 16, 8, 1)),
    },
    # gradient of the bias: 4 warps spill 40 bytes at 64 x 64
    ("backward_bias", "half", 90): {
        64: (_S(64, 64, 8, 1), _S(64, 64, 8, 1)),
        128: (_S(64, 64, 8, 1), _S(16, 32, 8, 1)),  # with rotary tables 32 x 64 spills 144 bytes
        256: (_S(64, 64, 8, 1), _S(64, 64, 8, 1)),
    },
    # 256 wide every tile spills with all options, this one 56 bytes
    ("backward_bias", "half", 100): {
        64: (_S(64, 64, 8, 1), _S(64, 64, 8, 1)),
        128: (_S(64, 64, 8, 1), _S(64, 64, 8, 1)),
        256: (_S(32, 64, 8, 1), _S(32, 64, 8, 1)),
    },
    # without WGMMA 64 x 64 spills 360 bytes at 64 wide, and 64 x 32 with rotary tables 8
    ("backward_bias", "half", 80): {
        64: (_S(64, 32, 8, 1), _S(16, 32, 8, 1)),
        128: (_S(16, 32, 8, 1), _S(16, 32, 8, 1)),
        256: (_S(16, 16, 8, 1), _S(16, 16, 8, 1)),
    },
    # IEEE products
    ("backward_bias", "fp32", None): {
        64: (_S(32, 16, 8, 1), _S(32, 16, 8, 1)),
        128: (_S(32, 16, 8, 1), _S(32, 16, 8, 1)),
        256: (_S(32, 16, 8, 1), _S(32, 16, 8, 1)),
    },
    # 32 x 16 spills 8 bytes at 64 wide on sm_80, and takes 192 KiB with relative positions at 256 wide
    ("backward_bias", "fp32", 80): {
        64: (_S(16, 16, 8, 1), _S(16, 16, 8, 1)),
        128: (_S(32, 16, 8, 1), _S(32, 16, 8, 1)),
        256: (_S(16, 16, 8, 1), _S(16, 16, 8, 1)),
    },
    # gradients of the null slot read no keys: rows times width count, 166 to 214 registers
    ("backward_null", "half", None): {
        64: (_S(64, 16, 4, 1), _S(64, 16, 4, 1)),
        128: (_S(32, 16, 4, 1), _S(32, 16, 4, 1)),
        256: (_S(16, 16, 4, 1), _S(16, 16, 4, 1)),
    },
    # the same in fp32
    ("backward_null", "fp32", None): {
        64: (_S(64, 16, 4, 1), _S(64, 16, 4, 1)),
        128: (_S(32, 16, 4, 1), _S(32, 16, 4, 1)),
        256: (_S(16, 16, 4, 1), _S(16, 16, 4, 1)),
    },
}


# By Triton version: what those that PyTorch 2.11 to 2.14 ship (3.6 to 3.8) spill where 3.9 does not, so that they take
# a smaller tile, or None, the next form. (kind, precision, generation, width, features with or without dropout)
_BEFORE_3_9: dict[tuple[str, str, int, int, str], LaunchSettings | None] = {
    ("backward_queries", "half", 80, 64, "options"): _S(32, 32, 4, 2),  # 64 rows spill 8 bytes
    ("backward_queries", "half", 80, 64, "plain"): _S(64, 32, 4, 2),  # 64 keys spill 24 bytes where causal on sm_86
    ("forward", "half", 100, 128, "options"): _S(64, 32, 4, 2),  # 64 keys spill 8 bytes
    ("forward", "half", 80, 64, "relative"): _S(32, 32, 4, 3),  # 2 stages spill 8 bytes
    ("backward_bias", "half", 90, 64, "relative"): _S(64, 32, 8, 1),  # 64 keys spill 104 bytes in the encoder
    ("backward_bias", "half", 100, 128, "options"): _S(16, 32, 8, 1),  # 64 x 64 spills 72 bytes, 32 x 64 160
    ("backward", "half", 100, 128, "relative"): _S(64, 16, 8, 1),  # 32 keys spill 32 bytes
    # one pass spills 96 to 296 bytes in every tile, and 64 rows of the queries 8 to 88
    ("backward", "half", 90, 64, "relative"): None,
    ("backward_queries", "half", 90, 64, "relative"): _S(32, 64, 8, 1),
    ("forward", "half", 90, 64, "options"): _S(64, 32, 4, 2),  # with dropout 64 keys spill 8 bytes
    ("backward", "half", 90, 64, "options_dropout"): None,  # 64 keys spill 56 bytes, 32 spill 8
    ("backward", "half", 100, 64, "relative"): _S(64, 32, 8, 1),  # 64 keys spill 128 bytes
    ("forward", "half", 100, 128, "relative"): _S(32, 32, 8, 1),  # 64 rows spill 32 to 272
}


@lru_cache(maxsize=1)
def triton_version() -> tuple[int, int]:
    """Of the Triton that is installed, (3, 9) for 3.9.0, or the newest that settings were chosen for."""
    try:
        major, minor = metadata.version("triton").split(".")[:2]
    except metadata.PackageNotFoundError:
        return NEWEST
    return int(major), int(minor)


NEWEST = (3, 9)


def choose(kind: str, sm: int, dtype: torch.dtype, width: int, features: str, rows: int) -> LaunchSettings | None:
    """The settings of one kind of launch: what `override` says, else what tuning found, else the rule's."""
    found = overrides.get(kind) or tuned.get((kind, sm, dtype, width, features, rows))
    return found or rule(kind, sm, dtype, width, features, rows)


@lru_cache(maxsize=2048)
def rule(
    kind: str, sm: int, dtype: torch.dtype, width: int, features: str, rows: int, triton: tuple[int, int] | None = None
) -> LaunchSettings | None:
    """The shipped settings, from what a setting costs in registers and shared memory, never from batch or length.

    `sm` 90 for sm_90; what is neither Hopper nor data-centre Blackwell takes sm_80's. `width` is `tile_width`,
    rounded up to 64, 128 or 256 (beyond 256, which only partial rotary turns of heads above 128 reach, 256's may
    spill). `options`: a bias, rotary tables or a null slot, which cost registers. `rows`: the stride; fewer rows make
    a smaller tile. `triton`: the version that compiles, by default the one installed. None for "backward",
    "backward_shared" or "backward_sweeps" where that does not fit, and the next of them or two launches run instead.
    """
    options = features != "plain"
    generation = {90: 90, 100: 100, 103: 100}.get(sm, 80)
    size = 64 if width <= 64 else 128 if width <= 128 else 256
    precision = "fp32" if dtype == torch.float32 else "half"
    if (triton or triton_version()) < NEWEST:
        names = ((kind, precision, generation, size, name) for name in (features, features.removesuffix("_dropout")))
        older = next((name for name in names if name in _BEFORE_3_9), None)
    else:
        older = None
    if older is not None:
        found = _BEFORE_3_9[older]
        return None if found is None else replace(found, block_rows=min(found.block_rows, power_of_two(rows)))
    if kind in ("backward_shared", "backward_sweeps"):  # in fp32, or beyond 128 wide, two launches
        # 64 rows spill without WGMMA, and in the sweeps on sm_100
        largest = 32 if generation == 80 or (generation == 100 and kind == "backward_sweeps") else 64
        fits = precision == "half" and size <= 128 and not features.startswith("relative")
        if generation == 90:
            # Plain spills 72 and 56 bytes at 128 wide, options 8 at 64: two launches, which do not.
            fits = fits and features == "plain" and size == 64
        # With rotary tables 320 to 2112 bytes spill without WGMMA; on sm_100 1040 in the sweeps, at 128 wide 240.
        if generation == 80 or (generation == 100 and (kind == "backward_sweeps" or size == 128)):
            fits = fits and features == "plain"
        return _S(min(largest, power_of_two(rows)), 64, 8, 1) if fits else None
    if kind == "backward_relative":
        # Square, as its diagonals need. 32 x 32 spills 56 to 456 bytes at 64 wide; 16 x 16 still 40 at 128 on sm_90.
        side = min(16, power_of_two(rows))
        return _S(side, side, 8, 1)
    if kind == "backward" and 64 < rows <= 128 and precision == "half" and size <= 128:
        # 236 registers at 128 wide on sm_90; with options, or without WGMMA, the sweeps
        return _S(128, 64, 8, 2 if generation == 90 else 1) if generation >= 90 and not options else None
    if features.startswith("relative") and generation == 90 and precision == "half" and size == 128:
        return _relative_at_128(kind, rows)
    if features.startswith("relative") and generation == 80 and precision == "half" and size <= 128:
        small = _RELATIVE_WITHOUT_WGMMA.get((kind, size))
        if kind == "backward":
            return None
        if small is not None:
            return replace(small, block_rows=min(small.block_rows, power_of_two(rows)))
    if features.startswith("relative") and generation == 100 and precision == "half" and size == 128:
        if kind == "forward":
            return _S(min(64, power_of_two(rows)), 32, 8, 1)  # 114 registers
        if kind == "backward_bias":
            return _S(min(16, power_of_two(rows)), 64, 8, 1)  # 64 x 64 spills 16 bytes, 32 x 64 272
    if features.startswith("relative") and generation >= 90 and precision == "half" and size == 64:
        # Two programs share a multiprocessor: 104 KB each, where 64 keys take 128, and on sm_100 spill 40 bytes. Going
        # back on sm_90 64 keys spill 16 bytes.
        if kind == "forward":
            return _S(min(64, power_of_two(rows)), 32, 4, 2)
        if kind == "backward" and generation == 90 and rows <= 64:
            return _S(min(64, power_of_two(rows)), 32, 8, 1)
    if features.startswith("relative") and generation >= 90 and (kind, precision, size) == ("forward", "half", 256):
        # 64 rows take 296 KiB of 227 with two stages; these take 108, and no WGMMA.
        return _S(min(32, power_of_two(rows)), 32, 8, 2)
    by_width = _TABLE.get((kind, precision, generation)) or _TABLE[kind, precision, None]
    found = by_width.get(size, (None, None))[options]
    if kind == "backward_keys" and precision == "half" and size == 64:
        if features.startswith("relative"):
            found = _S(32, 64, 8, 1) if generation >= 90 else found  # 64 rows spill 96 bytes
        elif generation == 100:
            found = _S(64, 64, 8, 1)  # 4 warps spill 32 bytes where causal
    if kind == "backward_queries" and size == 64 and generation == 90 and features.startswith("relative"):
        found = _S(64, 32, 8, 1) if precision == "half" else found  # 64 keys spill 56 bytes where causal
    if kind == "backward_queries" and precision == "half" and size == 64 and generation == 100:
        found = _S(64, 64, 8, 1)  # 4 warps spill 8 bytes where causal
    if found is None:
        return None
    return replace(found, block_rows=min(found.block_rows, power_of_two(rows)))


# On sm_80 and its like, where 64 rows spill 128 bytes forward and up to 488 back, and do not fit the 99 KB of sm_86: no
# backward in one launch either.
_RELATIVE_WITHOUT_WGMMA = {
    ("forward", 64): _S(32, 32, 4, 2),
    ("backward_queries", 64): _S(32, 32, 4, 2),
    ("backward_keys", 64): _S(16, 16, 4, 1),
    ("backward_bias", 64): _S(16, 32, 8, 1),
    ("forward", 128): _S(32, 32, 8, 1),
    ("backward_queries", 128): _S(32, 32, 8, 1),
    ("backward_keys", 128): _S(16, 32, 8, 1),
    ("backward_bias", 128): _S(16, 32, 8, 1),
}


def _relative_at_128(kind: str, rows: int) -> LaunchSettings | None:
    """On sm_90: the run of distances and its products stand beside the tile, so smaller tiles and no backward in one
    launch (64 x 32 spills 184 bytes). Of the tiles that multiply by WGMMA throughout, 64 x 16 spills 56 bytes for the
    queries and 16 x 64 spills 32 for the keys; these, which take older instructions, spill nothing."""
    found = {
        "forward": _S(64, 16, 4, 1),  # two programs share a multiprocessor
        "backward": None,
        "backward_queries": _S(32, 64, 8, 1),
        "backward_keys": _S(32, 16, 8, 1),  # with a bias too 32 keys spill 104 bytes
        "backward_bias": _S(16, 64, 8, 1),
        "backward_null": _S(32, 16, 4, 1),
    }[kind]
    return None if found is None else replace(found, block_rows=min(found.block_rows, power_of_two(rows)))


def candidates(kind: str, sm: int, dtype: torch.dtype, width: int, features: str, rows: int) -> list[LaunchSettings]:
    """What tuning tries: the rule's choice first, then its neighbours. Which do not fit is found out by trying."""
    first = rule(kind, sm, dtype, width, features, rows)
    if first is None:
        return []
    others = [
        replace(first, block_keys=keys, num_warps=warps, num_stages=stages)
        for warps in (4, 8)
        for keys in (first.block_keys // 2, first.block_keys, 2 * first.block_keys)
        for stages in (1, 2, 3)
        if 16 <= keys <= 128
        # Tiles of relative gradients are square, and their sums are read again after a barrier: no prefetching.
        and (kind != "backward_relative" or (keys <= 32 and stages == 1))
    ]
    if kind == "backward_relative":
        others = [replace(settings, block_rows=settings.block_keys) for settings in others]
    return [first, *(settings for settings in others if settings != first)]
