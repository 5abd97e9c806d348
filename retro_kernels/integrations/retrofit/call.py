"""One call of a retrofitted model: which token sees which chunk's neighbours, and the attention to them.

Chunks are counted in tokens of the text: a token's place is its position in its sequence, left padding not counted.
Neighbour tokens stand at the positions 0 ... r - 1 and the rows of a chunk at r ... r + m - 1, as if each neighbour
stood right before the tokens that read it. The decoder has turned the queries to their own positions already, so that
they are turned on by the difference.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from ...ops.attention.reference import accumulation_dtype
from ...ops.chunked_cross_attention import chunked_cross_attention
from .attention import RetrofitAttention, check_not_reentrant, own_lse, rotate, tables

KeysAndValues = dict[int, tuple[torch.Tensor, torch.Tensor]]
"""Attention -> keys and values [b, l, k, r, hk, d] each."""


class Plan:
    """Which tokens of a call attend, and in which arrangement the operation gets them.

    Attributes:
        num_chunks: chunks l of neighbours that the call needs.
        first_chunk: of each sequence, the number of the first of these chunks: one for all, a list, or int64 [b].
    """

    num_chunks: int
    first_chunk: int | list[int] | torch.Tensor

    def take(self, x: torch.Tensor) -> torch.Tensor:
        """[b, n, ...] -> the rows that attend [b, t, ...]."""
        raise NotImplementedError

    def put(self, x: torch.Tensor, nothing: float) -> torch.Tensor:
        """[b, t, ...] -> [b, n, ...], with `nothing` where a token attends to nothing."""
        raise NotImplementedError

    def attention(self, query: Any, key: Any, value: Any, mask: Any, scale: float, cap: float | None) -> Any:
        """query [b, t, h, d] -> out [b, t, h, d_value] and lse [b, t, h]."""
        return chunked_cross_attention(
            query,
            key,
            value,
            chunk_size=self.rows,
            neighbour_mask=mask,
            scale=scale,
            logit_softcap=cap,
            return_lse=True,
            query_offset=self.rows - 1 + self.row,
        )

    rows: int
    row: int


class Even(Plan):
    """All sequences alike, without padding: tokens `past` ... `past + n - 1`. Nothing is moved."""

    def __init__(self, n: int, past: int, chunk_size: int) -> None:
        m = chunk_size
        self.silent = min(n, max(0, m - 1 - past))
        clock = past + self.silent - (m - 1)
        self.first_chunk, self.row, self.rows = max(clock, 0) // m, max(clock, 0) % m, m
        self.num_chunks = 0 if self.silent == n else (past + n - m) // m + 1 - self.first_chunk

    def take(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, self.silent :]

    def put(self, x: torch.Tensor, nothing: float) -> torch.Tensor:
        return F.pad(x, (*(0, 0) * (x.dim() - 2), self.silent, 0), value=nothing) if self.silent else x


class Uneven(Plan):
    """Sequences that begin at different places (`starts`, int64 [b]): each one's tokens are gathered so that its chunks
    lie on one grid.

    Args:
        first_chunk: int64 [b], the first chunk that each sequence needs.
        num_chunks: the most that one needs.
    """

    row = 0

    def __init__(
        self,
        n: int,
        past: int,
        starts: torch.Tensor,
        first_chunk: torch.Tensor,
        num_chunks: int,
        chunk_size: int,
    ) -> None:
        m = self.rows = chunk_size
        self.num_chunks, self.first_chunk = num_chunks, first_chunk
        begin = (starts + first_chunk * m + m - 1 - past)[:, None]
        slots = torch.arange(num_chunks * m, device=starts.device)
        self.token = (begin + slots).clamp(0, n - 1)
        slot = torch.arange(n, device=starts.device) - begin
        self.silent = (slot < 0) | (slot >= num_chunks * m)
        self.slot = slot.clamp(0, max(num_chunks * m - 1, 0))

    def take(self, x: torch.Tensor) -> torch.Tensor:
        return _gathered(x, self.token)

    def put(self, x: torch.Tensor, nothing: float) -> torch.Tensor:
        silent = self.silent.view(*self.silent.shape, *(1,) * (x.dim() - 2))
        return _gathered(x, self.slot).masked_fill(silent, nothing)


class Step(Plan):
    """One token of every sequence, each with its own chunk; one that has none yet finds its neighbours masked."""

    num_chunks, rows, row = 1, 1, 0

    def __init__(self, first_chunk: list[int]) -> None:
        self.first_chunk = first_chunk

    def take(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def put(self, x: torch.Tensor, nothing: float) -> torch.Tensor:
        return x


def _gathered(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    index = index.view(*index.shape, *(1,) * (x.dim() - 2)).expand(-1, -1, *x.shape[2:])
    return x.gather(1, index)


def joined(out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor) -> torch.Tensor:
    """`rk.join_attention` without the common log-sum-exp, in few operations, since a token that is generated waits for
    each: the second's share of the softmax is a sigmoid, and where it is 0 the first keeps its bits."""
    share = (lse_b - lse_a.clamp(min=torch.finfo(lse_a.dtype).min)).sigmoid()[..., None]
    if out_a.dtype == share.dtype:
        return torch.lerp(out_a, out_b.to(out_a.dtype), share)
    dtype = accumulation_dtype(out_a.dtype)
    return torch.lerp(out_a.to(dtype), out_b.to(dtype), share.to(dtype)).to(out_a.dtype)


class ModelCall:
    """What the attentions need in one call of the model.

    Args:
        plan: which token sees what.
        mask: bool [b, l, k, r], True = a neighbour's token that is seen.
        held: keys and values of every retrofitted attention, or
        states: [b, l, k, r, e], of which each attention makes its own.
        turn: int64 [b or 1, n], by how many positions each query is turned on.
        frequencies: the model's tables, by number.
        watch: whether to see if an open gate changes anything.
        active: the layers whose gates are not all closed.
    """

    def __init__(
        self,
        plan: Plan,
        mask: torch.Tensor,
        turn: torch.Tensor,
        frequencies: list[torch.Tensor],
        held: KeysAndValues | None = None,
        states: torch.Tensor | None = None,
        watch: bool = False,
        active: frozenset[int] = frozenset(),
    ) -> None:
        self.active = active
        self.plan, self.mask, self.held, self.states, self.frequencies = plan, mask, held, states, frequencies
        self.turn = turn
        self.with_gradient = torch.is_grad_enabled()
        self.watch, self.changed = watch, False
        self._tables: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def keys_and_values(self, part: RetrofitAttention) -> tuple[torch.Tensor, torch.Tensor]:
        if self.held is not None:
            return self.held[part.layer]
        frequencies = None if part.rotary is None else self.frequencies[part.rotary[0]]
        return part.keys_and_values(self.states, frequencies)  # type: ignore[arg-type]

    def attend(self, module: Any, base: Any, query: Any, key: Any, value: Any, mask: Any, options: Any) -> Any:
        """See `attention.attend`."""
        part: RetrofitAttention = module.retro
        one_token = isinstance(self.plan, Step) and part.join == "softmax" and not torch.is_grad_enabled()
        if one_token and part.layer in self.active:
            return self._one_softmax(part, query, key, value, mask, options), None
        out, weights = base(module, query, key, value, mask, **options)
        if self.plan.num_chunks == 0 or part.layer not in self.active:
            return out, weights
        check_not_reentrant(self.with_gradient)
        scale, cap = options.get("scaling"), options.get("softcap")
        scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
        found, lse = self._neighbours(part, query.transpose(1, 2), scale, cap)
        if part.join == "add":
            new = out + part.gate(found).to(out.dtype)
        else:
            new = joined(out, own_lse(query, key, mask, scale, cap), found, part.gate(lse))
        if self.watch and not self.changed:
            self.changed = not torch.equal(new, out)
        return new, weights

    def _neighbours(
        self, part: RetrofitAttention, query: torch.Tensor, scale: float, cap: float | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """query [b, n, h, d] -> out [b, n, h, d_value] and lse [b, n, h]."""
        plan = self.plan
        query = self._turned(part, plan.take(query))
        key, value = self.keys_and_values(part)
        out, lse = plan.attention(query, key.to(query.dtype), value.to(query.dtype), self.mask, scale, cap)
        if part.value_map is not None:
            out = part.value_map(out)
        return plan.put(out, 0.0), plan.put(lse, -torch.inf)

    def _turned(self, part: RetrofitAttention, query: torch.Tensor) -> torch.Tensor:
        """The queries [b, t, h, d] that attend, turned on to their places behind a neighbour."""
        if part.rotary is not None:
            number, interleaved = part.rotary
            if number not in self._tables:
                turn = self.turn if self.turn.shape[0] == query.shape[0] else self.turn.expand(query.shape[0], -1)
                self._tables[number] = tables(self.plan.take(turn), self.frequencies[number])
            query = rotate(query, *self._tables[number], interleaved)
        return query if part.query_map is None else part.query_map(query)

    def _one_softmax(
        self, part: RetrofitAttention, query: Any, key: Any, value: Any, mask: Any, options: dict[str, Any]
    ) -> torch.Tensor:
        """What `attend` gives for one new token of every sequence, in as few operations as it takes, since their number
        is what one token costs: the softmax over the text and the neighbours at once. -> [b, 1, h, d_value]."""
        b, h, _, d = query.shape
        hk = key.shape[1]
        scale, cap = options.get("scaling"), options.get("softcap")
        scale = d**-0.5 if scale is None else float(scale)
        dtype = accumulation_dtype(query.dtype)
        turned = self._turned(part, query.transpose(1, 2))
        places, found = (x[:, 0].flatten(1, 2).transpose(1, 2) for x in self.keys_and_values(part))
        logits = []
        for q, k in ((query, key), (turned, places)):
            x = (q.reshape(b, hk, h // hk, d).to(dtype) * scale) @ k.to(dtype).transpose(-1, -2)
            logits.append((x if cap is None else cap * (x / cap).tanh()).view(b, h, -1))
        own, theirs = logits
        if mask is not None:
            mask = mask[:, :, 0, : own.shape[-1]]
            own = own.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else own + mask
        theirs = theirs.masked_fill(~self.mask.view(b, 1, -1), -torch.inf)
        theirs = part.gate(theirs.transpose(1, 2)).transpose(1, 2)
        shares = torch.cat([own, theirs], -1).softmax(-1).view(b, hk, h // hk, -1)
        text, neighbours = shares.split([own.shape[-1], theirs.shape[-1]], -1)
        if self.watch and not self.changed:
            self.changed = bool((neighbours > 0).any())
        added = (neighbours @ found.to(dtype)).view(b, 1, h, -1)
        if part.value_map is not None:
            added = part.value_map(added)
        return ((text @ value.to(dtype)).view(b, 1, h, -1) + added).to(query.dtype)
