"""What the absorbed Triton kernels are made of, beyond ops/attention/triton/tiles.py: tiles of states and weights,
products through a projection, logits and their gradient of one tile of rows and slots, relative positions of a tile
that may hold several neighbours.

A tile of logits is [BLOCK_ROWS, BLOCK_KEYS].
"""

from __future__ import annotations

from typing import Any, NamedTuple

from ...attention.triton import tiles
from ...attention.triton.arguments import Mask
from ...attention.triton.tiles import (
    Queries,
    at_most_one,
    bias_in_bits,
    jit,
    kept_slots,
    load_distances,
    load_upstream,
    row_index,
    rows_at,
    slot_offsets,
    slots_of,
    wide,
)
from .arguments import States, Weight

if tiles.triton is not None:
    from ...attention.triton.tiles import LOG2_E, constexpr, tl


class StateTile(NamedTuple):
    """A tile of slots (`SlotTile`), which of them are visible, and the offsets of their states."""

    slots: Any
    visible: Any
    offsets: Any


class LoadedRows(NamedTuple):
    """A tile of rows of a head: `at` is the index of row 0 in lse; `constant` is what bias_key adds to a row's scores,
    `value_constant` what bias_value adds to the gradient of its weights."""

    rows: Any
    at: Any
    queries: Any
    upstream: Any
    constant: Any
    value_constant: Any


@jit
def load_vectors(at, vector, row, there, stride_n, SPEC):
    """Rows of a head's query, from row 0 at the pointer `at`, plus a vector if there is one, rounded to the query's
    dtype. Rows not `there` are not read."""
    column = tl.arange(0, SPEC.BLOCK_DIM)
    tile = tl.load(
        at + (wide(row, SPEC.INT64) * stride_n)[:, None] + column[None, :],
        mask=there[:, None] & (column < SPEC.DIM)[None, :],
        other=0.0,
    )
    if vector is not None:
        added = tl.load(vector + column, mask=column < SPEC.DIM, other=0.0).to(tl.float32)
        tile = (tile.to(tl.float32) + added[None, :]).to(tile.dtype)
    return tile


@jit
def load_queries(query, relative, head, rows, there, group, SPEC):
    """A tile of a head's queries as the content and as the relative term see them."""
    at = rows_at(query, rows, head, group, SPEC)
    content_bias = None
    relative_bias = None
    if relative is not None:
        if relative.content_bias is not None:
            content_bias = relative.content_bias + head * relative.content_bias_h
        if relative.relative_bias is not None:
            relative_bias = relative.relative_bias + head * relative.relative_bias_h
    content = load_vectors(at, content_bias, rows.row, there, query.n, SPEC)
    to_relative = content
    if content_bias is not None or relative_bias is not None:
        to_relative = load_vectors(at, relative_bias, rows.row, there, query.n, SPEC)
    return Queries(content, to_relative)


@jit
def times_vector(tile, vector, DIM: constexpr, BLOCK_DIM: constexpr):
    """Each row of a tile times the vector at a pointer, fp32."""
    column = tl.arange(0, BLOCK_DIM)
    x = tl.load(vector + column, mask=column < DIM, other=0.0).to(tl.float32)
    return tl.sum(tile.to(tl.float32) * x[None, :], axis=1)


@jit
def at_chunk(encoded, group):
    """The states from the first slot of a group on."""
    at = encoded.data + group.batch * encoded.b + group.chunk.to(tl.int64) * encoded.l
    return States(at, encoded.b, encoded.l, encoded.k, encoded.r)


@jit
def mask_at_chunk(mask, group):
    """The mask from the first slot of a group on."""
    at = mask.data + group.batch * mask.b + group.chunk.to(tl.int64) * mask.l
    return Mask(at, mask.b, mask.l, mask.k, mask.r)


@jit
def weight_of(weight, kv_head):
    """A head's weight."""
    return Weight(weight.data + kv_head * weight.h, weight.h, weight.d)


@jit
def load_states(encoded, tile, start, SPEC):
    """Columns from `start` on of the states of a tile of slots [BLOCK_KEYS, BLOCK_ENCODER]; 0 where not visible."""
    column = start + tl.arange(0, SPEC.BLOCK_ENCODER)
    there = tile.visible[:, None]
    if SPEC.ENCODER_DIM % SPEC.BLOCK_ENCODER != 0:
        there = there & (column < SPEC.ENCODER_DIM)[None, :]
    return tl.load(encoded.data + tile.offsets[:, None] + column[None, :], mask=there, other=0.0)


@jit
def weight_places(stride_row, start, DIM: constexpr, BLOCK_DIM: constexpr, SPEC):
    """Offsets and mask of columns from `start` on of a weight [DIM, ENCODER_DIM]."""
    row = tl.arange(0, BLOCK_DIM)
    column = start + tl.arange(0, SPEC.BLOCK_ENCODER)
    at = (wide(row, SPEC.INT64) * stride_row)[:, None] + column[None, :]
    return at, (row < DIM)[:, None] & (column < SPEC.ENCODER_DIM)[None, :]


@jit
def load_weight(weight, start, DIM: constexpr, BLOCK_DIM: constexpr, SPEC):
    """Columns from `start` on of a head's weight [BLOCK_DIM, BLOCK_ENCODER]."""
    at, there = weight_places(weight.d, start, DIM, BLOCK_DIM, SPEC)
    if DIM == BLOCK_DIM and SPEC.ENCODER_DIM % SPEC.BLOCK_ENCODER == 0:
        tile = tl.load(weight.data + at)
    else:
        tile = tl.load(weight.data + at, mask=there, other=0.0)
    return tile


@jit
def add_scores(scores, rows, weight, state, SPEC):
    """scores + (rows · weight) · stateᵀ, the inner product rounded to the rows' dtype."""
    projected = tl.dot(rows, weight, input_precision=SPEC.PRECISION).to(rows.dtype)
    return tl.dot(projected, tl.trans(state), scores, input_precision=SPEC.PRECISION)


@jit
def add_values(accumulator, probabilities, weight, state, SPEC):
    """accumulator + (probabilities · state) · weightᵀ, the inner product rounded to the states' dtype."""
    summed = tl.dot(probabilities, state, input_precision=SPEC.PRECISION).to(state.dtype)
    return tl.dot(summed, tl.trans(weight), accumulator, input_precision=SPEC.PRECISION)


@jit
def state_tile_of(number, encoded, mask, readable, lengths, SPEC):
    """Tile number `number` of a group's slots. Only slots below `readable` are read."""
    slots = slots_of(number, lengths, SPEC)
    visible = slots.present & (slots.slot < readable)
    if mask is not None:
        at = mask.data + slot_offsets(slots, mask.k, mask.r, SPEC)
        visible = visible & (tl.load(at, mask=visible, other=0) != 0)
    return StateTile(slots, visible, slot_offsets(slots, encoded.k, encoded.r, SPEC))


@jit
def run_of(rows, slots, lengths, SPEC):
    """The relative distances in a tile: those of its rows and of `span` tokens from `begin` on (all tokens of a
    neighbour unless PER_NEIGHBOUR). Row a and token b of these are at distance first + a - b + span - 1."""
    if SPEC.PER_NEIGHBOUR:
        begin = slots.first_token
        span = tl.minimum(lengths.retrieved_length - slots.first_token, SPEC.BLOCK_KEYS)
    else:
        begin = tl.zeros_like(slots.first_token)
        span = lengths.retrieved_length
    return begin, span, rows.first - begin - span + lengths.retrieved_length


@jit
def relative_scores(queries, relative, head, rows, slots, lengths, SPEC):
    """The relative term of a tile of scores: BLOCK_RUN distances at a time, shifted to the slots that have them."""
    begin, span, first = run_of(rows, slots, lengths, SPEC)
    row = tl.arange(0, SPEC.BLOCK_ROWS)
    tile = queries.relative
    scores = tl.zeros([SPEC.BLOCK_ROWS, SPEC.BLOCK_KEYS], tl.float32)
    for start in range(0, span + SPEC.BLOCK_ROWS - 1, SPEC.BLOCK_RUN):
        run = load_distances(relative, head, first + start, lengths, tile, SPEC.BLOCK_RUN, SPEC.BLOCK_DIM, SPEC)
        distances = tl.dot(tile, tl.trans(run), input_precision=SPEC.PRECISION)
        index = row[:, None] - (slots.token - begin)[None, :] + (span - 1 - start)
        there = (index >= 0) & (index < SPEC.BLOCK_RUN)
        scores += tl.where(there, tl.gather(distances, tl.where(there, index, 0), axis=1), 0.0)
    return scores


@jit
def neighbours_of(slots, lengths, SPEC):
    """[first, last) neighbours of which a tile holds slots."""
    first = slots.first_slot // lengths.retrieved_length
    if SPEC.PER_NEIGHBOUR:
        last = first + 1
    else:
        last = tl.cdiv(slots.first_slot + SPEC.BLOCK_KEYS, lengths.retrieved_length)
        last = tl.minimum(last, lengths.num_neighbours)
    return first, last


@jit
def by_distance(d_logits, start, begin, span, slots, lengths, SPEC):
    """What BLOCK_RUN distances from `start` on contributed to a tile, the neighbours summed: the transpose of the shift
    in `relative_scores`, in the tile's dtype."""
    row = tl.arange(0, SPEC.BLOCK_ROWS)
    distance = start + tl.arange(0, SPEC.BLOCK_RUN)
    token = row[:, None] - distance[None, :] + (span - 1)
    inside = (token >= 0) & (token < span)
    total = tl.zeros([SPEC.BLOCK_ROWS, SPEC.BLOCK_RUN], tl.float32)
    first, last = neighbours_of(slots, lengths, SPEC)
    for neighbour in range(first, last):
        lane = neighbour * lengths.retrieved_length + begin + token - slots.first_slot
        there = inside & (lane >= 0) & (lane < SPEC.BLOCK_KEYS)
        total += tl.where(there, tl.gather(d_logits, tl.where(there, lane, 0), axis=1).to(tl.float32), 0.0)
    return total.to(d_logits.dtype)


@jit
def logits_of(scores, constant, bias, scale_log2, rows, there, tile, SPEC):
    """A tile's logits in bits (times log2 e), not yet masked. `constant`: what bias_key adds; `bias` is the head's."""
    logits = (scores + constant[:, None]) * scale_log2
    if bias is not None:
        column = tile.slots.slot if SPEC.BIAS_PER_SLOT else tile.slots.token
        at = (wide(rows.row, SPEC.INT64) * bias.m)[:, None] + column[None, :]
        read = there[:, None] & tile.visible[None, :]
        logits += bias_in_bits(tl.load(bias.data + at, mask=read, other=0.0))
    return logits


@jit
def load_rows(rows, query, grad_out, relative, bias_key, bias_value, results, head, group, lengths, SPEC):
    """A tile of rows of a head for the backward."""
    at = row_index(rows, head, group, lengths, SPEC)
    upstream = load_upstream(rows_at(grad_out, rows, head, group, SPEC), grad_out.n, results, at, rows, lengths, SPEC)
    queries = load_queries(query, relative, head, rows, upstream.alive, group, SPEC)
    kv_head = head // lengths.heads_per_key
    constant = tl.zeros([SPEC.BLOCK_ROWS], tl.float32)
    value_constant = tl.zeros([SPEC.BLOCK_ROWS], tl.float32)
    if bias_key is not None:
        constant = times_vector(queries.content, bias_key.data + kv_head * bias_key.h, SPEC.DIM, SPEC.BLOCK_DIM)
    if bias_value is not None:
        at_bias = bias_value.data + kv_head * bias_value.h
        value_constant = times_vector(upstream.do, at_bias, SPEC.VALUE_DIM, SPEC.BLOCK_VALUE)
    return LoadedRows(rows, at, queries, upstream, constant, value_constant)


@jit
def tile_gradient(loaded, tile, encoded, w_key, w_value, bias, relative, head, dropout, scale, lengths, SPEC):
    """Of one head's tile, in fp32: the attention weights as they multiplied the values, and the gradient of the logits.
    Weights and `bias` are the head's, states the chunk's. A slot that is not visible has exactly 0 beside a row that is
    NaN."""
    rows, upstream = loaded.rows, loaded.upstream
    if relative is not None:
        scores = relative_scores(loaded.queries, relative, head, rows, tile.slots, lengths, SPEC)
    else:
        scores = tl.zeros([SPEC.BLOCK_ROWS, SPEC.BLOCK_KEYS], tl.float32)
    d_weights = tl.zeros([SPEC.BLOCK_ROWS, SPEC.BLOCK_KEYS], tl.float32)
    for start in range(0, SPEC.ENCODER_DIM, SPEC.BLOCK_ENCODER):
        state = load_states(encoded, tile, start, SPEC)
        weight = load_weight(w_key, start, SPEC.DIM, SPEC.BLOCK_DIM, SPEC)
        scores = add_scores(scores, loaded.queries.content, weight, state, SPEC)
        weight = load_weight(w_value, start, SPEC.VALUE_DIM, SPEC.BLOCK_VALUE, SPEC)
        d_weights = add_scores(d_weights, upstream.do, weight, state, SPEC)
    logits = logits_of(scores, loaded.constant, bias, scale * LOG2_E, rows, upstream.alive, tile, SPEC)
    exponent = logits - upstream.lse[:, None]
    if SPEC.TWO_PLANES:
        exponent -= upstream.rest[:, None]
    probabilities = tl.where(tile.visible[None, :], at_most_one(exponent), 0.0)
    d_weights += loaded.value_constant[:, None]
    dropped = probabilities
    if SPEC.DROPOUT:
        kept = kept_slots(dropout, rows.place.to(tl.int32) + rows.row, tile.slots, False, SPEC)
        d_weights = tl.where(kept, d_weights * dropout.survivor_scale, 0.0)
        dropped = tl.where(kept, probabilities * dropout.survivor_scale, 0.0)
    return dropped, tl.where(tile.visible[None, :], probabilities * (d_weights - upstream.delta[:, None]), 0.0)
