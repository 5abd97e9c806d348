"""retro-pytorch 0.3.9 (lucidrains): what `swap` replaces there, and how its weights map to `rk.nn`.

The swap point is `ChunkedCrossAttention`; its weights live in its `cross_attn`, an `Attention` with a null slot. Its
facts: rotary on the first min(head_dim, 32) dimensions, in halves; key positions restart for every neighbour; the null
key is not rotated; the output's bias does not reach the first m - 1 tokens; a sequence shorter than a chunk gives 0.

Its decoder hands over the rotary angles of the query positions m - 1 ... 2m - 2, and the module shifts them by m - 1
once more and fills up with zeros, so that the queries turn by the positions 2m - 2, 0, 0, ..., 0. Trained weights
embody that.
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

from ..nn import ChunkedCrossAttention
from ..ops.chunked_cross_attention import chunked_cross_attention
from .base import AS_TRAINED, PAPER, FusedForward, class_names, warn_once

VERSION = "0.3.9"
LOOKS_FOR = ("retro_pytorch.retro_pytorch.ChunkedCrossAttention",)

# SHA-256 of the source of each function that the fused forward stands for. Another source is not known to compute the
# same, whatever its class is called.
KNOWN_SOURCES = {
    "ChunkedCrossAttention.forward": "31b921df67926d386163ef918964b7be5b931cb86e3ca5119927416c9688478e",
    "Attention.forward": "e7c8ec289bc10667b74412b1635ed693f7858e58be6ad5c43240cc3030515952",
    "apply_rotary_pos_emb": "cf25ed2a02bddb5693861742a55582383ef4d185d72c3fc1f5d7920ab379c2a7",
    "rotate_half": "f2c2cc68e50fa339a232d4800fb154d7481282d39f948490f9e7c44602c086bd",
}
PARTS = {"to_q", "to_k", "to_v", "to_out", "dropout"}
PARAMETERS = {"null_k", "null_v"}
HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def recognises(module: nn.Module) -> bool:
    """Whether it is a `ChunkedCrossAttention` of retro-pytorch or of a class derived from it."""
    return any(name in LOOKS_FOR for name in class_names(module))


def refusal(module: nn.Module) -> str | None:
    """Why the module is not retro-pytorch 0.3.9's, in parts or in source; None when it is."""
    return _structure(module) or _source(module)


def note(module: nn.Module) -> str | None:
    """Says where a swapped module will still run its own code."""
    attention: Any = module.cross_attn
    p = attention.dropout.p
    return f"fused except in training, because of its attention dropout {p:g}: {_DROPOUT}" if p > 0 else None


def fused_forward(module: nn.Module, positions: str) -> FusedForward:
    return FusedRetroPytorch(module, positions)


def to_layer(module: Any, positions: str = AS_TRAINED, **options: Any) -> ChunkedCrossAttention:
    """A `rk.nn.ChunkedCrossAttention` with a copy of the module's weights; `options` go to its constructor.

    Raises ValueError when the module is not retro-pytorch 0.3.9's ChunkedCrossAttention.
    """
    reason = refusal(module) if recognises(module) else f"its class is {class_names(module)[0]}"
    if reason is not None:
        raise ValueError(f"module: got {type(module).__name__}, expected a {LOOKS_FOR[0]} of {VERSION}, but {reason}")
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
        hooked = any(getattr(part, name) for part in (attention, attention.dropout) for name in HOOKS)
        unusual = _unusual_call(module, x, context, context_mask, pos_emb)
        if self.positions == PAPER:
            if unusual is not None:
                raise ValueError(f"{unusual} (its own forward cannot serve: it has the as-trained positions)")
            if hooked:
                warn_once("hooks on the inner attention of a ChunkedCrossAttention do not run: it is bypassed")
        elif unusual is not None or hooked or dropout_p > 0:
            out = type(module).forward(module, x, context_mask=context_mask, context=context, pos_emb=pos_emb)
            if unusual is not None:
                warn_once(f"a call ran retro-pytorch's own forward, not the fused one: {unusual}")
            elif hooked:
                warn_once("a ChunkedCrossAttention runs its own forward, because its inner attention has hooks")
            else:
                warn_once(f"in training, modules with attention dropout run retro-pytorch's own forward: {_DROPOUT}")
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


_DROPOUT = "no fused backend takes dropout yet (0 makes training fused, too)"


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
    width = pos_emb[0].shape[-1]
    head_dim = module.cross_attn.null_k.numel() // module.cross_attn.heads
    for angles, name, length in zip(pos_emb, ("queries", "keys"), (m, context.shape[3])):
        if angles.shape != (1, 1, length, width) or width % 2 or width > head_dim:
            return (
                f"pos_emb: got {list(angles.shape)} for the {name}, expected [1, 1, {length}, rotary_dim] with one "
                f"even rotary_dim of at most {head_dim}"
            )
        if angles.requires_grad and torch.is_grad_enabled():
            return "pos_emb: got angles that require a gradient, expected fixed ones"
        # On a GPU this comparison would wait for the device at every call; while tracing it has no value.
        comparable = angles.device.type == "cpu" and not torch.compiler.is_compiling()
        if comparable and not torch.equal(angles[..., : width // 2], angles[..., width // 2 :]):
            return "pos_emb: got angles whose two halves differ, expected the same angles twice"
    return None


def _structure(module: Any) -> str | None:
    attention: Any = getattr(module, "cross_attn", None)
    if dict(module.named_children()).keys() != {"cross_attn"} or not isinstance(attention, nn.Module):
        return f"its parts are {_names(module.named_children())}, those of {VERSION} are cross_attn"
    if dict(attention.named_children()).keys() != PARTS:
        return f"the parts of cross_attn are {_names(attention.named_children())}, those of {VERSION} {_listed(PARTS)}"
    own = dict(attention.named_parameters(recurse=False))
    if own.keys() != PARAMETERS or any(x.dim() != 1 for x in own.values()):
        return (
            f"the parameters of cross_attn are {_listed(own)}, those of {VERSION} {_listed(PARAMETERS)}, one row each"
        )
    if not isinstance(attention.dropout, nn.Dropout) or getattr(attention, "causal", None) is not False:
        return "its cross_attn is causal, or its dropout is not nn.Dropout"
    heads, m, scale = (
        getattr(attention, "heads", None),
        getattr(module, "chunk_size", None),
        getattr(attention, "scale", 0),
    )
    if (
        not isinstance(heads, int)
        or heads < 1
        or not isinstance(m, int)
        or m < 1
        or not isinstance(scale, (int, float))
    ):
        return (
            f"heads, chunk_size and scale are {heads!r}, {m!r} and {scale!r}, expected two positive ints and a number"
        )
    inner = {name: getattr(getattr(attention, name), "out_features", None) for name in ("to_q", "to_k", "to_v")}
    sizes = {name: x.numel() for name, x in own.items()} | {name: x for name, x in inner.items() if x is not None}
    if len(set(sizes.values())) != 1 or own["null_k"].numel() % heads:
        return f"the inner sizes {sizes} differ or are not a multiple of {heads} heads"
    return None


def _source(module: Any) -> str | None:
    outer, inner = type(module).forward, type(module.cross_attn).forward
    rotary = getattr(inner, "__globals__", {}).get("apply_rotary_pos_emb")
    functions = (outer, inner, rotary, getattr(rotary, "__globals__", {}).get("rotate_half"))
    for (name, known), function in zip(KNOWN_SOURCES.items(), functions):
        code = getattr(function, "__code__", None)
        if "forward" in vars(module.cross_attn):
            return "something else has replaced forward on its cross_attn"
        if not isinstance(code, CodeType):
            return f"{name} is no Python function, so it cannot be checked against {VERSION}"
        found = _digest(code)
        if found is None:
            return f"the source of {name} cannot be read, so it cannot be checked against {VERSION}"
        if found != known:
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
    return _listed(name for name, _ in children)


def _listed(names) -> str:
    return ", ".join(sorted(names)) or "none"
