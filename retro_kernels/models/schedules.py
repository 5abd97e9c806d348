"""Learning rates over a run, as a share of the largest: cosine, linear, constant, WSD, each after a linear warm-up."""

from __future__ import annotations

import math

FIRST = 1e-7
SCHEDULES = ("cosine", "linear", "constant", "wsd")


def rate(step: int, *, schedule: str, steps: int, warmup: int, decay: int, largest: float, final: float) -> float:
    """The learning rate of the update number `step`, from 0.

    Args:
        schedule: what follows the linear rise over `warmup` updates from 1e-7 to `largest`. "cosine" and "linear" fall
            to `final` at `steps`. "constant" stays. "wsd" (warm-up, stable, decay: arXiv 2404.06395) stays, and falls
            linearly to `final` over the last `decay` updates.
    """
    if step < warmup:
        return FIRST + (largest - FIRST) * (step + 1) / warmup
    if schedule == "constant":
        return largest
    begin = max(steps - decay, warmup) if schedule == "wsd" else warmup
    done = min(max((step - begin) / max(steps - begin, 1), 0.0), 1.0)
    left = 0.5 * (1 + math.cos(math.pi * done)) if schedule == "cosine" else 1 - done
    return final + (largest - final) * left
