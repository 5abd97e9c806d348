"""Fused kernels for retrieval-enhanced transformers (RETRO, arXiv 2112.04426)."""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

try:
    from . import models, nn
    from .integrations import SwapReport, swap
    from .ops.attention.run import backends
    from .ops.backends import BackendStatus
    from .ops.chunked_cross_attention import chunked_cross_attention
    from .ops.chunked_cross_attention_decode import chunked_cross_attention_decode
    from .ops.neighbour_cross_attention import neighbour_cross_attention
    from .ops.neighbour_self_attention import neighbour_self_attention
    from .ops.projected_chunked_cross_attention import Explanation, explain, projected_chunked_cross_attention
    from .ops.projected_chunked_cross_attention_decode import projected_chunked_cross_attention_decode
except Exception as error:  # whatever is broken, `retro-kernels doctor` must still start and say what it is
    _broken = error

    def __getattr__(name: str):
        if name not in __all__:
            raise AttributeError(f"module 'retro_kernels' has no attribute {name!r}")
        raise ImportError(
            f"retro_kernels.{name} cannot be used: importing the package failed with {type(_broken).__name__}: "
            f"{_broken}. `retro-kernels doctor` says what is installed and what is broken."
        ) from _broken

else:

    def __getattr__(name: str):
        # Imported when it is used: most users of the kernels have no database.
        if name == "retrieval":
            return import_module(".retrieval", __name__)
        raise AttributeError(f"module 'retro_kernels' has no attribute {name!r}")


try:
    __version__ = version("retro_kernels")
except PackageNotFoundError:  # run from a source tree that was never installed
    __version__ = "0.0.0+uninstalled"

__all__ = [
    "BackendStatus",
    "Explanation",
    "SwapReport",
    "backends",
    "chunked_cross_attention",
    "chunked_cross_attention_decode",
    "explain",
    "models",
    "neighbour_cross_attention",
    "neighbour_self_attention",
    "nn",
    "projected_chunked_cross_attention",
    "projected_chunked_cross_attention_decode",
    "retrieval",
    "swap",
]
