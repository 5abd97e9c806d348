"""Launch settings of the absorbed Triton kernels, by rule."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from ...attention.triton.configs import power_of_two

KINDS = ("forward", "backward_heads", "backward_states")

STATE_PROGRAMS = 128  # each keeps one tile of sums in fp32: at most so many tiles of scratch


@dataclass(frozen=True)
class LaunchSettings:
    """`block_rows` query rows by `block_slots` retrieved tokens make a tile of logits; the encoder's width is walked in
    `block_encoder` columns, distances in `block_run`; a program of the forward has 1 or 2 `heads`."""

    block_rows: int
    block_slots: int
    block_encoder: int
    num_warps: int
    num_stages: int
    heads: int = 1
    block_run: int = 64
    precision: str = "ieee"


overrides: dict[str, LaunchSettings] = {}


@contextmanager
def override(**settings: LaunchSettings) -> Iterator[None]:
    """Within the block, the launches named use these settings instead of the rule's (tests)."""
    saved = dict(overrides)
    overrides.update(settings)
    try:
        yield
    finally:
        overrides.clear()
        overrides.update(saved)


_S = LaunchSettings

# (kind, precision, generation or None for any) -> settings at 128 wide; "options": with anything beyond a mask. Their
# registers and spills: tests/ops/absorbed/compiled_settings.json; no GPU has timed them.
_TABLE: dict[tuple[str, str, int | None], LaunchSettings] = {
    ("forward", "half", 90): _S(64, 256, 32, 8, 3),  # 64 columns of states or 2 heads spill
    ("forward options", "half", 90): _S(64, 64, 32, 8, 2, block_run=32),
    ("backward_heads", "half", 90): _S(64, 32, 32, 8, 2, block_run=16),  # 64 x 64 x 16 spills 16 bytes on Triton 3.9
    ("backward_heads options", "half", 90): _S(64, 32, 16, 8, 2, block_run=16),
    ("backward_states", "half", 90): _S(64, 64, 32, 8, 2, block_run=16),
    ("backward_states options", "half", 90): _S(64, 64, 16, 8, 2, block_run=16),
    ("forward", "half", 100): _S(64, 128, 32, 8, 2),
    ("forward options", "half", 100): _S(64, 32, 32, 8, 2, block_run=16),
    ("backward_heads", "half", 100): _S(64, 64, 32, 8, 1, block_run=32),
    ("backward_heads options", "half", 100): _S(64, 32, 32, 8, 1, block_run=16),
    ("backward_states", "half", 100): _S(64, 64, 16, 8, 1, block_run=16),
    ("backward_states options", "half", 100): _S(64, 32, 32, 8, 1, block_run=16),
    ("forward", "half", 80): _S(64, 64, 32, 8, 2, block_run=32),
    ("backward_heads", "half", 80): _S(32, 32, 16, 8, 2, block_run=16),
    ("backward_heads options", "half", 80): _S(16, 32, 16, 8, 1, block_run=16),
    ("backward_states", "half", 80): _S(32, 32, 32, 8, 1, block_run=16),
    ("backward_states options", "half", 80): _S(32, 64, 16, 8, 1, block_run=16),
    ("forward", "fp32", None): _S(16, 32, 16, 8, 1, block_run=16),
    ("backward_heads", "fp32", None): _S(16, 16, 16, 8, 1, block_run=16),
    ("backward_heads options", "fp32", None): _S(16, 16, 16, 8, 2, block_run=16),
    ("backward_states", "fp32", None): _S(16, 16, 16, 8, 1, block_run=16),
}


def choose(
    kind: str, sm: int, dtype: torch.dtype, rows: int, slots: int, encoder_dim: int, options: bool
) -> LaunchSettings:
    """What `override` says, else the rule's settings."""
    return overrides.get(kind) or rule(kind, sm, dtype, rows, slots, encoder_dim, options)


@lru_cache(maxsize=1024)
def rule(
    kind: str, sm: int, dtype: torch.dtype, rows: int, slots: int, encoder_dim: int, options: bool
) -> LaunchSettings:
    """The shipped settings; fewer rows, slots or columns of the states make smaller tiles. What is neither Hopper nor
    data-centre Blackwell takes sm_80's. `options`: anything beyond a mask."""
    generation = {90: 90, 100: 100, 103: 100}.get(sm, 80)
    precision = "fp32" if dtype == torch.float32 else "half"
    names = (f"{kind} options", kind) if options else (kind,)
    places = ((name, precision, by) for name in names for by in (generation, None))
    found = next(_TABLE[place] for place in places if place in _TABLE)
    return replace(
        found,
        block_rows=min(found.block_rows, power_of_two(rows)),
        block_slots=min(found.block_slots, power_of_two(slots)),
        block_encoder=min(found.block_encoder, power_of_two(encoder_dim)),
    )
