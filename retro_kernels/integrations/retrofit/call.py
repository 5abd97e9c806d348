"""One call of a retrofitted model: which token sees which chunk's neighbours, and the attention to them.

Chunks are counted in tokens of the text: a token's place is its position in its sequence, left padding not counted.
Neighbour tokens stand at the positions 0 ... r - 1 and the rows of a chunk at r ... r + m - 1, as if each neighbour
stood right before the tokens that read it. The decoder has turned the queries to their own positions already, so that
they are turned on by the difference.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from ...ops.attention.reference import accumulation_dtype
from ...ops.chunked_cross_attention import chunked_cross_attention
from .attention import RetrofitAttention, check_not_reentrant, in_use, own_lse, rotate, tables

KeysAndValues = dict[int, tuple[torch.Tensor, torch.Tensor]]
"""Attention -> keys and values [b, l, k, r, hk, d] each."""
Laid = Callable[[int], tuple[torch.Tensor, torch.Tensor]]
"""Of an attention, keys and values [b * hk, k * r, d] each."""


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
        held: keys and values of the active attentions (of a step [b, k, r, hk, d]), or
        states: [b, l, k, r, e], of which each attention makes its own.
        turn: int64 [b or 1, n], by how many positions each query is turned on.
        frequencies: the model's tables, by number.
        watch: whether to see if an open gate changes anything.
        active: the layers whose gates are not all closed.
        laid: what is held for a step, laid out for it.
        shares: of some layers, how much of what the neighbours change each head takes, [h]; None: all.
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
        laid: Laid | None = None,
        shares: dict[int, torch.Tensor] | None = None,
    ) -> None:
        self.active, self.laid, self.shares = active, laid, shares
        self.plan, self.mask, self.held, self.states, self.frequencies = plan, mask, held, states, frequencies
        self.turn = turn
        self.with_gradient = torch.is_grad_enabled()
        self.watch, self.changed = watch, False
        self.later: tuple[int, Callable[[torch.Tensor, torch.Tensor], None]] | None = None
        """An attention, and what to do with its keys and values of the text before neighbours are looked at: it reads
        them, and gives `held` and `mask`."""
        self._tables: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._turners: dict[tuple[int, bool, int], torch.Tensor] = {}
        self._hidden: torch.Tensor | None = None

    def keys_and_values(self, part: RetrofitAttention) -> tuple[torch.Tensor, torch.Tensor]:
        if self.held is not None:
            key, value = self.held[part.layer]
            return (key[:, None], value[:, None]) if isinstance(self.plan, Step) else (key, value)
        frequencies = None if part.rotary is None else self.frequencies[part.rotary[0]]
        return part.keys_and_values(self.states, frequencies)  # type: ignore[arg-type]

    def attend(self, module: Any, base: Any, query: Any, key: Any, value: Any, mask: Any, options: Any) -> Any:
        """See `attention.attend`."""
        part: RetrofitAttention = module.retro
        if self.later is not None and self.later[0] == part.layer:
            check_not_reentrant(self.with_gradient)
            (_, read), self.later = self.later, None
            read(key, value)
        if self.laid is not None and part.join == "softmax" and part.layer in self.active and not self.with_gradient:
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
        if self.shares is not None:
            new = out + self.shares[part.layer][:, None] * (new - out)
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
            query = rotate(query, *self._tables_of(number, query.shape[0]), interleaved)
        return query if part.query_map is None else part.query_map(query)

    def _tables_of(self, number: int, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
        if number not in self._tables:
            turn = self.turn if self.turn.shape[0] == batch else self.turn.expand(batch, -1)
            self._tables[number] = tables(self.plan.take(turn), self.frequencies[number])
        return self._tables[number]

    def _turner(self, part: RetrofitAttention, query: torch.Tensor) -> torch.Tensor:
        """What turns a step's queries, as matrices [b, d, d]: one operation a layer, where a rotation takes ten."""
        assert part.rotary is not None
        key = (*part.rotary, query.shape[-1])
        if key not in self._turners:
            b, d = query.shape[0], key[2]
            unit = torch.eye(d, device=query.device, dtype=accumulation_dtype(query.dtype)).expand(b, d, d)
            self._turners[key] = rotate(unit[:, :, None], *self._tables_of(key[0], b), key[1])[:, :, 0]
        return self._turners[key]

    def _one_softmax(
        self, part: RetrofitAttention, query: Any, key: Any, value: Any, mask: Any, options: dict[str, Any]
    ) -> torch.Tensor:
        """What `attend` gives for one new token of every sequence, in as few operations as it takes, since their number
        is what one token costs: the softmax over the text and the neighbours at once. -> [b, 1, h, d_value]."""
        b, h, _, d = query.shape
        hk, n = key.shape[1], key.shape[2]
        rows = (b * hk, h // hk)
        scale, cap = options.get("scaling"), options.get("softcap")
        scale = d**-0.5 if scale is None else float(scale)
        dtype = accumulation_dtype(query.dtype)
        assert self.laid is not None
        places, found = self.laid(part.layer)
        turned = query[:, :, 0]
        if part.rotary is not None:
            turned = (turned.to(dtype) @ self._turner(part, query)).to(query.dtype)
        if part.query_map is not None:
            turned = part.query_map(turned)
        if self._hidden is None:  # 0 where a neighbour's token is seen
            self._hidden = torch.zeros(b, 1, places.shape[1], dtype=dtype, device=query.device)
            self._hidden.masked_fill_(~self.mask.view(b, 1, -1), -torch.inf)
        bias = (self._hidden + in_use(part.gate).weight.to(dtype)[:, None]).view(*rows, -1)
        shown = self._hidden.new_zeros(1, 1, 1) if mask is None else _bias(mask, n, rows, b, h, dtype)
        own = _logits(query.reshape(*rows, d).to(dtype), key.flatten(0, 1).to(dtype), shown, scale, cap)
        theirs = _logits(turned.reshape(*rows, d).to(dtype), places.to(dtype), bias, scale, cap)
        shares = torch.cat([own, theirs], -1).softmax(-1)
        text, neighbours = shares[..., :n], shares[..., n:]
        if self.watch and not self.changed:
            self.changed = bool((neighbours > 0).any())
        out = torch.bmm(text, value.flatten(0, 1).to(dtype))
        if part.value_map is None:
            out = torch.baddbmm(out, neighbours, found.to(dtype)).view(b, 1, h, -1)
        else:
            added = torch.bmm(neighbours, found.to(dtype)).view(b, 1, h, -1)
            out = out.view(b, 1, h, -1) + part.value_map(added)
        return out.to(query.dtype)


def _bias(mask: torch.Tensor, n: int, rows: tuple[int, int], b: int, h: int, dtype: torch.dtype) -> torch.Tensor:
    """The mask of one new token, as its attention function gets it, added to logits [*rows, n]."""
    mask = mask[:, :, 0, :n]
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, -torch.inf)
    return mask.to(dtype).expand(b, h, n).reshape(*rows, n)


def _logits(
    query: torch.Tensor, key: torch.Tensor, bias: torch.Tensor, scale: float, cap: float | None
) -> torch.Tensor:
    """query [x, g, d], key [x, n, d], bias [x, g, n] or what broadcasts -> [x, g, n]."""
    if cap is None:
        return torch.baddbmm(bias, query, key.transpose(1, 2), alpha=scale)
    return cap * (torch.bmm(query, key.transpose(1, 2)) * (scale / cap)).tanh() + bias
