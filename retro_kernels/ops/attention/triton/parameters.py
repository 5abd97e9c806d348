"""The kernel of the parameters' gradients: bias, relative positions, null slot.

Every group adds to them, so each is a launch of its own, in which `num_copies` programs a head (and tile of the bias)
each take every num_copies-th item, sum in registers and write to a private fp32 copy; the copies are then summed in a
fixed order. In the main pass their registers would spill.
"""

from __future__ import annotations

from . import tiles
from .tiles import (
    by_distance,
    group_of,
    jit,
    kept_null,
    kept_slots,
    load_keys,
    load_query,
    load_results,
    load_run,
    logits_of,
    null_slot,
    rows_of,
    seen,
    slots_of,
    store_vector,
    weights_and_gradient,
    wide,
)

if tiles.triton is not None:
    from .tiles import CHUNK, CLOCK, LOG2_E, NEIGHBOUR, constexpr, tl

    BIAS = constexpr(0)
    RELATIVE = constexpr(1)
    NULL = constexpr(2)


@jit
def parameters_kernel(
    grad_out, query, key, value, mask, attention_bias, relative_key, content_bias, relative_bias, query_cos, query_sin,
    key_cos, key_sin, null_key, null_value, chunk_spans, first_visible, dropout_seed, out, lse, log_sum,
    bias_copies, relative_key_copies, content_bias_copies, relative_bias_copies, null_key_copies, null_value_copies,
    scale, threshold, survivor_scale, num_tokens, num_places, place_l, place_k, num_neighbours, retrieved_length,
    query_neighbours, num_heads, heads_per_key, num_chunks, first_group, num_groups, row_tiles, key_tiles, stride,
    first_token, num_distances, sharing, num_items, num_copies, table_rows, table_columns,
    grad_out_b, grad_out_l, grad_out_k, grad_out_n, grad_out_h,
    query_b, query_l, query_k, query_n, query_h, key_b, key_l, key_k, key_r, key_h,
    value_b, value_l, value_k, value_r, value_h, mask_b, mask_l, mask_k, mask_r, bias_h, bias_m,
    relative_h, relative_x, content_bias_h, relative_bias_h, query_cos_m, query_sin_m, key_cos_r, key_sin_r,
    null_key_h, null_value_h,
    WHAT: constexpr, GROUPING: constexpr, CAUSAL: constexpr, WITHIN: constexpr, LOTS: constexpr,
    DIM: constexpr, VALUE_DIM: constexpr, WIDTH: constexpr, INTERLEAVED: constexpr, FLAT: constexpr, LONG: constexpr,
    BIAS_PER_SLOT: constexpr, BLOCK_ROWS: constexpr, BLOCK_KEYS: constexpr, BLOCK_RUN: constexpr,
    BLOCK_PAIR: constexpr, BLOCK_REST: constexpr, BLOCK_VALUE: constexpr, PRECISION: constexpr,
):  # fmt: skip
    """`row_tiles` and `key_tiles` are those of one neighbour (of all, for the gradient of a bias per slot); `sharing`
    is how many neighbours of a group add to the same elements.

    BIAS: program (copy, row tile, key tile, head); an item is (batch, group, neighbour).
    RELATIVE: program (copy, head); an item is (batch, group, neighbour, row tile). Square tiles: those on one diagonal
    have the same distances, so the sums of a diagonal stay in registers over all items.
    NULL: program (copy, head); an item is (batch, group, neighbour, row tile). It also adds what the null slot
    contributes to the gradient of content_bias, and runs after RELATIVE."""
    head32 = tl.program_id(0) % num_heads
    own = tl.program_id(0) // num_heads
    own_row_tile = 0
    own_key_tile = 0
    if WHAT == BIAS:
        own_key_tile = own % key_tiles
        own = own // key_tiles
        own_row_tile = own % row_tiles
        own = own // row_tiles
    copy = own
    head = head32.to(tl.int64)
    kv_head = (head32 // heads_per_key).to(tl.int64)
    head_copy = copy.to(tl.int64) * num_heads + head
    scale_log2 = scale * LOG2_E
    seed = None
    if dropout_seed is not None:
        seed = tl.load(dropout_seed)
    if attention_bias is not None:
        attention_bias += head * bias_h
    if relative_key is not None:
        relative_key += head * relative_h
    if content_bias is not None:
        content_bias += head * content_bias_h
    if relative_bias is not None:
        relative_bias += head * relative_bias_h
    if null_key is not None:
        null_key += head * null_key_h
        null_value += head * null_value_h

    value_column = tl.arange(0, BLOCK_VALUE)
    rest_column = tl.arange(0, BLOCK_REST)
    d_bias = tl.zeros([BLOCK_ROWS, BLOCK_KEYS], tl.float32)
    d_content = tl.zeros([BLOCK_REST], tl.float32)
    d_relative = tl.zeros([BLOCK_REST], tl.float32)
    d_null = tl.zeros([BLOCK_PAIR], tl.float32), tl.zeros([BLOCK_PAIR], tl.float32), tl.zeros([BLOCK_REST], tl.float32)
    d_null_value = tl.zeros([BLOCK_VALUE], tl.float32)
    d_null_logit = tl.full([], 0.0, tl.float32)

    first_diagonal = 0
    last_diagonal = 1
    if WHAT == RELATIVE:
        last_diagonal = row_tiles
        if not CAUSAL:
            first_diagonal = 1 - key_tiles
    for diagonal in range(first_diagonal, last_diagonal):
        first_distance = diagonal * BLOCK_ROWS - BLOCK_KEYS + retrieved_length
        d_run = tl.zeros([BLOCK_RUN, BLOCK_REST], tl.float32)
        per_distance = tl.zeros([BLOCK_RUN], tl.float32)
        for step in range(0, tl.cdiv(num_items - copy, num_copies)):
            item = copy + step * num_copies
            row_tile = own_row_tile
            key_tile = own_key_tile
            if WHAT != BIAS:
                row_tile = item % row_tiles
                item = item // row_tiles
            needed = True
            if WHAT == RELATIVE:
                key_tile = row_tile - diagonal
                needed = (key_tile >= 0) & (key_tile < key_tiles)
            if needed:
                shared_by = item % sharing
                item = item // sharing
                group = first_group + item % num_groups
                batch = (item // num_groups).to(tl.int64)
                chunk, neighbour, start, count = group_of(
                    group, batch, chunk_spans, num_chunks, query_neighbours, stride, first_token, GROUPING
                )
                if GROUPING == CHUNK:
                    neighbour = shared_by
                if GROUPING == CLOCK:
                    key_tile += shared_by * key_tiles
                neighbour = neighbour.to(tl.int64)
                chunk64 = chunk.to(tl.int64)
                start64 = start.to(tl.int64)
                first_row = row_tile * BLOCK_ROWS
                row, inside = rows_of(first_row, start, count, num_tokens, BLOCK_ROWS)
                first_place = chunk64 * place_l + neighbour * place_k + start
                at = (batch * num_places + first_place) * num_heads + head
                alive, lse_log2, rest, do, delta = load_results(
                    grad_out + batch * grad_out_b + chunk64 * grad_out_l + neighbour * grad_out_k
                    + start64 * grad_out_n + head * grad_out_h,
                    out + at * VALUE_DIM, lse + at, log_sum + at if log_sum is not None else None, row, inside,
                    grad_out_n, num_heads, VALUE_DIM, LONG, BLOCK_VALUE,
                )  # fmt: skip
                begins = None
                document = None
                position = row
                if first_visible is not None:
                    begins = first_visible + batch * num_tokens
                    document = tl.load(begins + row, mask=inside, other=0)
                    position = row - document
                content, relative = load_query(
                    query + batch * query_b + chunk64 * query_l + neighbour * query_k + start64 * query_n
                    + head * query_h,
                    query_cos, query_sin, content_bias, relative_bias, position, row, alive, query_n,
                    query_cos_m, query_sin_m, DIM, WIDTH, INTERLEAVED, LONG, BLOCK_PAIR, BLOCK_REST,
                )  # fmt: skip
                place = first_place.to(tl.int32) + row
                drawn = (batch * num_heads + head).to(tl.int32)
                if WHAT == NULL:
                    _, weight, d_logit = null_slot(
                        content, do, delta, lse_log2, rest if log_sum is not None else None, scale_log2, null_key,
                        null_value,
                        kept_null(seed, threshold, drawn, place) if dropout_seed is not None else None,
                        survivor_scale,
                        DIM, VALUE_DIM, WIDTH, INTERLEAVED, BLOCK_PAIR, BLOCK_REST, BLOCK_VALUE,
                    )  # fmt: skip
                    d_null = (
                        d_null[0] + tl.sum(d_logit[:, None] * content[0].to(tl.float32), axis=0) if WIDTH > 0
                        else d_null[0],
                        d_null[1] + tl.sum(d_logit[:, None] * content[1].to(tl.float32), axis=0) if WIDTH > 0
                        else d_null[1],
                        d_null[2] + tl.sum(d_logit[:, None] * content[2].to(tl.float32), axis=0) if 2 * WIDTH < DIM
                        else d_null[2],
                    )  # fmt: skip
                    d_null_value += tl.sum(weight[:, None] * do.to(tl.float32), axis=0)
                    d_null_logit += tl.sum(d_logit, axis=0)
                if WHAT != NULL:
                    attended = tl.minimum(start + count, num_tokens) > tl.maximum(start, 0)
                    readable = tl.where(attended, num_neighbours * retrieved_length, 0)
                    slot, slot_neighbour, token, present, first_slot, token0 = slots_of(
                        key_tile, num_neighbours, retrieved_length, BLOCK_KEYS, GROUPING, WITHIN
                    )
                    key_neighbour = neighbour if GROUPING == NEIGHBOUR else tl.zeros_like(neighbour)
                    visible, k, v, _ = load_keys(
                        key + batch * key_b + chunk64 * key_l + kv_head * key_h + key_neighbour * key_k,
                        value + batch * value_b + chunk64 * value_l + kv_head * value_h + key_neighbour * value_k,
                        mask + batch * mask_b + chunk64 * mask_l + key_neighbour * mask_k if mask is not None else None,
                        key_cos, key_sin, begins, slot, slot_neighbour, token, present & (slot < readable), num_tokens,
                        key_k, key_r, value_k, value_r, mask_k, mask_r, key_cos_r, key_sin_r,
                        GROUPING, FLAT, LONG, DIM, VALUE_DIM, WIDTH, INTERLEAVED, BLOCK_PAIR, BLOCK_REST, BLOCK_VALUE,
                    )  # fmt: skip
                    run = None
                    if relative_key is not None:
                        run = load_run(
                            relative_key, relative_x, first_row - token0 - BLOCK_KEYS + retrieved_length,
                            num_distances, relative[2], DIM, BLOCK_RUN, BLOCK_REST, LONG,
                        )  # fmt: skip
                    logits = logits_of(
                        content, relative, k, run, attention_bias, scale_log2, row, alive,
                        slot if BIAS_PER_SLOT else token, visible, bias_m,
                        DIM, WIDTH, False, LONG, BLOCK_ROWS, BLOCK_KEYS, BLOCK_RUN, PRECISION,
                    )  # fmt: skip
                    kept = None
                    if dropout_seed is not None:
                        kept = kept_slots(
                            seed, threshold, drawn, place, slot, first_slot, False, LOTS, BLOCK_ROWS, BLOCK_KEYS
                        )
                    # A row that is no token of this group must not bring a key that is NaN to the sums of its place.
                    see = seen(visible, row, token, document, False, CAUSAL) & alive[:, None]
                    _, d_logits = weights_and_gradient(
                        logits, see, do, v, delta, lse_log2,
                        rest if log_sum is not None else None, kept, survivor_scale, False, PRECISION,
                    )  # fmt: skip
                    if WHAT == BIAS:
                        d_bias += d_logits
                    else:
                        d_content += tl.sum(tl.sum(d_logits, axis=0)[:, None] * k[2].to(tl.float32), axis=0)
                        d_logits = d_logits.to(relative[2].dtype)
                        d_distances = by_distance(d_logits, False, BLOCK_ROWS, BLOCK_KEYS, BLOCK_RUN)
                        d_distances = d_distances.to(relative[2].dtype)
                        per_distance += tl.sum(d_distances.to(tl.float32), axis=0)
                        d_run = tl.dot(tl.trans(d_distances), relative[2], d_run, input_precision=PRECISION)
        if WHAT == RELATIVE:
            x = first_distance + tl.arange(0, BLOCK_RUN)
            there = ((x >= 0) & (x < num_distances))[:, None] & (rest_column < DIM)[None, :]
            at_run = (
                relative_key_copies + head_copy * num_distances * DIM + (wide(x, LONG) * DIM)[:, None]
                + rest_column[None, :]
            )  # fmt: skip
            tl.store(at_run, tl.load(at_run, mask=there, other=0.0) + scale * d_run, mask=there)
            run = tl.load(relative_key + (wide(x, LONG) * relative_x)[:, None] + rest_column[None, :],
                          mask=there, other=0.0).to(tl.float32)  # fmt: skip
            d_relative += tl.sum(per_distance[:, None] * run, axis=0)
            # The next diagonal adds to some of the same sums, perhaps from other threads.
            tl.debug_barrier()

    if WHAT == BIAS:
        row = own_row_tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        column = own_key_tile * BLOCK_KEYS + tl.arange(0, BLOCK_KEYS)
        there = column < table_columns
        if WITHIN and BIAS_PER_SLOT:
            column, _, _, there, _, _ = slots_of(
                own_key_tile, num_neighbours, retrieved_length, BLOCK_KEYS, GROUPING, WITHIN
            )
        tl.store(
            bias_copies + head_copy * table_rows * table_columns + (wide(row, LONG) * table_columns)[:, None]
            + column[None, :],
            d_bias, mask=(row < stride)[:, None] & there[None, :],
        )  # fmt: skip
    if WHAT == RELATIVE:
        if content_bias_copies is not None:
            tl.store(content_bias_copies + head_copy * DIM + rest_column, scale * d_content, mask=rest_column < DIM)
        if relative_bias_copies is not None:
            tl.store(relative_bias_copies + head_copy * DIM + rest_column, scale * d_relative, mask=rest_column < DIM)
    if WHAT == NULL:
        if null_key_copies is not None:
            store_vector(null_key_copies + head_copy * DIM, (scale * d_null[0], scale * d_null[1], scale * d_null[2]),
                         DIM, WIDTH, INTERLEAVED, BLOCK_PAIR, BLOCK_REST)  # fmt: skip
            tl.store(null_value_copies + head_copy * VALUE_DIM + value_column, d_null_value,
                     mask=value_column < VALUE_DIM)  # fmt: skip
        if content_bias_copies is not None:
            sums = content_bias_copies + head_copy * DIM + rest_column
            null_column = tl.load(null_key + rest_column, mask=rest_column < DIM, other=0.0).to(tl.float32)
            tl.store(sums, tl.load(sums, mask=rest_column < DIM, other=0.0) + scale * d_null_logit * null_column,
                     mask=rest_column < DIM)  # fmt: skip
