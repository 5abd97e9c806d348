"""The forward kernel: an online softmax over key tiles."""

from __future__ import annotations

from . import tiles
from .tiles import (
    finite,
    group_of,
    inverse,
    jit,
    kept_null,
    kept_slots,
    load_keys,
    load_query,
    load_run,
    load_vector,
    logits_of,
    row_tile_of,
    rows_of,
    seen,
    slots_of,
    store_lse,
    vector_product,
    wide,
)

if tiles.triton is not None:
    from .tiles import CLOCK, LOG2_E, NEIGHBOUR, constexpr, tl


@jit
def forward_kernel(
    query, key, value, mask, attention_bias, relative_key, content_bias, relative_bias, query_cos, query_sin,
    key_cos, key_sin, null_key, null_value, chunk_spans, first_visible, dropout_seed, out, lse, log_sum,
    scale, threshold, survivor_scale, num_tokens, num_places, place_l, place_k, num_neighbours, retrieved_length,
    query_neighbours, num_heads, heads_per_key, num_chunks, first_group, num_groups, row_tiles, key_tiles, stride,
    first_token, num_distances,
    query_b, query_l, query_k, query_n, query_h, key_b, key_l, key_k, key_r, key_h,
    value_b, value_l, value_k, value_r, value_h, mask_b, mask_l, mask_k, mask_r, bias_h, bias_m,
    relative_h, relative_x, content_bias_h, relative_bias_h, query_cos_m, query_sin_m, key_cos_r, key_sin_r,
    null_key_h, null_value_h,
    GROUPING: constexpr, CAUSAL: constexpr, WITHIN: constexpr, LOTS: constexpr,
    DIM: constexpr, VALUE_DIM: constexpr, WIDTH: constexpr, INTERLEAVED: constexpr, FLAT: constexpr, LONG: constexpr,
    BIAS_PER_SLOT: constexpr, BLOCK_ROWS: constexpr, BLOCK_KEYS: constexpr, BLOCK_RUN: constexpr,
    BLOCK_PAIR: constexpr, BLOCK_REST: constexpr, BLOCK_VALUE: constexpr, PRECISION: constexpr,
):  # fmt: skip
    """Program (batch, group, row tile, query head), heads fastest: the heads of a token lie side by side in memory."""
    head = tl.program_id(0) % num_heads
    item = tl.program_id(0) // num_heads
    row_tile = item % row_tiles
    item = item // row_tiles
    group = first_group + item % num_groups
    batch = (item // num_groups).to(tl.int64)
    kv_head = (head // heads_per_key).to(tl.int64)
    drawn = (batch * num_heads + head).to(tl.int32)
    head = head.to(tl.int64)
    value_column = tl.arange(0, BLOCK_VALUE)
    value_there = value_column < VALUE_DIM
    scale_log2 = scale * LOG2_E

    # Tokens before the first chunk; those in no span were filled before the launch.
    if GROUPING == CLOCK and chunk_spans is None:  # noqa: SIM102 - one is known when compiling
        if (group == first_group) & (row_tile == 0):
            for start in range(0, first_token, BLOCK_ROWS):
                leading = start + tl.arange(0, BLOCK_ROWS)
                at = (batch * num_places + leading) * num_heads + head
                tl.store(out + (at * VALUE_DIM)[:, None] + value_column[None, :],
                         tl.zeros([BLOCK_ROWS, BLOCK_VALUE], out.dtype.element_ty),
                         mask=(leading < first_token)[:, None] & value_there[None, :])  # fmt: skip
                nothing = tl.zeros([BLOCK_ROWS], tl.float32)
                store_lse(lse, log_sum, at, nothing, nothing, leading < first_token)

    chunk, neighbour, start, count = group_of(
        group, batch, chunk_spans, num_chunks, query_neighbours, stride, first_token, GROUPING
    )
    neighbour, first_row = row_tile_of(row_tile, neighbour, num_tokens, GROUPING, BLOCK_ROWS)
    row, inside = rows_of(first_row, start, count, num_tokens, BLOCK_ROWS)
    chunk64 = chunk.to(tl.int64)
    first_place = chunk64 * place_l + neighbour * place_k + start
    position = row
    document = None
    if first_visible is not None:
        first_visible += batch * num_tokens
        document = tl.load(first_visible + row, mask=inside, other=0)
        position = row - document
    content, relative = load_query(
        query + batch * query_b + chunk64 * query_l + neighbour.to(tl.int64) * query_k + start.to(tl.int64) * query_n
        + head * query_h,
        query_cos, query_sin,
        content_bias + head * content_bias_h if content_bias is not None else None,
        relative_bias + head * relative_bias_h if relative_bias is not None else None,
        position, row, inside, query_n, query_cos_m, query_sin_m,
        DIM, WIDTH, INTERLEAVED, LONG, BLOCK_PAIR, BLOCK_REST,
    )  # fmt: skip

    place = None
    seed = None
    if dropout_seed is not None:
        seed = tl.load(dropout_seed)
        place = first_place.to(tl.int32) + row
    if null_key is not None:
        null = load_vector(null_key + head * null_key_h, DIM, WIDTH, INTERLEAVED, BLOCK_PAIR, BLOCK_REST)
        largest = scale_log2 * vector_product(content, null, DIM, WIDTH)
        total = tl.full([BLOCK_ROWS], 1.0, tl.float32)
        nulls = tl.load(null_value + head * null_value_h + value_column, mask=value_there, other=0.0).to(tl.float32)
        accumulator = tl.zeros([BLOCK_ROWS, BLOCK_VALUE], tl.float32) + nulls[None, :]
        if dropout_seed is not None:
            accumulator = tl.where(kept_null(seed, threshold, drawn, place)[:, None], accumulator, 0.0)
    else:
        largest = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_ROWS], tl.float32)
        accumulator = tl.zeros([BLOCK_ROWS, BLOCK_VALUE], tl.float32)

    key += batch * key_b + chunk64 * key_l + kv_head * key_h
    value += batch * value_b + chunk64 * value_l + kv_head * value_h
    if mask is not None:
        mask += batch * mask_b + chunk64 * mask_l
    if GROUPING == NEIGHBOUR:
        key += neighbour.to(tl.int64) * key_k
        value += neighbour.to(tl.int64) * value_k
        if mask is not None:
            mask += neighbour.to(tl.int64) * mask_k
    if attention_bias is not None:
        attention_bias += head * bias_h
    if relative_key is not None:
        relative_key += head * relative_h

    first_tile = 0
    last_tile = key_tiles
    if CAUSAL:
        last_tile = tl.minimum(key_tiles, tl.cdiv(first_row + BLOCK_ROWS, BLOCK_KEYS))
        if first_visible is not None:
            first_tile = tl.min(tl.where(inside, document, num_tokens)) // BLOCK_KEYS
    for tile in range(first_tile, last_tile):
        slot, slot_neighbour, token, present, first_slot, token0 = slots_of(
            tile, num_neighbours, retrieved_length, BLOCK_KEYS, GROUPING, WITHIN
        )
        visible, k, v, _ = load_keys(
            key, value, mask, key_cos, key_sin, first_visible, slot, slot_neighbour, token, present, num_tokens,
            key_k, key_r, value_k, value_r, mask_k, mask_r, key_cos_r, key_sin_r,
            GROUPING, FLAT, LONG, DIM, VALUE_DIM, WIDTH, INTERLEAVED, BLOCK_PAIR, BLOCK_REST, BLOCK_VALUE,
        )  # fmt: skip
        run = None
        if relative_key is not None:
            run = load_run(relative_key, relative_x, first_row - token0 - BLOCK_KEYS + retrieved_length, num_distances,
                           relative[2], DIM, BLOCK_RUN, BLOCK_REST, LONG)  # fmt: skip
        logits = logits_of(
            content, relative, k, run, attention_bias, scale_log2, row, inside, slot if BIAS_PER_SLOT else token,
            visible, bias_m, DIM, WIDTH, False, LONG, BLOCK_ROWS, BLOCK_KEYS, BLOCK_RUN, PRECISION,
        )  # fmt: skip
        logits = tl.where(seen(visible, row, token, document, False, CAUSAL), logits, float("-inf"))
        larger = tl.maximum(largest, tl.max(logits, axis=1))
        base = finite(larger)
        weights = tl.exp2(logits - base[:, None])
        shrink = tl.exp2(largest - base)
        total = total * shrink + tl.sum(weights, axis=1)
        if dropout_seed is not None:
            kept = kept_slots(seed, threshold, drawn, place, slot, first_slot, False, LOTS, BLOCK_ROWS, BLOCK_KEYS)
            weights = tl.where(kept, weights, 0.0)
        accumulator = tl.dot(weights.to(v.dtype), v, accumulator * shrink[:, None], input_precision=PRECISION)
        largest = larger

    if null_key is not None:
        # Where there are no slots the null slot's logit, which may be infinite or NaN, has met no other.
        exists = tl.exp2(largest - finite(largest))
        total *= exists
        factor = inverse(total) * exists
    else:
        factor = inverse(total)
    if dropout_seed is not None:
        factor *= survivor_scale
    accumulator = accumulator * factor[:, None]
    at = (batch * num_places + first_place) * num_heads + head
    tl.store(out + at * VALUE_DIM + (wide(row, LONG) * (num_heads * VALUE_DIM))[:, None] + value_column[None, :],
             accumulator.to(out.dtype.element_ty), mask=inside[:, None] & value_there[None, :])  # fmt: skip
    store_lse(lse, log_sum, at + wide(row, LONG) * num_heads, largest, total, inside)
