"""Modules that `swap` knows and does not replace, and what serves there instead."""

from __future__ import annotations

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


def advice(module: nn.Module) -> str | None:
    """What it is and what to use instead, for modules that are known; None for others."""
    names = class_names(module)
    if "retro_kernels.models.retro.Retro" in names:
        return "a retro_kernels.models.Retro, which is fused already: there is nothing to swap"
    for name in names:
        end = name.rpartition(".")[2]
        if end in RELATIVES:
            whose, what = RELATIVES[end]
            return f"{whose} {end}: {what}"
    if any(name.startswith("transformers.modeling_utils.") for name in names):
        config = getattr(module, "config", None)
        if not getattr(config, "is_encoder_decoder", False):
            return (
                f"a {type(module).__name__} of transformers, which is no RETRO: rk.retrofit(model) makes one of a "
                "...ForCausalLM"
            )
    return None
