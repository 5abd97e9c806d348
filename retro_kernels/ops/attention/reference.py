"""Attention within groups in plain PyTorch: the specification every other backend is checked against.

Written to be read beside sections 2.3 and 2.4 and appendix B.1.2 of the RETRO paper (arXiv 2112.04426). It computes in
fp32 (fp64 for fp64 input), runs on any device and dtype, and is differentiated by PyTorch itself, twice if asked.

`attend` folds each grouping of `common.py` into the same five axes, calls `attend_folded`, and unfolds. Letters of the
folded form: g groups, j neighbours whose rows or slots share the group, i row, t token, h heads, d head size.
"""

from __future__ import annotations

import torch

from .. import dropout
from .common import CHUNK, CLOCK, Call, attended_chunks, turn


def unavailable() -> None:
    """Plain PyTorch runs everywhere."""


def refusal(call: Call) -> None:
    """The specification refuses nothing."""


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """What inputs of `dtype` are computed in. (The tests replace this by the identity to measure what PyTorch loses
    when it computes in the inputs' own precision; the softmax stays in fp32 as torch's own does.)"""
    return torch.float64 if dtype == torch.float64 else torch.float32


def attend(call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    """-> out [b, lq, kq, n, h, d_value] in the query's dtype, lse [b, lq, kq, n, h] fp32 (fp64 for fp64)."""
    b, lq, kq, n, h, _ = call.query.shape
    if call.grouping == CLOCK:
        out, lse = _by_clock(call)
    else:
        place = torch.arange(lq * kq * n, device=call.query.device).expand(b, -1)
        together = (b * lq, kq) if call.grouping == CHUNK else (b * lq * kq, 1)
        query = call.query.reshape(*together, n, *call.query.shape[4:])
        key, value = (x.reshape(together[0], 1, *x.shape[3:]) for x in (call.key, call.value))
        mask = None if call.mask is None else call.mask.reshape(together[0], 1, call.mask.shape[3])
        batch = torch.arange(b, device=place.device)[:, None].expand_as(place)
        out, lse = attend_folded(call, query, key, value, mask, *(x.reshape(*together, n) for x in (batch, place)))
    d_value = call.value.shape[-1]
    return out.reshape(b, lq, kq, n, h, d_value).to(call.query.dtype), lse.reshape(b, lq, kq, n, h)


def _by_clock(call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    """Chunked cross-attention: the tokens of every attended chunk are gathered as its rows, and scattered back."""
    b, _, _, n, h, _ = call.query.shape
    num_chunks = call.key.shape[1]
    device = call.query.device
    row = torch.arange(call.stride, device=device)
    if call.chunk_spans is None:
        first, last = attended_chunks(n, num_chunks, call.stride, call.first_token)
        start = call.first_token + call.stride * torch.arange(first, last, device=device)
        token = (start[:, None] + row).expand(b, -1, -1)
        inside = (token >= 0) & (token < n)
    else:
        first, last = 0, num_chunks
        start, count = call.chunk_spans.long().unbind(-1)
        token = start[..., None] + row
        inside = row < count[..., None]
    token = token.clamp(0, max(n - 1, 0))

    # A row outside the sequence (a slice may begin or end inside a chunk) sees nothing, and its result is dropped.
    query = call.query[:, 0, 0]
    batch = torch.arange(b, device=device)[:, None, None].expand_as(token)
    if n > 0:
        rows = torch.where(inside[..., None, None], query[batch, token], 0.0)
    else:  # the empty sum is 0, and keeps a gradient to the query, which is 0, too
        rows = query.new_zeros(*token.shape, *query.shape[2:]) + query.sum()
    key, value = (x[:, first:last] for x in (call.key, call.value))
    if (
        call.chunk_spans is not None
    ):  # a chunk that no document needs may hold NaN, and 0 * NaN would reach its gradient
        key, value = (torch.where((count > 0)[..., None, None, None, None], x, 0.0) for x in (key, value))
    key, value = key.flatten(0, 1), value.flatten(0, 1)
    mask = None if call.mask is None else call.mask[:, first:last].flatten(0, 1)
    out, lse = attend_folded(
        call,
        rows.flatten(0, 1)[:, None],
        key,
        value,
        mask,
        batch.flatten(0, 1)[:, None],
        token.flatten(0, 1)[:, None],
        inside.flatten(0, 1)[:, None],
    )

    # Tokens in no chunk output exactly 0, with nothing to sum. Rows outside go to a row of their own, which is cut off.
    target = torch.where(inside, batch * n + token, b * n).flatten()
    everywhere = out.new_zeros(b * n + 1, h, value.shape[-1]).index_copy(0, target, out.reshape(-1, h, out.shape[-1]))
    lse = lse.new_full((b * n + 1, h), float("-inf")).index_copy(0, target, lse.reshape(-1, h))
    return everywhere[:-1], lse[:-1]


def attend_folded(
    call: Call,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    batch: torch.Tensor,
    place: torch.Tensor,
    attends: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """query [g, jq, i, h, d]; key, value [g, j, t, hk, d | d_value]; mask bool [g, j, t]; batch and place [g, jq, i]
    (what dropout counts); attends bool [g, jq, i], the rows that are tokens, None: all -> out [g, jq, i, h, d_value],
    lse [g, jq, i, h]. All rows of a group see all its slots."""
    g, _, rows, h, _ = query.shape
    _, j, r, hk, d_value = value.shape
    compute = accumulation_dtype(call.query.dtype)
    query, key, value = (x.to(compute) for x in (query, key, value))

    if mask is not None and call.null_key is None:  # a row that sees nothing may hold anything, as one that is no token
        shown = mask.flatten(1).any(1)[:, None, None].expand(g, query.shape[1], rows)
        attends = shown if attends is None else attends & shown
    # Masked tokens are zeroed as well as masked: their keys and values may hold NaN, and 0 * NaN would reach the sums.
    query, key, value = _only(query, attends), _only(key, mask), _only(value, mask)
    if hk != h:  # query head i reads key/value head i // (h / hk)
        key, value = (x.repeat_interleave(h // hk, dim=3) for x in (key, value))

    content_query = query
    if call.query_rotary is not None and call.key_rotary is not None:
        # zeroed again: a table may hold NaN where no row and no slot turns by it
        content_query = _only(rotate(query, call.query_rotary, call.rotary_interleaved, call.first_visible), attends)
        key = _only(rotate(key, call.key_rotary, call.rotary_interleaved, call.first_visible), mask)
    if call.content_bias is not None:
        content_query = query + call.content_bias.to(compute)

    logits = call.scale * torch.einsum("gqihd,gkthd->gqhikt", content_query, key)
    i, t = (torch.arange(size, device=query.device) for size in (rows, r))
    if call.relative_key is not None:
        relative_query = query if call.relative_bias is None else query + call.relative_bias.to(compute)
        # Equation 6 restarts the distance for every neighbour, so one [i, t] table serves all j of them.
        distance = i[:, None] - t + r - 1
        seen = torch.ones_like(distance) if mask is None else mask.flatten(0, 1).any(0).long().expand(rows, r)
        if attends is not None:
            seen = seen * attends.flatten(0, 1).any(0).long()[:, None]
        if call.causal:
            seen = seen * (t <= i[:, None])
        used = torch.zeros_like(call.relative_key[0, :, 0], dtype=torch.int64)
        used = used.index_put((distance,), seen, accumulate=True) > 0
        table = torch.where(used[:, None], call.relative_key.to(compute), 0.0)  # the other rows may hold anything
        by_distance = torch.einsum("gqihd,hxd->gqhix", relative_query, table)
        logits = logits + call.scale * by_distance[..., i[:, None], distance][..., None, :]
    if call.logit_softcap > 0.0:
        logits = call.logit_softcap * torch.tanh(logits / call.logit_softcap)
    if call.attention_bias is not None:
        bias = call.attention_bias[:, :rows].to(compute)
        # A [h, M, r] bias is the same for every neighbour; [h, M, j * r] is neighbour-major.
        logits = logits + (bias.unflatten(-1, (j, r)) if bias.shape[-1] == j * r else bias[:, :, None])
    if mask is not None:
        logits = logits.masked_fill(~mask[:, None, None, None], float("-inf"))
    if call.causal:
        visible = t <= i[:, None]
        if call.first_visible is not None:
            visible = visible & (t >= call.first_visible.long()[:, :, None])
            visible = visible[:, None, None]
        logits = logits.masked_fill(~visible[..., None, :], float("-inf"))

    # All slots under one softmax, after the null slot: the learned one, or one that nothing ever sees.
    if call.null_key is not None and call.null_value is not None:
        null_logits = call.scale * torch.einsum("gqihd,hd->gqhi", content_query, call.null_key.to(compute))
        if call.logit_softcap > 0.0:
            null_logits = call.logit_softcap * torch.tanh(null_logits / call.logit_softcap)
        null_value = call.null_value.to(compute)
    else:
        null_logits = logits.new_full(logits.shape[:4], float("-inf"))
        null_value = logits.new_zeros(h, d_value)
    logits = torch.cat([null_logits[..., None], logits.flatten(4)], dim=-1)
    logits = logits.to(torch.promote_types(compute, torch.float32))
    values = torch.cat([null_value.expand(g, 1, h, d_value), value.flatten(1, 2)], dim=1)

    # A row that sees nothing, or whose logits are all -inf, outputs 0 and passes no gradient: whatever the slots or the
    # output's gradient hold, it is cut off before the softmax and after it. NaN and +inf in a logit are no such row.
    if attends is not None:
        logits = logits.masked_fill(~attends[:, :, None, :, None], float("-inf"))
    nothing = (logits == float("-inf")).all(-1, keepdim=True)
    probabilities = torch.softmax(logits.masked_fill(nothing, 0.0), dim=-1).masked_fill(nothing, 0.0)
    if call.dropout_seed is not None:
        head = (batch * h)[:, :, None] + torch.arange(h, device=query.device)[:, None]
        kept = dropout.survivors(call.dropout_seed, call.dropout_p, head, place[:, :, None], j * r)
        probabilities = torch.where(kept, probabilities * dropout.survivor_scale(call.dropout_p), 0.0)
    out = torch.einsum("gqhis,gshd->gqihd", probabilities.to(compute), values)
    out = out.masked_fill(nothing.transpose(2, 3), 0.0)
    lse = torch.logsumexp(logits.masked_fill(nothing, 0.0), dim=-1).masked_fill(nothing[..., 0], float("-inf"))
    lse = lse.transpose(2, 3)
    return out, lse


def _only(x: torch.Tensor, seen: torch.Tensor | None) -> torch.Tensor:
    """x [g, j, t, h, d] where `seen` [g, j, t], and 0 elsewhere, without gradient."""
    return x if seen is None else torch.where(seen[..., None, None], x, 0.0)


def rotate(
    x: torch.Tensor,
    tables: tuple[torch.Tensor, torch.Tensor],
    interleaved: bool,
    first_visible: torch.Tensor | None = None,
) -> torch.Tensor:
    """`turn` for x [g, j, positions, h, d] by the angles whose (cos, sin) are tables of [at least positions, width].
    `first_visible` [g, positions]: where each position's document begins, and the table with it."""
    position = torch.arange(x.shape[2], device=x.device)
    if first_visible is not None:
        position = (position - first_visible.long())[:, None]
    cos, sin = (table.detach().to(x.dtype)[position][..., None, :] for table in tables)
    return turn(x, cos, sin, interleaved)
