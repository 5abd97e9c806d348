"""Launch settings of the Triton decode kernels: which tile, how many warps and pipeline stages, by rule."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from ...attention.triton.configs import power_of_two

PROGRAMS = 256  # wanted, two for each multiprocessor of an H100: with fewer sequences and heads, tiles get smaller
FEWEST_KEYS = 16


@dataclass(frozen=True)
class LaunchSettings:
    """`block_rows` rows (a token and a query head each) by `block_keys` slots are a program's. It walks the width of
    keys and values in `block_dim` columns. With one row there is no matrix product."""

    block_rows: int
    block_keys: int
    block_dim: int
    num_warps: int
    num_stages: int
    precision: str = "ieee"


_override: list[LaunchSettings] = []


@contextmanager
def override(settings: LaunchSettings) -> Iterator[None]:
    """Within the block every call is launched with these settings instead of the rule's (tests)."""
    _override.append(settings)
    try:
        yield
    finally:
        _override.pop()


def choose(dtype: torch.dtype, rows: int, width: int, rotary_width: int, slots: int, shared_by: int) -> LaunchSettings:
    """The settings of a call, from its shapes alone: partial sums are as many for any positions.

    `rows` are those of one sequence and key/value head, `width` is that of the wider of key and value, `shared_by` how
    many (sequence, key/value head) pairs there are.
    """
    if _override:
        return _override[-1]
    full = rule(dtype, rows, width, rotary_width)
    keys = full.block_keys
    programs = shared_by * -(-rows // full.block_rows)
    while keys > FEWEST_KEYS and programs * -(-slots // keys) < PROGRAMS:
        keys //= 2
    return LaunchSettings(full.block_rows, keys, full.block_dim, full.num_warps, full.num_stages, full.precision)


def rule(dtype: torch.dtype, rows: int, width: int, rotary_width: int) -> LaunchSettings:
    """The settings of a call with many sequences. Registers and shared memory of all of them are in
    tests/ops/decoding/compiled_settings.json; no speed has been measured on a GPU."""
    whole = 2 * power_of_two(rotary_width) if rotary_width else 0  # keys that turn are held whole
    wide = max(whole, min(power_of_two(width), 256))
    if rows == 1:  # 64 x 128 of key and as much of value in flight: 32 KB of bf16 a program
        return LaunchSettings(1, max(FEWEST_KEYS, (4096 if rotary_width else 8192) // wide), wide, 4, 1)
    if dtype == torch.float32:  # products outside the tensor cores hold whole rows in registers
        return LaunchSettings(16, 32 if wide <= 128 else 16, min(wide, 64), 4, 1)
    block_rows = min(power_of_two(rows), 32)  # 64 spill with a bias
    if width > 256:  # one cache for all heads: larger tiles, whose partial sums are fewer
        return LaunchSettings(block_rows, 128, 64, 8, 3)
    return LaunchSettings(block_rows, 32 if rotary_width else 64, min(wide, 128), 4 if block_rows == 16 else 8, 2)
