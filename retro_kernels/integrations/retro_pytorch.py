"""retro-pytorch 0.3.9 (lucidrains): what `swap` replaces there, and how its weights map to `rk.nn`.

There are two swap points. `ChunkedCrossAttention`, whose weights live in its `cross_attn`, an `Attention` with a null
slot: rotary on the first min(head_dim, 32) dimensions, in halves; key positions restart for every neighbour; the null
key is not rotated; the output's bias does not reach the first m - 1 tokens; a sequence shorter than a chunk gives 0.
Its decoder hands over the rotary angles of the query positions m - 1 ... 2m - 2, and the module shifts them by m - 1
once more and fills up with zeros, so that the queries turn by the positions 2m - 2, 0, 0, ..., 0. Trained weights
embody that.

And `Attention` without a null slot, of which there are three: the encoder's self-attention, masked by padding, and its
cross-attention, unmasked, both over tensors whose batch is b * l * k neighbours; and the decoder's causal
self-attention, which its decoder never masks. Where every slot of a row is masked, its softmax is uniform over them
all: reproduced here for the bidirectional kinds. With `causal` that average would reach into the future, so a masked
call of a causal attention runs its own code.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..models.config import RetroConfig
from ..nn import ChunkedCrossAttention, NeighbourEncoder
from ..ops import checks
from ..ops.chunked_cross_attention import chunked_cross_attention
from ..ops.compiling import readable
from ..ops.neighbour_attention import neighbour_cross_attention, neighbour_self_attention
from ..ops.verification.classes import Class, tile
from . import base
from .base import (
    AS_TRAINED,
    PAPER,
    FusedForward,
    class_names,
    describe_change,
    describe_unevenness,
    is_changed,
    random_text,
    warn_once,
)
from .tensors import Tensors, plain_name

NAME = "retro-pytorch"
VERSION = "0.3.9"
MODULE = "retro_pytorch.retro_pytorch."
CCA, ATTENTION, ENCODER, MODEL = "ChunkedCrossAttention", "Attention", "Encoder", "RETRO"
LOOKS_FOR = (MODULE + CCA, MODULE + ATTENTION)

# SHA-256 of the source of each function that the fused forward stands for. Another source is not known to compute the
# same, whatever its class is called.
KNOWN_SOURCES = {
    "ChunkedCrossAttention.forward": "31b921df67926d386163ef918964b7be5b931cb86e3ca5119927416c9688478e",
    "Attention.forward": "e7c8ec289bc10667b74412b1635ed693f7858e58be6ad5c43240cc3030515952",
    "apply_rotary_pos_emb": "cf25ed2a02bddb5693861742a55582383ef4d185d72c3fc1f5d7920ab379c2a7",
    "Encoder.forward": "320f80d5009dd4129995be733ba8975fcb2c4a72a0e8e3ef3a8c49bc7aecb388",
    "PreNorm.forward": "5538f337002e91bd8e29c297ae1120d65d84f6a68c4bd4f41e535882a900eb89",
    "PostNorm.forward": "f16004422fc9e323e7c7b92ccea348d15a4883bd7f82e5555d557c3a57406de8",
    "FeedForward.forward": "a497c13e93e9480a929b39e41637489d98f5f6a0087aeedcc9717619489b4043",
    "RMSNorm.forward": "aa67bd1ec8d348e188508fe86e6f06fcf202973fc855e83d6c5778c9c249b80c",
    "RotaryEmbedding.forward": "17c518ff3bac6c385d8e32167599d3030f553ceade2f314e883610be88a3e2a0",
    "Decoder.forward": "82620e3fac38042e1ac3a31af57579e47e1ee43eb11b84b73da92394c2aed9e8",
    "RETRO.forward": "79d01a0bbc42051510f3014f21648a4705962c25b46e96c8e2608ed60e77a7ef",
    "RETRO.forward_without_retrieval": "6803426927fbe66b0d303487a441da01e47247ac45555fd7e68b8107d0fcb387",
    "rotate_half": "f2c2cc68e50fa339a232d4800fb154d7481282d39f948490f9e7c44602c086bd",
}
PARTS = {"to_q", "to_k", "to_v", "to_out", "dropout"}
NULL_SLOT = {"null_k", "null_v"}


def kind_of(module: nn.Module) -> str | None:
    """The name of the class there that the module is of, or derives from."""
    return base.kind_of(module, (MODULE,), KNOWN_SOURCES, verbatim=True)


def recognises(module: nn.Module) -> bool:
    """Whether it is a `ChunkedCrossAttention` or an `Attention` of retro-pytorch, or of a class derived from one. The
    attention with a null slot is a part of the former and not looked at by itself."""
    kind = kind_of(module)
    return kind == CCA or (kind == ATTENTION and getattr(module, "null_k", None) is None)


def refusal(module: nn.Module) -> str | None:
    """Why the module is not retro-pytorch 0.3.9's, in parts or in source; None when it is."""
    if kind_of(module) == CCA:
        return _structure(module) or _source(module)
    return _attention_structure(module, null_slot=False) or _attention_source(module)


def note(module: nn.Module) -> str | None:
    """Says what is different in training."""
    attention: Any = getattr(module, "cross_attn", module)
    p = attention.dropout.p
    return f"its attention dropout {p:g} is fused: the same distribution, other random numbers" if p > 0 else None


def likely_class(module: Any) -> Class:
    """Of the calls that it will make. (How many tokens an encoder's neighbours have, 128 in the paper, and whether it
    is the encoder's self- or cross-attention, only a call tells.)"""
    attention: Any = getattr(module, "cross_attn", module)
    weight = next(attention.parameters())
    inner = getattr(attention.to_q, "out_features", None)  # unknown where an adapter has taken the layer's place
    head_dim = 64 if inner is None else inner // attention.heads
    rotary = "rotary" if head_dim <= 32 else "rotary_partial"
    device = weight.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    dropout = ("dropout",) if attention.dropout.training and attention.dropout.p > 0 else ()
    if module is not attention:
        given = (dtype, head_dim, head_dim, tile(module.chunk_size), 0, 0, ("null", rotary, *dropout))
        return Class.of("chunked_cross_attention", given)
    causal = ("causal",) if attention.causal else ()
    given = (dtype, head_dim, head_dim, 1024 if causal else 128, 0, 0, (rotary, *causal, *dropout))
    return Class.of("neighbour_self_attention", given)


def fused_forward(module: nn.Module, positions: str) -> FusedForward:
    if kind_of(module) == CCA:
        return FusedRetroPytorch(module, positions)
    return FusedRetroPytorchAttention(module, None)


def to_layer(module: Any, positions: str = AS_TRAINED, **options: Any) -> ChunkedCrossAttention:
    """A `rk.nn.ChunkedCrossAttention` with a copy of the module's weights; `options` go to its constructor.

    Raises ValueError when the module is not retro-pytorch 0.3.9's ChunkedCrossAttention.
    """
    reason = refusal(module) if kind_of(module) == CCA else f"its class is {class_names(module)[0]}"
    if reason is not None:
        raise ValueError(f"module: got {type(module).__name__}, expected a {MODULE}{CCA} of {VERSION}, but {reason}")
    attention: Any = module.cross_attn
    weight = attention.to_q.weight
    head_dim = attention.null_k.numel() // attention.heads
    settings = {
        "context_dim": attention.to_k.in_features,
        "scale": attention.scale,
        "dropout": attention.dropout.p,
        "device": weight.device,
        "dtype": weight.dtype,
        **options,
    }
    layer = ChunkedCrossAttention.retro_pytorch(
        attention.to_q.in_features,
        num_heads=attention.heads,
        head_dim=head_dim,
        chunk_size=module.chunk_size,
        query_positions=positions,
        **settings,
    )
    state = {
        "w_query.weight": weight,
        "w_key.weight": attention.to_k.weight,
        "w_value.weight": attention.to_v.weight,
        "w_out.weight": attention.to_out.weight,
        "w_out.bias": attention.to_out.bias,
        "null_key": attention.null_k.unflatten(0, (-1, head_dim)),
        "null_value": attention.null_v.unflatten(0, (-1, head_dim)),
    }
    layer.load_state_dict(state)
    return layer.train(module.training)


def to_encoder(module: Any, *, chunk_size: int = 64, **options: Any) -> NeighbourEncoder:
    """A `rk.nn.NeighbourEncoder` with a copy of an `Encoder`'s weights, for chunks of `chunk_size` tokens; `options` go
    to its constructor. It takes neighbours as [b, l, k, r, dim] and the decoder's activations as [b, n, context_dim],
    where the module takes both by neighbour.

    Raises ValueError when the module is not retro-pytorch 0.3.9's Encoder.
    """
    reason = _parts_refusal(module) if kind_of(module) == ENCODER else f"its class is {class_names(module)[0]}"
    if reason is not None:
        raise ValueError(
            f"module: got {type(module).__name__}, expected an {MODULE}{ENCODER} of {VERSION}, but {reason}"
        )
    own = module.layers[0][0].fn
    crossing = [number for number, (_, cross, _) in enumerate(module.layers, 1) if cross is not None]
    context_dim = module.layers[crossing[0] - 1][1].fn.to_k.in_features if crossing else own.to_k.in_features
    post_norm = type(module.layers[0][0]).__name__ == "PostNorm"
    norm = module.layers[0][0].norm
    kind = {"norm": "layer", "norm_eps": norm.eps} if isinstance(norm, nn.LayerNorm) else {"norm_eps": norm.eps**2}
    if getattr(norm, "weight", None) is not None and not isinstance(norm, nn.LayerNorm):
        kind["norm"] = "gated_rms"
    if post_norm:
        kind |= {"norm_position": "post", "residual_scale": float(module.layers[0][0].scale_residual)}
    settings: dict[str, Any] = {
        "num_layers": len(module.layers),
        "context_dim": context_dim,
        "output_dim": getattr(module.project_out, "out_features", None),
        "feed_forward_dim": module.layers[0][2].fn.ff[0].out_features,
        "chunk_size": chunk_size,
        "cross_attention_layers": crossing,
        "final_norm": not isinstance(module.norm_out, nn.Identity),
        "scale": own.scale,
        "dropout": own.dropout.p,
        "feed_forward_dropout": module.layers[0][2].fn.ff[2].p,
        "device": own.to_q.weight.device,
        "dtype": own.to_q.weight.dtype,
        **kind,
        **options,
    }
    encoder = NeighbourEncoder.retro_pytorch(
        own.to_q.in_features, num_heads=own.heads, head_dim=own.to_q.out_features // own.heads, **settings
    )
    state: dict[str, torch.Tensor] = {}

    renamed_norm = {"gamma": "weight", "weight": "gate"} if hasattr(norm, "gamma") else {}

    def take(name: str, source: nn.Module, **renamed: str) -> None:
        for key, value in source.named_parameters():
            state[f"{name}.{renamed.get(key, key)}"] = value

    linear = {"to_q": "w_query", "to_k": "w_key", "to_v": "w_value", "to_out": "w_out"}
    for i, (attention, cross, feed_forward) in enumerate(module.layers):
        for kind_name, part in (("self", attention), ("cross", cross)):
            if part is not None:
                take(f"layers.{i}.{kind_name}_norm", part.norm, **renamed_norm)
                for theirs, ours in linear.items():
                    take(f"layers.{i}.{kind_name}_attention.{ours}", getattr(part.fn, theirs))
        take(f"layers.{i}.feed_forward_norm", feed_forward.norm, **renamed_norm)
        take(f"layers.{i}.feed_forward.w_in", feed_forward.fn.ff[0])
        take(f"layers.{i}.feed_forward.w_out", feed_forward.fn.ff[3])
    take("final_norm", module.norm_out, **renamed_norm)
    take("w_out", module.project_out)
    encoder.load_state_dict(state)
    return encoder.train(module.training)


# The dialect: what of a RetroConfig is the same for all of its models. (Sizes and the rest: `convert`.)
PRESET: dict[str, Any] = {
    "tied_embeddings": False,
    "readout_bias": True,
    "shared_embeddings": True,
    "absolute_positions": "decoder",
    "positions": "rotary",
    "null_slot": True,
    "attention_biases": ("out",),
    "feed_forward_biases": True,
}
DEEPNET: dict[str, Any] = {
    "norm": "layer",
    "norm_position": "post",
    "norm_eps": 1e-5,
    "final_norm": False,
    "encoder_final_norm": False,
}
HEADS = 8  # RETRO(heads=...) does not reach its layers
FEED_FORWARD = [nn.Linear, nn.GELU, nn.Dropout, nn.Linear]
UNTOLD = ("pad_token_id", "dropout", "feed_forward_dropout")
"""What its state dict does not tell and is taken for its constructor's default."""
COMMON = {
    "chunk_size": "model",
    "eps": "model",
    "heads": "half",
    "scale_residual": "half",
    "scale": "class",
    "p": "holder",
}
"""What its constructor gives to all layers alike, and whoever changes a layer may not."""
EPS = 1e-8**2  # its norms divide by at least 1e-8


def is_model(module: nn.Module) -> bool:
    """Whether it is a whole RETRO."""
    return kind_of(module) == MODEL


def probe(model: Any, length: int | None) -> Callable[[nn.Module], torch.Tensor]:
    """A call of it on `random_text` -> logits."""
    m, vocab_size = model.chunk_size, model.token_emb.num_embeddings
    tokens, neighbours = random_text(model, vocab_size, m, length, model.seq_len, whole=True, k=2, r=2 * m)
    return lambda one: one(tokens, neighbours)


def is_weights(names: Mapping[str, Any]) -> bool:
    """Whether these are the names of its state dict."""
    return {"token_emb.weight", "pos_emb.weight", "to_logits.weight", "decoder.rotary_pos_emb.inv_freq"} <= names.keys()


def describe(model: Any) -> dict[str, Any]:
    """What its state dict does not tell, as fields of a RetroConfig. Raises ValueError for another version."""
    reason = _parts_refusal(model)
    reason = reason or _describe_change("RETRO.forward_without_retrieval", type(model).forward_without_retrieval)
    ccas = [x for x in model.modules() if kind_of(x) == CCA]
    if reason is None and len({_positions_of(x) for x in ccas}) > 1:
        reason = "some of its chunked cross-attentions are swapped with other positions than the rest"
    reason = reason or describe_unevenness(model, COMMON)
    if reason is not None:
        raise ValueError(f"source: got a {type(model).__name__}, expected one of {NAME} {VERSION}, but {reason}")
    (own, _, feed_forward), (encoder_own, _, encoder_feed_forward) = model.decoder.layers[0], model.encoder.layers[0]
    m, norm = model.chunk_size, own.norm
    found = {
        "num_heads": own.fn.heads,
        "encoder_heads": encoder_own.fn.heads,
        "attention_scale": own.fn.scale,
        "chunk_size": m,
        "pad_token_id": model.pad_id,
        "norm_eps": norm.eps if isinstance(norm, nn.LayerNorm) else norm.eps**2,
        "dropout": own.fn.dropout.p,
        "feed_forward_dropout": feed_forward.fn.ff[2].p,
        "encoder_dropout": encoder_own.fn.dropout.p,
        "encoder_feed_forward_dropout": encoder_feed_forward.fn.ff[2].p,
        "cross_query_positions": shifted_twice(m),
    }
    if any(_positions_of(x) == PAPER for x in ccas):
        found["cross_query_positions"] = None
    if hasattr(own, "scale_residual"):
        found |= {
            "residual_scale": float(own.scale_residual),
            "encoder_residual_scale": float(encoder_own.scale_residual),
        }
    return found


def shifted_twice(chunk_size: int) -> tuple[float, ...]:
    """The positions 2m - 2, 0, 0, ..., 0 by which its chunked cross-attention turns the rows of a chunk."""
    return 2.0 * chunk_size - 2.0, *[0.0] * (chunk_size - 1)


def convert(tensors: Tensors, options: dict[str, Any]) -> tuple[RetroConfig, dict[str, torch.Tensor]]:
    """Its tensors, and what `describe` or the caller says besides, as a config and the weights of a `Retro`. Of a state
    dict alone the caller must say `chunk_size`."""
    if "chunk_size" not in options:
        raise ValueError(
            f"chunk_size: got none, which the weights of {NAME} do not tell, expected the model's: give it"
        )
    m = checks.integer("chunk_size", options["chunk_size"], 1)
    depth, encoder_depth = tensors.count("decoder.layers.{}."), tensors.count("encoder.layers.{}.")
    vocab_size, width = tensors.shape("token_emb.weight")
    model_dim = tensors.shape("to_logits.weight")[1]
    inner = tensors.shape("decoder.layers.0.0.fn.to_q.weight")[0]
    heads, encoder_heads = (
        checks.integer(name, options.get(name, HEADS), 1) for name in ("num_heads", "encoder_heads")
    )
    if "attention_scale" not in options and (heads, encoder_heads) != (HEADS, HEADS):
        raise ValueError(
            f"num_heads, encoder_heads: got {heads}, {encoder_heads}, expected {HEADS}, which every layer of "
            f"{NAME} {VERSION} has, whatever RETRO's argument heads was"
        )
    head_dim = inner // heads
    kind: dict[str, Any] = {"norm_eps": EPS}
    if "decoder.layers.0.0.norm.bias" in tensors:
        kind = {"norm": "layer", "norm_eps": 1e-5}
        if "decoder.norm_out.bias" not in tensors:
            kind = {
                **DEEPNET,
                "residual_scale": (3 * depth) ** 0.25,
                "encoder_residual_scale": 0.81 * (encoder_depth**4 * depth) ** 0.0625,
            }
    elif "decoder.layers.0.0.norm.weight" in tensors:
        kind["norm"] = "gated_rms"
    config = RetroConfig(
        **{
            **PRESET,
            **kind,
            "vocab_size": vocab_size,
            "embedding_dim": width,
            "model_dim": model_dim,
            "num_layers": depth,
            "num_heads": heads,
            "head_dim": head_dim,
            "feed_forward_dim": tensors.shape("decoder.layers.0.2.fn.ff.0.weight")[0],
            "cross_attention_layers": _crossing(tensors, "decoder.layers.{}.1.norm.", depth),
            "encoder_dim": width,
            "encoder_layers": encoder_depth,
            "encoder_heads": encoder_heads,
            "encoder_head_dim": inner // encoder_heads,
            "encoder_feed_forward_dim": tensors.shape("encoder.layers.0.2.fn.ff.0.weight")[0],
            "encoder_cross_attention_layers": _crossing(tensors, "encoder.layers.{}.1.norm.", encoder_depth),
            "encoder_output_dim": model_dim,
            "max_length": tensors.shape("pos_emb.weight")[0],
            "rotary_dim": 2 * tensors.shape("decoder.rotary_pos_emb.inv_freq")[0],
            "cross_query_positions": shifted_twice(m),
            "pad_token_id": 0,
            **options,
        }
    )
    for part in ("decoder", "encoder"):
        given = tensors.take(f"{part}.rotary_pos_emb.inv_freq").float().cpu()
        if not torch.allclose(given, _frequencies(2 * len(given)), rtol=1e-2):  # as far as bfloat16 tells
            raise ValueError(f"{tensors.source}: got other rotary frequencies in {part} than those of {NAME} {VERSION}")
    return config, {ours: tensors.take(theirs, shape) for theirs, ours, shape in _parameters(config)}


def export(config: RetroConfig, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The state dict of a RETRO with the function of a `Retro`; see `arguments`."""
    arguments(config)
    state = {
        theirs: weights[ours].reshape(_their_shape(ours, weights[ours])) for theirs, ours, _ in _parameters(config)
    }
    state |= {
        f"{part}.rotary_pos_emb.inv_freq": _frequencies(config.rotary_dim or 0) for part in ("decoder", "encoder")
    }
    return state


def arguments(config: RetroConfig) -> dict[str, Any]:
    """The arguments of `retro_pytorch.RETRO` for a model with the function of a `Retro`.

    Raises ValueError for a config that it cannot express, naming the first field.
    """
    deepnet = config.norm_position == "post"
    width = config.head_dim or 0
    wanted = {
        **PRESET,
        **(DEEPNET if deepnet else {"final_norm": True, "encoder_final_norm": True}),
        "norm": "layer" if deepnet else config.norm,
        "num_heads": HEADS,
        "encoder_heads": HEADS,
        "encoder_head_dim": width,
        "num_kv_heads": HEADS,
        "encoder_dim": config.embedding_dim,
        "encoder_output_dim": config.model_dim,
        "feed_forward_dim": 4 * config.model_dim,
        "encoder_feed_forward_dim": 4 * config.encoder_dim,
        "attention_scale": (None, width**-0.5),
        "rotary_dim": min(width, 32),
        "cross_query_positions": shifted_twice(config.chunk_size),
        "cross_attention_kv_heads": HEADS,
        "cross_attention_biases": ("out",),
        "hidden_dropout": 0.0,
        "embedding_dropout": 0.0,
        "encoder_hidden_dropout": 0.0,
        "activation": "gelu",
        "pad_token_id": range(config.vocab_size),
        "norm_eps": 1e-5 if config.norm == "layer" else EPS,
    }
    defaults = {field.name: field.default for field in dataclasses.fields(RetroConfig)}
    wanted |= {name: defaults[name] for name in OTHERWISE_PLAIN}
    for name, expected in wanted.items():
        given = getattr(config, name)
        if given not in expected if isinstance(expected, (range, tuple)) and name in LISTED else given != expected:
            raise ValueError(f"config: got {name} = {given!r}, which {NAME} has not, expected {expected!r}")
    if width < 32:
        raise ValueError(f"config: got head_dim = {width}, which {NAME} has not, expected at least 32")
    return {
        "num_tokens": config.vocab_size,
        "max_seq_len": config.max_length,
        "enc_dim": config.encoder_dim,
        "enc_depth": config.encoder_layers,
        "enc_cross_attn_layers": config.encoder_cross_attention_layers,
        "dec_dim": config.model_dim,
        "dec_depth": config.num_layers,
        "dec_cross_attn_layers": config.cross_attention_layers,
        "dim_head": width,
        "enc_attn_dropout": config.encoder_dropout,
        "enc_ff_dropout": config.encoder_feed_forward_dropout,
        "dec_attn_dropout": config.dropout,
        "dec_ff_dropout": config.feed_forward_dropout,
        "chunk_size": config.chunk_size,
        "pad_id": config.pad_token_id,
        "norm_klass": nn.LayerNorm if config.norm == "layer" and not deepnet else None,
        "gated_rmsnorm": config.norm == "gated_rms",
        "use_deepnet": deepnet,
        **(
            {"enc_scale_residual": config.encoder_residual_scale, "dec_scale_residual": config.residual_scale}
            if deepnet
            else {}
        ),
    }


# Fields that it has no choice in beyond PRESET, and those of `arguments` of which several values will do.
OTHERWISE_PLAIN = (
    "gated_feed_forward",
    "cross_attention_gate",
    "self_positions",
    "cross_positions",
    "encoder_positions",
    "encoder_cross_positions",
    "rotary_base",
    "rotary_interleaved",
    "rotary_frequencies",
    "qk_norm",
    "encoder_conditioning",
    "encoder_context_norm",
    "encoder_cross_residual",
    "align",
    "partial_chunk",
)
LISTED = ("attention_scale", "pad_token_id")


def _parameters(config: RetroConfig) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """(name there, name in a `Retro`, shape in it) of every parameter."""
    d, e, h, w = config.model_dim, config.encoder_dim, config.num_heads, config.head_dim or 0
    inner, encoder_inner = h * w, config.encoder_heads * config.encoder_head_dim

    def norm(theirs: str, ours: str, width: int) -> Iterator[tuple[str, str, tuple[int, ...]]]:
        names = {"rms": {"gamma": "weight"}, "gated_rms": {"gamma": "weight", "weight": "gate"}}
        for their, our in names.get(config.norm, {"weight": "weight", "bias": "bias"}).items():
            yield f"{theirs}.{their}", f"{ours}.{our}", (width,)

    def linear(theirs: str, ours: str, inputs: int, outputs: int, bias: bool = True):
        yield f"{theirs}.weight", f"{ours}.weight", (outputs, inputs)
        if bias:
            yield f"{theirs}.bias", f"{ours}.bias", (outputs,)

    def attention(theirs: str, ours: str, width: int, source: int, inner: int):
        yield from linear(f"{theirs}.to_q", f"{ours}.w_query", width, inner, False)
        yield from linear(f"{theirs}.to_k", f"{ours}.w_key", source, inner, False)
        yield from linear(f"{theirs}.to_v", f"{ours}.w_value", source, inner, False)
        yield from linear(f"{theirs}.to_out", f"{ours}.w_out", inner, width)

    def feed_forward(theirs: str, ours: str, width: int, inner: int):
        yield from norm(f"{theirs}.norm", f"{ours}_norm", width)
        yield from linear(f"{theirs}.fn.ff.0", f"{ours}.w_in", width, inner)
        yield from linear(f"{theirs}.fn.ff.3", f"{ours}.w_out", inner, width)

    yield "token_emb.weight", "embedding.weight", (config.vocab_size, e)
    yield "pos_emb.weight", "position_embedding.weight", (config.max_length, e)
    if e != d:
        yield from linear("to_decoder_model_dim", "embedding_projection", e, d)
    for i in range(config.num_layers):
        theirs, ours = f"decoder.layers.{i}", f"blocks.{i}"
        yield from norm(f"{theirs}.0.norm", f"{ours}.self_norm", d)
        yield from attention(f"{theirs}.0.fn", f"{ours}.self_attention", d, d, inner)
        if i + 1 in config.cross_attention_layers:
            yield from norm(f"{theirs}.1.norm", f"{ours}.cross_norm", d)
            yield from attention(f"{theirs}.1.fn.cross_attn", f"{ours}.cross_attention", d, d, inner)
            for part in ("k", "v"):
                null = {"k": "null_key", "v": "null_value"}[part]
                yield f"{theirs}.1.fn.cross_attn.null_{part}", f"{ours}.cross_attention.{null}", (h, w)
        yield from feed_forward(f"{theirs}.2", f"{ours}.feed_forward", d, config.feed_forward_dim or 0)
    for i in range(config.encoder_layers):
        theirs, ours = f"encoder.layers.{i}", f"encoder.layers.{i}"
        yield from norm(f"{theirs}.0.norm", f"{ours}.self_norm", e)
        yield from attention(f"{theirs}.0.fn", f"{ours}.self_attention", e, e, encoder_inner)
        if i + 1 in config.encoder_cross_attention_layers:
            yield from norm(f"{theirs}.1.norm", f"{ours}.cross_norm", e)
            yield from attention(f"{theirs}.1.fn", f"{ours}.cross_attention", e, d, encoder_inner)
        yield from feed_forward(f"{theirs}.2", f"{ours}.feed_forward", e, config.encoder_feed_forward_dim or 0)
    if config.final_norm:
        yield from norm("decoder.norm_out", "final_norm", d)
        yield from norm("encoder.norm_out", "encoder.final_norm", e)
    yield from linear("encoder.project_out", "encoder.w_out", e, d)
    yield from linear("to_logits", "readout", d, config.vocab_size)


def _their_shape(ours: str, tensor: torch.Tensor) -> tuple[int, ...]:
    return (tensor.numel(),) if ours.endswith(("null_key", "null_value")) else tuple(tensor.shape)


def _crossing(tensors: Tensors, pattern: str, depth: int) -> tuple[int, ...]:
    return tuple(i + 1 for i in range(depth) if any(name.startswith(pattern.format(i)) for name in tensors.left))


def _frequencies(rotary_dim: int) -> torch.Tensor:
    return 1.0 / 10000 ** (torch.arange(0, rotary_dim, 2).float() / rotary_dim)


def _positions_of(cca: nn.Module) -> str:
    present = vars(cca).get("forward")
    return (present.positions or AS_TRAINED) if isinstance(present, FusedForward) else AS_TRAINED


class FusedRetroPytorch(FusedForward):
    """The forward of one `ChunkedCrossAttention`: its own projections round the fused operation."""

    def __call__(
        self,
        x: torch.Tensor,
        *,
        context_mask: torch.Tensor | None = None,
        context: torch.Tensor,
        pos_emb: Sequence[torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """x [b, n, dim], context [b, l, k, r, context_dim], context_mask bool [b, l, k, r] (True = attend), pos_emb the
        rotary angles of queries [1, 1, m, rotary_dim] and keys [1, 1, r, rotary_dim] -> [b, n, dim]."""
        module: Any = self.module
        attention, m = module.cross_attn, module.chunk_size
        hooked = is_changed(attention) or is_changed(attention.dropout)
        unusual = _unusual_call(module, x, context, context_mask, pos_emb)
        if self.positions == PAPER:
            if unusual is not None:
                raise ValueError(f"{unusual} (its own forward cannot serve: it has the as-trained positions)")
            if hooked:
                warn_once("hooks on the inner attention of a ChunkedCrossAttention do not run: it is bypassed")
        elif unusual is not None or hooked:
            out = type(module).forward(module, x, context_mask=context_mask, context=context, pos_emb=pos_emb)
            if unusual is not None:
                warn_once(f"a call ran retro-pytorch's own forward, not the fused one: {unusual}")
            else:
                warn_once("a ChunkedCrossAttention runs its own forward, because its inner attention has hooks")
            return out
        dropout_p = attention.dropout.p if attention.dropout.training else 0.0
        if x.shape[1] < m:
            return torch.zeros_like(x)

        heads = attention.heads
        query_angles, key_angles = pos_emb  # type: ignore[misc]
        query_angles = query_angles[0, 0]
        if self.positions == AS_TRAINED:
            query_angles = F.pad(query_angles[m - 1 :], (0, 0, 0, m - 1))
        # The projections stay module calls (their hooks, adapters and quantised replacements keep working), and heads
        # are views of what they return: nothing is copied, shifted or folded.
        query = attention.to_q(x[:, m - 1 :]).unflatten(-1, (heads, -1))
        fused: Any = chunked_cross_attention(
            query,
            attention.to_k(context).unflatten(-1, (heads, -1)),
            attention.to_v(context).unflatten(-1, (heads, -1)),
            chunk_size=m,
            neighbour_mask=context_mask,
            query_rotary=_tables(query_angles, query.dtype),
            key_rotary=_tables(key_angles[0, 0], query.dtype),
            null_key=attention.null_k.unflatten(0, (heads, -1)),
            null_value=attention.null_v.unflatten(0, (heads, -1)),
            scale=attention.scale,
            dropout_p=dropout_p,
            query_offset=m - 1,
        )
        return F.pad(attention.to_out(fused.flatten(2)), (0, 0, m - 1, 0))


class FusedRetroPytorchAttention(FusedForward):
    """The forward of one `Attention` without a null slot: its own projections round the fused operations."""

    def __call__(
        self,
        x: torch.Tensor,
        mask: torch.Tensor | None = None,
        context: torch.Tensor | None = None,
        pos_emb: torch.Tensor | tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """x [B, n, dim], mask bool [B, n or m] (True = attend), context [B, m, context_dim] or None for self-attention,
        pos_emb the rotary angles of queries [1, 1, n, rotary_dim] and keys -> [B, n, dim]."""
        attention: Any = self.module
        unusual = _unusual_attention_call(attention, x, mask, context, pos_emb)
        if unusual is not None or is_changed(attention.dropout):
            if unusual is not None:
                warn_once(f"a call ran retro-pytorch's own forward, not the fused one: {unusual}")
            else:
                warn_once("an Attention runs its own forward, because its dropout has hooks")
            return type(attention).forward(attention, x, mask=mask, context=context, pos_emb=pos_emb)
        source = x if context is None else context
        # A batch of one neighbour each: the groups are the same whichever axis counts them.
        query, key, value = (
            part.unflatten(-1, (attention.heads, -1))[:, None]
            for part in (attention.to_q(x), attention.to_k(source), attention.to_v(source))
        )
        if mask is not None:
            mask, query = _unmask_empty_rows(mask, query)
        options: dict[str, Any] = {
            "scale": attention.scale,
            "dropout_p": attention.dropout.p if attention.dropout.training else 0.0,
        }
        if pos_emb is not None:
            angles = pos_emb if isinstance(pos_emb, tuple) else (pos_emb, pos_emb)
            options["query_rotary"], options["key_rotary"] = (_tables(y[0, 0], query.dtype) for y in angles)
        fused: Any
        if context is None:
            fused = neighbour_self_attention(
                query[:, None],
                key[:, None],
                value[:, None],
                neighbour_mask=None if mask is None else mask[:, None, None],
                causal=attention.causal,
                **options,
            )
        else:
            fused = neighbour_cross_attention(
                query[:, None], key, value, activation_mask=None if mask is None else mask[:, None], **options
            )
        return attention.to_out(fused[:, 0, 0].flatten(2))


def _unmask_empty_rows(mask: torch.Tensor, query: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """mask [B, s] and query [B, 1, n, h, d] under which an entry of the batch with nothing visible gets the mean of all
    its values, as retro-pytorch computes it: all of it is made visible, to queries that are zero."""
    visible = mask.any(-1)
    if mask.device.type == "cpu" and readable(mask) and bool(visible.all()):
        return mask, query
    return mask | ~visible[:, None], query.masked_fill(~visible[:, None, None, None, None], 0.0)


def _tables(angles: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """(cos, sin) of one half of the angles, which retro-pytorch holds twice side by side."""
    angles = angles[:, : angles.shape[1] // 2]
    tables = angles.cos(), angles.sin()
    return tables if angles.dtype in (dtype, torch.float32) else (tables[0].float(), tables[1].float())


def _unusual_call(module, x, context, context_mask, pos_emb) -> str | None:
    """What about this call retro-pytorch's decoder never does, and the fused operation does not cover."""
    m, dropout = module.chunk_size, module.cross_attn.dropout
    if type(dropout) is not nn.Dropout:
        return f"its dropout is a {type(dropout).__name__}, expected nn.Dropout"
    if x.dim() != 3 or context.dim() != 5:
        return f"x and context: got shapes {list(x.shape)} and {list(context.shape)}, expected rank 3 and 5"
    if x.shape[1] < m:
        return None
    if context.shape[:2] != (x.shape[0], x.shape[1] // m):
        return f"context: got [b, l] = {list(context.shape[:2])}, expected {[x.shape[0], x.shape[1] // m]}"
    if context_mask is not None and (context_mask.dtype != torch.bool or context_mask.shape != context.shape[:4]):
        given = f"{context_mask.dtype} {list(context_mask.shape)}"
        return f"context_mask: got {given}, expected bool {list(context.shape[:4])}"
    if not isinstance(pos_emb, (tuple, list)) or len(pos_emb) != 2:
        return f"pos_emb: got {type(pos_emb).__name__}, expected a pair (queries, keys)"
    head_dim = module.cross_attn.null_k.numel() // module.cross_attn.heads
    return _unusual_angles(pos_emb, (m, context.shape[3]), head_dim)


def _unusual_attention_call(attention, x, mask, context, pos_emb) -> str | None:
    """The same for a call of an `Attention`."""
    if x.dim() != 3 or (context is not None and (context.dim() != 3 or context.shape[0] != x.shape[0])):
        given = None if context is None else list(context.shape)
        return f"x and context: got shapes {list(x.shape)} and {given}, expected rank 3 and one batch"
    if type(attention.dropout) is not nn.Dropout:
        return f"its dropout is a {type(attention.dropout).__name__}, expected nn.Dropout"
    if attention.causal and (mask is not None or context is not None):
        return "mask and context: got one in causal attention, expected neither"
    slots = x.shape[1] if context is None else context.shape[1]
    if mask is not None and (mask.dtype != torch.bool or mask.shape != (x.shape[0], slots)):
        return f"mask: got {mask.dtype} {list(mask.shape)}, expected bool {[x.shape[0], slots]}"
    if pos_emb is None:
        return None
    angles = pos_emb if isinstance(pos_emb, tuple) else (pos_emb, pos_emb)
    if len(angles) != 2 or not all(isinstance(y, torch.Tensor) for y in angles):
        return f"pos_emb: got {type(pos_emb).__name__}, expected a tensor or a pair (queries, keys)"
    inner = getattr(attention.to_q, "out_features", None)  # unknown where an adapter has taken the layer's place
    return _unusual_angles(angles, (x.shape[1], slots), None if inner is None else inner // attention.heads)


def _unusual_angles(pos_emb, lengths: tuple[int, int], head_dim: int | None) -> str | None:
    width = pos_emb[0].shape[-1]
    for angles, name, length in zip(pos_emb, ("queries", "keys"), lengths):
        too_wide = head_dim is not None and width > head_dim
        if angles.shape != (1, 1, length, width) or width % 2 or too_wide:
            return (
                f"pos_emb: got {list(angles.shape)} for the {name}, expected [1, 1, {length}, rotary_dim] with one "
                f"even rotary_dim of at most the head size, {head_dim}"
            )
        if angles.requires_grad and torch.is_grad_enabled():
            return "pos_emb: got angles that require a gradient, expected fixed ones"
        # On a GPU this comparison would wait for the device at every call; while tracing it has no value.
        comparable = angles.device.type == "cpu" and readable(angles)
        if comparable and not torch.equal(angles[..., : width // 2], angles[..., width // 2 :]):
            return "pos_emb: got angles whose two halves differ, expected the same angles twice"
    return None


def _structure(module: Any) -> str | None:
    attention: Any = getattr(module, "cross_attn", None)
    if dict(module.named_children()).keys() != {"cross_attn"} or not isinstance(attention, nn.Module):
        return f"its parts are {_names(module.named_children())}, those of {VERSION} are cross_attn"
    m = getattr(module, "chunk_size", None)
    if not isinstance(m, int) or m < 1:
        return f"chunk_size is {m!r}, expected a positive int"
    reason = _attention_structure(attention, null_slot=True)
    return f"of its cross_attn, {reason}" if reason is not None else None


def _attention_structure(attention: Any, null_slot: bool) -> str | None:
    if dict(attention.named_children()).keys() != PARTS:
        return f"the parts are {_names(attention.named_children())}, those of {VERSION} {_join_names(PARTS)}"
    own, expected = dict(attention.named_parameters(recurse=False)), NULL_SLOT if null_slot else set()
    if null_slot and not own and isinstance(getattr(attention, "null_k", None), torch.Tensor):
        return "its parameters lie flat in those of FSDP: swap before it wraps the model, or use_orig_params=True"
    if own.keys() != expected or any(x.dim() != 1 for x in own.values()):
        return f"the parameters are {_join_names(own)}, those of {VERSION} {_join_names(expected)}, one row each"
    if not isinstance(attention.dropout, nn.Dropout):
        return "the dropout is not nn.Dropout"
    causal = getattr(attention, "causal", None)
    if not isinstance(causal, bool) or (causal and null_slot):
        return f"causal is {causal!r}, which {VERSION} has not"
    heads, scale = getattr(attention, "heads", None), getattr(attention, "scale", None)
    if not isinstance(heads, int) or heads < 1 or not isinstance(scale, (int, float)):
        return f"heads and scale are {heads!r} and {scale!r}, expected a positive int and a number"
    inner = {name: getattr(getattr(attention, name), "out_features", None) for name in ("to_q", "to_k", "to_v")}
    sizes = {name: x.numel() for name, x in own.items()} | {name: x for name, x in inner.items() if x is not None}
    if 0 in sizes.values():
        return "FSDP has a part of its parameters in each process: swap before it wraps the model"
    if len(set(sizes.values())) != 1 or next(iter(sizes.values())) % heads:
        return f"the inner sizes {sizes} differ or are not a multiple of {heads} heads"
    return None


def _source(module: Any) -> str | None:
    if "forward" in vars(module.cross_attn):
        return "something else has replaced forward on its cross_attn"
    return _describe_change("ChunkedCrossAttention.forward", type(module).forward) or _attention_source(
        module.cross_attn
    )


def _attention_source(attention: nn.Module) -> str | None:
    forward = type(attention).forward
    rotary = getattr(forward, "__globals__", {}).get("apply_rotary_pos_emb")
    half = getattr(rotary, "__globals__", {}).get("rotate_half")
    return (
        _describe_change("Attention.forward", forward)
        or _describe_change("apply_rotary_pos_emb", rotary)
        or _describe_change("rotate_half", half)
    )


def _parts_refusal(model: nn.Module) -> str | None:
    """Why a part of an encoder, or of a whole model, is not known to compute what it did in VERSION."""
    for path, module in model.named_modules():
        name = plain_name(path)
        kind = kind_of(module) or (type(module).__qualname__ if base.is_foreign(module) else None)
        if kind is None:
            continue
        if not isinstance(vars(module).get("forward", None), (FusedForward, type(None))):
            return f"something else has replaced forward on {name or 'it'}"
        reason = _describe_change(f"{kind}.forward", type(module).forward)
        if kind == "ChunkedCrossAttention":
            reason = refusal(module)
        elif kind == "Attention" and module.null_k is None:
            reason = _attention_structure(module, null_slot=False) or _attention_source(module)
            own = name.startswith("decoder.") and name.endswith(".0.fn")
            if reason is None and module.causal != own:
                reason = f"it is {'not ' if own else ''}causal"
        elif kind in ("PreNorm", "PostNorm") and not (
            isinstance(module.norm, nn.LayerNorm) or kind_of(module.norm) == "RMSNorm"
        ):
            reason = f"its norm is a {type(module.norm).__name__}, expected RMSNorm or nn.LayerNorm"
        elif kind == "FeedForward" and reason is None:
            found = [type(part) for part in module.ff]
            if found != FEED_FORWARD or module.ff[1].approximate != "none":
                reason = f"its parts are {', '.join(map(repr, module.ff))}, expected Linear, GELU, Dropout, Linear"
        if reason is not None:
            return f"of {name or 'it'}, {reason}"
    return None


def _describe_change(name: str, function: Any) -> str | None:
    """Why a function is not known to compute what KNOWN_SOURCES' does."""
    return describe_change(name, function, KNOWN_SOURCES.get(name), VERSION, verbatim=True)


def _names(children) -> str:
    return _join_names(name for name, _ in children)


def _join_names(names) -> str:
    return ", ".join(sorted(names)) or "none"
