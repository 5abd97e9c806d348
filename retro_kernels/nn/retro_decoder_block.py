"""The decoder of RETRO: causal self-attention and the block round it (`RETRO` and `LM` layers of section 2.4)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
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


class CausalSelfAttention(nn.Module):
    """A decoder's self-attention with its projections, without norm of its input or residual.

    Args:
        model_dim: width of `hidden` and of the output.
        num_heads, num_kv_heads, head_dim: query heads, key/value heads (default `num_heads`), size of a head (default
            `model_dim / num_heads`).
        positions: "relative" (Transformer-XL's, with a projection of its own), "rotary", "bias" (learned, by distance)
            or "none".
        max_length: the longest sequence, where positions are tables ("rotary"); the others know no longest.
        rotary_dim, rotary_base, rotary_interleaved, rotary_frequencies: as in `ChunkedCrossAttention`.
        num_buckets: with "bias", distances 0 to num_buckets - 1 have a bias each, longer ones that of the last; the
            largest distance comes first.
        scale: factor on the logits; default head_dim ** -0.5.
        biases: which projections have a bias: True, False, or some of "query", "key", "value", "out".
        head_norm: makes the norm of each head's queries, and that of its keys, before they turn; None: there is none.
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
        rotary_dim: int | None = None,
        rotary_base: float = 10000.0,
        rotary_interleaved: bool = False,
        rotary_frequencies: Sequence[float] | None = None,
        num_buckets: int | None = None,
        scale: float | None = None,
        biases: bool | Collection[str] = False,
        head_norm: Callable[[int], nn.Module] | None = None,
        dropout: float = 0.0,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_heads = checks.integer("num_heads", num_heads, 1)
        self.num_kv_heads, self.head_dim = common.head_sizes(model_dim, num_heads, num_kv_heads, head_dim)
        common.one_of("positions", positions, common.POSITIONS)
        common.refuse_idle_options(
            positions,
            rotary={
                "rotary_dim": rotary_dim,
                "rotary_interleaved": rotary_interleaved or None,
                "rotary_frequencies": rotary_frequencies,
            },
            bias={"num_buckets": num_buckets},
        )
        self.max_length = checks.integer("max_length", max_length, 1)
        self.scale = self.head_dim**-0.5 if scale is None else checks.number("scale", scale)
        self.rotary_interleaved, self.num_buckets = rotary_interleaved, num_buckets
        self.context: ContextParallel | None = None
        self.dropout, self.backend = common.probability("dropout", dropout), backend
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        inner, kv_inner = num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        with_bias = common.biased_projections(biases)
        self.w_query = nn.Linear(model_dim, inner, bias="query" in with_bias, **factory)
        self.w_key = nn.Linear(model_dim, kv_inner, bias="key" in with_bias, **factory)
        self.w_value = nn.Linear(model_dim, kv_inner, bias="value" in with_bias, **factory)
        self.w_out = nn.Linear(inner, model_dim, bias="out" in with_bias, **factory)
        self.query_norm = None if head_norm is None else head_norm(self.head_dim)
        self.key_norm = None if head_norm is None else head_norm(self.head_dim)
        self.relative: RelativePositions | None = None
        self.rotary: RotaryPositions | None = None
        self.attention_bias: nn.Parameter | None
        self.register_parameter("attention_bias", None)
        if positions == "relative":
            self.relative = RelativePositions(model_dim, num_heads=num_heads, head_dim=self.head_dim, **factory)
        elif positions == "rotary":
            places = range(max_length)
            rotary_dim = self.head_dim if rotary_dim is None else rotary_dim
            if rotary_dim > self.head_dim:
                raise ValueError(f"rotary_dim: got {rotary_dim}, expected at most head_dim = {self.head_dim}")
            self.rotary = RotaryPositions(
                places, places, rotary_dim=rotary_dim, base=rotary_base, frequencies=rotary_frequencies, **factory
            )
        elif positions == "bias":
            count = checks.integer("num_buckets", num_buckets, 1)
            self.attention_bias = nn.Parameter(torch.zeros(num_heads, count, **factory))

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
            query, key, value = (self.context.scatter_heads(x) for x in (query, key, value))
            heads = self.context.heads(self.num_heads)
        n = query.shape[1]
        positions: dict[str, Any] = {}
        if self.relative is not None:
            positions = self.relative.arguments(n, n, heads=heads)
        elif self.rotary is not None:
            query_rotary, key_rotary = self.rotary(n, n)
            positions = {
                "query_rotary": query_rotary,
                "key_rotary": key_rotary,
                "rotary_interleaved": self.rotary_interleaved,
            }
        elif self.attention_bias is not None:
            token = torch.arange(n, device=hidden.device)
            by_distance = self.bias_by_distance(n)
            positions = {"attention_bias": by_distance[:, (token[:, None] - token).clamp(min=0)]}
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
        return self.w_out((out if self.context is None else self.context.gather_heads(out)).flatten(-2))

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
        if self.query_norm is not None and self.key_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        return query, key, self.w_value(hidden).unflatten(-1, (self.num_kv_heads, self.head_dim))

    def bias_by_distance(self, length: int) -> torch.Tensor:
        """[h, length], the learned bias of the distances 0 to length - 1."""
        if self.attention_bias is None:
            raise ValueError('positions: got a layer without a learned bias, expected one with positions="bias"')
        last = self.attention_bias.shape[1] - 1
        return self.attention_bias[:, last - torch.arange(length, device=self.attention_bias.device).clamp(max=last)]


class SelfAttentionCache:
    """Keys and values of past tokens, for all self-attentions of a decoder: `num_slots` sequences of at most
    `max_length` tokens each, allocated here. What is stored is made of the weights of its time, in their dtype, or in
    that of the autocast under which the cache is made.

    Raises ValueError for layers with rotary tables shorter than `max_length`.
    """

    def __init__(self, layers: Sequence[CausalSelfAttention], *, num_slots: int, max_length: int) -> None:
        self.place = {id(layer): i for i, layer in enumerate(layers)}
        self.slots: list[int] | slice = slice(None)  # where `begin` writes
        self.max_length = checks.integer("max_length", max_length, 1)
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []
        self.tables: list[Any] = []
        with torch.no_grad():
            for layer in layers:
                weight = layer.w_key.weight
                size = (num_slots, layer.num_kv_heads, max_length, layer.head_dim)
                for store in (self.keys, self.values):
                    store.append(torch.zeros(size, dtype=product_dtype(weight), device=weight.device))
                self.tables.append(self._table(layer))

    def _table(self, layer: CausalSelfAttention) -> Any:
        """[h, max_length, d], the row of each distance from 0 on; the rotary (cos, sin); or biases [h, max_length]."""
        if layer.relative is not None:
            return layer.relative(self.max_length, 1).contiguous()
        if layer.attention_bias is not None:
            return layer.bias_by_distance(self.max_length)
        if layer.rotary is None:
            return None
        return layer.rotary(self.max_length, self.max_length)[1]

    def begin(self, layer: CausalSelfAttention, key: torch.Tensor, value: torch.Tensor) -> None:
        """Tokens 0 to n - 1 of the slots `slots` (all by default): key, not turned, and value [slots, n, hk, d]."""
        i, n = self.place[id(layer)], key.shape[1]
        if layer.rotary is not None:
            cos, sin = self.tables[i]
            key = _rotate(key, (cos[:n], sin[:n]), layer.rotary_interleaved)
        for store, x in ((self.keys, key), (self.values, value)):
            store[i][self.slots, :, :n] = x.detach().transpose(1, 2).to(store[i].dtype)

    def attend(self, layer, query, key, value, position, length: int) -> torch.Tensor:
        """query [num_slots, h, d], key and value [num_slots, hk, d] of the tokens at `position` [num_slots]; the keys
        and values are stored. -> [num_slots, h, d]."""
        i = self.place[id(layer)]
        keys, values, table = self.keys[i], self.values[i], self.tables[i]
        if layer.rotary is not None:
            rotary = table[0][position], table[1][position]
            query, key = (_rotate(x, rotary, layer.rotary_interleaved) for x in (query, key))
        slot = torch.arange(keys.shape[0], device=keys.device)
        keys[slot, :, position], values[slot, :, position] = key.to(keys.dtype), value.to(values.dtype)
        distance = position[:, None] - torch.arange(length, device=keys.device)
        visible = (distance >= 0)[:, None, None]
        if layer.relative is not None:
            by_distance = torch.einsum("shd,htd->sht", query + layer.relative.relative_bias, table[:, :length])
            index = distance.clamp(min=0)[:, None].expand(-1, layer.num_heads, -1)
            logits = layer.scale * by_distance.gather(2, index)[:, :, None]
            mask = logits.masked_fill(~visible, -torch.inf)
            query = query + layer.relative.content_bias
        elif layer.attention_bias is not None:
            bias = table[:, distance.clamp(min=0)].transpose(0, 1)[:, :, None]
            mask = bias.masked_fill(~visible, -torch.inf)
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


def product_dtype(weight: torch.Tensor) -> torch.dtype:
    """The dtype of what a product with the weight gives, which autocast may choose."""
    device = weight.device.type
    cast = torch.is_autocast_enabled(device) and weight.dtype != torch.float64
    return torch.get_autocast_dtype(device) if cast else weight.dtype


def _rotate(x: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor], interleaved: bool) -> torch.Tensor:
    """x [..., heads, d] by the angles whose cos and sin are [..., w]."""
    compute = accumulation_dtype(x.dtype)
    cos, sin = (table.to(compute)[..., None, :] for table in rotary)
    return turn(x.to(compute), cos, sin, interleaved).to(x.dtype)


class RetroDecoderBlock(nn.Module):
    """One layer of the decoder: self-attention, chunked cross-attention where the layer is one of P, and feed-forward,
    each added to the residual stream after a norm of its input: RETRO(H, E) = FFW(CCA(ATTN(H), E)), equation 5.

    Args:
        model_dim, num_heads, num_kv_heads, head_dim: of both attentions, as in `CausalSelfAttention`.
        cross_num_kv_heads: of chunked cross-attention; default `num_kv_heads`.
        feed_forward_dim: inner width of the feed-forward; default 4 * model_dim.
        retrieves: whether the block has chunked cross-attention.
        context_dim, chunk_size, retrieved_length: width of the encoded neighbours, m and r; see
            `ChunkedCrossAttention`.
        align: "start" (the paper), or "end" (Megatron), of chunked cross-attention.
        condition_on: what conditions the encoder in the first layer of P: the "stream" after self-attention, or what
            the norm before chunked cross-attention makes of it ("normed", Megatron).
        gate: multiply what chunked cross-attention adds by tanh of a learned number that starts at zero, so that a new
            layer changes nothing; or by a number of yours.
        norm, norm_eps, norm_position, residual_scale: as in `NeighbourEncoder`.
        positions: "relative", "rotary", "bias" or "none", of self-attention; cross_positions: of chunked
            cross-attention, default the same.
        max_length, num_buckets: as in `CausalSelfAttention`.
        rotary_dim, rotary_base, rotary_interleaved, rotary_frequencies: as in `ChunkedCrossAttention`, of both.
        cross_options: what else `ChunkedCrossAttention` takes: `null_slot`, `query_positions`, `bias_buckets` ...
        scale: factor on the logits of both attentions; default head_dim ** -0.5.
        biases, cross_biases: which projections have a bias, of self-attention and of chunked cross-attention (default
            the same): True, False, or some of "query", "key", "value", "out".
        qk_norm: self-attention normalises each head's queries and keys, before they turn.
        gated, activation, feed_forward_biases: of the feed-forward, as in `NeighbourEncoder`.
        dropout: on the attention probabilities. hidden_dropout: on what every part adds. feed_forward_dropout: on the
            inner activations of the feed-forward. In training only.
        backend: of both attentions; None chooses.
        device, dtype: of the parameters.
    """

    def __init__(
        self,
        model_dim: int,
        *,
        num_heads: int,
        num_kv_heads: int | None = None,
        cross_num_kv_heads: int | None = None,
        head_dim: int | None = None,
        feed_forward_dim: int | None = None,
        retrieves: bool = False,
        context_dim: int | None = None,
        chunk_size: int = 64,
        retrieved_length: int | None = None,
        align: str = "start",
        condition_on: str = "stream",
        gate: bool | float = False,
        norm: common.Norm = "rms",
        norm_eps: float | None = None,
        norm_position: str = "pre",
        residual_scale: float = 1.0,
        positions: str = "relative",
        cross_positions: str | None = None,
        max_length: int = 2048,
        rotary_dim: int | None = None,
        rotary_base: float = 10000.0,
        rotary_interleaved: bool = False,
        rotary_frequencies: Sequence[float] | None = None,
        num_buckets: int | None = None,
        cross_options: dict[str, Any] | None = None,
        scale: float | None = None,
        biases: bool | Collection[str] = False,
        cross_biases: bool | Collection[str] | None = None,
        qk_norm: bool = False,
        gated: bool = False,
        activation: str | Callable[[torch.Tensor], torch.Tensor] = "gelu",
        feed_forward_biases: bool = False,
        dropout: float = 0.0,
        hidden_dropout: float = 0.0,
        feed_forward_dropout: float = 0.0,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if gate is not False and not retrieves:
            raise ValueError(f"gate: got {gate} in a block without chunked cross-attention, expected False")
        self.condition_on = common.one_of("condition_on", condition_on, ("stream", "normed"))
        self.norm_position = common.one_of("norm_position", norm_position, ("pre", "post"))
        if norm_position == "pre" and residual_scale != 1.0:
            raise ValueError(f'residual_scale: got {residual_scale} with norm_position="pre", expected 1')
        if norm_position == "post" and condition_on == "normed":
            raise ValueError('condition_on: got "normed" with norm_position="post", expected "stream"')
        self.residual_scale = checks.number("residual_scale", residual_scale)
        self.hidden_dropout = common.probability("hidden_dropout", hidden_dropout)
        self.context: ContextParallel | None = None
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        attention: dict[str, Any] = {
            "num_heads": num_heads,
            "head_dim": head_dim,
            "scale": scale,
            "dropout": dropout,
            "backend": backend,
            **factory,
        }
        turning: dict[str, Any] = {
            "rotary_dim": rotary_dim,
            "rotary_base": rotary_base,
            "rotary_interleaved": rotary_interleaved,
            "rotary_frequencies": rotary_frequencies,
        }
        make_norm = common.norm_maker(norm, norm_eps, factory)
        self.self_norm = make_norm(model_dim)
        self.self_attention = CausalSelfAttention(
            model_dim,
            num_kv_heads=num_kv_heads,
            positions=positions,
            max_length=max_length,
            num_buckets=num_buckets,
            biases=biases,
            head_norm=make_norm if qk_norm else None,
            **(turning if positions == "rotary" else {}),
            **attention,
        )
        self.cross_norm: nn.Module | None = None
        self.cross_attention: ChunkedCrossAttention | None = None
        self.fixed_gate = 1.0 if isinstance(gate, bool) else checks.number("gate", gate)
        self.gate: nn.Parameter | None
        self.register_parameter("gate", nn.Parameter(torch.zeros((), **factory)) if gate is True else None)
        if retrieves:
            cross_positions = positions if cross_positions is None else cross_positions
            self.cross_norm = make_norm(model_dim)
            self.cross_attention = ChunkedCrossAttention(
                model_dim,
                num_kv_heads=num_kv_heads if cross_num_kv_heads is None else cross_num_kv_heads,
                context_dim=context_dim,
                chunk_size=chunk_size,
                retrieved_length=retrieved_length,
                align=align,
                positions=cross_positions,
                biases=biases if cross_biases is None else cross_biases,
                **(turning if cross_positions == "rotary" else {}),
                **({} if cross_options is None else cross_options),
                **attention,
            )
        self.feed_forward_norm = make_norm(model_dim)
        self.feed_forward = FeedForward(
            model_dim,
            inner_dim=4 * model_dim if feed_forward_dim is None else feed_forward_dim,
            gated=gated,
            activation=activation,
            biases=feed_forward_biases,
            dropout=common.probability("feed_forward_dropout", feed_forward_dropout),
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
                after self-attention [b, n, model_dim] (see `condition_on`) that gives it.
            neighbour_mask: bool [b, l, k, r], True = attend.
            sequence_starts: bool [b, n], see `CausalSelfAttention`.
            cache: takes the self-attention's keys and values.

        Returns: the new activations [b, n, model_dim], and the encoded neighbours (None without).
        """
        hidden = self._residual(hidden, self.self_norm, lambda x: self.self_attention(x, sequence_starts, cache))
        if callable(encoded):
            encoded = encoded(self._conditioning(hidden))
        if encoded is not None and self.cross_attention is not None and self.cross_norm is not None:
            context, n, cross = self.context, hidden.shape[1], self.cross_attention
            offsets = {} if context is None else context.offsets(n, cross.chunk_size)
            hidden = self._residual(
                hidden,
                self.cross_norm,
                lambda x: self._apply_gate(
                    cross(x, encoded, neighbour_mask, sequence_starts=sequence_starts, **offsets)
                ),
            )
        return self._residual(hidden, self.feed_forward_norm, self.feed_forward), encoded

    @torch.no_grad()
    def decode(
        self,
        hidden: torch.Tensor,
        cache: SelfAttentionCache,
        neighbours: NeighbourCache | None,
        position: torch.Tensor,
        length: int,
        after_self_attention: Callable[[torch.Tensor], None] | None = None,
        cross_position: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`forward` for one new token of every slot, hidden [num_slots, 1, model_dim] (see `CausalSelfAttention.decode`
        and `ChunkedCrossAttention.decode`, whose position is `cross_position`, by default `position`).
        `after_self_attention` is called with what conditions the encoder, before `neighbours` is read: what it fills is
        seen by this token. -> [num_slots, 1, model_dim]."""
        hidden = self._residual(
            hidden, self.self_norm, lambda x: self.self_attention.decode(x, cache, position, length)
        )
        if after_self_attention is not None:
            after_self_attention(self._conditioning(hidden))
        cross, place = self.cross_attention, position if cross_position is None else cross_position
        if neighbours is not None and cross is not None and self.cross_norm is not None:
            attended = self._residual(
                hidden, self.cross_norm, lambda x: self._apply_gate(cross.decode(x, neighbours, place))
            )
            if self.norm_position == "post":  # a sequence without neighbours does not pass through the norm
                attended = torch.where((neighbours.chunk >= 0)[:, None, None], attended, hidden)
            hidden = attended
        return self._residual(hidden, self.feed_forward_norm, self.feed_forward)

    def _conditioning(self, hidden: torch.Tensor) -> torch.Tensor:
        if self.condition_on == "stream" or self.cross_norm is None:
            return hidden
        return self.cross_norm(hidden)

    def _apply_gate(self, attended: torch.Tensor) -> torch.Tensor:
        if self.gate is None:
            return attended if self.fixed_gate == 1.0 else self.fixed_gate * attended
        return self.gate.tanh() * attended

    def _residual(
        self, hidden: torch.Tensor, norm: nn.Module, part: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        if self.norm_position == "post":
            added = F.dropout(part(hidden), self.hidden_dropout, self.training)
            return norm(added + (hidden if self.residual_scale == 1.0 else self.residual_scale * hidden))
        return hidden + F.dropout(part(norm(hidden)), self.hidden_dropout, self.training)
