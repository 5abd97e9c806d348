"""Megatron-core 0.6.0 to 0.15.3, the last release with RETRO, and the legacy Megatron whose checkpoints NVIDIA
published (InstructRetro): what `swap` replaces there, and how weights map to a `Retro`.

Activations are [tokens, batch, width]. The decoder's first layer with chunked cross-attention owns the encoder, runs
it, and hands its output on. Chunks are aligned to the end. There are no positions but the decoder's self-attention's,
and no masks. Query, key and value rows lie per head: [q ... | k | v] for each group of `linear_qkv`, [k | v] for each
head of `linear_kv`. The swap lifts the ban on fused attention, and the encoder's loop over neighbours becomes one call.

Legacy checkpoints name parts otherwise; their encoder's cross-attention is added to its input, not to its normed input,
and a constant gate multiplies chunked cross-attention.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import nullcontext
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from ..models.config import RetroConfig
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

NAME = "megatron"
VERSION = "megatron-core 0.6.0 to 0.15.3"
RETRO = "megatron.core.models.retro."
DECODER = RETRO + "decoder_attention.RetroDecoderCrossAttention"
ENCODER = RETRO + "encoder_attention.RetroEncoderCrossAttention"
CORE = "megatron.core.transformer.dot_product_attention.DotProductAttention"
MODEL = RETRO + "model.RetroModel"
LOOKS_FOR = (DECODER, ENCODER, f"{CORE} of a RETRO")

# They differ in formatting, in the names of what inference and packing pass, and in checks.
KNOWN_SOURCES = {
    DECODER: (
        "49e1edc77d85ae25a89ca5e204a434a0901e8e3a8a46243a9ea08f252d7501ca",  # 0.6.0 to 0.8.0
        "52ff216a3a4cf5005f60ae20794dc08ed526085e83dd4c8758eb7a726eeb7f84",  # 0.9.0 to 0.11.0
        "bef206115feec30adce8f50c9baa93f2954f48b5b538d0492f454f5969004b62",  # 0.12.0 to 0.12.3
        "78124bbaf96337ef034e52869a456297531e36440b176bbdf33dfee6f7983c00",  # 0.13.0 to 0.15.3
    ),
    ENCODER: (
        "0d0d0c7ebaad794cc89ecd4078146a92fecf6aabbc0709e0642d93579f74a41c",  # 0.6.0 to 0.8.0
        "a4f0bb05cf161eb1da8477a58e338131150b647754f9f3fcac96a2e242480edb",  # 0.9.0 to 0.11.0
        "a93dc13965c911ef4535192c088b04a190bb9e9f6ffb8f8a3d9b1dbcac928a4e",  # 0.12.0 to 0.15.3
    ),
    CORE: (
        "cdbbfb44a27db1cf222ebc8f56a0474d5e86a94a15eb1d8af26836adcd7c55f6",  # 0.6.0 to 0.8.0
        "2a8fd6f0ac866d9b6af00c9382414089bf5c830d390b92b1fc542c6a21996d57",  # 0.9.0
        "af9ee4441a0ceabd350a1b935c6511c95f268d1081933d7fbf4d921eadaf91a0",  # 0.10.0 to 0.14.0
        "1219515f00b53ffd9c86c88b86f7e75e0575e198026f9a131429be19755c7790",  # 0.15.0 to 0.15.3
    ),
    "get_query_key_value_tensors": (
        "755ea53c75bb9b776a33971579d53a1c8fcb035d6cfecfc9533829cbda7dd555",  # 0.6.0 to 0.14.0
        "f546898dd71f007ebd41ed396586e9fde05c74f5f761349f0ce77405961cad9b",  # 0.15.0 to 0.15.3
    ),
    MODEL: (
        "02216794fd84c1a8a26756b06425ccca9ff439effa5c58974f42d88fcf472d62",  # 0.6.0 to 0.8.0
        "0a363a3c16237ab0b99933dbb89868656ea8afa8a6854e38f38ca73087ea85b0",  # 0.9.0 to 0.11.0
        "02d96e638f718deba0d6c58b8d5ccdf3953823f5885d31a05284ed1cd9dff3fe",  # 0.12.0 to 0.15.3
    ),
}

# The dialect; sizes and the rest: `describe`, `describe_arguments` and `convert`.
PRESET: dict[str, Any] = {
    "positions": "none",
    "shared_embeddings": True,
    "encoder_conditioning": "normed",
    "encoder_cross_residual": "normed",
    "encoder_final_norm": False,
    "align": "end",
    "partial_chunk": "zeros",
}


def recognises(module: nn.Module) -> bool:
    """Whether it is one of the two cross-attentions, or the core of a self-attention of a RETRO (which its config
    tells: other models' are not looked at)."""
    names = class_names(module)
    if CORE in names:
        config = getattr(module, "config", None)
        return getattr(module, "attention_type", None) == "self" and hasattr(config, "retro_chunk_length")
    return DECODER in names or ENCODER in names


def refusal(module: Any) -> str | None:
    names = class_names(module)
    kind = next(name for name in (DECODER, ENCODER, CORE) if name in names)
    reason = _describe(kind, type(module).forward)
    core = module
    if reason is None and kind != CORE:
        attention = module.attn
        core = attention.core_attention
        reason = _describe("get_query_key_value_tensors", type(attention).get_query_key_value_tensors)
        if reason is None and "forward" in vars(attention):
            reason = "something else has replaced forward on its attn"
    if reason is None and CORE not in class_names(core):
        reason = (
            f"its core attention is {type(core).__name__}, expected DotProductAttention, that of the local layer spec"
        )
    if reason is not None:
        return reason
    softmax = core.scale_mask_softmax
    if getattr(softmax, "window_size", None) is not None:
        return "it has a sliding window, which the fused attention has not"
    if getattr(core, "softmax_offset", None) is not None:
        return "its softmax has an offset, which the fused attention has not"
    return None


def note(module: Any) -> str | None:
    p = _core(module).attention_dropout.p
    notes = [f"its attention dropout {p:g} is fused: the same distribution, other random numbers"] if p > 0 else []
    if module is _core(module):
        notes.append("under torch.compile, where no mask can be looked at, it is fused if attention_mask is None")
    return "; ".join(notes) or None


def likely_class(module: Any) -> Class:
    core = _core(module)
    d = core.hidden_size_per_attention_head
    weight = next(module.parameters(), None)
    device = "cpu" if weight is None else weight.device.type
    own = torch.float32 if weight is None else weight.dtype
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else own
    dropout = ("dropout",) if core.attention_dropout.training and core.attention_dropout.p > 0 else ()
    names = class_names(module)
    if DECODER in names:
        return Class.of("chunked_cross_attention", (dtype, d, d, tile(module.retro_chunk_length), 0, 0, dropout))
    if ENCODER in names:
        return Class.of("neighbour_cross_attention", (dtype, d, d, 128, 0, 0, dropout))
    causal = ("causal",) if _is_causal(core) else ()
    return Class.of("neighbour_self_attention", (dtype, d, d, 1024 if causal else 128, 0, 0, (*causal, *dropout)))


def fused_forward(module: nn.Module, positions: str) -> FusedForward:
    names = class_names(module)
    kind = FusedDecoder if DECODER in names else FusedEncoder if ENCODER in names else FusedCore
    return kind(module, None)


def _core(module: Any) -> Any:
    return module.attn.core_attention if hasattr(module, "attn") else module


def _is_causal(core: Any) -> bool:
    return getattr(core.attn_mask_type, "name", "") == "causal"


def _describe(name: str, function: Any) -> str | None:
    return describe_change(name.rpartition(".")[2], function, KNOWN_SOURCES[name], VERSION)


class Fused(FusedForward):
    def options(self) -> dict[str, Any]:
        """Scale and dropout. (With query-key layer scaling the softmax multiplies by what the scale was divided by.)"""
        core = _core(self.module)
        dropout = core.attention_dropout
        scale = core.softmax_scale if hasattr(core, "softmax_scale") else 1.0 / core.norm_factor  # to 0.9.0
        return {
            "scale": scale * (core.scale_mask_softmax.scale or 1.0),
            "dropout_p": dropout.p if dropout.training else 0.0,
        }

    def random_state(self, dropout_p: float) -> Any:
        """Where dropout draws, which Megatron keeps apart for each tensor-parallel rank."""
        if dropout_p == 0.0 or getattr(_core(self.module).config, "sequence_parallel", False):
            return nullcontext()
        from megatron.core.tensor_parallel import get_cuda_rng_tracker

        return get_cuda_rng_tracker().fork()

    def bypassed(self) -> bool:
        """Whether something was changed that the fused forward does not call."""
        core = _core(self.module)
        parts = [core.scale_mask_softmax]
        if core is not self.module:
            parts += [core, self.module.attn]  # type: ignore[list-item]
        if not any(is_changed(part) for part in parts) and not is_changed(core.attention_dropout, nn.Dropout):
            return False
        warn_once(f"a {type(self.module).__name__} runs its own forward, because a part of it has hooks or was changed")
        return True


class FusedCore(Fused):
    """`DotProductAttention` of a self-attention: the projections round it stay as they are."""

    looked: ClassVar = {causal: Looked() for causal in (False, True)}

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: Any = None,
        *others: Any,
        **named: Any,
    ) -> torch.Tensor:
        """query [n, b, h, d], key and value [n, b, hk, d]; of biases and packing only None -> [n, b, h * d]."""
        module: Any = self.module
        causal = _is_causal(module)
        usual = all(x is None for x in (*others, *named.values())) and query.shape[0] == key.shape[0]
        if not usual or self.bypassed() or not self.is_plain(attention_mask, causal):
            return type(module).forward(module, query, key, value, attention_mask, attn_mask_type, *others, **named)
        options = self.options()
        with self.random_state(options["dropout_p"]):
            out: Any = neighbour_self_attention(
                *(x.transpose(0, 1)[:, None, None] for x in (query, key, value)), causal=causal, **options
            )
        return out[:, 0, 0].flatten(2).transpose(0, 1).contiguous()  # as linear_proj views it, to 0.11.0

    def is_plain(self, mask: torch.Tensor | None, causal: bool) -> bool:
        """Whether the mask (True = hidden) says what the kind of attention does. Each mask is looked at once."""
        if mask is None:
            return True
        if not readable(mask):
            return False

        def look(mask: torch.Tensor) -> bool:
            wanted = torch.ones(mask.shape[-2:], dtype=torch.bool, device=mask.device).triu(1) if causal else False
            return mask.dtype == torch.bool and bool((mask == wanted).all())

        plain = self.looked[causal](mask, look)
        if not plain:
            warn_once("a self-attention with a mask of its own runs Megatron's code, not the fused one")
        return plain


class FusedDecoder(Fused):
    """`RetroDecoderCrossAttention`: its encoder, then chunked cross-attention over the whole sequence."""

    def __call__(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        key_value_states: torch.Tensor | None = None,
        *inference: Any,
        **named: Any,
    ) -> dict[str, Any]:
        """hidden_states [n, b, d]; key_value_states [r, b * l * k, d] where the encoder is here, else its output
        [r * k, b * l, d]; what inference passes -> a dict for `RetroDecoderBiasDropoutAdd`."""
        module: Any = self.module
        context = key_value_states
        if context is None or any(x is not None for x in (*inference, *named.values())) or self.bypassed():
            return type(module).forward(module, hidden_states, attention_mask, key_value_states, *inference, **named)
        n, b, width = hidden_states.shape
        m, k, r = module.retro_chunk_length, module.retro_num_neighbors, module.retro_retrieved_length
        chunks = -(-n // m)
        if module.encoder:
            lacking, given = -n % m, n % m
            chunked = hidden_states
            if lacking:
                first = F.pad(hidden_states[:given], (0, 0, 0, 0, 0, lacking))
                chunked = torch.cat((first, hidden_states[given:]))
            chunked = chunked.view(chunks, m, b, width).permute(1, 2, 0, 3).reshape(m, b * chunks, width)
            context = module.encoder(
                hidden_states=context,
                attention_mask=attention_mask,
                context=chunked,
                context_mask=None,
            ).reshape(r * k, b * chunks, width)
        attention, d = module.attn, _core(module).hidden_size_per_attention_head
        pad = (n - 1) % m
        query = attention.linear_q(hidden_states[pad:])[0].unflatten(-1, (-1, d)).transpose(0, 1)
        both = attention.linear_kv(context)[0].view(r, k, b, chunks, -1, 2, d).permute(2, 3, 1, 0, 4, 5, 6)
        options = self.options()
        with self.random_state(options["dropout_p"]):
            out: Any = chunked_cross_attention(
                query, both[..., 0, :], both[..., 1, :], chunk_size=m, query_offset=m - 1, **options
            )
        output, bias = attention.linear_proj(out.flatten(2).transpose(0, 1).contiguous())
        output = F.pad(output, (0, 0, 0, 0, 0, chunks * m - (n - pad)))
        output = output.view(chunks, m, b, -1).permute(1, 2, 0, 3).reshape(m, b * chunks, -1)
        return {
            "ns": n,
            "bs": b,
            "d": width,
            "l": chunks,
            "pad": pad,
            "attention_output": output,
            "attention_bias": bias,
            "context": context,
        }


class FusedEncoder(Fused):
    """`RetroEncoderCrossAttention`: all neighbours in one call."""

    def __call__(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        key_value_states: torch.Tensor | None = None,
        *inference: Any,
        **named: Any,
    ) -> list[tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]]:
        """hidden_states [r, b * l * k, d], key_value_states [m, b * l, d]; what inference passes -> (output, bias,
        residual) by neighbour."""
        module: Any = self.module
        given = any(x is not None for x in (*inference, *named.values()))
        if key_value_states is None or given or self.bypassed():
            return type(module).forward(module, hidden_states, attention_mask, key_value_states, *inference, **named)
        attention, d = module.attn, _core(module).hidden_size_per_attention_head
        k, r = module.retro_num_neighbors, module.retro_retrieved_length
        residual = hidden_states.view(r, -1, k, hidden_states.shape[-1])
        # The projections take tensors of rank 3, as the loop gave them.
        query = attention.linear_q(hidden_states)[0].unflatten(1, (-1, k)).unflatten(-1, (-1, d))
        query = query.permute(1, 2, 0, 3, 4)[:, None]
        both = attention.linear_kv(key_value_states)[0].unflatten(-1, (-1, 2, d)).transpose(0, 1)[:, None]
        options = self.options()
        with self.random_state(options["dropout_p"]):
            out: Any = neighbour_cross_attention(query, both[..., 0, :], both[..., 1, :], **options)
        out = out[:, 0].permute(2, 0, 1, 3, 4).flatten(3)
        output, bias = attention.linear_proj(out.reshape(r, -1, out.shape[-1]).contiguous())
        output = output.view(r, -1, k, output.shape[-1])
        return [(output[:, :, i], bias, residual[:, :, i].contiguous()) for i in range(k)]


def is_model(module: nn.Module) -> bool:
    return MODEL in class_names(module)


def probe(model: Any, length: int | None) -> Callable[[nn.Module], torch.Tensor]:
    """A call of it on `random_text` -> logits."""
    c, longest = model.config, model.max_sequence_length
    m, k, r = c.retro_chunk_length, c.retro_num_neighbors, c.retro_retrieved_length
    tokens, neighbours = random_text(model, model.vocab_size, m, length, longest, whole=False, k=k, r=r)
    n, context = tokens.shape[1], neighbours.flatten(0, 2)
    places = torch.arange(max(n, r), device=tokens.device)
    mask = torch.ones(1, 1, n, n, dtype=torch.bool, device=tokens.device).triu(1)
    return lambda one: one(
        tokens,
        places[None, :n],
        mask,
        context_input_ids=context,
        context_position_ids=places[:r].expand_as(context),
        context_mask=None,
    )


def is_weights(names: Mapping[str, Any]) -> bool:
    mcore = "embedding.word_embeddings.weight" in names and any(".cross_attention.attn.linear_kv" in x for x in names)
    return mcore or is_legacy(names)


def is_legacy(names: Iterable[str]) -> bool:
    """Whether they are legacy Megatron's, by its own layers."""
    return any(".inter_attention.key_value." in x for x in names)


# What its config must say; whatever else would be another function, or a part of one.
UNLIKE = {
    "pipeline_model_parallel_size": 1,
    "tensor_model_parallel_size": 1,
    "softmax_type": "vanilla",
    "window_size": None,
    "multi_latent_attention": False,
    "num_moe_experts": None,
    "fp32_residual_connection": False,
    "apply_residual_connection_post_layernorm": False,
    "glu_linear_offset": 0.0,
    "activation_func_clamp_value": None,
    "no_rope_freq": None,
    "softmax_scale": None,
}
# The same of arguments, of which some have another name. Shards are merged, and the residual's dtype is ours to choose.
UNLIKE_ARGUMENTS = {
    **{x: y for x, y in UNLIKE.items() if x not in ("tensor_model_parallel_size", "fp32_residual_connection")},
    "num_experts": None,
    "quick_geglu": False,
}
HOMES = ("torch.", "megatron.", "transformer_engine.", "apex.")
"""Where its parts' forwards are."""
COMMON = {"eps": "model", "num_attention_heads_per_partition": "model"}
"""What its config gives to all layers alike, and whoever changes a layer may not."""
# What no state dict tells, and why.
REQUIRED = dict.fromkeys(("chunk_size", "num_heads"), "which Megatron's weights do not tell, expected the model's")


def describe(model: Any) -> dict[str, Any]:
    """As `retro_pytorch.describe`."""
    reason = _describe(MODEL, type(model).forward)
    for name, part in model.named_modules():
        if reason is None and is_foreign(part, HOMES):
            reason = f"{name} is a {type(part).__qualname__}, of neither {' nor '.join(HOMES)}"
    reason = reason or describe_unevenness(model, COMMON)
    if reason is not None:
        raise ValueError(f"source: got a {type(model).__name__}, expected one of {VERSION}, but {reason}")
    c = model.config
    for name, wanted in UNLIKE.items():
        if getattr(c, name, wanted) not in (wanted, None):
            raise ValueError(
                f"source: got {name} = {getattr(c, name)!r} in its config, expected {wanted!r}"
                + ("; convert a checkpoint of it instead" if name.endswith("parallel_size") else "")
            )
    activations = {"gelu": "gelu", "silu": "silu", "squared_relu": "squared_relu", "relu": "relu"}
    activation = activations.get(getattr(c.activation_func, "__name__", ""))
    if activation is None:
        raise ValueError(f"source: got activation_func = {c.activation_func}, expected one of {', '.join(activations)}")
    kind = getattr(model, "position_embedding_type", "learned_absolute")
    found: dict[str, Any] = {
        "num_heads": c.num_attention_heads,
        "num_kv_heads": c.num_query_groups,
        "head_dim": c.kv_channels,
        "chunk_size": c.retro_chunk_length,
        "num_neighbours": c.retro_num_neighbors,
        "retrieved_length": c.retro_retrieved_length,
        "max_length": model.max_sequence_length,
        "norm": {"LayerNorm": "layer", "RMSNorm": "rms"}[c.normalization],
        "norm_eps": c.layernorm_epsilon,
        "zero_centred": bool(getattr(c, "layernorm_zero_centered_gamma", False)),
        "gated_feed_forward": c.gated_linear_unit,
        "activation": "gelu_tanh" if activation == "gelu" and c.bias_activation_fusion else activation,
        "dropout": c.attention_dropout,
        "hidden_dropout": c.hidden_dropout,
        "encoder_dropout": c.retro_encoder_attention_dropout,
        "encoder_hidden_dropout": c.retro_encoder_hidden_dropout,
        **_positions(kind),
    }
    if kind == "rope":
        rotary = model.rotary_pos_emb
        factor = rotary.seq_len_interpolation_factor
        found["rotary_interleaved"] = bool(c.rotary_interleaved)
        found["rotary_frequencies"] = tuple((rotary.inv_freq / (1 if factor is None else factor)).tolist())
        found["rotary_dim"] = 2 * len(found["rotary_frequencies"])
    return found


def _positions(kind: str) -> dict[str, Any]:
    if kind == "learned_absolute":
        return {"absolute_positions": "both"}
    if kind == "rope":
        return {"self_positions": "rotary"}
    if kind == "none":
        return {}
    raise ValueError(f"position_embedding_type: got {kind!r}, expected learned_absolute, rope or none")


def describe_arguments(args: argparse.Namespace, legacy: bool) -> dict[str, Any]:
    """The same of the arguments that a checkpoint holds, and "untold": fields that they leave open, and why."""

    def get(name: str, default: Any = None) -> Any:
        value = getattr(args, name, default)
        if not isinstance(value, (bool, int, float, str, type(None))):
            raise ValueError(
                f"{name}: got a {type(value).__name__} in the checkpoint's arguments, expected a number or name"
            )
        return value

    for name, wanted in UNLIKE_ARGUMENTS.items():
        if get(name, wanted) not in (wanted, None):
            raise ValueError(f"{name}: got {get(name)!r} in the checkpoint's arguments, expected {wanted!r}")
    heads, width = get("num_attention_heads"), get("hidden_size")
    if heads is None or width is None:
        raise ValueError("num_attention_heads, hidden_size: got none in the checkpoint's arguments, expected both")
    head_dim = get("kv_channels") or width // heads
    groups = get("num_query_groups") if get("group_query_attention") else heads
    gated = bool(get("swiglu"))
    activation = "silu" if gated else "squared_relu" if get("squared_relu") else "gelu"
    fused = get("bias_gelu_fusion", False) and get("add_bias_linear", True)
    if activation == "gelu" and (fused or (legacy and get("openai_gelu", False))):
        activation = "gelu_tanh"
    rotary = get("use_rotary_position_embeddings", False)  # that and the next are older than position_embedding_type
    older = "rope" if rotary else "learned_absolute" if get("add_position_embedding", True) else "none"
    kind = get("position_embedding_type") or older
    untold = {}
    found: dict[str, Any] = {
        "num_heads": heads,
        "num_kv_heads": groups or heads,
        "head_dim": head_dim,
        "num_neighbours": get("retro_num_neighbors", 2),
        "retrieved_chunks": get("retro_num_retrieved_chunks", 2),
        "max_length": get("max_position_embeddings") or get("seq_length"),
        "norm": {"LayerNorm": "layer", "RMSNorm": "rms"}[get("normalization", "LayerNorm")],
        "norm_eps": get("norm_epsilon", get("layernorm_epsilon", 1e-5)),
        "zero_centred": bool(get("apply_layernorm_1p", False)),
        "gated_feed_forward": gated,
        "activation": activation,
        "dropout": get("attention_dropout", 0.1),
        "hidden_dropout": get("hidden_dropout", 0.1),
        "encoder_dropout": get("retro_encoder_attention_dropout", 0.1),
        "encoder_hidden_dropout": get("retro_encoder_hidden_dropout", 0.1),
        **_positions(kind),
    }
    if get("retro_chunk_length") is not None:
        found["chunk_size"] = get("retro_chunk_length")
    else:
        untold["chunk_size"] = (
            "which this checkpoint's arguments do not tell, expected retro_gpt_chunk_length in args.json of its retro "
            f"workdir, {get('retro_workdir')}"
        )
    if kind == "rope":
        rotary_dim = int(head_dim * get("rotary_percent", 1.0))
        exponent = torch.arange(0, rotary_dim, 2, dtype=torch.float32) / rotary_dim
        factor = get("rotary_seq_len_interpolation_factor") or 1
        found["rotary_dim"] = rotary_dim
        found["rotary_interleaved"] = bool(get("rotary_interleaved", False))
        unread = {
            "rotary_base": get("rotary_base", 10000) not in (None, 10000),
            "use_rope_scaling": get("use_rope_scaling"),
        }
        if not legacy:
            unread["rotary_seq_len_interpolation_factor"] = factor != 1
        given = [name for name, differs in unread.items() if differs]
        if given:
            untold["rotary_frequencies"] = (
                f"since {given[0]} = {get(given[0])!r} stands in the checkpoint's arguments, which Megatron's own "
                "training of a RETRO does not pass on to the model, expected those that the model had"
            )
        else:
            found["rotary_frequencies"] = tuple((1.0 / 10000.0**exponent / factor).tolist())
    if legacy and get("retro_attention_gate", 1) != 1:  # Megatron-core's RETRO has the argument, and no gate
        found["cross_attention_gate"] = float(get("retro_attention_gate"))
    return {**found, "untold": untold}


# Legacy name -> the name since.
LEGACY = (
    (r"^language_model\.embedding\.", "embedding."),
    (r"^language_model\.(?:encoder|transformer)\.", "decoder."),
    (r"^language_model\.output_layer\.", "output_layer."),
    (r"\.final_norm\.", ".final_layernorm."),
    (r"\.retriever\.", ".cross_attention.encoder."),
    (r"\.input_norm\.", ".input_layernorm."),
    (r"\.self_attention\.query_key_value\.", ".self_attention.linear_qkv."),
    (r"\.self_attention\.dense\.", ".self_attention.linear_proj."),
    (r"\.inter_attention\.query\.", ".cross_attention.attn.linear_q."),
    (r"\.inter_attention\.key_value\.", ".cross_attention.attn.linear_kv."),
    (r"\.inter_attention\.dense\.", ".cross_attention.attn.linear_proj."),
    (r"\.mlp\.dense_h_to_4h\.", ".mlp.linear_fc1."),
    (r"\.mlp\.dense_4h_to_h\.", ".mlp.linear_fc2."),
)


def modern_names(names: Collection[str]) -> dict[str, str]:
    """Name -> Megatron-core's, which may be it. In legacy Megatron the norm after self-attention is that before
    cross-attention where there is one, and the norm after that the feed-forward's."""
    if not is_legacy(names):
        return {name: name for name in names}
    crossing = {x.rpartition(".inter_attention.")[0] for x in names if ".inter_attention." in x}
    found = {}
    for name in names:
        new = name.replace("layernorm.", "norm.")  # as it was called before September 2023
        layer, norm, rest = new.partition(".post_attention_norm.")
        if norm:
            new = f"{layer}.{'pre_cross_attn_layernorm' if layer in crossing else 'pre_mlp_layernorm'}.{rest}"
        layer, norm, rest = new.partition(".post_inter_attention_norm.")
        if norm:
            new = f"{layer}.pre_mlp_layernorm.{rest}"
        for pattern, replacement in LEGACY:
            new = re.sub(pattern, replacement, new)
        found[name] = new
    return found


def convert(tensors: Tensors, options: dict[str, Any]) -> tuple[RetroConfig, dict[str, torch.Tensor]]:
    """As `retro_pytorch.convert`. Of a state dict alone the caller must say `chunk_size` and `num_heads`, and whatever
    else differs from a RetroConfig's defaults. With `vocab_size` the vocabulary's padding is cut off."""
    options = dict(options)
    legacy = is_legacy(tensors.left)
    if legacy:
        names = modern_names(tensors.left)
        tensors.left = {names[name]: x for name, x in tensors.left.items()}
    for name, reason in {**REQUIRED, **options.pop("untold", {})}.items():
        if name not in options:
            raise ValueError(f"{name}: got none, {reason}: give it")
    for name in [x for x in tensors.left if x.endswith("_extra_state")]:  # of fp8 scales, no weights
        del tensors.left[name]
    shift = 1.0 if options.pop("zero_centred", False) else 0.0
    chunks = options.pop("retrieved_chunks", None)
    if chunks is not None:
        options.setdefault("retrieved_length", chunks * options["chunk_size"])
    heads = options["num_heads"]
    rows, width = tensors.shape("embedding.word_embeddings.weight")
    head_dim = options.get("head_dim") or width // heads
    groups = options.get("num_kv_heads") or heads
    layers = tensors.count("decoder.layers.{}.")
    crossing = tuple(
        i + 1
        for i in range(layers)
        if any(x.startswith(f"decoder.layers.{i}.cross_attention.attn.") for x in tensors.left)
    )
    if not crossing:
        raise ValueError(f"{tensors.source}: got no layer with chunked cross-attention, expected a RETRO")
    inside = f"decoder.layers.{crossing[0] - 1}.cross_attention.encoder.layers."
    encoder_layers = tensors.count(inside + "{}.")
    encoder_crossing = tuple(
        i + 1 for i in range(encoder_layers) if any(x.startswith(f"{inside}{i}.cross_attention.") for x in tensors.left)
    )
    gated = options.get("gated_feed_forward", False)
    inner = tensors.shape("decoder.layers.0.mlp.linear_fc2.weight")[1]
    encoder_inner = tensors.shape(f"{inside}0.mlp.linear_fc2.weight")[1]
    tied = "output_layer.weight" not in tensors
    qkv = "decoder.layers.0.self_attention.linear_qkv.bias" in tensors
    out = "decoder.layers.0.self_attention.linear_proj.bias" in tensors
    vocab_size = options.get("vocab_size", rows)
    if vocab_size > rows:
        raise ValueError(f"vocab_size: got {vocab_size}, expected at most {rows}, the rows of the embedding table")
    settings: dict[str, Any] = {
        **PRESET,
        **({"encoder_cross_residual": "input"} if legacy else {}),
        "vocab_size": vocab_size,
        "model_dim": width,
        "num_layers": layers,
        "num_heads": heads,
        "head_dim": head_dim,
        "feed_forward_dim": inner,
        "cross_attention_layers": crossing,
        "cross_attention_kv_heads": heads,
        "encoder_dim": width,
        "encoder_layers": encoder_layers,
        "encoder_heads": heads,
        "encoder_head_dim": head_dim,
        "encoder_feed_forward_dim": encoder_inner,
        "encoder_cross_attention_layers": encoder_crossing,
        "tied_embeddings": tied,
        "attention_biases": (*(("query", "key", "value") if qkv else ()), *(("out",) if out else ())),
        "cross_attention_biases": f"decoder.layers.{crossing[0] - 1}.cross_attention.attn.linear_q.bias" in tensors,
        "feed_forward_biases": "decoder.layers.0.mlp.linear_fc1.bias" in tensors,
        "norm": "layer" if f"{inside}0.pre_mlp_layernorm.norm.bias" in tensors else "rms",
        # The block of 0.15.3's own layer specs has none; those of earlier releases and of legacy Megatron have.
        "final_norm": "decoder.final_layernorm.weight" in tensors,
        "norm_eps": 1e-5,
        **options,
    }
    settings["embedding_dropout"] = settings.get("embedding_dropout", settings.get("hidden_dropout", 0.0))
    if "embedding.position_embeddings.weight" in tensors:
        settings |= {
            "absolute_positions": "both",
            "max_length": tensors.shape("embedding.position_embeddings.weight")[0],
        }
    config = RetroConfig(**settings)
    weights: dict[str, torch.Tensor] = {}

    def norm(theirs: str, ours: str, fused: str | None = None) -> None:
        for kind in ("weight", "bias"):
            # Transformer Engine keeps a norm with the linear layer behind it.
            source = f"{theirs}.{kind}" if f"{theirs}.{kind}" in tensors else f"{fused}.layer_norm_{kind}"
            if source in tensors or kind == "weight":
                x = tensors.take(source if source in tensors else f"{theirs}.{kind}")
                weights[f"{ours}.{kind}"] = x + shift if kind == "weight" and shift else x

    def attention(theirs: str, ours: str, joint: str, parts: tuple[str, ...], sizes: tuple[int, ...]) -> None:
        """Splits rows that lie per group of heads, `sizes` heads of each part."""
        for kind in ("weight", "bias"):
            if f"{theirs}.{joint}.{kind}" not in tensors:
                continue
            x = tensors.take(f"{theirs}.{joint}.{kind}")
            if x.shape[0] % (sum(sizes) * head_dim):
                raise ValueError(
                    f"{tensors.source}: got {theirs}.{joint}.{kind} of {x.shape[0]} rows, expected a multiple of "
                    f"{sum(sizes) * head_dim}, by num_heads = {heads}, num_kv_heads = {groups} and head_dim = "
                    f"{head_dim}"
                )
            split = x.unflatten(0, (-1, sum(sizes), head_dim)).split(sizes, dim=1)
            for part, rows in zip(parts, split):
                weights[f"{ours}.w_{part}.{kind}"] = rows.flatten(0, 2)
        tensors.move(f"{theirs}.linear_proj", f"{ours}.w_out", weights)

    def layer(theirs: str, ours: str, crosses: bool, groups: int) -> None:
        norm(f"{theirs}.input_layernorm", f"{ours}.self_norm", f"{theirs}.self_attention.linear_qkv")
        sizes = (heads // groups, 1, 1)
        attention(f"{theirs}.self_attention", f"{ours}.self_attention", "linear_qkv", ("query", "key", "value"), sizes)
        if crosses:
            cross = f"{theirs}.cross_attention.attn"
            norm(f"{theirs}.pre_cross_attn_layernorm", f"{ours}.cross_norm")
            tensors.move(f"{cross}.linear_q", f"{ours}.cross_attention.w_query", weights)
            attention(cross, f"{ours}.cross_attention", "linear_kv", ("key", "value"), (1, 1))
        inner_norm = f"{theirs}.pre_mlp_layernorm"
        wrapped = f"{inner_norm}.norm.weight" in tensors
        norm(f"{inner_norm}.norm" if wrapped else inner_norm, f"{ours}.feed_forward_norm", f"{theirs}.mlp.linear_fc1")
        for kind in ("weight", "bias"):
            if f"{theirs}.mlp.linear_fc1.{kind}" in tensors:
                x = tensors.take(f"{theirs}.mlp.linear_fc1.{kind}")
                halves = x.chunk(2) if gated else (x,)
                weights[f"{ours}.feed_forward.w_in.{kind}"] = halves[-1]
                if gated:
                    weights[f"{ours}.feed_forward.w_gate.{kind}"] = halves[0]
        tensors.move(f"{theirs}.mlp.linear_fc2", f"{ours}.feed_forward.w_out", weights)

    weights["embedding.weight"] = tensors.take("embedding.word_embeddings.weight")[:vocab_size]
    if config.absolute_positions != "none":
        weights["position_embedding.weight"] = tensors.take("embedding.position_embeddings.weight")
    if not tied:
        weights["readout.weight"] = tensors.take("output_layer.weight")[:vocab_size]
    for i in range(layers):
        layer(f"decoder.layers.{i}", f"blocks.{i}", i + 1 in crossing, groups)
    for i in range(encoder_layers):
        layer(f"{inside}{i}", f"encoder.layers.{i}", i + 1 in encoder_crossing, groups)
    if config.final_norm:
        norm("decoder.final_layernorm", "final_norm")
    return config, weights
