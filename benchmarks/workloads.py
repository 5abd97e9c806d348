"""What is timed: the attentions at the shapes of design section 6, the operations they cost and the bytes they must
move. What is built around chunked cross-attention is in layers.py (projections and the layer) and decoding.py."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

SEED = 20211208
MODES = ("forward", "forward+backward")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DROPOUT_P = 0.1

CCA, ENCODER_SELF, ENCODER_CROSS, CAUSAL_SELF = "cca", "encoder-self", "encoder-cross", "causal-self"
PROJECTED, LAYER, DECODE, STEP = "cca-projected", "cca-layer", "cca-decode", "decoder-step"
ATTENTIONS = {
    CCA: "Chunked cross-attention",
    ENCODER_SELF: "Encoder self-attention",
    ENCODER_CROSS: "Encoder cross-attention",
    CAUSAL_SELF: "Causal self-attention of a decoder row",
}
OPERATIONS = {
    **ATTENTIONS,
    PROJECTED: "Chunked cross-attention with its key and value projections, both strategies",
    LAYER: "The layer: norm, projections, chunked cross-attention, output projection, residual",
    DECODE: "Decoding: one token of every sequence against its chunk's neighbours",
    STEP: "A decoder step, retrieval on against off",
}
PLAIN, RELATIVE, DROPOUT, RETRIEVAL = "plain", "relative", "dropout", "retrieval"
OPTIONS = {
    PLAIN: "no positions, no dropout",
    RELATIVE: "the paper's relative positions, with u and v",
    DROPOUT: f"dropout {DROPOUT_P:g} on the probabilities",
    RETRIEVAL: "with chunked cross-attention in every third layer",
}
OPTIONS_OF = {
    **dict.fromkeys(ATTENTIONS, (PLAIN, RELATIVE, DROPOUT)),
    PROJECTED: (PLAIN,), LAYER: (PLAIN,), DECODE: (PLAIN,), STEP: (RETRIEVAL,),
}  # fmt: skip


@dataclass(frozen=True)
class Workload:
    """One shape of one attention: front-aligned, stride = chunk size, no mask, bias or null slot (so that every
    alternative may use its fastest path), and at most one of OPTIONS."""

    name: str
    num_heads: int
    head_dim: int
    encoder_dim: int = 896
    num_kv_heads: int | None = None
    sequence_length: int = 2048
    chunk_size: int = 64
    num_neighbours: int = 2
    retrieved_length: int = 128
    batch: int | None = None
    """Sequences; None stands for 8 on a GPU and 1 on a CPU."""
    model_dim: int | None = None
    """Width of the decoder; None: all heads side by side."""
    operation: str = CCA
    option: str = PLAIN

    @property
    def modes(self) -> tuple[str, ...]:
        """Those that are timed; what only generates has no backward."""
        return MODES

    @property
    def kv_heads(self) -> int:
        return self.num_kv_heads or self.num_heads

    @property
    def num_chunks(self) -> int:
        return self.sequence_length // self.chunk_size

    @property
    def keys_per_chunk(self) -> int:
        return self.num_neighbours * self.retrieved_length

    @property
    def attending_tokens(self) -> int:
        """Tokens of one sequence that have a chunk to attend to."""
        return max(0, self.sequence_length - self.chunk_size + 1)

    @property
    def rows(self) -> int:
        """M of the operation's contract: rows of the tables."""
        rows = {CCA: self.chunk_size, CAUSAL_SELF: self.sequence_length}
        return rows.get(self.operation, self.retrieved_length)

    @property
    def slots(self) -> int:
        """Tokens on the key's token axis."""
        slots = {ENCODER_CROSS: self.chunk_size, CAUSAL_SELF: self.sequence_length}
        return slots.get(self.operation, self.retrieved_length)

    @property
    def dropout_p(self) -> float:
        return DROPOUT_P if self.option == DROPOUT else 0.0

    @property
    def leaves(self) -> tuple[str, ...]:
        """Names of the differentiable inputs, in order."""
        positions = ("relative_key", "content_bias", "relative_bias") if self.option == RELATIVE else ()
        return ("query", "key", "value", *positions)

    def on(self, device: torch.device | str) -> Workload:
        """The same with the batch that section 6 gives this kind of device."""
        if self.batch is not None:
            return self
        return replace(self, batch=8 if torch.device(device).type == "cuda" else 1)

    def with_option(self, option: str) -> Workload:
        return replace(self, option=option)

    def pairs(self) -> tuple[int, int]:
        """(row, slot) pairs of all sequences and one head that attend, and those among them that need a positional
        term of their own: one neighbour's of a chunk, whose rows and distances the others share."""
        b, chunks, r = self._batch, self.num_chunks, self.retrieved_length
        if self.operation == CCA:
            one = b * self.attending_tokens * r
            return one * self.num_neighbours, one
        if self.operation == CAUSAL_SELF:
            all_pairs = b * self.sequence_length * (self.sequence_length + 1) // 2
        else:
            all_pairs = b * chunks * self.num_neighbours * r * self.slots
        return all_pairs, all_pairs

    def flops(self, mode: str) -> int:
        """Multiply-adds count two. Forward: query-key and probability-value products, and one with the positions;
        backward: five products, the recomputed query-key product among them, and three with the positions."""
        pairs, positional = (2 * self.num_heads * self.head_dim * number for number in self.pairs())
        both = mode == "forward+backward"
        return pairs * (7 if both else 2) + (positional * (4 if both else 1) if self.option == RELATIVE else 0)

    def bytes(self, mode: str, dtype: torch.dtype) -> int:
        """The fewest bytes that must move: every tensor that one pass needs, read or written once. The backward
        reads the inputs, the output, its gradient and the log-sum-exp, and writes the gradients."""
        size = dtype.itemsize
        query, key, _, *positions = (_product(shape) for shape in self.shapes())
        lse = query // self.head_dim * 4
        forward = (2 * query + 2 * key + sum(positions)) * size + lse
        backward = (4 * query + 4 * key + 2 * sum(positions)) * size + lse
        return forward + (backward if mode == "forward+backward" else 0)

    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Of every input in the order of `leaves`."""
        b, n, h, hk, d = self._batch, self.sequence_length, self.num_heads, self.kv_heads, self.head_dim
        chunks, m, k, r = self.num_chunks, self.chunk_size, self.num_neighbours, self.retrieved_length
        retrieved = (b, chunks, k, r)
        query, key = {
            CCA: ((b, n), retrieved),
            ENCODER_SELF: (retrieved, retrieved),
            ENCODER_CROSS: (retrieved, (b, chunks, m)),
            CAUSAL_SELF: ((b, 1, 1, n), (b, 1, 1, n)),
        }[self.operation]
        positions = ((h, self.rows + self.slots - 1, d), (h, d), (h, d)) if self.option == RELATIVE else ()
        return ((*query, h, d), (*key, hk, d), (*key, hk, d), *positions)

    def inputs(self, dtype: torch.dtype, device: torch.device | str, seed: int = SEED) -> tuple[Tensor, ...]:
        """The tensors of `leaves` and the output's gradient.

        Values are rounded to bf16 whatever the dtype, so that fp64, fp32 and bf16 inputs are the same numbers and one
        fp64 reference judges them all. Drawn on the device, whose generator decides what a seed means.
        """
        generator = torch.Generator(device=device).manual_seed(seed)

        def draw(shape: tuple[int, ...]) -> Tensor:
            return torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16).to(dtype)

        shapes = self.shapes()
        grad_out, tensors = draw(shapes[0]), [draw(shape) for shape in shapes]
        return (*tensors, grad_out)

    def attend(self, *tensors: Tensor, backend: str | None = None) -> Tensor:
        """The operation of retro_kernels on the tensors of `leaves`."""
        import retro_kernels as rk

        options = dict(zip(self.leaves[3:], tensors[3:]), dropout_p=self.dropout_p, backend=backend)
        if self.operation == CCA:
            return rk.chunked_cross_attention(*tensors[:3], chunk_size=self.chunk_size, **options)
        if self.operation == ENCODER_CROSS:
            return rk.neighbour_cross_attention(*tensors[:3], **options)
        return rk.neighbour_self_attention(*tensors[:3], causal=self.operation == CAUSAL_SELF, **options)

    @property
    def _batch(self) -> int:
        if self.batch is None:
            raise ValueError(f"workload {self.name} has no batch yet: call .on(device) first")
        return self.batch

    def describe(self) -> str:
        heads = f"{self.num_heads} heads" + (f" ({self.kv_heads} key/value)" if self.kv_heads != self.num_heads else "")
        retrieved = "" if self.operation == CAUSAL_SELF else (
            f" m={self.chunk_size} k={self.num_neighbours} r={self.retrieved_length}"
        )  # fmt: skip
        batch = self.batch or "8 (GPU) or 1 (CPU)"
        return f"b={batch} n={self.sequence_length}{retrieved} {heads} of {self.head_dim}; {OPTIONS[self.option]}"


def _product(shape: tuple[int, ...]) -> int:
    result = 1
    for size in shape:
        result *= size
    return result


_DECODERS = (
    Workload("retro-172m", 16, 64, model_dim=896),
    Workload("retro-425m", 12, 128),
    Workload("retro-1.5b", 16, 128),
    Workload("retro-7.5b", 32, 128),
    Workload("retro-7.5b-k1", 32, 128, num_neighbours=1),
    Workload("retro-7.5b-k10", 32, 128, num_neighbours=10),
    Workload("retro-7.5b-k40", 32, 128, num_neighbours=40),
    Workload("megatron-8b", 32, 128, encoder_dim=4096, sequence_length=4096),
    Workload("gqa-8b", 32, 128, encoder_dim=4096, num_kv_heads=8, sequence_length=4096),
    Workload("lucidrains", 8, 64),
)
BATCHES = (1, 8, 64, 256)
_GENERATING = tuple(
    replace(workload, name=f"{workload.name}-batch-{batch}", batch=batch)
    for workload in _DECODERS if workload.name in ("retro-172m", "retro-425m", "retro-7.5b") for batch in BATCHES
)  # fmt: skip
# The encoders of the workloads above: all of width 896 at one k are one, and so are the two of width 4096.
_ENCODERS = (
    Workload("encoder-896", 14, 64),
    Workload("encoder-896-k1", 14, 64, num_neighbours=1),
    Workload("encoder-896-k10", 14, 64, num_neighbours=10),
    Workload("encoder-896-k40", 14, 64, num_neighbours=40),
    Workload("encoder-4096", 32, 128, encoder_dim=4096, sequence_length=4096),
)
WORKLOADS = {workload.name: workload for workload in (*_DECODERS, *_ENCODERS, *_GENERATING)}
TINY = Workload("tiny", 2, 16, sequence_length=37, chunk_size=8, num_neighbours=2, retrieved_length=16, batch=1)
"""For tests of the suite itself, every operation: an incomplete last chunk, small enough for Triton's interpreter."""

_ENCODER_NAMES = tuple(workload.name for workload in _ENCODERS)
_DECODER_NAMES = tuple(workload.name for workload in _DECODERS)
_ONE_ROW = tuple(name for name in _DECODER_NAMES if "-k" not in name and name != "retro-1.5b")
_BATCH_NAMES = tuple(workload.name for workload in _GENERATING)
NAMES = {
    CCA: _DECODER_NAMES, ENCODER_SELF: _ENCODER_NAMES, ENCODER_CROSS: _ENCODER_NAMES, CAUSAL_SELF: _ONE_ROW,
    PROJECTED: _DECODER_NAMES, LAYER: _DECODER_NAMES, DECODE: _BATCH_NAMES, STEP: _BATCH_NAMES,
}  # fmt: skip
"""The workloads of each operation. (For a decoder's self-attention k changes nothing.)"""

DEFAULT = {
    (CCA, PLAIN): NAMES[CCA],
    (ENCODER_SELF, PLAIN): NAMES[ENCODER_SELF],
    (ENCODER_CROSS, PLAIN): NAMES[ENCODER_CROSS],
    (CAUSAL_SELF, PLAIN): ("retro-172m",),
    (CCA, RELATIVE): ("retro-172m", "retro-425m", "retro-7.5b"),
    (ENCODER_SELF, RELATIVE): ("encoder-896", "encoder-4096"),
    (ENCODER_CROSS, RELATIVE): ("encoder-896", "encoder-4096"),
    (CAUSAL_SELF, RELATIVE): ("retro-172m", "retro-425m"),
    (CCA, DROPOUT): ("retro-172m",),
    (ENCODER_SELF, DROPOUT): ("encoder-896",),
    (ENCODER_CROSS, DROPOUT): ("encoder-896",),
    (PROJECTED, PLAIN): NAMES[PROJECTED],
    (LAYER, PLAIN): ("retro-172m", "retro-425m", "retro-7.5b", "gqa-8b"),
    (DECODE, PLAIN): tuple(f"retro-7.5b-batch-{batch}" for batch in BATCHES),
    (STEP, RETRIEVAL): ("retro-172m-batch-1", "retro-7.5b-batch-1", "retro-7.5b-batch-8"),
}
"""What a run times when it is not told, by (operation, option)."""

QUICK = {
    (CCA, PLAIN): ("retro-172m",),
    (ENCODER_SELF, PLAIN): ("encoder-896",),
    (ENCODER_CROSS, PLAIN): ("encoder-896",),
    (CCA, RELATIVE): ("retro-172m",),
    (LAYER, PLAIN): ("retro-172m",),
    (DECODE, PLAIN): ("retro-7.5b-batch-8",),
}

GOALS = {(LAYER, "retro-7.5b"), (PROJECTED, "retro-7.5b"), (PROJECTED, "retro-425m"), (CCA, "retro-7.5b")}
"""Where a goal is stated or the README shows it: a run of limited time takes these (operation, workload) early."""


def of_operation(workload: Workload, operation: str, option: str) -> Workload:
    """The same shape as another operation."""
    kind = Workload
    if operation in (PROJECTED, LAYER):
        from .layers import Layer, Projected

        kind = Layer if operation == LAYER else Projected
    elif operation in (DECODE, STEP):
        from .decoding import Decode, Step

        kind = Step if operation == STEP else Decode
    return kind(**{**vars(workload), "operation": operation, "option": option})


def select(
    names: list[str] | tuple[str, ...] | None = None,
    operations: list[str] | tuple[str, ...] | None = None,
    options: list[str] | tuple[str, ...] | None = None,
    default: dict[tuple[str, str], tuple[str, ...]] | None = None,
) -> list[Workload]:
    """The workloads of these names, operations and options. What is not named is as in `default` (or DEFAULT); a name
    that is given is taken with every operation that has it. One workload's options stand side by side, plain first.

    Raises ValueError for what there is not.
    """
    _check_known("operation", operations, OPERATIONS)
    _check_known("option", options, OPTIONS)
    _check_known("workload", names, (*WORKLOADS, TINY.name))
    table = default or DEFAULT
    known = {**WORKLOADS, TINY.name: TINY}
    found = []
    for operation in operations or OPERATIONS:
        listed = {option: table[operation, option] for option in OPTIONS if (operation, option) in table}
        for name in names or dict.fromkeys(name for group in listed.values() for name in group):
            if name not in (*NAMES[operation], TINY.name):
                continue
            usual = [option for option, group in listed.items() if name in group]
            for option in options or usual or OPTIONS_OF[operation][:1]:
                if option in OPTIONS_OF[operation] and (names or option in usual or option not in listed):
                    found.append(of_operation(known[name], operation, option))
    if not found:
        raise ValueError(
            f"workload, operation: got {', '.join(names or ['all'])} and {', '.join(operations or ['all'])}, no case "
            f"in common; {ENCODER_SELF} and {ENCODER_CROSS} have the workloads encoder-..., {DECODE} and {STEP} those "
            "of a batch, the others the rest"
        )
    return found


def _check_known(what: str, given, there) -> None:
    unknown = [name for name in given or () if name not in there]
    if unknown:
        raise ValueError(f"unknown {what} {', '.join(unknown)}; there are: {', '.join(there)}")
