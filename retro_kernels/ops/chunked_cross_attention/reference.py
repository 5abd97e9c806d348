"""Chunked cross-attention in plain PyTorch: the specification every other backend is checked against.

Written to be read beside section 2.4 and appendix B.1.2 of the RETRO paper (arXiv 2112.04426). It computes in fp32
(fp64 for fp64 input), runs on any device and dtype, and is differentiated by PyTorch itself, twice if asked.
Letters: b batch, u attended chunks, i row in the attending chunk, h heads, d head size, k neighbours, t their tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .common import Call, attended_chunks


def unavailable() -> None:
    """Plain PyTorch runs everywhere."""


def refusal(call: Call) -> None:
    """The specification refuses nothing."""


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """What inputs of `dtype` are computed in. (The tests replace this by the identity to measure what PyTorch loses
    when it computes in the inputs' own precision; the softmax stays in fp32 as torch's own does.)"""
    return torch.float64 if dtype == torch.float64 else torch.float32


def chunked_cross_attention(call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    """-> out [b, n, h, d_value] in the query's dtype, lse [b, n, h] fp32 (fp64 for fp64 input), detached."""
    b, n, h, d = call.query.shape
    _, num_chunks, k, r, hk, d_value = call.value.shape
    rows = call.stride
    compute = accumulation_dtype(call.query.dtype)

    # The attending chunks: row i of chunk u is token first_token + u * stride + i. A row outside the sequence (a slice
    # may begin or end inside a chunk) is a zero query whose result is dropped.
    first, last = attended_chunks(n, num_chunks, call.stride, call.first_token)
    chunks = last - first
    start, stop = (call.first_token + u * call.stride for u in (first, last))
    inside = slice(min(max(start, 0), n), min(max(stop, 0), n))
    before, after = (inside.start - start, stop - inside.stop) if chunks else (0, 0)
    query = F.pad(call.query[:, inside].to(compute), (0, 0, 0, 0, before, after)).reshape(b, chunks, rows, h, d)

    # Masked tokens are zeroed as well as masked: their keys and values may hold NaN, and 0 * NaN would reach the sums.
    key, value = (x[:, first:last].to(compute) for x in (call.key, call.value))
    if call.neighbour_mask is not None:
        visible = call.neighbour_mask[:, first:last]
        key, value = (torch.where(visible[..., None, None], x, 0.0) for x in (key, value))
    if hk != h:  # query head i reads key/value head i // (h / hk)
        key, value = (x.repeat_interleave(h // hk, dim=4) for x in (key, value))

    content_query = query
    if call.query_rotary is not None and call.key_rotary is not None:
        content_query = rotate(query, call.query_rotary, call.rotary_interleaved)
        key = rotate(key, call.key_rotary, call.rotary_interleaved)
    if call.content_bias is not None:
        content_query = query + call.content_bias.to(compute)

    logits = call.scale * torch.einsum("buihd,bukthd->buhikt", content_query, key)
    if call.relative_key is not None:
        relative_query = query if call.relative_bias is None else query + call.relative_bias.to(compute)
        by_distance = torch.einsum("buihd,hxd->buhix", relative_query, call.relative_key.to(compute))
        i, t = (torch.arange(size, device=query.device) for size in (rows, r))
        # Equation 6 restarts the distance for every neighbour, so one [i, t] table serves all k of them.
        logits = logits + call.scale * by_distance[..., i[:, None], i[:, None] - t + r - 1][..., None, :]
    if call.attention_bias is not None:
        bias = call.attention_bias[:, :rows].to(compute)
        # A [h, m, r] bias is the same for every neighbour; [h, m, k * r] is neighbour-major.
        logits = logits + (bias.unflatten(-1, (k, r)) if bias.shape[-1] == k * r else bias[:, :, None])
    if call.neighbour_mask is not None:
        logits = logits.masked_fill(~visible[:, :, None, None], float("-inf"))

    # All k neighbours under one softmax, after the null slot: the learned one, or one that nothing ever sees.
    if call.null_key is not None and call.null_value is not None:
        null_logits = call.scale * torch.einsum("buihd,hd->buhi", content_query, call.null_key.to(compute))
        null_value = call.null_value.to(compute)
    else:
        null_logits = logits.new_full(logits.shape[:4], float("-inf"))
        null_value = logits.new_zeros(h, d_value)
    logits = torch.cat([null_logits[..., None], logits.flatten(4)], dim=-1)
    logits = logits.to(torch.promote_types(compute, torch.float32))
    values = torch.cat([null_value.expand(b, chunks, 1, h, d_value), value.flatten(2, 3)], dim=2)

    # A row that sees nothing has no maximum and no sum: it outputs 0 and passes no gradient.
    maximum = logits.detach().amax(-1, keepdim=True)
    weights = torch.exp(logits - maximum.masked_fill(maximum == float("-inf"), 0.0))
    total = weights.sum(-1, keepdim=True)
    probabilities = F.dropout(weights / total.masked_fill(total == 0, 1.0), call.dropout_p).to(compute)
    out = torch.einsum("buhij,bujhd->buihd", probabilities, values)
    lse = (maximum + total.log()).detach()[..., 0].transpose(2, 3)

    # Back to the sequence; tokens before the first chunk output exactly 0, with nothing to sum.
    out, lse = (x.reshape(b, chunks * rows, *x.shape[3:])[:, before : chunks * rows - after] for x in (out, lse))
    out = F.pad(out, (0, 0, 0, 0, inside.start, n - inside.stop))
    lse = F.pad(lse, (0, 0, inside.start, n - inside.stop), value=float("-inf"))
    return out.to(call.query.dtype), lse


def rotate(x: torch.Tensor, tables: tuple[torch.Tensor, torch.Tensor], interleaved: bool) -> torch.Tensor:
    """Turns the first 2 * width dimensions of x [..., positions, heads, d] by the angles whose (cos, sin) are tables of
    [at least positions, width]: dimension j pairs with j + width, or, interleaved, 2j with 2j + 1."""
    width = tables[0].shape[-1]
    cos, sin = (table[: x.shape[-3], None].detach().to(x.dtype) for table in tables)
    turned, rest = x[..., : 2 * width], x[..., 2 * width :]
    if interleaved:
        first, second = turned[..., 0::2], turned[..., 1::2]
    else:
        first, second = turned[..., :width], turned[..., width:]
    pair = (first * cos - second * sin, second * cos + first * sin)
    turned = torch.stack(pair, dim=-1).flatten(-2) if interleaved else torch.cat(pair, dim=-1)
    return torch.cat([turned, rest], dim=-1)
