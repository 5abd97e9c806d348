"""Chunked cross-attention in Triton, forward and backward, for NVIDIA GPUs from compute capability 8.0 on.

State: these kernels have run in Triton's interpreter and compile ahead of time for sm_80, sm_90 and sm_100; no GPU has
run them (`configs.VERIFIED_ON_GPU` is empty), so no call takes them unless they are asked for by name.

Floor. The work is memory-bound: with m queries and S = k * r keys a chunk, the forward does 4 m S d FLOPs over
2 d (m + S) elements moved a (chunk, head), 51 FLOP a byte in bf16 at m = 64 and S = 256, against some 295 that an H100
needs to be busy. So the time cannot be less than the bytes of query, key, value, out and lse over the memory's measured
bandwidth: at batch 8, n = 2048, 32 heads of 128 in bf16, 1.34 GB, 0.40 ms at 3.35 TB/s. The backward moves twice the
bytes. How close the kernels come is unmeasured.

Programs. Forward: one a (batch, chunk, row tile, query head), keys in tiles under an online softmax; heads of a chunk
run side by side, since their keys do in memory, and grouped heads find theirs in the L2 cache. Backward: one a (batch,
chunk, head), which owns its queries and keys, in a single pass of five products with dQ in registers, where the stride
fits one tile (64), the head is at most 128 wide and has its key/value head to itself. Beyond that two launches: dQ by
query tile, dK and dV by key tile over every row and head that reads them. The gradients of the bias and of the null
slot are launches of their own, 32 programs a head, each with a private fp32 copy, summed in a fixed order: within the
main pass their registers would spill. No atomics, nothing depends on timing: results are bitwise reproducible.

Precision. Dots accumulate in fp32, the softmax is fp32. fp32 inputs are multiplied as IEEE fp32 (`input_precision`),
outside the tensor cores: exact and slow. Rotated queries and keys are rounded to the input's dtype before the products.

In the interpreter bf16 is computed as fp32 on copies, because the interpreter multiplies bit patterns of bf16.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import torch

from .. import common as ops_common
from .. import tuning
from . import common, configs
from .configs import VERIFIED_ON_GPU  # noqa: F401 - read by ops/backends.py

try:
    import triton
    import triton.language as tl
    from triton.language import constexpr
except ImportError as error:
    triton = None
    _import_error = f"{type(error).__name__}: {error}"


def _jit(function: Callable) -> Any:
    """triton.jit that never recompiles for another batch, length or number of neighbours."""
    if triton is None:
        return function
    names = function.__code__.co_varnames[: function.__code__.co_argcount]
    return triton.jit(function, do_not_specialize=[name for name in names if name in _LENGTHS])


_LENGTHS = (
    "num_tokens", "num_neighbours", "retrieved_length", "num_heads", "group", "num_chunks", "first_chunk", "last_chunk",
    "row_tiles", "key_tiles", "stride", "first_token", "num_items", "num_copies",
)  # fmt: skip


@_jit
def _load_split(rows, inside, cos, sin,
                DIM: constexpr, WIDTH: constexpr, INTERLEAVED: constexpr,
                BLOCK_PAIR: constexpr, BLOCK_REST: constexpr):  # fmt: skip
    """Vectors at the pointers `rows` as three tiles: the first and the second members of the rotary pairs, rotated,
    and the dimensions that do not turn. Where there are no pairs, or nothing but pairs, the missing tiles repeat
    another one and are never used. Rows not `inside` are not read and come as 0."""
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


@_jit
def _load_split_unturned(vector, inside,
                         DIM: constexpr, WIDTH: constexpr, INTERLEAVED: constexpr,
                         BLOCK_PAIR: constexpr, BLOCK_REST: constexpr):  # fmt: skip
    """One vector, split as `_load_split` does and not rotated, in fp32."""
    pair = tl.arange(0, BLOCK_PAIR)
    if 2 * WIDTH < DIM:
        column = 2 * WIDTH + tl.arange(0, BLOCK_REST)
        rest = tl.load(vector + column, mask=inside & (column < DIM), other=0.0).to(tl.float32)
    if WIDTH > 0:
        first_column = 2 * pair if INTERLEAVED else pair
        second_column = 2 * pair + 1 if INTERLEAVED else pair + WIDTH
        there = inside & (pair < WIDTH)
        first = tl.load(vector + first_column, mask=there, other=0.0).to(tl.float32)
        second = tl.load(vector + second_column, mask=there, other=0.0).to(tl.float32)
    if WIDTH == 0:
        first = rest
        second = rest
    if 2 * WIDTH == DIM:
        rest = first
    return first, second, rest


@_jit
def _store_split(rows, inside, cos, sin, first, second, rest,
                 DIM: constexpr, WIDTH: constexpr, INTERLEAVED: constexpr,
                 BLOCK_PAIR: constexpr, BLOCK_REST: constexpr):  # fmt: skip
    """The gradient of `_load_split`: fp32 tiles are turned back and stored at the pointers `rows`."""
    pair = tl.arange(0, BLOCK_PAIR)
    if 2 * WIDTH < DIM:
        column = 2 * WIDTH + tl.arange(0, BLOCK_REST)
        there = inside[:, None] & (column < DIM)[None, :]
        tl.store(rows[:, None] + column[None, :], rest.to(rows.dtype.element_ty), mask=there)
    if WIDTH > 0:
        first_column = 2 * pair if INTERLEAVED else pair
        second_column = 2 * pair + 1 if INTERLEAVED else pair + WIDTH
        there = inside[:, None] & (pair < WIDTH)[None, :]
        c = tl.load(cos[:, None] + pair[None, :], mask=there, other=0.0).to(tl.float32)
        s = tl.load(sin[:, None] + pair[None, :], mask=there, other=0.0).to(tl.float32)
        x = first * c + second * s
        y = second * c - first * s
        tl.store(rows[:, None] + first_column[None, :], x.to(rows.dtype.element_ty), mask=there)
        tl.store(rows[:, None] + second_column[None, :], y.to(rows.dtype.element_ty), mask=there)


@_jit
def _product(a_first, a_second, a_rest, b_first, b_second, b_rest,
             DIM: constexpr, WIDTH: constexpr, PRECISION: constexpr):  # fmt: skip
    """a · bᵀ of two split tiles, fp32."""
    if 2 * WIDTH < DIM:
        result = tl.dot(a_rest, tl.trans(b_rest), input_precision=PRECISION)
        if WIDTH > 0:
            result = tl.dot(a_first, tl.trans(b_first), result, input_precision=PRECISION)
            result = tl.dot(a_second, tl.trans(b_second), result, input_precision=PRECISION)
    else:
        result = tl.dot(a_first, tl.trans(b_first), input_precision=PRECISION)
        result = tl.dot(a_second, tl.trans(b_second), result, input_precision=PRECISION)
    return result


@_jit
def _add_product(first, second, rest, a, b_first, b_second, b_rest,
                 DIM: constexpr, WIDTH: constexpr, PRECISION: constexpr):  # fmt: skip
    """The split accumulator plus a · b."""
    if 2 * WIDTH < DIM:
        rest = tl.dot(a, b_rest, rest, input_precision=PRECISION)
    if WIDTH > 0:
        first = tl.dot(a, b_first, first, input_precision=PRECISION)
        second = tl.dot(a, b_second, second, input_precision=PRECISION)
    return first, second, rest


@_jit
def _null_product(first, second, rest, null_first, null_second, null_rest, DIM: constexpr, WIDTH: constexpr):
    """Each row of a split tile times the null vector, fp32."""
    if 2 * WIDTH < DIM:
        result = tl.sum(rest.to(tl.float32) * null_rest[None, :], axis=1)
        if WIDTH > 0:
            result += tl.sum(first.to(tl.float32) * null_first[None, :], axis=1)
            result += tl.sum(second.to(tl.float32) * null_second[None, :], axis=1)
    else:
        result = tl.sum(first.to(tl.float32) * null_first[None, :], axis=1)
        result += tl.sum(second.to(tl.float32) * null_second[None, :], axis=1)
    return result


@_jit
def _slots(tile, num_neighbours, retrieved_length, BLOCK: constexpr, WITHIN: constexpr):
    """The slots (neighbour-major, k * r of them) of key tile number `tile`: slot, neighbour, token and whether it
    exists. WITHIN: no tile holds two neighbours, so that a tile never holds a token position twice."""
    lane = tl.arange(0, BLOCK)
    if WITHIN:
        tiles = tl.cdiv(retrieved_length, BLOCK)
        neighbour = tile // tiles + tl.zeros([BLOCK], tl.int32)
        token = (tile % tiles) * BLOCK + lane
        slot = neighbour * retrieved_length + token
        present = token < retrieved_length
    else:
        slot = tile * BLOCK + lane
        neighbour = slot // retrieved_length
        token = slot - neighbour * retrieved_length
        present = slot < num_neighbours * retrieved_length
    return slot, neighbour, token, present


@_jit
def _wide(index, LONG: constexpr):
    """An index about to be multiplied by a stride: 64-bit where some offset inside a chunk needs it."""
    return index.to(tl.int64) if LONG else index


@_jit
def _offsets(slot, neighbour, token, stride_k, stride_r, FLAT: constexpr, LONG: constexpr):
    """Element offsets of slots. FLAT: stride_k is retrieved_length * stride_r, so no slot needs dividing."""
    if FLAT:
        offsets = _wide(slot, LONG) * stride_r
    else:
        offsets = _wide(neighbour, LONG) * stride_k + _wide(token, LONG) * stride_r
    return offsets


@_jit
def _forward_kernel(
    query, key, value, neighbour_mask, attention_bias, query_cos, query_sin, key_cos, key_sin, null_key, null_value,
    out, lse,
    scale, num_tokens, num_neighbours, retrieved_length, num_heads, group, first_chunk, last_chunk, row_tiles,
    key_tiles, stride, first_token,
    query_b, query_n, query_h, key_b, key_l, key_k, key_r, key_h, value_b, value_l, value_k, value_r, value_h,
    mask_b, mask_l, mask_k, mask_r, bias_h, bias_m, query_cos_m, query_sin_m, key_cos_r, key_sin_r,
    null_key_h, null_value_h,
    DIM: constexpr, VALUE_DIM: constexpr, WIDTH: constexpr, INTERLEAVED: constexpr, FLAT: constexpr, LONG: constexpr,
    BIAS_PER_SLOT: constexpr,
    BLOCK_ROWS: constexpr, BLOCK_KEYS: constexpr, BLOCK_PAIR: constexpr, BLOCK_REST: constexpr,
    BLOCK_VALUE: constexpr, PRECISION: constexpr,
):  # fmt: skip
    """Program (batch, chunk, row tile, query head), heads fastest: the heads of a token lie side by side in memory."""
    head = tl.program_id(0) % num_heads
    item = tl.program_id(0) // num_heads
    row_tile = item % row_tiles
    item = item // row_tiles
    chunk = first_chunk + item % (last_chunk - first_chunk)
    batch = (item // (last_chunk - first_chunk)).to(tl.int64)
    kv_head = (head // group).to(tl.int64)
    head = head.to(tl.int64)

    value_column = tl.arange(0, BLOCK_VALUE)
    value_there = value_column < VALUE_DIM
    out_rows = out + (batch * num_tokens * num_heads + head) * VALUE_DIM
    lse_rows = lse + (batch * num_tokens * num_heads + head)

    if (chunk == first_chunk) & (row_tile == 0):
        for start in range(0, first_token, BLOCK_ROWS):
            leading = start + tl.arange(0, BLOCK_ROWS)
            ahead = leading.to(tl.int64) * num_heads
            tl.store(out_rows + (ahead * VALUE_DIM)[:, None] + value_column[None, :],
                     tl.zeros([BLOCK_ROWS, BLOCK_VALUE], out.dtype.element_ty),
                     mask=(leading < first_token)[:, None] & value_there[None, :])  # fmt: skip
            tl.store(lse_rows + ahead, tl.full([BLOCK_ROWS], float("-inf"), tl.float32), mask=leading < first_token)

    row = row_tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    token = first_token + chunk * stride + row
    inside = (row < stride) & (token >= 0) & (token < num_tokens)
    start_token = (first_token + chunk * stride).to(tl.int64)
    q_first, q_second, q_rest = _load_split(
        query + batch * query_b + head * query_h + start_token * query_n + _wide(row, LONG) * query_n, inside,
        query_cos + row * query_cos_m if WIDTH > 0 else None, query_sin + row * query_sin_m if WIDTH > 0 else None,
        DIM, WIDTH, INTERLEAVED, BLOCK_PAIR, BLOCK_REST,
    )  # fmt: skip

    scale_log2 = scale * 1.4426950408889634
    if null_key is not None:
        null_first, null_second, null_rest = _load_split_unturned(
            null_key + head * null_key_h, True, DIM, WIDTH, INTERLEAVED, BLOCK_PAIR, BLOCK_REST
        )
        largest = scale_log2 * _null_product(q_first, q_second, q_rest, null_first, null_second, null_rest, DIM, WIDTH)
        total = tl.full([BLOCK_ROWS], 1.0, tl.float32)
        null = tl.load(null_value + head * null_value_h + value_column, mask=value_there, other=0.0)
        accumulator = tl.zeros([BLOCK_ROWS, BLOCK_VALUE], tl.float32) + null.to(tl.float32)[None, :]
    else:
        largest = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_ROWS], tl.float32)
        accumulator = tl.zeros([BLOCK_ROWS, BLOCK_VALUE], tl.float32)

    chunk64 = chunk.to(tl.int64)
    key_rows = key + batch * key_b + chunk64 * key_l + kv_head * key_h
    value_rows = value + batch * value_b + chunk64 * value_l + kv_head * value_h
    for tile in range(0, key_tiles):
        slot, neighbour, position, visible = _slots(tile, num_neighbours, retrieved_length, BLOCK_KEYS, False)
        if neighbour_mask is not None:
            mask_at = _offsets(slot, neighbour, position, mask_k, mask_r, FLAT, LONG)
            visible = visible & (
                tl.load(neighbour_mask + batch * mask_b + chunk64 * mask_l + mask_at, mask=visible, other=0) != 0
            )
        k_first, k_second, k_rest = _load_split(
            key_rows + _offsets(slot, neighbour, position, key_k, key_r, FLAT, LONG), visible,
            key_cos + position * key_cos_r if WIDTH > 0 else None,
            key_sin + position * key_sin_r if WIDTH > 0 else None,
            DIM, WIDTH, INTERLEAVED, BLOCK_PAIR, BLOCK_REST,
        )  # fmt: skip
        logits = scale_log2 * _product(q_first, q_second, q_rest, k_first, k_second, k_rest, DIM, WIDTH, PRECISION)
        if attention_bias is not None:
            column = slot if BIAS_PER_SLOT else position
            bias = tl.load(
                attention_bias + head * bias_h + (_wide(row, LONG) * bias_m)[:, None] + column[None, :],
                mask=inside[:, None] & visible[None, :], other=0.0,
            )  # fmt: skip
            logits += bias.to(tl.float32) * 1.4426950408889634
        logits = tl.where(visible[None, :], logits, float("-inf"))
        larger = tl.maximum(largest, tl.max(logits, axis=1))
        # A row that has seen nothing yet has the maximum -inf, and -inf - -inf would be NaN.
        finite = tl.where(larger == float("-inf"), 0.0, larger)
        weights = tl.exp2(logits - finite[:, None])
        shrink = tl.exp2(largest - finite)
        total = total * shrink + tl.sum(weights, axis=1)
        v = tl.load(
            value_rows + _offsets(slot, neighbour, position, value_k, value_r, FLAT, LONG)[:, None]
            + value_column[None, :],
            mask=visible[:, None] & value_there[None, :], other=0.0,
        )  # fmt: skip
        accumulator = tl.dot(weights.to(v.dtype), v, accumulator * shrink[:, None], input_precision=PRECISION)
        largest = larger

    nothing = total == 0.0
    accumulator = accumulator / tl.where(nothing, 1.0, total)[:, None]
    at = _wide(row, LONG) * num_heads
    tl.store(out_rows + start_token * num_heads * VALUE_DIM + (at * VALUE_DIM)[:, None] + value_column[None, :],
             accumulator.to(out.dtype.element_ty),
             mask=inside[:, None] & value_there[None, :])  # fmt: skip
    natural = tl.where(nothing, float("-inf"), (largest + tl.log2(total)) * 0.6931471805599453)
    tl.store(lse_rows + start_token * num_heads + at, natural, mask=inside)


@_jit
def _backward_kernel(
    grad_out, query, key, value, neighbour_mask, attention_bias, query_cos, query_sin, key_cos, key_sin,
    null_key, null_value, out, lse,
    grad_query, grad_key, grad_value, bias_copies, null_key_copies, null_value_copies,
    scale, num_tokens, num_neighbours, retrieved_length, num_heads, group, num_chunks, first_chunk, last_chunk,
    row_tiles, key_tiles, stride, first_token, num_items, num_copies,
    grad_out_b, grad_out_n, grad_out_h,
    query_b, query_n, query_h, key_b, key_l, key_k, key_r, key_h, value_b, value_l, value_k, value_r, value_h,
    mask_b, mask_l, mask_k, mask_r, bias_h, bias_m, query_cos_m, query_sin_m, key_cos_r, key_sin_r,
    null_key_h, null_value_h,
    DIM: constexpr, VALUE_DIM: constexpr, WIDTH: constexpr, INTERLEAVED: constexpr, FLAT: constexpr, LONG: constexpr,
    BIAS_PER_SLOT: constexpr, WITHIN: constexpr, STORE_KEYS: constexpr, PARTIAL_SUMS: constexpr, BIAS_ROWS: constexpr,
    BLOCK_ROWS: constexpr, BLOCK_KEYS: constexpr, BLOCK_PAIR: constexpr, BLOCK_REST: constexpr,
    BLOCK_VALUE: constexpr, PRECISION: constexpr,
):  # fmt: skip
    """Gradients seen from a tile of query rows.

    Without PARTIAL_SUMS: of the query and, with STORE_KEYS (one row tile a chunk, one query head a key/value head), of
    key and value in the same pass. Program (batch, chunk, row tile, query head); num_copies is the number of items.
    With PARTIAL_SUMS: of the bias or the null slot. Program (copy, query head) takes every num_copies-th item (batch,
    chunk, row tile) and adds to its own copy. In one kernel with the other gradients this would spill."""
    head32 = tl.program_id(0) % num_heads
    copy = tl.program_id(0) // num_heads
    kv_head = (head32 // group).to(tl.int64)
    num_kv_heads = num_heads // group
    head = head32.to(tl.int64)
    value_column = tl.arange(0, BLOCK_VALUE)
    value_there = value_column < VALUE_DIM
    scale_log2 = scale * 1.4426950408889634

    # One item a program unless partial sums are kept: the compiler then drops the loop, which costs registers.
    for step in range(0, tl.cdiv(num_items - copy, num_copies) if PARTIAL_SUMS else 1):
        work = copy + step * num_copies
        row_tile = work % row_tiles
        item = work // row_tiles
        if STORE_KEYS:
            chunk = item % num_chunks
            batch = (item // num_chunks).to(tl.int64)
        else:
            chunk = first_chunk + item % (last_chunk - first_chunk)
            batch = (item // (last_chunk - first_chunk)).to(tl.int64)
        chunk64 = chunk.to(tl.int64)
        attended = (chunk >= first_chunk) & (chunk < last_chunk)
        readable = tl.where(attended, num_neighbours * retrieved_length, 0)
        grad_query_rows = grad_query + (batch * num_tokens * num_heads + head) * DIM

        if not PARTIAL_SUMS and (chunk == first_chunk) & (row_tile == 0):
            for start in range(0, first_token, BLOCK_ROWS):
                leading = start + tl.arange(0, BLOCK_ROWS)
                column = tl.arange(0, 256)
                tl.store(grad_query_rows + (leading.to(tl.int64) * num_heads * DIM)[:, None] + column[None, :],
                         tl.zeros([BLOCK_ROWS, 256], grad_query.dtype.element_ty),
                         mask=(leading < first_token)[:, None] & (column < DIM)[None, :])  # fmt: skip

        row = row_tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        token = first_token + chunk * stride + row
        inside = (row < stride) & (token >= 0) & (token < num_tokens)
        start_token = (first_token + chunk * stride).to(tl.int64)
        out_row = (batch * num_tokens + start_token) * num_heads + head
        natural = tl.load(lse + out_row + _wide(row, LONG) * num_heads, mask=inside,
                          other=float("-inf"))  # fmt: skip
        # Rows that saw nothing have lse -inf: they pass no gradient, so neither their query nor grad_out is read.
        alive = natural != float("-inf")
        lse_log2 = tl.where(alive, natural * 1.4426950408889634, float("inf"))
        q_cos = query_cos + row * query_cos_m if WIDTH > 0 else None
        q_sin = query_sin + row * query_sin_m if WIDTH > 0 else None
        q_first, q_second, q_rest = _load_split(
            query + batch * query_b + head * query_h + start_token * query_n + _wide(row, LONG) * query_n, alive,
            q_cos, q_sin,
            DIM, WIDTH, INTERLEAVED, BLOCK_PAIR, BLOCK_REST,
        )  # fmt: skip
        row_there = alive[:, None] & value_there[None, :]
        do = tl.load(grad_out + batch * grad_out_b + head * grad_out_h + start_token * grad_out_n
                     + (_wide(row, LONG) * grad_out_n)[:, None] + value_column[None, :],
                     mask=row_there, other=0.0)  # fmt: skip
        o = tl.load(out + out_row * VALUE_DIM + (_wide(row, LONG) * (num_heads * VALUE_DIM))[:, None]
                    + value_column[None, :], mask=row_there, other=0.0)  # fmt: skip
        delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), axis=1)

        dq_first = tl.zeros([BLOCK_ROWS, BLOCK_PAIR], tl.float32)
        dq_second = tl.zeros([BLOCK_ROWS, BLOCK_PAIR], tl.float32)
        dq_rest = tl.zeros([BLOCK_ROWS, BLOCK_REST], tl.float32)

        if null_key is not None and (null_key_copies is not None or not PARTIAL_SUMS):
            null_first, null_second, null_rest = _load_split_unturned(
                null_key + head * null_key_h, True, DIM, WIDTH, INTERLEAVED, BLOCK_PAIR, BLOCK_REST
            )
            weight = tl.exp2(
                scale_log2 * _null_product(q_first, q_second, q_rest, null_first, null_second, null_rest, DIM, WIDTH)
                - lse_log2
            )
            null = tl.load(null_value + head * null_value_h + value_column, mask=value_there, other=0.0)
            d_logit = weight * (tl.sum(do.to(tl.float32) * null.to(tl.float32)[None, :], axis=1) - delta)
            if not PARTIAL_SUMS:
                if 2 * WIDTH < DIM:
                    dq_rest += d_logit[:, None] * null_rest[None, :]
                if WIDTH > 0:
                    dq_first += d_logit[:, None] * null_first[None, :]
                    dq_second += d_logit[:, None] * null_second[None, :]
            if null_key_copies is not None:
                copy64 = copy.to(tl.int64)
                copied = null_key_copies + (copy64 * num_heads + head) * DIM
                pair = tl.arange(0, BLOCK_PAIR)
                if 2 * WIDTH < DIM:
                    rest_column = 2 * WIDTH + tl.arange(0, BLOCK_REST)
                    change = scale * tl.sum(d_logit[:, None] * q_rest.to(tl.float32), axis=0)
                    sum_so_far = tl.load(copied + rest_column, mask=rest_column < DIM, other=0.0)
                    tl.store(copied + rest_column, sum_so_far + change, mask=rest_column < DIM)
                if WIDTH > 0:
                    first_column = 2 * pair if INTERLEAVED else pair
                    second_column = 2 * pair + 1 if INTERLEAVED else pair + WIDTH
                    change = scale * tl.sum(d_logit[:, None] * q_first.to(tl.float32), axis=0)
                    sum_so_far = tl.load(copied + first_column, mask=pair < WIDTH, other=0.0)
                    tl.store(copied + first_column, sum_so_far + change, mask=pair < WIDTH)
                    change = scale * tl.sum(d_logit[:, None] * q_second.to(tl.float32), axis=0)
                    sum_so_far = tl.load(copied + second_column, mask=pair < WIDTH, other=0.0)
                    tl.store(copied + second_column, sum_so_far + change, mask=pair < WIDTH)
                change = tl.sum(weight[:, None] * do.to(tl.float32), axis=0)
                copied = null_value_copies + (copy64 * num_heads + head) * VALUE_DIM + value_column
                tl.store(copied, tl.load(copied, mask=value_there, other=0.0) + change, mask=value_there)
                # The next item of this program may read these sums from other threads.
                tl.debug_barrier()

        key_rows = key + batch * key_b + chunk64 * key_l + kv_head * key_h
        value_rows = value + batch * value_b + chunk64 * value_l + kv_head * value_h
        for tile in range(0, key_tiles if bias_copies is not None or not PARTIAL_SUMS else 0):
            slot, neighbour, position, present = _slots(tile, num_neighbours, retrieved_length, BLOCK_KEYS, WITHIN)
            visible = present & (slot < readable)
            if neighbour_mask is not None:
                mask_at = _offsets(slot, neighbour, position, mask_k, mask_r, FLAT, LONG)
                visible = visible & (
                    tl.load(neighbour_mask + batch * mask_b + chunk64 * mask_l + mask_at, mask=visible, other=0) != 0
                )
            k_cos = key_cos + position * key_cos_r if WIDTH > 0 else None
            k_sin = key_sin + position * key_sin_r if WIDTH > 0 else None
            k_first, k_second, k_rest = _load_split(
                key_rows + _offsets(slot, neighbour, position, key_k, key_r, FLAT, LONG), visible, k_cos, k_sin,
                DIM, WIDTH, INTERLEAVED, BLOCK_PAIR, BLOCK_REST,
            )  # fmt: skip
            v = tl.load(
                value_rows + _offsets(slot, neighbour, position, value_k, value_r, FLAT, LONG)[:, None]
                + value_column[None, :], mask=visible[:, None] & value_there[None, :], other=0.0,
            )  # fmt: skip
            logits = scale_log2 * _product(q_first, q_second, q_rest, k_first, k_second, k_rest, DIM, WIDTH, PRECISION)
            if attention_bias is not None:
                column = slot if BIAS_PER_SLOT else position
                bias = tl.load(
                    attention_bias + head * bias_h + (_wide(row, LONG) * bias_m)[:, None] + column[None, :],
                    mask=alive[:, None] & visible[None, :], other=0.0,
                )  # fmt: skip
                logits += bias.to(tl.float32) * 1.4426950408889634
            weights = tl.where(visible[None, :], tl.exp2(logits - lse_log2[:, None]), 0.0)
            d_weights = tl.dot(do, tl.trans(v), input_precision=PRECISION)
            d_logits = tl.where(visible[None, :], weights * (d_weights - delta[:, None]), 0.0)
            if bias_copies is not None:
                bias_columns = num_neighbours * retrieved_length if BIAS_PER_SLOT else retrieved_length
                column = slot if BIAS_PER_SLOT else position
                sums = (
                    bias_copies + (copy.to(tl.int64) * num_heads + head) * BIAS_ROWS * bias_columns
                    + (_wide(row, LONG) * bias_columns)[:, None] + column[None, :]
                )  # fmt: skip
                there = alive[:, None] & visible[None, :]
                tl.store(sums, tl.load(sums, mask=there, other=0.0) + d_logits, mask=there)
                # Another neighbour's tile, or the next item, adds to the same sums, perhaps from other threads.
                tl.debug_barrier()
            if not PARTIAL_SUMS:
                d_logits = d_logits.to(q_rest.dtype)
                dq_first, dq_second, dq_rest = _add_product(
                    dq_first, dq_second, dq_rest, d_logits, k_first, k_second, k_rest, DIM, WIDTH, PRECISION
                )
            if STORE_KEYS:
                first_slot = (batch * num_chunks + chunk) * (num_neighbours * retrieved_length) * num_kv_heads + kv_head
                slot_rows = _wide(slot, LONG) * num_kv_heads
                dv = tl.dot(tl.trans(weights.to(do.dtype)), do, input_precision=PRECISION)
                # A masked token's gradient is 0 even beside a query that is NaN.
                dv = tl.where(visible[:, None], dv, 0.0)
                tl.store(grad_value + first_slot * VALUE_DIM + (slot_rows * VALUE_DIM)[:, None] + value_column[None, :],
                         dv.to(grad_value.dtype.element_ty), mask=present[:, None] & value_there[None, :])  # fmt: skip
                dk_first, dk_second, dk_rest = _add_product(
                    tl.zeros([BLOCK_KEYS, BLOCK_PAIR], tl.float32), tl.zeros([BLOCK_KEYS, BLOCK_PAIR], tl.float32),
                    tl.zeros([BLOCK_KEYS, BLOCK_REST], tl.float32),
                    tl.trans(d_logits), q_first, q_second, q_rest, DIM, WIDTH, PRECISION,
                )  # fmt: skip
                _store_split(
                    grad_key + first_slot * DIM + slot_rows * DIM, present, k_cos, k_sin,
                    tl.where(visible[:, None], scale * dk_first, 0.0),
                    tl.where(visible[:, None], scale * dk_second, 0.0),
                    tl.where(visible[:, None], scale * dk_rest, 0.0),
                    DIM, WIDTH, INTERLEAVED, BLOCK_PAIR, BLOCK_REST,
                )  # fmt: skip
        if not PARTIAL_SUMS:
            _store_split(
                grad_query + out_row * DIM + _wide(row, LONG) * (num_heads * DIM), inside, q_cos, q_sin,
                scale * dq_first, scale * dq_second, scale * dq_rest,
                DIM, WIDTH, INTERLEAVED, BLOCK_PAIR, BLOCK_REST,
            )  # fmt: skip


@_jit
def _backward_keys_kernel(
    grad_out, query, key, value, neighbour_mask, attention_bias, query_cos, query_sin, key_cos, key_sin, out, lse,
    grad_key, grad_value,
    scale, num_tokens, num_neighbours, retrieved_length, num_heads, group, num_chunks, first_chunk, last_chunk,
    row_tiles, key_tiles, stride, first_token,
    grad_out_b, grad_out_n, grad_out_h,
    query_b, query_n, query_h, key_b, key_l, key_k, key_r, key_h, value_b, value_l, value_k, value_r, value_h,
    mask_b, mask_l, mask_k, mask_r, bias_h, bias_m, query_cos_m, query_sin_m, key_cos_r, key_sin_r,
    DIM: constexpr, VALUE_DIM: constexpr, WIDTH: constexpr, INTERLEAVED: constexpr, FLAT: constexpr, LONG: constexpr,
    BIAS_PER_SLOT: constexpr,
    BLOCK_ROWS: constexpr, BLOCK_KEYS: constexpr, BLOCK_PAIR: constexpr, BLOCK_REST: constexpr,
    BLOCK_VALUE: constexpr, PRECISION: constexpr,
):  # fmt: skip
    """Gradients of a tile of keys and values over all query rows and heads that read it.
    Program (batch, chunk, key tile, key/value head); every chunk, so that unattended ones get their zeros."""
    num_kv_heads = num_heads // group
    kv_head32 = tl.program_id(0) % num_kv_heads
    item = tl.program_id(0) // num_kv_heads
    key_tile = item % key_tiles
    item = item // key_tiles
    chunk = item % num_chunks
    batch = (item // num_chunks).to(tl.int64)
    chunk64 = chunk.to(tl.int64)
    kv_head = kv_head32.to(tl.int64)
    value_column = tl.arange(0, BLOCK_VALUE)
    value_there = value_column < VALUE_DIM
    scale_log2 = scale * 1.4426950408889634

    attended = (chunk >= first_chunk) & (chunk < last_chunk)
    readable = tl.where(attended, num_neighbours * retrieved_length, 0)
    slot, neighbour, position, present = _slots(key_tile, num_neighbours, retrieved_length, BLOCK_KEYS, False)
    visible = present & (slot < readable)
    if neighbour_mask is not None:
        mask_at = _offsets(slot, neighbour, position, mask_k, mask_r, FLAT, LONG)
        visible = visible & (
            tl.load(neighbour_mask + batch * mask_b + chunk64 * mask_l + mask_at, mask=visible, other=0) != 0
        )
    k_cos = key_cos + position * key_cos_r if WIDTH > 0 else None
    k_sin = key_sin + position * key_sin_r if WIDTH > 0 else None
    k_first, k_second, k_rest = _load_split(
        key + batch * key_b + chunk64 * key_l + kv_head * key_h
        + _offsets(slot, neighbour, position, key_k, key_r, FLAT, LONG), visible, k_cos, k_sin,
        DIM, WIDTH, INTERLEAVED, BLOCK_PAIR, BLOCK_REST,
    )  # fmt: skip
    v = tl.load(
        value + batch * value_b + chunk64 * value_l + kv_head * value_h
        + _offsets(slot, neighbour, position, value_k, value_r, FLAT, LONG)[:, None] + value_column[None, :],
        mask=visible[:, None] & value_there[None, :], other=0.0,
    )  # fmt: skip

    dk_first = tl.zeros([BLOCK_KEYS, BLOCK_PAIR], tl.float32)
    dk_second = tl.zeros([BLOCK_KEYS, BLOCK_PAIR], tl.float32)
    dk_rest = tl.zeros([BLOCK_KEYS, BLOCK_REST], tl.float32)
    dv = tl.zeros([BLOCK_KEYS, BLOCK_VALUE], tl.float32)
    for work in range(0, group * row_tiles):
        head = kv_head * group + work // row_tiles
        row = (work % row_tiles) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        token = first_token + chunk * stride + row
        inside = (row < stride) & (token >= 0) & (token < num_tokens)
        start_token = (first_token + chunk * stride).to(tl.int64)
        out_row = (batch * num_tokens + start_token) * num_heads + head
        natural = tl.load(lse + out_row + _wide(row, LONG) * num_heads, mask=inside,
                          other=float("-inf"))  # fmt: skip
        alive = natural != float("-inf")
        lse_log2 = tl.where(alive, natural * 1.4426950408889634, float("inf"))
        q_first, q_second, q_rest = _load_split(
            query + batch * query_b + head * query_h + start_token * query_n + _wide(row, LONG) * query_n, alive,
            query_cos + row * query_cos_m if WIDTH > 0 else None, query_sin + row * query_sin_m if WIDTH > 0 else None,
            DIM, WIDTH, INTERLEAVED, BLOCK_PAIR, BLOCK_REST,
        )  # fmt: skip
        there = alive[:, None] & value_there[None, :]
        do = tl.load(grad_out + batch * grad_out_b + head * grad_out_h + start_token * grad_out_n
                     + (_wide(row, LONG) * grad_out_n)[:, None] + value_column[None, :],
                     mask=there, other=0.0)  # fmt: skip
        o = tl.load(out + out_row * VALUE_DIM + (_wide(row, LONG) * (num_heads * VALUE_DIM))[:, None]
                    + value_column[None, :], mask=there, other=0.0)  # fmt: skip
        delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), axis=1)
        logits = scale_log2 * _product(k_first, k_second, k_rest, q_first, q_second, q_rest, DIM, WIDTH, PRECISION)
        if attention_bias is not None:
            column = slot if BIAS_PER_SLOT else position
            bias = tl.load(
                attention_bias + head * bias_h + (_wide(row, LONG) * bias_m)[None, :] + column[:, None],
                mask=alive[None, :] & visible[:, None], other=0.0,
            )  # fmt: skip
            logits += bias.to(tl.float32) * 1.4426950408889634
        weights = tl.where(visible[:, None], tl.exp2(logits - lse_log2[None, :]), 0.0)
        dv = tl.dot(weights.to(do.dtype), do, dv, input_precision=PRECISION)
        d_logits = weights * (tl.dot(v, tl.trans(do), input_precision=PRECISION) - delta[None, :])
        dk_first, dk_second, dk_rest = _add_product(
            dk_first, dk_second, dk_rest, d_logits.to(q_rest.dtype), q_first, q_second, q_rest, DIM, WIDTH, PRECISION
        )

    # A masked token's gradient is 0 even beside a query that is NaN.
    first_slot = (batch * num_chunks + chunk) * (num_neighbours * retrieved_length) * num_kv_heads + kv_head
    slot_rows = _wide(slot, LONG) * num_kv_heads
    tl.store(grad_value + first_slot * VALUE_DIM + (slot_rows * VALUE_DIM)[:, None] + value_column[None, :],
             tl.where(visible[:, None], dv, 0.0).to(grad_value.dtype.element_ty),
             mask=present[:, None] & value_there[None, :])  # fmt: skip
    _store_split(
        grad_key + first_slot * DIM + slot_rows * DIM, present, k_cos, k_sin,
        tl.where(visible[:, None], scale * dk_first, 0.0),
        tl.where(visible[:, None], scale * dk_second, 0.0),
        tl.where(visible[:, None], scale * dk_rest, 0.0),
        DIM, WIDTH, INTERLEAVED, BLOCK_PAIR, BLOCK_REST,
    )  # fmt: skip


_MARGIN = 256  # masked lanes of a tile lie at most this far beyond the last row or slot


@dataclass(frozen=True)
class Launch:
    """One kernel launch: `kernel[(programs,)](**arguments)` under `settings`, which were chosen for `kind`."""

    kind: str
    kernel: Any
    programs: int
    arguments: dict[str, Any]
    settings: configs.LaunchSettings

    def __call__(self) -> None:
        if self.programs > 0:
            self.kernel[(self.programs,)](
                **self.arguments, num_warps=self.settings.num_warps, num_stages=self.settings.num_stages
            )


def _strides(name: str, tensor: torch.Tensor | None, axes: str) -> dict[str, int]:
    """Strides of the leading axes as kernel arguments `<name>_<axis>`, 0 for an absent tensor."""
    return {f"{name}_{axis}": 0 if tensor is None else tensor.stride(i) for i, axis in enumerate(axes)}


@lru_cache(maxsize=64)
def _compute_capability(device: torch.device) -> int:
    """90 for sm_90. The interpreter takes the settings of sm_90."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def _needs_long_offsets(query, key, value, neighbour_mask, attention_bias, grad_out, stride: int) -> bool:
    """Whether an offset from the first element of a chunk can pass 2^31, so that 32-bit products would overflow.
    Offsets of chunks, batches and heads are 64-bit always."""
    _, _, k, r, hk, d = key.shape
    rows, slots = stride + _MARGIN, k * r + _MARGIN
    width = max(d, value.shape[-1])
    furthest = [rows * query.stride(1), rows * query.shape[2] * width, slots * hk * width]
    if grad_out is not None:
        furthest.append(rows * grad_out.stride(1))
    if attention_bias is not None:
        furthest += [rows * attention_bias.stride(1), rows * slots]
    for tensor in (key, value, neighbour_mask):
        if tensor is not None:
            furthest.append((k + _MARGIN) * tensor.stride(2) + (r + _MARGIN) * tensor.stride(3))
            furthest.append(slots * tensor.stride(3))
    return max(furthest) + 2 * width >= 2**31


def _shared_arguments(query, key, value, neighbour_mask, attention_bias, query_cos, query_sin, key_cos, key_sin,
                      null_key, null_value, rotary_interleaved, scale, stride, first_token, *,
                      grad_out=None):  # fmt: skip
    """What every kernel takes, apart from tiles."""
    n, h, d = query.shape[1:]
    num_chunks, k, r, hk = key.shape[1:5]
    first_chunk, last_chunk = common.attended_chunks(n, num_chunks, stride, first_token)
    moved = [(tensor.stride(2), tensor.stride(3)) for tensor in (key, value, neighbour_mask) if tensor is not None]
    width = 0 if query_cos is None else query_cos.shape[1]
    return {
        "query": query, "key": key, "value": value, "attention_bias": attention_bias,
        # As bytes: Triton's interpreter cannot use a bool that was loaded as a mask.
        "neighbour_mask": None if neighbour_mask is None else neighbour_mask.view(torch.uint8),
        "query_cos": query_cos, "query_sin": query_sin, "key_cos": key_cos, "key_sin": key_sin,
        "scale": float(scale), "num_tokens": n, "num_neighbours": k, "retrieved_length": r, "num_heads": h,
        "group": h // hk, "first_chunk": first_chunk, "last_chunk": last_chunk, "stride": stride,
        "first_token": first_token,
        **_strides("query", query, "bnh"), **_strides("key", key, "blkrh"), **_strides("value", value, "blkrh"),
        **_strides("mask", neighbour_mask, "blkr"), **_strides("bias", attention_bias, "hm"),
        **_strides("query_cos", query_cos, "m"), **_strides("query_sin", query_sin, "m"),
        **_strides("key_cos", key_cos, "r"), **_strides("key_sin", key_sin, "r"),
        "DIM": d, "VALUE_DIM": value.shape[-1], "WIDTH": width, "INTERLEAVED": bool(rotary_interleaved),
        "FLAT": all(k == 1 or of_k == r * of_r for of_k, of_r in moved),
        "LONG": _needs_long_offsets(query, key, value, neighbour_mask, attention_bias, grad_out, stride),
        "BIAS_PER_SLOT": attention_bias is not None and k > 1 and attention_bias.shape[2] == k * r,
        "BLOCK_PAIR": configs.power_of_two(width), "BLOCK_REST": configs.power_of_two(d - 2 * width),
        "BLOCK_VALUE": configs.power_of_two(value.shape[-1]),
    }  # fmt: skip


def _null_arguments(null_key, null_value) -> dict[str, Any]:
    return {
        "null_key": null_key, "null_value": null_value,
        **_strides("null_key", null_key, "h"), **_strides("null_value", null_value, "h"),
    }  # fmt: skip


def _tile_arguments(settings: configs.LaunchSettings) -> dict[str, Any]:
    return {
        "BLOCK_ROWS": settings.block_rows,
        "BLOCK_KEYS": settings.block_keys,
        "PRECISION": settings.precision,
    }


def _choice(kind: str, inputs: tuple) -> tuple:
    """What launch settings depend on: the arguments of `configs.choose`."""
    query, _, value, _, attention_bias, query_cos = inputs[:6]
    width = configs.tile_width(query.shape[-1], value.shape[-1], 0 if query_cos is None else query_cos.shape[1])
    options = attention_bias is not None or query_cos is not None or inputs[9] is not None
    return kind, _compute_capability(query.device), query.dtype, width, options, inputs[-2]


def _choose(kind: str, inputs: tuple) -> Any:
    return configs.choose(*_choice(kind, inputs))


def plan_forward(out, lse, inputs: tuple, settings: configs.LaunchSettings | None = None) -> Launch:
    """The forward's launch. `inputs` are the op's arguments; some chunk must be attended."""
    query, key = inputs[:2]
    stride = inputs[-2]
    settings = settings or _choose("forward", inputs)
    shared = _shared_arguments(*inputs)
    row_tiles = -(-stride // settings.block_rows)
    arguments = {
        **shared, **_null_arguments(*inputs[9:11]), "out": out, "lse": lse, "row_tiles": row_tiles,
        "key_tiles": -(-key.shape[2] * key.shape[3] // settings.block_keys), **_tile_arguments(settings),
    }  # fmt: skip
    programs = query.shape[0] * (shared["last_chunk"] - shared["first_chunk"]) * row_tiles * query.shape[2]
    return Launch("forward", _forward_kernel, programs, arguments, settings)


def single_pass(query, key, stride: int, settings: configs.LaunchSettings) -> bool:
    """Whether one program can hold all query rows that read its keys, and so make their gradients in one pass."""
    return stride <= settings.block_rows and query.shape[2] == key.shape[4]


def plan_backward(grad_out, out, lse, gradients: tuple, copies: tuple, inputs: tuple) -> list[Launch]:
    """The backward's launches: one for the gradients of query, key and value, or two where `single_pass` says no,
    and one more for those of the bias and of the null slot each. `copies` are the partial sums of the gradients of
    attention_bias, null_key and null_value, [copies, ...] fp32 and zero, None where not wanted."""
    query, key = inputs[:2]
    stride = inputs[-2]
    grad_query, grad_key, grad_value = gradients
    b, _, h, _ = query.shape
    num_chunks, k, r, hk = key.shape[1:5]
    shared = {
        **_shared_arguments(*inputs, grad_out=grad_out), "grad_out": grad_out, **_strides("grad_out", grad_out, "bnh"),
        "out": out, "lse": lse, "num_chunks": num_chunks,
    }  # fmt: skip
    attended = shared["last_chunk"] - shared["first_chunk"]

    def of_rows(kind: str, copies: tuple, store_keys: bool) -> Launch:
        settings = _choose(kind, inputs)
        row_tiles = -(-stride // settings.block_rows)
        # Tiles of one neighbour only where several neighbours add to the same bias gradient.
        within = copies[0] is not None and k > 1 and not shared["BIAS_PER_SLOT"]
        key_tiles = k * -(-r // settings.block_keys) if within else -(-k * r // settings.block_keys)
        num_items = b * (num_chunks if store_keys else attended) * row_tiles
        wanted = [copy for copy in copies if copy is not None]
        num_copies = wanted[0].shape[0] if wanted else num_items
        arguments = {
            **shared, **_null_arguments(*inputs[9:11]), "grad_query": grad_query, "grad_key": grad_key,
            "grad_value": grad_value, "bias_copies": copies[0], "null_key_copies": copies[1],
            "null_value_copies": copies[2], "row_tiles": row_tiles, "key_tiles": key_tiles, "num_items": num_items,
            "num_copies": num_copies, "WITHIN": within, "STORE_KEYS": store_keys, "PARTIAL_SUMS": bool(wanted),
            "BIAS_ROWS": 0 if copies[0] is None else copies[0].shape[2], **_tile_arguments(settings),
        }  # fmt: skip
        return Launch(kind, _backward_kernel, num_copies * h, arguments, settings)

    settings = _choose("backward", inputs)
    if settings is not None and single_pass(query, key, stride, settings):
        launches = [of_rows("backward", (None, None, None), True)]
    else:
        settings = _choose("backward_keys", inputs)
        key_tiles = -(-k * r // settings.block_keys)
        arguments = {
            **shared, "grad_key": grad_key, "grad_value": grad_value, "key_tiles": key_tiles,
            "row_tiles": -(-stride // settings.block_rows), **_tile_arguments(settings),
        }  # fmt: skip
        launches = [
            of_rows("backward_queries", (None, None, None), False),
            Launch("backward_keys", _backward_keys_kernel, b * num_chunks * key_tiles * hk, arguments, settings),
        ]
    if copies[0] is not None:
        launches.append(of_rows("backward_bias", (copies[0], None, None), False))
    if copies[1] is not None:
        launches.append(of_rows("backward_null", (None, *copies[1:]), False))
    return launches


def _tune(kinds: tuple[str, ...], inputs: tuple, run: Callable[[], tuple[torch.Tensor, ...]]) -> None:
    """Times the candidates of each kind of launch that has not been tuned yet, and uses the fastest from then on.
    `run` executes the operation under the settings in force and returns what it computed."""
    if not (inputs[0].is_cuda and torch.cuda.is_current_stream_capturing()):
        for kind in kinds:
            choice = _choice(kind, inputs)
            if choice in configs.tuned or kind in configs.overrides:
                continue
            key = tuning.key_of(
                operation="chunked_cross_attention", choice=choice, triton=triton.__version__, code=_code(),
                device=torch.cuda.get_device_name(inputs[0].device) if inputs[0].is_cuda else "interpreter",
            )  # fmt: skip
            settings = _remembered(key)
            if settings is None:

                def with_settings(settings, kind=kind):
                    with configs.override(**{kind: settings}):
                        return run()

                settings, record = tuning.tune(configs.candidates(*choice), with_settings)
                tuning.save(key, {"settings": asdict(settings), "milliseconds": record})
            configs.tuned[choice] = settings


def _remembered(key: str) -> configs.LaunchSettings | None:
    """The settings in the tuning cache; an entry that makes none is ignored with a warning."""
    entry = tuning.load().get(key)
    try:
        return None if entry is None else configs.LaunchSettings(**entry["settings"])
    except (TypeError, KeyError) as error:
        warnings.warn(
            f"retro_kernels: an entry of the tuning cache {tuning.cache_file()} is not understood "
            f"({type(error).__name__}: {error}) and is tuned again",
            stacklevel=2,
        )
        return None


@lru_cache(maxsize=1)
def _code() -> str:
    return tuning.source_hash(__file__, configs.__file__)


def interpreting() -> bool:
    """Whether the kernels were made for Triton's interpreter (TRITON_INTERPRET=1 when this module was imported)."""
    return triton is not None and not isinstance(_forward_kernel, triton.JITFunction)


def _as_interpretable(tensors: tuple) -> tuple:
    """bf16 tensors as fp32: in the interpreter, tl.dot multiplies the bit patterns of bf16."""
    return tuple(
        value.float() if isinstance(value, torch.Tensor) and value.dtype == torch.bfloat16 else value
        for value in tensors
    )


def _on_device_of(tensor: torch.Tensor):
    return torch.cuda.device(tensor.device) if tensor.device.type == "cuda" else nullcontext()


def _forward(*inputs) -> tuple[torch.Tensor, torch.Tensor]:
    query, key, value = inputs[:3]
    stride, first_token = inputs[-2:]
    out, lse = common.allocate_forward(query, value)
    first_chunk, last_chunk = common.attended_chunks(query.shape[1], key.shape[1], stride, first_token)
    with _on_device_of(query):
        if first_chunk >= last_chunk or out.numel() == 0:
            out.zero_()
            lse.fill_(float("-inf"))
        elif interpreting() and query.dtype == torch.bfloat16:
            wide = torch.empty_like(out, dtype=torch.float32)
            plan_forward(wide, lse, _as_interpretable(inputs))()
            out.copy_(wide)
        else:

            def run() -> tuple[torch.Tensor, ...]:
                plan_forward(out, lse, inputs)()
                return out, lse

            if tuning.enabled():
                _tune(("forward",), inputs, run)
            run()
    return out, lse


def _backward(grad_out, *inputs) -> tuple[torch.Tensor, ...]:
    slots, (out, lse), settings = inputs[:11], inputs[11:13], inputs[13:17]
    bias_gradient, null_gradient = inputs[17:]
    query, key, value, _, attention_bias = slots[:5]
    null_key, null_value = slots[9:]
    gradients = common.allocate_backward(
        query, key, value, attention_bias, null_key, null_value, bias_gradient, null_gradient
    )
    with _on_device_of(query):
        first_chunk, last_chunk = common.attended_chunks(query.shape[1], key.shape[1], *settings[2:])
        if first_chunk >= last_chunk or query.numel() == 0:
            for gradient in gradients:
                gradient.zero_()
            return gradients
        if grad_out.stride(-1) != 1:
            grad_out = grad_out.contiguous()

        num_copies = min(common.PARTIAL_COPIES, query.shape[0] * (last_chunk - first_chunk))

        def partial_sums(tensor: torch.Tensor | None, wanted: bool) -> torch.Tensor | None:
            if tensor is None or not wanted:
                return None
            return ops_common.allocate((num_copies, *tensor.shape), torch.float32, tensor.device)

        copies = (
            partial_sums(attention_bias, bias_gradient),
            partial_sums(null_key, null_gradient),
            partial_sums(null_value, null_gradient),
        )
        call = (grad_out, out.contiguous(), lse.contiguous(), gradients[:3], copies, (*slots, *settings))
        if interpreting() and query.dtype == torch.bfloat16:
            wide = tuple(torch.empty_like(gradient, dtype=torch.float32) for gradient in gradients[:3])
            call = (*_as_interpretable(call[:3]), wide, copies, _as_interpretable(call[5]))

        def run() -> tuple[torch.Tensor, ...]:
            for copy in copies:
                if copy is not None:
                    copy.zero_()
            for launch in plan_backward(*call):
                launch()
            return (*call[3], *(copy for copy in copies if copy is not None))

        if tuning.enabled():
            _tune(tuple(launch.kind for launch in plan_backward(*call)), call[5], run)
        run()
        if interpreting() and query.dtype == torch.bfloat16:
            for gradient, result in zip(gradients[:3], wide, strict=True):
                gradient.copy_(result)
        for gradient, copy in zip(gradients[3:], copies, strict=True):
            if copy is not None:
                gradient.copy_(copy.sum(0))
    return gradients


@lru_cache(maxsize=1)
def unavailable() -> str | None:
    """Why this backend cannot run in this process, with the remedy, or None."""
    if triton is None:
        return (
            f"Triton cannot be imported ({_import_error}): install it with `pip install triton` (Linux, 3.6 or newer)"
        )
    if interpreting():
        return None
    if torch.version.hip is not None:
        return 'this PyTorch is built for ROCm, and the kernels are written for NVIDIA GPUs: use backend="reference"'
    if not torch.cuda.is_available():
        return (
            "no CUDA device is usable: install a CUDA build of PyTorch on a machine with an NVIDIA GPU, or set "
            "TRITON_INTERPRET=1 before retro_kernels is imported to run the kernels, very slowly, on the CPU"
        )
    best = max(torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count()))
    if best < (8, 0):
        return f"the GPU has compute capability {best[0]}.{best[1]} and the kernels need 8.0 (Ampere) or newer"
    return None


def refusal(call) -> str | None:
    """Why this call cannot run here, or None."""
    query = call.query
    if query.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f'query is {query.dtype}; the Triton kernels take float32, float16, bfloat16: use backend="reference"'
    if call.relative_key is not None:
        return 'relative_key is not supported by the Triton kernels yet: use backend="reference"'
    if call.dropout_p > 0:
        return f'dropout_p is {call.dropout_p}; the Triton kernels have no dropout yet: use backend="reference"'
    if max(query.shape[-1], call.value.shape[-1]) > 256:
        return f"head sizes are {query.shape[-1]} and {call.value.shape[-1]}; the Triton kernels take at most 256"
    if interpreting():
        return None
    if query.device.type != "cuda":
        return (
            f"query is on {query.device}; the Triton kernels need a CUDA tensor (or TRITON_INTERPRET=1 set before "
            "retro_kernels is imported)"
        )
    major, minor = torch.cuda.get_device_capability(query.device)
    if major < 8:
        return f"{query.device} has compute capability {major}.{minor}; the Triton kernels need 8.0 or newer"
    return None


forward, backward = common.register("triton", _forward, _backward, devices=("cpu", "cuda"))
