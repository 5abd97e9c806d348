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

import functools
import hashlib
import inspect
from collections.abc import Sequence
from types import CodeType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..nn import ChunkedCrossAttention, NeighbourEncoder
from ..ops.chunked_cross_attention import chunked_cross_attention
from ..ops.compiling import readable
from ..ops.neighbour_attention import neighbour_cross_attention, neighbour_self_attention
from ..ops.verification.classes import Class, tile
from .base import AS_TRAINED, PAPER, FusedForward, class_names, warn_once

VERSION = "0.3.9"
MODULE = "retro_pytorch.retro_pytorch."
CCA, ATTENTION, ENCODER = (MODULE + name for name in ("ChunkedCrossAttention", "Attention", "Encoder"))
LOOKS_FOR = (CCA, ATTENTION)

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
    "rotate_half": "f2c2cc68e50fa339a232d4800fb154d7481282d39f948490f9e7c44602c086bd",
}
PARTS = {"to_q", "to_k", "to_v", "to_out", "dropout"}
NULL_SLOT = {"null_k", "null_v"}
HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def recognises(module: nn.Module) -> bool:
    """Whether it is a `ChunkedCrossAttention` or an `Attention` of retro-pytorch, or of a class derived from one. The
    attention with a null slot is a part of the former and not looked at by itself."""
    names = class_names(module)
    return CCA in names or (ATTENTION in names and getattr(module, "null_k", None) is None)


def refusal(module: nn.Module) -> str | None:
    """Why the module is not retro-pytorch 0.3.9's, in parts or in source; None when it is."""
    if CCA in class_names(module):
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
    if CCA in class_names(module):
        return FusedRetroPytorch(module, positions)
    return FusedRetroPytorchAttention(module, None)


def to_layer(module: Any, positions: str = AS_TRAINED, **options: Any) -> ChunkedCrossAttention:
    """A `rk.nn.ChunkedCrossAttention` with a copy of the module's weights; `options` go to its constructor.

    Raises ValueError when the module is not retro-pytorch 0.3.9's ChunkedCrossAttention.
    """
    reason = refusal(module) if CCA in class_names(module) else f"its class is {class_names(module)[0]}"
    if reason is not None:
        raise ValueError(f"module: got {type(module).__name__}, expected a {CCA} of {VERSION}, but {reason}")
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

    Raises ValueError when the module is not retro-pytorch 0.3.9's Encoder, or has gated norms.
    """
    reason = _encoder_refusal(module) if ENCODER in class_names(module) else f"its class is {class_names(module)[0]}"
    if reason is not None:
        raise ValueError(f"module: got {type(module).__name__}, expected an {ENCODER} of {VERSION}, but {reason}")
    own = module.layers[0][0].fn
    crossing = [number for number, (_, cross, _) in enumerate(module.layers, 1) if cross is not None]
    context_dim = module.layers[crossing[0] - 1][1].fn.to_k.in_features if crossing else own.to_k.in_features
    post_norm = type(module.layers[0][0]).__name__ == "PostNorm"
    norm = module.layers[0][0].norm
    kind = {"norm": "layer", "norm_eps": norm.eps} if isinstance(norm, nn.LayerNorm) else {"norm_eps": norm.eps**2}
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

    def take(name: str, source: nn.Module, **renamed: str) -> None:
        for key, value in source.named_parameters():
            state[f"{name}.{renamed.get(key, key)}"] = value

    linear = {"to_q": "w_query", "to_k": "w_key", "to_v": "w_value", "to_out": "w_out"}
    for i, (attention, cross, feed_forward) in enumerate(module.layers):
        for kind_name, part in (("self", attention), ("cross", cross)):
            if part is not None:
                take(f"layers.{i}.{kind_name}_norm", part.norm, gamma="weight")
                for theirs, ours in linear.items():
                    take(f"layers.{i}.{kind_name}_attention.{ours}", getattr(part.fn, theirs))
        take(f"layers.{i}.feed_forward_norm", feed_forward.norm, gamma="weight")
        take(f"layers.{i}.feed_forward.w_in", feed_forward.fn.ff[0])
        take(f"layers.{i}.feed_forward.w_out", feed_forward.fn.ff[3])
    take("final_norm", module.norm_out, gamma="weight")
    take("w_out", module.project_out)
    encoder.load_state_dict(state)
    return encoder.train(module.training)


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
        dropout_p = attention.dropout.p if attention.dropout.training else 0.0
        hooked = _has_hooks(attention) or _has_hooks(attention.dropout)
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
        if unusual is not None or _has_hooks(attention.dropout):
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


def _has_hooks(module: nn.Module) -> bool:
    return any(getattr(module, name) for name in HOOKS)


def _tables(angles: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """(cos, sin) of one half of the angles, which retro-pytorch holds twice side by side."""
    angles = angles[:, : angles.shape[1] // 2]
    tables = angles.cos(), angles.sin()
    return tables if angles.dtype in (dtype, torch.float32) else (tables[0].float(), tables[1].float())


def _unusual_call(module, x, context, context_mask, pos_emb) -> str | None:
    """What about this call retro-pytorch's decoder never does, and the fused operation does not cover."""
    m = module.chunk_size
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


def _encoder_refusal(encoder: nn.Module) -> str | None:
    for name, module in encoder.named_modules():
        theirs = [kind for kind in class_names(module) if kind.startswith(MODULE)]
        if not theirs:
            continue
        kind = theirs[0].removeprefix(MODULE)
        if not isinstance(vars(module).get("forward", None), (FusedForward, type(None))):
            return f"something else has replaced forward on {name or 'it'}"
        reason = _describe_change(f"{kind}.forward", type(module).forward)
        if kind == "Attention":
            reason = _attention_structure(module, null_slot=False) or _attention_source(module)
            reason = reason or ("it is causal" if module.causal else None)
        elif kind == "RMSNorm" and module.weight is not None:
            reason = "it is gated, which NeighbourEncoder has not (swap serves such an encoder)"
        if reason is not None:
            return f"of {name or 'it'}, {reason}"
    return None


def _describe_change(name: str, function: Any) -> str | None:
    """Why a function is not known to compute what KNOWN_SOURCES' does."""
    code = getattr(function, "__code__", None)
    if not isinstance(code, CodeType):
        return f"{name} is no Python function, so it cannot be checked against {VERSION}"
    found = _digest(code)
    if found is None:
        return f"the source of {name} cannot be read, so it cannot be checked against {VERSION}"
    if found != KNOWN_SOURCES.get(name):
        return f"{name} is not that of {VERSION}: another version of retro-pytorch, an override or a patch"
    return None


@functools.lru_cache(maxsize=64)
def _digest(code: CodeType) -> str | None:
    """Of the source itself, comments and all: unlike `inspect.getsource(function)` this sees through no decorator."""
    try:
        lines = inspect.getsource(code).splitlines()
    except (OSError, TypeError):
        return None
    return hashlib.sha256("\n".join(line.rstrip() for line in lines).encode()).hexdigest()


def _names(children) -> str:
    return _join_names(name for name, _ in children)


def _join_names(names) -> str:
    return ", ".join(sorted(names)) or "none"
