"""What the Triton kernels are made of: which rows and slots a program holds, loads, products, relative positions and
dropout of one tile.

A tile of queries or keys is "split" in three: the first and the second members of the rotary pairs, and the dimensions
that do not turn. WIDTH is the number of pairs; where it is 0, or pairs are all there is, the missing parts repeat
another one and are never used. TRANSPOSED tiles of logits are [keys, rows] instead of [rows, keys].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .. import common

import_error: str | None = None
try:
    import triton
    import triton.language as tl
    from triton.language import constexpr
except ImportError as error:
    triton = None
    import_error = f"{type(error).__name__}: {error}"
else:
    CLOCK = constexpr(common.CLOCK)
    NEIGHBOUR = constexpr(common.NEIGHBOUR)
    CHUNK = constexpr(common.CHUNK)
    LOG2_E = constexpr(1.4426950408889634)
    LN_2 = constexpr(0.6931471805599453)
    LARGEST = constexpr(3.4028234663852886e38)  # of fp32's finite numbers

# Never specialised: a kernel is not compiled again for another batch, length or number of neighbours.
LENGTHS = (
    "num_tokens", "num_places", "place_l", "place_k", "num_neighbours", "retrieved_length", "query_neighbours",
    "num_heads", "heads_per_key", "num_chunks", "first_group", "num_groups", "row_tiles", "key_tiles", "stride",
    "first_token", "num_distances", "threshold", "sharing", "num_items", "num_copies", "table_rows", "table_columns",
)  # fmt: skip


def jit(function: Callable) -> Any:
    if triton is None:
        return function
    names = function.__code__.co_varnames[: function.__code__.co_argcount]
    return triton.jit(function, do_not_specialize=[name for name in names if name in LENGTHS])


@jit
def wide(index, LONG: constexpr):
    """An index about to be multiplied by a stride: 64-bit where some offset inside a group needs it."""
    return index.to(tl.int64) if LONG else index


@jit
def finite(x):
    """x, an infinity as the largest finite number of its sign. What a softmax subtracts is finite, since inf - inf is
    NaN: so the weights of a row that has seen nothing yet sum to 0, and those of a row with a logit of +inf to +inf,
    which no other row's do. Of NaN it means nothing: `tl.max` may drop a NaN, but its row's sum is NaN all the same."""
    return tl.minimum(tl.maximum(x, -LARGEST), LARGEST)


@jit
def inverse(total):
    """One over a row's sum of weights: 1 where it saw nothing, and NaN beside a logit of +inf, as in PyTorch."""
    return tl.where(total == float("inf"), float("nan"), 1.0 / tl.where(total == 0.0, 1.0, total))


@jit
def at_most_one(exponent):
    """2 to the power of a logit less its row's log-sum-exp. The difference may exceed 0, by the rounding of the
    log-sum-exp and of what is contracted with the subtraction: by any amount where logits are large. NaN passes."""
    return tl.exp2(tl.minimum(exponent, 0.0, propagate_nan=tl.PropagateNan.ALL))


@jit
def bias_in_bits(bias):
    """A finite bias saturates: as a mask, finfo.min is no -inf. NaN and infinities pass."""
    bias = bias.to(tl.float32)
    bits = tl.maximum(bias * LOG2_E, -LARGEST, propagate_nan=tl.PropagateNan.ALL)
    bits = tl.minimum(bits, LARGEST, propagate_nan=tl.PropagateNan.ALL)
    return tl.where(tl.abs(bias) == float("inf"), bias, bits)


@jit
def store_lse(lse, log_sum, at, largest, total, inside):
    """The log-sum-exp of rows, exactly -inf where nothing was seen; with a bias the two planes of common.py."""
    logarithm = tl.log2(total)
    if log_sum is None:
        tl.store(lse + at, tl.where(total == 0.0, float("-inf"), (largest + logarithm) * LN_2), mask=inside)
    else:
        highest = tl.where(total == 0.0, float("-inf"), tl.where(total == total, largest, total))
        tl.store(lse + at, highest, mask=inside)
        tl.store(log_sum + at, tl.where((total > 0.0) & (total < float("inf")), logarithm, 0.0), mask=inside)


@jit
def load_lse(lse, log_sum, at, inside):
    """Which rows pass a gradient, and their log-sum-exp in bits, with a bias in two parts: +inf where nothing was seen,
    which has weights of 0, and NaN beside a logit of +inf, which has none but NaN."""
    stored = tl.load(lse + at, mask=inside, other=float("-inf"))
    alive = stored != float("-inf")
    bits = tl.where(stored == float("inf"), float("nan"), stored if log_sum is not None else stored * LOG2_E)
    bits = tl.where(alive, bits, float("inf"))
    rest = bits  # without a bias it is not used
    if log_sum is not None:
        rest = tl.load(log_sum + at, mask=alive, other=0.0)
    return alive, bits, rest


@jit
def group_of(group, batch, chunk_spans, num_chunks, query_neighbours, stride, first_token,
             GROUPING: constexpr):  # fmt: skip
    """Group number `group` of a sequence: chunk, neighbour, first token and number of rows (common.py)."""
    chunk = group
    neighbour = tl.full([], 0, tl.int32)
    start = tl.full([], 0, tl.int32)
    count = stride
    if GROUPING == NEIGHBOUR:
        chunk = group // query_neighbours
        neighbour = group % query_neighbours
    if GROUPING == CLOCK:
        if chunk_spans is not None:
            span = chunk_spans + (batch * num_chunks + chunk) * 2
            start = tl.load(span)
            count = tl.load(span + 1)
        else:
            start = first_token + chunk * stride
    return chunk, neighbour, start, count


@jit
def row_tile_of(tile, neighbour, num_tokens, GROUPING: constexpr, BLOCK_ROWS: constexpr):
    """Row tile number `tile` of a group: whose neighbour's rows, and the first of them."""
    if GROUPING == CHUNK:
        tiles = tl.cdiv(num_tokens, BLOCK_ROWS)
        neighbour = tile // tiles
        tile = tile % tiles
    return neighbour, tile * BLOCK_ROWS


@jit
def rows_of(first_row, start, count, num_tokens, BLOCK_ROWS: constexpr):
    """Rows of a tile, and which of them are tokens."""
    row = first_row + tl.arange(0, BLOCK_ROWS)
    return row, (row < count) & (start + row >= 0) & (start + row < num_tokens)


@jit
def slots_of(tile, num_neighbours, retrieved_length, BLOCK_KEYS: constexpr, GROUPING: constexpr, WITHIN: constexpr):
    """The slots of key tile number `tile`: slot, neighbour, token, whether it exists; and the tile's first slot and
    token. WITHIN: no tile holds two neighbours, so that its tokens are a run."""
    lane = tl.arange(0, BLOCK_KEYS)
    if WITHIN:
        tiles = tl.cdiv(retrieved_length, BLOCK_KEYS)
        first_token = (tile % tiles) * BLOCK_KEYS
        neighbour = tile // tiles + tl.zeros([BLOCK_KEYS], tl.int32)
        token = first_token + lane
        first_slot = tile // tiles * retrieved_length + first_token
        slot = first_slot + lane
        present = token < retrieved_length
    else:
        first_slot = tile * BLOCK_KEYS
        first_token = first_slot
        slot = first_slot + lane
        if GROUPING == CLOCK:
            neighbour = slot // retrieved_length
            token = slot - neighbour * retrieved_length
        else:
            neighbour = tl.zeros([BLOCK_KEYS], tl.int32)
            token = slot
        present = slot < num_neighbours * retrieved_length
    return slot, neighbour, token, present, first_slot, first_token


@jit
def slot_offsets(slot, neighbour, token, stride_k, stride_r, GROUPING: constexpr, FLAT: constexpr, LONG: constexpr):
    """Element offsets of slots. FLAT: stride_k is retrieved_length * stride_r, so no slot needs dividing."""
    if FLAT or GROUPING != CLOCK:
        offsets = wide(slot, LONG) * stride_r
    else:
        offsets = wide(neighbour, LONG) * stride_k + wide(token, LONG) * stride_r
    return offsets


@jit
def load_split(rows, inside, cos, sin, DIM: constexpr, WIDTH: constexpr, INTERLEAVED: constexpr,
               BLOCK_PAIR: constexpr, BLOCK_REST: constexpr):  # fmt: skip
    """Vectors at the pointers `rows`, split and rotated. Rows not `inside` are not read and come as 0."""
    pair = tl.arange(0, BLOCK_PAIR)
    if 2 * WIDTH < DIM:
        column = 2 * WIDTH + tl.arange(0, BLOCK_REST)
        rest = tl.load(rows[:, None] + column[None, :], mask=inside[:, None] & (column < DIM)[None, :], other=0.0)
    if WIDTH > 0:
        first_column = 2 * pair if INTERLEAVED else pair
        second_column = 2 * pair + 1 if INTERLEAVED else pair + WIDTH
        there = inside[:, None] & (pair < WIDTH)[None, :]
        x = tl.load(rows[:, None] + first_column[None, :], mask=there, other=0.0)
        y = tl.load(rows[:, None] + second_column[None, :], mask=there, other=0.0)
        c = tl.load(cos[:, None] + pair[None, :], mask=there, other=0.0).to(tl.float32)
        s = tl.load(sin[:, None] + pair[None, :], mask=there, other=0.0).to(tl.float32)
        first = (x.to(tl.float32) * c - y.to(tl.float32) * s).to(x.dtype)
        second = (x.to(tl.float32) * s + y.to(tl.float32) * c).to(x.dtype)
    if WIDTH == 0:
        first = rest
        second = rest
    if 2 * WIDTH == DIM:
        rest = first
    return first, second, rest


@jit
def load_vector(vector, DIM: constexpr, WIDTH: constexpr, INTERLEAVED: constexpr,
                BLOCK_PAIR: constexpr, BLOCK_REST: constexpr):  # fmt: skip
    """One vector, split as `load_split` does and not rotated, in fp32."""
    pair = tl.arange(0, BLOCK_PAIR)
    if 2 * WIDTH < DIM:
        column = 2 * WIDTH + tl.arange(0, BLOCK_REST)
        rest = tl.load(vector + column, mask=column < DIM, other=0.0).to(tl.float32)
    if WIDTH > 0:
        first_column = 2 * pair if INTERLEAVED else pair
        second_column = 2 * pair + 1 if INTERLEAVED else pair + WIDTH
        first = tl.load(vector + first_column, mask=pair < WIDTH, other=0.0).to(tl.float32)
        second = tl.load(vector + second_column, mask=pair < WIDTH, other=0.0).to(tl.float32)
    if WIDTH == 0:
        first = rest
        second = rest
    if 2 * WIDTH == DIM:
        rest = first
    return first, second, rest


@jit
def store_vector(vector, x, DIM: constexpr, WIDTH: constexpr, INTERLEAVED: constexpr,
                 BLOCK_PAIR: constexpr, BLOCK_REST: constexpr):  # fmt: skip
    """What `load_vector` loads, stored."""
    pair = tl.arange(0, BLOCK_PAIR)
    if 2 * WIDTH < DIM:
        column = 2 * WIDTH + tl.arange(0, BLOCK_REST)
        tl.store(vector + column, x[2], mask=column < DIM)
    if WIDTH > 0:
        first_column = 2 * pair if INTERLEAVED else pair
        second_column = 2 * pair + 1 if INTERLEAVED else pair + WIDTH
        tl.store(vector + first_column, x[0], mask=pair < WIDTH)
        tl.store(vector + second_column, x[1], mask=pair < WIDTH)


@jit
def store_split(rows, inside, cos, sin, tile, factor, DIM: constexpr, WIDTH: constexpr, INTERLEAVED: constexpr,
                BLOCK_PAIR: constexpr, BLOCK_REST: constexpr):  # fmt: skip
    """The gradient of `load_split`: `factor` times an fp32 tile, turned back and stored at the pointers `rows`."""
    pair = tl.arange(0, BLOCK_PAIR)
    if 2 * WIDTH < DIM:
        column = 2 * WIDTH + tl.arange(0, BLOCK_REST)
        there = inside[:, None] & (column < DIM)[None, :]
        tl.store(rows[:, None] + column[None, :], (factor * tile[2]).to(rows.dtype.element_ty), mask=there)
    if WIDTH > 0:
        first_column = 2 * pair if INTERLEAVED else pair
        second_column = 2 * pair + 1 if INTERLEAVED else pair + WIDTH
        there = inside[:, None] & (pair < WIDTH)[None, :]
        c = factor * tl.load(cos[:, None] + pair[None, :], mask=there, other=0.0).to(tl.float32)
        s = factor * tl.load(sin[:, None] + pair[None, :], mask=there, other=0.0).to(tl.float32)
        x = tile[0] * c + tile[1] * s
        y = tile[1] * c - tile[0] * s
        tl.store(rows[:, None] + first_column[None, :], x.to(rows.dtype.element_ty), mask=there)
        tl.store(rows[:, None] + second_column[None, :], y.to(rows.dtype.element_ty), mask=there)


@jit
def zeros_split(ROWS: constexpr, BLOCK_PAIR: constexpr, BLOCK_REST: constexpr):
    pair = tl.zeros([ROWS, BLOCK_PAIR], tl.float32)
    return pair, pair, tl.zeros([ROWS, BLOCK_REST], tl.float32)


@jit
def where_split(there, tile):
    """0 in the rows that are not `there`."""
    return (
        tl.where(there[:, None], tile[0], 0.0),
        tl.where(there[:, None], tile[1], 0.0),
        tl.where(there[:, None], tile[2], 0.0),
    )


@jit
def plus_vector(tile, vector, DIM: constexpr, BLOCK_REST: constexpr):
    """An unrotated split tile plus a vector, rounded to the tile's dtype."""
    column = tl.arange(0, BLOCK_REST)
    x = tl.load(vector + column, mask=column < DIM, other=0.0).to(tl.float32)
    rest = (tile[2].to(tl.float32) + x[None, :]).to(tile[2].dtype)
    return rest, rest, rest


@jit
def product(a, b, DIM: constexpr, WIDTH: constexpr, PRECISION: constexpr):
    """a · bᵀ of two split tiles, fp32."""
    if 2 * WIDTH < DIM:
        result = tl.dot(a[2], tl.trans(b[2]), input_precision=PRECISION)
        if WIDTH > 0:
            result = tl.dot(a[0], tl.trans(b[0]), result, input_precision=PRECISION)
            result = tl.dot(a[1], tl.trans(b[1]), result, input_precision=PRECISION)
    else:
        result = tl.dot(a[0], tl.trans(b[0]), input_precision=PRECISION)
        result = tl.dot(a[1], tl.trans(b[1]), result, input_precision=PRECISION)
    return result


@jit
def add_product(accumulator, a, b, DIM: constexpr, WIDTH: constexpr, PRECISION: constexpr):
    """The split accumulator plus a · b."""
    first, second, rest = accumulator
    if 2 * WIDTH < DIM:
        rest = tl.dot(a, b[2], rest, input_precision=PRECISION)
    if WIDTH > 0:
        first = tl.dot(a, b[0], first, input_precision=PRECISION)
        second = tl.dot(a, b[1], second, input_precision=PRECISION)
    return first, second, rest


@jit
def vector_product(tile, vector, DIM: constexpr, WIDTH: constexpr):
    """Each row of a split tile times a split vector, fp32."""
    if 2 * WIDTH < DIM:
        result = tl.sum(tile[2].to(tl.float32) * vector[2][None, :], axis=1)
        if WIDTH > 0:
            result += tl.sum(tile[0].to(tl.float32) * vector[0][None, :], axis=1)
            result += tl.sum(tile[1].to(tl.float32) * vector[1][None, :], axis=1)
    else:
        result = tl.sum(tile[0].to(tl.float32) * vector[0][None, :], axis=1)
        result += tl.sum(tile[1].to(tl.float32) * vector[1][None, :], axis=1)
    return result


@jit
def add_outer(accumulator, a, vector, DIM: constexpr, WIDTH: constexpr):
    """The split accumulator plus the outer product of a column and a split vector."""
    first, second, rest = accumulator
    if 2 * WIDTH < DIM:
        rest += a[:, None] * vector[2][None, :]
    if WIDTH > 0:
        first += a[:, None] * vector[0][None, :]
        second += a[:, None] * vector[1][None, :]
    return first, second, rest


@jit
def load_run(relative_key, stride_x, first, num_distances, LIKE, DIM: constexpr, BLOCK_RUN: constexpr,
             BLOCK_REST: constexpr, LONG: constexpr):  # fmt: skip
    """Rows first, first + 1, ... of a head's relative keys [BLOCK_RUN, BLOCK_REST] in the dtype of the tile LIKE; 0
    where there is none."""
    x = first + tl.arange(0, BLOCK_RUN)
    column = tl.arange(0, BLOCK_REST)
    there = ((x >= 0) & (x < num_distances))[:, None] & (column < DIM)[None, :]
    run = tl.load(relative_key + (wide(x, LONG) * stride_x)[:, None] + column[None, :], mask=there, other=0.0)
    return run.to(LIKE.dtype)


@jit
def by_slot(x, TRANSPOSED: constexpr, BLOCK_ROWS: constexpr, BLOCK_KEYS: constexpr, BLOCK_RUN: constexpr):
    """A tile of rows by distances -> rows by keys. Row a and key b are at the tile's distance a - b + BLOCK_KEYS - 1,
    so each row is shifted by one more than the row before it. The gather is of a flat tile, because Triton then goes
    through shared memory, once; along an axis of a matrix it shuffles registers eight times for an element."""
    a = tl.arange(0, BLOCK_ROWS)
    b = tl.arange(0, BLOCK_KEYS)
    flat = tl.reshape(x, [BLOCK_ROWS * BLOCK_RUN])
    if TRANSPOSED:
        at = (a[None, :] - b[:, None] + (BLOCK_KEYS - 1)) * BLOCK_ROWS + a[None, :]
        shifted = tl.reshape(
            tl.gather(flat, tl.reshape(at, [BLOCK_KEYS * BLOCK_ROWS]), axis=0), [BLOCK_KEYS, BLOCK_ROWS]
        )
    else:
        at = a[:, None] * BLOCK_RUN + a[:, None] - b[None, :] + (BLOCK_KEYS - 1)
        shifted = tl.reshape(
            tl.gather(flat, tl.reshape(at, [BLOCK_ROWS * BLOCK_KEYS]), axis=0), [BLOCK_ROWS, BLOCK_KEYS]
        )
    return shifted


@jit
def by_distance(x, TRANSPOSED: constexpr, BLOCK_ROWS: constexpr, BLOCK_KEYS: constexpr, BLOCK_RUN: constexpr):
    """A tile of rows by keys -> rows by distances: the transpose of `by_slot` as a map."""
    a = tl.arange(0, BLOCK_ROWS)
    y = tl.arange(0, BLOCK_RUN)
    flat = tl.reshape(x, [BLOCK_ROWS * BLOCK_KEYS])
    if TRANSPOSED:
        b = a[None, :] - y[:, None] + (BLOCK_KEYS - 1)
        there = (b >= 0) & (b < BLOCK_KEYS)
        at = tl.where(there, b * BLOCK_ROWS + a[None, :], 0)
        shifted = tl.reshape(tl.gather(flat, tl.reshape(at, [BLOCK_RUN * BLOCK_ROWS]), axis=0), [BLOCK_RUN, BLOCK_ROWS])
    else:
        b = a[:, None] - y[None, :] + (BLOCK_KEYS - 1)
        there = (b >= 0) & (b < BLOCK_KEYS)
        at = tl.where(there, a[:, None] * BLOCK_KEYS + b, 0)
        shifted = tl.reshape(tl.gather(flat, tl.reshape(at, [BLOCK_ROWS * BLOCK_RUN]), axis=0), [BLOCK_ROWS, BLOCK_RUN])
    return tl.where(there, shifted, 0.0)


@jit
def kept_slots(seed, threshold, head, place, slot, first_slot, TRANSPOSED: constexpr, LOTS: constexpr,
               BLOCK_ROWS: constexpr, BLOCK_KEYS: constexpr):  # fmt: skip
    """Which slots of a tile dropout keeps (dropout.py). LOTS: how many slots one evaluation of Philox serves here, 8
    where every tile begins at a multiple of 8, else 1."""
    if LOTS == 8:
        counter = first_slot // 8 + tl.arange(0, BLOCK_KEYS // 8)
        rows = place[:, None] + tl.zeros([BLOCK_ROWS, BLOCK_KEYS // 8], tl.int32)
        w0, w1, w2, w3 = tl.philox(seed, counter[None, :] + tl.zeros_like(rows), rows, head, 0, n_rounds=7)
        words = tl.join(tl.join(w0, w2), tl.join(w1, w3))
        kept = tl.join((words & 0xFFFF).to(tl.int32) >= threshold, (words >> 16).to(tl.int32) >= threshold)
        kept = tl.reshape(kept, [BLOCK_ROWS, BLOCK_KEYS])
        if TRANSPOSED:
            kept = tl.trans(kept)
    else:
        if TRANSPOSED:
            rows = place[None, :] + tl.zeros([BLOCK_KEYS, BLOCK_ROWS], tl.int32)
            slots = slot[:, None] + tl.zeros_like(rows)
        else:
            rows = place[:, None] + tl.zeros([BLOCK_ROWS, BLOCK_KEYS], tl.int32)
            slots = slot[None, :] + tl.zeros_like(rows)
        w0, w1, w2, w3 = tl.philox(seed, slots // 8, rows, head, 0, n_rounds=7)
        which = slots % 8
        words = tl.where(which < 4, tl.where(which < 2, w0, w1), tl.where(which < 6, w2, w3))
        kept = tl.where(which % 2 == 0, words & 0xFFFF, words >> 16).to(tl.int32) >= threshold
    return kept


@jit
def kept_null(seed, threshold, head, place):
    """Which rows keep their null slot."""
    w0, _, _, _ = tl.philox(seed, tl.zeros_like(place) - 1, place, head, 0, n_rounds=7)
    return (w0 & 0xFFFF).to(tl.int32) >= threshold


@jit
def load_query(query, query_cos, query_sin, content_bias, relative_bias, position, row, inside, query_n,
               query_cos_m, query_sin_m, DIM: constexpr, WIDTH: constexpr, INTERLEAVED: constexpr, LONG: constexpr,
               BLOCK_PAIR: constexpr, BLOCK_REST: constexpr):  # fmt: skip
    """Rows of a head's queries: as the content term and as the relative term see them."""
    q = load_split(
        query + wide(row, LONG) * query_n, inside,
        query_cos + position * query_cos_m if WIDTH > 0 else None,
        query_sin + position * query_sin_m if WIDTH > 0 else None,
        DIM, WIDTH, INTERLEAVED, BLOCK_PAIR, BLOCK_REST,
    )  # fmt: skip
    content = q
    relative = q
    if content_bias is not None:
        content = plus_vector(q, content_bias, DIM, BLOCK_REST)
    if relative_bias is not None:
        relative = plus_vector(q, relative_bias, DIM, BLOCK_REST)
    return content, relative


@jit
def load_results(grad_out, out, lse, log_sum, row, inside, grad_out_n, num_heads,
                 VALUE_DIM: constexpr, LONG: constexpr, BLOCK_VALUE: constexpr):  # fmt: skip
    """What the backward needs of a tile of rows: which pass a gradient, the log-sum-exp in bits and its second
    part (`load_lse`), grad_out, and delta = grad_out . out. Of rows that saw nothing neither their query nor grad_out
    is read."""
    column = tl.arange(0, BLOCK_VALUE)
    alive, lse_log2, rest = load_lse(lse, log_sum, wide(row, LONG) * num_heads, inside)
    there = alive[:, None] & (column < VALUE_DIM)[None, :]
    do = tl.load(grad_out + (wide(row, LONG) * grad_out_n)[:, None] + column[None, :], mask=there, other=0.0)
    o = tl.load(out + (wide(row, LONG) * (num_heads * VALUE_DIM))[:, None] + column[None, :], mask=there, other=0.0)
    delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), axis=1)
    return alive, lse_log2, rest, do, delta


@jit
def load_keys(key, value, mask, key_cos, key_sin, first_visible, slot, neighbour, token, present, num_tokens,
              key_k, key_r, value_k, value_r, mask_k, mask_r, key_cos_r, key_sin_r,
              GROUPING: constexpr, FLAT: constexpr, LONG: constexpr, DIM: constexpr, VALUE_DIM: constexpr,
              WIDTH: constexpr, INTERLEAVED: constexpr, BLOCK_PAIR: constexpr, BLOCK_REST: constexpr,
              BLOCK_VALUE: constexpr):  # fmt: skip
    """Which of the slots `present` are not masked, and their keys, values and rotary positions. Others are not read."""
    visible = present
    if mask is not None:
        at = slot_offsets(slot, neighbour, token, mask_k, mask_r, GROUPING, FLAT, LONG)
        visible = present & (tl.load(mask + at, mask=present, other=0) != 0)
    position = token
    if WIDTH > 0 and first_visible is not None:
        position = token - tl.load(first_visible + token, mask=present, other=0)
    k = load_split(
        key + slot_offsets(slot, neighbour, token, key_k, key_r, GROUPING, FLAT, LONG), visible,
        key_cos + position * key_cos_r if WIDTH > 0 else None, key_sin + position * key_sin_r if WIDTH > 0 else None,
        DIM, WIDTH, INTERLEAVED, BLOCK_PAIR, BLOCK_REST,
    )  # fmt: skip
    column = tl.arange(0, BLOCK_VALUE)
    v = tl.load(
        value + slot_offsets(slot, neighbour, token, value_k, value_r, GROUPING, FLAT, LONG)[:, None] + column[None, :],
        mask=visible[:, None] & (column < VALUE_DIM)[None, :], other=0.0,
    )  # fmt: skip
    return visible, k, v, position


@jit
def logits_of(content, relative, k, run, attention_bias, scale_log2, row, rows_there, column, visible, bias_m,
              DIM: constexpr, WIDTH: constexpr, TRANSPOSED: constexpr, LONG: constexpr, BLOCK_ROWS: constexpr,
              BLOCK_KEYS: constexpr, BLOCK_RUN: constexpr, PRECISION: constexpr):  # fmt: skip
    """A tile's logits in bits (times log2 e), not yet masked."""
    if TRANSPOSED:
        logits = product(k, content, DIM, WIDTH, PRECISION)
    else:
        logits = product(content, k, DIM, WIDTH, PRECISION)
    if run is not None:
        if TRANSPOSED:
            distances = tl.dot(run, tl.trans(relative[2]), input_precision=PRECISION)
        else:
            distances = tl.dot(relative[2], tl.trans(run), input_precision=PRECISION)
        logits += by_slot(distances, TRANSPOSED, BLOCK_ROWS, BLOCK_KEYS, BLOCK_RUN)
    logits *= scale_log2
    if attention_bias is not None:
        rows = wide(row, LONG) * bias_m
        if TRANSPOSED:
            at = rows[None, :] + column[:, None]
            there = rows_there[None, :] & visible[:, None]
        else:
            at = rows[:, None] + column[None, :]
            there = rows_there[:, None] & visible[None, :]
        logits += bias_in_bits(tl.load(attention_bias + at, mask=there, other=0.0))
    return logits


@jit
def seen(visible, row, token, first_visible, TRANSPOSED: constexpr, CAUSAL: constexpr):
    """Which slots of a tile a row sees; `first_visible` is each row's, or None."""
    if TRANSPOSED:
        see = visible[:, None]
        if CAUSAL:
            see = see & (token[:, None] <= row[None, :])
            if first_visible is not None:
                see = see & (token[:, None] >= first_visible[None, :])
    else:
        see = visible[None, :]
        if CAUSAL:
            see = see & (token[None, :] <= row[:, None])
            if first_visible is not None:
                see = see & (token[None, :] >= first_visible[:, None])
    return see


@jit
def weights_and_gradient(logits, see, do, v, delta, lse_log2, rest, kept, survivor_scale,
                         TRANSPOSED: constexpr, PRECISION: constexpr):  # fmt: skip
    """A tile's attention weights as they multiplied the values, and the gradient of its logits, both fp32. A slot that
    is not seen has exactly 0 beside a row that is NaN."""
    if TRANSPOSED:
        exponent = logits - lse_log2[None, :]
        if rest is not None:
            exponent -= rest[None, :]
        d_weights = tl.dot(v, tl.trans(do), input_precision=PRECISION)
    else:
        exponent = logits - lse_log2[:, None]
        if rest is not None:
            exponent -= rest[:, None]
        d_weights = tl.dot(do, tl.trans(v), input_precision=PRECISION)
    weights = tl.where(see, at_most_one(exponent), 0.0)
    dropped = weights
    if kept is not None:
        d_weights = tl.where(kept, d_weights * survivor_scale, 0.0)
        dropped = tl.where(kept, weights * survivor_scale, 0.0)
    if TRANSPOSED:
        d_logits = weights * (d_weights - delta[None, :])
    else:
        d_logits = weights * (d_weights - delta[:, None])
    return dropped, tl.where(see, d_logits, 0.0)


@jit
def null_slot(content, do, delta, lse_log2, rest, scale_log2, null_key, null_value, kept, survivor_scale,
              DIM: constexpr, VALUE_DIM: constexpr, WIDTH: constexpr, INTERLEAVED: constexpr,
              BLOCK_PAIR: constexpr, BLOCK_REST: constexpr, BLOCK_VALUE: constexpr):  # fmt: skip
    """The null key, its weight as it multiplied the null value, and the gradient of its logit, of a tile of rows."""
    null = load_vector(null_key, DIM, WIDTH, INTERLEAVED, BLOCK_PAIR, BLOCK_REST)
    exponent = scale_log2 * vector_product(content, null, DIM, WIDTH) - lse_log2
    if rest is not None:
        exponent -= rest
    weight = tl.where(lse_log2 == float("inf"), 0.0, at_most_one(exponent))
    column = tl.arange(0, BLOCK_VALUE)
    nulls = tl.load(null_value + column, mask=column < VALUE_DIM, other=0.0).to(tl.float32)
    d_weight = tl.sum(do.to(tl.float32) * nulls[None, :], axis=1)
    dropped = weight
    if kept is not None:
        d_weight = tl.where(kept, d_weight * survivor_scale, 0.0)
        dropped = tl.where(kept, weight * survivor_scale, 0.0)
    return null, dropped, weight * (d_weight - delta)
