"""The forward kernel: an online softmax over key tiles."""

from __future__ import annotations

from . import tiles
from .tiles import (
    Dropout,
    Lengths,
    at_group,
    at_head,
    finite,
    group_of,
    inverse,
    jit,
    kept_null,
    kept_slots,
    key_tiles_of,
    load_keys,
    load_query,
    load_run,
    load_vector,
    logits_of,
    mask_at_group,
    row_index,
    row_tile_of,
    row_tiles_of,
    rows_at,
    scaled,
    scaling_of,
    seen,
    sequence_places,
    slots_of,
    store_lse,
    vector_product,
    wide,
)

if tiles.triton is not None:
    from .tiles import CLOCK, tl


@jit
def forward_kernel(
    query,
    key,
    value,
    mask,
    attention_bias,
    relative,
    rotary,
    null,
    chunk_spans,
    first_visible,
    dropout_seed,
    results,
    scale,
    softcap,
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
    SPEC,
):
    """Program (batch, group, row tile, query head), heads fastest: the heads of a token lie side by side in memory."""
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
    head = tl.program_id(0) % num_heads
    item = tl.program_id(0) // num_heads
    row_tile = item % row_tiles
    item = item // row_tiles
    number = first_group + item % num_groups
    batch = (item // num_groups).to(tl.int64)
    kv_head = (head // heads_per_key).to(tl.int64)
    seed = 0
    if SPEC.DROPOUT:
        seed = tl.load(dropout_seed)
    dropout = Dropout(seed, threshold, survivor_scale, (batch * num_heads + head).to(tl.int32))
    head = head.to(tl.int64)
    value_column = tl.arange(0, SPEC.BLOCK_VALUE)
    value_there = value_column < SPEC.VALUE_DIM
    scaling = scaling_of(scale, softcap, SPEC)

    # Tokens before the first chunk; those in no span were filled before the launch.
    if SPEC.GROUPING == CLOCK and chunk_spans is None:  # noqa: SIM102 - one is known when compiling
        if (number == first_group) & (row_tile == 0):
            for ahead in range(0, first_token, SPEC.BLOCK_ROWS):
                leading = ahead + tl.arange(0, SPEC.BLOCK_ROWS)
                at = (batch * sequence_places(lengths, SPEC) + leading) * num_heads + head
                tl.store(
                    results.out + (at * SPEC.VALUE_DIM)[:, None] + value_column[None, :],
                    tl.zeros([SPEC.BLOCK_ROWS, SPEC.BLOCK_VALUE], results.out.dtype.element_ty),
                    mask=(leading < first_token)[:, None] & value_there[None, :],
                )
                nothing = tl.zeros([SPEC.BLOCK_ROWS], tl.float32)
                store_lse(results, at, nothing, nothing, leading < first_token)

    group = group_of(number, batch, chunk_spans, lengths, SPEC)
    rows = row_tile_of(row_tile, group, lengths, SPEC)
    document = rows.row
    position = rows.row
    if SPEC.DOCUMENTS:
        first_visible += batch * num_tokens
        document = tl.load(first_visible + rows.row, mask=rows.inside, other=0)
        position = rows.row - document
    of_group = rows_at(query, rows, head, group, SPEC)
    queries = load_query(of_group, query.n, relative, rotary, head, position, rows.row, rows.inside, SPEC)

    place = rows.place.to(tl.int32) + rows.row
    if null is not None:
        null_key = load_vector(null.null_key + head * null.key_h, SPEC)
        largest, _null_slope = scaled(vector_product(queries.content, null_key, SPEC), scaling, SPEC)
        total = tl.full([SPEC.BLOCK_ROWS], 1.0, tl.float32)
        nulls = tl.load(null.null_value + head * null.value_h + value_column, mask=value_there, other=0.0)
        nulls = nulls.to(tl.float32)
        accumulator = tl.zeros([SPEC.BLOCK_ROWS, SPEC.BLOCK_VALUE], tl.float32) + nulls[None, :]
        if SPEC.DROPOUT:
            accumulator = tl.where(kept_null(dropout, place)[:, None], accumulator, 0.0)
    else:
        largest = tl.full([SPEC.BLOCK_ROWS], float("-inf"), tl.float32)
        total = tl.zeros([SPEC.BLOCK_ROWS], tl.float32)
        accumulator = tl.zeros([SPEC.BLOCK_ROWS, SPEC.BLOCK_VALUE], tl.float32)

    key = at_group(key, kv_head, group, SPEC)
    value = at_group(value, kv_head, group, SPEC)
    if mask is not None:
        mask = mask_at_group(mask, group, SPEC)
    if attention_bias is not None:
        attention_bias = at_head(attention_bias, head)

    first_tile = 0
    last_tile = key_tiles_of(lengths, SPEC)
    if SPEC.CAUSAL:
        last_tile = tl.minimum(last_tile, tl.cdiv(rows.first + SPEC.BLOCK_ROWS, SPEC.BLOCK_KEYS))
        if SPEC.DOCUMENTS:
            first_tile = tl.min(tl.where(rows.inside, document, num_tokens)) // SPEC.BLOCK_KEYS
    for tile in range(first_tile, last_tile):
        slots = slots_of(tile, lengths, SPEC)
        keys = load_keys(key, value, mask, rotary, first_visible, slots, None, SPEC)
        run = None
        if relative is not None:
            run = load_run(relative, head, rows, slots, lengths, queries.relative[2], SPEC)
        logits, _slope = logits_of(queries, keys, run, attention_bias, scaling, rows, rows.inside, slots, False, SPEC)
        logits = tl.where(seen(keys.visible, slots.token, rows, document, False, SPEC), logits, float("-inf"))
        larger = tl.maximum(largest, tl.max(logits, axis=1))
        base = finite(larger)
        weights = tl.exp2(logits - base[:, None])
        shrink = tl.exp2(largest - base)
        total = total * shrink + tl.sum(weights, axis=1)
        if SPEC.DROPOUT:
            weights = tl.where(kept_slots(dropout, place, slots, False, SPEC), weights, 0.0)
        accumulator *= shrink[:, None]
        accumulator = tl.dot(weights.to(keys.v.dtype), keys.v, accumulator, input_precision=SPEC.PRECISION)
        largest = larger

    if null is not None:
        # Where there are no slots the null slot's logit, which may be infinite or NaN, has met no other.
        exists = tl.exp2(largest - finite(largest))
        total *= exists
        factor = inverse(total) * exists
    else:
        factor = inverse(total)
    if SPEC.DROPOUT:
        factor *= survivor_scale
    accumulator = accumulator * factor[:, None]
    at = row_index(rows, head, group, lengths, SPEC)
    row = wide(rows.row, SPEC.INT64)
    tl.store(
        results.out + at * SPEC.VALUE_DIM + (row * (num_heads * SPEC.VALUE_DIM))[:, None] + value_column[None, :],
        accumulator.to(results.out.dtype.element_ty),
        mask=rows.inside[:, None] & value_there[None, :],
    )
    store_lse(results, at + row * num_heads, largest, total, rows.inside)
