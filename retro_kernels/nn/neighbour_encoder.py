"""The neighbour encoder: `ENCODER` of the RETRO paper's Algorithm 1, on the two neighbour attentions."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..ops import checks
from ..ops.checks import document_starts
from ..ops.neighbour_attention import neighbour_cross_attention, neighbour_self_attention
from . import common
from .positions import RelativePositions, RotaryPositions, t5_buckets


def squared_relu(x: torch.Tensor) -> torch.Tensor:
    return F.relu(x).square()


ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
    "squared_relu": squared_relu,
}


class NeighbourEncoder(nn.Module):
    """Encodes retrieved neighbours, conditioned on the decoder (sections 2.3 and 2.4 of the RETRO paper).

    Every neighbour passes through `num_layers` layers of self-attention over its own r tokens, in the layers of P_enc
    cross-attention to the m decoder activations of the chunk it was retrieved for, and feed-forward. The weights are
    shared by all neighbours and chunks, and nothing is pooled. Embeddings come in: the table of tokens is the caller's.
    The defaults are the paper's; the class methods `paper`, `retro_pytorch`, `megatron`, `norlund` and `labml` build it
    the way each of these defines it.

    Both attentions are this library's; norms, linear layers, activations and residuals are PyTorch's.
    `torch.compile(encoder)` makes one graph, in which the elementwise passes over [b, l, k, r, model_dim] between the
    attentions and the matrix products (norms, activations, residuals) are fused; what that gains is not measured yet.

    Args:
        model_dim: e, the width of embeddings and encoded neighbours, 896 in the paper.
        num_heads: query heads of both attentions.
        num_layers: layers; numbered from 1 in `cross_attention_layers`, as in the paper.
        context_dim: width of the decoder activations; default `model_dim`.
        num_kv_heads, head_dim: key/value heads (default `num_heads`) and head size (default `model_dim / num_heads`).
        feed_forward_dim: inner width of the feed-forward; default 4 * model_dim.
        chunk_size: m, decoder tokens in a chunk.
        retrieved_length: r, the longest neighbour in tokens, where positions are tables; default 2 * chunk_size.
        stride: decoder tokens between retrievals; default `chunk_size`.
        align: "start" (the paper), or "end" (Megatron: the incomplete chunk comes first).
        partial_chunk: "masked": activations that an incomplete chunk lacks are not attended to; "zeros": they are
            attended to as zero activations (Megatron).
        cross_attention_layers: P_enc, the numbers of the layers with cross-attention; None means all.
        cross_residual: what cross-attention is added to: its "input", or its "normed" input (Megatron-core).
        norm: "rms", "layer", "gated_rms" (times the sigmoid of a learned multiple of the input), or a function that
            makes a norm for a width.
        norm_eps: of "layer" (default 1e-5) and the others (default 1e-6).
        norm_position: "pre": x + f(norm(x)); "post": norm(residual_scale * x + f(x)).
        residual_scale: factor on what is added to, with norm_position="post" (DeepNet).
        context_norm: normalise the decoder activations here.
        final_norm: normalise what the last layer gives.
        output_dim: width of a last linear layer with bias; default none.
        positions: of self-attention: "none"; "relative" (through `RelativePositions`); "rotary" (0 ... r - 1); "bias"
            (learned, [h, r, r], or shared by offset with `num_buckets`).
        cross_positions: of cross-attention, likewise; default as `positions`. "relative" is equation 7, the distance
            of neighbour token and activation.
        relative_dim, relative_biases: width of the sinusoid (default `model_dim`), and whether u and v are learned.
        rotary_dim, rotary_base, rotary_interleaved, rotary_frequencies: as in `ChunkedCrossAttention`.
        num_buckets, cross_num_buckets: with "bias", offsets clamped to so many values (see `t5_buckets`).
        scale: factor on the logits; default head_dim ** -0.5.
        biases: which attention projections have a bias: True, False, or some of "query", "key", "value", "out".
        cross_biases: of cross-attention, likewise; default as `biases`.
        qk_norm: self-attention normalises each head's queries and keys, before they turn.
        gated: the feed-forward is w_out(activation(w_gate(x)) * w_in(x)) instead of w_out(activation(w_in(x))).
        activation: "gelu", "gelu_tanh", "relu", "silu", "squared_relu", or a function.
        feed_forward_biases: whether its linear layers have a bias.
        dropout: on the attention probabilities. hidden_dropout: on what every sub-layer adds. feed_forward_dropout:
            on the inner activations of the feed-forward. All in training only.
        backend: passed on to the attentions; None chooses.
        device, dtype: of the parameters.

    Raises ValueError for sizes that do not fit and for an option that the other options would ignore.
    """

    def __init__(
        self,
        model_dim: int,
        *,
        num_heads: int,
        num_layers: int = 2,
        context_dim: int | None = None,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        feed_forward_dim: int | None = None,
        chunk_size: int = 64,
        retrieved_length: int | None = None,
        stride: int | None = None,
        align: str = "start",
        partial_chunk: str = "masked",
        cross_attention_layers: Collection[int] | None = (1,),
        cross_residual: str = "input",
        norm: common.Norm = "rms",
        norm_eps: float | None = None,
        norm_position: str = "pre",
        residual_scale: float = 1.0,
        context_norm: bool = False,
        final_norm: bool = True,
        output_dim: int | None = None,
        positions: str = "relative",
        cross_positions: str | None = None,
        relative_dim: int | None = None,
        relative_biases: bool = True,
        rotary_dim: int | None = None,
        rotary_base: float = 10000.0,
        rotary_interleaved: bool = False,
        rotary_frequencies: Sequence[float] | None = None,
        num_buckets: int | None = None,
        cross_num_buckets: int | None = None,
        scale: float | None = None,
        biases: bool | Collection[str] = False,
        cross_biases: bool | Collection[str] | None = None,
        qk_norm: bool = False,
        gated: bool = False,
        activation: str | Callable[[torch.Tensor], torch.Tensor] = "gelu",
        feed_forward_biases: bool = True,
        dropout: float = 0.0,
        hidden_dropout: float = 0.0,
        feed_forward_dropout: float = 0.0,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.model_dim = checks.integer("model_dim", model_dim, 1)
        self.context_dim = checks.integer("context_dim", model_dim if context_dim is None else context_dim, 1)
        num_layers = checks.integer("num_layers", num_layers, 1)
        num_heads = checks.integer("num_heads", num_heads, 1)
        num_kv_heads, head_dim = common.head_sizes(model_dim, num_heads, num_kv_heads, head_dim)
        self.chunk_size = checks.integer("chunk_size", chunk_size, 1)
        self.stride = chunk_size if stride is None else checks.integer("stride", stride, 1, chunk_size, "chunk_size")
        self.align = common.one_of("align", align, ("start", "end"))
        if align == "end" and self.stride != chunk_size:
            raise ValueError(f'stride: got {stride} with align="end", expected chunk_size = {chunk_size}')
        self.partial_chunk = common.one_of("partial_chunk", partial_chunk, ("masked", "zeros"))
        common.one_of("cross_residual", cross_residual, ("input", "normed"))
        common.one_of("norm_position", norm_position, ("pre", "post"))
        if norm_position == "post" and cross_residual == "normed":
            raise ValueError('cross_residual: got "normed" with norm_position="post", expected "input"')
        if norm_position == "pre" and residual_scale != 1.0:
            raise ValueError(f'residual_scale: got {residual_scale} with norm_position="pre", expected 1')
        numbers = range(1, num_layers + 1)
        chosen = set(numbers) if cross_attention_layers is None else set(cross_attention_layers)
        if not chosen <= set(numbers):
            raise ValueError(
                f"cross_attention_layers: got {sorted(chosen)}, expected numbers from 1 to num_layers = {num_layers}"
            )
        self.cross_attention_layers = tuple(sorted(chosen))

        cross_positions = positions if cross_positions is None else cross_positions
        kinds = [common.one_of("positions", positions, common.POSITIONS)]
        if chosen:
            kinds.append(common.one_of("cross_positions", cross_positions, common.POSITIONS))
        common.refuse_idle_options(
            kinds,
            relative={"relative_dim": relative_dim, "relative_biases": None if relative_biases else False},
            rotary={
                "rotary_dim": rotary_dim,
                "rotary_interleaved": rotary_interleaved or None,
                "rotary_frequencies": rotary_frequencies,
            },
        )
        common.refuse_idle_options(positions, bias={"num_buckets": num_buckets})
        common.refuse_idle_options(cross_positions, bias={"cross_num_buckets": cross_num_buckets})

        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        retrieved_length = 2 * chunk_size if retrieved_length is None else retrieved_length
        self.retrieved_length = checks.integer("retrieved_length", retrieved_length, 1)
        attention: dict[str, Any] = {
            "num_heads": num_heads,
            "num_kv_heads": num_kv_heads,
            "head_dim": head_dim,
            "rows": self.retrieved_length,
            "scale": head_dim**-0.5 if scale is None else checks.number("scale", scale),
            "dropout": common.probability("dropout", dropout),
            "biases": common.biased_projections(biases),
            "relative_dim": model_dim if relative_dim is None else relative_dim,
            "relative_biases": relative_biases,
            "rotary_dim": head_dim if rotary_dim is None else rotary_dim,
            "rotary_base": rotary_base,
            "rotary_interleaved": rotary_interleaved,
            "rotary_frequencies": rotary_frequencies,
            "backend": backend,
            **factory,
        }
        make_norm = common.norm_maker(norm, norm_eps, factory)
        own = {
            **attention,
            "slots": self.retrieved_length,
            "positions": positions,
            "num_buckets": num_buckets,
            "head_norm": make_norm if qk_norm else None,
        }
        cross: dict[str, Any] = {
            **attention,
            "biases": common.biased_projections(biases if cross_biases is None else cross_biases),
            "context_dim": self.context_dim,
            "slots": chunk_size,
            "positions": cross_positions,
            "num_buckets": cross_num_buckets,
        }
        feed_forward: dict[str, Any] = {
            "inner_dim": 4 * model_dim if feed_forward_dim is None else feed_forward_dim,
            "gated": gated,
            "activation": activation,
            "biases": feed_forward_biases,
            "dropout": common.probability("feed_forward_dropout", feed_forward_dropout),
            **factory,
        }
        residual: dict[str, Any] = {
            "norm_position": norm_position,
            "residual_scale": residual_scale,
            "cross_residual": cross_residual,
            "hidden_dropout": common.probability("hidden_dropout", hidden_dropout),
        }
        self.context_norm = make_norm(self.context_dim) if context_norm else None
        self.layers = nn.ModuleList(
            NeighbourEncoderLayer(
                model_dim, make_norm, own, cross if number in chosen else None, feed_forward, **residual
            )
            for number in numbers
        )
        self.final_norm = make_norm(model_dim) if final_norm else None
        self.w_out = None if output_dim is None else nn.Linear(model_dim, output_dim, **factory)

    def forward(
        self,
        embeddings: torch.Tensor,
        hidden: torch.Tensor,
        neighbour_mask: torch.Tensor | None = None,
        sequence_starts: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Retrieved tokens attend within their neighbour and to the chunk that it was retrieved for.

        The decoder's activations come as the whole sequence, not cut into chunks: cutting is a view (of keys and values
        that are projected once for all windows, also where a stride makes them overlap), every caller has the whole,
        and what a partial chunk lacks is then known here.

        Args:
            embeddings: [b, l, k, r, model_dim] of the retrieved tokens. Masked tokens' embeddings must be finite.
            hidden: [b, n, context_dim], the decoder's activations, of which chunk u is tokens u * stride to
                u * stride + m - 1 (align "start"). l may be less than there are chunks, or one more than there are
                complete ones. With align "end" chunk 0 is the incomplete one, and l = ceil(n / m).
            neighbour_mask: bool [b, l, k, r], True = attend to, in self-attention. The encoding of a masked token is
                computed from the visible ones; mask it wherever it is used.
            sequence_starts: bool [b, n], True at the first token of every document packed into a row, as for
                `ChunkedCrossAttention`: chunk u is the u-th complete chunk of the row's documents; surplus chunks have
                no activations to attend to.

        Returns:
            [b, l, k, r, model_dim], or [b, l, k, r, output_dim].

        Raises TypeError or ValueError for wrong dtypes and sizes, and whatever the attentions raise.
        """
        common.check_hidden_and_neighbours(
            hidden,
            ("context_dim", self.context_dim),
            "embeddings",
            embeddings,
            ("model_dim", self.model_dim),
            neighbour_mask,
        )
        context, stride, activation_mask = None, 0, None
        if self.cross_attention_layers:
            context, stride, activation_mask = self._chunks(hidden, embeddings.shape[1], sequence_starts)
        x = embeddings
        for layer in self.layers:
            x = layer(x, neighbour_mask, context, stride, activation_mask)
        if self.final_norm is not None:
            x = self.final_norm(x)
        return x if self.w_out is None else self.w_out(x)

    def _chunks(
        self, hidden: torch.Tensor, num_chunks: int, sequence_starts: torch.Tensor | None
    ) -> tuple[torch.Tensor, int, torch.Tensor | None]:
        """-> activations [b, n', context_dim] of which chunk u is tokens u * stride to u * stride + m - 1 for every u;
        that stride; which activations there are, bool [b, l, m], None for all."""
        b, n, _ = hidden.shape
        m, stride = self.chunk_size, self.stride
        if self.context_norm is not None:
            hidden = self.context_norm(hidden)
        if sequence_starts is not None:
            return self._chunks_of_documents(hidden, num_chunks, sequence_starts)
        if self.align == "end":
            if num_chunks != -(-n // m):
                raise ValueError(
                    f'embeddings: got l = {num_chunks} chunks, expected {-(-n // m)} for {n} tokens with align="end"'
                )
            given, lacking = n % m, -n % m
            if lacking:
                hidden = torch.cat([F.pad(hidden[:, :given], (0, 0, 0, lacking)), hidden[:, given:]], dim=1)
            first_lacking = given
        else:
            needed = (num_chunks - 1) * stride + m if num_chunks else 0
            lacking = max(needed - n, 0)
            if lacking >= m:
                raise ValueError(
                    f"embeddings: got l = {num_chunks} chunks, but hidden ends after {n} tokens, before the last chunk "
                    f"begins (chunk_size {m}, stride {stride})"
                )
            hidden = F.pad(hidden, (0, 0, 0, lacking)) if lacking else hidden[:, :needed]
            first_lacking = n
        if not lacking or self.partial_chunk == "zeros":
            return hidden, stride, None
        token = torch.arange(hidden.shape[1], device=hidden.device)
        there = (token < first_lacking) | (token >= first_lacking + lacking)
        return hidden, stride, _windows(there[None, :, None], num_chunks, m, stride).squeeze(-1).expand(b, -1, -1)

    def _chunks_of_documents(
        self, hidden: torch.Tensor, num_chunks: int, sequence_starts: torch.Tensor
    ) -> tuple[torch.Tensor, int, torch.Tensor | None]:
        if self.align != "start":
            raise ValueError('sequence_starts: got align="end" too, expected align="start": see ChunkedCrossAttention')
        b, n, _ = hidden.shape
        m = self.chunk_size
        token = torch.arange(n, device=hidden.device)
        clock = token - document_starts(sequence_starts, hidden, b, n) - (m - 1)
        completes = (clock >= 0) & (clock % self.stride == 0)  # the token is the last of a chunk
        chunk = completes.cumsum(1) - 1
        column = torch.where(completes & (chunk < num_chunks), chunk, num_chunks)
        last = token.new_full((b, num_chunks + 1), -1).scatter(1, column, token.expand(b, n))[:, :num_chunks]
        there = (last >= 0)[..., None].expand(-1, -1, m)
        index = (last[..., None] - (m - 1) + torch.arange(m, device=hidden.device)).clamp(min=0)
        chunks = hidden.gather(1, index.flatten(1)[..., None].expand(-1, -1, hidden.shape[-1]))
        return chunks, m, there

    def extra_repr(self) -> str:
        return (
            f"chunk_size={self.chunk_size}, stride={self.stride}, align={self.align!r}, "
            f"partial_chunk={self.partial_chunk!r}, cross_attention_layers={self.cross_attention_layers}"
        )

    @classmethod
    def paper(
        cls, model_dim: int = 896, *, num_heads: int = 14, context_dim: int | None = None, **options: Any
    ) -> NeighbourEncoder:
        """The paper: RMSNorm, relative positions in both attentions (equation 7 in cross-attention), P_enc = 1. It
        states neither u and v (here learned, from zero), nor the scale (here head_dim ** -0.5), nor a norm at the end
        (here there is one), nor the feed-forward's activation (here GELU). `hidden` is the residual stream after the
        self-attention of the first layer with chunked cross-attention."""
        return cls(model_dim, num_heads=num_heads, context_dim=context_dim, **options)

    @classmethod
    def retro_pytorch(
        cls,
        model_dim: int = 896,
        *,
        num_heads: int = 8,
        head_dim: int = 64,
        context_dim: int = 768,
        use_deepnet: bool = False,
        decoder_layers: int = 12,
        **options: Any,
    ) -> NeighbourEncoder:
        """retro-pytorch 0.3.9: cross-attention in all layers, rotary on the first min(head_dim, 32) dimensions, biases
        on the output projections and the feed-forward, and a projection to the decoder's width. `use_deepnet` is its
        post-norm variant, scaled by the layers of encoder and decoder. `hidden` is as in the paper, complete chunks
        only."""
        depth = options.get("num_layers", 2)
        kind = {
            "norm": "layer",
            "norm_position": "post",
            "residual_scale": 0.81 * (depth**4 * decoder_layers) ** 0.0625,
            "final_norm": False,
        }
        settings = {
            "head_dim": head_dim,
            "context_dim": context_dim,
            "output_dim": context_dim,
            "cross_attention_layers": None,
            "positions": "rotary",
            "rotary_dim": min(head_dim, 32),
            "biases": ("out",),
            **(kind if use_deepnet else {"norm_eps": 1e-16}),
            **options,
        }
        return cls(model_dim, num_heads=num_heads, **settings)

    @classmethod
    def megatron(cls, model_dim: int, *, num_heads: int, **options: Any) -> NeighbourEncoder:
        """Megatron-core 0.15.3: as wide as the decoder, LayerNorm, no positions, biases everywhere, no norm at the end,
        chunks aligned to the end whose missing activations are attended to as zeros, dropout 0.1, and cross-attention
        added to its normed input. `hidden` is the normed input of the first layer's chunked cross-attention."""
        settings = {
            "norm": "layer",
            "positions": "none",
            "biases": True,
            "final_norm": False,
            "align": "end",
            "partial_chunk": "zeros",
            "cross_residual": "normed",
            "dropout": 0.1,
            "hidden_dropout": 0.1,
            **options,
        }
        return cls(model_dim, num_heads=num_heads, **settings)

    @classmethod
    def norlund(
        cls,
        model_dim: int = 896,
        *,
        num_heads: int = 14,
        num_buckets: int = 256,
        cross_num_buckets: int = 192,
        **options: Any,
    ) -> NeighbourEncoder:
        """Norlund et al.: cross-attention in the second layer, unscaled logits and T5 biases by clamped offset, a gated
        GELU feed-forward, no biases, no norm at the end. `hidden` is the residual stream, its incomplete last chunk
        masked. Its `relative_attention_bias.weight` is `attention_bias` transposed; its `wi_0` is `w_gate`."""
        settings = {
            "cross_attention_layers": (2,),
            "positions": "bias",
            "num_buckets": num_buckets,
            "cross_num_buckets": cross_num_buckets,
            "scale": 1.0,
            "gated": True,
            "activation": "gelu_tanh",
            "feed_forward_biases": False,
            "norm_eps": 1e-16,
            "final_norm": False,
            **options,
        }
        return cls(model_dim, num_heads=num_heads, **settings)

    @classmethod
    def labml(cls, model_dim: int, *, num_heads: int, **options: Any) -> NeighbourEncoder:
        """labml's annotated implementation: LayerNorm, ReLU, biases everywhere, rotary positions in self-attention
        only, the decoder activations normed here, and a norm at the end (which there is the decoder's `norm_e`). Its
        sets of layers count from 0."""
        settings = {
            "norm": "layer",
            "positions": "rotary",
            "cross_positions": "none",
            "biases": True,
            "activation": "relu",
            "context_norm": True,
            **options,
        }
        return cls(model_dim, num_heads=num_heads, **settings)


class NeighbourEncoderLayer(nn.Module):
    """Self-attention, cross-attention where `cross` is given, feed-forward, with their norms and residuals. The three
    dicts are arguments of `NeighbourAttention` and `FeedForward`."""

    def __init__(
        self,
        model_dim: int,
        make_norm: Callable[[int], nn.Module],
        own: dict[str, Any],
        cross: dict[str, Any] | None,
        feed_forward: dict[str, Any],
        *,
        norm_position: str,
        residual_scale: float,
        cross_residual: str,
        hidden_dropout: float,
    ) -> None:
        super().__init__()
        self.norm_position, self.residual_scale = norm_position, residual_scale
        self.cross_residual, self.hidden_dropout = cross_residual, hidden_dropout
        self.self_norm = make_norm(model_dim)
        self.self_attention = NeighbourAttention(model_dim, **own)
        self.cross_norm = None if cross is None else make_norm(model_dim)
        self.cross_attention = None if cross is None else NeighbourAttention(model_dim, **cross)
        self.feed_forward_norm = make_norm(model_dim)
        self.feed_forward = FeedForward(model_dim, **feed_forward)

    def forward(
        self,
        x: torch.Tensor,
        neighbour_mask: torch.Tensor | None,
        context: torch.Tensor | None,
        stride: int,
        activation_mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """x [b, l, k, r, model_dim] -> the same; context, stride and activation_mask as `_chunks` gives them."""
        x = self._residual(x, self.self_norm, self.self_attention, neighbour_mask)
        if self.cross_attention is not None and self.cross_norm is not None:
            x = self._residual(
                x,
                self.cross_norm,
                self.cross_attention,
                activation_mask,
                context,
                stride,
                onto_normed=self.cross_residual == "normed",
            )
        return self._residual(x, self.feed_forward_norm, self.feed_forward)

    def _residual(self, x, norm, sublayer, *arguments, onto_normed: bool = False) -> torch.Tensor:
        if self.norm_position == "post":
            added = F.dropout(sublayer(x, *arguments), self.hidden_dropout, self.training)
            return norm(added + (x if self.residual_scale == 1.0 else self.residual_scale * x))
        normed = norm(x)
        added = F.dropout(sublayer(normed, *arguments), self.hidden_dropout, self.training)
        return added + (normed if onto_normed else x)

    def extra_repr(self) -> str:
        return (
            f"norm_position={self.norm_position!r}, residual_scale={self.residual_scale:g}, "
            f"cross_residual={self.cross_residual!r}, hidden_dropout={self.hidden_dropout:g}"
        )


class NeighbourAttention(nn.Module):
    """Projections round `neighbour_self_attention`, or, with `context_dim`, round `neighbour_cross_attention`. The
    arguments are those of `NeighbourEncoder`; `rows` and `slots` are how many positions tables have."""

    def __init__(
        self,
        model_dim: int,
        *,
        context_dim: int | None = None,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        rows: int,
        slots: int,
        positions: str,
        scale: float,
        dropout: float,
        biases: Collection[str],
        relative_dim: int,
        relative_biases: bool,
        rotary_dim: int,
        rotary_base: float,
        rotary_interleaved: bool,
        num_buckets: int | None,
        backend: str | None,
        rotary_frequencies: Sequence[float] | None = None,
        head_norm: Callable[[int], nn.Module] | None = None,
        **factory: Any,
    ) -> None:
        super().__init__()
        self.crosses = context_dim is not None
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.rows, self.slots, self.num_buckets = rows, slots, num_buckets
        self.positions, self.scale, self.dropout, self.backend = positions, scale, dropout, backend
        self.rotary_interleaved = rotary_interleaved
        source_dim = model_dim if context_dim is None else context_dim
        self.w_query = nn.Linear(model_dim, num_heads * head_dim, bias="query" in biases, **factory)
        self.w_key = nn.Linear(source_dim, num_kv_heads * head_dim, bias="key" in biases, **factory)
        self.w_value = nn.Linear(source_dim, num_kv_heads * head_dim, bias="value" in biases, **factory)
        self.w_out = nn.Linear(num_heads * head_dim, model_dim, bias="out" in biases, **factory)
        self.query_norm = None if head_norm is None else head_norm(head_dim)
        self.key_norm = None if head_norm is None else head_norm(head_dim)
        self.relative: RelativePositions | None = None
        self.rotary: RotaryPositions | None = None
        self.attention_bias: nn.Parameter | None
        self.register_parameter("attention_bias", None)
        if positions == "relative":
            self.relative = RelativePositions(
                relative_dim, num_heads=num_heads, head_dim=head_dim, biases=relative_biases, **factory
            )
        elif positions == "rotary":
            if rotary_dim > head_dim:
                raise ValueError(f"rotary_dim: got {rotary_dim}, expected at most head_dim = {head_dim}")
            self.rotary = RotaryPositions(
                range(rows),
                range(slots),
                rotary_dim=rotary_dim,
                base=rotary_base,
                frequencies=rotary_frequencies,
                **factory,
            )
        elif positions == "bias":
            if num_buckets is not None:
                checks.integer("num_buckets", num_buckets, 1)
            size = (num_heads, rows, slots) if num_buckets is None else (num_heads, num_buckets)
            self.attention_bias = nn.Parameter(torch.zeros(size, **factory))

    def forward(
        self,
        x: torch.Tensor,
        mask: torch.Tensor | None = None,
        context: torch.Tensor | None = None,
        stride: int = 0,
    ) -> torch.Tensor:
        """x [b, l, k, r, model_dim]; mask bool [b, l, k, r] of self-attention, [b, l, m] of cross-attention; context
        [b, n, context_dim], chunk u of which is tokens u * stride to u * stride + slots - 1 -> [b, l, k, r, model_dim].
        """
        l, r = x.shape[1], x.shape[3]
        source = x if context is None else context
        query = self.w_query(x).unflatten(-1, (self.num_heads, self.head_dim))
        key = self.w_key(source).unflatten(-1, (self.num_kv_heads, self.head_dim))
        value = self.w_value(source).unflatten(-1, (self.num_kv_heads, self.head_dim))
        if self.query_norm is not None and self.key_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        options = {
            "scale": self.scale,
            "dropout_p": self.dropout if self.training else 0.0,
            "backend": self.backend,
            **self._position_arguments(r, self.slots if self.crosses else r),
        }
        out: Any
        if self.crosses:
            key, value = (_windows(y, l, self.slots, stride) for y in (key, value))
            out = neighbour_cross_attention(query, key, value, activation_mask=mask, **options)
        else:
            out = neighbour_self_attention(query, key, value, neighbour_mask=mask, **options)
        return self.w_out(out.flatten(-2))

    def _position_arguments(self, r: int, slots: int) -> dict[str, Any]:
        if self.relative is not None:
            return self.relative.arguments(r, slots)
        if self.rotary is not None:
            query_rotary, key_rotary = self.rotary(slots, r)
            return {
                "query_rotary": query_rotary,
                "key_rotary": key_rotary,
                "rotary_interleaved": self.rotary_interleaved,
            }
        if self.attention_bias is not None:
            if self.num_buckets is not None:
                buckets = t5_buckets(r, slots, self.num_buckets, device=self.attention_bias.device)
                return {"attention_bias": self.attention_bias[:, buckets]}
            if r > self.rows:
                raise ValueError(
                    f"embeddings: got neighbours of {r} tokens, expected at most {self.rows}, the layer's "
                    "retrieved_length"
                )
            return {"attention_bias": self.attention_bias[:, :r, :slots]}
        return {}

    def extra_repr(self) -> str:
        return (
            f"num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}, head_dim={self.head_dim}, "
            f"positions={self.positions!r}, scale={self.scale:g}, dropout={self.dropout:g}, backend={self.backend!r}"
        )


class FeedForward(nn.Module):
    """w_out(dropout(activation(w_in(x)))), or, gated, w_out(dropout(activation(w_gate(x)) * w_in(x)))."""

    def __init__(
        self,
        model_dim: int,
        *,
        inner_dim: int,
        gated: bool,
        activation: str | Callable[[torch.Tensor], torch.Tensor],
        biases: bool,
        dropout: float,
        **factory: Any,
    ) -> None:
        super().__init__()
        checks.integer("feed_forward_dim", inner_dim, 1)
        if isinstance(activation, str):
            activation = ACTIVATIONS[common.one_of("activation", activation, ACTIVATIONS)]
        self.activation, self.dropout = activation, dropout
        self.w_in = nn.Linear(model_dim, inner_dim, bias=biases, **factory)
        self.w_gate = nn.Linear(model_dim, inner_dim, bias=biases, **factory) if gated else None
        self.w_out = nn.Linear(inner_dim, model_dim, bias=biases, **factory)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner = self.w_in(x)
        inner = self.activation(inner) if self.w_gate is None else self.activation(self.w_gate(x)) * inner
        return self.w_out(F.dropout(inner, self.dropout, self.training))


def _windows(x: torch.Tensor, count: int, size: int, stride: int) -> torch.Tensor:
    """x [b, n, ...] -> its `count` windows of `size` from 0, stride, 2 * stride ..., a view [b, count, size, ...]."""
    if stride == size:
        return x[:, : count * size].unflatten(1, (count, size))
    if count == 0:
        return x.new_empty(x.shape[0], 0, size, *x.shape[2:])
    return x[:, : (count - 1) * stride + size].unfold(1, size, stride).movedim(-1, 2)
