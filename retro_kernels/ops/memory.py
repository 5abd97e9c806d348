"""The memory of a call: what a backend allocates, and how it wants what it is given."""

from __future__ import annotations

import torch


def allocate(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """An uninitialised contiguous tensor. Every output and scratch buffer of a fused backend is made here,
    so that a test can replace it by one that fills with NaN and puts guard bands round the memory."""
    return torch.empty(shape, dtype=dtype, device=device)


def unit_last_stride(x: torch.Tensor | None) -> torch.Tensor | None:
    """The kernels read vectors along the last dimension of floating tensors; any other stride is read in place."""
    if x is None or not x.is_floating_point() or x.stride(-1) == 1 or x.shape[-1] <= 1:
        return x
    return x.contiguous()
