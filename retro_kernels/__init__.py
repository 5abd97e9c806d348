"""Fused kernels for retrieval-enhanced transformers (RETRO, arXiv 2112.04426)."""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import models, nn, retrieval
    from .integrations.retrofit import RetrofitReport, retrofit
    from .integrations.swap import SwapReport, swap
    from .ops.backends import BackendStatus, backends
    from .ops.chunked_cross_attention import chunked_cross_attention
    from .ops.decode import chunked_cross_attention_decode, projected_chunked_cross_attention_decode
    from .ops.explanation import Explanation, explain
    from .ops.join_attention import join_attention
    from .ops.neighbour_attention import neighbour_cross_attention, neighbour_self_attention
    from .ops.projected import projected_chunked_cross_attention

try:
    __version__ = version("retro_kernels")
except PackageNotFoundError:  # run from a source tree that was never installed
    __version__ = "0.0.0+uninstalled"

__all__ = [
    "BackendStatus",
    "Explanation",
    "RetrofitReport",
    "SwapReport",
    "backends",
    "chunked_cross_attention",
    "chunked_cross_attention_decode",
    "explain",
    "join_attention",
    "models",
    "neighbour_cross_attention",
    "neighbour_self_attention",
    "nn",
    "projected_chunked_cross_attention",
    "projected_chunked_cross_attention_decode",
    "retrieval",
    "retrofit",
    "swap",
]

# Where each public name is; the subpackages `models` and `nn` are names of their own.
_SOURCES = {
    ".integrations": ("RetrofitReport", "SwapReport", "retrofit", "swap"),
    ".ops.backends": ("BackendStatus", "backends"),
    ".ops.chunked_cross_attention": ("chunked_cross_attention",),
    ".ops.decode": ("chunked_cross_attention_decode", "projected_chunked_cross_attention_decode"),
    ".ops.explanation": ("Explanation", "explain"),
    ".ops.join_attention": ("join_attention",),
    ".ops.neighbour_attention": ("neighbour_cross_attention", "neighbour_self_attention"),
    ".ops.projected": ("projected_chunked_cross_attention",),
}
_broken: Exception | None = None
_loaded = False


def _load() -> None:
    """Imports everything but the database, which most users of the kernels have none of. What is broken is kept:
    `retro-kernels doctor` must still start and say what it is."""
    global _broken, _loaded
    found: dict[str, Any] = {}
    try:
        for name in ("models", "nn"):
            found[name] = import_module(f".{name}", __name__)
        for source, names in _SOURCES.items():
            module = import_module(source, __name__)
            found |= {name: getattr(module, name) for name in names}
    except Exception as error:
        _broken = error
    else:
        globals().update(found)
    _loaded = True


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'retro_kernels' has no attribute {name!r}")
    if name == "retrieval" and _broken is None:
        return import_module(".retrieval", __name__)
    if not _loaded:
        _load()
    if _broken is None:
        return globals()[name]
    raise ImportError(
        f"retro_kernels.{name} cannot be used: importing the package failed with {type(_broken).__name__}: "
        f"{_broken}. `retro-kernels doctor` says what is installed and what is broken."
    ) from _broken


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


# The command line shows its help without torch. Who has torch, and may soon compile or trace, gets everything now.
if "torch" in sys.modules:
    _load()
