"""Other people's models: fused kernels under a RETRO (one file per implementation, and `swap` over all of them), and
neighbours for a decoder (`retrofit`)."""

from .retrofit import RetrofitReport, retrofit
from .swap import SwapReport, swap, unswap

__all__ = ["RetrofitReport", "SwapReport", "retrofit", "swap", "unswap"]
