"""The sizes and options of a RETRO, and the paper's four."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from ..nn import common
from ..nn.neighbour_encoder import ACTIVATIONS
from ..ops import checks


@dataclass(frozen=True, kw_only=True)
class RetroConfig:
    """The sizes and choices that `Retro` is built from; `config.json` holds the same names. The defaults of what is
    listed under "dialects" are the paper's; each of its options is another implementation's.

    Attributes:
        vocab_size: tokens, of decoder, encoder and readout.
        model_dim, num_layers, num_heads, head_dim, feed_forward_dim: of the decoder. `head_dim` is by default
            `model_dim / num_heads`, `feed_forward_dim` 4 * model_dim.
        num_kv_heads: key/value heads of the decoder's attentions; default `num_heads`.
        cross_attention_kv_heads: of chunked cross-attention alone; default `num_kv_heads`.
        cross_attention_layers: P, the layers with chunked cross-attention, numbered from 1.
        chunk_size, num_neighbours, retrieved_length: m, k and r. Every call may have its own k, and a shorter r.
        encoder_dim, encoder_layers, encoder_heads, encoder_head_dim, encoder_feed_forward_dim: of the encoder.
        encoder_cross_attention_layers: P_enc, numbered from 1.
        max_length: the longest sequence in tokens; a hard limit with rotary or absolute positions, and what training
            uses.
        positions: "relative" (the paper: Transformer-XL's, a projection for every attention), "rotary", "bias" (learned
            by distance) or "none".
        gated_feed_forward, activation: w_out(activation(w_gate x) * w_in x) instead of w_out(activation(w_in x)), in
            decoder and encoder; and the activation.
        cross_attention_gate: multiply chunked cross-attention by tanh of a learned number that starts at zero; or by
            the number given.
        tied_embeddings: the readout is the decoder's embedding table.
        shared_embeddings: the encoder reads through the decoder's embedding table too, which needs encoder_dim =
            model_dim. Otherwise, as in the paper, it has its own.
        dropout, hidden_dropout: on attention probabilities, and on what every part adds; in training only.
        norm_eps: of the norms.
        initializer_range: the standard deviation of fresh weights (see `Retro.reset_parameters`). With 0.02 a narrow
            model's first logits are near zero, its attention all but uniform; `model_dim ** -0.5` keeps their size.
        tokenizer: the name of the tokenizer that made the tokens; checked against a database's where both are known.
        eos_token_id: ends a generated sequence; None if nothing does.

    Dialects:
        embedding_dim: width of the embedding table; where it is not `model_dim` (the default), a linear layer with
            bias follows. Embeddings that are shared need encoder_dim = embedding_dim.
        absolute_positions: a learned embedding of each place, added to the token's: "none", in the "decoder", or in
            "both" (neighbours count from 0).
        self_positions, cross_positions, encoder_positions, encoder_cross_positions: of each attention; default
            `positions`.
        rotary_dim, rotary_base, rotary_interleaved, rotary_frequencies: as in `nn.ChunkedCrossAttention`, of all rotary
            attentions.
        cross_query_positions: of chunked cross-attention's rotary rows; default m - 1 ... 2m - 2.
        self_num_buckets, cross_num_buckets, encoder_num_buckets, encoder_cross_num_buckets: of the biases by distance;
            chunked cross-attention's counts on through all `num_neighbours`.
        attention_scale: factor on all logits; default head_dim ** -0.5.
        null_slot: a learned key and value in chunked cross-attention.
        attention_biases, cross_attention_biases: projections that have a bias, of all attentions and (default the same)
            of those to other tokens: True, False, or some of "query", "key", "value", "out".
        feed_forward_biases: of both feed-forwards.
        qk_norm: self-attentions normalise each head's queries and keys.
        norm: "rms", "layer" or "gated_rms". norm_position: "pre" or "post", where residual_scale and
            encoder_residual_scale multiply what is added to (DeepNet).
        final_norm, encoder_final_norm: whether there is one.
        encoder_output_dim: width of a last linear layer, with bias, of the encoder; None: there is none.
        encoder_conditioning: the encoder sees the decoder's "stream", or what chunked cross-attention's norm makes of
            it ("normed").
        encoder_context_norm: it normalises that again. encoder_cross_residual: its cross-attention is added to its
            "input" or to its "normed" input.
        align, partial_chunk: "end" puts the incomplete chunk first, and it has neighbours too; see
            `nn.NeighbourEncoder`.
        embedding_dropout, feed_forward_dropout; encoder_dropout, encoder_hidden_dropout, encoder_feed_forward_dropout:
            of embeddings and inside feed-forwards; of the encoder alone, by default the decoder's.
        readout_bias: of a readout that is not tied.
        pad_token_id: in neighbours that come without a mask, tokens of this number are masked.

    Raises TypeError or ValueError for what does not fit, naming the field.
    """

    vocab_size: int
    model_dim: int
    num_layers: int
    num_heads: int
    head_dim: int | None = None
    num_kv_heads: int | None = None
    feed_forward_dim: int | None = None
    cross_attention_layers: tuple[int, ...] = (6, 9, 12)
    chunk_size: int = 64
    num_neighbours: int = 2
    retrieved_length: int | None = None
    encoder_dim: int = 896
    encoder_layers: int = 2
    encoder_heads: int = 16
    encoder_head_dim: int = 64
    encoder_feed_forward_dim: int | None = None
    encoder_cross_attention_layers: tuple[int, ...] = (1,)
    max_length: int = 2048
    positions: str = "relative"
    gated_feed_forward: bool = False
    activation: str = "gelu"
    cross_attention_gate: bool | float = False
    tied_embeddings: bool = True
    shared_embeddings: bool = False
    dropout: float = 0.0
    hidden_dropout: float = 0.0
    norm_eps: float = 1e-6
    initializer_range: float = 0.02
    tokenizer: str | None = None
    eos_token_id: int | None = None
    embedding_dim: int | None = None
    cross_attention_kv_heads: int | None = None
    absolute_positions: str = "none"
    self_positions: str | None = None
    cross_positions: str | None = None
    encoder_positions: str | None = None
    encoder_cross_positions: str | None = None
    rotary_dim: int | None = None
    rotary_base: float = 10000.0
    rotary_interleaved: bool = False
    rotary_frequencies: tuple[float, ...] | None = None
    cross_query_positions: tuple[float, ...] | None = None
    self_num_buckets: int | None = None
    cross_num_buckets: int | None = None
    encoder_num_buckets: int | None = None
    encoder_cross_num_buckets: int | None = None
    attention_scale: float | None = None
    null_slot: bool = False
    attention_biases: bool | tuple[str, ...] = False
    cross_attention_biases: bool | tuple[str, ...] | None = None
    feed_forward_biases: bool = False
    qk_norm: bool = False
    norm: str = "rms"
    norm_position: str = "pre"
    residual_scale: float = 1.0
    encoder_residual_scale: float = 1.0
    final_norm: bool = True
    encoder_final_norm: bool = True
    encoder_output_dim: int | None = None
    encoder_conditioning: str = "stream"
    encoder_context_norm: bool = False
    encoder_cross_residual: str = "input"
    align: str = "start"
    partial_chunk: str = "masked"
    embedding_dropout: float = 0.0
    feed_forward_dropout: float = 0.0
    encoder_dropout: float | None = None
    encoder_hidden_dropout: float | None = None
    encoder_feed_forward_dropout: float | None = None
    readout_bias: bool = False
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "model_dim",
            "num_layers",
            "num_heads",
            "chunk_size",
            "num_neighbours",
            "encoder_dim",
            "encoder_layers",
            "encoder_heads",
            "encoder_head_dim",
            "max_length",
        ):
            checks.integer(name, getattr(self, name), 1)
        num_kv_heads, head_dim = common.head_sizes(self.model_dim, self.num_heads, self.num_kv_heads, self.head_dim)
        for name, default in (
            ("head_dim", head_dim),
            ("num_kv_heads", num_kv_heads),
            ("feed_forward_dim", 4 * self.model_dim),
            ("encoder_feed_forward_dim", 4 * self.encoder_dim),
            ("retrieved_length", 2 * self.chunk_size),
            ("embedding_dim", self.model_dim),
            ("cross_attention_kv_heads", num_kv_heads),
        ):
            given = getattr(self, name)
            object.__setattr__(self, name, default if given is None else checks.integer(name, given, 1))
        for name, count in (
            ("cross_attention_layers", self.num_layers),
            ("encoder_cross_attention_layers", self.encoder_layers),
        ):
            layers = tuple(getattr(self, name))
            if list(layers) != sorted(set(layers)) or not set(layers) <= set(range(1, count + 1)):
                raise ValueError(f"{name}: got {list(layers)}, expected numbers from 1 to {count}, rising, each once")
            object.__setattr__(self, name, layers)
        common.one_of("positions", self.positions, common.POSITIONS)
        for name in ("self_positions", "cross_positions", "encoder_positions", "encoder_cross_positions"):
            if getattr(self, name) is not None:
                common.one_of(name, getattr(self, name), common.POSITIONS)
        if self.encoder_output_dim is not None:
            checks.integer("encoder_output_dim", self.encoder_output_dim, 1)
        for name, choices in (
            ("activation", ACTIVATIONS),
            ("absolute_positions", ("none", "decoder", "both")),
            ("norm", common.NORMS),
            ("norm_position", ("pre", "post")),
            ("encoder_conditioning", ("stream", "normed")),
            ("encoder_cross_residual", ("input", "normed")),
            ("align", ("start", "end")),
            ("partial_chunk", ("masked", "zeros")),
        ):
            common.one_of(name, getattr(self, name), choices)
        own, encoder = self.kinds()[:2], self.kinds()[2:]
        for name, width, kinds in (("model_dim", self.model_dim, own), ("encoder_dim", self.encoder_dim, encoder)):
            if "relative" in kinds and width % 2:
                raise ValueError(f'{name}: got {width} with positions="relative", expected an even number')
        for name, width, kinds in (("head_dim", head_dim, own), ("encoder_head_dim", self.encoder_head_dim, encoder)):
            turned = width if self.rotary_dim is None else checks.integer("rotary_dim", self.rotary_dim, 1)
            if "rotary" in kinds and turned % 2:
                name = name if self.rotary_dim is None else "rotary_dim"
                raise ValueError(f'{name}: got {turned} with positions="rotary", expected an even number')
        for name in ("dropout", "hidden_dropout", "embedding_dropout", "feed_forward_dropout"):
            common.probability(name, getattr(self, name))
        for name in ("encoder_dropout", "encoder_hidden_dropout", "encoder_feed_forward_dropout"):
            given = getattr(self, name)
            default = getattr(self, name.removeprefix("encoder_"))
            object.__setattr__(self, name, default if given is None else common.probability(name, given))
        for name in ("norm_eps", "initializer_range", "rotary_base", "residual_scale", "encoder_residual_scale"):
            if checks.number(name, getattr(self, name)) <= 0.0:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected more than 0")
        for name in (
            "gated_feed_forward",
            "tied_embeddings",
            "shared_embeddings",
            "rotary_interleaved",
            "null_slot",
            "feed_forward_biases",
            "qk_norm",
            "final_norm",
            "encoder_final_norm",
            "encoder_context_norm",
            "readout_bias",
        ):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name}: got {getattr(self, name)!r}, expected True or False")
        if not isinstance(self.cross_attention_gate, bool):
            checks.number("cross_attention_gate", self.cross_attention_gate)
        for name in ("attention_biases", "cross_attention_biases"):
            given = self.attention_biases if getattr(self, name) is None else getattr(self, name)
            given = given if isinstance(given, bool) else tuple(given)
            common.biased_projections(given)
            object.__setattr__(self, name, given)
        for name in ("rotary_frequencies", "cross_query_positions"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, tuple(float(x) for x in getattr(self, name)))
        if self.shared_embeddings and self.encoder_dim != self.embedding_dim:
            which = "model_dim" if self.embedding_dim == self.model_dim else "embedding_dim"
            raise ValueError(
                f"encoder_dim: got {self.encoder_dim} with shared_embeddings=True, expected {self.embedding_dim}, the "
                f"{which}"
            )
        if self.tied_embeddings and self.embedding_dim != self.model_dim:
            raise ValueError(
                f"embedding_dim: got {self.embedding_dim} with tied_embeddings=True, expected {self.model_dim}, the "
                "model_dim"
            )
        if self.tied_embeddings and self.readout_bias:
            raise ValueError("readout_bias: got True with tied_embeddings=True, expected False")
        if self.absolute_positions == "both" and self.encoder_dim != self.embedding_dim:
            raise ValueError(
                f'encoder_dim: got {self.encoder_dim} with absolute_positions="both", expected {self.embedding_dim}, '
                "the embedding_dim"
            )
        for name in ("eos_token_id", "pad_token_id"):
            if getattr(self, name) is not None:
                checks.integer(name, getattr(self, name), 0, self.vocab_size - 1, "vocab_size - 1")
        if self.tokenizer is not None and not isinstance(self.tokenizer, str):
            raise TypeError(f"tokenizer: got {self.tokenizer!r}, expected the name of a tokenizer, or None")

    def kinds(self) -> tuple[str, str, str, str]:
        """The positions of self-attention, chunked cross-attention, and the encoder's self- and cross-attention."""
        given = self.self_positions, self.cross_positions, self.encoder_positions, self.encoder_cross_positions
        own, cross, encoder, encoder_cross = (self.positions if x is None else x for x in given)
        return own, cross, encoder, encoder_cross

    @property
    def hard_limit(self) -> int | None:
        """The longest sequence that the positions allow; None where they know no longest."""
        tables = self.kinds()[0] == "rotary" or self.absolute_positions != "none"
        return self.max_length if tables else None

    @property
    def context_dim(self) -> int:
        """The width of the encoded neighbours."""
        return self.encoder_dim if self.encoder_output_dim is None else self.encoder_output_dim

    def num_chunks(self, length: int) -> int:
        """How many chunks of `length` tokens have neighbours."""
        return length // self.chunk_size if self.align == "start" else -(-length // self.chunk_size)

    @classmethod
    def preset(cls, name: str, **changes: Any) -> RetroConfig:
        """One of PRESETS, with some fields changed: `RetroConfig.preset("retro-425m", vocab_size=32000)`.

        The paper (tables 2 and 10) contradicts itself in places; these presets choose what gives its own counts of
        parameters. Chunked cross-attention begins at layer 6 in all sizes (section 2.5, and table 12), where table 10
        has 9 for the two large ones: with 9 the 1.5B model would have 1.44 billion parameters. The encoder has 16 heads
        of 64, not 896 / 64 = 14. The readout is the embedding table: the paper's other names, 247M, 564M, 1,574M and
        7,505M, are its decoders with one table of 128,000 tokens. Not in the paper, and so: no biases but u and v,
        GELU, norms before each part and after the last, logits scaled by head_dim ** -0.5.
        """
        common.one_of("name", name, PRESETS)
        return cls(**{**PRESETS[name], **changes})

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> RetroConfig:
        """From what `to_dict` gave, or a file. Raises ValueError for unknown and for missing names."""
        fields = {field.name: field for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - set(fields))
        if unknown:
            raise ValueError(f"config: got unknown names {', '.join(unknown)}; known are {', '.join(fields)}")
        missing = [
            name for name, field in fields.items() if field.default is dataclasses.MISSING and name not in values
        ]
        if missing:
            raise ValueError(f"config: {', '.join(missing)} missing, expected a value for each")
        given: dict[str, Any] = {key: tuple(x) if isinstance(x, list) else x for key, x in values.items()}
        return cls(**given)

    def to_dict(self) -> dict[str, Any]:
        """All fields, as JSON knows them."""
        values = dataclasses.asdict(self)
        return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}

    def forward_flops(self, length: int | None = None) -> dict[str, int]:
        """Floating-point operations (two for a multiplication and its addition) of a forward pass over one sequence of
        `length` tokens (default `max_length`), in matrix products only, by part: "decoder", "readout" (of the tied or
        untied table), and what retrieval adds, "cross-attention" and "encoder". A backward pass has twice as many.
        The relative positions' own projections depend on no token and are counted once a sequence, under their part."""
        n = self.max_length if length is None else length
        relative, cross_relative, encoder_relative, encoder_cross_relative = (x == "relative" for x in self.kinds())
        d, h, hk, f = self.head_dim or 0, self.num_heads, self.num_kv_heads or 0, self.feed_forward_dim or 0
        w, e, r, m = self.model_dim, self.encoder_dim, self.retrieved_length or 0, self.chunk_size
        c, cross_hk = self.context_dim, self.cross_attention_kv_heads or 0
        k, l = self.num_neighbours, self.num_chunks(n)
        products = 3 if self.gated_feed_forward else 2
        pairs = n * (n + 1) // 2

        def attention(relative: bool, pairs: int, rows: int, width: int, inner: int) -> int:
            return (6 if relative else 4) * pairs * inner + (2 * rows * width * inner if relative else 0)

        own = 4 * n * w * d * (h + hk) + attention(relative, pairs, 2 * n - 1, w, h * d)
        decoder = self.num_layers * (own + 2 * products * n * w * f)
        decoder += 2 * n * (self.embedding_dim or 0) * w if self.embedding_dim != w else 0
        cross = 4 * n * w * h * d + 4 * l * k * r * c * cross_hk * d
        cross += attention(cross_relative, l * m * k * r, m + r - 1, w, h * d)
        inner, tokens = self.encoder_heads * self.encoder_head_dim, l * k * r
        encoder_self = 8 * tokens * e * inner + attention(encoder_relative, tokens * r, 2 * r - 1, e, inner)
        encoder_cross = 4 * tokens * e * inner + 4 * n * w * inner
        encoder_cross += attention(encoder_cross_relative, tokens * m, m + r - 1, e, inner)
        encoder = self.encoder_layers * (
            encoder_self + 2 * products * tokens * e * (self.encoder_feed_forward_dim or 0)
        )
        encoder += len(self.encoder_cross_attention_layers) * encoder_cross
        encoder += 0 if self.encoder_output_dim is None else 2 * tokens * e * c
        return {
            "decoder": decoder,
            "readout": 2 * n * w * self.vocab_size,
            "cross-attention": len(self.cross_attention_layers) * cross,
            "encoder": encoder if self.cross_attention_layers else 0,
        }


_PAPER: dict[str, Any] = {"vocab_size": 128000, "encoder_dim": 896, "encoder_heads": 16, "encoder_head_dim": 64}
_TINY: dict[str, Any] = {
    "vocab_size": 64,
    "model_dim": 32,
    "num_layers": 3,
    "num_heads": 2,
    "cross_attention_layers": (2, 3),
    "chunk_size": 4,
    "num_neighbours": 2,
    "encoder_dim": 16,
    "encoder_heads": 2,
    "encoder_head_dim": 8,
    "max_length": 64,
}
PRESETS: dict[str, dict[str, Any]] = {
    "retro-172m": {
        **_PAPER,
        "model_dim": 896,
        "num_layers": 12,
        "num_heads": 16,
        "head_dim": 64,
        "cross_attention_layers": (6, 9, 12),
    },
    "retro-425m": {
        **_PAPER,
        "model_dim": 1536,
        "num_layers": 12,
        "num_heads": 12,
        "cross_attention_layers": (6, 9, 12),
    },
    "retro-1.5b": {
        **_PAPER,
        "model_dim": 2048,
        "num_layers": 24,
        "num_heads": 16,
        "cross_attention_layers": (*range(6, 25, 3),),
    },
    "retro-7.5b": {
        **_PAPER,
        "model_dim": 4096,
        "num_layers": 32,
        "num_heads": 32,
        "cross_attention_layers": (*range(6, 33, 3),),
    },
    "small": {  # what two CPU cores train in minutes: make journey
        "vocab_size": 4096,
        "model_dim": 192,
        "num_layers": 4,
        "num_heads": 3,
        "cross_attention_layers": (2, 4),
        "chunk_size": 32,
        "encoder_dim": 192,
        "encoder_layers": 2,
        "encoder_heads": 3,
        "shared_embeddings": True,
        "max_length": 256,
        "initializer_range": 0.05,
    },
    "tiny": _TINY,
    "tiny-rotary": {
        **_TINY,
        "positions": "rotary",
        "gated_feed_forward": True,
        "activation": "silu",
        "num_kv_heads": 1,
        "tied_embeddings": False,
        "cross_attention_gate": True,
    },
}
