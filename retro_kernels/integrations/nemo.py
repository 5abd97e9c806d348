"""NeMo 1.23's RETRO: its chunked cross-attention, `ParallelChunkedCrossAttention`, is what `swap` replaces there.

Activations are [tokens, batch, width], neighbours [l, k, r, batch, width]; `key_value` rows lie per head, [k | v].
Query positions are 0 ... m - 1, those of keys what its decoder hands over. Its mask hides (True) a chunk's neighbour
tokens, and whole rows whose own token is padding, which get 0. The output's bias is returned, for the layer to add.
Steps of generation, and its self-attentions, stay its own.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..ops.chunked_cross_attention import chunked_cross_attention
from ..ops.compiling import readable
from ..ops.verification.classes import Class, tile
from .base import FusedForward, Looked, class_names, describe_change, is_changed, warn_once

NAME = "nemo"
VERSION = "nemo-toolkit 1.23.0"
CCA = "nemo.collections.nlp.modules.common.megatron.attention.ParallelChunkedCrossAttention"
LOOKS_FOR = (CCA,)
EXPRESSED = (
    "rk.nn.ChunkedCrossAttention with biases=True and positions='rotary' expresses it (rotary_dim at most 32, "
    "query_positions 0 ... m - 1; key_positions 0 ... r - 1 in version 1, -(m - 1) ... r - m in later ones; 'none' "
    "without rotary), but for the output's bias, which its layer adds to the first m - 1 tokens, too"
)
KNOWN_SOURCES = {
    "ParallelChunkedCrossAttention.forward": "5c2247c497b32818e92c33354e25b118ddd37f589296587ca1e3b52def2b22ad",
    "ParallelAttention.forward": "b13be69ffb8437069ddd7773442556edb3dea14361fad15fb18fb3c1d9e1bc59",
    "CoreAttention.forward": "632315c708dca8787ca414e184c77784fedc89137837c5c76862a37a45756b78",
    "CoreAttention.torch_attention": "ebddefbfe8e917a11249f615480bae9e120acc7bedaa39818be8a8dea1005fcd",
    "apply_rotary_pos_emb": "0e198b6b2862c9496e1223dc07f498b9502c1a1d6d4c7a7dffdcde32a9cc02f2",
    "_rotate_half": "a244f73c0a90e556d95d772b781797603df9c1d5439ce8e6a61595322e388ba8",
}
PLAIN = {
    "multi_query_attention": False,
    "headscale": False,
    "megatron_legacy": False,
    "use_flash_attention": False,
    "position_embedding_type": "learned_absolute",
}


def recognises(module: nn.Module) -> bool:
    return CCA in class_names(module)


def refusal(module: Any) -> str | None:
    reason = _refusal(module)
    return None if reason is None else f"{reason}; {EXPRESSED}"


def _refusal(module: Any) -> str | None:
    inner = getattr(module, "cross_attention", None)
    core = getattr(inner, "core_attention", None)
    if inner is None or core is None or dict(module.named_children()).keys() != {"cross_attention"}:
        return f"its parts are not those of {VERSION}, cross_attention with its core_attention"
    rotary = getattr(type(core).forward, "__globals__", {}).get("apply_rotary_pos_emb")
    for name, function in (
        ("ParallelChunkedCrossAttention.forward", type(module).forward),
        ("ParallelAttention.forward", type(inner).forward),
        ("CoreAttention.forward", type(core).forward),
        ("CoreAttention.torch_attention", type(core).torch_attention),
        ("apply_rotary_pos_emb", rotary),
        ("_rotate_half", getattr(rotary, "__globals__", {}).get("_rotate_half")),
    ):
        reason = describe_change(name, function, KNOWN_SOURCES[name], VERSION)
        if reason is not None:
            return reason
    for name, wanted in PLAIN.items():
        if getattr(inner, name, wanted) != wanted:
            return f"its {name} is {getattr(inner, name)!r}, which the fused attention has not"
    if any("forward" in vars(part) for part in (inner, core)):
        return "something else has replaced forward on a part of it"
    return None


def note(module: Any) -> str | None:
    p = module.cross_attention.core_attention.attention_dropout.p
    dropout = f"its attention dropout {p:g} is fused: the same distribution, other random numbers; " if p > 0 else ""
    return f"{dropout}under torch.compile, where no mask can be looked at, it runs its own forward"


def likely_class(module: Any) -> Class:
    inner = module.cross_attention
    weight, d = next(module.parameters()), inner.hidden_size_per_attention_head
    device = weight.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    dropout = inner.core_attention.attention_dropout
    options = ("dropout",) if dropout.training and dropout.p > 0 else ()
    rotary = "rotary" if d <= 32 else "rotary_partial"
    return Class.of("chunked_cross_attention", (dtype, d, d, tile(module.chunk_size), 0, 0, (rotary, *options)))


def fused_forward(module: nn.Module, positions: str) -> FusedForward:
    return FusedNemo(module, None)


class FusedNemo(FusedForward):
    looked = Looked()

    def __call__(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        encoder_output: torch.Tensor | None = None,
        set_inference_key_value_memory: bool = False,
        inference_max_sequence_len: int | None = None,
        rotary_pos_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
        checkpoint_core_attention: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """hidden_states [n, b, d], attention_mask bool [b * l, 1, m, k * r] (True = hidden), encoder_output
        [l, k, r, b, d], the angles of queries [2m - 1, 1, 1, w] and keys [r, 1, 1, w] -> [n, b, d] and the bias."""
        module: Any = self.module
        m, n, context = module.chunk_size, hidden_states.shape[0], encoder_output
        generating = set_inference_key_value_memory or inference_max_sequence_len is not None
        usual = not generating and not checkpoint_core_attention and context is not None and n >= m
        if not usual or context.shape[0] != n // m or not self.covers(attention_mask):  # type: ignore[union-attr]
            return type(module).forward(
                module,
                hidden_states,
                attention_mask,
                encoder_output,
                set_inference_key_value_memory,
                inference_max_sequence_len,
                rotary_pos_emb,
                checkpoint_core_attention,
            )
        assert context is not None
        inner, (l, k, r, b, _) = module.cross_attention, context.shape
        core, d = inner.core_attention, inner.hidden_size_per_attention_head
        query = inner.query(hidden_states[m - 1 :])[0].unflatten(-1, (-1, d)).transpose(0, 1)
        both = inner.key_value(context.flatten(0, 2))[0].view(l, k, r, b, -1, 2, d).permute(3, 0, 1, 2, 4, 5, 6)
        options: dict[str, Any] = {}
        if rotary_pos_emb is not None:
            width = rotary_pos_emb[0].shape[-1] // 2
            angles = rotary_pos_emb[0][m - 1 :, 0, 0, :width], rotary_pos_emb[1][:, 0, 0, :width]
            options["query_rotary"], options["key_rotary"] = ((x.float().cos(), x.float().sin()) for x in angles)
        hidden_rows = None
        if attention_mask is not None:
            mask = attention_mask.view(b, l, m, k * r)
            options["neighbour_mask"] = ~mask.all(2).view(b, l, k, r)
            hidden_rows = mask.all(-1).flatten(1)[:, : n - m + 1]
        scale = (1.0 / core.norm_factor if core.normalize_attention_scores else 1.0) * (
            core.scale_mask_softmax.scale or 1.0
        )
        dropout_p = core.attention_dropout.p if core.attention_dropout.training else 0.0
        with self.random_state(dropout_p):
            out: Any = chunked_cross_attention(
                query,
                both[..., 0, :],
                both[..., 1, :],
                chunk_size=m,
                query_offset=m - 1,
                scale=scale,
                dropout_p=dropout_p,
                **options,
            )
        if hidden_rows is not None:
            out = out.masked_fill(hidden_rows[..., None, None], 0.0)
        output, bias = inner.dense(out.flatten(2).transpose(0, 1))
        return F.pad(output, (0, 0, 0, 0, m - 1, 0)), bias

    def random_state(self, dropout_p: float) -> Any:
        """Where dropout draws, which Megatron keeps apart for each tensor-parallel rank."""
        if dropout_p == 0.0 or self.module.cross_attention.core_attention.sequence_parallel:  # type: ignore[union-attr]
            return nullcontext()
        from megatron.core import tensor_parallel

        return tensor_parallel.random.get_cuda_rng_tracker().fork()

    def covers(self, mask: torch.Tensor | None) -> bool:
        """Whether nothing sits on what is bypassed, and the mask hides whole rows and whole columns alone, which each
        mask is asked once."""
        inner: Any = self.module.cross_attention
        core = inner.core_attention
        changed = is_changed(core.attention_dropout, nn.Dropout)
        changed = changed or any(is_changed(part) for part in (inner, core, core.scale_mask_softmax))
        if changed or inner.is_adapter_available():
            warn_once(
                "a ParallelChunkedCrossAttention runs its own forward, because a part of it has hooks or adapters"
            )
            return False
        if mask is None:
            return True
        if not readable(mask):
            return False

        def look(mask: torch.Tensor) -> bool:
            product = mask.all(-1, keepdim=True) | mask.all(-2, keepdim=True)
            return mask.dtype == torch.bool and bool((mask == product).all())

        found = self.looked(mask, look)
        if not found:
            warn_once("a ParallelChunkedCrossAttention with a mask that is no product runs its own forward")
        return found
