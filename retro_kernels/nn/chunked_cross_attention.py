"""The chunked cross-attention layer: projections round `retro_kernels.chunked_cross_attention`."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from ..ops import checks, materialise
from ..ops.checks import document_starts
from ..ops.chunked_cross_attention import chunked_cross_attention
from ..ops.compiling import readable
from . import common
from .positions import RelativePositions, RotaryPositions, t5_buckets

if TYPE_CHECKING:
    from .neighbour_cache import NeighbourCache

NULL_SLOT_STD = 0.02


class ChunkedCrossAttention(nn.Module):
    """Chunked cross-attention (CCA) with its projections, section 2.4 of the RETRO paper (arXiv 2112.04426).

    No normalisation and no residual: `hidden + layer(norm(hidden), encoded)` is the caller's. The class methods
    `paper`, `retro_pytorch`, `megatron`, `norlund`, `labml` and `rpt` build it the way each of these defines it.

    Its parts are the linear layers `w_query`, `w_key`, `w_value`, `w_out`, and where the options ask for them
    `null_key`, `null_value`, `attention_bias` and `relative`. Keys and values have a linear layer each, not one for
    both: `w_key.weight.view(hk, d, e)` is then what the projected operation takes, and every peer's weights load row
    for row. One matrix product for both would save little, since each is already large.

    Args:
        model_dim: width of `hidden` and of the output.
        num_heads: query heads.
        context_dim: width of `encoded`; default `model_dim`.
        num_kv_heads: key/value heads, a divisor of `num_heads`; default `num_heads`.
        head_dim: size of a query or key head; default `model_dim / num_heads`.
        value_head_dim: size of a value head; default `head_dim`.
        chunk_size: m, tokens in a chunk.
        stride: tokens between retrievals, at most `chunk_size`; default `chunk_size`.
        align: "start" (the paper), or "end" (Megatron: the incomplete chunk comes first).
        dropout: on the attention probabilities, in training only.
        scale: factor on the logits; default head_dim ** -0.5.
        biases: which projections have a bias: True, False, or some of "query", "key", "value", "out".
        null_slot: one learned key and value per head that every retrieving token sees.
        positions: "none"; "relative" (equation 6, through `RelativePositions`); "rotary"; "bias" (learned, added to the
            logits, starting at zero).
        retrieved_length: r, the longest neighbour in tokens, where positions are tables; default 2 * chunk_size.
        relative_dim, relative_biases: width of the sinusoid (default `model_dim`), and whether Transformer-XL's u and
            v are learned.
        rotary_dim, rotary_base, rotary_interleaved: how many dimensions turn (default `head_dim`), the base of the
            wavelengths, and whether 2j pairs with 2j + 1 rather than j with j + rotary_dim / 2.
        rotary_frequencies: the rotary_dim / 2 frequencies themselves, in place of those of the base.
        query_positions: the rotary position of each of the `chunk_size` rows; default m - 1 ... 2m - 2, the paper's
            distances.
        key_positions: the rotary position of each token of a neighbour; default 0 ... retrieved_length - 1.
        num_neighbours: k, to give every neighbour a bias of its own ([h, m, k * r]); default one for all ([h, m, r]).
        bias_buckets, num_buckets: integers [m, r] or, with `num_neighbours`, [m, k * r]: entries with the same number
            share one of `num_buckets` (default the largest plus 1) learned biases per head, as in T5. `t5_buckets`
            makes them.
        backend: passed on to the operation; None chooses.
        device, dtype: of the parameters.

    Raises ValueError for sizes that do not fit and for an option that the chosen `positions` would ignore.
    """

    def __init__(
        self,
        model_dim: int,
        *,
        num_heads: int,
        context_dim: int | None = None,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        value_head_dim: int | None = None,
        chunk_size: int = 64,
        stride: int | None = None,
        align: str = "start",
        dropout: float = 0.0,
        scale: float | None = None,
        biases: bool | Collection[str] = False,
        null_slot: bool = False,
        positions: str = "none",
        retrieved_length: int | None = None,
        relative_dim: int | None = None,
        relative_biases: bool = True,
        rotary_dim: int | None = None,
        rotary_base: float = 10000.0,
        rotary_interleaved: bool = False,
        rotary_frequencies: Sequence[float] | None = None,
        query_positions: Sequence[float] | None = None,
        key_positions: Sequence[float] | None = None,
        num_neighbours: int | None = None,
        bias_buckets: torch.Tensor | None = None,
        num_buckets: int | None = None,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.model_dim = checks.integer("model_dim", model_dim, 1)
        self.num_heads = checks.integer("num_heads", num_heads, 1)
        self.context_dim = checks.integer("context_dim", model_dim if context_dim is None else context_dim, 1)
        self.num_kv_heads, head_dim = common.head_sizes(model_dim, num_heads, num_kv_heads, head_dim)
        self.head_dim = head_dim
        value_head_dim = head_dim if value_head_dim is None else value_head_dim
        self.value_head_dim = checks.integer("value_head_dim", value_head_dim, 1)
        self.chunk_size = checks.integer("chunk_size", chunk_size, 1)
        self.stride = chunk_size if stride is None else checks.integer("stride", stride, 1, chunk_size, "chunk_size")
        common.one_of("align", align, ("start", "end"))
        if align == "end" and self.stride != chunk_size:
            raise ValueError(f'stride: got {stride} with align="end", expected chunk_size = {chunk_size}')
        self.align = align
        self.dropout = common.probability("dropout", dropout)
        self.scale = head_dim**-0.5 if scale is None else checks.number("scale", scale)
        self.positions = common.one_of("positions", positions, common.POSITIONS)
        self.backend = backend
        self.null_slot = null_slot
        common.refuse_idle_options(
            positions,
            relative={"relative_dim": relative_dim, "relative_biases": None if relative_biases else False},
            rotary={
                "rotary_dim": rotary_dim,
                "rotary_interleaved": rotary_interleaved or None,
                "rotary_frequencies": rotary_frequencies,
                "query_positions": query_positions,
                "key_positions": key_positions,
            },
            bias={"num_neighbours": num_neighbours, "bias_buckets": bias_buckets, "num_buckets": num_buckets},
        )

        with_bias = common.biased_projections(biases)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        inner, value_inner = num_heads * head_dim, num_heads * self.value_head_dim
        kv_inner, kv_value_inner = self.num_kv_heads * head_dim, self.num_kv_heads * self.value_head_dim
        self.w_query = nn.Linear(model_dim, inner, bias="query" in with_bias, **factory)
        self.w_key = nn.Linear(self.context_dim, kv_inner, bias="key" in with_bias, **factory)
        self.w_value = nn.Linear(self.context_dim, kv_value_inner, bias="value" in with_bias, **factory)
        self.w_out = nn.Linear(value_inner, model_dim, bias="out" in with_bias, **factory)

        self.null_key: nn.Parameter | None
        self.null_value: nn.Parameter | None
        for name, width in (("null_key", head_dim), ("null_value", self.value_head_dim)):
            null = nn.Parameter(torch.empty(num_heads, width, **factory)) if null_slot else None
            self.register_parameter(name, null)
            if null is not None:
                nn.init.normal_(null, std=NULL_SLOT_STD)

        r = 2 * chunk_size if retrieved_length is None else checks.integer("retrieved_length", retrieved_length, 1)
        if key_positions is not None:
            if retrieved_length not in (None, len(key_positions)):
                raise ValueError(
                    f"key_positions: got {len(key_positions)}, expected retrieved_length = {retrieved_length}"
                )
            r = len(key_positions)
        self.retrieved_length = r
        self.num_neighbours = num_neighbours
        self.rotary_interleaved = rotary_interleaved
        self.relative: RelativePositions | None = None
        self.rotary: RotaryPositions | None = None
        self.attention_bias: nn.Parameter | None
        self.bias_buckets: torch.Tensor | None
        self.register_parameter("attention_bias", None)
        self.register_buffer("bias_buckets", None)
        if positions == "relative":
            self.relative = RelativePositions(
                model_dim if relative_dim is None else relative_dim,
                num_heads=num_heads,
                head_dim=head_dim,
                biases=relative_biases,
                **factory,
            )
        elif positions == "rotary":
            turning = {"base": rotary_base, "frequencies": rotary_frequencies, **factory}
            self.rotary = self._rotary_positions(query_positions, key_positions, rotary_dim, turning)
        elif positions == "bias":
            num_keys = r if num_neighbours is None else r * checks.integer("num_neighbours", num_neighbours, 1)
            size: tuple[int, ...] = (num_heads, chunk_size, num_keys)
            if bias_buckets is not None:
                buckets, num_buckets = _check_buckets(bias_buckets, num_buckets, chunk_size, num_keys)
                self.register_buffer("bias_buckets", buckets.to(device=device))
                size = (num_heads, num_buckets)
            elif num_buckets is not None:
                raise ValueError(f"num_buckets: got {num_buckets} without bias_buckets, expected both")
            self.attention_bias = nn.Parameter(torch.zeros(size, **factory))

    def _rotary_positions(self, query_positions, key_positions, rotary_dim, turning) -> RotaryPositions:
        m = self.chunk_size
        rotary_dim = self.head_dim if rotary_dim is None else rotary_dim
        if rotary_dim > self.head_dim:
            raise ValueError(f"rotary_dim: got {rotary_dim}, expected at most head_dim = {self.head_dim}")
        if query_positions is not None and len(query_positions) != m:
            raise ValueError(f"query_positions: got {len(query_positions)}, expected one per row, chunk_size = {m}")
        return RotaryPositions(
            range(m - 1, 2 * m - 1) if query_positions is None else query_positions,
            range(self.retrieved_length) if key_positions is None else key_positions,
            rotary_dim=rotary_dim,
            **turning,
        )

    def forward(
        self,
        hidden: torch.Tensor,
        encoded: torch.Tensor,
        neighbour_mask: torch.Tensor | None = None,
        query_offset: int = 0,
        chunk_offset: int = 0,
        sequence_starts: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Tokens attend to the encoded neighbours of the chunk they follow.

        Args:
            hidden: [b, n, model_dim].
            encoded: [b, l, k, r, context_dim]; chunks beyond those needed are neither projected nor read.
            neighbour_mask: bool [b, l, k, r], True = attend. What a masked token holds reaches nothing.
            query_offset, chunk_offset: absolute position of hidden[:, 0], absolute chunk of encoded[:, 0].
            sequence_starts: bool [b, n], True at the first token of every document packed into a row; the chunks
                restart with each (see the operation). Every chunk is then projected, so surplus ones must be finite.

        Returns:
            [b, n, model_dim], exactly 0 for tokens before the first chunk (of their document), also where the output
            projection has a bias.

        Raises TypeError or ValueError for wrong dtypes and sizes, and whatever `chunked_cross_attention` raises.
        """
        common.check_hidden_and_neighbours(
            hidden, ("model_dim", self.model_dim), "encoded", encoded, ("context_dim", self.context_dim), neighbour_mask
        )
        n, num_chunks = hidden.shape[1], encoded.shape[1]
        checks.integer("query_offset", query_offset, 0)
        checks.integer("chunk_offset", chunk_offset, 0)
        # Tokens before the first chunk are cut off here (zeroed in packed rows) rather than computed and dropped: NaN
        # in them could otherwise reach the gradient of w_query, and the bias of w_out must not reach them.
        silent = None
        if sequence_starts is None:
            before_first, first_chunk, last_chunk = self._attended_chunks(n, query_offset, chunk_offset)
        else:
            before_first, first_chunk, last_chunk = 0, 0, num_chunks
            starts = document_starts(sequence_starts, hidden, hidden.shape[0], n)
            silent = (torch.arange(n, device=hidden.device) - starts < self.chunk_size - 1)[..., None]
            hidden = hidden.masked_fill(silent, 0.0)
        if first_chunk >= 0 and last_chunk <= num_chunks:
            encoded = encoded[:, first_chunk:last_chunk]
            neighbour_mask = None if neighbour_mask is None else neighbour_mask[:, first_chunk:last_chunk]
            chunk_offset += first_chunk
        if neighbour_mask is not None:  # NaN of a masked token would reach the gradients of w_key and w_value
            encoded = encoded.masked_fill(~neighbour_mask[..., None], 0.0)

        by_clock = self.align == "start" and sequence_starts is None
        first_row = (query_offset + before_first - (self.chunk_size - 1)) % self.chunk_size if by_clock else 0
        query = self._project_tokens(self.w_query, hidden[:, before_first:], first_row)
        query = query.unflatten(-1, (self.num_heads, self.head_dim))
        key, value = self.keys_and_values(encoded)
        out: Any = chunked_cross_attention(
            query,
            key,
            value,
            chunk_size=self.chunk_size,
            neighbour_mask=neighbour_mask,
            null_key=self.null_key,
            null_value=self.null_value,
            scale=self.scale,
            dropout_p=self.dropout if self.training else 0.0,
            stride=self.stride,
            align=self.align,
            query_offset=query_offset + before_first if self.align == "start" else query_offset,
            chunk_offset=chunk_offset,
            sequence_starts=sequence_starts,
            backend=self.backend,
            **self._position_arguments(*encoded.shape[2:4]),
        )
        projected = self._project_tokens(self.w_out, out.flatten(2), first_row)
        return projected.masked_fill(silent, 0.0) if silent is not None else F.pad(projected, (0, 0, before_first, 0))

    @torch.no_grad()
    def decode(
        self, hidden: torch.Tensor, cache: NeighbourCache, position: torch.Tensor, *, validate: bool = False
    ) -> torch.Tensor:
        """`forward` for one or a few new tokens of every sequence in a cache.

        On the reference, asked for by name, every token gets the bits that it has in `forward`; elsewhere the same
        within rounding. Inference only: the result has no gradient, and there is no dropout. Nothing waits for a GPU,
        so a CUDA graph may capture it and be replayed after the cache was filled and `position` was written in place.

        Args:
            hidden: [num_slots, t, model_dim], row i for slot i of the cache. What a free slot's row holds is ignored.
            cache: made for this layer, alone or with others.
            position: int64 [num_slots], the position of hidden[:, 0] in its sequence; anything for a free slot. The t
                tokens of a sequence must attend to one chunk, that which was filled into its slot last.
            validate: wait for a GPU and raise where a CPU always does.

        Returns:
            [num_slots, t, model_dim], exactly 0 for tokens before the first chunk and for free slots.

        Raises:
            TypeError, ValueError: wrong sizes, dtypes or devices, a cache that was not made for this layer, dropout in
            training, or, on a CPU or with `validate`, a token that attends to a chunk that the cache does not hold. On
            a GPU such a token comes out NaN.
        """
        self._check_decoding(hidden, cache, position)
        query = self._project_new_tokens(self.w_query, hidden, position)
        query = query.unflatten(-1, (self.num_heads, self.head_dim))
        out = cache.attend(self, query, position, validate=validate)
        projected = self._project_new_tokens(self.w_out, out.flatten(2), position)
        if isinstance(self.w_out, nn.Linear) and self.w_out.bias is None:
            return projected  # 0 where the attention is
        place = _places(position, hidden.shape[1])
        early = (place >= 0) & (place < self.chunk_size - 1)  # a negative place is an error, and NaN
        return projected.masked_fill((early | ~cache.valid[:, None])[..., None], 0.0)

    def keys_and_values(self, encoded: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The projected neighbours: encoded [..., k, r, context_dim] -> keys [..., k, r, hk, head_dim], not turned, and
        values [..., k, r, hk, value_head_dim]."""
        rows, exact = encoded.shape[-3] * encoded.shape[-2], common.exact(self.backend)
        key, value = (common.linear(module, encoded, rows, exact) for module in (self.w_key, self.w_value))
        key = key.unflatten(-1, (self.num_kv_heads, self.head_dim))
        return key, value.unflatten(-1, (self.num_kv_heads, self.value_head_dim))

    def key_and_value_weights(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """The arguments `w_key`, `w_value`, `bias_key` and `bias_value` of the projected operations, as views.

        Raises TypeError if `w_key` or `w_value` is no longer a linear layer, whose weight would not be all there is.
        """
        for name, module in (("w_key", self.w_key), ("w_value", self.w_value)):
            if not isinstance(module, nn.Linear):
                raise TypeError(
                    f"{name}: got {type(module).__name__}, expected torch.nn.Linear, as its weight is used by itself: "
                    'merge adapters into it, or cache keys and values (form="key_value", one_product=False)'
                )
        key_heads, value_heads = (self.num_kv_heads, self.head_dim), (self.num_kv_heads, self.value_head_dim)
        bias_key, bias_value = self.w_key.bias, self.w_value.bias
        return (
            self.w_key.weight.unflatten(0, key_heads),
            self.w_value.weight.unflatten(0, value_heads),
            None if bias_key is None else bias_key.unflatten(0, key_heads),
            None if bias_value is None else bias_value.unflatten(0, value_heads),
        )

    def _project_tokens(self, module: nn.Module, x: torch.Tensor, first_row: int) -> torch.Tensor:
        """`module` on x [b, n, in], whose first token is row `first_row` of its chunk."""
        if not common.exact(self.backend):
            return module(x)
        n = x.shape[1]
        chunks = F.pad(x, (0, 0, first_row, -(first_row + n) % self.chunk_size))
        return common.linear(module, chunks, self.chunk_size, True)[:, first_row : first_row + n]

    def _project_new_tokens(self, module: nn.Module, x: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        """`module` on x [b, t, in], the tokens from `position` [b] on."""
        if not common.exact(self.backend):
            return module(x)
        b, m = x.shape[0], self.chunk_size
        row = torch.arange(b, device=x.device)[:, None], torch.remainder(_places(position, x.shape[1]) - (m - 1), m)
        chunks = x.new_zeros(b, m, x.shape[-1]).index_put(row, x)
        return common.linear(module, chunks, m, True)[row]

    def _attended_chunks(self, n: int, query_offset: int, chunk_offset: int) -> tuple[int, int, int]:
        """How many tokens come before the first chunk, and the [first, last) chunks of `encoded` that the rest need."""
        m = self.chunk_size
        if self.align == "end":
            return min(n, (n - 1) % m), 0, -(-n // m)
        before_first = min(n, max(m - 1 - query_offset, 0))
        if before_first == n:
            return n, 0, 0
        first_chunk = (query_offset + before_first - (m - 1)) // self.stride - chunk_offset
        return before_first, first_chunk, (query_offset + n - m) // self.stride + 1 - chunk_offset

    def _position_arguments(self, k: int, r: int) -> dict[str, Any]:
        if self.relative is not None:
            return self.relative.arguments(self.chunk_size, r, offset=self.chunk_size - 1)
        if self.rotary is not None:
            query_rotary, key_rotary = self.rotary(r)
            return {
                "query_rotary": query_rotary,
                "key_rotary": key_rotary,
                "rotary_interleaved": self.rotary_interleaved,
            }
        if self.attention_bias is not None:
            return {"attention_bias": self._bias(self.attention_bias, k, r)}
        return {}

    def _bias(self, table: torch.Tensor, k: int, r: int) -> torch.Tensor:
        bias = table if self.bias_buckets is None else table[:, self.bias_buckets]
        if self.num_neighbours is None:
            if r > self.retrieved_length:
                raise ValueError(
                    f"encoded: got neighbours of {r} tokens, expected at most {self.retrieved_length}, the layer's "
                    "retrieved_length"
                )
            return bias[..., :r]
        if r != self.retrieved_length or k > self.num_neighbours:
            raise ValueError(
                f"encoded: got {k} neighbours of {r} tokens, expected at most "
                f"num_neighbours = {self.num_neighbours}, each of exactly retrieved_length = {self.retrieved_length}: "
                "the bias counts through all of them"
            )
        return bias[..., : k * r]

    def _check_decoding(self, hidden, cache, position) -> None:
        if not callable(getattr(cache, "place", None)):
            raise TypeError(f"cache: got {type(cache).__name__}, expected a NeighbourCache")
        cache.place(self)  # raises for a cache of other layers
        checks.tensor("hidden", hidden, checks.FLOATING)
        checks.rank("hidden", hidden, "num_slots, t, model_dim")
        cache.check_device("hidden", hidden)
        sizes = (cache.num_slots, hidden.shape[1], self.model_dim)
        checks.shape("hidden", hidden, "num_slots, t, model_dim", sizes)
        checks.tensor("position", position, (torch.int64,), hidden.device)
        checks.shape("position", position, "num_slots", (cache.num_slots,))
        if self.training and self.dropout > 0.0:
            raise ValueError(f"dropout: got {self.dropout} in training mode, but decoding has none; call .eval() first")

    def extra_repr(self) -> str:
        shown = {
            "num_heads": self.num_heads,
            "num_kv_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "value_head_dim": self.value_head_dim,
            "chunk_size": self.chunk_size,
            "stride": self.stride,
            "align": self.align,
            "positions": self.positions,
            "null_slot": self.null_slot,
            "scale": self.scale,
            "dropout": self.dropout,
            "backend": self.backend,
        }
        return ", ".join(f"{name}={value!r}" for name, value in shown.items())

    @classmethod
    def paper(cls, model_dim: int, *, num_heads: int, context_dim: int = 896, **options: Any) -> ChunkedCrossAttention:
        """The paper: relative positions with distance i - t + m - 1, restarted for every neighbour, no null slot, no
        bias. It states neither u and v (here learned, from zero) nor the scale (here head_dim ** -0.5)."""
        settings = {"context_dim": context_dim, "positions": "relative", **options}
        return cls(model_dim, num_heads=num_heads, **settings)

    @classmethod
    def retro_pytorch(
        cls,
        model_dim: int,
        *,
        num_heads: int = 8,
        head_dim: int = 64,
        chunk_size: int = 64,
        query_positions: str | Sequence[float] = "as_trained",
        **options: Any,
    ) -> ChunkedCrossAttention:
        """retro-pytorch 0.3.9: rotary on the first min(head_dim, 32) dimensions, a null slot drawn from N(0, 1), a bias
        on the output projection only. `query_positions="as_trained"` keeps its doubly shifted query positions
        2m - 2, 0, 0, ..., 0, which its trained weights embody; "paper" has m - 1 ... 2m - 2."""
        named = {"as_trained": [2 * chunk_size - 2] + [0] * (chunk_size - 1), "paper": None}
        if isinstance(query_positions, str) and query_positions not in named:
            raise ValueError(f'query_positions: got {query_positions!r}, expected "as_trained", "paper" or numbers')
        settings = {
            "head_dim": head_dim,
            "chunk_size": chunk_size,
            "positions": "rotary",
            "rotary_dim": min(head_dim, 32),
            "query_positions": named[query_positions] if isinstance(query_positions, str) else query_positions,
            "null_slot": True,
            "biases": ("out",),
            **options,
        }
        layer = cls(model_dim, num_heads=num_heads, **settings)
        for null in (layer.null_key, layer.null_value):
            if null is not None:
                nn.init.normal_(null)
        return layer

    @classmethod
    def megatron(cls, model_dim: int, *, num_heads: int, **options: Any) -> ChunkedCrossAttention:
        """Megatron-core 0.15.3: aligned to the end of the sequence, no positions, biases on all projections."""
        return cls(model_dim, num_heads=num_heads, **{"align": "end", "biases": True, **options})

    @classmethod
    def norlund(
        cls,
        model_dim: int,
        *,
        num_heads: int,
        chunk_size: int = 64,
        retrieved_length: int | None = None,
        num_neighbours: int = 2,
        num_buckets: int = 192,
        **options: Any,
    ) -> ChunkedCrossAttention:
        """Norlund et al.: unscaled logits and a T5 bias whose key index runs on through all neighbours, clamped to
        `num_buckets` offsets. Its `relative_attention_bias.weight` is `attention_bias` transposed. With `stride` this
        is PipeRAG's layer."""
        r = 2 * chunk_size if retrieved_length is None else retrieved_length
        settings = {
            "chunk_size": chunk_size,
            "retrieved_length": r,
            "num_neighbours": num_neighbours,
            "positions": "bias",
            "bias_buckets": t5_buckets(chunk_size, num_neighbours * r, num_buckets),
            "num_buckets": num_buckets,
            "scale": 1.0,
            **options,
        }
        return cls(model_dim, num_heads=num_heads, **settings)

    @classmethod
    def labml(cls, model_dim: int, *, num_heads: int, chunk_size: int = 64, **options: Any) -> ChunkedCrossAttention:
        """labml's annotated implementation: no positions, biases on all projections."""
        return cls(model_dim, num_heads=num_heads, chunk_size=chunk_size, **{"biases": True, **options})

    @classmethod
    def rpt(cls, model_dim: int, *, num_heads: int, chunk_size: int = 64, **options: Any) -> ChunkedCrossAttention:
        """Retrieval-Pretrained Transformer: interleaved rotary over whole heads with the paper's distances, no biases,
        a null slot drawn from N(0, 1e-4 ** 2)."""
        settings = {
            "chunk_size": chunk_size,
            "positions": "rotary",
            "rotary_interleaved": True,
            "null_slot": True,
            **options,
        }
        layer = cls(model_dim, num_heads=num_heads, **settings)
        for null in (layer.null_key, layer.null_value):
            if null is not None:
                nn.init.normal_(null, std=1e-4)
        return layer


def project_neighbours(
    layers: Sequence[ChunkedCrossAttention],
    encoded: torch.Tensor,
    stacked: tuple[torch.Tensor, torch.Tensor | None] | None = None,
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """What `keys_and_values` of every layer gives, in one product of matrices for all layers.

    encoded [..., context_dim] -> for every layer keys [..., hk, head_dim] and values [..., hk, value_head_dim], views
    of one tensor. `stacked` is what `stack_projections(layers)` gave, to put the weights side by side once for many
    calls.
    """
    weight, bias = stack_projections(layers) if stacked is None else stacked
    (made,) = materialise.project(encoded, [weight], [bias])
    sizes = [(x.num_kv_heads, width) for x in layers for width in (x.head_dim, x.value_head_dim)]
    parts = made.flatten(-2).split([heads * width for heads, width in sizes], dim=-1)
    heads = [part.unflatten(-1, size) for part, size in zip(parts, sizes)]
    return list(zip(heads[::2], heads[1::2]))


def stack_projections(layers: Sequence[ChunkedCrossAttention]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """W_k and W_v of all layers, one after the other, as one weight [1, all layers' keys and values, context_dim] and,
    where one of them has a bias, one bias [1, all layers' keys and values]."""
    weights, biases = [], []
    for layer in layers:
        w_key, w_value, bias_key, bias_value = layer.key_and_value_weights()
        weights += [w_key.flatten(0, 1), w_value.flatten(0, 1)]
        biases += [bias_key, bias_value]
    bias = None
    if any(x is not None for x in biases):
        bias = torch.cat(
            [weight.new_zeros(len(weight)) if x is None else x.flatten() for weight, x in zip(weights, biases)]
        )[None]
    return torch.cat(weights)[None], bias


def _places(position: torch.Tensor, t: int) -> torch.Tensor:
    """The positions [b, t] of t tokens from `position` [b] on."""
    return position[:, None] + torch.arange(t, device=position.device)


def _check_buckets(buckets: Any, num_buckets: int | None, chunk_size: int, num_keys: int) -> tuple[torch.Tensor, int]:
    checks.tensor("bias_buckets", buckets, (torch.int64, torch.int32))
    checks.shape("bias_buckets", buckets, "m, r | k * r", (chunk_size, num_keys))
    if not readable(buckets):
        if num_buckets is None:
            raise ValueError(
                "num_buckets: got None and bias_buckets without data (a fake or meta tensor), which do not tell how "
                "many there are, expected an int"
            )
        return buckets.to(torch.int64), checks.integer("num_buckets", num_buckets, 1)
    low, high = int(buckets.min()), int(buckets.max())
    num_buckets = high + 1 if num_buckets is None else checks.integer("num_buckets", num_buckets, 1)
    if low < 0 or high >= num_buckets:
        raise ValueError(f"bias_buckets: got {low} to {high}, expected 0 to num_buckets - 1 = {num_buckets - 1}")
    return buckets.to(torch.int64), num_buckets
