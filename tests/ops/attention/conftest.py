"""Outputs that show what a kernel did not write, and what it wrote beside them."""

from __future__ import annotations

import pytest
import torch

from retro_kernels.ops import common

GUARD = 64  # elements before and after every output


@pytest.fixture
def guarded(monkeypatch):
    """Outputs and scratch are filled with NaN and lie between guard bands, which must be untouched afterwards."""
    bands = []

    def allocate(shape, dtype, device):
        size = int(torch.Size(shape).numel())
        memory = torch.full((size + 2 * GUARD,), float("nan"), dtype=dtype, device=device)
        memory[:GUARD] = memory[GUARD + size :] = 123.0
        bands.append((memory, size))
        return memory[GUARD : GUARD + size].view(shape)

    monkeypatch.setattr(common, "allocate", allocate)
    yield
    for memory, size in bands:
        outside = torch.cat([memory[:GUARD], memory[GUARD + size :]])
        assert (outside == 123.0).all(), "a kernel wrote outside its output"
