"""The two launches of decoding: partial sums of key tiles, and their combination."""

from __future__ import annotations

from typing import Any, NamedTuple

from ...attention.triton.arguments import jit, triton

if triton is not None:
    from ...attention.triton.tiles import LOG2_E, bias_in_bits, constexpr, finite, inverse, store_lse, tanh, tl


class Query(NamedTuple):
    """[b, t, h, d]."""

    data: Any
    b: int
    t: int
    h: int


class Cache(NamedTuple):
    """key and value [b, k, r, hk, d]."""

    data: Any
    b: int
    k: int
    r: int
    h: int


class PerSlot(NamedTuple):
    """The mask as bytes, and the scales of keys and values [b, k, r]."""

    data: Any
    b: int
    k: int
    r: int


class KeyRotary(NamedTuple):
    """Tables by token [r, w]."""

    key_cos: Any
    key_sin: Any
    cos_r: int
    sin_r: int


class NullValue(NamedTuple):
    """[h, d_value]."""

    data: Any
    h: int


class Positions(NamedTuple):
    """position [b], valid [b] as bytes or None, chunk [b] or None."""

    position: Any
    valid: Any
    chunk: Any


class Scratch(NamedTuple):
    """What the first launch leaves for the second, contiguous fp32: sums [tiles, b, t, h, d_value], statistics [2,
    tiles, b, t, h], the tiles' largest logit in bits and their sum of weights."""

    sums: Any
    statistics: Any


class Spec(NamedTuple):
    """What the first kernel is compiled for. WIDTH: rotary pairs of keys that are turned, else 0; such a key is held
    whole, in BLOCK_PAIR and BLOCK_REST columns, and others in blocks of BLOCK_DIM. SINGLE: one row, and no matrix
    product."""

    DIM: int
    VALUE_DIM: int
    WIDTH: int
    INTERLEAVED: bool
    KEY_FLOAT8: bool
    VALUE_FLOAT8: bool
    BIAS_PER_SLOT: bool
    SOFTCAP: bool
    SINGLE: bool
    BLOCK_ROWS: int
    BLOCK_KEYS: int
    BLOCK_DIM: int
    BLOCK_VALUE: int
    BLOCK_PAIR: int
    BLOCK_REST: int
    PRECISION: str


@jit
def states_of(token, batch, positions, chunk_size):
    """Which tokens of a sequence attend, and which are idle (common.py); the others are beyond the border."""
    start = tl.load(positions.position + batch)
    place = start + token
    since = place - (chunk_size - 1)
    if positions.chunk is not None:
        held = tl.load(positions.chunk + batch)
    else:
        held = tl.maximum(start - (chunk_size - 1), 0) // chunk_size
    attends = (since >= 0) & (since // chunk_size == held)
    idle = (since < 0) & (place >= 0)
    if positions.valid is not None:
        # loaded for every token: the interpreter cannot combine a scalar's comparison with a tile's
        counts = tl.load(positions.valid + batch + token * 0) != 0
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
def add_scores(scores, q, k, SPEC):
    """scores [rows, keys] plus q [rows, columns] · kᵀ [columns, keys], fp32."""
    if SPEC.SINGLE:
        result = scores + tl.sum(q.to(tl.float32) * k.to(tl.float32), axis=1)[None, :]
    else:
        result = tl.dot(q, tl.trans(k.to(q.dtype)), scores, input_precision=SPEC.PRECISION)
    return result


@jit
def add_turned(scores, query_rows, inside, key_slots, visible, place, rotary, SPEC):
    """`add_scores` of whole keys that are turned first, by the angles of their `place`."""
    pair = tl.arange(0, SPEC.BLOCK_PAIR)
    there = pair < SPEC.WIDTH
    first = 2 * pair if SPEC.INTERLEAVED else pair
    second = 2 * pair + 1 if SPEC.INTERLEAVED else pair + SPEC.WIDTH
    x = number(load_part(key_slots, visible, first, there), SPEC.KEY_FLOAT8).to(tl.float32)
    y = number(load_part(key_slots, visible, second, there), SPEC.KEY_FLOAT8).to(tl.float32)
    c = load_part(rotary.key_cos + place * rotary.cos_r, visible, pair, there).to(tl.float32)
    s = load_part(rotary.key_sin + place * rotary.sin_r, visible, pair, there).to(tl.float32)
    scores = add_scores(scores, load_part(query_rows, inside, first, there), x * c - y * s, SPEC)
    scores = add_scores(scores, load_part(query_rows, inside, second, there), y * c + x * s, SPEC)
    if 2 * SPEC.WIDTH < SPEC.DIM:
        column = 2 * SPEC.WIDTH + tl.arange(0, SPEC.BLOCK_REST)
        k = number(load_part(key_slots, visible, column, column < SPEC.DIM), SPEC.KEY_FLOAT8)
        scores = add_scores(scores, load_part(query_rows, inside, column, column < SPEC.DIM), k, SPEC)
    return scores


@jit
def at_slots(x, batch, neighbour, place):
    """Pointers to a sequence's slots, of a mask or scales."""
    return x.data + batch * x.b + neighbour * x.k + place * x.r


@jit
def attend_kernel(
    query,
    key,
    value,
    mask,
    logit_bias,
    rotary,
    key_scale,
    value_scale,
    positions,
    scratch,
    scale,
    softcap,
    num_tokens,
    num_heads,
    heads_per_key,
    retrieved_length,
    num_slots,
    chunk_size,
    num_rows,
    SPEC,
):
    """Program (sequence, key tile, key/value head, row tile), the last fastest: programs that read the same keys run
    side by side, and so do those whose keys are side by side. Sums relative to the tile's own maximum. num_rows: b * t
    * h."""
    row_tiles = tl.cdiv(num_tokens * heads_per_key, SPEC.BLOCK_ROWS)
    key_tiles = tl.cdiv(num_slots, SPEC.BLOCK_KEYS)
    num_kv_heads = num_heads // heads_per_key
    item = tl.program_id(0)
    row = item % row_tiles * SPEC.BLOCK_ROWS + tl.arange(0, SPEC.BLOCK_ROWS)
    item = item // row_tiles
    kv_head = item % num_kv_heads
    item = item // num_kv_heads
    tile = item % key_tiles
    batch = (item // key_tiles).to(tl.int64)

    token = row // heads_per_key
    head = kv_head * heads_per_key + row % heads_per_key
    attends, _ = states_of(token, batch, positions, chunk_size)
    inside = attends & (token < num_tokens)
    if tl.max(inside.to(tl.int32), axis=0) == 0:  # nothing of the cache is read
        return
    at = (batch * num_tokens + token) * num_heads + head

    slot = tile * SPEC.BLOCK_KEYS + tl.arange(0, SPEC.BLOCK_KEYS)
    neighbour = (slot // retrieved_length).to(tl.int64)
    place = (slot % retrieved_length).to(tl.int64)
    visible = slot < num_slots
    if mask is not None:
        visible = visible & (tl.load(at_slots(mask, batch, neighbour, place), mask=visible, other=0) != 0)
    key_slots = key.data + batch * key.b + kv_head.to(tl.int64) * key.h + neighbour * key.k + place * key.r
    value_slots = value.data + batch * value.b + kv_head.to(tl.int64) * value.h + neighbour * value.k + place * value.r
    query_rows = query.data + batch * query.b + token.to(tl.int64) * query.t + head.to(tl.int64) * query.h

    value_column = tl.arange(0, SPEC.BLOCK_VALUE)
    if SPEC.VALUE_DIM <= SPEC.BLOCK_VALUE:  # on its way while the softmax waits for the keys
        v = load_part(value_slots, visible, value_column, value_column < SPEC.VALUE_DIM)

    scores = tl.zeros([SPEC.BLOCK_ROWS, SPEC.BLOCK_KEYS], tl.float32)
    if SPEC.WIDTH > 0:
        scores = add_turned(scores, query_rows, inside, key_slots, visible, place, rotary, SPEC)
    else:
        for start in range(0, SPEC.DIM, SPEC.BLOCK_DIM):
            column = start + tl.arange(0, SPEC.BLOCK_DIM)
            q = load_part(query_rows, inside, column, column < SPEC.DIM)
            k = number(load_part(key_slots, visible, column, column < SPEC.DIM), SPEC.KEY_FLOAT8)
            scores = add_scores(scores, q, k, SPEC)

    factor = scale / softcap if SPEC.SOFTCAP else scale * LOG2_E
    if SPEC.KEY_FLOAT8:
        factor = factor * 256.0
    if key_scale is not None:
        of_slot = tl.load(at_slots(key_scale, batch, neighbour, place), mask=visible, other=0.0)
        scores *= (factor * of_slot)[None, :]
    else:
        scores *= factor
    if SPEC.SOFTCAP:
        scores = tanh(scores) * (softcap * LOG2_E)
    if logit_bias is not None:
        rows = logit_bias + at * (num_slots if SPEC.BIAS_PER_SLOT else retrieved_length)
        there = inside[:, None] & visible[None, :]
        at_slot = slot if SPEC.BIAS_PER_SLOT else place
        scores += bias_in_bits(tl.load(rows[:, None] + at_slot[None, :], mask=there, other=0.0))
    scores = tl.where(visible[None, :], scores, float("-inf"))
    largest = tl.max(scores, axis=1)
    weights = tl.exp2(scores - finite(largest)[:, None])
    tl.store(scratch.statistics + tile.to(tl.int64) * num_rows + at, largest, mask=inside)
    of_weights = scratch.statistics + (key_tiles + tile).to(tl.int64) * num_rows
    tl.store(of_weights + at, tl.sum(weights, axis=1), mask=inside)

    back = 1.0
    if value_scale is not None:
        of_slot = tl.load(at_slots(value_scale, batch, neighbour, place), mask=visible, other=0.0)
        # Relative to the tile's largest: a weight times a small scale would be no normal half.
        back = tl.max(tl.abs(of_slot), axis=0)
        back = tl.where(back == 0.0, 1.0, back)
        weights *= (of_slot / back)[None, :]
    if SPEC.VALUE_FLOAT8:
        back = back * 256.0
    to = scratch.sums + (tile.to(tl.int64) * num_rows + at) * SPEC.VALUE_DIM
    for start in range(0, SPEC.VALUE_DIM, SPEC.BLOCK_VALUE):
        column = start + value_column
        value_there = column < SPEC.VALUE_DIM
        if SPEC.VALUE_DIM > SPEC.BLOCK_VALUE:
            v = load_part(value_slots, visible, column, value_there)
        x = number(v, SPEC.VALUE_FLOAT8)
        if SPEC.SINGLE:
            total = tl.sum(tl.reshape(weights, [SPEC.BLOCK_KEYS])[:, None] * x.to(tl.float32), axis=0)[None, :]
        else:
            like = query.data.dtype.element_ty
            total = tl.dot(weights.to(like), x.to(like), input_precision=SPEC.PRECISION)
        tl.store(to[:, None] + column[None, :], total * back, mask=inside[:, None] & value_there[None, :])


@jit
def combine_kernel(
    scratch,
    null_logit,
    null_value,
    positions,
    results,
    num_tokens,
    num_heads,
    num_slots,
    chunk_size,
    num_rows,
    BLOCK_KEYS: constexpr,
    VALUE_DIM: constexpr,
    BLOCK_TILES: constexpr,
    BLOCK_VALUE: constexpr,
):
    """Program (row, block of value columns): the tiles' sums in order, then the null slot. It writes every row, those
    that do not attend, of which there are no sums, with 0 or NaN. The tiles are of BLOCK_KEYS slots."""
    key_tiles = tl.cdiv(num_slots, BLOCK_KEYS)
    value_blocks = (VALUE_DIM + BLOCK_VALUE - 1) // BLOCK_VALUE
    block = tl.program_id(0) % value_blocks
    at = (tl.program_id(0) // value_blocks).to(tl.int64)
    head = at % num_heads
    token = at // num_heads % num_tokens
    attends, idle = states_of(token, at // num_heads // num_tokens, positions, chunk_size)
    column = block * BLOCK_VALUE + tl.arange(0, BLOCK_VALUE)
    inside = column < VALUE_DIM

    largest = tl.full([], float("-inf"), tl.float32)
    total = tl.zeros([], tl.float32)
    accumulator = tl.zeros([BLOCK_VALUE], tl.float32)
    for first in range(0, tl.where(attends, key_tiles, 0), BLOCK_TILES):
        tile = (first + tl.arange(0, BLOCK_TILES)).to(tl.int64)
        there = tile < key_tiles
        of_tile = tl.load(scratch.statistics + tile * num_rows + at, mask=there, other=float("-inf"))
        part_total = tl.load(scratch.statistics + (key_tiles + tile) * num_rows + at, mask=there, other=0.0)
        part = load_part(scratch.sums + (tile * num_rows + at) * VALUE_DIM, there, column, inside)
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
            x = tl.load(null_value.data + head * null_value.h + column, mask=inside, other=0.0)
            accumulator += weight * x.to(tl.float32)
        largest = larger

    accumulator = tl.where(attends, accumulator * inverse(total), tl.where(idle, 0.0, float("nan")))
    tl.store(results.out + at * VALUE_DIM + column, accumulator.to(results.out.dtype.element_ty), mask=inside)
    total = tl.where(attends, total, tl.where(idle, 0.0, float("nan")))
    store_lse(results, at, largest, total, block == 0)
