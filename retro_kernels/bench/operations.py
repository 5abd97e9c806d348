"""The kinds of work that are timed, and the interface of every workload. The workload of a kind and its alternatives
have a file each: attention.py, projected.py (with the layer round it) and decoding.py (with the decoder step)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .variants import Attention as Call
from .variants import Skipped, Variant

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
    PROJECTED: (PLAIN,),
    LAYER: (PLAIN,),
    DECODE: (PLAIN,),
    STEP: (RETRIEVAL,),
}


@dataclass(frozen=True)
class Workload(ABC):
    """One shape of one operation: front-aligned, stride = chunk size, no mask, bias or null slot (so that every
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
    whole_length: int | None = None
    """The sequence length before `on` shortened it for a CPU; None where it did not."""

    @property
    def modes(self) -> tuple[str, ...]:
        """The modes that are timed; generation has no backward."""
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
    def dropout_p(self) -> float:
        return DROPOUT_P if self.option == DROPOUT else 0.0

    def on(self, device: torch.device | str) -> Workload:
        """Sets the batch that design section 6 gives this kind of device."""
        if self.batch is not None:
            return self
        return replace(self, batch=8 if torch.device(device).type == "cuda" else 1)

    def with_option(self, option: str) -> Workload:
        return replace(self, option=option)

    @property
    @abstractmethod
    def leaves(self) -> tuple[str, ...]:
        """Names of the differentiable inputs, in order."""

    @abstractmethod
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """The shape of every input, in the order of `leaves`."""

    @abstractmethod
    def flops(self, mode: str) -> int:
        """Operations that the task needs; a multiply-add counts two."""

    @abstractmethod
    def bytes(self, mode: str, dtype: torch.dtype) -> int:
        """The fewest bytes that must move."""

    @abstractmethod
    def attend(self, *tensors: Tensor, backend: str | None = None) -> Tensor:
        """The operation of retro_kernels on the tensors of `leaves`."""

    @abstractmethod
    def eager(self) -> Call:
        """The operation in eager PyTorch, whose error judges the other ways."""

    @abstractmethod
    def variants(
        self, device: torch.device, *, compiled: bool = True, backends: list[str] | None = None
    ) -> list[Variant | Skipped]:
        """Every alternative on this device, retro_kernels' own backends last."""

    def check_room(self, device: torch.device) -> None:  # noqa: B027
        """Raises ValueError where the fp64 reference would not fit."""

    def whole(self) -> Workload | None:
        """One sequence of the whole length, where its memory is told besides; else None."""
        return None

    def release(self) -> None:  # noqa: B027
        """Forgets what variants keep of a case between their calls."""

    def fans_in(self) -> tuple[int, ...]:
        """The fan-in of every leaf; 1 for what is no weight."""
        return (1,) * len(self.leaves)

    def inputs(self, dtype: torch.dtype, device: torch.device | str, seed: int = SEED) -> tuple[Tensor, ...]:
        """The tensors of `leaves`, weights scaled to keep the variance, and the output's gradient.

        Values are rounded to bf16 whatever the dtype, so that fp64, fp32 and bf16 inputs are the same numbers and one
        fp64 reference judges them all. Drawn on the device, whose generator decides what a seed means.
        """
        generator = torch.Generator(device=device).manual_seed(seed)

        def draw(shape: tuple[int, ...], scale: float = 1.0) -> Tensor:
            x = torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16)
            return (x * scale).to(dtype)

        shapes = self.shapes()
        grad_out = draw(shapes[0])
        return (*(draw(shape, fan_in**-0.5) for shape, fan_in in zip(shapes, self.fans_in())), grad_out)

    @property
    def _batch(self) -> int:
        if self.batch is None:
            raise ValueError(f"workload {self.name} has no batch yet: call .on(device) first")
        return self.batch

    def describe(self) -> str:
        heads = f"{self.num_heads} heads" + (f" ({self.kv_heads} key/value)" if self.kv_heads != self.num_heads else "")
        retrieved = (
            ""
            if self.operation == CAUSAL_SELF
            else (f" m={self.chunk_size} k={self.num_neighbours} r={self.retrieved_length}")
        )
        batch = self.batch or "8 (GPU) or 1 (CPU)"
        return f"b={batch} n={self.sequence_length}{retrieved} {heads} of {self.head_dim}; {OPTIONS[self.option]}"
