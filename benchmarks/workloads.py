"""What is timed: the shapes of design section 6, the operations they cost and the bytes they must move."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

SEED = 20211208
MODES = ("forward", "forward+backward")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Workload:
    """One shape of chunked cross-attention, front-aligned, stride = chunk size, no mask, bias or null slot
    (so that every alternative may use its fastest path)."""

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

    def on(self, device: torch.device | str) -> Workload:
        """The same with the batch that section 6 gives this kind of device."""
        if self.batch is not None:
            return self
        return replace(self, batch=8 if torch.device(device).type == "cuda" else 1)

    def flops(self, mode: str) -> int:
        """Multiply-adds count two. Forward: query-key and probability-value products; backward: five products,
        the recomputed query-key product among them."""
        product = 2 * self._batch * self.attending_tokens * self.num_heads * self.keys_per_chunk * self.head_dim
        return product * {"forward": 2, "forward+backward": 7}[mode]

    def bytes(self, mode: str, dtype: torch.dtype) -> int:
        """The fewest bytes that must move: every tensor that one pass needs, read or written once. The backward
        reads query, key, value, output, its gradient and the log-sum-exp, and writes three gradients."""
        size = dtype.itemsize
        query = self._batch * self.sequence_length * self.num_heads * self.head_dim * size
        key = self._batch * self.num_chunks * self.keys_per_chunk * self.kv_heads * self.head_dim * size
        lse = self._batch * self.sequence_length * self.num_heads * 4
        forward = 2 * query + 2 * key + lse
        backward = 4 * query + 4 * key + lse
        return forward + (backward if mode == "forward+backward" else 0)

    def inputs(self, dtype: torch.dtype, device: torch.device | str, seed: int = SEED) -> tuple[torch.Tensor, ...]:
        """query [b, n, h, d], key and value [b, l, k, r, hk, d], output gradient [b, n, h, d].

        Values are rounded to bf16 whatever the dtype, so that fp64, fp32 and bf16 inputs are the same numbers and one
        fp64 reference judges them all. Drawn on the device, whose generator decides what a seed means.
        """
        generator = torch.Generator(device=device).manual_seed(seed)
        b, n, h, d = self._batch, self.sequence_length, self.num_heads, self.head_dim
        keys = (b, self.num_chunks, self.num_neighbours, self.retrieved_length, self.kv_heads, d)
        shapes = ((b, n, h, d), keys, keys, (b, n, h, d))
        return tuple(
            torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16).to(dtype) for shape in shapes
        )

    @property
    def _batch(self) -> int:
        if self.batch is None:
            raise ValueError(f"workload {self.name} has no batch yet: call .on(device) first")
        return self.batch

    def describe(self) -> str:
        heads = f"{self.num_heads} heads" + (f" ({self.kv_heads} key/value)" if self.kv_heads != self.num_heads else "")
        return (
            f"b={self.batch or '8 (GPU) or 1 (CPU)'} n={self.sequence_length} m={self.chunk_size} "
            f"k={self.num_neighbours} r={self.retrieved_length} {heads} of {self.head_dim}"
        )


_TABLE = (
    Workload("retro-172m", 16, 64),
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
WORKLOADS = {workload.name: workload for workload in _TABLE}
QUICK = ("retro-172m", "retro-7.5b")
TINY = Workload("tiny", 2, 16, sequence_length=37, chunk_size=8, num_neighbours=2, retrieved_length=16, batch=1)
"""For tests of the suite itself: an incomplete last chunk, and small enough for Triton's interpreter."""


def select(names: list[str] | tuple[str, ...] | None, default: tuple[str, ...] | None = None) -> list[Workload]:
    """The workloads of these names in the order of section 6; raises ValueError for a name there is not."""
    wanted = tuple(names) if names else (default or tuple(WORKLOADS))
    known = {**WORKLOADS, TINY.name: TINY}
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise ValueError(f"unknown workload {', '.join(unknown)}; there are: {', '.join(WORKLOADS)}")
    return [known[name] for name in wanted]


def cases(names: list[str] | None, dtypes: list[str], modes: tuple[str, ...] = MODES) -> Iterator[tuple]:
    """(workload, dtype name, mode), workload outermost so that one fp64 reference serves all of its cases."""
    for workload in select(names):
        for dtype in dtypes:
            for mode in modes:
                yield workload, dtype, mode
