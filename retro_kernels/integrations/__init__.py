"""Fused kernels inside other people's models: one file per implementation, and `swap` over all of them."""

from .swap import SwapReport, swap, unswap

__all__ = ["SwapReport", "swap", "unswap"]
