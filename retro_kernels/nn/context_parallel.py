"""Rows of tokens divided among processes at chunk borders (context parallelism)."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


class ContextParallel:
    """The processes of a group hold consecutive parts of the same rows, of equally many whole chunks each.

    Everything that works on single tokens, and the encoder, which works on single chunks, need no other process. In
    chunked cross-attention the first m - 1 tokens of a part attend to the chunk before it: its encoded neighbours
    cross the border (`prepend_previous_chunk`), once for all layers. Self-attention sees whole rows: each process
    computes it for a share of the heads (`scatter_heads`, `gather_heads`). Keys and values gathered to every
    process's own queries would give the same, but most of the work to the last process, whose tokens see the most.

    Args:
        group: of torch.distributed; its ranks hold the parts in their order.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)

    def heads(self, num_heads: int) -> slice:
        """Those of this process. Raises ValueError where the heads cannot be shared out equally."""
        if num_heads % self.size:
            raise ValueError(
                f"context_parallel: got {self.size} processes for {num_heads} heads, expected a divisor of them"
            )
        each = num_heads // self.size
        return slice(self.rank * each, (self.rank + 1) * each)

    def scatter_heads(self, x: torch.Tensor) -> torch.Tensor:
        """x [b, n, h, d] of this process's tokens -> [b, size * n, h / size, d], all tokens of its heads. Where there
        are fewer key heads than processes, each goes to several of these."""
        h = x.shape[2]
        if self.size % h == 0:
            x = x.repeat_interleave(self.size // h, dim=2)
        self.heads(x.shape[2])
        parts = x.unflatten(2, (self.size, -1)).movedim(2, 0)
        return _Exchange.apply(parts, self.group).movedim(0, 1).flatten(1, 2)

    def gather_heads(self, x: torch.Tensor) -> torch.Tensor:
        """Back: x [b, size * n, h / size, d] -> [b, n, h, d]."""
        parts = x.unflatten(1, (self.size, -1)).movedim(1, 0)
        return _Exchange.apply(parts, self.group).movedim(0, 2).flatten(2, 3)

    def prepend_previous_chunk(self, x: torch.Tensor) -> torch.Tensor:
        """x [b, l, ...] of this process's chunks -> [b, 1 + l, ...], the last chunk of the process before in front of
        them; [b, l, ...] on the first, which has none. Gradients go back where the chunk came from."""
        if x.dtype == torch.bool:
            return _WithPrevious.apply(x.to(torch.uint8), self).bool()
        return _WithPrevious.apply(x, self)

    def offsets(self, num_tokens: int, chunk_size: int) -> dict[str, int]:
        """`query_offset` and `chunk_offset` of chunked cross-attention, of `num_tokens` tokens here and of encoded
        neighbours that `prepend_previous_chunk` gave."""
        first = self.rank * num_tokens
        return {"query_offset": first, "chunk_offset": max(first // chunk_size - 1, 0)}

    def shift(self, x: torch.Tensor | None, step: int, like: torch.Tensor) -> torch.Tensor | None:
        """Sends x to the process `step` (1 or -1) after this one, if there is one; -> what comes from the other side,
        of the shape of `like`, None at the end of the row."""
        operations, received = [], None
        if x is not None and 0 <= self.rank + step < self.size:
            operations.append(self._operation(dist.isend, x.contiguous(), self.rank + step))
        if 0 <= self.rank - step < self.size:
            received = torch.empty_like(like, memory_format=torch.contiguous_format)
            operations.append(self._operation(dist.irecv, received, self.rank - step))
        for work in dist.batch_isend_irecv(operations) if operations else ():
            work.wait()
        return received

    def _operation(self, kind: Any, x: torch.Tensor, rank: int) -> dist.P2POp:
        return dist.P2POp(kind, x, dist.get_global_rank(self.group, rank), self.group)


class _Exchange(torch.autograd.Function):
    """x [size, ...]: x[i] goes to process i; -> what each sent here."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        x = x.contiguous()
        out = torch.empty_like(x)
        dist.all_to_all_single(out, x, group=group)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _Exchange.apply(gradient, ctx.group), None


class _WithPrevious(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, context: ContextParallel) -> torch.Tensor:
        ctx.context = context
        last = x[:, -1:]
        previous = context.shift(last, 1, last)
        return x.clone() if previous is None else torch.cat([previous, x], dim=1)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        context = ctx.context
        first = gradient[:, :1]
        from_next = context.shift(first, -1, first)
        own = gradient[:, 1:] if context.rank > 0 else gradient
        if from_next is not None:
            own = torch.cat([own[:, :-1], own[:, -1:] + from_next], dim=1)
        return own, None
