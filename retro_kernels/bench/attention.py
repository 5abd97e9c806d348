"""The attentions, and the alternatives: each attention as others compute it, from the same tensors.

Every way takes the tensors of `Attention.leaves` and returns what retro_kernels returns: whatever shifting, padding,
repeating and folding it needs is inside and is timed, because its user pays for it. All of them fold the operation to a
plain attention first:

    query [g, h, i, d]    key, value [g, hk, t, d]    g groups of i rows and t slots

Encoder cross-attention folds in two ways: `repeated` gives every neighbour a copy of its chunk's keys and values, as
every peer does; `rows` lays the k neighbours' rows of a chunk side by side, so that nothing is repeated.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import sdpa_kernel

from .operations import CAUSAL_SELF, CCA, DROPOUT, ENCODER_CROSS, ENCODER_SELF, PLAIN, RELATIVE, Workload
from .variants import SDPA_BACKENDS, WITHOUT, Skipped, Variant, own_backends
from .variants import Attention as Call


@dataclass(frozen=True)
class Attention(Workload):
    """Chunked cross-attention, one of the encoder's attentions, or the decoder's self-attention."""

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
    def leaves(self) -> tuple[str, ...]:
        """Names of the differentiable inputs, in order."""
        positions = ("relative_key", "content_bias", "relative_bias") if self.option == RELATIVE else ()
        return ("query", "key", "value", *positions)

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
        query, key, _, *positions = (torch.Size(shape).numel() for shape in self.shapes())
        lse = query // self.head_dim * 4
        forward = (2 * query + 2 * key + sum(positions)) * size + lse
        backward = (4 * query + 4 * key + 2 * sum(positions)) * size + lse
        return forward + (backward if mode == "forward+backward" else 0)

    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """The shape of every input, in the order of `leaves`."""
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

    def attend(self, *tensors: Tensor, backend: str | None = None) -> Any:
        """The operation of retro_kernels on the tensors of `leaves`."""
        import retro_kernels as rk

        options: dict[str, Any] = dict(zip(self.leaves[3:], tensors[3:]), dropout_p=self.dropout_p, backend=backend)
        if self.operation == CCA:
            return rk.chunked_cross_attention(*tensors[:3], chunk_size=self.chunk_size, **options)
        if self.operation == ENCODER_CROSS:
            return rk.neighbour_cross_attention(*tensors[:3], **options)
        return rk.neighbour_self_attention(*tensors[:3], causal=self.operation == CAUSAL_SELF, **options)

    def eager(self) -> Call:
        return functools.partial(eager, self)

    def variants(
        self, device: torch.device, *, compiled: bool = True, backends: list[str] | None = None
    ) -> list[Variant | Skipped]:
        return variants(self, device, compiled=compiled, backends=backends)


@dataclass(frozen=True)
class Folded:
    """One operation as a plain attention. `unfold` takes [g, h, i, d] back to the operation's own shape."""

    query: Tensor
    key: Tensor
    value: Tensor
    unfold: Callable[[Tensor], Tensor]
    same_rows: int
    """Neighbours whose rows stand side by side in i, each with rows 0, 1, ... of the tables."""
    same_slots: int
    """Neighbours whose slots stand side by side in t."""
    causal: bool


def fold(workload: Attention, query: Tensor, key: Tensor, value: Tensor, rows: bool = False) -> Folded:
    """`rows`: fold encoder cross-attention's neighbours into rows instead of repeating keys and values."""
    if workload.operation == CCA:
        b, n, _, _ = query.shape
        m, k = workload.chunk_size, workload.num_neighbours
        key, value = (t.flatten(0, 1).flatten(1, 2).transpose(1, 2) for t in (key, value))
        return Folded(
            fold_query(query, m),
            key,
            value,
            lambda out: unfold_query(out, b, n),
            1,
            k,
            False,
        )
    shape = query.shape
    if workload.operation == ENCODER_CROSS and rows:
        k = shape[2]
        queries = query.flatten(0, 1).flatten(1, 2).transpose(1, 2)
        keys, values = (t.flatten(0, 1).transpose(1, 2) for t in (key, value))
        return Folded(queries, keys, values, lambda out: out.transpose(1, 2).reshape(shape), k, 1, False)
    if workload.operation == ENCODER_CROSS:
        key, value = (t[:, :, None].expand(-1, -1, shape[2], -1, -1, -1) for t in (key, value))
    queries, keys, values = (t.flatten(0, 2).transpose(1, 2) for t in (query, key, value))
    causal = workload.operation == CAUSAL_SELF
    return Folded(queries, keys, values, lambda out: out.transpose(1, 2).reshape(shape), 1, 1, causal)


def fold_query(query: Tensor, chunk_size: int) -> Tensor:
    """[b, n, h, d] -> [b * l, h, m, d]: the queries shifted by m - 1 so that row i of fold u attends to chunk u."""
    b, n, h, d = query.shape
    chunks = n // chunk_size
    shifted = F.pad(query, (0, 0, 0, 0, 1 - chunk_size, chunk_size - 1))[:, : chunks * chunk_size]
    return shifted.reshape(b * chunks, chunk_size, h, d).transpose(1, 2)


def unfold_query(out: Tensor, batch: int, length: int) -> Tensor:
    """[b * l, h, m, d] -> [b, n, h, d]: the shift undone, zeros before the first chunk."""
    folds, h, m, d = out.shape
    out = out.transpose(1, 2).reshape(batch, folds // batch * m, h, d)
    return F.pad(out, (0, 0, 0, 0, m - 1, length - out.shape[1] - (m - 1)))


def by_distance(folded: Folded, relative_key: Tensor, relative_bias: Tensor) -> Tensor:
    """(q + v) . R for every row and distance, largest distance first: [g, h, neighbours, rows, M + r - 1]."""
    query = (folded.query + relative_bias[:, None]).unflatten(2, (folded.same_rows, -1))
    return torch.einsum("ghjid,hxd->ghjix", query, relative_key.flip(1))


def shift(distances: Tensor) -> Tensor:
    """Transformer-XL's shift: [..., M, M + r - 1] by distance -> [..., M, r] by slot, a view. Row i begins M - 1 - i
    places further on, which is what a row of one place less does to the whole."""
    rows, count = distances.shape[-2:]
    flat = distances.flatten(-2)[..., rows - 1 : rows - 1 + rows * (count - 1)]
    return flat.unflatten(-1, (rows, count - 1))[..., : count - rows + 1]


def relative_logits(folded: Folded, relative_key: Tensor, relative_bias: Tensor) -> Tensor:
    """The positional logits of all rows and slots: [g, h, i, t], before scaling."""
    shifted = shift(by_distance(folded, relative_key, relative_bias)).flatten(2, 3)
    if folded.same_slots > 1:  # equation 6 restarts the distance for every neighbour
        shifted = shifted[..., None, :].expand(*shifted.shape[:-1], folded.same_slots, -1).flatten(-2)
    return shifted


def hidden(folded: Folded) -> Tensor:
    """bool [i, t]: what a causal row does not see."""
    i, t = folded.query.shape[2], folded.key.shape[2]
    return torch.ones(i, t, dtype=torch.bool, device=folded.query.device).triu(1)


def eager(workload: Attention, query, key, value, *positions, rows=False, dropout_p=0.0) -> Tensor:
    """retro-pytorch's way (scale the query, einsum, mask, softmax, dropout, einsum; logits in the inputs' dtype), and
    Transformer-XL's where there are relative positions (both terms added, then scaled)."""
    folded = fold(workload, query, key, value, rows)
    queries, keys, values = folded.query, folded.key, folded.value
    scale, h = workload.head_dim**-0.5, queries.shape[1]
    if keys.shape[1] != h:
        keys, values = (t.repeat_interleave(h // t.shape[1], dim=1) for t in (keys, values))
    if positions:
        relative_key, content_bias, relative_bias = positions
        logits = torch.einsum("bhid,bhjd->bhij", queries + content_bias[:, None], keys)
        logits = (logits + relative_logits(folded, relative_key, relative_bias)) * scale
    else:
        logits = torch.einsum("bhid,bhjd->bhij", queries * scale, keys)
    if folded.causal:
        logits = logits.masked_fill(hidden(folded), -torch.finfo(logits.dtype).max)
    probabilities = logits.softmax(dim=-1)
    if dropout_p > 0:
        probabilities = F.dropout(probabilities, dropout_p)
    return folded.unfold(torch.einsum("bhij,bhjd->bhid", probabilities, values))


def sdpa(workload: Attention, query, key, value, *positions, rows=False, dropout_p=0.0) -> Tensor:
    """scaled_dot_product_attention on folded tensors; relative positions as a materialised additive bias."""
    folded = fold(workload, query, key, value, rows)
    queries, bias = folded.query, None
    if positions:
        relative_key, content_bias, relative_bias = positions
        bias = relative_logits(folded, relative_key, relative_bias) * workload.head_dim**-0.5
        if folded.causal:
            bias = bias.masked_fill(hidden(folded), float("-inf"))
        queries = queries + content_bias[:, None]
    out = F.scaled_dot_product_attention(
        queries,
        folded.key,
        folded.value,
        attn_mask=bias,
        dropout_p=dropout_p,
        is_causal=folded.causal and bias is None,
        enable_gqa=folded.key.shape[1] != queries.shape[1],
    )
    return folded.unfold(out)


def flex(workload: Attention, query, key, value, *positions, rows=False, block_mask=None, attend=None) -> Tensor:
    """FlexAttention on the folded tensors; to be compiled (whole, or `attend` alone), because eager FlexAttention
    materialises everything. Relative positions are looked up by distance in its score_mod, so that queries x slots
    never exist."""
    from torch.nn.attention.flex_attention import flex_attention

    attend = attend or flex_attention
    folded = fold(workload, query, key, value, rows)
    queries, score_mod = folded.query, None
    if positions:
        relative_key, content_bias, relative_bias = positions
        scale = workload.head_dim**-0.5
        m, r = workload.rows, workload.slots
        table = (by_distance(folded, relative_key, relative_bias) * scale).flatten(2, 3)
        queries = queries + content_bias[:, None]

        def score_mod(score, group, head, i, t):
            return score + table[group, head, i, t % r + (m - 1 - i % m)]

    gqa = folded.key.shape[1] != queries.shape[1]
    return folded.unfold(
        attend(queries, folded.key, folded.value, score_mod=score_mod, block_mask=block_mask, enable_gqa=gqa)
    )


def masked_flex(workload: Attention, query: Tensor, key: Tensor, value: Tensor, *, block_mask) -> Tensor:
    """FlexAttention's own idiom for chunked cross-attention: the sequence unfolded, chunks as a block mask; nothing is
    shifted or padded."""
    from torch.nn.attention.flex_attention import flex_attention

    keys, values = (t.flatten(1, 3).transpose(1, 2) for t in (key, value))
    gqa = keys.shape[1] != query.shape[2]
    return flex_attention(query.transpose(1, 2), keys, values, block_mask=block_mask, enable_gqa=gqa).transpose(1, 2)


def chunk_block_mask(workload: Attention, device: torch.device):
    from torch.nn.attention.flex_attention import create_block_mask

    m, keys = workload.chunk_size, workload.keys_per_chunk
    first = m - 1

    def same_chunk(batch, head, token, slot):
        return (token >= first) & ((token - first) // m == slot // keys)

    return create_block_mask(
        same_chunk, None, None, workload.sequence_length, workload.num_chunks * keys, device=str(device)
    )


def causal_block_mask(workload: Attention, device: torch.device):
    from torch.nn.attention.flex_attention import create_block_mask

    n = workload.sequence_length
    return create_block_mask(lambda batch, head, i, t: t <= i, None, None, n, n, device=str(device))


def variants(
    workload: Attention, device: torch.device, *, compiled: bool, backends: list[str] | None
) -> list[Variant | Skipped]:
    """Every alternative for this workload on this device, retro_kernels' own backends last."""
    dropout = workload.option == DROPOUT

    def way(function: Callable, **fixed) -> Call:
        return functools.partial(function, workload, **fixed)

    def variant(name: str, function: Callable, wrap=lambda attention: attention, **settings) -> Variant:
        fixed = {"rows": True} if settings.pop("rows", False) else {}
        if not dropout:
            return Variant(name, workload, wrap(way(function, **fixed)), **settings)
        with_dropout = wrap(way(function, **fixed, dropout_p=workload.dropout_p))
        return Variant(name, workload, with_dropout, undropped=way(function, **fixed), **settings)

    # The repeated form is what peers do; the compiler and FlexAttention are given the stronger one.
    foldings = {"": False, " rows": True} if workload.operation == ENCODER_CROSS else {"": False}
    best = workload.operation == ENCODER_CROSS
    result: list[Variant | Skipped] = [variant("eager" + end, eager, rows=rows) for end, rows in foldings.items()]
    for name, backend in SDPA_BACKENDS[device.type].items():
        for end, rows in foldings.items():
            context = functools.partial(sdpa_kernel, backend)
            result.append(variant(f"sdpa[{name}{end}]", sdpa, rows=rows, context=context))
    if device.type == "cuda":
        result.append(variant("sdpa[default]", sdpa, rows=best))
    names = ("compile[sdpa]", "compile[eager]", "flex[folded]")
    if not compiled:
        result += [Skipped(name, "torch.compile was switched off for this run (--no-compile)") for name in names]
    else:
        result.append(variant(names[0], sdpa, _compile, rows=best, compiled=True))
        result.append(variant(names[1], eager, _compile, rows=best, compiled=True))
        if dropout:
            result.append(Skipped(names[2], "FlexAttention has no dropout"))
        else:
            result.append(_flex(names[2], workload, device, best))
    if workload.operation == CCA and workload.option == PLAIN:
        result.append(_block_mask_flex(workload, device, compiled))
    return result + own_variants(workload, device, backends)


def _flex(name: str, workload: Attention, device: torch.device, rows: bool) -> Variant | Skipped:
    fixed = {"rows": True} if rows else {}
    if workload.operation == CAUSAL_SELF:
        try:
            fixed["block_mask"] = causal_block_mask(workload, device)
        except Exception as error:
            return Skipped(name, f"its block mask cannot be made: {type(error).__name__}: {error}")
    if workload.option == RELATIVE and device.type == "cpu":
        # Inductor's CPU template cannot read a table that the same graph computes.
        from torch.nn.attention.flex_attention import flex_attention

        attend = _compile(flex_attention)
        return Variant(name, workload, functools.partial(flex, workload, **fixed, attend=attend), compiled=True)
    return Variant(name, workload, _compile(functools.partial(flex, workload, **fixed)), compiled=True)


def _block_mask_flex(workload: Attention, device: torch.device, compiled: bool) -> Variant | Skipped:
    name = "flex[block mask]"
    if device.type != "cuda":
        return Skipped(name, "measured on a GPU only: its block mask is built for GPU tiles")
    if not compiled:
        return Skipped(name, "torch.compile was switched off for this run (--no-compile)")
    try:
        mask = chunk_block_mask(workload, device)
    except Exception as error:
        return Skipped(name, f"its block mask cannot be made: {type(error).__name__}: {error}")
    return Variant(name, workload, _compile(functools.partial(masked_flex, workload, block_mask=mask)), compiled=True)


def own_variants(workload: Attention, device: torch.device, backends: list[str] | None = None) -> list:
    """retro_kernels[<backend>] for every backend but the reference, which judges and does not compete. It is timed
    when it is asked for by name, or when nothing else can run. Each also without the case's option."""
    result: list[Variant | Skipped] = []
    for name, reason in own_backends(device, backends):
        result += [Skipped(f"retro_kernels[{name}]", reason)] if reason else own_variant(workload, name)
    return result


def own_variant(workload: Attention, backend: str) -> list[Variant]:
    name = f"retro_kernels[{backend}]"
    result = [Variant(name, workload, functools.partial(workload.attend, backend=backend))]
    if workload.option != PLAIN:
        plain = workload.with_option(PLAIN)
        result.append(Variant(name + WITHOUT, plain, functools.partial(plain.attend, backend=backend)))
    return result


def _compile(attention: Call) -> Call:
    return torch.compile(attention, dynamic=False)
