"""labml's annotated RETRO (`labml_nn.transformers.retro`), which PyPI's `retro-transformer` 1.0.3 copies: what `swap`
replaces there, and how its weights map to a `Retro`.

Its three attentions hold the norm before and the residual after them. Rotary positions turn whole heads, in
self-attention alone; nothing is masked; there is no dropout. Layers count from 0, and cross-attention layers lie in
lists by their order. The decoder has no norm at its end; `norm_e`, a part of the decoder, is the encoder's last.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..models.config import RetroConfig
from ..ops.chunked_cross_attention import chunked_cross_attention
from ..ops.neighbour_attention import neighbour_cross_attention, neighbour_self_attention
from ..ops.verification.classes import Class, tile
from . import base
from .base import FusedForward, describe_change, describe_unevenness, is_changed, random_text, warn_once
from .tensors import Tensors, plain_name

NAME = "labml"
VERSION = "retro-transformer 1.0.3 and labml-nn 0.5.1"
MODULES = ("retro_transformer.model.", "labml_nn.transformers.retro.model.")
ATTENTIONS = ("ChunkedCrossAttention", "CrossAttention", "SelfAttention")
LOOKS_FOR = tuple(f"{module}{name}" for module in MODULES for name in ATTENTIONS)

KNOWN_SOURCES = {
    "RotaryPositionalEmbeddings.forward": "e92c9852f5bba89e1279e120570db442117ceeaef9e1bc4ade00621fe9486da8",
    "SelfAttention.forward": "62de1c27410bc04a30c95227bc78ca924175d641d6d0bffa60324b29074f97eb",
    "SelfAttention.mask_attention": "4fe98a686260d5ea43791094fd53578802fcb7efea8d403b5268327be8de0038",
    "CrossAttention.forward": "975a26c73aa7dc1404b817469b3fd614f654b28c0cc882758ab2ef487219f605",
    "ChunkedCrossAttention.forward": "1a0898a1dd6cc506d67da182c42f96c329f48c7f6650e16c10a0d28136218fd3",
    "FeedForward.forward": "b4a56380f471ee2d76fdff01bfa7f1e5d6adfc097d7d866984f8ac5abb979e86",
    "NearestNeighborEncoder.forward": "d4eb67cf4fbed1fae1f523a84496b9756fb1f393526bc79618544d1a6578446e",
    "RetroModel.forward": "dbbb8319c512f3c79d62a3ca807620adbcc804ea2b5b031f40c5df182d792f28",
}
COMMON = {"chunk_len": "model", "d_k": "model", "eps": "model", "n_heads": "half", "scale": "model"}
"""What its constructor gives to all layers alike, and whoever changes a layer may not."""
PARTS = {"query", "key", "value", "norm", "softmax", "output"}

# The dialect; sizes: `convert`.
PRESET: dict[str, Any] = {
    "tied_embeddings": False,
    "readout_bias": True,
    "shared_embeddings": True,
    "positions": "none",
    "self_positions": "rotary",
    "encoder_positions": "rotary",
    "attention_biases": True,
    "feed_forward_biases": True,
    "activation": "relu",
    "norm": "layer",
    "norm_eps": 1e-5,
    "final_norm": False,
    "encoder_context_norm": True,
}


def kind_of(module: nn.Module) -> str | None:
    """The name of the class there that the module is of, or derives from."""
    return base.kind_of(module, MODULES, KNOWN_SOURCES)


def recognises(module: nn.Module) -> bool:
    return kind_of(module) in ATTENTIONS


def refusal(module: nn.Module) -> str | None:
    kind = str(kind_of(module))
    parts = PARTS | ({"rotary_pe"} if kind == "SelfAttention" else set())
    found = dict(module.named_children()).keys()
    if found != parts or any(True for _ in module.parameters(recurse=False)):
        return f"its parts are {', '.join(sorted(found)) or 'none'}, those of {VERSION} {', '.join(sorted(parts))}"
    for name in ("n_heads", "d_k", *(["chunk_len"] if kind == "ChunkedCrossAttention" else [])):
        if not isinstance(getattr(module, name, None), int):
            return f"{name} is {getattr(module, name, None)!r}, expected an int"
    if not isinstance(module.softmax, nn.Softmax) or module.softmax.dim != -1:
        return f"softmax is {module.softmax}, expected nn.Softmax(dim=-1)"
    return _change(module, kind)


def _change(module: Any, kind: str) -> str | None:
    reason = _describe(f"{kind}.forward", type(module).forward)
    if reason is None and kind == "SelfAttention":
        reason = _describe("SelfAttention.mask_attention", type(module).mask_attention)
        reason = reason or _describe("RotaryPositionalEmbeddings.forward", type(module.rotary_pe).forward)
    return reason


def _describe(name: str, function: Any) -> str | None:
    return describe_change(name, function, KNOWN_SOURCES.get(name), VERSION)


def note(module: nn.Module) -> str | None:
    return None


def likely_class(module: Any) -> Class:
    weight = next(module.parameters())
    device, d = weight.device.type, module.d_k
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    if kind_of(module) == "ChunkedCrossAttention":
        return Class.of("chunked_cross_attention", (dtype, d, d, tile(module.chunk_len), 0, 0, ()))
    if kind_of(module) == "CrossAttention":
        return Class.of("neighbour_cross_attention", (dtype, d, d, 128, 0, 0, ()))
    causal = ("causal",) if module.is_causal else ()
    rows = 1024 if causal else 128
    return Class.of("neighbour_self_attention", (dtype, d, d, rows, 0, 0, ("rotary", *causal)))


def fused_forward(module: nn.Module, positions: str) -> FusedForward:
    kinds = {"ChunkedCrossAttention": FusedChunked, "CrossAttention": FusedCross, "SelfAttention": FusedSelf}
    return kinds[str(kind_of(module))](module, None)


class Fused(FusedForward):
    """Projections, norm and residual stay calls of the module's parts."""

    def heads(self, name: str, x: torch.Tensor) -> torch.Tensor:
        module: Any = self.module
        return getattr(module, name)(x).unflatten(-1, (module.n_heads, module.d_k))

    def own(self, *arguments: torch.Tensor) -> torch.Tensor | None:
        """What the module's own forward gives, where a hook sits on what the fused one bypasses."""
        module: Any = self.module
        if not is_changed(module.softmax, nn.Softmax) and not is_changed(getattr(module, "rotary_pe", module.softmax)):
            return None
        warn_once(f"a {type(module).__name__} runs its own forward, because a part of it has hooks or was changed")
        return type(module).forward(module, *arguments)


class FusedSelf(Fused):
    def __call__(self, h: torch.Tensor) -> torch.Tensor:
        """h [B, n, d_model] -> the same, the residual added."""
        module: Any = self.module
        own = self.own(h)
        if own is not None:
            return own
        x = module.norm(h)
        query, key, value = (self.heads(name, x)[:, None, None] for name in ("query", "key", "value"))
        theta = module.rotary_pe.theta
        angles = torch.arange(h.shape[1], device=h.device).type_as(theta)[:, None] * theta
        tables = angles.cos(), angles.sin()
        if theta.dtype not in (query.dtype, torch.float32):
            tables = tables[0].float(), tables[1].float()
        out: Any = neighbour_self_attention(
            query,
            key,
            value,
            causal=module.is_causal,
            scale=module.scale,
            query_rotary=tables,
            key_rotary=tables,
        )
        return module.output(out[:, 0, 0].flatten(2)) + h


class FusedCross(Fused):
    def __call__(self, e: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
        """e [b, l, k, r, d_model], h [b, l, m, d_model], already normed -> [b, l, k, r, d_model]."""
        module: Any = self.module
        own = self.own(e, h)
        if own is not None:
            return own
        query = self.heads("query", module.norm(e))
        out: Any = neighbour_cross_attention(query, self.heads("key", h), self.heads("value", h), scale=module.scale)
        return module.output(out.flatten(-2)) + e


class FusedChunked(Fused):
    def __call__(self, h: torch.Tensor, e: torch.Tensor) -> torch.Tensor:
        """h [b, n, d_model], e [b, l, k, r, d_model] -> [b, n, d_model]."""
        module: Any = self.module
        m, n, chunks = module.chunk_len, h.shape[1], e.shape[1]
        own = self.own(h, e)
        if own is not None:
            return own
        if chunks == 0:
            return h
        if n < m or not n - (m - 1) <= chunks * m:
            warn_once(f"a call ran labml's own forward, not the fused one: {chunks} chunks of {m} for {n} tokens")
            return type(module).forward(module, h, e)
        out: Any = chunked_cross_attention(
            self.heads("query", module.norm(h[:, m - 1 :])),
            self.heads("key", e),
            self.heads("value", e),
            chunk_size=m,
            scale=module.scale,
            query_offset=m - 1,
        )
        return F.pad(module.output(out.flatten(2)), (0, 0, m - 1, 0)) + h


def is_model(module: nn.Module) -> bool:
    return kind_of(module) == "RetroModel"


def probe(model: Any, length: int | None) -> Callable[[nn.Module], torch.Tensor]:
    """A call of it on `random_text` -> logits."""
    m, vocab_size = model.encoder.chunk_len, model.emb.num_embeddings
    tokens, neighbours = random_text(model, vocab_size, m, length, 4 * m, whole=True, k=2, r=2 * m)
    return lambda one: one(tokens, neighbours)


def is_weights(names: Mapping[str, Any]) -> bool:
    return {"emb.weight", "read.weight", "norm_e.weight", "attn.0.rotary_pe.theta"} <= names.keys()


def describe(model: Any) -> dict[str, Any]:
    """As `retro_pytorch.describe`."""
    for name, module in model.named_modules():
        kind = kind_of(module) or (type(module).__qualname__ if base.is_foreign(module) else None)
        if kind is None:
            continue
        reason = refusal(module) if kind in ATTENTIONS else _change(module, kind)
        if kind == "SelfAttention" and reason is None and module.is_causal == plain_name(name).startswith("encoder."):
            reason = f"is_causal is {module.is_causal}"
        if kind == "FeedForward" and reason is None and type(module.act) is not nn.ReLU:
            reason = f"act is a {type(module.act).__name__}, expected nn.ReLU"
        if reason is not None:
            raise ValueError(f"source: of {name or 'it'}, {reason}")
    reason = describe_unevenness(model, COMMON)
    if reason is not None:
        raise ValueError(f"source: got a {type(model).__name__}, expected one of {VERSION}, but {reason}")
    own, encoder = model.attn[0], model.encoder
    found = {
        "attention_scale": own.scale,
        "cross_attention_layers": tuple(sorted(p + 1 for p in model.ca_layers)),
        "encoder_cross_attention_layers": tuple(sorted(p + 1 for p in encoder.ca_layers)),
        "chunk_size": encoder.chunk_len,
        "norm_eps": own.norm.eps,
    }
    return found


def convert(tensors: Tensors, options: dict[str, Any]) -> tuple[RetroConfig, dict[str, torch.Tensor]]:
    """As `retro_pytorch.convert`. Of a state dict alone the caller must say `chunk_size`, `cross_attention_layers` and
    `encoder_cross_attention_layers`, here counted from 1."""
    for name in ("chunk_size", "cross_attention_layers", "encoder_cross_attention_layers"):
        if name not in options:
            counted = ", its ca_layers counted from 1" if name != "chunk_size" else ""
            raise ValueError(
                f"{name}: got none, which labml's weights do not tell, expected the model's{counted}: give it"
            )
    vocab_size, d = tensors.shape("emb.weight")
    layers, encoder_layers = tensors.count("attn.{}."), tensors.count("encoder.attn.{}.")
    thetas = [
        tensors.take(f"{part}attn.{i}.rotary_pe.theta").float()
        for part, count in (("", layers), ("encoder.", encoder_layers))
        for i in range(count)
    ]
    if any(not torch.equal(theta, thetas[0]) for theta in thetas):
        raise ValueError(
            f"{tensors.source}: got rotary frequencies (theta) that differ between layers, expected one set"
        )
    d_k = 2 * len(thetas[0])
    frequencies = None
    if not torch.equal(thetas[0].cpu(), 1.0 / (10000 ** (torch.arange(0, d_k, 2).float() / d_k))):
        frequencies = tuple(thetas[0].tolist())
    config = RetroConfig(
        **{
            **PRESET,
            "vocab_size": vocab_size,
            "model_dim": d,
            "num_layers": layers,
            "num_heads": tensors.shape("attn.0.query.weight")[0] // d_k,
            "head_dim": d_k,
            "feed_forward_dim": tensors.shape("ffw.0.lin1.weight")[0],
            "encoder_dim": d,
            "encoder_layers": encoder_layers,
            "encoder_heads": tensors.shape("encoder.attn.0.query.weight")[0] // d_k,
            "encoder_head_dim": d_k,
            "encoder_feed_forward_dim": tensors.shape("encoder.ffw.0.lin1.weight")[0],
            "rotary_frequencies": frequencies,
            **options,
        }
    )
    weights: dict[str, torch.Tensor] = {}

    def attention(theirs: str, ours: str, norm: str) -> None:
        for their, our in (("query", "w_query"), ("key", "w_key"), ("value", "w_value"), ("output", "w_out")):
            tensors.move(f"{theirs}.{their}", f"{ours}.{our}", weights)
        tensors.move(f"{theirs}.norm", norm, weights)

    tensors.move("emb", "embedding", weights)
    tensors.move("read", "readout", weights)
    tensors.move("norm_e", "encoder.final_norm", weights)
    tensors.move("encoder.norm_h", "encoder.context_norm", weights)
    for theirs, crossing, ours, cross, chosen, count in (
        ("", "cca", "blocks", "cross_attention", config.cross_attention_layers, layers),
        ("encoder.", "ca", "encoder.layers", "cross_attention", config.encoder_cross_attention_layers, encoder_layers),
    ):
        for i in range(count):
            attention(f"{theirs}attn.{i}", f"{ours}.{i}.self_attention", f"{ours}.{i}.self_norm")
            if i + 1 in chosen:
                place = chosen.index(i + 1)
                attention(f"{theirs}{crossing}.{place}", f"{ours}.{i}.{cross}", f"{ours}.{i}.cross_norm")
            tensors.move(f"{theirs}ffw.{i}.norm", f"{ours}.{i}.feed_forward_norm", weights)
            tensors.move(f"{theirs}ffw.{i}.lin1", f"{ours}.{i}.feed_forward.w_in", weights)
            tensors.move(f"{theirs}ffw.{i}.lin2", f"{ours}.{i}.feed_forward.w_out", weights)
    return config, weights
