"""The absorbed forward kernel: both projections inside, an online softmax over tiles of slots."""

from __future__ import annotations

from ...attention.triton import tiles
from ...attention.triton.tiles import finite, group_of, inverse, jit, kept_null, kept_slots, rows_of, store_lse, wide
from .tiles import (
    add_scores,
    add_values,
    load_rows,
    logits_of,
    relative_scores,
    slots_and_places,
    states,
    times_vector,
    weights,
)

if tiles.triton is not None:
    from ...attention.triton.tiles import CLOCK, LOG2_E, constexpr, tl


@jit
def _begin(
    query, content_bias, relative_bias, bias_key, null_key, null_value, seed, scale_log2, threshold, drawn, place, row,
    inside, head, kv_head, query_n, query_h, content_bias_h, relative_bias_h, bias_key_h, null_key_h, null_value_h,
    DIM: constexpr, VALUE_DIM: constexpr, LONG: constexpr, BLOCK_ROWS: constexpr, BLOCK_DIM: constexpr,
    BLOCK_VALUE: constexpr,
):  # fmt: skip
    """A head's rows as the content and the relative term see them, what bias_key adds to their scores, and the state of
    the softmax before the first slot: largest logit, sum, weight of the slots, output so far (normalised)."""
    query += head * query_h
    content = load_rows(query, content_bias + head * content_bias_h if content_bias is not None else None, row, inside,
                        query_n, DIM, BLOCK_DIM, LONG)  # fmt: skip
    relative = content
    if content_bias is not None or relative_bias is not None:
        relative = load_rows(query, relative_bias + head * relative_bias_h if relative_bias is not None else None, row,
                             inside, query_n, DIM, BLOCK_DIM, LONG)  # fmt: skip
    constant = tl.zeros([BLOCK_ROWS], tl.float32)
    if bias_key is not None:
        constant = times_vector(content, bias_key + kv_head * bias_key_h, DIM, BLOCK_DIM)
    share = tl.zeros([BLOCK_ROWS], tl.float32)
    accumulator = tl.zeros([BLOCK_ROWS, BLOCK_VALUE], tl.float32)
    if null_key is not None:
        largest = scale_log2 * times_vector(content, null_key + head * null_key_h, DIM, BLOCK_DIM)
        total = tl.full([BLOCK_ROWS], 1.0, tl.float32)
        column = tl.arange(0, BLOCK_VALUE)
        nulls = tl.load(null_value + head * null_value_h + column, mask=column < VALUE_DIM, other=0.0)
        accumulator += nulls.to(tl.float32)[None, :]
        if seed is not None:
            accumulator = tl.where(kept_null(seed, threshold, drawn, place)[:, None], accumulator, 0.0)
    else:
        largest = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_ROWS], tl.float32)
    return content, relative, constant, largest, total, share, accumulator


@jit
def _softmax(
    scores, constant, largest, total, share, accumulator, attention_bias, seed, scale_log2, threshold, drawn, place,
    row, inside, slot, column, visible, first_slot, bias_m,
    LOTS: constexpr, LONG: constexpr, BLOCK_ROWS: constexpr, BLOCK_SLOTS: constexpr,
):  # fmt: skip
    """The state of the softmax after one more tile of slots, whose normalised and dropped weights come first; their
    products with the values are still to be added to the accumulator. Normalised at once, no sum of states exceeds the
    largest of them: an unnormalised one could leave fp16's range."""
    logits = logits_of(scores, constant, attention_bias, scale_log2, row, inside, column, visible, bias_m, LONG)
    logits = tl.where(visible[None, :], logits, float("-inf"))
    larger = tl.maximum(largest, tl.max(logits, axis=1))
    base = finite(larger)
    probabilities = tl.exp2(logits - base[:, None])
    before = total * tl.exp2(largest - base)
    total = before + tl.sum(probabilities, axis=1)
    factor = inverse(total)
    probabilities *= factor[:, None]
    if seed is not None:
        kept = kept_slots(seed, threshold, drawn, place, slot, first_slot, False, LOTS, BLOCK_ROWS, BLOCK_SLOTS)
        probabilities = tl.where(kept, probabilities, 0.0)
    shrink = before * factor
    share = share * shrink + tl.sum(probabilities, axis=1)
    return probabilities, larger, total, share, accumulator * shrink[:, None]


@jit
def _finish(
    out, lse, log_sum, null_key, bias_value, largest, total, share, accumulator, survivor_scale, row, inside, head,
    kv_head, num_heads, bias_value_h, VALUE_DIM: constexpr, LONG: constexpr, BLOCK_VALUE: constexpr,
):  # fmt: skip
    column = tl.arange(0, BLOCK_VALUE)
    if bias_value is not None:
        added = tl.load(bias_value + kv_head * bias_value_h + column, mask=column < VALUE_DIM, other=0.0)
        accumulator += share[:, None] * added.to(tl.float32)[None, :]
    if null_key is not None:
        # Where there are no slots the null slot's logit, which may be infinite or NaN, has met no other.
        exists = tl.exp2(largest - finite(largest))
        total *= exists
        accumulator *= (inverse(exists) * exists)[:, None]
    at = head + wide(row, LONG) * num_heads
    tl.store(out + (at * VALUE_DIM)[:, None] + column[None, :], (accumulator * survivor_scale).to(out.dtype.element_ty),
             mask=inside[:, None] & (column < VALUE_DIM)[None, :])  # fmt: skip
    store_lse(lse, log_sum, at, largest, total, inside)


@jit
def forward_kernel(
    query, encoded, w_key, w_value, bias_key, bias_value, mask, attention_bias, relative_key, content_bias,
    relative_bias, null_key, null_value, chunk_spans, dropout_seed, out, lse, log_sum,
    scale, threshold, survivor_scale, num_tokens, num_neighbours, retrieved_length, num_heads, heads_per_key,
    num_chunks, first_group, num_groups, row_tiles, key_tiles, stride, first_token, num_distances,
    query_b, query_n, query_h, encoded_b, encoded_l, encoded_k, encoded_r, w_key_h, w_key_d, w_value_h, w_value_d,
    bias_key_h, bias_value_h, mask_b, mask_l, mask_k, mask_r, bias_h, bias_m, relative_h, relative_x, content_bias_h,
    relative_bias_h, null_key_h, null_value_h,
    HEADS: constexpr, DIM: constexpr, VALUE_DIM: constexpr, ENCODER_DIM: constexpr, BIAS_PER_SLOT: constexpr,
    WITHIN: constexpr, LOTS: constexpr, FLAT: constexpr, LONG: constexpr, BLOCK_ROWS: constexpr,
    BLOCK_SLOTS: constexpr, BLOCK_ENCODER: constexpr, BLOCK_RUN: constexpr, BLOCK_DIM: constexpr,
    BLOCK_VALUE: constexpr, PRECISION: constexpr,
):  # fmt: skip
    """Program (batch, chunk, row tile, HEADS query heads), heads fastest: the programs that run at a time share the
    states of few chunks, and the weights of all heads stay in the L2 cache. HEADS is 1 or 2."""
    lanes = num_heads // HEADS
    lane = tl.program_id(0) % lanes
    item = tl.program_id(0) // lanes
    row_tile = item % row_tiles
    item = item // row_tiles
    group = first_group + item % num_groups
    batch = (item // num_groups).to(tl.int64)
    head = (lane * HEADS).to(tl.int64)
    kv_head = head // heads_per_key
    drawn = (batch * num_heads + head).to(tl.int32)
    scale_log2 = scale * LOG2_E
    first_place = batch * num_tokens * num_heads

    # Tokens before the first chunk; those in no span were filled before the launch.
    if chunk_spans is None:  # noqa: SIM102 - one is known when compiling
        if (group == first_group) & (row_tile == 0):
            column = tl.arange(0, BLOCK_VALUE)
            for ahead in range(0, first_token * HEADS, BLOCK_ROWS):
                leading = ahead + tl.arange(0, BLOCK_ROWS)
                at = first_place + (leading // HEADS).to(tl.int64) * num_heads + head + leading % HEADS
                there = leading < first_token * HEADS
                tl.store(out + (at * VALUE_DIM)[:, None] + column[None, :],
                         tl.zeros([BLOCK_ROWS, BLOCK_VALUE], out.dtype.element_ty),
                         mask=there[:, None] & (column < VALUE_DIM)[None, :])  # fmt: skip
                nothing = tl.zeros([BLOCK_ROWS], tl.float32)
                store_lse(lse, log_sum, at, nothing, nothing, there)

    _, _, start, count = group_of(group, batch, chunk_spans, num_chunks, 1, stride, first_token, CLOCK)
    first_row = row_tile * BLOCK_ROWS
    row, inside = rows_of(first_row, start, count, num_tokens, BLOCK_ROWS)
    place = start + row
    seed = None
    if dropout_seed is not None:
        seed = tl.load(dropout_seed)
    query += batch * query_b + start.to(tl.int64) * query_n
    content, relative, constant, largest, total, share, accumulator = _begin(
        query, content_bias, relative_bias, bias_key, null_key, null_value, seed, scale_log2, threshold, drawn, place,
        row, inside, head, kv_head, query_n, query_h, content_bias_h, relative_bias_h, bias_key_h, null_key_h,
        null_value_h, DIM, VALUE_DIM, LONG, BLOCK_ROWS, BLOCK_DIM, BLOCK_VALUE,
    )  # fmt: skip
    w_key_1 = w_key
    w_value_1 = w_value
    if HEADS == 2:
        kv_head_1 = (head + 1) // heads_per_key
        content_1, relative_1, constant_1, largest_1, total_1, share_1, accumulator_1 = _begin(
            query, content_bias, relative_bias, bias_key, null_key, null_value, seed, scale_log2, threshold, drawn + 1,
            place, row, inside, head + 1, kv_head_1, query_n, query_h, content_bias_h, relative_bias_h, bias_key_h,
            null_key_h, null_value_h, DIM, VALUE_DIM, LONG, BLOCK_ROWS, BLOCK_DIM, BLOCK_VALUE,
        )  # fmt: skip
        w_key_1 += kv_head_1 * w_key_h
        w_value_1 += kv_head_1 * w_value_h
    w_key += kv_head * w_key_h
    w_value += kv_head * w_value_h

    encoded += batch * encoded_b + group.to(tl.int64) * encoded_l
    if mask is not None:
        mask += batch * mask_b + group.to(tl.int64) * mask_l
    readable = num_neighbours * retrieved_length
    for tile in range(0, key_tiles):
        slot, _neighbour, token, _present, visible, offsets, first_slot, token0 = slots_and_places(
            tile, encoded, mask, readable, num_neighbours, retrieved_length, encoded_k, encoded_r, mask_k, mask_r,
            BLOCK_SLOTS, WITHIN, FLAT, LONG,
        )  # fmt: skip
        scores = tl.zeros([BLOCK_ROWS, BLOCK_SLOTS], tl.float32)
        scores_1 = scores
        if relative_key is not None:
            scores = relative_scores(
                relative, relative_key + head * relative_h, relative_x, num_distances, first_row, token, token0,
                retrieved_length, DIM, WITHIN, LONG, BLOCK_ROWS, BLOCK_SLOTS, BLOCK_RUN, BLOCK_DIM, PRECISION,
            )  # fmt: skip
            if HEADS == 2:
                scores_1 = relative_scores(
                    relative_1, relative_key + (head + 1) * relative_h, relative_x, num_distances, first_row, token,
                    token0, retrieved_length, DIM, WITHIN, LONG, BLOCK_ROWS, BLOCK_SLOTS, BLOCK_RUN, BLOCK_DIM,
                    PRECISION,
                )  # fmt: skip
        for at in range(0, ENCODER_DIM, BLOCK_ENCODER):
            state = states(encoded, offsets, visible, at, ENCODER_DIM, BLOCK_ENCODER)
            weight = weights(w_key, w_key_d, at, DIM, ENCODER_DIM, BLOCK_DIM, BLOCK_ENCODER, LONG)
            scores = add_scores(scores, content, weight, state, PRECISION)
            if HEADS == 2:
                weight = weights(w_key_1, w_key_d, at, DIM, ENCODER_DIM, BLOCK_DIM, BLOCK_ENCODER, LONG)
                scores_1 = add_scores(scores_1, content_1, weight, state, PRECISION)

        column = slot if BIAS_PER_SLOT else token
        probabilities, largest, total, share, accumulator = _softmax(
            scores, constant, largest, total, share, accumulator,
            attention_bias + head * bias_h if attention_bias is not None else None, seed, scale_log2, threshold, drawn,
            place, row, inside, slot, column, visible, first_slot, bias_m, LOTS, LONG, BLOCK_ROWS, BLOCK_SLOTS,
        )  # fmt: skip
        probabilities = probabilities.to(content.dtype)
        if HEADS == 2:
            probabilities_1, largest_1, total_1, share_1, accumulator_1 = _softmax(
                scores_1, constant_1, largest_1, total_1, share_1, accumulator_1,
                attention_bias + (head + 1) * bias_h if attention_bias is not None else None, seed, scale_log2,
                threshold, drawn + 1, place, row, inside, slot, column, visible, first_slot, bias_m,
                LOTS, LONG, BLOCK_ROWS, BLOCK_SLOTS,
            )  # fmt: skip
            probabilities_1 = probabilities_1.to(content.dtype)

        for at in range(0, ENCODER_DIM, BLOCK_ENCODER):
            state = states(encoded, offsets, visible, at, ENCODER_DIM, BLOCK_ENCODER)
            weight = weights(w_value, w_value_d, at, VALUE_DIM, ENCODER_DIM, BLOCK_VALUE, BLOCK_ENCODER, LONG)
            accumulator = add_values(accumulator, probabilities, weight, state, PRECISION)
            if HEADS == 2:
                weight = weights(w_value_1, w_value_d, at, VALUE_DIM, ENCODER_DIM, BLOCK_VALUE, BLOCK_ENCODER, LONG)
                accumulator_1 = add_values(accumulator_1, probabilities_1, weight, state, PRECISION)

    first_place += start.to(tl.int64) * num_heads
    out += first_place * VALUE_DIM
    lse += first_place
    if log_sum is not None:
        log_sum += first_place
    _finish(out, lse, log_sum, null_key, bias_value, largest, total, share, accumulator, survivor_scale, row, inside,
            head, kv_head, num_heads, bias_value_h, VALUE_DIM, LONG, BLOCK_VALUE)  # fmt: skip
    if HEADS == 2:
        _finish(out, lse, log_sum, null_key, bias_value, largest_1, total_1, share_1, accumulator_1, survivor_scale,
                row, inside, head + 1, kv_head_1, num_heads, bias_value_h, VALUE_DIM, LONG, BLOCK_VALUE)  # fmt: skip
