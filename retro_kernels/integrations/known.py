"""Modules that `swap` knows and does not replace, and what serves there instead."""

from __future__ import annotations

import re

from torch import nn

from .base import class_names

# The end of a class's qualified name -> its implementation, and what to use.
RELATIVES = {
    "Re_gptBlock": (
        "mengzi-retrieval-lm's",
        "swap does not replace it; rk.nn.ChunkedCrossAttention.retro_pytorch expresses its attention",
    ),
    "MaskedCrossAttention": (
        "Flamingo's",
        "it is of another package than open_flamingo 2.0.1 and flamingo-pytorch 0.1.2, whose swap replaces",
    ),
}
LOOKS_CHUNKED = re.compile(r"(?i:chunk(ed)?_?cross_?att)|CCA")


def advice(module: nn.Module) -> str | None:
    """What it is and what to use instead, for modules that are known, or chunked cross-attention by their names; None
    for others."""
    names = class_names(module)
    ours = next((name for name in names if name.startswith("retro_kernels.")), None)
    if ours is not None:
        short = "retro_kernels.models.Retro" if ours.endswith(".Retro") else ours
        return f"a {short}, which is fused already: there is nothing to swap"
    for name in names:
        end = name.rpartition(".")[2]
        if end in RELATIVES:
            whose, what = RELATIVES[end]
            return f"{whose} {end}: {what}"
    if any(name.startswith("transformers.modeling_utils.") for name in names):
        config = getattr(module, "config", None)
        if hasattr(module, "retro"):
            return f"a {type(module).__name__} that rk.retrofit has made a RETRO of, which is fused already"
        if not getattr(config, "is_encoder_decoder", False):
            return (
                f"a {type(module).__name__} of transformers, which is no RETRO: rk.retrofit(model) makes one of a "
                "...ForCausalLM"
            )
    if any(LOOKS_CHUNKED.search(name.rpartition(".")[2]) for name in names):
        return (
            f"{names[0]}: by its name chunked cross-attention, of an implementation that swap does not know; "
            "rk.nn.ChunkedCrossAttention expresses most (docs/layers.md), rk.chunked_cross_attention computes it"
        )
    return None
