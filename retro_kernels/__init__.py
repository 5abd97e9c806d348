"""Fused kernels for retrieval-enhanced transformers (RETRO, arXiv 2112.04426)."""

from importlib.metadata import PackageNotFoundError, version

from .ops.backends import BackendStatus
from .ops.chunked_cross_attention import backends, chunked_cross_attention

try:
    __version__ = version("retro_kernels")
except PackageNotFoundError:  # run from a source tree that was never installed
    __version__ = "0.0.0+uninstalled"

__all__ = ["BackendStatus", "backends", "chunked_cross_attention"]
