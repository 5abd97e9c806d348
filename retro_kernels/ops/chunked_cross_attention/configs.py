"""Launch settings of the Triton kernels: which tile, how many warps and pipeline stages, by rule."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

import torch

PASSES = ("forward", "backward", "backward_queries", "backward_keys")

# Names of the devices whose GPU suite passed with its results committed. While it is empty the Triton kernels have never
# run on a GPU, and no GPU call takes them unless they are asked for by name.
VERIFIED_ON_GPU: tuple[str, ...] = ()

SINGLE_PASS_HEAD_DIM = 128  # beyond it the fp32 gradients of a tile of 64 rows no longer fit the registers


@dataclass(frozen=True)
class LaunchSettings:
    """How one kernel is launched. `block_rows` query rows and `block_keys` retrieved tokens make a tile."""

    block_rows: int
    block_keys: int
    num_warps: int
    num_stages: int
    precision: str = "ieee"


_overrides: dict[str, LaunchSettings] = {}


@contextmanager
def override(**settings: LaunchSettings) -> Iterator[None]:
    """Within the block, the passes named use these settings instead of the rule's (tests, tuning)."""
    saved = dict(_overrides)
    _overrides.update(settings)
    try:
        yield
    finally:
        _overrides.clear()
        _overrides.update(saved)


def power_of_two(size: int, smallest: int = 16) -> int:
    """The smallest power of two that is at least `size` and `smallest` (a tile of tl.dot is at least 16 wide)."""
    return max(smallest, 1 << max(0, size - 1).bit_length())


def choose(kind: str, sm: int, dtype: torch.dtype, head_dim: int, rows: int) -> LaunchSettings:
    return _overrides.get(kind) or rule(kind, sm, dtype, head_dim, rows)


@lru_cache(maxsize=1024)
def rule(kind: str, sm: int, dtype: torch.dtype, head_dim: int, rows: int) -> LaunchSettings:
    return LaunchSettings(min(64, power_of_two(rows)), 64, 4, 2)
