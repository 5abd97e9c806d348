"""The backward kernel: gradients of query, key and value.

One kernel in three forms. Seen from a tile of rows (ROWS), dQ is complete after a loop over key tiles; seen from a tile
of keys (KEYS), dK and dV after a loop over row tiles. Where one tile holds all rows of a group, or all its keys, the
other side's gradients are complete in every step too, and all three come out of a single pass of five products. BOTH
makes the two sweeps one after the other in one program.
"""

from __future__ import annotations

from . import tiles
from .tiles import (
    Dropout,
    Lengths,
    add_outer,
    add_product,
    at_group,
    at_head,
    by_distance,
    group_of,
    jit,
    key_tiles_of,
    load_keys,
    load_rows,
    load_run,
    mask_at_group,
    null_slot,
    readable_slots,
    row_tile_of,
    row_tiles_of,
    scaling_of,
    sequence_places,
    slots_of,
    slots_of_group,
    store_split,
    tile_gradient,
    where_split,
    wide,
    zeros_split,
)

if tiles.triton is not None:
    from .tiles import CLOCK, NEIGHBOUR, constexpr, tl

    ROWS = constexpr(0)
    KEYS = constexpr(1)
    BOTH = constexpr(2)


@jit
def store_query_gradient(grad_query, loaded, rotary, dq, scale, num_heads, SPEC):
    """Stores the gradient of a tile of queries."""
    store_split(
        grad_query + loaded.at * SPEC.DIM + wide(loaded.rows.row, SPEC.INT64) * (num_heads * SPEC.DIM),
        loaded.rows.inside,
        rotary.query_cos + loaded.position * rotary.query_cos_m if SPEC.WIDTH > 0 else None,
        rotary.query_sin + loaded.position * rotary.query_sin_m if SPEC.WIDTH > 0 else None,
        dq,
        scale,
        SPEC,
    )


@jit
def store_value_gradient(grad_value, first_slot, slots, keys, dv, num_kv_heads, SPEC):
    """Stores the gradient of a tile of values, whose group's begin at index first_slot. A masked token's is 0 even
    beside a query that is NaN."""
    column = tl.arange(0, SPEC.BLOCK_VALUE)
    at_slot = wide(slots.slot, SPEC.INT64) * num_kv_heads
    tl.store(
        grad_value + first_slot * SPEC.VALUE_DIM + (at_slot * SPEC.VALUE_DIM)[:, None] + column[None, :],
        tl.where(keys.visible[:, None], dv, 0.0).to(grad_value.dtype.element_ty),
        mask=slots.present[:, None] & (column < SPEC.VALUE_DIM)[None, :],
    )


@jit
def store_key_gradient(grad_key, first_slot, slots, keys, rotary, dk, scale, num_kv_heads, SPEC):
    """`store_value_gradient` of a tile of keys."""
    store_split(
        grad_key + first_slot * SPEC.DIM + wide(slots.slot, SPEC.INT64) * num_kv_heads * SPEC.DIM,
        slots.present,
        rotary.key_cos + keys.position * rotary.key_cos_r if SPEC.WIDTH > 0 else None,
        rotary.key_sin + keys.position * rotary.key_sin_r if SPEC.WIDTH > 0 else None,
        where_split(keys.visible, dk),
        scale,
        SPEC,
    )


@jit
def row_tiles_that_see(token, first_visible, lengths, SPEC):
    """Of causal attention: the first row tile that sees a token of the tile that begins with `token`, and how many
    tiles follow up to the last."""
    first_tile = token // SPEC.BLOCK_ROWS
    last_row = lengths.num_tokens
    if SPEC.DOCUMENTS:
        # After the last row that still sees the last of these tokens.
        last_row = 0
        for ahead in range(0, lengths.num_tokens, 1024):
            later = ahead + tl.arange(0, 1024)
            begins = tl.load(first_visible + later, mask=later < lengths.num_tokens, other=lengths.num_tokens)
            last_row = tl.maximum(last_row, tl.max(tl.where(begins < token + SPEC.BLOCK_KEYS, later + 1, 0)))
        last_row = tl.minimum(last_row, lengths.num_tokens)
    return first_tile, tl.maximum(tl.cdiv(last_row, SPEC.BLOCK_ROWS) - first_tile, 0)


@jit
def backward_kernel(
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
    gradients,
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
    SWEEP: constexpr,
    SINGLE_PASS: constexpr,
    SPEC,
):
    """Program (batch, group, row tile, query head), (batch, group, key tile, key/value head) or (batch, group,
    key/value head) for ROWS, KEYS and BOTH, heads fastest."""
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
    num_kv_heads = num_heads // heads_per_key
    lanes = num_heads if SWEEP == ROWS else num_kv_heads
    own_tiles = row_tiles if SWEEP == ROWS else tl.maximum(key_tiles, 1) if SWEEP == KEYS else 1
    lane = tl.program_id(0) % lanes
    item = tl.program_id(0) // lanes
    own_tile = item % own_tiles
    item = item // own_tiles
    number = first_group + item % num_groups
    batch = (item // num_groups).to(tl.int64)
    kv_head = (lane // heads_per_key if SWEEP == ROWS else lane).to(tl.int64)
    scaling = scaling_of(scale, softcap, SPEC)
    seed = 0
    if SPEC.DROPOUT:
        seed = tl.load(dropout_seed)

    # Tokens before the first chunk; those in no span were filled before the launch.
    if SPEC.GROUPING == CLOCK and chunk_spans is None and SWEEP == ROWS:  # noqa: SIM102 - one is known when compiling
        if (number == first_group) & (own_tile == 0):
            for ahead in range(0, first_token, SPEC.BLOCK_ROWS):
                leading = ahead + tl.arange(0, SPEC.BLOCK_ROWS)
                column = tl.arange(0, 256)
                at = (batch * sequence_places(lengths, SPEC) + leading) * num_heads + lane
                tl.store(
                    gradients.grad_query + (at * SPEC.DIM)[:, None] + column[None, :],
                    tl.zeros([SPEC.BLOCK_ROWS, 256], gradients.grad_query.dtype.element_ty),
                    mask=(leading < first_token)[:, None] & (column < SPEC.DIM)[None, :],
                )

    group = group_of(number, batch, chunk_spans, lengths, SPEC)
    readable = readable_slots(group, lengths, SPEC)
    key = at_group(key, kv_head, group, SPEC)
    value = at_group(value, kv_head, group, SPEC)
    if mask is not None:
        mask = mask_at_group(mask, group, SPEC)
    first_slot = batch * num_chunks + group.chunk
    if SPEC.GROUPING == NEIGHBOUR:
        first_slot = first_slot * num_neighbours + group.neighbour
    first_slot = first_slot * slots_of_group(lengths, SPEC) * num_kv_heads + kv_head
    if SPEC.DOCUMENTS:
        first_visible += batch * num_tokens

    if SWEEP != KEYS:
        for work in range(0, 1 if SWEEP == ROWS else heads_per_key * row_tiles):
            head = (lane if SWEEP == ROWS else lane * heads_per_key + work // row_tiles).to(tl.int64)
            dropout = Dropout(seed, threshold, survivor_scale, (batch * num_heads + head).to(tl.int32))
            rows = row_tile_of(own_tile if SWEEP == ROWS else work % row_tiles, group, lengths, SPEC)
            loaded = load_rows(
                rows, query, grad_out, relative, rotary, first_visible, results, head, group, lengths, SPEC
            )
            bias = None
            if attention_bias is not None:
                bias = at_head(attention_bias, head)
            dq = zeros_split(SPEC.BLOCK_ROWS, SPEC)
            if null is not None:
                null_key, _null_weight, d_logit = null_slot(loaded, null, head, dropout, scaling, SPEC)
                dq = add_outer(dq, d_logit, null_key, SPEC)

            first_tile = 0
            last_tile = key_tiles
            if SPEC.CAUSAL and not SINGLE_PASS:
                last_tile = tl.minimum(key_tiles, tl.cdiv(rows.first + SPEC.BLOCK_ROWS, SPEC.BLOCK_KEYS))
                if SPEC.DOCUMENTS:
                    first_tile = tl.min(tl.where(rows.inside, loaded.document, num_tokens)) // SPEC.BLOCK_KEYS
            for tile in range(first_tile, last_tile):
                slots = slots_of(tile, lengths, SPEC)
                keys = load_keys(key, value, mask, rotary, first_visible, slots, readable, SPEC)
                run = None
                if relative is not None:
                    run = load_run(relative, head, rows, slots, lengths, loaded.queries.relative[2], SPEC)
                weights, _capped, d_logits = tile_gradient(
                    loaded, slots, keys, run, bias, dropout, scaling, False, False, SPEC
                )
                d_logits = d_logits.to(loaded.queries.content[2].dtype)
                dq = add_product(dq, d_logits, keys.k, SPEC)
                if relative is not None:
                    d_distances = by_distance(d_logits, False, SPEC).to(run.dtype)
                    dq = dq[0], dq[1], tl.dot(d_distances, run, dq[2], input_precision=SPEC.PRECISION)
                if SWEEP == ROWS and SINGLE_PASS:
                    do = loaded.upstream.do
                    dv = tl.dot(tl.trans(weights.to(do.dtype)), do, input_precision=SPEC.PRECISION)
                    store_value_gradient(gradients.grad_value, first_slot, slots, keys, dv, num_kv_heads, SPEC)
                    dk = zeros_split(SPEC.BLOCK_KEYS, SPEC)
                    dk = add_product(dk, tl.trans(d_logits), loaded.queries.content, SPEC)
                    store_key_gradient(
                        gradients.grad_key, first_slot, slots, keys, rotary, dk, scale, num_kv_heads, SPEC
                    )
            store_query_gradient(gradients.grad_query, loaded, rotary, dq, scale, num_heads, SPEC)

    if SWEEP != ROWS:
        for step in range(0, 1 if SWEEP == KEYS else key_tiles):
            slots = slots_of(own_tile if SWEEP == KEYS else step, lengths, SPEC)
            keys = load_keys(key, value, mask, rotary, first_visible, slots, readable, SPEC)
            dk = zeros_split(SPEC.BLOCK_KEYS, SPEC)
            dv = tl.zeros([SPEC.BLOCK_KEYS, SPEC.BLOCK_VALUE], tl.float32)
            first_tile = 0
            tiles_seen = row_tiles
            if SPEC.CAUSAL and not SINGLE_PASS:
                first_tile, tiles_seen = row_tiles_that_see(slots.first_token, first_visible, lengths, SPEC)
            for work in range(0, heads_per_key * tiles_seen):
                head = kv_head * heads_per_key + work // tiles_seen
                dropout = Dropout(seed, threshold, survivor_scale, (batch * num_heads + head).to(tl.int32))
                rows = row_tile_of(first_tile + work % tiles_seen, group, lengths, SPEC)
                loaded = load_rows(
                    rows, query, grad_out, relative, rotary, first_visible, results, head, group, lengths, SPEC
                )
                run = None
                if relative is not None:
                    run = load_run(relative, head, rows, slots, lengths, loaded.queries.relative[2], SPEC)
                bias = None
                if attention_bias is not None:
                    bias = at_head(attention_bias, head)
                weights, _capped, d_logits = tile_gradient(
                    loaded, slots, keys, run, bias, dropout, scaling, True, False, SPEC
                )
                d_logits = d_logits.to(loaded.queries.content[2].dtype)
                do = loaded.upstream.do
                dv = tl.dot(weights.to(do.dtype), do, dv, input_precision=SPEC.PRECISION)
                dk = add_product(dk, d_logits, loaded.queries.content, SPEC)
                if SWEEP == KEYS and SINGLE_PASS:
                    dq = add_product(zeros_split(SPEC.BLOCK_ROWS, SPEC), tl.trans(d_logits), keys.k, SPEC)
                    if relative is not None:
                        d_distances = tl.trans(by_distance(d_logits, True, SPEC).to(run.dtype))
                        dq = dq[0], dq[1], tl.dot(d_distances, run, dq[2], input_precision=SPEC.PRECISION)
                    if null is not None:
                        null_key, _null_weight, d_logit = null_slot(loaded, null, head, dropout, scaling, SPEC)
                        dq = add_outer(dq, d_logit, null_key, SPEC)
                    store_query_gradient(gradients.grad_query, loaded, rotary, dq, scale, num_heads, SPEC)
            store_value_gradient(gradients.grad_value, first_slot, slots, keys, dv, num_kv_heads, SPEC)
            store_key_gradient(gradients.grad_key, first_slot, slots, keys, rotary, dk, scale, num_kv_heads, SPEC)
