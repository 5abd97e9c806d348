"""Chooses an index by the number of keys, and adapts one that has too few.

The sizes follow measurements with real embeddings (docs/retrieval.md) up to some 10^5 keys; above, RETRO's and
InstructRetro's published choices and arithmetic, not measurements of this project.
"""

from __future__ import annotations

import dataclasses
import math
import re

EXACT = "exact"
PER_CENTROID = 39
"""Training vectors for a centroid that FAISS asks for at least."""
SAMPLED_PER_CENTROID = 64
LEAST_FOR_CODES = 256
"""Training vectors that 8-bit product codes need."""
FOR_CODES = 256 * PER_CENTROID
NPROBE = 64


@dataclasses.dataclass(frozen=True)
class Choice:
    """An index for a number of keys."""

    spec: str
    """"exact", or a FAISS factory string."""
    why: str
    settings: dict[str, int]
    """Of a search: see `index.open_index`."""
    sample: int
    """Keys to train with."""


def choose(asked: str, count: int, dim: int) -> Choice:
    """The index for `count` keys of `dim` numbers: `asked`, where it is neither "auto" nor too large for so few."""
    if asked == "auto":
        spec, why, settings = _by_size(count, dim)
    else:
        spec, why, settings = asked, "asked for", {}
        base, separator, _ = asked.rpartition(",")
        if separator and re.fullmatch(r"RFlat|Refine\(.*\)", asked[len(base) + 1 :]):
            spec, settings = base, {"rerank": 4}
            why += "; the database's own embeddings refine it (rerank), no second copy is made"
    fitted, reason = _fit_to_count(spec, count)
    lists = lists_of(fitted)
    if fitted == EXACT:
        settings = {}
    elif lists:
        settings = {
            "nprobe": min(settings.get("nprobe", NPROBE), lists),
            **{k: v for k, v in settings.items() if k != "nprobe"},
        }
    sample = max(SAMPLED_PER_CENTROID * (lists or 0), 1 << 16)
    return Choice(fitted, f"{why}; {reason}" if reason else why, settings, sample)


def lists_of(spec: str) -> int | None:
    """The number of inverted lists of a factory string."""
    found = re.search(r"(?:^|,)IVF(\d+)", spec)
    return int(found[1]) if found else None


def _by_size(count: int, dim: int) -> tuple[str, str, dict[str, int]]:
    if count <= 100_000:
        return EXACT, f"auto: {count:,} keys are compared faster than they are worth training for", {}
    if count <= 3_000_000:
        # The power of two that is nearest to 16 sqrt(n), unless the keys do not suffice to train so many lists.
        lists = min(1 << round(math.log2(16 * count**0.5)), _power_of_two(count / PER_CENTROID))
        why = f"auto: {count:,} keys, a byte for every number; candidates are compared again by their embeddings"
        return f"IVF{lists},SQ8", why, {"nprobe": NPROBE, "rerank": 4}
    if count <= 30_000_000:
        return _choose_code(48, None, 65_536, dim, count)
    if count <= 300_000_000:
        return _choose_code(48, None, 262_144, dim, count)
    if count <= 5_000_000_000:
        return _choose_code(64, 128, 1_048_576, dim, count)
    return _choose_code(32, 256, 4_194_304, dim, count)


def _choose_code(size: int, rotated: int | None, lists: int, dim: int, count: int) -> tuple[str, str, dict[str, int]]:
    """Product codes of `size` bytes after a rotation to `rotated` numbers (None: as many as there are)."""
    while size > dim:
        size //= 2
    target = dim if rotated is None else min(rotated, dim)
    target -= target % size
    rotation = f"OPQ{size}" if target == dim else f"OPQ{size}_{target}"
    return (
        f"{rotation},IVF{lists}_HNSW32,PQ{size}",
        f"auto: {count:,} keys, {size} bytes each; candidates are compared again by their embeddings",
        {"nprobe": NPROBE, "rerank": 4},
    )


def _fit_to_count(spec: str, count: int) -> tuple[str, str | None]:
    """-> a string that `count` keys suffice to train, and what was changed, if anything."""
    if spec == EXACT:
        return spec, None
    if count < LEAST_FOR_CODES and re.search(r"IVF|PQ|SQ|LSH|IMI", spec):
        return EXACT, f"{count} keys are too few to train {spec}: exact search instead"
    lists = lists_of(spec)
    few = (
        f"{count:,} keys are few to train its codes, FAISS asks for {FOR_CODES:,}"
        if ("PQ" in spec and count < FOR_CODES)
        else None
    )
    if lists is None or count >= PER_CENTROID * lists:
        return spec, few
    fewer = _power_of_two(count / PER_CENTROID)
    return (
        re.sub(r"IVF\d+", f"IVF{fewer}", spec),
        f"{count:,} keys are too few to train {lists:,} lists (at least {PER_CENTROID} each): {fewer:,} instead"
        + (f"; {few}" if few else ""),
    )


def _power_of_two(most: float) -> int:
    return 1 << max(0, int(most).bit_length() - 1)
