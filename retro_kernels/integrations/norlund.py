"""Norlund et al.'s RETRO (github.com/TobiasNorlund/retro): how its weights map to a `Retro`.

T5's ways: no biases, unscaled logits, learned biases by distance in every attention, gated feed-forwards. The decoder's
distances count back from 0, the encoder's both ways, those of chunked cross-attention run on through all neighbours.
Its RMS norms add eps to the root; its padding token is masked, in neighbours here too, in the sequence only there.
Layers count from 0. `qkv_proj` rows are [q | k | v], `kv_proj` rows [k | v].
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..models.config import RetroConfig
from ..nn.positions import t5_buckets
from .base import class_names
from .tensors import Tensors

NAME = "norlund"


# The dialect; sizes: `convert`.
PRESET: dict[str, Any] = {
    "positions": "bias",
    "attention_scale": 1.0,
    "gated_feed_forward": True,
    "activation": "gelu_tanh",
    "norm_eps": 1e-16,
    "encoder_final_norm": False,
    "tied_embeddings": False,
}


def is_model(module: nn.Module) -> bool:
    """Whether it is its language model: by name and parts, as the file that defines it belongs to no package."""
    names = {name.rpartition(".")[2] for name in class_names(module)}
    return "RetroModelLMHead" in names and hasattr(module, "base") and hasattr(module, "lm_head")


def is_weights(names: Mapping[str, Any]) -> bool:
    return {"base.dec_embs.weight", "base.final_layer_norm.scale", "lm_head.weight"} <= names.keys()


def describe(model: Any) -> dict[str, Any]:
    config = model.config
    return {
        "chunk_size": config.chunk_size,
        "pad_token_id": config.pad_token_idx,
        "num_heads": config.dec_num_heads,
        "encoder_heads": config.enc_num_heads,
        "dropout": config.dropout_p,
        "hidden_dropout": config.dropout_p,
        "feed_forward_dropout": config.dropout_p,
    }


def convert(tensors: Tensors, options: dict[str, Any]) -> tuple[RetroConfig, dict[str, torch.Tensor]]:
    """As `retro_pytorch.convert`. Of a state dict alone the caller must say `chunk_size` (64 in the released model).
    `num_neighbours` and `retrieved_length` are those of every call, since the biases count through all neighbours."""
    if "chunk_size" not in options:
        raise ValueError("chunk_size: got none, which Norlund's weights do not tell, expected the model's: give it")
    layers, encoder_layers = tensors.count("base.decoder.{}."), tensors.count("base.encoder.layers.{}.")
    vocab_size, d = tensors.shape("base.dec_embs.weight")
    e = tensors.shape("base.encoder.enc_embs.weight")[1]
    table = "multi_head_attention.positional_bias.relative_attention_bias.weight"

    def crossing(pattern: str, count: int) -> tuple[int, ...]:
        return tuple(i + 1 for i in range(count) if pattern.format(i) in tensors)

    cross = crossing("base.decoder.{}.1.ln.scale", layers)
    encoder_cross = crossing("base.encoder.layers.{}.1.ln.scale", encoder_layers)
    heads = tensors.shape(f"base.decoder.0.0.{table}")[1]
    encoder_heads = tensors.shape(f"base.encoder.layers.0.0.{table}")[1]
    shared = torch.equal(tensors.look("base.dec_embs.weight"), tensors.look("base.encoder.enc_embs.weight"))
    tied = torch.equal(tensors.look("base.dec_embs.weight"), tensors.look("lm_head.weight"))
    config = RetroConfig(
        **{
            **PRESET,
            "vocab_size": vocab_size,
            "model_dim": d,
            "num_layers": layers,
            "num_heads": heads,
            "head_dim": tensors.shape("base.decoder.0.0.qkv_proj.weight")[0] // (3 * heads),
            "feed_forward_dim": tensors.shape("base.decoder.0.2.wi_0.weight")[0],
            "cross_attention_layers": cross,
            "encoder_dim": e,
            "encoder_layers": encoder_layers,
            "encoder_heads": encoder_heads,
            "encoder_head_dim": tensors.shape("base.encoder.layers.0.0.qkv_proj.weight")[0] // (3 * encoder_heads),
            "encoder_feed_forward_dim": tensors.shape("base.encoder.layers.0.2.wi_0.weight")[0],
            "encoder_cross_attention_layers": encoder_cross,
            "self_num_buckets": tensors.shape(f"base.decoder.0.0.{table}")[0],
            "cross_num_buckets": tensors.shape(f"base.decoder.{cross[0] - 1}.1.{table}")[0],
            "encoder_num_buckets": tensors.shape(f"base.encoder.layers.0.0.{table}")[0],
            "encoder_cross_num_buckets": (
                tensors.shape(f"base.encoder.layers.{encoder_cross[0] - 1}.1.{table}")[0] if encoder_cross else None
            ),
            "encoder_positions": "bias",
            "encoder_cross_positions": "bias" if encoder_cross else "none",
            "shared_embeddings": shared,
            "tied_embeddings": tied,
            "pad_token_id": 0,
            **options,
        }
    )
    weights = {"embedding.weight": tensors.take("base.dec_embs.weight")}
    neighbours = tensors.take("base.encoder.enc_embs.weight")
    readout = tensors.take("lm_head.weight")
    if not shared:
        weights["encoder_embedding.weight"] = neighbours
    if not tied:
        weights["readout.weight"] = readout
    weights["final_norm.weight"] = tensors.take("base.final_layer_norm.scale")

    def attention(theirs: str, ours: str, norm: str) -> None:
        weights[f"{norm}.weight"] = tensors.take(f"{theirs}.ln.scale")
        if f"{theirs}.qkv_proj.weight" in tensors:
            parts = tensors.take(f"{theirs}.qkv_proj.weight").chunk(3)
        else:
            parts = (tensors.take(f"{theirs}.q_proj.weight"), *tensors.take(f"{theirs}.kv_proj.weight").chunk(2))
        for part, x in zip(("query", "key", "value"), parts):
            weights[f"{ours}.w_{part}.weight"] = x
        weights[f"{ours}.w_out.weight"] = tensors.take(f"{theirs}.multi_head_attention.final_proj.weight")
        weights[f"{ours}.attention_bias"] = tensors.take(f"{theirs}.{table}").t()

    def layer(theirs: str, ours: str, crosses: bool) -> None:
        attention(f"{theirs}.0", f"{ours}.self_attention", f"{ours}.self_norm")
        if crosses:
            attention(f"{theirs}.1", f"{ours}.cross_attention", f"{ours}.cross_norm")
        weights[f"{ours}.feed_forward_norm.weight"] = tensors.take(f"{theirs}.2.layer_norm.scale")
        for their, our in (("wi_0", "w_gate"), ("wi_1", "w_in"), ("wo", "w_out")):
            weights[f"{ours}.feed_forward.{our}.weight"] = tensors.take(f"{theirs}.2.{their}.weight")

    m, k, r = config.chunk_size, config.num_neighbours, config.retrieved_length or 0
    for i in range(layers):
        layer(f"base.decoder.{i}", f"blocks.{i}", i + 1 in cross)
        if i + 1 in cross:
            buckets = t5_buckets(m, k * r, config.cross_num_buckets or 1, device=readout.device)
            weights[f"blocks.{i}.cross_attention.bias_buckets"] = buckets
    for i in range(encoder_layers):
        layer(f"base.encoder.layers.{i}", f"encoder.layers.{i}", i + 1 in encoder_cross)
    return config, weights
