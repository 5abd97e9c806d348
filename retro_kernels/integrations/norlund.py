"""Norlund et al.'s RETRO (github.com/TobiasNorlund/retro): what `swap` replaces there, and how its weights map to a
`Retro`.

T5's ways: no biases, unscaled logits, learned biases by distance in every attention, gated feed-forwards. The decoder's
distances count back from 0, the encoder's both ways, those of chunked cross-attention run on through all neighbours.
Its RMS norms add eps to the root; its padding token is masked, in neighbours here too, in the sequence only there.
Layers count from 0. `qkv_proj` rows are [q | k | v], `kv_proj` rows [k | v].

Each of its four attentions holds the norm before and the residual after it, and returns its scores besides, which a
fused one does not know: None. Masks add -10000, so a row that sees nothing sees everything, except in chunked
cross-attention, where its chunk gets 0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..models.config import RetroConfig
from ..nn.positions import t5_buckets
from ..ops.chunked_cross_attention import chunked_cross_attention
from ..ops.compiling import readable
from ..ops.neighbour_attention import neighbour_cross_attention, neighbour_self_attention
from ..ops.verification.classes import Class, tile
from .base import (
    FusedForward,
    Looked,
    class_names,
    describe_change,
    describe_unevenness,
    is_changed,
    is_foreign,
    random_text,
    warn_once,
)
from .tensors import Tensors

NAME = "norlund"
VERSION = "github.com/TobiasNorlund/retro @ 6945cdd"
CCA, CROSS = "RetroChunkedCrossAttention", "RetroCrossAttention"
DECODER, ENCODER = SELF = ("RetroDecoderSelfAttention", "RetroEncoderSelfAttention")
ATTENTIONS = (CCA, CROSS, *SELF)
LOOKS_FOR = tuple(f"modeling_retro.{name}" for name in ATTENTIONS)
EXPRESSED = "rk.nn.ChunkedCrossAttention.norlund and rk.nn.NeighbourEncoder.norlund express Norlund's"
PARTS = {False: {"ln", "q_proj", "kv_proj", "multi_head_attention"}, True: {"ln", "qkv_proj", "multi_head_attention"}}
KNOWN_SOURCES = {
    "RetroChunkedCrossAttention.forward": "cfb1a08a08e14d412cfd5aa08a07be3587d59fe22620fe3b9d49acd1d5752c03",
    "RetroCrossAttention.forward": "97d657a5ed042d42fb46a5eccaeee8137bac62693e693cf52b2f877ffc3aa604",
    "RetroDecoderSelfAttention.forward": "68dbe4b66d9e0f864db5fd0759ef4e753edddd1f86db17fac399b8b3243c295c",
    "RetroEncoderSelfAttention.forward": "81b173ac0435863787102957be59bdef1120dc4f926de4191907c4185afd0c1d",
    "MultiHeadAttention.forward": "f3b12a6cdddd685e8cc1820cd30186e6a5c29ee87a8b99912735c6e8e897dbbe",
    "RelativePositionBias.forward": "af9053120d5f404c956b68feb2b5fb55a3ed36c3806295931bbdb2beaf1fc49d",
    "RetroFeedForward.forward": "6649f823235da28608a22d39d4cbf2aa3b4618ef1ee2cf2bdaa75d8980662dce",
    "RMSNorm.forward": "5b1970273664b5de9a891dafd8aa5d2140f165731fa0da072b6814d8e2b69f41",
    "RetroEncoder.forward": "930cee30b86c6038a045028b740280ab3d3d7d25e15f75f42c6551b4cc4a0829",
    "RetroModel.forward": "fed4b10d2853f2c0c340dee9d19842fa2282ffa18c396f31af22d27c3b87fe3c",
    "RetroModelLMHead.forward": "2d0c1bcf2cde9082182aeb91be92e12563a79c8168f51b3f087b211c903a8b40",
}
UNTOLD = ("pad_token_id", "num_neighbours", "retrieved_length", "dropout", "hidden_dropout", "feed_forward_dropout")
ACTIVATION = "NewGELUActivation"  # of transformers
COMMON = {"chunk_size": "model", "num_heads": "half", "eps": "model", "p": "class"}
"""What its constructor gives to all layers alike, and whoever changes a layer may not."""

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


def probe(model: Any, length: int | None) -> Callable[[nn.Module], torch.Tensor]:
    """A call of it on `random_text` -> logits."""
    m, vocab_size = model.config.chunk_size, model.config.num_embeddings
    tokens, neighbours = random_text(model, vocab_size, m, length, 5 * m, whole=False, k=2, r=2 * m)
    return lambda one: one(tokens, neighbours).logits


def is_weights(names: Mapping[str, Any]) -> bool:
    return {"base.dec_embs.weight", "base.final_layer_norm.scale", "lm_head.weight"} <= names.keys()


def describe(model: Any) -> dict[str, Any]:
    """As `retro_pytorch.describe`."""
    reason = None
    for name, part in model.named_modules():
        kinds = [x.rpartition(".")[2] for x in class_names(part)]
        kind = next((x for x in kinds if f"{x}.forward" in KNOWN_SOURCES), None)
        if kind is None and reason is None and is_foreign(part) and type(part).__name__ != ACTIVATION:
            reason = f"{name} is a {type(part).__qualname__}, which it has not"
        if kind is not None and reason is None:
            known = KNOWN_SOURCES[f"{kind}.forward"]
            reason = describe_change(f"{kind}.forward", type(part).forward, known, VERSION)
            if kind == "RetroFeedForward" and type(part.gelu_act).__name__ != ACTIVATION:
                reason = f"gelu_act of {name} is a {type(part.gelu_act).__name__}, expected {ACTIVATION}"
            if kind == "RMSNorm" and (part.eps, part.p, part.bias) != (1e-8, -1.0, False):
                reason = f"{name} has eps = {part.eps}, p = {part.p}, bias = {part.bias}, expected 1e-8, -1.0, False"
    reason = reason or describe_unevenness(model.base, COMMON)
    if reason is not None:
        raise ValueError(f"source: got a {type(model).__name__}, expected one of {VERSION}, but {reason}")
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


def kind_of(module: nn.Module) -> str | None:
    """The name of the attention there that the module is of, or derives from. Its file belongs to no package."""
    names = [name.rpartition(".")[2] for name in class_names(module)]
    return next((name for name in names if name in ATTENTIONS), None)


def recognises(module: nn.Module) -> bool:
    return kind_of(module) is not None


def refusal(module: Any) -> str | None:
    kind = str(kind_of(module))
    found, parts = dict(module.named_children()).keys(), PARTS[kind in SELF]
    if found != parts:
        theirs = ", ".join(sorted(found)) or "none"
        return f"its parts are {theirs}, those of {VERSION} {', '.join(sorted(parts))}; {EXPRESSED}"
    inner = module.multi_head_attention
    bias = inner.positional_bias
    checked = {
        f"{kind}.forward": type(module).forward,
        "MultiHeadAttention.forward": type(inner).forward,
        "RelativePositionBias.forward": type(bias).forward,
    }
    for name, function in checked.items():
        reason = describe_change(name, function, KNOWN_SOURCES[name], VERSION)
        if reason is not None:
            return f"{reason}; {EXPRESSED}"
    if "forward" in vars(inner):
        return "something else has replaced forward on its multi_head_attention"
    return None


def note(module: Any) -> str | None:
    p = module.multi_head_attention.attn_dropout.p
    dropout = f"its attention dropout {p:g} is fused: the same distribution, other random numbers; " if p > 0 else ""
    return f"{dropout}it returns None in place of the attention scores, which its model does not look at"


def likely_class(module: Any) -> Class:
    kind, weight = str(kind_of(module)), next(module.parameters())
    device = weight.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    inner = getattr(module.multi_head_attention.final_proj, "in_features", None)
    d = 64 if inner is None else inner // module.num_heads
    dropout = module.multi_head_attention.attn_dropout
    options = ("dropout",) if dropout.training and dropout.p > 0 else ()
    if kind == CCA:
        rows = tile(module.chunk_size)
        return Class.of("chunked_cross_attention", (dtype, d, d, rows, 0, 0, ("bias_per_neighbour", *options)))
    operation = "neighbour_self_attention" if kind in SELF else "neighbour_cross_attention"
    causal = ("causal",) if kind == DECODER else ()
    return Class.of(operation, (dtype, d, d, 1024 if causal else 128, 0, 0, ("bias", *options, *causal)))


def fused_forward(module: nn.Module, positions: str) -> FusedForward:
    kinds = {CCA: FusedChunked, CROSS: FusedCross, DECODER: FusedDecoder, ENCODER: FusedEncoder}
    return kinds[str(kind_of(module))](module, None)


class Fused(FusedForward):
    """Norms, projections, the bias and the last dropout stay calls of the module's parts."""

    looked: Looked

    def __init_subclass__(cls) -> None:
        cls.looked = Looked()

    def __call__(self, x: torch.Tensor, *given: torch.Tensor, **named: torch.Tensor) -> tuple[torch.Tensor, Any]:
        module: Any = self.module
        found = self.attend(x, *given, **named)
        if found is None:
            return type(module).forward(module, x, *given, **named)
        return found, None

    def attend(self, x: torch.Tensor, *given: Any) -> torch.Tensor | None:
        raise NotImplementedError

    def heads(self, x: torch.Tensor, parts: int) -> tuple[torch.Tensor, ...]:
        return tuple(y.unflatten(-1, (self.module.num_heads, -1)) for y in x.chunk(parts, -1))  # type: ignore[arg-type]

    def options(self, rows: int, keys: int) -> dict[str, Any]:
        inner: Any = self.module.multi_head_attention
        dropout = inner.attn_dropout
        return {
            "attention_bias": inner.positional_bias(rows, keys),
            "scale": 1.0,
            "dropout_p": dropout.p if dropout.training else 0.0,
        }

    def project(self, out: torch.Tensor) -> torch.Tensor:
        inner: Any = self.module.multi_head_attention
        return inner.resid_dropout(inner.final_proj(out.flatten(-2)))

    def visible(self, mask: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor | None:
        """Its mask, 1 = attend, as bool; None, with a warning, where this call is its own forward's."""
        inner: Any = self.module.multi_head_attention
        if is_changed(inner) or is_changed(inner.attn_dropout, nn.Dropout):
            warn_once(f"a {kind_of(self.module)} runs its own forward, because a part of it has hooks or was changed")
            return None
        binary = lambda x: bool(((x == 0) | (x == 1)).all())  # noqa: E731
        if mask.shape != shape:
            reason = f"a mask of shape {list(mask.shape)}, expected {list(shape)}"
        elif mask.is_cpu and readable(mask) and not self.looked(mask, binary):
            reason = "a mask of other numbers than 0 and 1"
        else:
            return mask != 0
        warn_once(f"a {kind_of(self.module)} ran its own forward, not the fused one: got {reason}")
        return None


class FusedChunked(Fused):
    def attend(  # type: ignore[override]
        self, x: torch.Tensor, cca_hidden_states: torch.Tensor, cca_attention_mask: torch.Tensor
    ) -> torch.Tensor | None:
        """x [b, n, d], cca_hidden_states [b, l, k, r, e] of ceil(n / m) chunks, cca_attention_mask [b, l, k, r]."""
        module: Any = self.module
        m, n = module.chunk_size, x.shape[1]
        shape = (x.shape[0], -(-n // m), *cca_hidden_states.shape[2:4])
        if n < m or cca_hidden_states.shape[:2] != shape[:2]:
            return None
        visible = self.visible(cca_attention_mask, shape)
        if visible is None:
            return None
        (query,) = self.heads(module.q_proj(module.ln(x[:, m - 1 :])), 1)
        key, value = self.heads(module.kv_proj(cca_hidden_states), 2)
        options = self.options(m, shape[2] * shape[3])
        out: Any = chunked_cross_attention(
            query, key, value, chunk_size=m, neighbour_mask=visible, query_offset=m - 1, **options
        )
        return F.pad(self.project(out), (0, 0, m - 1, 0)) + x


class FusedCross(Fused):
    def attend(  # type: ignore[override]
        self, x: torch.Tensor, ca_hidden_states: torch.Tensor, ca_attention_mask: torch.Tensor
    ) -> torch.Tensor | None:
        """x [b, l, k, r, e], ca_hidden_states [b, l, m, d], ca_attention_mask [b, l, m]."""
        module: Any = self.module
        visible = self.visible(ca_attention_mask, tuple(ca_hidden_states.shape[:3]))
        if visible is None:
            return None
        (query,) = self.heads(module.q_proj(module.ln(x)), 1)
        key, value = self.heads(module.kv_proj(ca_hidden_states), 2)
        options = self.options(x.shape[3], key.shape[2])
        out: Any = neighbour_cross_attention(query, key, value, activation_mask=_all_where_none(visible), **options)
        return self.project(out) + x


class FusedEncoder(Fused):
    def attend(self, x: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor | None:  # type: ignore[override]
        """x [b, l, k, r, e], attention_mask [b, l, k, r]."""
        module: Any = self.module
        visible = self.visible(attention_mask, tuple(x.shape[:4]))
        if visible is None:
            return None
        query, key, value = self.heads(module.qkv_proj(module.ln(x)), 3)
        options = self.options(x.shape[3], x.shape[3])
        out: Any = neighbour_self_attention(query, key, value, neighbour_mask=_all_where_none(visible), **options)
        return self.project(out) + x


class FusedDecoder(Fused):
    begins = Looked()

    def attend(self, x: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor | None:  # type: ignore[override]
        """x [b, n, d], attention_mask [b, n]."""
        module: Any = self.module
        visible = self.visible(attention_mask, tuple(x.shape[:2]))
        if visible is None:
            return None
        if readable(attention_mask) and not self.begins(attention_mask, lambda y: bool((y[:, :1] != 0).all())):
            # A row that sees padding alone sees the future there, as both are hidden by the same finite number.
            warn_once("a RetroDecoderSelfAttention ran its own forward, not the fused one: got padding on the left")
            return None
        query, key, value = (y[:, None, None] for y in self.heads(module.qkv_proj(module.ln(x)), 3))
        options = self.options(x.shape[1], x.shape[1])
        out: Any = neighbour_self_attention(
            query, key, value, neighbour_mask=visible[:, None, None], causal=True, **options
        )
        return self.project(out[:, 0, 0]) + x


def _all_where_none(visible: torch.Tensor) -> torch.Tensor:
    """The same finite number on every logit of a row hides none: where nothing is visible, all of it is."""
    return visible | ~visible.any(-1, keepdim=True)
