"""The absorbed backward kernels: one seen from a head (gradients of query, weights and parameters), one from a tile of
slots (gradient of the states)."""

from __future__ import annotations

from ...attention.triton import tiles
from ...attention.triton.tiles import at_most_one, group_of, jit, kept_null, load_results, load_run, rows_of, wide
from .tiles import (
    by_distance,
    load_rows,
    neighbours_of,
    run_of,
    slots_and_places,
    states,
    times_vector,
    weight_places,
    weights,
    weights_and_gradient,
)

if tiles.triton is not None:
    from ...attention.triton.tiles import CLOCK, LOG2_E, constexpr, tl


@jit
def backward_heads_kernel(
    grad_out, query, encoded, w_key, w_value, bias_key, bias_value, mask, attention_bias, relative_key, content_bias,
    relative_bias, null_key, null_value, chunk_spans, dropout_seed, out, lse, log_sum,
    grad_query, w_key_copies, w_value_copies, bias_key_copies, bias_value_copies, bias_copies, relative_key_copies,
    content_bias_copies, relative_bias_copies, null_key_copies, null_value_copies,
    scale, threshold, survivor_scale, num_tokens, num_neighbours, retrieved_length, num_heads, heads_per_key,
    num_chunks, first_group, num_groups, row_tiles, key_tiles, stride, first_token, num_distances, num_items,
    num_copies, table_rows, table_columns,
    grad_out_b, grad_out_n, grad_out_h,
    query_b, query_n, query_h, encoded_b, encoded_l, encoded_k, encoded_r, w_key_h, w_key_d, w_value_h, w_value_d,
    bias_key_h, bias_value_h, mask_b, mask_l, mask_k, mask_r, bias_h, bias_m, relative_h, relative_x, content_bias_h,
    relative_bias_h, null_key_h, null_value_h,
    SUMS: constexpr, DIM: constexpr, VALUE_DIM: constexpr, ENCODER_DIM: constexpr, BIAS_PER_SLOT: constexpr,
    WITHIN: constexpr, LOTS: constexpr, FLAT: constexpr, LONG: constexpr, BLOCK_ROWS: constexpr,
    BLOCK_SLOTS: constexpr, BLOCK_ENCODER: constexpr, BLOCK_RUN: constexpr, BLOCK_DIM: constexpr,
    BLOCK_VALUE: constexpr, PRECISION: constexpr,
):  # fmt: skip
    """An item is (batch, chunk, row tile). SUMS: program (copy, key/value head) takes the items copy, copy +
    num_copies, ... of each of its query heads and adds the gradients of weights and parameters to its own fp32 copies,
    which are 0 at first. Otherwise program (item, query head), heads fastest, for the query's gradient alone."""
    num_kv_heads = num_heads // heads_per_key
    lanes = num_kv_heads if SUMS else num_heads
    lane = tl.program_id(0) % lanes
    copy = tl.program_id(0) // lanes
    kv_head = (lane if SUMS else lane // heads_per_key).to(tl.int64)
    kv_copy = copy.to(tl.int64) * num_kv_heads + kv_head
    scale_log2 = scale * LOG2_E
    column = tl.arange(0, BLOCK_DIM)
    value_column = tl.arange(0, BLOCK_VALUE)
    seed = None
    if dropout_seed is not None:
        seed = tl.load(dropout_seed)
    w_key += kv_head * w_key_h
    w_value += kv_head * w_value_h
    readable = num_neighbours * retrieved_length

    d_bias_key = tl.zeros([BLOCK_DIM], tl.float32)
    d_bias_value = tl.zeros([BLOCK_VALUE], tl.float32)
    for in_group in range(0, heads_per_key if SUMS else 1):
        head = (lane * heads_per_key + in_group if SUMS else lane).to(tl.int64)
        head_copy = copy.to(tl.int64) * num_heads + head
        d_rows = tl.zeros([BLOCK_DIM], tl.float32)
        d_relative = tl.zeros([BLOCK_DIM], tl.float32)
        d_null_key = tl.zeros([BLOCK_DIM], tl.float32)
        d_null_value = tl.zeros([BLOCK_VALUE], tl.float32)
        for step in range(0, tl.cdiv(num_items - copy, num_copies)):
            item = copy + step * num_copies
            row_tile = item % row_tiles
            item = item // row_tiles
            group = first_group + item % num_groups
            batch = (item // num_groups).to(tl.int64)
            chunk = group.to(tl.int64)
            drawn = (batch * num_heads + head).to(tl.int32)

            # Tokens before the first chunk; those in no span were filled before the launch.
            if chunk_spans is None:  # noqa: SIM102 - one is known when compiling
                if (group == first_group) & (row_tile == 0):
                    for ahead in range(0, first_token, BLOCK_ROWS):
                        leading = ahead + tl.arange(0, BLOCK_ROWS)
                        at = (batch * num_tokens + leading) * num_heads + head
                        tl.store(grad_query + (at * DIM)[:, None] + column[None, :],
                                 tl.zeros([BLOCK_ROWS, BLOCK_DIM], grad_query.dtype.element_ty),
                                 mask=(leading < first_token)[:, None] & (column < DIM)[None, :])  # fmt: skip

            _, _, start, count = group_of(group, batch, chunk_spans, num_chunks, 1, stride, first_token, CLOCK)
            start64 = start.to(tl.int64)
            first_row = row_tile * BLOCK_ROWS
            row, inside = rows_of(first_row, start, count, num_tokens, BLOCK_ROWS)
            place = start + row
            at = (batch * num_tokens + start64) * num_heads + head
            alive, lse_log2, rest, do, delta = load_results(
                grad_out + batch * grad_out_b + start64 * grad_out_n + head * grad_out_h, out + at * VALUE_DIM,
                lse + at, log_sum + at if log_sum is not None else None, row, inside, grad_out_n, num_heads,
                VALUE_DIM, LONG, BLOCK_VALUE,
            )  # fmt: skip
            rows = query + batch * query_b + start64 * query_n + head * query_h
            content = load_rows(
                rows, content_bias + head * content_bias_h if content_bias is not None else None, row, alive, query_n,
                DIM, BLOCK_DIM, LONG,
            )  # fmt: skip
            relative = content
            if content_bias is not None or relative_bias is not None:
                relative = load_rows(
                    rows, relative_bias + head * relative_bias_h if relative_bias is not None else None, row, alive,
                    query_n, DIM, BLOCK_DIM, LONG,
                )  # fmt: skip
            constant = tl.zeros([BLOCK_ROWS], tl.float32)
            value_constant = tl.zeros([BLOCK_ROWS], tl.float32)
            if bias_key is not None:
                constant = times_vector(content, bias_key + kv_head * bias_key_h, DIM, BLOCK_DIM)
            if bias_value is not None:
                value_constant = times_vector(do, bias_value + kv_head * bias_value_h, VALUE_DIM, BLOCK_VALUE)

            dq = tl.zeros([BLOCK_ROWS, BLOCK_DIM], tl.float32)
            if null_key is not None:
                null = tl.load(null_key + head * null_key_h + column, mask=column < DIM, other=0.0).to(tl.float32)
                logit = scale_log2 * tl.sum(content.to(tl.float32) * null[None, :], axis=1)
                exponent = logit - lse_log2
                if log_sum is not None:
                    exponent -= rest
                null_weight = tl.where(alive, at_most_one(exponent), 0.0)
                d_null_weight = times_vector(do, null_value + head * null_value_h, VALUE_DIM, BLOCK_VALUE)
                dropped_null = null_weight
                if dropout_seed is not None:
                    null_kept = kept_null(seed, threshold, drawn, place)
                    d_null_weight = tl.where(null_kept, d_null_weight * survivor_scale, 0.0)
                    dropped_null = tl.where(null_kept, null_weight * survivor_scale, 0.0)
                d_logit = null_weight * (d_null_weight - delta)
                dq += d_logit[:, None] * null[None, :]
                if bias_key is not None:
                    # The gradients of a row's logits, the null slot's included, sum to zero: what bias_key adds to all
                    # slots has the null slot's, negated, and without a null slot none.
                    added = tl.load(bias_key + kv_head * bias_key_h + column, mask=column < DIM, other=0.0)
                    dq -= d_logit[:, None] * added.to(tl.float32)[None, :]
                    if bias_key_copies is not None:
                        d_bias_key -= tl.sum(d_logit[:, None] * content.to(tl.float32), axis=0)
                if null_key_copies is not None:
                    d_null_key += tl.sum(d_logit[:, None] * content.to(tl.float32), axis=0)
                    d_null_value += tl.sum(dropped_null[:, None] * do.to(tl.float32), axis=0)

            states_of_chunk = encoded + batch * encoded_b + chunk * encoded_l
            mask_of_chunk = None
            if mask is not None:
                mask_of_chunk = mask + batch * mask_b + chunk * mask_l
            # A span of no tokens attends to nothing: its chunk is not read.
            tiles_seen = tl.where(tl.minimum(start + count, num_tokens) > tl.maximum(start, 0), key_tiles, 0)
            for tile in range(0, tiles_seen):
                slot, neighbour, token, _present, visible, offsets, first_slot, token0 = slots_and_places(
                    tile, states_of_chunk, mask_of_chunk, readable, num_neighbours, retrieved_length, encoded_k,
                    encoded_r, mask_k, mask_r, BLOCK_SLOTS, WITHIN, FLAT, LONG,
                )  # fmt: skip
                dropped, d_logits = weights_and_gradient(
                    content, relative, do, constant, value_constant, delta, lse_log2,
                    rest if log_sum is not None else None, w_key, w_value, states_of_chunk,
                    attention_bias + head * bias_h if attention_bias is not None else None,
                    relative_key + head * relative_h if relative_key is not None else None,
                    seed, scale, threshold, survivor_scale, drawn, place, row, alive, slot, token, visible, offsets,
                    first_row, first_slot, token0, retrieved_length, num_distances, w_key_d, w_value_d, bias_m,
                    relative_x, DIM, VALUE_DIM, ENCODER_DIM, BIAS_PER_SLOT, WITHIN, LOTS, LONG, BLOCK_ROWS,
                    BLOCK_SLOTS, BLOCK_ENCODER, BLOCK_RUN, BLOCK_DIM, BLOCK_VALUE, PRECISION,
                )  # fmt: skip
                if bias_copies is not None:
                    table_column = slot if BIAS_PER_SLOT else token
                    at_bias = (
                        bias_copies + head_copy * table_rows * table_columns
                        + (wide(row, LONG) * table_columns)[:, None] + table_column[None, :]
                    )  # fmt: skip
                    there = alive[:, None] & visible[None, :]
                    if BIAS_PER_SLOT:
                        tl.store(at_bias, tl.load(at_bias, mask=there, other=0.0) + d_logits, mask=there)
                    else:  # neighbours add to the same elements: one after the other
                        first_neighbour, last_neighbour = neighbours_of(
                            first_slot, num_neighbours, retrieved_length, BLOCK_SLOTS, WITHIN
                        )
                        for only in range(first_neighbour, last_neighbour):
                            there_only = there & (neighbour == only)[None, :]
                            tl.store(at_bias, tl.load(at_bias, mask=there_only, other=0.0) + d_logits, mask=there_only)
                            tl.debug_barrier()
                if bias_value_copies is not None:
                    d_bias_value += tl.sum(tl.sum(dropped, axis=1)[:, None] * do.to(tl.float32), axis=0)
                d_logits = d_logits.to(content.dtype)
                if relative_key is not None:
                    first_neighbour, last_neighbour = neighbours_of(
                        first_slot, num_neighbours, retrieved_length, BLOCK_SLOTS, WITHIN
                    )
                    begin, span, first = run_of(first_row, token0, retrieved_length, BLOCK_SLOTS, WITHIN)
                    for distance in range(0, BLOCK_ROWS + span - 1, BLOCK_RUN):
                        d_distances = by_distance(
                            d_logits, distance, begin, span, first_slot, first_neighbour, last_neighbour,
                            retrieved_length, BLOCK_ROWS, BLOCK_SLOTS, BLOCK_RUN,
                        )  # fmt: skip
                        run = load_run(relative_key + head * relative_h, relative_x, first + distance, num_distances,
                                       relative, DIM, BLOCK_RUN, BLOCK_DIM, LONG)  # fmt: skip
                        dq = tl.dot(d_distances, run, dq, input_precision=PRECISION)
                        if relative_key_copies is not None:
                            x = first + distance + tl.arange(0, BLOCK_RUN)
                            run_there = (x < num_distances)[:, None] & (column < DIM)[None, :]
                            at_run = (
                                relative_key_copies + head_copy * num_distances * DIM + (wide(x, LONG) * DIM)[:, None]
                                + column[None, :]
                            )  # fmt: skip
                            d_run = tl.dot(tl.trans(d_distances), relative, input_precision=PRECISION)
                            tl.store(at_run, tl.load(at_run, mask=run_there, other=0.0) + d_run, mask=run_there)
                            per_distance = tl.sum(d_distances.to(tl.float32), axis=0)
                            d_relative += tl.sum(per_distance[:, None] * run.to(tl.float32), axis=0)

                dropped = dropped.to(do.dtype)
                for at_column in range(0, ENCODER_DIM, BLOCK_ENCODER):
                    state = states(states_of_chunk, offsets, visible, at_column, ENCODER_DIM, BLOCK_ENCODER)
                    weight = weights(w_key, w_key_d, at_column, DIM, ENCODER_DIM, BLOCK_DIM, BLOCK_ENCODER, LONG)
                    summed = tl.dot(d_logits, state, input_precision=PRECISION).to(state.dtype)
                    dq = tl.dot(summed, tl.trans(weight), dq, input_precision=PRECISION)
                    if w_key_copies is not None:
                        at_weight, weight_there = weight_places(
                            ENCODER_DIM, at_column, DIM, ENCODER_DIM, BLOCK_DIM, BLOCK_ENCODER, LONG
                        )
                        at_weight = w_key_copies + kv_copy * DIM * ENCODER_DIM + at_weight
                        d_weight_tile = tl.load(at_weight, mask=weight_there, other=0.0)
                        d_weight_tile += tl.dot(tl.trans(content), summed, input_precision=PRECISION)
                        tl.store(at_weight, d_weight_tile, mask=weight_there)
                        summed = tl.dot(dropped, state, input_precision=PRECISION).to(state.dtype)
                        at_weight, weight_there = weight_places(
                            ENCODER_DIM, at_column, VALUE_DIM, ENCODER_DIM, BLOCK_VALUE, BLOCK_ENCODER, LONG
                        )
                        at_weight = w_value_copies + kv_copy * VALUE_DIM * ENCODER_DIM + at_weight
                        d_weight_tile = tl.load(at_weight, mask=weight_there, other=0.0)
                        d_weight_tile += tl.dot(tl.trans(do), summed, input_precision=PRECISION)
                        tl.store(at_weight, d_weight_tile, mask=weight_there)
                if SUMS:
                    # The next tile adds to the same sums, perhaps from other threads.
                    tl.debug_barrier()

            if content_bias_copies is not None:
                d_rows += tl.sum(dq, axis=0)
            tl.store(
                grad_query + at * DIM + (wide(row, LONG) * (num_heads * DIM))[:, None] + column[None, :],
                (scale * dq).to(grad_query.dtype.element_ty), mask=inside[:, None] & (column < DIM)[None, :],
            )  # fmt: skip
        if content_bias_copies is not None:
            tl.store(content_bias_copies + head_copy * DIM + column, d_rows - d_relative, mask=column < DIM)
        if relative_bias_copies is not None:
            tl.store(relative_bias_copies + head_copy * DIM + column, d_relative, mask=column < DIM)
        if null_key_copies is not None:
            tl.store(null_key_copies + head_copy * DIM + column, d_null_key, mask=column < DIM)
            tl.store(null_value_copies + head_copy * VALUE_DIM + value_column, d_null_value,
                     mask=value_column < VALUE_DIM)  # fmt: skip
    if bias_key_copies is not None:
        tl.store(bias_key_copies + kv_copy * DIM + column, d_bias_key, mask=column < DIM)
    if bias_value_copies is not None:
        tl.store(bias_value_copies + kv_copy * VALUE_DIM + value_column, d_bias_value, mask=value_column < VALUE_DIM)


@jit
def backward_states_kernel(
    grad_out, query, encoded, w_key, w_value, bias_key, bias_value, mask, attention_bias, relative_key, content_bias,
    relative_bias, null_key, null_value, chunk_spans, dropout_seed, out, lse, log_sum, grad_encoded,
    sums,
    scale, threshold, survivor_scale, num_tokens, num_neighbours, retrieved_length, num_heads, heads_per_key,
    num_chunks, first_group, num_groups, row_tiles, key_tiles, stride, first_token, num_distances, num_items,
    num_copies,
    grad_out_b, grad_out_n, grad_out_h,
    query_b, query_n, query_h, encoded_b, encoded_l, encoded_k, encoded_r, w_key_h, w_key_d, w_value_h, w_value_d,
    bias_key_h, bias_value_h, mask_b, mask_l, mask_k, mask_r, bias_h, bias_m, relative_h, relative_x, content_bias_h,
    relative_bias_h, null_key_h, null_value_h,
    DIM: constexpr, VALUE_DIM: constexpr, ENCODER_DIM: constexpr, BIAS_PER_SLOT: constexpr,
    WITHIN: constexpr, LOTS: constexpr, FLAT: constexpr, LONG: constexpr, BLOCK_ROWS: constexpr,
    BLOCK_SLOTS: constexpr, BLOCK_ENCODER: constexpr, BLOCK_RUN: constexpr, BLOCK_DIM: constexpr,
    BLOCK_VALUE: constexpr, PRECISION: constexpr,
):  # fmt: skip
    """Program `copy` takes the items copy, copy + num_copies, ... of (batch, chunk, slot tile) and adds up every head's
    share of their states' gradient in fp32, in its own tile `sums` [BLOCK_SLOTS, ENCODER_DIM], or, where that is None,
    in the gradient itself, which then is fp32."""
    copy = tl.program_id(0)
    lane = tl.arange(0, BLOCK_SLOTS)
    seed = None
    if dropout_seed is not None:
        seed = tl.load(dropout_seed)
    for step in range(0, tl.cdiv(num_items - copy, num_copies)):
        item = copy + step * num_copies
        tile = item % key_tiles
        item = item // key_tiles
        group = first_group + item % num_groups
        batch = (item // num_groups).to(tl.int64)
        chunk = group.to(tl.int64)
        _, _, start, count = group_of(group, batch, chunk_spans, num_chunks, 1, stride, first_token, CLOCK)
        start64 = start.to(tl.int64)
        attended = tl.minimum(start + count, num_tokens) > tl.maximum(start, 0)
        readable = tl.where(attended, num_neighbours * retrieved_length, 0)
        states_of_chunk = encoded + batch * encoded_b + chunk * encoded_l
        mask_of_chunk = None
        if mask is not None:
            mask_of_chunk = mask + batch * mask_b + chunk * mask_l
        slot, _neighbour, token, present, visible, offsets, first_slot, token0 = slots_and_places(
            tile, states_of_chunk, mask_of_chunk, readable, num_neighbours, retrieved_length, encoded_k, encoded_r,
            mask_k, mask_r, BLOCK_SLOTS, WITHIN, FLAT, LONG,
        )  # fmt: skip
        of_chunk = (batch * num_chunks + chunk) * (num_neighbours * retrieved_length) * ENCODER_DIM
        results = grad_encoded + of_chunk + (wide(slot, LONG) * ENCODER_DIM)[:, None]
        if sums is None:
            totals = results
            storable = present
        else:
            totals = sums + copy.to(tl.int64) * BLOCK_SLOTS * ENCODER_DIM + (lane * ENCODER_DIM)[:, None]
            storable = lane >= 0

        works = tl.where(attended, num_heads * row_tiles, 0)
        for work in range(0, works):
            head32 = work // row_tiles
            head = head32.to(tl.int64)
            kv_head = (head32 // heads_per_key).to(tl.int64)
            drawn = (batch * num_heads + head).to(tl.int32)
            first_row = work % row_tiles * BLOCK_ROWS
            row, inside = rows_of(first_row, start, count, num_tokens, BLOCK_ROWS)
            place = start + row
            at = (batch * num_tokens + start64) * num_heads + head
            alive, lse_log2, rest, do, delta = load_results(
                grad_out + batch * grad_out_b + start64 * grad_out_n + head * grad_out_h, out + at * VALUE_DIM,
                lse + at, log_sum + at if log_sum is not None else None, row, inside, grad_out_n, num_heads,
                VALUE_DIM, LONG, BLOCK_VALUE,
            )  # fmt: skip
            rows = query + batch * query_b + start64 * query_n + head * query_h
            content = load_rows(
                rows, content_bias + head * content_bias_h if content_bias is not None else None, row, alive, query_n,
                DIM, BLOCK_DIM, LONG,
            )  # fmt: skip
            relative = content
            if content_bias is not None or relative_bias is not None:
                relative = load_rows(
                    rows, relative_bias + head * relative_bias_h if relative_bias is not None else None, row, alive,
                    query_n, DIM, BLOCK_DIM, LONG,
                )  # fmt: skip
            constant = tl.zeros([BLOCK_ROWS], tl.float32)
            value_constant = tl.zeros([BLOCK_ROWS], tl.float32)
            if bias_key is not None:
                constant = times_vector(content, bias_key + kv_head * bias_key_h, DIM, BLOCK_DIM)
            if bias_value is not None:
                value_constant = times_vector(do, bias_value + kv_head * bias_value_h, VALUE_DIM, BLOCK_VALUE)
            w_key_of_head = w_key + kv_head * w_key_h
            w_value_of_head = w_value + kv_head * w_value_h
            dropped, d_logits = weights_and_gradient(
                content, relative, do, constant, value_constant, delta, lse_log2,
                rest if log_sum is not None else None, w_key_of_head, w_value_of_head, states_of_chunk,
                attention_bias + head * bias_h if attention_bias is not None else None,
                relative_key + head * relative_h if relative_key is not None else None,
                seed, scale, threshold, survivor_scale, drawn, place, row, alive, slot, token, visible, offsets,
                first_row, first_slot, token0, retrieved_length, num_distances, w_key_d, w_value_d, bias_m, relative_x,
                DIM, VALUE_DIM, ENCODER_DIM, BIAS_PER_SLOT, WITHIN, LOTS, LONG, BLOCK_ROWS, BLOCK_SLOTS, BLOCK_ENCODER,
                BLOCK_RUN, BLOCK_DIM, BLOCK_VALUE, PRECISION,
            )  # fmt: skip
            dropped = tl.trans(dropped.to(do.dtype))
            d_logits = tl.trans(d_logits.to(content.dtype))
            for at_column in range(0, ENCODER_DIM, BLOCK_ENCODER):
                column = at_column + tl.arange(0, BLOCK_ENCODER)
                there = storable[:, None] & (column < ENCODER_DIM)[None, :]
                total = tl.load(
                    totals + column[None, :],
                    mask=there & (lane >= tl.where(work > 0, 0, BLOCK_SLOTS))[:, None],
                    other=0.0,
                )
                weight = weights(w_value_of_head, w_value_d, at_column, VALUE_DIM, ENCODER_DIM, BLOCK_VALUE,
                                 BLOCK_ENCODER, LONG)  # fmt: skip
                projected = tl.dot(do, weight, input_precision=PRECISION).to(do.dtype)
                total += tl.dot(dropped, projected, input_precision=PRECISION)
                weight = weights(w_key_of_head, w_key_d, at_column, DIM, ENCODER_DIM, BLOCK_DIM, BLOCK_ENCODER, LONG)
                projected = (scale * tl.dot(content, weight, input_precision=PRECISION)).to(content.dtype)
                total += tl.dot(d_logits, projected, input_precision=PRECISION)
                # A masked token's gradient is 0 even beside a query that is NaN.
                tl.store(totals + column[None, :], tl.where(visible[:, None], total, 0.0), mask=there)
            # The next head adds to the same sums, perhaps from other threads.
            tl.debug_barrier()

        if sums is None:
            # Where nothing was added 0 is stored here.
            if works == 0:
                for at_column in range(0, ENCODER_DIM, BLOCK_ENCODER):
                    column = at_column + tl.arange(0, BLOCK_ENCODER)
                    tl.store(results + column[None, :], tl.zeros([BLOCK_SLOTS, BLOCK_ENCODER], tl.float32),
                             mask=present[:, None] & (column < ENCODER_DIM)[None, :])  # fmt: skip
        else:
            for at_column in range(0, ENCODER_DIM, BLOCK_ENCODER):
                column = at_column + tl.arange(0, BLOCK_ENCODER)
                there = present[:, None] & (column < ENCODER_DIM)[None, :]
                total = tl.load(
                    totals + column[None, :],
                    mask=there & (lane >= tl.where(works > 0, 0, BLOCK_SLOTS))[:, None],
                    other=0.0,
                )
                tl.store(results + column[None, :], total.to(grad_encoded.dtype.element_ty), mask=there)
            tl.debug_barrier()
