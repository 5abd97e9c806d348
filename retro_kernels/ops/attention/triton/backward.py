"""The backward kernel: gradients of query, key and value.

One kernel in three forms. Seen from a tile of rows (ROWS), dQ is complete after a loop over key tiles; seen from a tile
of keys (KEYS), dK and dV after a loop over row tiles. Where one tile holds all rows of a group, or all its keys, the
other side's gradients are complete in every step too, and all three come out of a single pass of five products. BOTH
makes the two sweeps one after the other in one program.
"""

from __future__ import annotations

from . import tiles
from .tiles import (
    add_outer,
    add_product,
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
    row_tile_of,
    rows_of,
    seen,
    slots_of,
    store_split,
    weights_and_gradient,
    where_split,
    wide,
    zeros_split,
)

if tiles.triton is not None:
    from .tiles import CLOCK, LOG2_E, NEIGHBOUR, constexpr, tl

    ROWS = constexpr(0)
    KEYS = constexpr(1)
    BOTH = constexpr(2)


@jit
def backward_kernel(
    grad_out, query, key, value, mask, attention_bias, relative_key, content_bias, relative_bias, query_cos, query_sin,
    key_cos, key_sin, null_key, null_value, chunk_spans, first_visible, dropout_seed, out, lse, log_sum,
    grad_query, grad_key, grad_value,
    scale, threshold, survivor_scale, num_tokens, num_places, place_l, place_k, num_neighbours, retrieved_length,
    query_neighbours, num_heads, heads_per_key, num_chunks, first_group, num_groups, row_tiles, key_tiles, stride,
    first_token, num_distances,
    grad_out_b, grad_out_l, grad_out_k, grad_out_n, grad_out_h,
    query_b, query_l, query_k, query_n, query_h, key_b, key_l, key_k, key_r, key_h,
    value_b, value_l, value_k, value_r, value_h, mask_b, mask_l, mask_k, mask_r, bias_h, bias_m,
    relative_h, relative_x, content_bias_h, relative_bias_h, query_cos_m, query_sin_m, key_cos_r, key_sin_r,
    null_key_h, null_value_h,
    FORM: constexpr, SINGLE_PASS: constexpr, GROUPING: constexpr, CAUSAL: constexpr, WITHIN: constexpr,
    LOTS: constexpr,
    DIM: constexpr, VALUE_DIM: constexpr, WIDTH: constexpr, INTERLEAVED: constexpr, FLAT: constexpr, LONG: constexpr,
    BIAS_PER_SLOT: constexpr, BLOCK_ROWS: constexpr, BLOCK_KEYS: constexpr, BLOCK_RUN: constexpr,
    BLOCK_PAIR: constexpr, BLOCK_REST: constexpr, BLOCK_VALUE: constexpr, PRECISION: constexpr,
):  # fmt: skip
    """Program (batch, group, row tile, query head), (batch, group, key tile, key/value head) or (batch, group,
    key/value head) for ROWS, KEYS and BOTH, heads fastest."""
    num_kv_heads = num_heads // heads_per_key
    lanes = num_heads if FORM == ROWS else num_kv_heads
    own_tiles = row_tiles if FORM == ROWS else tl.maximum(key_tiles, 1) if FORM == KEYS else 1
    lane = tl.program_id(0) % lanes
    item = tl.program_id(0) // lanes
    own_tile = item % own_tiles
    item = item // own_tiles
    group = first_group + item % num_groups
    batch = (item // num_groups).to(tl.int64)
    kv_head = (lane // heads_per_key if FORM == ROWS else lane).to(tl.int64)
    value_column = tl.arange(0, BLOCK_VALUE)
    scale_log2 = scale * LOG2_E
    seed = None
    if dropout_seed is not None:
        seed = tl.load(dropout_seed)

    # Tokens before the first chunk; those in no span were filled before the launch.
    if GROUPING == CLOCK and chunk_spans is None and FORM == ROWS:  # noqa: SIM102 - one is known when compiling
        if (group == first_group) & (own_tile == 0):
            for ahead in range(0, first_token, BLOCK_ROWS):
                leading = ahead + tl.arange(0, BLOCK_ROWS)
                column = tl.arange(0, 256)
                at = (batch * num_places + leading) * num_heads + lane
                tl.store(grad_query + (at * DIM)[:, None] + column[None, :],
                         tl.zeros([BLOCK_ROWS, 256], grad_query.dtype.element_ty),
                         mask=(leading < first_token)[:, None] & (column < DIM)[None, :])  # fmt: skip

    chunk, neighbour, start, count = group_of(
        group, batch, chunk_spans, num_chunks, query_neighbours, stride, first_token, GROUPING
    )
    chunk64 = chunk.to(tl.int64)
    # A chunk that no token attends to is not read.
    attended = tl.minimum(start + count, num_tokens) > tl.maximum(start, 0)
    readable = tl.where(attended, num_neighbours * retrieved_length, 0)
    query += batch * query_b + chunk64 * query_l + start.to(tl.int64) * query_n
    grad_out += batch * grad_out_b + chunk64 * grad_out_l + start.to(tl.int64) * grad_out_n
    group_place = chunk64 * place_l + start
    key += batch * key_b + chunk64 * key_l + kv_head * key_h
    value += batch * value_b + chunk64 * value_l + kv_head * value_h
    group_slot = batch * num_chunks + chunk
    if mask is not None:
        mask += batch * mask_b + chunk64 * mask_l
    if GROUPING == NEIGHBOUR:
        key += neighbour.to(tl.int64) * key_k
        value += neighbour.to(tl.int64) * value_k
        group_slot = group_slot * query_neighbours + neighbour
        if mask is not None:
            mask += neighbour.to(tl.int64) * mask_k
    group_slot = group_slot * (num_neighbours * retrieved_length) * num_kv_heads + kv_head
    if first_visible is not None:
        first_visible += batch * num_tokens

    if FORM != KEYS:
        for work in range(0, 1 if FORM == ROWS else heads_per_key * row_tiles):
            head = (lane if FORM == ROWS else lane * heads_per_key + work // row_tiles).to(tl.int64)
            row_neighbour, first_row = row_tile_of(
                own_tile if FORM == ROWS else work % row_tiles, neighbour, num_tokens, GROUPING, BLOCK_ROWS
            )
            row, inside = rows_of(first_row, start, count, num_tokens, BLOCK_ROWS)
            first_place = group_place + row_neighbour * place_k
            at = (batch * num_places + first_place) * num_heads + head
            alive, lse_log2, rest, do, delta = load_results(
                grad_out + row_neighbour.to(tl.int64) * grad_out_k + head * grad_out_h, out + at * VALUE_DIM, lse + at,
                log_sum + at if log_sum is not None else None, row, inside, grad_out_n, num_heads,
                VALUE_DIM, LONG, BLOCK_VALUE,
            )  # fmt: skip
            position = row
            document = None
            if first_visible is not None:
                document = tl.load(first_visible + row, mask=inside, other=0)
                position = row - document
            content, relative = load_query(
                query + row_neighbour.to(tl.int64) * query_k + head * query_h, query_cos, query_sin,
                content_bias + head * content_bias_h if content_bias is not None else None,
                relative_bias + head * relative_bias_h if relative_bias is not None else None,
                position, row, alive, query_n, query_cos_m, query_sin_m,
                DIM, WIDTH, INTERLEAVED, LONG, BLOCK_PAIR, BLOCK_REST,
            )  # fmt: skip
            place = first_place.to(tl.int32) + row
            drawn = (batch * num_heads + head).to(tl.int32)
            dq = zeros_split(BLOCK_ROWS, BLOCK_PAIR, BLOCK_REST)
            if null_key is not None:
                null, _, d_logit = null_slot(
                    content, do, delta, lse_log2, rest if log_sum is not None else None, scale_log2,
                    null_key + head * null_key_h, null_value + head * null_value_h,
                    kept_null(seed, threshold, drawn, place) if dropout_seed is not None else None, survivor_scale,
                    DIM, VALUE_DIM, WIDTH, INTERLEAVED, BLOCK_PAIR, BLOCK_REST, BLOCK_VALUE,
                )  # fmt: skip
                dq = add_outer(dq, d_logit, null, DIM, WIDTH)

            first_tile = 0
            last_tile = key_tiles
            if CAUSAL and not SINGLE_PASS:
                last_tile = tl.minimum(key_tiles, tl.cdiv(first_row + BLOCK_ROWS, BLOCK_KEYS))
                if first_visible is not None:
                    first_tile = tl.min(tl.where(inside, document, num_tokens)) // BLOCK_KEYS
            for tile in range(first_tile, last_tile):
                slot, slot_neighbour, token, present, first_slot, token0 = slots_of(
                    tile, num_neighbours, retrieved_length, BLOCK_KEYS, GROUPING, WITHIN
                )
                visible, k, v, key_position = load_keys(
                    key, value, mask, key_cos, key_sin, first_visible, slot, slot_neighbour, token,
                    present & (slot < readable), num_tokens,
                    key_k, key_r, value_k, value_r, mask_k, mask_r, key_cos_r, key_sin_r,
                    GROUPING, FLAT, LONG, DIM, VALUE_DIM, WIDTH, INTERLEAVED, BLOCK_PAIR, BLOCK_REST, BLOCK_VALUE,
                )  # fmt: skip
                run = None
                if relative_key is not None:
                    run = load_run(
                        relative_key + head * relative_h, relative_x,
                        first_row - token0 - BLOCK_KEYS + retrieved_length, num_distances, relative[2],
                        DIM, BLOCK_RUN, BLOCK_REST, LONG,
                    )  # fmt: skip
                logits = logits_of(
                    content, relative, k, run,
                    attention_bias + head * bias_h if attention_bias is not None else None, scale_log2, row, alive,
                    slot if BIAS_PER_SLOT else token, visible, bias_m,
                    DIM, WIDTH, False, LONG, BLOCK_ROWS, BLOCK_KEYS, BLOCK_RUN, PRECISION,
                )  # fmt: skip
                kept = None
                if dropout_seed is not None:
                    kept = kept_slots(
                        seed, threshold, drawn, place, slot, first_slot, False, LOTS, BLOCK_ROWS, BLOCK_KEYS
                    )
                weights, d_logits = weights_and_gradient(
                    logits, seen(visible, row, token, document, False, CAUSAL), do, v, delta, lse_log2,
                    rest if log_sum is not None else None, kept, survivor_scale, False, PRECISION,
                )  # fmt: skip
                d_logits = d_logits.to(content[2].dtype)
                dq = add_product(dq, d_logits, k, DIM, WIDTH, PRECISION)
                if relative_key is not None:
                    d_distances = by_distance(d_logits, False, BLOCK_ROWS, BLOCK_KEYS, BLOCK_RUN).to(run.dtype)
                    dq = dq[0], dq[1], tl.dot(d_distances, run, dq[2], input_precision=PRECISION)
                if FORM == ROWS and SINGLE_PASS:
                    at_slot = wide(slot, LONG) * num_kv_heads
                    dv = tl.dot(tl.trans(weights.to(do.dtype)), do, input_precision=PRECISION)
                    # A masked token's gradient is 0 even beside a query that is NaN.
                    dv = tl.where(visible[:, None], dv, 0.0)
                    tl.store(
                        grad_value + group_slot * VALUE_DIM + (at_slot * VALUE_DIM)[:, None] + value_column[None, :],
                        dv.to(grad_value.dtype.element_ty),
                        mask=present[:, None] & (value_column < VALUE_DIM)[None, :],
                    )
                    dk = add_product(
                        zeros_split(BLOCK_KEYS, BLOCK_PAIR, BLOCK_REST), tl.trans(d_logits), content,
                        DIM, WIDTH, PRECISION,
                    )  # fmt: skip
                    store_split(
                        grad_key + group_slot * DIM + at_slot * DIM, present,
                        key_cos + key_position * key_cos_r if WIDTH > 0 else None,
                        key_sin + key_position * key_sin_r if WIDTH > 0 else None, where_split(visible, dk),
                        scale, DIM, WIDTH, INTERLEAVED, BLOCK_PAIR, BLOCK_REST,
                    )  # fmt: skip
            store_split(
                grad_query + at * DIM + wide(row, LONG) * (num_heads * DIM), inside,
                query_cos + position * query_cos_m if WIDTH > 0 else None,
                query_sin + position * query_sin_m if WIDTH > 0 else None,
                dq, scale, DIM, WIDTH, INTERLEAVED, BLOCK_PAIR, BLOCK_REST,
            )  # fmt: skip

    if FORM != ROWS:
        for step in range(0, 1 if FORM == KEYS else key_tiles):
            slot, slot_neighbour, token, present, first_slot, token0 = slots_of(
                own_tile if FORM == KEYS else step, num_neighbours, retrieved_length, BLOCK_KEYS, GROUPING, WITHIN
            )
            visible, k, v, key_position = load_keys(
                key, value, mask, key_cos, key_sin, first_visible, slot, slot_neighbour, token,
                present & (slot < readable), num_tokens,
                key_k, key_r, value_k, value_r, mask_k, mask_r, key_cos_r, key_sin_r,
                GROUPING, FLAT, LONG, DIM, VALUE_DIM, WIDTH, INTERLEAVED, BLOCK_PAIR, BLOCK_REST, BLOCK_VALUE,
            )  # fmt: skip
            dk = zeros_split(BLOCK_KEYS, BLOCK_PAIR, BLOCK_REST)
            dv = tl.zeros([BLOCK_KEYS, BLOCK_VALUE], tl.float32)
            first_tile = 0
            tiles_seen = row_tiles
            if CAUSAL and not SINGLE_PASS:
                first_tile = token0 // BLOCK_ROWS
                last_row = num_tokens
                if first_visible is not None:
                    # After the last row that still sees the last of these tokens.
                    last_row = 0
                    for ahead in range(0, num_tokens, 1024):
                        later = ahead + tl.arange(0, 1024)
                        begins = tl.load(first_visible + later, mask=later < num_tokens, other=num_tokens)
                        last_row = tl.maximum(last_row, tl.max(tl.where(begins < token0 + BLOCK_KEYS, later + 1, 0)))
                    last_row = tl.minimum(last_row, num_tokens)
                tiles_seen = tl.maximum(tl.cdiv(last_row, BLOCK_ROWS) - first_tile, 0)
            for work in range(0, heads_per_key * tiles_seen):
                head = kv_head * heads_per_key + work // tiles_seen
                row_neighbour, first_row = row_tile_of(
                    first_tile + work % tiles_seen, neighbour, num_tokens, GROUPING, BLOCK_ROWS
                )
                row, inside = rows_of(first_row, start, count, num_tokens, BLOCK_ROWS)
                first_place = group_place + row_neighbour * place_k
                at = (batch * num_places + first_place) * num_heads + head
                alive, lse_log2, rest, do, delta = load_results(
                    grad_out + row_neighbour.to(tl.int64) * grad_out_k + head * grad_out_h, out + at * VALUE_DIM,
                    lse + at, log_sum + at if log_sum is not None else None, row, inside, grad_out_n, num_heads,
                    VALUE_DIM, LONG, BLOCK_VALUE,
                )  # fmt: skip
                position = row
                document = None
                if first_visible is not None:
                    document = tl.load(first_visible + row, mask=inside, other=0)
                    position = row - document
                content, relative = load_query(
                    query + row_neighbour.to(tl.int64) * query_k + head * query_h, query_cos, query_sin,
                    content_bias + head * content_bias_h if content_bias is not None else None,
                    relative_bias + head * relative_bias_h if relative_bias is not None else None,
                    position, row, alive, query_n, query_cos_m, query_sin_m,
                    DIM, WIDTH, INTERLEAVED, LONG, BLOCK_PAIR, BLOCK_REST,
                )  # fmt: skip
                place = first_place.to(tl.int32) + row
                drawn = (batch * num_heads + head).to(tl.int32)
                run = None
                if relative_key is not None:
                    run = load_run(
                        relative_key + head * relative_h, relative_x,
                        first_row - token0 - BLOCK_KEYS + retrieved_length, num_distances, relative[2],
                        DIM, BLOCK_RUN, BLOCK_REST, LONG,
                    )  # fmt: skip
                logits = logits_of(
                    content, relative, k, run,
                    attention_bias + head * bias_h if attention_bias is not None else None, scale_log2, row, alive,
                    slot if BIAS_PER_SLOT else token, visible, bias_m,
                    DIM, WIDTH, True, LONG, BLOCK_ROWS, BLOCK_KEYS, BLOCK_RUN, PRECISION,
                )  # fmt: skip
                kept = None
                if dropout_seed is not None:
                    kept = kept_slots(
                        seed, threshold, drawn, place, slot, first_slot, True, LOTS, BLOCK_ROWS, BLOCK_KEYS
                    )
                weights, d_logits = weights_and_gradient(
                    logits, seen(visible, row, token, document, True, CAUSAL), do, v, delta, lse_log2,
                    rest if log_sum is not None else None, kept, survivor_scale, True, PRECISION,
                )  # fmt: skip
                d_logits = d_logits.to(content[2].dtype)
                dv = tl.dot(weights.to(do.dtype), do, dv, input_precision=PRECISION)
                dk = add_product(dk, d_logits, content, DIM, WIDTH, PRECISION)
                if FORM == KEYS and SINGLE_PASS:
                    dq = add_product(
                        zeros_split(BLOCK_ROWS, BLOCK_PAIR, BLOCK_REST), tl.trans(d_logits), k, DIM, WIDTH, PRECISION
                    )
                    if relative_key is not None:
                        d_distances = by_distance(d_logits, True, BLOCK_ROWS, BLOCK_KEYS, BLOCK_RUN).to(run.dtype)
                        dq = dq[0], dq[1], tl.dot(tl.trans(d_distances), run, dq[2], input_precision=PRECISION)
                    if null_key is not None:
                        null, _, d_logit = null_slot(
                            content, do, delta, lse_log2, rest if log_sum is not None else None, scale_log2,
                            null_key + head * null_key_h, null_value + head * null_value_h,
                            kept_null(seed, threshold, drawn, place) if dropout_seed is not None else None,
                            survivor_scale,
                            DIM, VALUE_DIM, WIDTH, INTERLEAVED, BLOCK_PAIR, BLOCK_REST, BLOCK_VALUE,
                        )  # fmt: skip
                        dq = add_outer(dq, d_logit, null, DIM, WIDTH)
                    store_split(
                        grad_query + at * DIM + wide(row, LONG) * (num_heads * DIM), inside,
                        query_cos + position * query_cos_m if WIDTH > 0 else None,
                        query_sin + position * query_sin_m if WIDTH > 0 else None,
                        dq, scale, DIM, WIDTH, INTERLEAVED, BLOCK_PAIR, BLOCK_REST,
                    )  # fmt: skip

            # A masked token's gradient is 0 even beside a query that is NaN.
            at_slot = wide(slot, LONG) * num_kv_heads
            tl.store(grad_value + group_slot * VALUE_DIM + (at_slot * VALUE_DIM)[:, None] + value_column[None, :],
                     tl.where(visible[:, None], dv, 0.0).to(grad_value.dtype.element_ty),
                     mask=present[:, None] & (value_column < VALUE_DIM)[None, :])  # fmt: skip
            store_split(
                grad_key + group_slot * DIM + at_slot * DIM, present,
                key_cos + key_position * key_cos_r if WIDTH > 0 else None,
                key_sin + key_position * key_sin_r if WIDTH > 0 else None, where_split(visible, dk), scale,
                DIM, WIDTH, INTERLEAVED, BLOCK_PAIR, BLOCK_REST,
            )  # fmt: skip
