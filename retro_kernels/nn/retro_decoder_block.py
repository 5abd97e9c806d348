"""The decoder of RETRO: causal self-attention and the block round it (`RETRO` and `LM` layers of section 2.4)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..ops import checks
from ..ops.attention.reference import accumulation_dtype, turn
from ..ops.neighbour_attention import neighbour_self_attention
from . import common
from .chunked_cross_attention import ChunkedCrossAttention
from .context_parallel import ContextParallel
from .neighbour_cache import NeighbourCache
from .neighbour_encoder import FeedForward
from .positions import RelativePositions, RotaryPositions

POSITIONS = ("relative", "rotary")


class CausalSelfAttention(nn.Module):
    """A decoder's self-attention with its projections, without bias, norm or residual.

    Args:
        model_dim: width of `hidden` and of the output.
        num_heads, num_kv_heads, head_dim: query heads, key/value heads (default `num_heads`), size of a head (default
            `model_dim / num_heads`).
        positions: "relative" (Transformer-XL's, with a projection of its own) or "rotary".
        max_length: the longest sequence, where positions are tables ("rotary"); "relative" knows no longest.
        dropout: on the attention probabilities, in training only.
        backend: passed on to the operation; None chooses.
        device, dtype: of the parameters.
    """

    def __init__(
        self,
        model_dim: int,
        *,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        positions: str = "relative",
        max_length: int = 2048,
        dropout: float = 0.0,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_heads = checks.integer("num_heads", num_heads, 1)
        self.num_kv_heads, self.head_dim = common.head_sizes(model_dim, num_heads, num_kv_heads, head_dim)
        common.one_of("positions", positions, POSITIONS)
        self.max_length = checks.integer("max_length", max_length, 1)
        self.scale = self.head_dim**-0.5
        self.context: ContextParallel | None = None
        self.dropout, self.backend = common.probability("dropout", dropout), backend
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        inner, kv_inner = num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        self.w_query = nn.Linear(model_dim, inner, bias=False, **factory)
        self.w_key = nn.Linear(model_dim, kv_inner, bias=False, **factory)
        self.w_value = nn.Linear(model_dim, kv_inner, bias=False, **factory)
        self.w_out = nn.Linear(inner, model_dim, bias=False, **factory)
        self.relative: RelativePositions | None = None
        self.rotary: RotaryPositions | None = None
        if positions == "relative":
            self.relative = RelativePositions(model_dim, num_heads=num_heads, head_dim=self.head_dim, **factory)
        else:
            places = range(max_length)
            self.rotary = RotaryPositions(places, places, rotary_dim=self.head_dim, **factory)

    def forward(
        self,
        hidden: torch.Tensor,
        sequence_starts: torch.Tensor | None = None,
        cache: SelfAttentionCache | None = None,
    ) -> torch.Tensor:
        """Every token attends to itself and the tokens before it.

        Args:
            hidden: [b, n, model_dim].
            sequence_starts: bool [b, n], True at the first token of every document packed into a row, which then sees
                its own document only.
            cache: takes the keys and values, as tokens 0 to n - 1 of its slots, of which there are b.

        Returns: [b, n, model_dim].
        """
        query, key, value = self._project(hidden)
        heads = None
        if self.context is not None:
            if sequence_starts is not None or cache is not None:
                raise ValueError("sequence_starts, cache: got one with context parallelism, expected None")
            query, key, value = (self.context.by_heads(x) for x in (query, key, value))
            heads = self.context.heads(self.num_heads)
        n = query.shape[1]
        positions: dict[str, Any] = {}
        if self.relative is not None:
            positions = self.relative.arguments(n, n, heads=heads)
        elif self.rotary is not None:
            query_rotary, key_rotary = self.rotary(n, n)
            positions = {"query_rotary": query_rotary, "key_rotary": key_rotary}
        if cache is not None:
            cache.begin(self, key, value)
        out: Any = neighbour_self_attention(
            *(x[:, None, None] for x in (query, key, value)),
            causal=True,
            sequence_starts=sequence_starts,
            scale=self.scale,
            dropout_p=self.dropout if self.training else 0.0,
            backend=self.backend,
            **positions,
        )
        out = out[:, 0, 0]
        return self.w_out((out if self.context is None else self.context.by_tokens(out)).flatten(-2))

    @torch.no_grad()
    def decode(
        self, hidden: torch.Tensor, cache: SelfAttentionCache, position: torch.Tensor, length: int
    ) -> torch.Tensor:
        """`forward` for one new token of every slot: hidden [num_slots, 1, model_dim], whose token is at `position`,
        int64 [num_slots], of its sequence; `length` is more than every position (a number that the host knows, so that
        nothing waits for a GPU). Within rounding of `forward`. -> [num_slots, 1, model_dim]."""
        query, key, value = (x[:, 0] for x in self._project(hidden))
        return self.w_out(cache.attend(self, query, key, value, position, length).flatten(-2)[:, None])

    def _project(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        query = self.w_query(hidden).unflatten(-1, (self.num_heads, self.head_dim))
        key = self.w_key(hidden).unflatten(-1, (self.num_kv_heads, self.head_dim))
        return query, key, self.w_value(hidden).unflatten(-1, (self.num_kv_heads, self.head_dim))


class SelfAttentionCache:
    """Keys and values of past tokens, for all self-attentions of a decoder: `num_slots` sequences of at most
    `max_length` tokens each, allocated here. What is stored is made of the weights of its time.

    Raises ValueError for layers with rotary tables shorter than `max_length`.
    """

    def __init__(self, layers: Sequence[CausalSelfAttention], *, num_slots: int, max_length: int) -> None:
        self.place = {id(layer): i for i, layer in enumerate(layers)}
        self.max_length = checks.integer("max_length", max_length, 1)
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []
        self.tables: list[Any] = []
        with torch.no_grad():
            for layer in layers:
                weight = layer.w_key.weight
                size = (num_slots, layer.num_kv_heads, max_length, layer.head_dim)
                for store in (self.keys, self.values):
                    store.append(torch.zeros(size, dtype=weight.dtype, device=weight.device))
                self.tables.append(self._table(layer))

    def _table(self, layer: CausalSelfAttention) -> Any:
        """[h, max_length, d], the row of each distance from 0 on; or the rotary (cos, sin)."""
        if layer.relative is not None:
            return layer.relative(self.max_length, 1).contiguous()
        if layer.rotary is None:
            return None
        return layer.rotary(self.max_length, self.max_length)[1]

    def begin(self, layer: CausalSelfAttention, key: torch.Tensor, value: torch.Tensor) -> None:
        """Tokens 0 to n - 1 of every slot: key, not turned, and value [num_slots, n, hk, d]."""
        i, n = self.place[id(layer)], key.shape[1]
        if layer.rotary is not None:
            cos, sin = self.tables[i]
            key = _rotate(key, (cos[:n], sin[:n]))
        for store, x in ((self.keys, key), (self.values, value)):
            store[i][:, :, :n] = x.detach().transpose(1, 2)

    def attend(self, layer, query, key, value, position, length: int) -> torch.Tensor:
        """query [num_slots, h, d], key and value [num_slots, hk, d] of the tokens at `position` [num_slots]; the keys
        and values are stored. -> [num_slots, h, d]."""
        i = self.place[id(layer)]
        keys, values, table = self.keys[i], self.values[i], self.tables[i]
        if layer.rotary is not None:
            rotary = table[0][position], table[1][position]
            query, key = _rotate(query, rotary), _rotate(key, rotary)
        slot = torch.arange(keys.shape[0], device=keys.device)
        keys[slot, :, position], values[slot, :, position] = key, value
        distance = position[:, None] - torch.arange(length, device=keys.device)
        visible = (distance >= 0)[:, None, None]
        if layer.relative is not None:
            by_distance = torch.einsum("shd,htd->sht", query + layer.relative.relative_bias, table[:, :length])
            index = distance.clamp(min=0)[:, None].expand(-1, layer.num_heads, -1)
            logits = layer.scale * by_distance.gather(2, index)[:, :, None]
            mask = logits.masked_fill(~visible, -torch.inf)
            query = query + layer.relative.content_bias
        else:
            mask = visible
        out = F.scaled_dot_product_attention(
            query[:, :, None],
            keys[:, :, :length],
            values[:, :, :length],
            attn_mask=mask,
            scale=layer.scale,
            enable_gqa=layer.num_heads != layer.num_kv_heads,
        )
        return out[:, :, 0]


def _rotate(x: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """x [..., heads, d] by the angles whose cos and sin are [..., w]."""
    compute = accumulation_dtype(x.dtype)
    cos, sin = (table.to(compute)[..., None, :] for table in rotary)
    return turn(x.to(compute), cos, sin, False).to(x.dtype)


class RetroDecoderBlock(nn.Module):
    """One layer of the decoder: self-attention, chunked cross-attention where the layer is one of P, and feed-forward,
    each added to the residual stream after a norm of its input: RETRO(H, E) = FFW(CCA(ATTN(H), E)), equation 5.

    Args:
        model_dim, num_heads, num_kv_heads, head_dim: of both attentions, as in `CausalSelfAttention`.
        feed_forward_dim: inner width of the feed-forward; default 4 * model_dim.
        retrieves: whether the block has chunked cross-attention.
        context_dim, chunk_size, retrieved_length: width of the encoded neighbours, m and r; see
            `ChunkedCrossAttention`.
        gate: multiply what chunked cross-attention adds by tanh of a learned number that starts at zero, so that a new
            layer changes nothing.
        positions: "relative" or "rotary", in both attentions.
        max_length: as in `CausalSelfAttention`.
        gated, activation: of the feed-forward, as in `NeighbourEncoder`.
        dropout: on the attention probabilities. hidden_dropout: on what every part adds. In training only.
        norm_eps: of the RMS norms.
        backend: of both attentions; None chooses.
        device, dtype: of the parameters.
    """

    def __init__(
        self,
        model_dim: int,
        *,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        feed_forward_dim: int | None = None,
        retrieves: bool = False,
        context_dim: int | None = None,
        chunk_size: int = 64,
        retrieved_length: int | None = None,
        gate: bool = False,
        positions: str = "relative",
        max_length: int = 2048,
        gated: bool = False,
        activation: str | Callable[[torch.Tensor], torch.Tensor] = "gelu",
        dropout: float = 0.0,
        hidden_dropout: float = 0.0,
        norm_eps: float = 1e-6,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if gate and not retrieves:
            raise ValueError("gate: got True in a block without chunked cross-attention, expected False")
        self.hidden_dropout = common.probability("hidden_dropout", hidden_dropout)
        self.context: ContextParallel | None = None
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        attention: dict[str, Any] = {
            "num_heads": num_heads,
            "num_kv_heads": num_kv_heads,
            "head_dim": head_dim,
            "positions": positions,
            "dropout": dropout,
            "backend": backend,
            **factory,
        }
        self.self_norm = nn.RMSNorm(model_dim, eps=norm_eps, **factory)
        self.self_attention = CausalSelfAttention(model_dim, max_length=max_length, **attention)
        self.cross_norm: nn.RMSNorm | None = None
        self.cross_attention: ChunkedCrossAttention | None = None
        self.gate: nn.Parameter | None
        self.register_parameter("gate", nn.Parameter(torch.zeros((), **factory)) if gate else None)
        if retrieves:
            self.cross_norm = nn.RMSNorm(model_dim, eps=norm_eps, **factory)
            self.cross_attention = ChunkedCrossAttention(
                model_dim,
                context_dim=context_dim,
                chunk_size=chunk_size,
                retrieved_length=retrieved_length,
                **attention,
            )
        self.feed_forward_norm = nn.RMSNorm(model_dim, eps=norm_eps, **factory)
        self.feed_forward = FeedForward(
            model_dim,
            inner_dim=4 * model_dim if feed_forward_dim is None else feed_forward_dim,
            gated=gated,
            activation=activation,
            biases=False,
            dropout=0.0,
            **factory,
        )

    def forward(
        self,
        hidden: torch.Tensor,
        encoded: torch.Tensor | Callable[[torch.Tensor], torch.Tensor] | None = None,
        neighbour_mask: torch.Tensor | None = None,
        sequence_starts: torch.Tensor | None = None,
        cache: SelfAttentionCache | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Self-attention, chunked cross-attention (none without `encoded`), feed-forward.

        Args:
            hidden: [b, n, model_dim].
            encoded: [b, l, k, r, context_dim]; or, in the first layer of P, the encoder: a function of the activations
                after self-attention [b, n, model_dim] that gives it.
            neighbour_mask: bool [b, l, k, r], True = attend.
            sequence_starts: bool [b, n], see `CausalSelfAttention`.
            cache: takes the self-attention's keys and values.

        Returns: the new activations [b, n, model_dim], and the encoded neighbours (None without).
        """
        hidden = self._add(hidden, self.self_attention(self.self_norm(hidden), sequence_starts, cache))
        if callable(encoded):
            encoded = encoded(hidden)
        if encoded is not None and self.cross_attention is not None and self.cross_norm is not None:
            context, n = self.context, hidden.shape[1]
            offsets = {} if context is None else context.offsets(n, self.cross_attention.chunk_size)
            attended = self.cross_attention(
                self.cross_norm(hidden), encoded, neighbour_mask, sequence_starts=sequence_starts, **offsets
            )
            hidden = self._add(hidden, self._apply_gate(attended))
        return self._add(hidden, self.feed_forward(self.feed_forward_norm(hidden))), encoded

    @torch.no_grad()
    def decode(
        self,
        hidden: torch.Tensor,
        cache: SelfAttentionCache,
        neighbours: NeighbourCache | None,
        position: torch.Tensor,
        length: int,
        after_self_attention: Callable[[torch.Tensor], None] | None = None,
    ) -> torch.Tensor:
        """`forward` for one new token of every slot, hidden [num_slots, 1, model_dim] (see `CausalSelfAttention.decode`
        and `ChunkedCrossAttention.decode`). `after_self_attention` is called with the activations there, before
        `neighbours` is read: what it fills is seen by this token. -> [num_slots, 1, model_dim]."""
        hidden = hidden + self.self_attention.decode(self.self_norm(hidden), cache, position, length)
        if after_self_attention is not None:
            after_self_attention(hidden)
        if neighbours is not None and self.cross_attention is not None and self.cross_norm is not None:
            hidden = hidden + self._apply_gate(
                self.cross_attention.decode(self.cross_norm(hidden), neighbours, position)
            )
        return hidden + self.feed_forward(self.feed_forward_norm(hidden))

    def _apply_gate(self, attended: torch.Tensor) -> torch.Tensor:
        return attended if self.gate is None else self.gate.tanh() * attended

    def _add(self, hidden: torch.Tensor, update: torch.Tensor) -> torch.Tensor:
        return hidden + F.dropout(update, self.hidden_dropout, self.training)
