"""Fused kernels for retrieval-enhanced transformers (RETRO, arXiv 2112.04426)."""

from importlib.metadata import PackageNotFoundError, version

from . import nn
from .integrations import SwapReport, swap
from .ops.backends import BackendStatus
from .ops.chunked_cross_attention import backends, chunked_cross_attention

try:
    __version__ = version("retro_kernels")
except PackageNotFoundError:  # run from a source tree that was never installed
    __version__ = "0.0.0+uninstalled"

__all__ = ["BackendStatus", "SwapReport", "backends", "chunked_cross_attention", "nn", "swap"]
