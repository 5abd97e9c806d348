"""What the absorbed Triton kernels are made of, beyond ops/attention/triton/tiles.py: tiles of states and weights,
products through a projection, logits and their gradient of one tile of rows and slots, relative positions of a tile
that may hold several neighbours.

A tile of logits is [BLOCK_ROWS, BLOCK_SLOTS]. The encoder's width is walked in blocks of BLOCK_ENCODER columns.
"""

from __future__ import annotations

from ...attention.triton import tiles
from ...attention.triton.tiles import at_most_one, bias_in_bits, jit, kept_slots, load_run, slot_offsets, slots_of, wide

if tiles.triton is not None:
    from ...attention.triton.tiles import CLOCK, LOG2_E, constexpr, tl


@jit
def load_rows(x, vector, row, there, stride_n, DIM: constexpr, BLOCK_DIM: constexpr, LONG: constexpr):
    """Rows at x, plus a vector if there is one, rounded to x's dtype. Rows not `there` are not read."""
    column = tl.arange(0, BLOCK_DIM)
    tile = tl.load(
        x + (wide(row, LONG) * stride_n)[:, None] + column[None, :], mask=there[:, None] & (column < DIM)[None, :],
        other=0.0,
    )  # fmt: skip
    if vector is not None:
        added = tl.load(vector + column, mask=column < DIM, other=0.0).to(tl.float32)
        tile = (tile.to(tl.float32) + added[None, :]).to(tile.dtype)
    return tile


@jit
def times_vector(tile, vector, DIM: constexpr, BLOCK_DIM: constexpr):
    """Each row of a tile times the vector at a pointer, fp32."""
    column = tl.arange(0, BLOCK_DIM)
    x = tl.load(vector + column, mask=column < DIM, other=0.0).to(tl.float32)
    return tl.sum(tile.to(tl.float32) * x[None, :], axis=1)


@jit
def states(encoded, offsets, visible, start, ENCODER_DIM: constexpr, BLOCK_ENCODER: constexpr):
    """Columns from `start` on of the states of a tile of slots [BLOCK_SLOTS, BLOCK_ENCODER]; 0 where not visible."""
    column = start + tl.arange(0, BLOCK_ENCODER)
    there = visible[:, None]
    if ENCODER_DIM % BLOCK_ENCODER != 0:
        there = there & (column < ENCODER_DIM)[None, :]
    return tl.load(encoded + offsets[:, None] + column[None, :], mask=there, other=0.0)


@jit
def weight_places(stride_row, start, DIM: constexpr, ENCODER_DIM: constexpr, BLOCK_DIM: constexpr,
                  BLOCK_ENCODER: constexpr, LONG: constexpr):  # fmt: skip
    """Offsets and mask of columns from `start` on of a weight [DIM, ENCODER_DIM]."""
    row = tl.arange(0, BLOCK_DIM)
    column = start + tl.arange(0, BLOCK_ENCODER)
    return (wide(row, LONG) * stride_row)[:, None] + column[None, :], (row < DIM)[:, None] & (column < ENCODER_DIM)[
        None, :
    ]


@jit
def weights(weight, stride_row, start, DIM: constexpr, ENCODER_DIM: constexpr, BLOCK_DIM: constexpr,
            BLOCK_ENCODER: constexpr, LONG: constexpr):  # fmt: skip
    """Columns from `start` on of a head's weight [BLOCK_DIM, BLOCK_ENCODER]."""
    at, there = weight_places(stride_row, start, DIM, ENCODER_DIM, BLOCK_DIM, BLOCK_ENCODER, LONG)
    if DIM == BLOCK_DIM and ENCODER_DIM % BLOCK_ENCODER == 0:
        tile = tl.load(weight + at)
    else:
        tile = tl.load(weight + at, mask=there, other=0.0)
    return tile


@jit
def add_scores(scores, rows, weight, state, PRECISION: constexpr):
    """scores + (rows · weight) · stateᵀ, the inner product rounded to the rows' dtype."""
    projected = tl.dot(rows, weight, input_precision=PRECISION).to(rows.dtype)
    return tl.dot(projected, tl.trans(state), scores, input_precision=PRECISION)


@jit
def add_values(accumulator, probabilities, weight, state, PRECISION: constexpr):
    """accumulator + (probabilities · state) · weightᵀ, the inner product rounded to the states' dtype."""
    summed = tl.dot(probabilities, state, input_precision=PRECISION).to(state.dtype)
    return tl.dot(summed, tl.trans(weight), accumulator, input_precision=PRECISION)


@jit
def slots_and_places(tile, encoded, mask, readable, num_neighbours, retrieved_length, encoded_k, encoded_r, mask_k,
                     mask_r, BLOCK_SLOTS: constexpr, WITHIN: constexpr, FLAT: constexpr, LONG: constexpr):  # fmt: skip
    """Slots of tile number `tile`: slot, neighbour, token, whether it exists, whether it is visible, the offset of its
    states, the tile's first slot and token. Only slots below `readable` are read."""
    slot, neighbour, token, present, first_slot, first_token = slots_of(
        tile, num_neighbours, retrieved_length, BLOCK_SLOTS, CLOCK, WITHIN
    )
    visible = present & (slot < readable)
    if mask is not None:
        at = slot_offsets(slot, neighbour, token, mask_k, mask_r, CLOCK, FLAT, LONG)
        visible = visible & (tl.load(mask + at, mask=visible, other=0) != 0)
    offsets = slot_offsets(slot, neighbour, token, encoded_k, encoded_r, CLOCK, FLAT, LONG)
    return slot, neighbour, token, present, visible, offsets, first_slot, first_token


@jit
def run_of(first_row, first_token, retrieved_length, BLOCK_SLOTS: constexpr, WITHIN: constexpr):
    """The relative distances in a tile: those of rows from first_row on and of `span` tokens from `begin` on (all
    tokens of a neighbour unless WITHIN). Row a and token b of these are at distance first + a - b + span - 1."""
    if WITHIN:
        begin = first_token
        span = tl.minimum(retrieved_length - first_token, BLOCK_SLOTS)
    else:
        begin = tl.zeros_like(first_token)
        span = retrieved_length
    return begin, span, first_row - begin - span + retrieved_length


@jit
def relative_scores(relative, relative_key, relative_x, num_distances, first_row, token, first_token, retrieved_length,
                    DIM: constexpr, WITHIN: constexpr, LONG: constexpr, BLOCK_ROWS: constexpr, BLOCK_SLOTS: constexpr,
                    BLOCK_RUN: constexpr, BLOCK_DIM: constexpr, PRECISION: constexpr):  # fmt: skip
    """The relative term of a tile of scores: BLOCK_RUN distances at a time, shifted to the slots that have them."""
    begin, span, first = run_of(first_row, first_token, retrieved_length, BLOCK_SLOTS, WITHIN)
    row = tl.arange(0, BLOCK_ROWS)
    scores = tl.zeros([BLOCK_ROWS, BLOCK_SLOTS], tl.float32)
    for start in range(0, BLOCK_ROWS + span - 1, BLOCK_RUN):
        run = load_run(
            relative_key, relative_x, first + start, num_distances, relative, DIM, BLOCK_RUN, BLOCK_DIM, LONG
        )
        by_distance = tl.dot(relative, tl.trans(run), input_precision=PRECISION)
        index = row[:, None] - (token - begin)[None, :] + (span - 1 - start)
        there = (index >= 0) & (index < BLOCK_RUN)
        scores += tl.where(there, tl.gather(by_distance, tl.where(there, index, 0), axis=1), 0.0)
    return scores


@jit
def neighbours_of(first_slot, num_neighbours, retrieved_length, BLOCK_SLOTS: constexpr, WITHIN: constexpr):
    """[first, last) neighbours of which a tile holds slots."""
    first = first_slot // retrieved_length
    if WITHIN:
        last = first + 1
    else:
        last = tl.minimum(tl.cdiv(first_slot + BLOCK_SLOTS, retrieved_length), num_neighbours)
    return first, last


@jit
def by_distance(d_logits, start, begin, span, first_slot, first_neighbour, last_neighbour, retrieved_length,
                BLOCK_ROWS: constexpr, BLOCK_SLOTS: constexpr, BLOCK_RUN: constexpr):  # fmt: skip
    """What BLOCK_RUN distances from `start` on contributed to a tile, the neighbours summed: the transpose of the shift
    in `relative_scores`, in the tile's dtype."""
    row = tl.arange(0, BLOCK_ROWS)
    distance = start + tl.arange(0, BLOCK_RUN)
    token = row[:, None] - distance[None, :] + (span - 1)
    inside = (token >= 0) & (token < span)
    total = tl.zeros([BLOCK_ROWS, BLOCK_RUN], tl.float32)
    for neighbour in range(first_neighbour, last_neighbour):
        lane = neighbour * retrieved_length + begin + token - first_slot
        there = inside & (lane >= 0) & (lane < BLOCK_SLOTS)
        total += tl.where(there, tl.gather(d_logits, tl.where(there, lane, 0), axis=1).to(tl.float32), 0.0)
    return total.to(d_logits.dtype)


@jit
def logits_of(scores, constant, attention_bias, scale_log2, row, rows_there, column, visible, bias_m,
              LONG: constexpr):  # fmt: skip
    """A tile's logits in bits (times log2 e), not yet masked. `constant`: what bias_key adds."""
    logits = (scores + constant[:, None]) * scale_log2
    if attention_bias is not None:
        at = (wide(row, LONG) * bias_m)[:, None] + column[None, :]
        there = rows_there[:, None] & visible[None, :]
        logits += bias_in_bits(tl.load(attention_bias + at, mask=there, other=0.0))
    return logits


@jit
def weights_and_gradient(
    content, relative, do, constant, value_constant, delta, lse_log2, rest, w_key, w_value, encoded, attention_bias,
    relative_key, seed, scale, threshold, survivor_scale, drawn, place, row, alive, slot, token, visible, offsets,
    first_row, first_slot, first_token, retrieved_length, num_distances, w_key_d, w_value_d, bias_m, relative_x,
    DIM: constexpr, VALUE_DIM: constexpr, ENCODER_DIM: constexpr, BIAS_PER_SLOT: constexpr, WITHIN: constexpr,
    LOTS: constexpr, LONG: constexpr, BLOCK_ROWS: constexpr, BLOCK_SLOTS: constexpr, BLOCK_ENCODER: constexpr,
    BLOCK_RUN: constexpr, BLOCK_DIM: constexpr, BLOCK_VALUE: constexpr, PRECISION: constexpr,
):  # fmt: skip
    """Of one head's tile, in fp32: the attention weights as they multiplied the values, and the gradient of the logits.
    Pointers are the head's and the chunk's own. A slot that is not visible has exactly 0 beside a row that is NaN."""
    if relative_key is not None:
        scores = relative_scores(
            relative, relative_key, relative_x, num_distances, first_row, token, first_token, retrieved_length,
            DIM, WITHIN, LONG, BLOCK_ROWS, BLOCK_SLOTS, BLOCK_RUN, BLOCK_DIM, PRECISION,
        )  # fmt: skip
    else:
        scores = tl.zeros([BLOCK_ROWS, BLOCK_SLOTS], tl.float32)
    d_weights = tl.zeros([BLOCK_ROWS, BLOCK_SLOTS], tl.float32)
    for start in range(0, ENCODER_DIM, BLOCK_ENCODER):
        state = states(encoded, offsets, visible, start, ENCODER_DIM, BLOCK_ENCODER)
        weight = weights(w_key, w_key_d, start, DIM, ENCODER_DIM, BLOCK_DIM, BLOCK_ENCODER, LONG)
        scores = add_scores(scores, content, weight, state, PRECISION)
        weight = weights(w_value, w_value_d, start, VALUE_DIM, ENCODER_DIM, BLOCK_VALUE, BLOCK_ENCODER, LONG)
        d_weights = add_scores(d_weights, do, weight, state, PRECISION)
    logits = logits_of(
        scores, constant, attention_bias, scale * LOG2_E, row, alive, slot if BIAS_PER_SLOT else token, visible, bias_m,
        LONG,
    )  # fmt: skip
    exponent = logits - lse_log2[:, None]
    if rest is not None:
        exponent -= rest[:, None]
    probabilities = tl.where(visible[None, :], at_most_one(exponent), 0.0)
    d_weights += value_constant[:, None]
    dropped = probabilities
    if seed is not None:
        kept = kept_slots(seed, threshold, drawn, place, slot, first_slot, False, LOTS, BLOCK_ROWS, BLOCK_SLOTS)
        d_weights = tl.where(kept, d_weights * survivor_scale, 0.0)
        dropped = tl.where(kept, probabilities * survivor_scale, 0.0)
    return dropped, tl.where(visible[None, :], probabilities * (d_weights - delta[:, None]), 0.0)
