"""The absorbed forward kernel: both projections inside, an online softmax over tiles of slots."""

from __future__ import annotations

from typing import Any, NamedTuple

from ...attention.triton import tiles
from ...attention.triton.tiles import (
    Dropout,
    Lengths,
    at_head,
    finite,
    group_of,
    inverse,
    jit,
    kept_null,
    kept_slots,
    key_tiles_of,
    row_index,
    row_tile_of,
    row_tiles_of,
    slots_of_group,
    store_lse,
    wide,
)
from .tiles import (
    add_scores,
    add_values,
    at_chunk,
    load_queries,
    load_states,
    load_weight,
    logits_of,
    mask_at_chunk,
    relative_scores,
    state_tile_of,
    times_vector,
    weight_of,
)

if tiles.triton is not None:
    from ...attention.triton.tiles import LOG2_E, constexpr, tl


class Softmax(NamedTuple):
    """Of a head's rows, after some slots: largest logit, sum of weights, share of the slots in it, output so far, all
    normalised at once."""

    largest: Any
    total: Any
    share: Any
    accumulator: Any


@jit
def begin_softmax(queries, null, head, dropout, scale_log2, rows, SPEC):
    """The softmax before the first slot."""
    share = tl.zeros([SPEC.BLOCK_ROWS], tl.float32)
    accumulator = tl.zeros([SPEC.BLOCK_ROWS, SPEC.BLOCK_VALUE], tl.float32)
    if null is not None:
        null_key = null.null_key + head * null.key_h
        largest = scale_log2 * times_vector(queries.content, null_key, SPEC.DIM, SPEC.BLOCK_DIM)
        total = tl.full([SPEC.BLOCK_ROWS], 1.0, tl.float32)
        column = tl.arange(0, SPEC.BLOCK_VALUE)
        nulls = tl.load(null.null_value + head * null.value_h + column, mask=column < SPEC.VALUE_DIM, other=0.0)
        accumulator += nulls.to(tl.float32)[None, :]
        if SPEC.DROPOUT:
            kept = kept_null(dropout, rows.place.to(tl.int32) + rows.row)
            accumulator = tl.where(kept[:, None], accumulator, 0.0)
    else:
        largest = tl.full([SPEC.BLOCK_ROWS], float("-inf"), tl.float32)
        total = tl.zeros([SPEC.BLOCK_ROWS], tl.float32)
    return Softmax(largest, total, share, accumulator)


@jit
def add_slots(softmax, scores, constant, bias, scale_log2, dropout, rows, tile, SPEC):
    """Normalised and dropped weights of one more tile of slots, and the softmax with them; their products with the
    values are still to be added to the accumulator. Normalised at once, no sum of states exceeds the largest of them:
    an unnormalised one could leave fp16's range."""
    logits = logits_of(scores, constant, bias, scale_log2, rows, rows.inside, tile, SPEC)
    logits = tl.where(tile.visible[None, :], logits, float("-inf"))
    larger = tl.maximum(softmax.largest, tl.max(logits, axis=1))
    base = finite(larger)
    probabilities = tl.exp2(logits - base[:, None])
    before = softmax.total * tl.exp2(softmax.largest - base)
    total = before + tl.sum(probabilities, axis=1)
    factor = inverse(total)
    probabilities *= factor[:, None]
    if SPEC.DROPOUT:
        kept = kept_slots(dropout, rows.place.to(tl.int32) + rows.row, tile.slots, False, SPEC)
        probabilities = tl.where(kept, probabilities, 0.0)
    shrink = before * factor
    share = softmax.share * shrink + tl.sum(probabilities, axis=1)
    return probabilities, Softmax(larger, total, share, softmax.accumulator * shrink[:, None])


@jit
def store_results(results, softmax, null, bias_value, survivor_scale, rows, head, group, lengths, SPEC):
    column = tl.arange(0, SPEC.BLOCK_VALUE)
    total = softmax.total
    accumulator = softmax.accumulator
    if bias_value is not None:
        kv_head = head // lengths.heads_per_key
        added = tl.load(bias_value.data + kv_head * bias_value.h + column, mask=column < SPEC.VALUE_DIM, other=0.0)
        accumulator += softmax.share[:, None] * added.to(tl.float32)[None, :]
    if null is not None:
        # Where there are no slots the null slot's logit, which may be infinite or NaN, has met no other.
        exists = tl.exp2(softmax.largest - finite(softmax.largest))
        total *= exists
        accumulator *= (inverse(exists) * exists)[:, None]
    at = row_index(rows, head, group, lengths, SPEC) + wide(rows.row, SPEC.INT64) * lengths.num_heads
    tl.store(
        results.out + (at * SPEC.VALUE_DIM)[:, None] + column[None, :],
        (accumulator * survivor_scale).to(results.out.dtype.element_ty),
        mask=rows.inside[:, None] & (column < SPEC.VALUE_DIM)[None, :],
    )
    store_lse(results, at, softmax.largest, total, rows.inside)


@jit
def forward_kernel(
    query,
    encoded,
    w_key,
    w_value,
    bias_key,
    bias_value,
    mask,
    attention_bias,
    relative,
    null,
    chunk_spans,
    dropout_seed,
    results,
    scale,
    survivor_scale,
    threshold,
    num_tokens,
    num_neighbours,
    retrieved_length,
    num_heads,
    heads_per_key,
    num_chunks,
    first_group,
    num_groups,
    stride,
    first_token,
    table_rows,
    HEADS: constexpr,
    SPEC,
):
    """Program (batch, chunk, row tile, HEADS query heads), heads fastest: the programs that run at a time share the
    states of few chunks, and the weights of all heads stay in the L2 cache. HEADS is 1 or 2."""
    lengths = Lengths(
        num_tokens,
        num_neighbours,
        retrieved_length,
        num_heads,
        heads_per_key,
        num_chunks,
        stride,
        first_token,
        table_rows,
    )
    row_tiles = row_tiles_of(lengths, SPEC)
    lanes = num_heads // HEADS
    lane = tl.program_id(0) % lanes
    item = tl.program_id(0) // lanes
    row_tile = item % row_tiles
    item = item // row_tiles
    number = first_group + item % num_groups
    batch = (item // num_groups).to(tl.int64)
    head = (lane * HEADS).to(tl.int64)
    kv_head = head // heads_per_key
    scale_log2 = scale * LOG2_E
    seed = 0
    if SPEC.DROPOUT:
        seed = tl.load(dropout_seed)
    dropout = Dropout(seed, threshold, survivor_scale, (batch * num_heads + head).to(tl.int32))

    # Tokens before the first chunk; those in no span were filled before the launch.
    if chunk_spans is None:  # noqa: SIM102 - one is known when compiling
        if (number == first_group) & (row_tile == 0):
            column = tl.arange(0, SPEC.BLOCK_VALUE)
            for ahead in range(0, first_token * HEADS, SPEC.BLOCK_ROWS):
                leading = ahead + tl.arange(0, SPEC.BLOCK_ROWS)
                at = batch * num_tokens * num_heads + (leading // HEADS).to(tl.int64) * num_heads
                at = at + head + leading % HEADS
                there = leading < first_token * HEADS
                tl.store(
                    results.out + (at * SPEC.VALUE_DIM)[:, None] + column[None, :],
                    tl.zeros([SPEC.BLOCK_ROWS, SPEC.BLOCK_VALUE], results.out.dtype.element_ty),
                    mask=there[:, None] & (column < SPEC.VALUE_DIM)[None, :],
                )
                nothing = tl.zeros([SPEC.BLOCK_ROWS], tl.float32)
                store_lse(results, at, nothing, nothing, there)

    group = group_of(number, batch, chunk_spans, lengths, SPEC)
    rows = row_tile_of(row_tile, group, lengths, SPEC)
    queries = load_queries(query, relative, head, rows, rows.inside, group, SPEC)
    constant = tl.zeros([SPEC.BLOCK_ROWS], tl.float32)
    if bias_key is not None:
        constant = times_vector(queries.content, bias_key.data + kv_head * bias_key.h, SPEC.DIM, SPEC.BLOCK_DIM)
    softmax = begin_softmax(queries, null, head, dropout, scale_log2, rows, SPEC)
    bias = None
    if attention_bias is not None:
        bias = at_head(attention_bias, head)
    key_weight = weight_of(w_key, kv_head)
    value_weight = weight_of(w_value, kv_head)
    if HEADS == 2:
        kv_head_1 = (head + 1) // heads_per_key
        dropout_1 = Dropout(seed, threshold, survivor_scale, dropout.head + 1)
        queries_1 = load_queries(query, relative, head + 1, rows, rows.inside, group, SPEC)
        constant_1 = tl.zeros([SPEC.BLOCK_ROWS], tl.float32)
        if bias_key is not None:
            at_bias = bias_key.data + kv_head_1 * bias_key.h
            constant_1 = times_vector(queries_1.content, at_bias, SPEC.DIM, SPEC.BLOCK_DIM)
        softmax_1 = begin_softmax(queries_1, null, head + 1, dropout_1, scale_log2, rows, SPEC)
        bias_1 = None
        if attention_bias is not None:
            bias_1 = at_head(attention_bias, head + 1)
        key_weight_1 = weight_of(w_key, kv_head_1)
        value_weight_1 = weight_of(w_value, kv_head_1)

    encoded = at_chunk(encoded, group)
    if mask is not None:
        mask = mask_at_chunk(mask, group)
    readable = slots_of_group(lengths, SPEC)
    for number_of_tile in range(0, key_tiles_of(lengths, SPEC)):
        tile = state_tile_of(number_of_tile, encoded, mask, readable, lengths, SPEC)
        scores = tl.zeros([SPEC.BLOCK_ROWS, SPEC.BLOCK_KEYS], tl.float32)
        scores_1 = scores
        if relative is not None:
            scores = relative_scores(queries, relative, head, rows, tile.slots, lengths, SPEC)
            if HEADS == 2:
                scores_1 = relative_scores(queries_1, relative, head + 1, rows, tile.slots, lengths, SPEC)
        for at in range(0, SPEC.ENCODER_DIM, SPEC.BLOCK_ENCODER):
            state = load_states(encoded, tile, at, SPEC)
            weight = load_weight(key_weight, at, SPEC.DIM, SPEC.BLOCK_DIM, SPEC)
            scores = add_scores(scores, queries.content, weight, state, SPEC)
            if HEADS == 2:
                weight = load_weight(key_weight_1, at, SPEC.DIM, SPEC.BLOCK_DIM, SPEC)
                scores_1 = add_scores(scores_1, queries_1.content, weight, state, SPEC)

        probabilities, softmax = add_slots(softmax, scores, constant, bias, scale_log2, dropout, rows, tile, SPEC)
        probabilities = probabilities.to(queries.content.dtype)
        if HEADS == 2:
            probabilities_1, softmax_1 = add_slots(
                softmax_1, scores_1, constant_1, bias_1, scale_log2, dropout_1, rows, tile, SPEC
            )
            probabilities_1 = probabilities_1.to(queries.content.dtype)

        accumulator = softmax.accumulator
        if HEADS == 2:
            accumulator_1 = softmax_1.accumulator
        for at in range(0, SPEC.ENCODER_DIM, SPEC.BLOCK_ENCODER):
            state = load_states(encoded, tile, at, SPEC)
            weight = load_weight(value_weight, at, SPEC.VALUE_DIM, SPEC.BLOCK_VALUE, SPEC)
            accumulator = add_values(accumulator, probabilities, weight, state, SPEC)
            if HEADS == 2:
                weight = load_weight(value_weight_1, at, SPEC.VALUE_DIM, SPEC.BLOCK_VALUE, SPEC)
                accumulator_1 = add_values(accumulator_1, probabilities_1, weight, state, SPEC)
        softmax = Softmax(softmax.largest, softmax.total, softmax.share, accumulator)
        if HEADS == 2:
            softmax_1 = Softmax(softmax_1.largest, softmax_1.total, softmax_1.share, accumulator_1)

    store_results(results, softmax, null, bias_value, survivor_scale, rows, head, group, lengths, SPEC)
    if HEADS == 2:
        store_results(results, softmax_1, null, bias_value, survivor_scale, rows, head + 1, group, lengths, SPEC)
