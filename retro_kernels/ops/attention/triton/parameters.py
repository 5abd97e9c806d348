"""The kernel of the parameters' gradients: bias, relative positions, null slot.

Every group adds to them, so each is a launch of its own, in which `num_copies` programs a head (and tile of the bias)
each take every num_copies-th item, sum in registers and write to a private fp32 copy; the copies are then summed in a
fixed order. In the main pass their registers would spill.
"""

from __future__ import annotations

from . import tiles
from .tiles import (
    Dropout,
    Lengths,
    at_group,
    at_head,
    by_distance,
    group_of,
    jit,
    load_keys,
    load_rows,
    load_run,
    mask_at_group,
    null_slot,
    readable_slots,
    rows_of,
    scaling_of,
    slots_of,
    store_vector,
    tile_gradient,
    wide,
)

if tiles.triton is not None:
    from .tiles import CHUNK, CLOCK, constexpr, tl

    BIAS = constexpr(0)
    RELATIVE = constexpr(1)
    NULL = constexpr(2)


@jit
def key_tiles_of_table(lengths, PARAMETER: constexpr, SPEC):
    """How many key tiles a program, of a bias all programs of a head, walks: of a bias per slot those of a group, else
    those of one neighbour."""
    count = tl.cdiv(lengths.retrieved_length, SPEC.BLOCK_KEYS)
    if PARAMETER == BIAS and SPEC.BIAS_PER_SLOT:
        if SPEC.PER_NEIGHBOUR:
            count = count * lengths.num_neighbours
        else:
            count = tl.cdiv(lengths.num_neighbours * lengths.retrieved_length, SPEC.BLOCK_KEYS)
    return count


@jit
def neighbours_that_share(lengths, PARAMETER: constexpr, SPEC):
    """How many neighbours of a group, of its rows or of its slots, add to the same elements."""
    count = tl.full([], 1, tl.int32)
    if SPEC.GROUPING == CHUNK:
        count = lengths.num_neighbours
    if SPEC.GROUPING == CLOCK and PARAMETER != NULL and not (PARAMETER == BIAS and SPEC.BIAS_PER_SLOT):
        count = lengths.num_neighbours
    return count


@jit
def parameters_kernel(
    grad_out,
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
    copies,
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
    num_items,
    num_copies,
    PARAMETER: constexpr,
    SPEC,
):
    """BIAS: program (copy, row tile, key tile, head); an item is (batch, group, neighbour).
    RELATIVE: program (copy, head); an item is (batch, group, neighbour, row tile). Square tiles: those on one diagonal
    have the same distances, so the sums of a diagonal stay in registers over all items.
    NULL: program (copy, head); an item is (batch, group, neighbour, row tile). It also adds what the null slot
    contributes to the gradient of content_bias, and runs after RELATIVE."""
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
    row_tiles = tl.cdiv(stride, SPEC.BLOCK_ROWS)
    key_tiles = key_tiles_of_table(lengths, PARAMETER, SPEC)
    sharing = neighbours_that_share(lengths, PARAMETER, SPEC)
    num_distances = table_rows + retrieved_length - 1
    head32 = tl.program_id(0) % num_heads
    own = tl.program_id(0) // num_heads
    own_row_tile = 0
    own_key_tile = 0
    if PARAMETER == BIAS:
        own_key_tile = own % key_tiles
        own = own // key_tiles
        own_row_tile = own % row_tiles
        own = own // row_tiles
    copy = own
    head = head32.to(tl.int64)
    kv_head = (head32 // heads_per_key).to(tl.int64)
    head_copy = copy.to(tl.int64) * num_heads + head
    scaling = scaling_of(scale, softcap, SPEC)
    seed = 0
    if SPEC.DROPOUT:
        seed = tl.load(dropout_seed)
    if attention_bias is not None:
        attention_bias = at_head(attention_bias, head)

    value_column = tl.arange(0, SPEC.BLOCK_VALUE)
    rest_column = tl.arange(0, SPEC.BLOCK_REST)
    rest_there = rest_column < SPEC.DIM
    d_bias = tl.zeros([SPEC.BLOCK_ROWS, SPEC.BLOCK_KEYS], tl.float32)
    d_content = tl.zeros([SPEC.BLOCK_REST], tl.float32)
    d_relative = tl.zeros([SPEC.BLOCK_REST], tl.float32)
    d_null_first = tl.zeros([SPEC.BLOCK_PAIR], tl.float32)
    d_null_second = tl.zeros([SPEC.BLOCK_PAIR], tl.float32)
    d_null_rest = tl.zeros([SPEC.BLOCK_REST], tl.float32)
    d_null_value = tl.zeros([SPEC.BLOCK_VALUE], tl.float32)
    d_null_logit = tl.full([], 0.0, tl.float32)

    first_diagonal = 0
    last_diagonal = 1
    if PARAMETER == RELATIVE:
        last_diagonal = row_tiles
        if not SPEC.CAUSAL:
            first_diagonal = 1 - key_tiles
    for diagonal in range(first_diagonal, last_diagonal):
        first_distance = diagonal * SPEC.BLOCK_ROWS - SPEC.BLOCK_KEYS + retrieved_length
        d_run = tl.zeros([SPEC.BLOCK_RUN, SPEC.BLOCK_REST], tl.float32)
        per_distance = tl.zeros([SPEC.BLOCK_RUN], tl.float32)
        for step in range(0, tl.cdiv(num_items - copy, num_copies)):
            item = copy + step * num_copies
            row_tile = own_row_tile
            key_tile = own_key_tile
            if PARAMETER != BIAS:
                row_tile = item % row_tiles
                item = item // row_tiles
            needed = True
            if PARAMETER == RELATIVE:
                key_tile = row_tile - diagonal
                needed = (key_tile >= 0) & (key_tile < key_tiles)
            if needed:
                shared_by = item % sharing
                item = item // sharing
                batch = (item // num_groups).to(tl.int64)
                group = group_of(first_group + item % num_groups, batch, chunk_spans, lengths, SPEC)
                neighbour = group.neighbour
                if SPEC.GROUPING == CHUNK:
                    neighbour = shared_by
                if SPEC.GROUPING == CLOCK:
                    key_tile += shared_by * key_tiles
                rows = rows_of(neighbour, row_tile * SPEC.BLOCK_ROWS, group, lengths, SPEC)
                begins = first_visible
                if SPEC.DOCUMENTS:
                    begins += batch * num_tokens
                loaded = load_rows(rows, query, grad_out, relative, rotary, begins, results, head, group, lengths, SPEC)
                dropout = Dropout(seed, threshold, survivor_scale, (batch * num_heads + head).to(tl.int32))
                content = loaded.queries.content
                if PARAMETER == NULL:
                    _, weight, d_logit = null_slot(loaded, null, head, dropout, scaling, SPEC)
                    if SPEC.WIDTH > 0:
                        d_null_first += tl.sum(d_logit[:, None] * content[0].to(tl.float32), axis=0)
                        d_null_second += tl.sum(d_logit[:, None] * content[1].to(tl.float32), axis=0)
                    if 2 * SPEC.WIDTH < SPEC.DIM:
                        d_null_rest += tl.sum(d_logit[:, None] * content[2].to(tl.float32), axis=0)
                    d_null_value += tl.sum(weight[:, None] * loaded.upstream.do.to(tl.float32), axis=0)
                    d_null_logit += tl.sum(d_logit, axis=0)
                if PARAMETER != NULL:
                    slots = slots_of(key_tile, lengths, SPEC)
                    keys = load_keys(
                        at_group(key, kv_head, group, SPEC),
                        at_group(value, kv_head, group, SPEC),
                        mask_at_group(mask, group, SPEC) if mask is not None else None,
                        rotary,
                        begins,
                        slots,
                        readable_slots(group, lengths, SPEC),
                        SPEC,
                    )
                    run = None
                    if relative is not None:
                        run = load_run(relative, head, rows, slots, lengths, loaded.queries.relative[2], SPEC)
                    # A row that is no token of this group must not bring a key that is NaN to the sums of its place.
                    _, d_logits, d_scaled = tile_gradient(
                        loaded, slots, keys, run, attention_bias, dropout, scaling, False, True, SPEC
                    )
                    if PARAMETER == BIAS:
                        d_bias += d_logits
                    else:
                        d_content += tl.sum(tl.sum(d_scaled, axis=0)[:, None] * keys.k[2].to(tl.float32), axis=0)
                        queries = loaded.queries.relative[2]
                        d_distances = by_distance(d_scaled.to(queries.dtype), False, SPEC).to(queries.dtype)
                        per_distance += tl.sum(d_distances.to(tl.float32), axis=0)
                        d_run = tl.dot(tl.trans(d_distances), queries, d_run, input_precision=SPEC.PRECISION)
        if PARAMETER == RELATIVE:
            x = first_distance + tl.arange(0, SPEC.BLOCK_RUN)
            there = ((x >= 0) & (x < num_distances))[:, None] & rest_there[None, :]
            sums = copies.relative_key_copies + head_copy * num_distances * SPEC.DIM
            sums = sums + (wide(x, SPEC.INT64) * SPEC.DIM)[:, None] + rest_column[None, :]
            tl.store(sums, tl.load(sums, mask=there, other=0.0) + scale * d_run, mask=there)
            at = relative.relative_key + head * relative.h
            at = at + (wide(x, SPEC.INT64) * relative.x)[:, None] + rest_column[None, :]
            run = tl.load(at, mask=there, other=0.0).to(tl.float32)
            d_relative += tl.sum(per_distance[:, None] * run, axis=0)
            # The next diagonal adds to some of the same sums, perhaps from other threads.
            tl.debug_barrier()

    if PARAMETER == BIAS:
        row = own_row_tile * SPEC.BLOCK_ROWS + tl.arange(0, SPEC.BLOCK_ROWS)
        columns = retrieved_length
        if SPEC.BIAS_PER_SLOT:
            columns = retrieved_length * num_neighbours
        column = own_key_tile * SPEC.BLOCK_KEYS + tl.arange(0, SPEC.BLOCK_KEYS)
        there = column < columns
        if SPEC.PER_NEIGHBOUR and SPEC.BIAS_PER_SLOT:
            slots = slots_of(own_key_tile, lengths, SPEC)
            column = slots.slot
            there = slots.present
        sums = copies.attention_bias_copies + head_copy * table_rows * columns
        sums = sums + (wide(row, SPEC.INT64) * columns)[:, None] + column[None, :]
        tl.store(sums, d_bias, mask=(row < stride)[:, None] & there[None, :])
    if PARAMETER == RELATIVE:
        at = head_copy * SPEC.DIM + rest_column
        if copies.content_bias_copies is not None:
            tl.store(copies.content_bias_copies + at, scale * d_content, mask=rest_there)
        if copies.relative_bias_copies is not None:
            tl.store(copies.relative_bias_copies + at, scale * d_relative, mask=rest_there)
    if PARAMETER == NULL:
        if copies.null_key_copies is not None:
            store_vector(
                copies.null_key_copies + head_copy * SPEC.DIM,
                (scale * d_null_first, scale * d_null_second, scale * d_null_rest),
                SPEC,
            )
            tl.store(
                copies.null_value_copies + head_copy * SPEC.VALUE_DIM + value_column,
                d_null_value,
                mask=value_column < SPEC.VALUE_DIM,
            )
        if copies.content_bias_copies is not None:
            sums = copies.content_bias_copies + head_copy * SPEC.DIM + rest_column
            null_key = tl.load(null.null_key + head * null.key_h + rest_column, mask=rest_there, other=0.0)
            added = scale * d_null_logit * null_key.to(tl.float32)
            tl.store(sums, tl.load(sums, mask=rest_there, other=0.0) + added, mask=rest_there)
