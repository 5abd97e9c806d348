"""What a model's weights begin with where it is made of a trained decoder (appendix B.2 of the paper)."""

from __future__ import annotations

import math
import os
from typing import Any

import torch

from .retro import Retro

OF_DECODER = (
    "vocab_size",
    "model_dim",
    "num_layers",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "feed_forward_dim",
    "positions",
    "gated_feed_forward",
    "activation",
    "tied_embeddings",
    "norm_eps",
    "tokenizer",
    "embedding_dim",
    "absolute_positions",
    "self_positions",
    "rotary_dim",
    "rotary_base",
    "rotary_interleaved",
    "rotary_frequencies",
    "self_num_buckets",
    "attention_scale",
    "attention_biases",
    "feed_forward_biases",
    "qk_norm",
    "norm",
    "norm_position",
    "residual_scale",
    "final_norm",
    "readout_bias",
)


def take_decoder(model: Retro, folder: str | os.PathLike[str]) -> None:
    """Gives the model the weights of the decoder in the folder, and freezes them.

    Raises FileNotFoundError for a folder that is not there; ValueError for a decoder that would compute something else
    in this model (OF_DECODER names what has to agree), for one that has chunked cross-attention already, and for a
    model that has none.
    """
    decoder = Retro.from_pretrained(folder)
    if decoder.encoder is not None or model.encoder is None:
        which = "the decoder has" if decoder.encoder is not None else "the model has no"
        raise ValueError(f"retrofit: {which} chunked cross-attention, expected a decoder without and a model with it")
    theirs, mine = decoder.config.to_dict(), model.config.to_dict()
    different = [f"{name} = {theirs[name]!r}, not {mine[name]!r}" for name in OF_DECODER if theirs[name] != mine[name]]
    if different:
        raise ValueError(f"retrofit: the decoder in {folder} has {'; '.join(different)}; expected the model's")
    weights = decoder.state_dict()
    model.load_state_dict(weights, strict=False)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in weights)


@torch.no_grad()
def begin_with_self_attention(model: Retro) -> None:
    """Chunked cross-attention takes the weights of the self-attention of its block, the encoder those of the decoder's
    first layers: a decoder that finds in its own text what it has read before then finds it in neighbours. The
    encoder's cross-attention adds nothing at first, and gates of blocks are opened to 0.3.

    Raises ValueError where the sizes of encoder and decoder differ.
    """
    config = model.config
    encoder: Any = model.encoder
    blocks: list[Any] = list(model.blocks)
    for name, theirs, mine in (
        ("encoder_dim", config.encoder_dim, config.model_dim),
        ("encoder_heads", config.encoder_heads, config.num_heads),
        ("encoder_head_dim", config.encoder_head_dim, config.head_dim),
        ("encoder_feed_forward_dim", config.encoder_feed_forward_dim, config.feed_forward_dim),
        ("num_kv_heads", config.num_kv_heads, config.num_heads),
    ):
        if theirs != mine:
            raise ValueError(f'init: got "self_attention" with {name} = {theirs}, expected {mine}, as in the decoder')
    if config.encoder_layers > config.num_layers:
        raise ValueError(
            f'init: got "self_attention" with encoder_layers = {config.encoder_layers}, expected at most num_layers = '
            f"{config.num_layers}"
        )
    if model.encoder_embedding is not None:
        model.encoder_embedding.weight.copy_(model.embedding.weight)
    for layer, block in zip(encoder.layers, blocks):
        for name in ("self_norm", "self_attention", "feed_forward_norm", "feed_forward"):
            getattr(layer, name).load_state_dict(getattr(block, name).state_dict(), strict=False)
        if layer.cross_attention is not None:
            layer.cross_attention.w_out.weight.zero_()
    retrieving = [block for block in blocks if block.cross_attention is not None]
    for block in retrieving:
        block.cross_attention.load_state_dict(block.self_attention.state_dict(), strict=False)
        block.cross_norm.load_state_dict(block.self_norm.state_dict())
        if block.gate is not None:
            block.gate.fill_(math.atanh(0.3))
    if encoder.final_norm is not None:
        encoder.final_norm.load_state_dict(retrieving[0].self_norm.state_dict())
