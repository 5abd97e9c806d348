"""The point where a decoder's self-attention meets its neighbours.

transformers' attention modules ask `AttentionInterface` for the function that `config._attn_implementation` names, and
hand it the turned queries, the keys and values of the whole context, the mask and every keyword argument of the model's
call. A retrofitted attention reads its config through `LayerConfig`, which names `attend` below; that runs the function
the model is set to, and then lets the neighbours in. The model's config, its masks and its classes stay as they are.

What belongs to one call (`ModelCall`) comes in as a keyword argument, not through a variable: it is what activation
checkpointing keeps for the layer that it computes again, and calls may overlap.
"""

from __future__ import annotations

from collections.abc import Set
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ...ops.attention.reference import accumulation_dtype
from ...ops.neighbour_attention import neighbour_cross_attention, neighbour_self_attention

NAME = "retro_kernels"
CALL = "retro_kernels_call"
"""The keyword argument that carries the call to the attentions."""
NARROW = 16
Chunks = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
CLOSED = {"softmax": -torch.inf, "add": 0.0}


class LayerConfig:
    """The model's config as one attention reads it: everything is the model's, but the name of its attention."""

    def __init__(self, base: Any) -> None:
        self.base = base

    @property
    def _attn_implementation(self) -> str:
        return NAME

    def __getattr__(self, name: str) -> Any:
        if name == "base" or name.startswith("__"):  # not there yet, while a copy is being made
            raise AttributeError(name)
        return getattr(self.base, name)


class Gate(nn.Module):
    """One number a head: with join="softmax" a bias on the neighbours' logits, with join="add" a factor.

    It is a module and used as one, so that PEFT's `modules_to_save=["retro.gate"]` trains and saves a copy.
    """

    def __init__(self, num_heads: int, join: str, device: torch.device) -> None:
        super().__init__()
        self.join = join
        self.weight = nn.Parameter(torch.full((num_heads,), CLOSED[join], device=device))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Of the neighbours' log-sum-exp [..., h], or of their attention [..., h, d]."""
        if self.join == "softmax":
            return x + self.weight.to(x.dtype)
        return x * self.weight.to(x.dtype)[:, None]


class HeadMap(nn.Module):
    """A linear map for each head, [h, d, d], kept as its difference from the identity, which it is at first."""

    def __init__(self, num_heads: int, head_dim: int, device: torch.device) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_heads, head_dim, head_dim, device=device))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., h, d] -> [..., h, d]."""
        return x + torch.einsum("...hd,hde->...he", x, self.weight.to(x.dtype))


def _opening(gate: Any) -> torch.Tensor:
    gate = in_use(gate)
    weight = gate.weight.detach()
    if hasattr(weight, "full_tensor"):  # FSDP2 has shared it out; every process asks
        weight = weight.full_tensor()
    return (weight != CLOSED[gate.join]).any()


def in_use(module: Any) -> Any:
    """The module, or the copy of it that PEFT trains in its place."""
    copies = getattr(module, "modules_to_save", None)
    if copies is None:
        return module
    return next((copies[name] for name in module.active_adapters if name in copies), module.original_module)


class RetrofitAttention(nn.Module):
    """What is added to one self-attention, as its submodule `retro`.

    Args:
        layer: the attention's number in the decoder.
        num_heads, num_kv_heads, head_dim, value_head_dim: of the attention.
        join: "softmax" or "add".
        eager: the family's own attention function, which `AttentionInterface` does not list.
        rotary: which of the model's tables of frequencies turns its queries, and whether dimension 2j pairs with
            2j + 1; None where positions are in the hidden states.
        encoder_dim: width of the encoder's states, whose keys and values this part then makes; None where the decoder
            itself reads the neighbours and its keys and values come as they are.
        adapt: whether there is a map of each head's query, and one of what it finds.
        crosses: whether neighbours, while they are read, look here at the chunk that they were retrieved for.
    """

    def __init__(
        self,
        layer: int,
        *,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        value_head_dim: int,
        join: str,
        eager: Any,
        rotary: tuple[int, bool] | None,
        encoder_dim: int | None,
        adapt: bool,
        crosses: bool,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.layer, self.join, self.eager, self.rotary = layer, join, eager, rotary
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        self.head_dim, self.value_head_dim = head_dim, value_head_dim
        self.gate: Any = Gate(num_heads, join, device)
        self.cross: Any = Gate(num_heads, "add", device) if crosses else None
        self.query_map: Any = HeadMap(num_heads, head_dim, device) if adapt else None
        self.value_map: Any = HeadMap(num_heads, value_head_dim, device) if adapt else None
        self.w_key: nn.Linear | None = None
        self.w_value: nn.Linear | None = None
        if encoder_dim is not None:
            self.w_key = nn.Linear(encoder_dim, num_kv_heads * head_dim, device=device, dtype=dtype)
            self.w_value = nn.Linear(encoder_dim, num_kv_heads * value_head_dim, device=device, dtype=dtype)

    def opening(self) -> torch.Tensor:
        """Whether a head looks at the neighbours: a bool tensor, so that many parts are read at once."""
        return _opening(self.gate)

    def crosses(self) -> bool:
        """Whether a head of a neighbour looks at its chunk, or learns to."""
        if self.cross is None:
            return False
        learns = torch.is_grad_enabled() and any(x.requires_grad for x in self.cross.parameters())
        return learns or bool(_opening(self.cross))

    def state(self) -> Any:
        """Another whenever the gate has changed (by anything but its `.data`)."""
        try:
            return getattr(self.gate, "active_adapters", None), [
                (x.data_ptr(), x._version) for x in self.gate.parameters()
            ]
        except RuntimeError:  # a parameter made in inference mode has no version
            return object()

    def learns(self) -> bool:
        """Whether closed gates are to get a gradient: a factor of 0 does, a bias of -inf has none."""
        return self.join == "add" and torch.is_grad_enabled() and any(x.requires_grad for x in self.gate.parameters())

    def keys_and_values(self, states: torch.Tensor, frequencies: torch.Tensor | None) -> tuple[Any, Any]:
        """Of an encoder's states [..., r, e] -> keys, turned to the positions 0 ... r - 1, and values, [..., r, hk, d]
        each."""
        assert self.w_key is not None
        assert self.w_value is not None
        key = self.w_key(states.to(self.w_key.weight.dtype)).unflatten(-1, (self.num_kv_heads, -1))
        value = self.w_value(states.to(self.w_value.weight.dtype)).unflatten(-1, (self.num_kv_heads, -1))
        if self.rotary is not None and frequencies is not None:
            places = torch.arange(states.shape[-2], device=states.device)
            key = rotate(key, *tables(places, frequencies), self.rotary[1])
        return key, value


def tables(angle: torch.Tensor, frequencies: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions [...] and frequencies [w] -> cos and sin [..., 1, w], in fp32; of angles that are exact, so in fp64."""
    turned = angle.double()[..., None, None] * frequencies.double()
    return turned.cos().float(), turned.sin().float()


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """Turns the first 2 w dimensions of x [..., h, d] by tables that broadcast to [..., h, w]."""
    w = cos.shape[-1]
    turning = x[..., : 2 * w].to(accumulation_dtype(x.dtype))
    if interleaved:
        a, b = turning[..., ::2], turning[..., 1::2]
        turned = torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)
    else:
        a, b = turning[..., :w], turning[..., w:]
        turned = torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
    turned = turned.to(x.dtype)
    return turned if 2 * w == x.shape[-1] else torch.cat([turned, x[..., 2 * w :]], -1)


def own_lse(query: torch.Tensor, key: torch.Tensor, mask: Any, scale: float, softcap: float | None) -> torch.Tensor:
    """The log-sum-exp of the decoder's own attention: query [b, h, n, d], key [b, hk, N, d] and the mask that its
    function gets. Without one, one token sees everything, and several, which begin a text, see what came before.
    -> [b, n, h]."""
    b, h, n, _ = query.shape
    hk = key.shape[1]
    if mask is None and n > 1:
        # In memory linear in n; the values, which are not asked for, are as narrow as may be.
        q, k = (x.transpose(1, 2)[:, None, None] for x in (query, key[:, :, :n]))
        value = key.new_zeros(NARROW).expand(b, 1, 1, n, hk, NARROW)
        options: dict[str, Any] = {"causal": True, "scale": scale, "logit_softcap": softcap, "return_lse": True}
        return neighbour_self_attention(q, k, value, **options)[1].view(b, n, h)
    dtype = accumulation_dtype(query.dtype)
    query = query.reshape(b, hk, h // hk * n, -1)
    logits = (query.to(dtype) @ key.transpose(-1, -2).to(dtype)).view(b, h, n, -1) * scale
    if softcap is not None:
        logits = softcap * (logits / softcap).tanh()
    if mask is not None:
        mask = mask[..., : logits.shape[-1]]
        logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask
    return logits.logsumexp(-1).transpose(1, 2)


class HasRead(Exception):
    """Nothing more is asked of this reading."""


class Reader:
    """The call in which the decoder reads neighbours: the keys, turned, and values of these attentions are kept. With
    `may_stop` HasRead is raised once the last of them is reached: what comes after it is not computed.

    chunks: of the chunk of every k neighbours, the keys and values [s, m, hk, d] where they look at it, and the
    position that follows it, int64 [s]. frequencies: the model's tables."""

    def __init__(
        self,
        layers: Set[int],
        with_gradient: bool,
        may_stop: bool,
        chunks: Chunks | None = None,
        frequencies: list[torch.Tensor] | None = None,
    ) -> None:
        self.layers, self.with_gradient, self.may_stop = layers, with_gradient, may_stop
        self.chunks, self.frequencies = chunks, frequencies
        self.found: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def attend(self, module: Any, base: Any, query: Any, key: Any, value: Any, mask: Any, options: Any) -> Any:
        check_not_reentrant(self.with_gradient)
        if module.retro.layer in self.layers:
            self.found[module.retro.layer] = (key.transpose(1, 2), value.transpose(1, 2))
            if self.may_stop and len(self.found) == len(self.layers):
                raise HasRead
        out, weights = base(module, query, key, value, mask, **options)
        if module.retro.cross is None or self.chunks is None:
            return out, weights
        return out + module.retro.cross(self._of_chunk(module.retro, query, options)).to(out.dtype), weights

    def _of_chunk(self, part: RetrofitAttention, query: torch.Tensor, options: Any) -> torch.Tensor:
        """What the neighbours' tokens [s * k, h, r, d] find in their chunk, which stands right before them, so that a
        neighbour reads on from it. -> [s * k, r, h, d_value]."""
        assert self.chunks is not None
        key, value, end = self.chunks
        query = query.transpose(1, 2)
        k = query.shape[0] // key.shape[0]
        if part.rotary is not None:
            assert self.frequencies is not None
            turn = tables(end.repeat_interleave(k)[:, None], self.frequencies[part.rotary[0]])
            query = rotate(query, *turn, part.rotary[1])
        found = neighbour_cross_attention(
            query.unflatten(0, (-1, k))[None],
            key[None],
            value[None],
            scale=options.get("scaling"),
            logit_softcap=options.get("softcap"),
        )
        return found[0].flatten(0, 1)


def check_not_reentrant(with_gradient: bool) -> None:
    if with_gradient and not torch.is_grad_enabled():
        raise RuntimeError(
            "retro_kernels.retrofit: gradient checkpointing with use_reentrant=True gives wrong gradients, in silence: "
            "the neighbours are no positional argument of the layer. Use "
            'gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})'
        )


def attend(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **options: Any) -> Any:
    """What `AttentionInterface` has under `NAME`: query [b, h, n, d], key and value [b, hk, N, d] ->
    [b, n, h, d_value] and the base's weights, or None."""
    call = options.pop(CALL, None)
    implementation = module.config.base._attn_implementation
    if implementation in (None, "eager"):
        base = module.retro.eager
    else:
        base = ALL_ATTENTION_FUNCTIONS[implementation]
    if call is None:
        return base(module, query, key, value, attention_mask, **options)
    return call.attend(module, base, query, key, value, attention_mask, options)


AttentionInterface.register(NAME, attend)
