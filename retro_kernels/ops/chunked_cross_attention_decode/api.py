"""`chunked_cross_attention_decode`: checks the arguments and runs the call on the backend that is chosen."""

from __future__ import annotations

from typing import Any

import torch

from .. import validate
from ..attention import arguments
from ..attention.run import autocast
from ..compiling import readable
from .common import QUANTISED, DecodeCall
from .run import run


def chunked_cross_attention_decode(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    chunk_size: int,
    position: torch.Tensor,
    valid: torch.Tensor | None = None,
    chunk: torch.Tensor | None = None,
    neighbour_mask: torch.Tensor | None = None,
    attention_bias: torch.Tensor | None = None,
    relative_key: torch.Tensor | None = None,
    content_bias: torch.Tensor | None = None,
    relative_bias: torch.Tensor | None = None,
    query_rotary: tuple[torch.Tensor, torch.Tensor] | None = None,
    key_rotary: tuple[torch.Tensor, torch.Tensor] | None = None,
    rotary_interleaved: bool = False,
    null_key: torch.Tensor | None = None,
    null_value: torch.Tensor | None = None,
    scale: float | None = None,
    key_scale: torch.Tensor | None = None,
    value_scale: torch.Tensor | None = None,
    return_lse: bool = False,
    validate: bool = False,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """`chunked_cross_attention` for one or a few new tokens per sequence, against the cached keys and values of the
    neighbours that each sequence attends to now.

    Token j of sequence b is at position p = position[b] + j. With p < m - 1 it attends to nothing and outputs 0;
    otherwise it attends, as row (p - (m - 1)) mod m, to the neighbours of chunk (p - (m - 1)) // m, and the retrieving
    tokens of a sequence in one call must share that chunk. Logits, null slot and masks are as in the full operation.
    Inference only: the fused backends have no gradient, the reference has.

    Nothing waits for the device: positions and validity are tensors, so a call can be captured in a CUDA graph and
    replayed for other positions.

    Args:
        query: [b, t, h, d]; fp16, bf16, fp32 or fp64 (fp64 on the reference only).
        key: [b, k, r, hk, d] in the query's dtype, or int8 or float8_e4m3fn with `key_scale`. Any strides.
        value: [b, k, r, hk, d_value], likewise with `value_scale`.
        chunk_size: m, tokens in a chunk.
        position: int64 [b], the position of query[:, 0] in its sequence.
        valid: bool [b]. Where it is False the outputs are 0 and the cache is not read; the position may be anything.
        chunk: int64 [b], which chunk's neighbours the cache holds, where known: a token that attends to another chunk
            is then past the border too. Without it the cache is taken to hold those of the first retrieving token.
        neighbour_mask: bool [b, k, r], True = attend. What a masked token holds reaches nothing, NaN included.
        attention_bias, relative_key, content_bias, relative_bias, null_key, null_value, scale: as in the full
            operation, indexed by each token's row.
        query_rotary: (cos, sin) of [m, w], by row.
        key_rotary: (cos, sin) of [r, w], by neighbour token, where the cache holds keys that were not turned; without
            it the cache holds keys already turned.
        key_scale, value_scale: fp32 [b, k, r]: what a quantised cache is multiplied with.
        return_lse: also return the natural logarithm of the softmax's sum.
        validate: wait for the device and raise for tokens past the border, as a CPU always does.
        backend: "reference", "cpu", "triton" or "cuda"; None chooses, RETRO_KERNELS_BACKEND overrides None.

    Returns:
        [b, t, h, d_value] in the query's dtype, and with `return_lse` also [b, t, h] in fp32 (fp64 for fp64; -inf where
        nothing is visible).

    Raises:
        TypeError: an argument of the wrong type or dtype, a cache of another dtype among them. ValueError: a wrong
        size, device or combination, or, on a CPU or with `validate`, a token past the border of its chunk or a negative
        position, before anything is computed. Elsewhere (a GPU, a compiled graph, vmap) such tokens come out NaN.
        RuntimeError: the named backend cannot run here.
    """
    check_query(query)
    query, attention_bias, relative_key, content_bias, relative_bias, null_key, null_value = autocast(
        query, attention_bias, relative_key, content_bias, relative_bias, null_key, null_value
    )
    key, value = (cast_cache(name, x, query) for name, x in (("key", key), ("value", value)))
    k, r, d_value = _check_keys_and_values(query, key, value, key_scale, value_scale)
    return decode(
        "chunked_cross_attention_decode", query, key, value, None, d_value, k, r, chunk_size=chunk_size,
        position=position, valid=valid, chunk=chunk, neighbour_mask=neighbour_mask, attention_bias=attention_bias,
        relative_key=relative_key, content_bias=content_bias, relative_bias=relative_bias, query_rotary=query_rotary,
        key_rotary=key_rotary, rotary_interleaved=rotary_interleaved, null_key=null_key, null_value=null_value,
        scale=scale, key_scale=key_scale, value_scale=value_scale, return_lse=return_lse, synchronise=validate,
        backend=backend,
    )  # fmt: skip


def _check_keys_and_values(
    query: torch.Tensor, key: Any, value: Any, key_scale: torch.Tensor | None, value_scale: torch.Tensor | None
) -> tuple[int, int, int]:
    """-> k, r, d_value."""
    b, _, h, d = query.shape
    k, r, hk = check_cache("key", key, key_scale, "key_scale", query, "b, k, r, hk, d")
    check_cache("value", value, value_scale, "value_scale", query, "b, k, r, hk, d_value")
    d_value = value.shape[-1]
    validate.shape("key", key, "b, k, r, hk, d", (b, k, r, hk, d))
    validate.shape("value", value, "b, k, r, hk, d_value", (b, k, r, hk, d_value))
    if hk == 0 or h % hk != 0:
        raise ValueError(
            f"key: got {hk} key/value heads, expected a divisor of the query's {h} heads (shape {list(key.shape)})"
        )
    if d_value == 0:
        raise ValueError(f"value: got shape {list(value.shape)}, expected d_value at least 1")
    return k, r, d_value


def check_query(query: Any) -> None:
    validate.tensor("query", query, validate.FLOATING)
    validate.rank("query", query, "b, t, h, d")
    for name, size in (("h", query.shape[2]), ("d", query.shape[3])):
        if size == 0:
            raise ValueError(f"query: got shape {list(query.shape)}, expected [b, t, h, d] with {name} at least 1")


def cast_cache(name: str, cache: Any, query: torch.Tensor) -> Any:
    """A floating cache in the autocast dtype, as every other floating input; a quantised one as it is."""
    if isinstance(cache, torch.Tensor) and cache.dtype not in QUANTISED and cache.device == query.device:
        return autocast(cache)[0]
    return cache


def check_cache(
    name: str, cache: Any, scale: torch.Tensor | None, scale_name: str, query: torch.Tensor, dims: str
) -> tuple[Any, ...]:
    """Type, dtype, device and rank of a cache, and that it is quantised exactly when there is a scale -> its sizes
    after the batch, but the last."""
    if isinstance(cache, torch.Tensor) and cache.dtype not in (query.dtype, *QUANTISED):
        raise TypeError(
            f"{name}: got dtype {cache.dtype}, expected {query.dtype}, the query's, or a quantised cache "
            f"(torch.int8 or torch.float8_e4m3fn with {scale_name})"
        )
    validate.tensor(name, cache, (query.dtype, *QUANTISED), query.device)
    validate.rank(name, cache, dims)
    if (scale is not None) != (cache.dtype in QUANTISED):
        raise ValueError(
            f"{scale_name}: got {'none' if scale is None else 'a tensor'} with a {name} of dtype {cache.dtype}, "
            "expected one exactly when the cache is int8 or float8_e4m3fn"
        )
    if scale is not None:
        validate.tensor(scale_name, scale, (torch.float32,), query.device)
        validate.shape(scale_name, scale, "b, k, r", (query.shape[0], *cache.shape[1:3]))
    return tuple(cache.shape[1:-1])


def decode(
    operation: str, query, key, value, projection, d_value, k, r, *, chunk_size, position, valid, chunk,
    neighbour_mask, attention_bias, relative_key, content_bias, relative_bias, query_rotary, key_rotary,
    rotary_interleaved, null_key, null_value, scale, key_scale, value_scale, return_lse, synchronise, backend,
):  # fmt: skip
    """What both decode operations check alike, the border, and the call itself."""
    b, t = query.shape[:2]
    m = validate.integer("chunk_size", chunk_size, 1)
    validate.tensor("position", position, (torch.int64,), query.device)
    validate.shape("position", position, "b", (b,))
    for name, x, dtype in (("valid", valid, torch.bool), ("chunk", chunk, torch.int64)):
        if x is not None:
            validate.tensor(name, x, (dtype,), query.device)
            validate.shape(name, x, "b", (b,))
    arguments.check_mask("neighbour_mask", neighbour_mask, query, "b, k, r", (b, k, r))
    arguments.check_positions(
        query, arguments.Tables(m, r, "m", "r", (("k * r", k * r),)), attention_bias, relative_key, content_bias,
        relative_bias, query_rotary, key_rotary, rotary_interleaved, key_may_be_turned=True,
    )  # fmt: skip
    arguments.check_null_slot(query, d_value, null_key, null_value)
    call = DecodeCall(
        operation=operation, query=query, key=key, value=value, projection=projection, mask=neighbour_mask,
        attention_bias=attention_bias, relative_key=relative_key, content_bias=content_bias,
        relative_bias=relative_bias, query_rotary=arguments.pair(query_rotary), key_rotary=arguments.pair(key_rotary),
        rotary_interleaved=rotary_interleaved, null_key=null_key, null_value=null_value, key_scale=key_scale,
        value_scale=value_scale, position=position.contiguous(), valid=None if valid is None else valid.contiguous(),
        chunk=None if chunk is None else chunk.contiguous(), chunk_size=m,
        scale=arguments.checked_scale(scale, query),
    )  # fmt: skip
    if (synchronise or query.device.type == "cpu") and readable(call.position, call.chunk, call.valid):
        _check_border(call, t)
    out, lse = run(call, backend)
    return (out, lse) if return_lse else out


def _check_border(call: DecodeCall, t: int) -> None:
    m = call.chunk_size
    positions = call.position.tolist()
    held = [None] * len(positions) if call.chunk is None else call.chunk.tolist()
    valid = [True] * len(positions) if call.valid is None else call.valid.tolist()
    for b, (first, chunk) in enumerate(zip(positions, held)):
        if not valid[b] or t == 0:
            continue
        if first < 0:
            raise ValueError(f"position: got {first} for sequence {b}, expected at least 0")
        last = first + t - 1
        if last < m - 1:
            continue
        first_chunk, last_chunk = max(first - (m - 1), 0) // m, (last - (m - 1)) // m
        if chunk is not None and chunk != first_chunk:
            raise ValueError(
                f"position: got {first} for sequence {b}, whose tokens attend to chunk {first_chunk}, but its cache "
                f"holds chunk {chunk}, for positions {(chunk + 1) * m - 1} to {(chunk + 2) * m - 2}: fill the cache "
                "when a chunk is complete"
            )
        if last_chunk != first_chunk:
            border = (first_chunk + 2) * m - 1
            raise ValueError(
                f"position: got {first} for sequence {b} with t = {t} tokens, which crosses the chunk border at "
                f"position {border}: decode {border - first} tokens, fill the cache with the next chunk's neighbours, "
                "then decode the rest"
            )
