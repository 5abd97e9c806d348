"""The two launches of decoding: partial sums of key tiles, and their combination."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ...attention.triton.tiles import triton

if triton is not None:
    from ...attention.triton.tiles import LOG2_E, bias_in_bits, constexpr, finite, inverse, store_lse, tl

# Never specialised: a kernel is not compiled again for another batch, length or number of neighbours.
LENGTHS = (
    "num_tokens", "num_heads", "num_kv_heads", "heads_per_key", "retrieved_length", "num_slots", "chunk_size",
    "row_tiles", "key_tiles", "value_blocks", "num_rows",
)  # fmt: skip


def jit(function: Callable) -> Any:
    if triton is None:
        return function
    names = function.__code__.co_varnames[: function.__code__.co_argcount]
    return triton.jit(function, do_not_specialize=[name for name in names if name in LENGTHS])


@jit
def states_of(token, batch, position, valid, chunk, chunk_size):
    """Which tokens of a sequence attend, and which are idle (common.py); the others are beyond the border."""
    start = tl.load(position + batch)
    place = start + token
    since = place - (chunk_size - 1)
    if chunk is not None:
        held = tl.load(chunk + batch)
    else:
        held = tl.maximum(start - (chunk_size - 1), 0) // chunk_size
    attends = (since >= 0) & (since // chunk_size == held)
    idle = (since < 0) & (place >= 0)
    if valid is not None:
        # loaded for every token: the interpreter cannot combine a scalar's comparison with a tile's
        counts = tl.load(valid + batch + token * 0) != 0
        attends = attends & counts
        idle = idle | (counts == 0)
    return attends, idle


@jit
def number(x, FLOAT8: constexpr):
    """A cache's elements as numbers. FLOAT8: e4m3fn as bytes, made a half whose exponent is biased by 8 more, so 2^-8
    of what they stand for; by integer operations, because sm_80 has no others."""
    if FLOAT8:
        bits = x.to(tl.uint16)
        magnitude = bits & 0x7F
        bits = tl.where(magnitude == 0x7F, 0x7E00, ((bits & 0x80) << 8) | (magnitude << 7)).to(tl.uint16)
        result = bits.to(tl.float16, bitcast=True)
    else:
        result = x
    return result


@jit
def load_part(rows, inside, column, there):
    """Some columns at the pointers `rows`; 0 in rows not `inside` and columns not `there`, which are not read."""
    return tl.load(rows[:, None] + column[None, :], mask=inside[:, None] & there[None, :], other=0)


@jit
def add_scores(scores, q, k, SINGLE: constexpr, PRECISION: constexpr):
    """scores [rows, keys] plus q [rows, columns] · kᵀ [columns, keys], fp32."""
    if SINGLE:
        result = scores + tl.sum(q.to(tl.float32) * k.to(tl.float32), axis=1)[None, :]
    else:
        result = tl.dot(q, tl.trans(k.to(q.dtype)), scores, input_precision=PRECISION)
    return result


@jit
def add_turned(scores, query_rows, inside, key_slots, visible, key_cos, key_sin,
               DIM: constexpr, WIDTH: constexpr, INTERLEAVED: constexpr, FLOAT8: constexpr, SINGLE: constexpr,
               BLOCK_PAIR: constexpr, BLOCK_REST: constexpr, PRECISION: constexpr):  # fmt: skip
    """`add_scores` of whole keys that are turned first, by the angles at the pointers key_cos and key_sin."""
    pair = tl.arange(0, BLOCK_PAIR)
    there = pair < WIDTH
    first = 2 * pair if INTERLEAVED else pair
    second = 2 * pair + 1 if INTERLEAVED else pair + WIDTH
    x = number(load_part(key_slots, visible, first, there), FLOAT8).to(tl.float32)
    y = number(load_part(key_slots, visible, second, there), FLOAT8).to(tl.float32)
    c = load_part(key_cos, visible, pair, there).to(tl.float32)
    s = load_part(key_sin, visible, pair, there).to(tl.float32)
    scores = add_scores(scores, load_part(query_rows, inside, first, there), x * c - y * s, SINGLE, PRECISION)
    scores = add_scores(scores, load_part(query_rows, inside, second, there), y * c + x * s, SINGLE, PRECISION)
    if 2 * WIDTH < DIM:
        column = 2 * WIDTH + tl.arange(0, BLOCK_REST)
        k = number(load_part(key_slots, visible, column, column < DIM), FLOAT8)
        scores = add_scores(scores, load_part(query_rows, inside, column, column < DIM), k, SINGLE, PRECISION)
    return scores


@jit
def attend_kernel(
    query, key, value, mask, logit_bias, key_cos, key_sin, key_scale, value_scale, position, valid, chunk,
    sums, statistics, scale, num_tokens, num_heads, num_kv_heads, heads_per_key, retrieved_length, num_slots,
    chunk_size, row_tiles, key_tiles, num_rows,
    query_b, query_t, query_h, key_b, key_k, key_r, key_h, value_b, value_k, value_r, value_h, mask_b, mask_k, mask_r,
    key_scale_b, key_scale_k, key_scale_r, value_scale_b, value_scale_k, value_scale_r, key_cos_r, key_sin_r,
    DIM: constexpr, VALUE_DIM: constexpr, WIDTH: constexpr, INTERLEAVED: constexpr, KEY_FLOAT8: constexpr,
    VALUE_FLOAT8: constexpr, BIAS_PER_SLOT: constexpr, SINGLE: constexpr, BLOCK_ROWS: constexpr,
    BLOCK_KEYS: constexpr, BLOCK_DIM: constexpr, BLOCK_VALUE: constexpr, BLOCK_PAIR: constexpr,
    BLOCK_REST: constexpr, PRECISION: constexpr,
):  # fmt: skip
    """Program (sequence, key tile, key/value head, row tile), the last fastest: programs that read the same keys run
    side by side, and so do those whose keys are side by side. Sums relative to the tile's own maximum."""
    item = tl.program_id(0)
    row = item % row_tiles * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    item = item // row_tiles
    kv_head = item % num_kv_heads
    item = item // num_kv_heads
    tile = item % key_tiles
    batch = (item // key_tiles).to(tl.int64)

    token = row // heads_per_key
    head = kv_head * heads_per_key + row % heads_per_key
    attends, _ = states_of(token, batch, position, valid, chunk, chunk_size)
    inside = attends & (token < num_tokens)
    if tl.max(inside.to(tl.int32), axis=0) == 0:  # nothing of the cache is read
        return
    at = (batch * num_tokens + token) * num_heads + head

    slot = tile * BLOCK_KEYS + tl.arange(0, BLOCK_KEYS)
    neighbour = (slot // retrieved_length).to(tl.int64)
    place = (slot % retrieved_length).to(tl.int64)
    visible = slot < num_slots
    if mask is not None:
        visible = visible & (
            tl.load(mask + batch * mask_b + neighbour * mask_k + place * mask_r, mask=visible, other=0) != 0
        )
    key_slots = key + batch * key_b + kv_head.to(tl.int64) * key_h + neighbour * key_k + place * key_r
    value_slots = value + batch * value_b + kv_head.to(tl.int64) * value_h + neighbour * value_k + place * value_r
    query_rows = query + batch * query_b + token.to(tl.int64) * query_t + head.to(tl.int64) * query_h

    value_column = tl.arange(0, BLOCK_VALUE)
    if VALUE_DIM <= BLOCK_VALUE:  # on its way while the softmax waits for the keys
        v = load_part(value_slots, visible, value_column, value_column < VALUE_DIM)

    scores = tl.zeros([BLOCK_ROWS, BLOCK_KEYS], tl.float32)
    if WIDTH > 0:
        scores = add_turned(
            scores, query_rows, inside, key_slots, visible, key_cos + place * key_cos_r, key_sin + place * key_sin_r,
            DIM, WIDTH, INTERLEAVED, KEY_FLOAT8, SINGLE, BLOCK_PAIR, BLOCK_REST, PRECISION,
        )  # fmt: skip
    else:
        for start in range(0, DIM, BLOCK_DIM):
            column = start + tl.arange(0, BLOCK_DIM)
            q = load_part(query_rows, inside, column, column < DIM)
            k = number(load_part(key_slots, visible, column, column < DIM), KEY_FLOAT8)
            scores = add_scores(scores, q, k, SINGLE, PRECISION)

    factor = scale * LOG2_E
    if KEY_FLOAT8:
        factor = factor * 256.0
    if key_scale is not None:
        of_slot = tl.load(key_scale + batch * key_scale_b + neighbour * key_scale_k + place * key_scale_r,
                          mask=visible, other=0.0)  # fmt: skip
        scores *= (factor * of_slot)[None, :]
    else:
        scores *= factor
    if logit_bias is not None:
        rows = logit_bias + at * (num_slots if BIAS_PER_SLOT else retrieved_length)
        there = inside[:, None] & visible[None, :]
        at_slot = slot if BIAS_PER_SLOT else place
        scores += bias_in_bits(tl.load(rows[:, None] + at_slot[None, :], mask=there, other=0.0))
    scores = tl.where(visible[None, :], scores, float("-inf"))
    largest = tl.max(scores, axis=1)
    weights = tl.exp2(scores - finite(largest)[:, None])
    tl.store(statistics + tile.to(tl.int64) * num_rows + at, largest, mask=inside)
    tl.store(statistics + (key_tiles + tile).to(tl.int64) * num_rows + at, tl.sum(weights, axis=1), mask=inside)

    back = 1.0
    if value_scale is not None:
        of_slot = tl.load(value_scale + batch * value_scale_b + neighbour * value_scale_k + place * value_scale_r,
                          mask=visible, other=0.0)  # fmt: skip
        # Relative to the tile's largest: a weight times a small scale would be no normal half.
        back = tl.max(tl.abs(of_slot), axis=0)
        back = tl.where(back == 0.0, 1.0, back)
        weights *= (of_slot / back)[None, :]
    if VALUE_FLOAT8:
        back = back * 256.0
    to = sums + (tile.to(tl.int64) * num_rows + at) * VALUE_DIM
    for start in range(0, VALUE_DIM, BLOCK_VALUE):
        column = start + value_column
        if VALUE_DIM > BLOCK_VALUE:
            v = load_part(value_slots, visible, column, column < VALUE_DIM)
        x = number(v, VALUE_FLOAT8)
        if SINGLE:
            total = tl.sum(tl.reshape(weights, [BLOCK_KEYS])[:, None] * x.to(tl.float32), axis=0)[None, :]
        else:
            like = query.dtype.element_ty
            total = tl.dot(weights.to(like), x.to(like), input_precision=PRECISION)
        tl.store(to[:, None] + column[None, :], total * back, mask=inside[:, None] & (column < VALUE_DIM)[None, :])


@jit
def combine_kernel(
    sums, statistics, null_logit, null_value, position, valid, chunk, out, lse, num_tokens, num_heads, chunk_size,
    key_tiles, value_blocks, num_rows, null_value_h,
    VALUE_DIM: constexpr, BLOCK_TILES: constexpr, BLOCK_VALUE: constexpr,
):  # fmt: skip
    """Program (row, block of value columns): the tiles' sums in order, then the null slot. It writes every row, those
    that do not attend, of which there are no sums, with 0 or NaN."""
    block = tl.program_id(0) % value_blocks
    at = (tl.program_id(0) // value_blocks).to(tl.int64)
    head = at % num_heads
    token = at // num_heads % num_tokens
    attends, idle = states_of(token, at // num_heads // num_tokens, position, valid, chunk, chunk_size)
    column = block * BLOCK_VALUE + tl.arange(0, BLOCK_VALUE)
    inside = column < VALUE_DIM

    largest = tl.full([], float("-inf"), tl.float32)
    total = tl.zeros([], tl.float32)
    accumulator = tl.zeros([BLOCK_VALUE], tl.float32)
    for first in range(0, tl.where(attends, key_tiles, 0), BLOCK_TILES):
        tile = (first + tl.arange(0, BLOCK_TILES)).to(tl.int64)
        there = tile < key_tiles
        of_tile = tl.load(statistics + tile * num_rows + at, mask=there, other=float("-inf"))
        part_total = tl.load(statistics + (key_tiles + tile) * num_rows + at, mask=there, other=0.0)
        part = load_part(sums + (tile * num_rows + at) * VALUE_DIM, there, column, inside)
        larger = tl.maximum(largest, tl.max(of_tile, axis=0))
        base = finite(larger)
        shrink = tl.exp2(largest - base)
        weight = tl.exp2(of_tile - base)
        total = total * shrink + tl.sum(weight * part_total, axis=0)
        accumulator = accumulator * shrink + tl.sum(weight[:, None] * part, axis=0)
        largest = larger
    if null_logit is not None:
        logit = bias_in_bits(tl.load(null_logit + at))  # saturated, so no contraction of the product with what follows
        larger = tl.maximum(largest, logit)
        base = finite(larger)
        shrink = tl.exp2(largest - base)
        weight = tl.exp2(logit - base)
        total = total * shrink + weight
        accumulator = accumulator * shrink
        if null_value is not None:
            x = tl.load(null_value + head * null_value_h + column, mask=inside, other=0.0)
            accumulator += weight * x.to(tl.float32)
        largest = larger

    accumulator = tl.where(attends, accumulator * inverse(total), tl.where(idle, 0.0, float("nan")))
    tl.store(out + at * VALUE_DIM + column, accumulator.to(out.dtype.element_ty), mask=inside)
    total = tl.where(attends, total, tl.where(idle, 0.0, float("nan")))
    store_lse(lse, None, at, largest, total, block == 0)
