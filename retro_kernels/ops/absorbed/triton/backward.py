"""The absorbed backward kernels: one seen from a head (gradients of query, weights and parameters), one from a tile of
slots (gradient of the states)."""

from __future__ import annotations

from ...attention.triton import tiles
from ...attention.triton.tiles import (
    Dropout,
    Lengths,
    at_head,
    at_most_one,
    group_of,
    jit,
    kept_null,
    key_tiles_of,
    load_distances,
    readable_slots,
    row_tile_of,
    row_tiles_of,
    slots_of_group,
    wide,
)
from .tiles import (
    at_chunk,
    by_distance,
    load_rows,
    load_states,
    load_weight,
    mask_at_chunk,
    neighbours_of,
    run_of,
    state_tile_of,
    tile_gradient,
    times_vector,
    weight_of,
    weight_places,
)

if tiles.triton is not None:
    from ...attention.triton.tiles import LOG2_E, constexpr, tl


@jit
def null_slot(loaded, null, null_key, head, dropout, scale_log2, SPEC):
    """The null slot's weight as it multiplied the null value, and the gradient of its logit, of a tile of rows."""
    upstream = loaded.upstream
    exponent = scale_log2 * tl.sum(loaded.queries.content.to(tl.float32) * null_key[None, :], axis=1) - upstream.lse
    if SPEC.TWO_PLANES:
        exponent -= upstream.rest
    weight = tl.where(upstream.alive, at_most_one(exponent), 0.0)
    null_value = null.null_value + head * null.value_h
    d_weight = times_vector(upstream.do, null_value, SPEC.VALUE_DIM, SPEC.BLOCK_VALUE)
    dropped = weight
    if SPEC.DROPOUT:
        kept = kept_null(dropout, loaded.rows.place.to(tl.int32) + loaded.rows.row)
        d_weight = tl.where(kept, d_weight * dropout.survivor_scale, 0.0)
        dropped = tl.where(kept, weight * dropout.survivor_scale, 0.0)
    return dropped, weight * (d_weight - upstream.delta)


@jit
def add_bias_gradient(sums, columns, d_logits, loaded, tile, lengths, SPEC):
    """Adds a tile's share of the gradient of a head's attention_bias to its sums."""
    slots = tile.slots
    column = slots.slot if SPEC.BIAS_PER_SLOT else slots.token
    at = sums + (wide(loaded.rows.row, SPEC.INT64) * columns)[:, None] + column[None, :]
    there = loaded.upstream.alive[:, None] & tile.visible[None, :]
    if SPEC.BIAS_PER_SLOT:
        tl.store(at, tl.load(at, mask=there, other=0.0) + d_logits, mask=there)
    else:  # neighbours add to the same elements: one after the other
        first, last = neighbours_of(slots, lengths, SPEC)
        for only in range(first, last):
            there_only = there & (slots.neighbour == only)[None, :]
            tl.store(at, tl.load(at, mask=there_only, other=0.0) + d_logits, mask=there_only)
            tl.debug_barrier()


@jit
def add_weight_gradient(sums, start, rows, summed, DIM: constexpr, BLOCK_DIM: constexpr, SPEC):
    """Adds rowsᵀ · summed to columns from `start` on of a head's sums of a weight's gradient [DIM, ENCODER_DIM]."""
    at, there = weight_places(SPEC.ENCODER_DIM, start, DIM, BLOCK_DIM, SPEC)
    total = tl.load(sums + at, mask=there, other=0.0)
    total += tl.dot(tl.trans(rows), summed, input_precision=SPEC.PRECISION)
    tl.store(sums + at, total, mask=there)


@jit
def backward_heads_kernel(
    grad_out,
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
    grad_query,
    sums,
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
    num_items,
    num_copies,
    SUMS: constexpr,
    SPEC,
):
    """An item is (batch, chunk, row tile). SUMS: program (copy, key/value head) takes the items copy, copy +
    num_copies, ... of each of its query heads and adds the gradients of weights and parameters to its own fp32 copies,
    which are 0 at first. Otherwise program (item, query head), heads fastest, for the query's gradient alone."""
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
    key_tiles = key_tiles_of(lengths, SPEC)
    num_distances = table_rows + retrieved_length - 1
    num_kv_heads = num_heads // heads_per_key
    lanes = num_kv_heads if SUMS else num_heads
    lane = tl.program_id(0) % lanes
    copy = tl.program_id(0) // lanes
    kv_head = (lane if SUMS else lane // heads_per_key).to(tl.int64)
    kv_copy = copy.to(tl.int64) * num_kv_heads + kv_head
    scale_log2 = scale * LOG2_E
    column = tl.arange(0, SPEC.BLOCK_DIM)
    there = column < SPEC.DIM
    value_column = tl.arange(0, SPEC.BLOCK_VALUE)
    value_there = value_column < SPEC.VALUE_DIM
    seed = 0
    if SPEC.DROPOUT:
        seed = tl.load(dropout_seed)
    w_key = weight_of(w_key, kv_head)
    w_value = weight_of(w_value, kv_head)
    columns = retrieved_length
    if SPEC.BIAS_PER_SLOT:
        columns = retrieved_length * num_neighbours

    d_bias_key = tl.zeros([SPEC.BLOCK_DIM], tl.float32)
    d_bias_value = tl.zeros([SPEC.BLOCK_VALUE], tl.float32)
    for in_group in range(0, heads_per_key if SUMS else 1):
        head = (lane * heads_per_key + in_group if SUMS else lane).to(tl.int64)
        head_copy = copy.to(tl.int64) * num_heads + head
        bias = None
        if attention_bias is not None:
            bias = at_head(attention_bias, head)
        d_rows = tl.zeros([SPEC.BLOCK_DIM], tl.float32)
        d_relative = tl.zeros([SPEC.BLOCK_DIM], tl.float32)
        d_null_key = tl.zeros([SPEC.BLOCK_DIM], tl.float32)
        d_null_value = tl.zeros([SPEC.BLOCK_VALUE], tl.float32)
        for step in range(0, tl.cdiv(num_items - copy, num_copies)):
            item = copy + step * num_copies
            row_tile = item % row_tiles
            item = item // row_tiles
            number = first_group + item % num_groups
            batch = (item // num_groups).to(tl.int64)
            dropout = Dropout(seed, threshold, survivor_scale, (batch * num_heads + head).to(tl.int32))

            # Tokens before the first chunk; those in no span were filled before the launch.
            if chunk_spans is None:  # noqa: SIM102 - one is known when compiling
                if (number == first_group) & (row_tile == 0):
                    for ahead in range(0, first_token, SPEC.BLOCK_ROWS):
                        leading = ahead + tl.arange(0, SPEC.BLOCK_ROWS)
                        at = (batch * num_tokens + leading) * num_heads + head
                        tl.store(
                            grad_query + (at * SPEC.DIM)[:, None] + column[None, :],
                            tl.zeros([SPEC.BLOCK_ROWS, SPEC.BLOCK_DIM], grad_query.dtype.element_ty),
                            mask=(leading < first_token)[:, None] & there[None, :],
                        )

            group = group_of(number, batch, chunk_spans, lengths, SPEC)
            rows = row_tile_of(row_tile, group, lengths, SPEC)
            loaded = load_rows(
                rows, query, grad_out, relative, bias_key, bias_value, results, head, group, lengths, SPEC
            )
            content = loaded.queries.content
            do = loaded.upstream.do

            dq = tl.zeros([SPEC.BLOCK_ROWS, SPEC.BLOCK_DIM], tl.float32)
            # The sum of the gradients of a row's logits, the null slot's apart: those of all logits sum to that of the
            # log-sum-exp.
            of_slots = tl.zeros([SPEC.BLOCK_ROWS], tl.float32)
            if results.grad_lse is not None:
                at_row = wide(rows.row, SPEC.INT64) * num_heads
                of_slots += tl.load(results.grad_lse + loaded.at + at_row, mask=loaded.upstream.alive, other=0.0)
            if null is not None:
                null_key = tl.load(null.null_key + head * null.key_h + column, mask=there, other=0.0).to(tl.float32)
                dropped_null, d_logit = null_slot(loaded, null, null_key, head, dropout, scale_log2, SPEC)
                dq += d_logit[:, None] * null_key[None, :]
                of_slots -= d_logit
                if sums.null_key_copies is not None:
                    d_null_key += tl.sum(d_logit[:, None] * content.to(tl.float32), axis=0)
                    d_null_value += tl.sum(dropped_null[:, None] * do.to(tl.float32), axis=0)
            if bias_key is not None and (null is not None or results.grad_lse is not None):
                added = tl.load(bias_key.data + kv_head * bias_key.h + column, mask=there, other=0.0)
                dq += of_slots[:, None] * added.to(tl.float32)[None, :]
                if sums.bias_key_copies is not None:
                    d_bias_key += tl.sum(of_slots[:, None] * content.to(tl.float32), axis=0)

            states = at_chunk(encoded, group)
            mask_of_chunk = None
            if mask is not None:
                mask_of_chunk = mask_at_chunk(mask, group)
            # A span of no tokens attends to nothing: its chunk is not read.
            readable = slots_of_group(lengths, SPEC)
            for number_of_tile in range(0, tl.where(readable_slots(group, lengths, SPEC) > 0, key_tiles, 0)):
                tile = state_tile_of(number_of_tile, states, mask_of_chunk, readable, lengths, SPEC)
                dropped, d_logits = tile_gradient(
                    loaded, tile, states, w_key, w_value, bias, relative, head, dropout, scale, lengths, SPEC
                )
                if sums.attention_bias_copies is not None:
                    of_head = sums.attention_bias_copies + head_copy * table_rows * columns
                    add_bias_gradient(of_head, columns, d_logits, loaded, tile, lengths, SPEC)
                if sums.bias_value_copies is not None:
                    d_bias_value += tl.sum(tl.sum(dropped, axis=1)[:, None] * do.to(tl.float32), axis=0)
                d_logits = d_logits.to(content.dtype)
                if relative is not None:
                    queries = loaded.queries.relative
                    begin, span, first = run_of(rows, tile.slots, lengths, SPEC)
                    for distance in range(0, span + SPEC.BLOCK_ROWS - 1, SPEC.BLOCK_RUN):
                        d_distances = by_distance(d_logits, distance, begin, span, tile.slots, lengths, SPEC)
                        run = load_distances(
                            relative, head, first + distance, lengths, queries, SPEC.BLOCK_RUN, SPEC.BLOCK_DIM, SPEC
                        )
                        dq = tl.dot(d_distances, run, dq, input_precision=SPEC.PRECISION)
                        if sums.relative_key_copies is not None:
                            x = first + distance + tl.arange(0, SPEC.BLOCK_RUN)
                            run_there = (x < num_distances)[:, None] & there[None, :]
                            at_run = sums.relative_key_copies + head_copy * num_distances * SPEC.DIM
                            at_run = at_run + (wide(x, SPEC.INT64) * SPEC.DIM)[:, None] + column[None, :]
                            d_run = tl.dot(tl.trans(d_distances), queries, input_precision=SPEC.PRECISION)
                            tl.store(at_run, tl.load(at_run, mask=run_there, other=0.0) + d_run, mask=run_there)
                            per_distance = tl.sum(d_distances.to(tl.float32), axis=0)
                            d_relative += tl.sum(per_distance[:, None] * run.to(tl.float32), axis=0)

                dropped = dropped.to(do.dtype)
                for start in range(0, SPEC.ENCODER_DIM, SPEC.BLOCK_ENCODER):
                    state = load_states(states, tile, start, SPEC)
                    weight = load_weight(w_key, start, SPEC.DIM, SPEC.BLOCK_DIM, SPEC)
                    summed = tl.dot(d_logits, state, input_precision=SPEC.PRECISION).to(state.dtype)
                    dq = tl.dot(summed, tl.trans(weight), dq, input_precision=SPEC.PRECISION)
                    if sums.w_key_copies is not None:
                        of_key = sums.w_key_copies + kv_copy * SPEC.DIM * SPEC.ENCODER_DIM
                        add_weight_gradient(of_key, start, content, summed, SPEC.DIM, SPEC.BLOCK_DIM, SPEC)
                        summed = tl.dot(dropped, state, input_precision=SPEC.PRECISION).to(state.dtype)
                        of_value = sums.w_value_copies + kv_copy * SPEC.VALUE_DIM * SPEC.ENCODER_DIM
                        add_weight_gradient(of_value, start, do, summed, SPEC.VALUE_DIM, SPEC.BLOCK_VALUE, SPEC)
                if SUMS:
                    # The next tile adds to the same sums, perhaps from other threads.
                    tl.debug_barrier()

            if sums.content_bias_copies is not None:
                d_rows += tl.sum(dq, axis=0)
            at_row = (wide(rows.row, SPEC.INT64) * (num_heads * SPEC.DIM))[:, None]
            tl.store(
                grad_query + loaded.at * SPEC.DIM + at_row + column[None, :],
                (scale * dq).to(grad_query.dtype.element_ty),
                mask=rows.inside[:, None] & there[None, :],
            )
        at = head_copy * SPEC.DIM + column
        if sums.content_bias_copies is not None:
            tl.store(sums.content_bias_copies + at, d_rows - d_relative, mask=there)
        if sums.relative_bias_copies is not None:
            tl.store(sums.relative_bias_copies + at, d_relative, mask=there)
        if sums.null_key_copies is not None:
            tl.store(sums.null_key_copies + at, d_null_key, mask=there)
            at_value = sums.null_value_copies + head_copy * SPEC.VALUE_DIM + value_column
            tl.store(at_value, d_null_value, mask=value_there)
    if sums.bias_key_copies is not None:
        tl.store(sums.bias_key_copies + kv_copy * SPEC.DIM + column, d_bias_key, mask=there)
    if sums.bias_value_copies is not None:
        at_value = sums.bias_value_copies + kv_copy * SPEC.VALUE_DIM + value_column
        tl.store(at_value, d_bias_value, mask=value_there)


@jit
def backward_states_kernel(
    grad_out,
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
    grad_encoded,
    scratch,
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
    num_items,
    num_copies,
    SPEC,
):
    """Program `copy` takes the items copy, copy + num_copies, ... of (batch, chunk, slot tile) and adds up every head's
    share of their states' gradient in fp32, in its own tile `scratch` [BLOCK_KEYS, ENCODER_DIM], or, where that is
    None, in the gradient itself, which then is fp32."""
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
    key_tiles = key_tiles_of(lengths, SPEC)
    copy = tl.program_id(0)
    lane = tl.arange(0, SPEC.BLOCK_KEYS)
    seed = 0
    if SPEC.DROPOUT:
        seed = tl.load(dropout_seed)
    for step in range(0, tl.cdiv(num_items - copy, num_copies)):
        item = copy + step * num_copies
        number_of_tile = item % key_tiles
        item = item // key_tiles
        batch = (item // num_groups).to(tl.int64)
        group = group_of(first_group + item % num_groups, batch, chunk_spans, lengths, SPEC)
        readable = readable_slots(group, lengths, SPEC)
        states = at_chunk(encoded, group)
        mask_of_chunk = None
        if mask is not None:
            mask_of_chunk = mask_at_chunk(mask, group)
        tile = state_tile_of(number_of_tile, states, mask_of_chunk, readable, lengths, SPEC)
        present = tile.slots.present
        first_slot = (batch * num_chunks + group.chunk) * slots_of_group(lengths, SPEC)
        slot = wide(tile.slots.slot, SPEC.INT64)
        stored = grad_encoded + first_slot * SPEC.ENCODER_DIM + (slot * SPEC.ENCODER_DIM)[:, None]
        if scratch is None:
            totals = stored
            storable = present
        else:
            totals = scratch + copy.to(tl.int64) * SPEC.BLOCK_KEYS * SPEC.ENCODER_DIM
            totals = totals + (lane * SPEC.ENCODER_DIM)[:, None]
            storable = lane >= 0

        works = tl.where(readable > 0, num_heads * row_tiles, 0)
        for work in range(0, works):
            head = (work // row_tiles).to(tl.int64)
            kv_head = head // heads_per_key
            dropout = Dropout(seed, threshold, survivor_scale, (batch * num_heads + head).to(tl.int32))
            rows = row_tile_of(work % row_tiles, group, lengths, SPEC)
            loaded = load_rows(
                rows, query, grad_out, relative, bias_key, bias_value, results, head, group, lengths, SPEC
            )
            bias = None
            if attention_bias is not None:
                bias = at_head(attention_bias, head)
            key_weight = weight_of(w_key, kv_head)
            value_weight = weight_of(w_value, kv_head)
            dropped, d_logits = tile_gradient(
                loaded, tile, states, key_weight, value_weight, bias, relative, head, dropout, scale, lengths, SPEC
            )
            content = loaded.queries.content
            do = loaded.upstream.do
            dropped = tl.trans(dropped.to(do.dtype))
            d_logits = tl.trans(d_logits.to(content.dtype))
            for start in range(0, SPEC.ENCODER_DIM, SPEC.BLOCK_ENCODER):
                column = start + tl.arange(0, SPEC.BLOCK_ENCODER)
                there = storable[:, None] & (column < SPEC.ENCODER_DIM)[None, :]
                begun = lane >= tl.where(work > 0, 0, SPEC.BLOCK_KEYS)
                total = tl.load(totals + column[None, :], mask=there & begun[:, None], other=0.0)
                weight = load_weight(value_weight, start, SPEC.VALUE_DIM, SPEC.BLOCK_VALUE, SPEC)
                projected = tl.dot(do, weight, input_precision=SPEC.PRECISION).to(do.dtype)
                total += tl.dot(dropped, projected, input_precision=SPEC.PRECISION)
                weight = load_weight(key_weight, start, SPEC.DIM, SPEC.BLOCK_DIM, SPEC)
                projected = (scale * tl.dot(content, weight, input_precision=SPEC.PRECISION)).to(content.dtype)
                total += tl.dot(d_logits, projected, input_precision=SPEC.PRECISION)
                # A masked token's gradient is 0 even beside a query that is NaN.
                tl.store(totals + column[None, :], tl.where(tile.visible[:, None], total, 0.0), mask=there)
            # The next head adds to the same sums, perhaps from other threads.
            tl.debug_barrier()

        if scratch is None:
            # Where nothing was added 0 is stored here.
            if works == 0:
                for start in range(0, SPEC.ENCODER_DIM, SPEC.BLOCK_ENCODER):
                    column = start + tl.arange(0, SPEC.BLOCK_ENCODER)
                    tl.store(
                        stored + column[None, :],
                        tl.zeros([SPEC.BLOCK_KEYS, SPEC.BLOCK_ENCODER], tl.float32),
                        mask=present[:, None] & (column < SPEC.ENCODER_DIM)[None, :],
                    )
        else:
            for start in range(0, SPEC.ENCODER_DIM, SPEC.BLOCK_ENCODER):
                column = start + tl.arange(0, SPEC.BLOCK_ENCODER)
                there = present[:, None] & (column < SPEC.ENCODER_DIM)[None, :]
                begun = lane >= tl.where(works > 0, 0, SPEC.BLOCK_KEYS)
                total = tl.load(totals + column[None, :], mask=there & begun[:, None], other=0.0)
                tl.store(stored + column[None, :], total.to(grad_encoded.dtype.element_ty), mask=there)
            tl.debug_barrier()
