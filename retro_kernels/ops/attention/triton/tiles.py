"""What the Triton kernels are made of: which rows and slots a program holds, loads, products, relative positions and
dropout of one tile.

A tile of queries or keys is "split" in three: the first and the second members of the rotary pairs, and the dimensions
that do not turn. WIDTH is the number of pairs; where it is 0, or pairs are all there is, the missing parts repeat
another one and are never used. TRANSPOSED tiles of logits are [keys, rows] instead of [rows, keys].
"""

from __future__ import annotations

from typing import Any, NamedTuple

from .. import common
from .arguments import Mask, Slots, Table, import_error, jit, triton  # noqa: F401 - for others too

if triton is not None:
    import triton.language as tl
    from triton.language import constexpr

    CLOCK = constexpr(common.CLOCK)
    NEIGHBOUR = constexpr(common.NEIGHBOUR)
    CHUNK = constexpr(common.CHUNK)
    LOG2_E = constexpr(1.4426950408889634)
    LN_2 = constexpr(0.6931471805599453)
    LARGEST = constexpr(3.4028234663852886e38)  # of fp32's finite numbers


class Lengths(NamedTuple):
    """Scalars of the whole call. num_neighbours: those whose slots, under CLOCK, or rows, otherwise, are a chunk's;
    table_rows: M (common.py)."""

    num_tokens: Any
    num_neighbours: Any
    retrieved_length: Any
    num_heads: Any
    heads_per_key: Any
    num_chunks: Any
    stride: Any
    first_token: Any
    table_rows: Any


class Group(NamedTuple):
    """A group of rows and slots (common.py): its chunk and neighbour, the first token of its rows and how many rows it
    has."""

    batch: Any
    chunk: Any
    neighbour: Any
    start: Any
    count: Any


class RowTile(NamedTuple):
    """Rows first, first + 1, ... of a neighbour, which of them are tokens, and the place of the group's row 0 in the
    axes (lq, kq, n)."""

    neighbour: Any
    first: Any
    row: Any
    inside: Any
    place: Any


class Queries(NamedTuple):
    """Rows of a head's queries as the content and as the relative term see them, split."""

    content: Any
    relative: Any


class Upstream(NamedTuple):
    """What the backward needs of rows: which pass a gradient, the log-sum-exp in bits and its second part (`load_lse`),
    grad_out, and delta = grad_out . out less the gradient of the log-sum-exp."""

    alive: Any
    lse: Any
    rest: Any
    do: Any
    delta: Any


class LoadedRows(NamedTuple):
    """A tile of rows of a head: `at` is the index of row 0 in lse (`row_index`); `document` each row's first_visible;
    `position` its rotary position."""

    rows: Any
    at: Any
    document: Any
    position: Any
    queries: Any
    upstream: Any


class SlotTile(NamedTuple):
    """Slots of a tile, their neighbours and tokens, and which of them exist; the tile's first slot and token."""

    slot: Any
    neighbour: Any
    token: Any
    present: Any
    first_slot: Any
    first_token: Any


class Keys(NamedTuple):
    """Which slots of a tile are visible, their keys, split, their values, and their rotary positions."""

    visible: Any
    k: Any
    v: Any
    position: Any


class Scaling(NamedTuple):
    """How a product becomes a logit in bits: times log2; with a soft cap, tanh(product * inner) * cap_log2."""

    log2: Any
    inner: Any
    cap_log2: Any


class Dropout(NamedTuple):
    """Of one head: see ops/dropout.py."""

    seed: Any
    threshold: Any
    survivor_scale: Any
    head: Any


@jit
def wide(index, INT64: constexpr):
    """An index about to be multiplied by a stride: 64-bit where some offset inside a group needs it."""
    return index.to(tl.int64) if INT64 else index


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
def tanh(x):
    """To fp32's precision; a polynomial where 1 - e^(-2x) would cancel."""
    square = x * x
    series = 2.0 / 15.0 + square * (-17.0 / 315.0 + square * (62.0 / 2835.0))
    small = x + x * square * (-1.0 / 3.0 + square * series)
    e = tl.exp2(tl.abs(x) * (-2.0 * LOG2_E))
    large = (1.0 - e) / (1.0 + e)
    return tl.where(tl.abs(x) < 0.3, small, tl.where(x < 0.0, -large, large))


@jit
def scaling_of(scale, softcap, SPEC):
    log2 = scale * LOG2_E
    inner = log2
    cap_log2 = log2
    if SPEC.SOFTCAP:
        inner = scale / softcap
        cap_log2 = softcap * LOG2_E
    return Scaling(log2, inner, cap_log2)


@jit
def scaled(product, scaling, SPEC):
    """Logits in bits without a bias, and with a soft cap the derivative of the capped logit."""
    if SPEC.SOFTCAP:
        capped = tanh(product * scaling.inner)
        logits = capped * scaling.cap_log2
        slope = 1.0 - capped * capped
    else:
        logits = product * scaling.log2
        slope = logits  # which is not used
    return logits, slope


@jit
def store_lse(results, at, largest, total, inside):
    """The log-sum-exp of rows, exactly -inf where nothing was seen; with a bias the two planes of common.py."""
    logarithm = tl.log2(total)
    if results.log_sum is None:
        tl.store(results.lse + at, tl.where(total == 0.0, float("-inf"), (largest + logarithm) * LN_2), mask=inside)
    else:
        highest = tl.where(total == 0.0, float("-inf"), tl.where(total == total, largest, total))
        tl.store(results.lse + at, highest, mask=inside)
        tl.store(results.log_sum + at, tl.where((total > 0.0) & (total < float("inf")), logarithm, 0.0), mask=inside)


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
def group_of(number, batch, chunk_spans, lengths, SPEC):
    """Group number `number` of a sequence."""
    chunk = number
    neighbour = tl.full([], 0, tl.int32)
    start = tl.full([], 0, tl.int32)
    count = lengths.stride
    if SPEC.GROUPING == NEIGHBOUR:
        chunk = number // lengths.num_neighbours
        neighbour = number % lengths.num_neighbours
    if SPEC.GROUPING == CLOCK:
        if chunk_spans is not None:
            span = chunk_spans + (batch * lengths.num_chunks + chunk) * 2
            start = tl.load(span)
            count = tl.load(span + 1)
        else:
            start = lengths.first_token + chunk * lengths.stride
    return Group(batch, chunk, neighbour, start, count)


@jit
def slots_of_group(lengths, SPEC):
    """How many slots a group has."""
    if SPEC.GROUPING == CLOCK:
        count = lengths.num_neighbours * lengths.retrieved_length
    else:
        count = lengths.retrieved_length
    return count


@jit
def readable_slots(group, lengths, SPEC):
    """How many slots of a group may be read: none of a chunk that no token attends to."""
    attended = tl.minimum(group.start + group.count, lengths.num_tokens) > tl.maximum(group.start, 0)
    return tl.where(attended, slots_of_group(lengths, SPEC), 0)


@jit
def key_tiles_of(lengths, SPEC):
    """How many key tiles a group has."""
    if SPEC.PER_NEIGHBOUR:
        count = lengths.num_neighbours * tl.cdiv(lengths.retrieved_length, SPEC.BLOCK_KEYS)
    else:
        count = tl.cdiv(slots_of_group(lengths, SPEC), SPEC.BLOCK_KEYS)
    return count


@jit
def row_tiles_of(lengths, SPEC):
    """How many row tiles a group has; no tile holds rows of two neighbours."""
    count = tl.cdiv(lengths.stride, SPEC.BLOCK_ROWS)
    if SPEC.GROUPING == CHUNK:
        count = count * lengths.num_neighbours
    return count


@jit
def row_tile_of(number, group, lengths, SPEC):
    """Row tile number `number` of a group."""
    neighbour = group.neighbour
    if SPEC.GROUPING == CHUNK:
        tiles = tl.cdiv(lengths.num_tokens, SPEC.BLOCK_ROWS)
        neighbour = number // tiles
        number = number % tiles
    return rows_of(neighbour, number * SPEC.BLOCK_ROWS, group, lengths, SPEC)


@jit
def rows_of(neighbour, first, group, lengths, SPEC):
    """The tile of a group's rows that begins with row `first` of a neighbour."""
    row = first + tl.arange(0, SPEC.BLOCK_ROWS)
    place = group.start + row
    inside = (row < group.count) & (place >= 0) & (place < lengths.num_tokens)
    if SPEC.GROUPING == CLOCK:
        at = group.start.to(tl.int64)
    else:
        at = (group.chunk.to(tl.int64) * lengths.num_neighbours + neighbour) * lengths.num_tokens
    return RowTile(neighbour, first, row, inside, at)


@jit
def sequence_places(lengths, SPEC):
    """How many rows a sequence has, lq * kq * n."""
    if SPEC.GROUPING == CLOCK:
        count = lengths.num_tokens.to(tl.int64)
    else:
        count = lengths.num_chunks.to(tl.int64) * lengths.num_neighbours * lengths.num_tokens
    return count


@jit
def row_index(rows, head, group, lengths, SPEC):
    """Where row 0 of a tile's group and neighbour stands in lse; the next is num_heads further."""
    return (group.batch * sequence_places(lengths, SPEC) + rows.place) * lengths.num_heads + head


@jit
def rows_at(x, rows, head, group, SPEC):
    """The pointer to row 0 of a tile's group and neighbour, of query or grad_out."""
    at = x.data + group.batch * x.b + group.start.to(tl.int64) * x.n + head * x.h
    if SPEC.GROUPING != CLOCK:
        at += group.chunk.to(tl.int64) * x.l + rows.neighbour.to(tl.int64) * x.k
    return at


@jit
def at_group(x, kv_head, group, SPEC):
    """key or value from the first slot of a group on."""
    at = x.data + group.batch * x.b + group.chunk.to(tl.int64) * x.l + kv_head * x.h
    if SPEC.GROUPING == NEIGHBOUR:
        at += group.neighbour.to(tl.int64) * x.k
    return Slots(at, x.b, x.l, x.k, x.r, x.h)


@jit
def mask_at_group(mask, group, SPEC):
    """The mask from the first slot of a group on."""
    at = mask.data + group.batch * mask.b + group.chunk.to(tl.int64) * mask.l
    if SPEC.GROUPING == NEIGHBOUR:
        at += group.neighbour.to(tl.int64) * mask.k
    return Mask(at, mask.b, mask.l, mask.k, mask.r)


@jit
def at_head(table, head):
    """A head's attention_bias."""
    return Table(table.data + head * table.h, table.h, table.m)


@jit
def slots_of(tile, lengths, SPEC):
    """The slots of key tile number `tile`."""
    lane = tl.arange(0, SPEC.BLOCK_KEYS)
    if SPEC.PER_NEIGHBOUR:
        tiles = tl.cdiv(lengths.retrieved_length, SPEC.BLOCK_KEYS)
        first_token = (tile % tiles) * SPEC.BLOCK_KEYS
        neighbour = tile // tiles + tl.zeros([SPEC.BLOCK_KEYS], tl.int32)
        token = first_token + lane
        first_slot = tile // tiles * lengths.retrieved_length + first_token
        slot = first_slot + lane
        present = token < lengths.retrieved_length
    else:
        first_slot = tile * SPEC.BLOCK_KEYS
        first_token = first_slot
        slot = first_slot + lane
        if SPEC.GROUPING == CLOCK:
            neighbour = slot // lengths.retrieved_length
            token = slot - neighbour * lengths.retrieved_length
        else:
            neighbour = tl.zeros([SPEC.BLOCK_KEYS], tl.int32)
            token = slot
        present = slot < slots_of_group(lengths, SPEC)
    return SlotTile(slot, neighbour, token, present, first_slot, first_token)


@jit
def slot_offsets(slots, stride_k, stride_r, SPEC):
    """Element offsets of slots."""
    if SPEC.FLAT_SLOTS or SPEC.GROUPING != CLOCK:
        offsets = wide(slots.slot, SPEC.INT64) * stride_r
    else:
        offsets = wide(slots.neighbour, SPEC.INT64) * stride_k + wide(slots.token, SPEC.INT64) * stride_r
    return offsets


@jit
def load_split(at, inside, cos, sin, SPEC):
    """Vectors at the pointers `at`, split and rotated. Rows not `inside` are not read and come as 0."""
    pair = tl.arange(0, SPEC.BLOCK_PAIR)
    if 2 * SPEC.WIDTH < SPEC.DIM:
        column = 2 * SPEC.WIDTH + tl.arange(0, SPEC.BLOCK_REST)
        rest = tl.load(at[:, None] + column[None, :], mask=inside[:, None] & (column < SPEC.DIM)[None, :], other=0.0)
    if SPEC.WIDTH > 0:
        first_column = 2 * pair if SPEC.INTERLEAVED else pair
        second_column = 2 * pair + 1 if SPEC.INTERLEAVED else pair + SPEC.WIDTH
        there = inside[:, None] & (pair < SPEC.WIDTH)[None, :]
        x = tl.load(at[:, None] + first_column[None, :], mask=there, other=0.0)
        y = tl.load(at[:, None] + second_column[None, :], mask=there, other=0.0)
        c = tl.load(cos[:, None] + pair[None, :], mask=there, other=0.0).to(tl.float32)
        s = tl.load(sin[:, None] + pair[None, :], mask=there, other=0.0).to(tl.float32)
        first = (x.to(tl.float32) * c - y.to(tl.float32) * s).to(x.dtype)
        second = (x.to(tl.float32) * s + y.to(tl.float32) * c).to(x.dtype)
    if SPEC.WIDTH == 0:
        first = rest
        second = rest
    if 2 * SPEC.WIDTH == SPEC.DIM:
        rest = first
    return first, second, rest


@jit
def load_vector(vector, SPEC):
    """One vector, split as `load_split` does and not rotated, in fp32."""
    pair = tl.arange(0, SPEC.BLOCK_PAIR)
    if 2 * SPEC.WIDTH < SPEC.DIM:
        column = 2 * SPEC.WIDTH + tl.arange(0, SPEC.BLOCK_REST)
        rest = tl.load(vector + column, mask=column < SPEC.DIM, other=0.0).to(tl.float32)
    if SPEC.WIDTH > 0:
        first_column = 2 * pair if SPEC.INTERLEAVED else pair
        second_column = 2 * pair + 1 if SPEC.INTERLEAVED else pair + SPEC.WIDTH
        first = tl.load(vector + first_column, mask=pair < SPEC.WIDTH, other=0.0).to(tl.float32)
        second = tl.load(vector + second_column, mask=pair < SPEC.WIDTH, other=0.0).to(tl.float32)
    if SPEC.WIDTH == 0:
        first = rest
        second = rest
    if 2 * SPEC.WIDTH == SPEC.DIM:
        rest = first
    return first, second, rest


@jit
def store_vector(vector, x, SPEC):
    """What `load_vector` loads, stored."""
    pair = tl.arange(0, SPEC.BLOCK_PAIR)
    if 2 * SPEC.WIDTH < SPEC.DIM:
        column = 2 * SPEC.WIDTH + tl.arange(0, SPEC.BLOCK_REST)
        tl.store(vector + column, x[2], mask=column < SPEC.DIM)
    if SPEC.WIDTH > 0:
        first_column = 2 * pair if SPEC.INTERLEAVED else pair
        second_column = 2 * pair + 1 if SPEC.INTERLEAVED else pair + SPEC.WIDTH
        tl.store(vector + first_column, x[0], mask=pair < SPEC.WIDTH)
        tl.store(vector + second_column, x[1], mask=pair < SPEC.WIDTH)


@jit
def store_split(at, inside, cos, sin, tile, factor, SPEC):
    """The gradient of `load_split`: `factor` times an fp32 tile, turned back and stored at the pointers `at`."""
    pair = tl.arange(0, SPEC.BLOCK_PAIR)
    if 2 * SPEC.WIDTH < SPEC.DIM:
        column = 2 * SPEC.WIDTH + tl.arange(0, SPEC.BLOCK_REST)
        there = inside[:, None] & (column < SPEC.DIM)[None, :]
        tl.store(at[:, None] + column[None, :], (factor * tile[2]).to(at.dtype.element_ty), mask=there)
    if SPEC.WIDTH > 0:
        first_column = 2 * pair if SPEC.INTERLEAVED else pair
        second_column = 2 * pair + 1 if SPEC.INTERLEAVED else pair + SPEC.WIDTH
        there = inside[:, None] & (pair < SPEC.WIDTH)[None, :]
        c = factor * tl.load(cos[:, None] + pair[None, :], mask=there, other=0.0).to(tl.float32)
        s = factor * tl.load(sin[:, None] + pair[None, :], mask=there, other=0.0).to(tl.float32)
        x = tile[0] * c + tile[1] * s
        y = tile[1] * c - tile[0] * s
        tl.store(at[:, None] + first_column[None, :], x.to(at.dtype.element_ty), mask=there)
        tl.store(at[:, None] + second_column[None, :], y.to(at.dtype.element_ty), mask=there)


@jit
def zeros_split(ROWS: constexpr, SPEC):
    pair = tl.zeros([ROWS, SPEC.BLOCK_PAIR], tl.float32)
    return pair, pair, tl.zeros([ROWS, SPEC.BLOCK_REST], tl.float32)


@jit
def where_split(there, tile):
    """0 in the rows that are not `there`."""
    return (
        tl.where(there[:, None], tile[0], 0.0),
        tl.where(there[:, None], tile[1], 0.0),
        tl.where(there[:, None], tile[2], 0.0),
    )


@jit
def plus_vector(tile, vector, SPEC):
    """An unrotated split tile plus a vector, rounded to the tile's dtype."""
    column = tl.arange(0, SPEC.BLOCK_REST)
    x = tl.load(vector + column, mask=column < SPEC.DIM, other=0.0).to(tl.float32)
    rest = (tile[2].to(tl.float32) + x[None, :]).to(tile[2].dtype)
    return rest, rest, rest


@jit
def product(a, b, SPEC):
    """a · bᵀ of two split tiles, fp32."""
    if 2 * SPEC.WIDTH < SPEC.DIM:
        result = tl.dot(a[2], tl.trans(b[2]), input_precision=SPEC.PRECISION)
        if SPEC.WIDTH > 0:
            result = tl.dot(a[0], tl.trans(b[0]), result, input_precision=SPEC.PRECISION)
            result = tl.dot(a[1], tl.trans(b[1]), result, input_precision=SPEC.PRECISION)
    else:
        result = tl.dot(a[0], tl.trans(b[0]), input_precision=SPEC.PRECISION)
        result = tl.dot(a[1], tl.trans(b[1]), result, input_precision=SPEC.PRECISION)
    return result


@jit
def add_product(accumulator, a, b, SPEC):
    """The split accumulator plus a · b."""
    first, second, rest = accumulator
    if 2 * SPEC.WIDTH < SPEC.DIM:
        rest = tl.dot(a, b[2], rest, input_precision=SPEC.PRECISION)
    if SPEC.WIDTH > 0:
        first = tl.dot(a, b[0], first, input_precision=SPEC.PRECISION)
        second = tl.dot(a, b[1], second, input_precision=SPEC.PRECISION)
    return first, second, rest


@jit
def vector_product(tile, vector, SPEC):
    """Each row of a split tile times a split vector, fp32."""
    if 2 * SPEC.WIDTH < SPEC.DIM:
        result = tl.sum(tile[2].to(tl.float32) * vector[2][None, :], axis=1)
        if SPEC.WIDTH > 0:
            result += tl.sum(tile[0].to(tl.float32) * vector[0][None, :], axis=1)
            result += tl.sum(tile[1].to(tl.float32) * vector[1][None, :], axis=1)
    else:
        result = tl.sum(tile[0].to(tl.float32) * vector[0][None, :], axis=1)
        result += tl.sum(tile[1].to(tl.float32) * vector[1][None, :], axis=1)
    return result


@jit
def add_outer(accumulator, a, vector, SPEC):
    """The split accumulator plus the outer product of a column and a split vector."""
    first, second, rest = accumulator
    if 2 * SPEC.WIDTH < SPEC.DIM:
        rest += a[:, None] * vector[2][None, :]
    if SPEC.WIDTH > 0:
        first += a[:, None] * vector[0][None, :]
        second += a[:, None] * vector[1][None, :]
    return first, second, rest


@jit
def load_run(relative, head, rows, slots, lengths, LIKE, SPEC):
    """The relative keys of a tile's distances [BLOCK_RUN, BLOCK_REST] in the dtype of the tile LIKE: row a and key b
    are at distance a - b + BLOCK_KEYS - 1 of the run; 0 where there is none."""
    first = rows.first - slots.first_token - SPEC.BLOCK_KEYS + lengths.retrieved_length
    return load_distances(relative, head, first, lengths, LIKE, SPEC.BLOCK_RUN, SPEC.BLOCK_REST, SPEC)


@jit
def load_distances(relative, head, first, lengths, LIKE, BLOCK_RUN: constexpr, BLOCK_DIM: constexpr, SPEC):
    """Rows first, first + 1, ... of a head's relative keys [BLOCK_RUN, BLOCK_DIM] in the dtype of the tile LIKE; 0
    where there is none."""
    x = first + tl.arange(0, BLOCK_RUN)
    column = tl.arange(0, BLOCK_DIM)
    num_distances = lengths.table_rows + lengths.retrieved_length - 1
    there = ((x >= 0) & (x < num_distances))[:, None] & (column < SPEC.DIM)[None, :]
    at = relative.relative_key + head * relative.h + (wide(x, SPEC.INT64) * relative.x)[:, None] + column[None, :]
    return tl.load(at, mask=there, other=0.0).to(LIKE.dtype)


@jit
def by_slot(x, TRANSPOSED: constexpr, SPEC):
    """A tile of rows by distances -> rows by keys. Row a and key b are at the tile's distance a - b + BLOCK_KEYS - 1,
    so each row is shifted by one more than the row before it. The gather is of a flat tile, because Triton then goes
    through shared memory, once; along an axis of a matrix it shuffles registers eight times for an element."""
    a = tl.arange(0, SPEC.BLOCK_ROWS)
    b = tl.arange(0, SPEC.BLOCK_KEYS)
    flat = tl.reshape(x, [SPEC.BLOCK_ROWS * SPEC.BLOCK_RUN])
    if TRANSPOSED:
        at = (a[None, :] - b[:, None] + (SPEC.BLOCK_KEYS - 1)) * SPEC.BLOCK_ROWS + a[None, :]
        gathered = tl.gather(flat, tl.reshape(at, [SPEC.BLOCK_KEYS * SPEC.BLOCK_ROWS]), axis=0)
        shifted = tl.reshape(gathered, [SPEC.BLOCK_KEYS, SPEC.BLOCK_ROWS])
    else:
        at = a[:, None] * SPEC.BLOCK_RUN + a[:, None] - b[None, :] + (SPEC.BLOCK_KEYS - 1)
        gathered = tl.gather(flat, tl.reshape(at, [SPEC.BLOCK_ROWS * SPEC.BLOCK_KEYS]), axis=0)
        shifted = tl.reshape(gathered, [SPEC.BLOCK_ROWS, SPEC.BLOCK_KEYS])
    return shifted


@jit
def by_distance(x, TRANSPOSED: constexpr, SPEC):
    """A tile of rows by keys -> rows by distances: the transpose of `by_slot` as a map."""
    a = tl.arange(0, SPEC.BLOCK_ROWS)
    y = tl.arange(0, SPEC.BLOCK_RUN)
    flat = tl.reshape(x, [SPEC.BLOCK_ROWS * SPEC.BLOCK_KEYS])
    if TRANSPOSED:
        b = a[None, :] - y[:, None] + (SPEC.BLOCK_KEYS - 1)
        there = (b >= 0) & (b < SPEC.BLOCK_KEYS)
        at = tl.where(there, b * SPEC.BLOCK_ROWS + a[None, :], 0)
        gathered = tl.gather(flat, tl.reshape(at, [SPEC.BLOCK_RUN * SPEC.BLOCK_ROWS]), axis=0)
        shifted = tl.reshape(gathered, [SPEC.BLOCK_RUN, SPEC.BLOCK_ROWS])
    else:
        b = a[:, None] - y[None, :] + (SPEC.BLOCK_KEYS - 1)
        there = (b >= 0) & (b < SPEC.BLOCK_KEYS)
        at = tl.where(there, a[:, None] * SPEC.BLOCK_KEYS + b, 0)
        gathered = tl.gather(flat, tl.reshape(at, [SPEC.BLOCK_ROWS * SPEC.BLOCK_RUN]), axis=0)
        shifted = tl.reshape(gathered, [SPEC.BLOCK_ROWS, SPEC.BLOCK_RUN])
    return tl.where(there, shifted, 0.0)


@jit
def kept_slots(dropout, place, slots, TRANSPOSED: constexpr, SPEC):
    """Which slots of a tile dropout keeps (dropout.py) in the rows at `place`."""
    if SPEC.PHILOX_SLOTS == 8:
        counter = slots.first_slot // 8 + tl.arange(0, SPEC.BLOCK_KEYS // 8)
        rows = place[:, None] + tl.zeros([SPEC.BLOCK_ROWS, SPEC.BLOCK_KEYS // 8], tl.int32)
        counter = counter[None, :] + tl.zeros_like(rows)
        w0, w1, w2, w3 = tl.philox(dropout.seed, counter, rows, dropout.head, 0, n_rounds=7)
        words = tl.join(tl.join(w0, w2), tl.join(w1, w3))
        low = (words & 0xFFFF).to(tl.int32) >= dropout.threshold
        kept = tl.join(low, (words >> 16).to(tl.int32) >= dropout.threshold)
        kept = tl.reshape(kept, [SPEC.BLOCK_ROWS, SPEC.BLOCK_KEYS])
        if TRANSPOSED:
            kept = tl.trans(kept)
    else:
        if TRANSPOSED:
            rows = place[None, :] + tl.zeros([SPEC.BLOCK_KEYS, SPEC.BLOCK_ROWS], tl.int32)
            slot = slots.slot[:, None] + tl.zeros_like(rows)
        else:
            rows = place[:, None] + tl.zeros([SPEC.BLOCK_ROWS, SPEC.BLOCK_KEYS], tl.int32)
            slot = slots.slot[None, :] + tl.zeros_like(rows)
        w0, w1, w2, w3 = tl.philox(dropout.seed, slot // 8, rows, dropout.head, 0, n_rounds=7)
        which = slot % 8
        words = tl.where(which < 4, tl.where(which < 2, w0, w1), tl.where(which < 6, w2, w3))
        kept = tl.where(which % 2 == 0, words & 0xFFFF, words >> 16).to(tl.int32) >= dropout.threshold
    return kept


@jit
def kept_null(dropout, place):
    """Which rows keep their null slot."""
    w0, _, _, _ = tl.philox(dropout.seed, tl.zeros_like(place) - 1, place, dropout.head, 0, n_rounds=7)
    return (w0 & 0xFFFF).to(tl.int32) >= dropout.threshold


@jit
def load_query(at, stride_n, relative, rotary, head, position, row, there, SPEC):
    """Rows of a head's queries, from row 0 at the pointer `at`. Rows not `there` are not read."""
    q = load_split(
        at + wide(row, SPEC.INT64) * stride_n,
        there,
        rotary.query_cos + position * rotary.query_cos_m if SPEC.WIDTH > 0 else None,
        rotary.query_sin + position * rotary.query_sin_m if SPEC.WIDTH > 0 else None,
        SPEC,
    )
    content = q
    to_relative = q
    if relative is not None:
        if relative.content_bias is not None:
            content = plus_vector(q, relative.content_bias + head * relative.content_bias_h, SPEC)
        if relative.relative_bias is not None:
            to_relative = plus_vector(q, relative.relative_bias + head * relative.relative_bias_h, SPEC)
    return Queries(content, to_relative)


@jit
def load_upstream(grad_out, stride_n, results, at, rows, lengths, SPEC):
    """What the backward needs of a tile of rows, from row 0 at the pointer grad_out and at index `at` of lse. Of rows
    that saw nothing grad_out is not read."""
    column = tl.arange(0, SPEC.BLOCK_VALUE)
    row = wide(rows.row, SPEC.INT64)
    log_sum = results.log_sum + at if results.log_sum is not None else None
    alive, lse, rest = load_lse(results.lse + at, log_sum, row * lengths.num_heads, rows.inside)
    there = alive[:, None] & (column < SPEC.VALUE_DIM)[None, :]
    do = tl.load(grad_out + (row * stride_n)[:, None] + column[None, :], mask=there, other=0.0)
    out = results.out + at * SPEC.VALUE_DIM
    o = tl.load(out + (row * (lengths.num_heads * SPEC.VALUE_DIM))[:, None] + column[None, :], mask=there, other=0.0)
    delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), axis=1)
    if results.grad_lse is not None:
        delta -= tl.load(results.grad_lse + at + row * lengths.num_heads, mask=alive, other=0.0)
    return Upstream(alive, lse, rest, do, delta)


@jit
def load_keys(key, value, mask, rotary, first_visible, slots, readable, SPEC):
    """Keys and values of a tile; the pointers of key, value and mask are a group's, and those of first_visible a
    sequence's. Slots that are masked or not below `readable`, where that is given, are not read."""
    present = slots.present
    if readable is not None:
        present = present & (slots.slot < readable)
    visible = present
    if mask is not None:
        at = mask.data + slot_offsets(slots, mask.k, mask.r, SPEC)
        visible = present & (tl.load(at, mask=present, other=0) != 0)
    position = slots.token
    if SPEC.WIDTH > 0 and SPEC.DOCUMENTS:
        position = position - tl.load(first_visible + slots.token, mask=present, other=0)
    k = load_split(
        key.data + slot_offsets(slots, key.k, key.r, SPEC),
        visible,
        rotary.key_cos + position * rotary.key_cos_r if SPEC.WIDTH > 0 else None,
        rotary.key_sin + position * rotary.key_sin_r if SPEC.WIDTH > 0 else None,
        SPEC,
    )
    column = tl.arange(0, SPEC.BLOCK_VALUE)
    v = tl.load(
        value.data + slot_offsets(slots, value.k, value.r, SPEC)[:, None] + column[None, :],
        mask=visible[:, None] & (column < SPEC.VALUE_DIM)[None, :],
        other=0.0,
    )
    return Keys(visible, k, v, position)


@jit
def logits_of(queries, keys, run, bias, scaling, rows, there, slots, TRANSPOSED: constexpr, SPEC):
    """A tile's logits in bits (times log2 e), not yet masked, and the slope of `scaled`. `bias` is the head's; that of
    rows not `there` is not read."""
    if TRANSPOSED:
        logits = product(keys.k, queries.content, SPEC)
    else:
        logits = product(queries.content, keys.k, SPEC)
    if run is not None:
        if TRANSPOSED:
            distances = tl.dot(run, tl.trans(queries.relative[2]), input_precision=SPEC.PRECISION)
        else:
            distances = tl.dot(queries.relative[2], tl.trans(run), input_precision=SPEC.PRECISION)
        logits += by_slot(distances, TRANSPOSED, SPEC)
    logits, slope = scaled(logits, scaling, SPEC)
    if bias is not None:
        column = slots.slot if SPEC.BIAS_PER_SLOT else slots.token
        at_row = wide(rows.row, SPEC.INT64) * bias.m
        if TRANSPOSED:
            at = at_row[None, :] + column[:, None]
            read = there[None, :] & keys.visible[:, None]
        else:
            at = at_row[:, None] + column[None, :]
            read = there[:, None] & keys.visible[None, :]
        logits += bias_in_bits(tl.load(bias.data + at, mask=read, other=0.0))
    return logits, slope


@jit
def seen(visible, token, rows, document, TRANSPOSED: constexpr, SPEC):
    """Which slots of a tile a row sees; `document` is each row's first_visible."""
    if TRANSPOSED:
        see = visible[:, None]
        if SPEC.CAUSAL:
            see = see & (token[:, None] <= rows.row[None, :])
            if SPEC.DOCUMENTS:
                see = see & (token[:, None] >= document[None, :])
    else:
        see = visible[None, :]
        if SPEC.CAUSAL:
            see = see & (token[None, :] <= rows.row[:, None])
            if SPEC.DOCUMENTS:
                see = see & (token[None, :] >= document[:, None])
    return see


# The backward.


@jit
def load_rows(rows, query, grad_out, relative, rotary, first_visible, results, head, group, lengths, SPEC):
    """A tile of rows of a head for the backward; the pointer first_visible is a sequence's."""
    at = row_index(rows, head, group, lengths, SPEC)
    upstream = load_upstream(rows_at(grad_out, rows, head, group, SPEC), grad_out.n, results, at, rows, lengths, SPEC)
    document = rows.row
    position = rows.row
    if SPEC.DOCUMENTS:
        document = tl.load(first_visible + rows.row, mask=rows.inside, other=0)
        position = rows.row - document
    of_group = rows_at(query, rows, head, group, SPEC)
    queries = load_query(of_group, query.n, relative, rotary, head, position, rows.row, upstream.alive, SPEC)
    return LoadedRows(rows, at, document, position, queries, upstream)


@jit
def tile_gradient(loaded, slots, keys, run, bias, dropout, scaling, TRANSPOSED: constexpr, ALIVE: constexpr, SPEC):
    """A tile's attention weights as they multiplied the values, and the gradients of its logits and of what a soft cap
    makes them of, all fp32. A slot that is not seen has exactly 0 beside a row that is NaN. `run`: relative keys, or
    None; `bias` is the head's. ALIVE: of rows that pass a gradient alone."""
    rows, upstream = loaded.rows, loaded.upstream
    logits, slope = logits_of(loaded.queries, keys, run, bias, scaling, rows, upstream.alive, slots, TRANSPOSED, SPEC)
    see = seen(keys.visible, slots.token, rows, loaded.document, TRANSPOSED, SPEC)
    if TRANSPOSED:
        if ALIVE:
            see = see & upstream.alive[None, :]
        exponent = logits - upstream.lse[None, :]
        if SPEC.TWO_PLANES:
            exponent -= upstream.rest[None, :]
        d_weights = tl.dot(keys.v, tl.trans(upstream.do), input_precision=SPEC.PRECISION)
    else:
        if ALIVE:
            see = see & upstream.alive[:, None]
        exponent = logits - upstream.lse[:, None]
        if SPEC.TWO_PLANES:
            exponent -= upstream.rest[:, None]
        d_weights = tl.dot(upstream.do, tl.trans(keys.v), input_precision=SPEC.PRECISION)
    weights = tl.where(see, at_most_one(exponent), 0.0)
    dropped = weights
    if SPEC.DROPOUT:
        kept = kept_slots(dropout, rows.place.to(tl.int32) + rows.row, slots, TRANSPOSED, SPEC)
        d_weights = tl.where(kept, d_weights * dropout.survivor_scale, 0.0)
        dropped = tl.where(kept, weights * dropout.survivor_scale, 0.0)
    if TRANSPOSED:
        d_logits = weights * (d_weights - upstream.delta[None, :])
    else:
        d_logits = weights * (d_weights - upstream.delta[:, None])
    d_logits = tl.where(see, d_logits, 0.0)
    d_scaled = d_logits
    if SPEC.SOFTCAP:
        d_scaled = tl.where(see, d_logits * slope, 0.0)
    return dropped, d_logits, d_scaled


@jit
def null_slot(loaded, null, head, dropout, scaling, SPEC):
    """The null key, its weight as it multiplied the null value, and the gradient of its logit (before a soft cap), of a
    tile of rows."""
    upstream = loaded.upstream
    null_key = load_vector(null.null_key + head * null.key_h, SPEC)
    logit, slope = scaled(vector_product(loaded.queries.content, null_key, SPEC), scaling, SPEC)
    exponent = logit - upstream.lse
    if SPEC.TWO_PLANES:
        exponent -= upstream.rest
    weight = tl.where(upstream.lse == float("inf"), 0.0, at_most_one(exponent))
    column = tl.arange(0, SPEC.BLOCK_VALUE)
    at = null.null_value + head * null.value_h + column
    nulls = tl.load(at, mask=column < SPEC.VALUE_DIM, other=0.0).to(tl.float32)
    d_weight = tl.sum(upstream.do.to(tl.float32) * nulls[None, :], axis=1)
    dropped = weight
    if SPEC.DROPOUT:
        kept = kept_null(dropout, loaded.rows.place.to(tl.int32) + loaded.rows.row)
        d_weight = tl.where(kept, d_weight * dropout.survivor_scale, 0.0)
        dropped = tl.where(kept, weight * dropout.survivor_scale, 0.0)
    d_logit = weight * (d_weight - upstream.delta)
    if SPEC.SOFTCAP:
        d_logit *= slope
    return null_key, dropped, d_logit
