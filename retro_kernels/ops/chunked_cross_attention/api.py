"""`chunked_cross_attention`: checks the arguments, reduces alignment and offsets to one clock, and hands the call to
the backend that `ops/backends.py` chooses."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch

from .. import backends as backend_choice
from .. import validate
from . import cpu, reference, triton
from .common import Call, attended_chunks  # noqa: F401  (re-exported for tests and benchmarks)

BACKENDS = {"reference": reference, "cpu": cpu, "triton": triton}


def backends() -> dict[str, backend_choice.BackendStatus]:
    """Every backend's name -> whether it can run in this process (`available`) and if not why (`reason`)."""
    return backend_choice.status(BACKENDS)


def chunked_cross_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    chunk_size: int,
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
    dropout_p: float = 0.0,
    stride: int | None = None,
    align: str = "start",
    query_offset: int = 0,
    chunk_offset: int = 0,
    return_lse: bool = False,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Every token attends to the tokens of the neighbours retrieved for the chunk it follows (RETRO, section 2.4).

    Token i >= m - 1 attends, as row (i - (m - 1)) mod stride, to the k * r retrieved tokens of chunk
    (i - (m - 1)) // stride under one softmax. Tokens before that output exactly 0: the residual is the caller's.
    The logits are

        scale * ((q + content_bias) . k + (q + relative_bias) . relative_key[row - t + r - 1]) + attention_bias[row, t]

    Any strides are read in place; a tensor whose last dimension is strided is copied first. Under autocast all floating
    inputs but the rotary tables are cast to the autocast dtype.

    Args:
        query: [b, n, h, d]; fp16, bf16, fp32 or fp64 (fp64 on the reference only).
        key: [b, l, k, r, hk, d] in the query's dtype; query head i reads head i // (h / hk). l may exceed the chunks
            needed, (n - m) // stride + 1: the surplus is ignored. Empty b, n, l, k or r are valid.
        value: [b, l, k, r, hk, d_value] in the query's dtype.
        chunk_size: m, tokens in a chunk.
        neighbour_mask: bool [b, l, k, r], True = attend. A masked token's key and value reach nothing, NaN included.
        attention_bias: [h, m, r] (for all neighbours) or [h, m, k * r] (neighbour-major), in fp32 or the query's dtype.
        relative_key: [h, m + r - 1, d], the projected position of distance x - (r - m) in row x (equation 6).
        content_bias, relative_bias: [h, d], Transformer-XL's u and v; they need `relative_key`.
        query_rotary, key_rotary: (cos, sin) of [m, w] by row and of [r, w] by neighbour token, w <= d / 2; they turn
            the first 2 w dimensions, have no gradient, and exclude `relative_key`.
        rotary_interleaved: pairs dimensions 2j and 2j + 1 instead of j and j + w.
        null_key, null_value: [h, d] and [h, d_value], one always visible slot without position.
        scale: any number; default d ** -0.5.
        dropout_p: in [0, 1), on the probabilities.
        stride: tokens between retrievals, 1 <= stride <= m; default m.
        align: "end" puts the incomplete chunk first (Megatron): token i >= p = (n - 1) mod m has chunk (i - p) // m.
        query_offset, chunk_offset: the absolute position of query[:, 0] and absolute chunk of key[:, 0], for a slice of
            a longer sequence.
        return_lse: also return the natural logarithm of the softmax's sum, without gradient.
        backend: "reference", "cpu", "triton" or "cuda"; None chooses, RETRO_KERNELS_BACKEND overrides None.

    Returns:
        [b, n, h, d_value] in the query's dtype (0 where nothing is visible), and with `return_lse` also [b, n, h] in
        fp32 (fp64 for fp64; -inf where nothing is visible).

    Raises:
        TypeError: an argument of the wrong type or dtype. ValueError: a wrong size, device or combination, an unknown
        backend, or an option that the named backend refuses. RuntimeError: the named backend cannot run here; a second
        derivative of a fused backend.
    """
    validate.tensor("query", query, validate.FLOATING)
    device = query.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        query, key, value, attention_bias, relative_key, content_bias, relative_bias, null_key, null_value = (
            _autocast(x, dtype)
            for x in (
                query, key, value, attention_bias, relative_key, content_bias, relative_bias, null_key, null_value
            )
        )  # fmt: skip
    _check_tensors(
        query, key, value, chunk_size, neighbour_mask, attention_bias, relative_key, content_bias, relative_bias,
        query_rotary, key_rotary, rotary_interleaved, null_key, null_value,
    )  # fmt: skip
    stride = chunk_size if stride is None else validate.integer("stride", stride, 1, chunk_size, "chunk_size")
    dropout_p = validate.number("dropout_p", dropout_p)
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p: got {dropout_p}, expected 0 <= dropout_p < 1")
    call = Call(
        query=query,
        key=key,
        value=value,
        neighbour_mask=neighbour_mask,
        attention_bias=attention_bias,
        relative_key=relative_key,
        content_bias=content_bias,
        relative_bias=relative_bias,
        query_rotary=None if query_rotary is None else (query_rotary[0], query_rotary[1]),
        key_rotary=None if key_rotary is None else (key_rotary[0], key_rotary[1]),
        rotary_interleaved=rotary_interleaved,
        null_key=null_key,
        null_value=null_value,
        scale=query.shape[-1] ** -0.5 if scale is None else validate.number("scale", scale),
        dropout_p=dropout_p,
        chunk_size=chunk_size,
        stride=stride,
        first_token=_first_token(query.shape[1], key.shape[1], chunk_size, stride, align, query_offset, chunk_offset),
    )
    chosen = backend_choice.choose("chunked_cross_attention", BACKENDS, call, backend)
    if chosen == "reference":
        with torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext():
            out, lse = reference.chunked_cross_attention(call)
    else:
        out, lse = _fused(chosen, call)
    return (out, lse) if return_lse else out


def _autocast(x: Any, dtype: torch.dtype) -> Any:
    """fp64 is left alone, as torch's own autocast does."""
    if isinstance(x, torch.Tensor) and x.is_floating_point() and x.dtype != torch.float64:
        return x.to(dtype)
    return x


def _check_tensors(
    query, key, value, chunk_size, neighbour_mask, attention_bias, relative_key, content_bias, relative_bias,
    query_rotary, key_rotary, rotary_interleaved, null_key, null_value,
) -> None:  # fmt: skip
    validate.rank("query", query, "b, n, h, d")
    dtype, device = query.dtype, query.device
    for name, x in (("key", key), ("value", value)):
        validate.tensor(name, x, (dtype,), device)
        validate.rank(name, x, "b, l, k, r, hk, d")
    b, _, h, d = query.shape
    _, l, k, r, hk, _ = key.shape
    d_value = value.shape[-1]
    for name, size in (("h", h), ("d", d)):
        if size == 0:
            raise ValueError(f"query: got shape {list(query.shape)}, expected [b, n, h, d] with {name} at least 1")
    if hk == 0 or h % hk != 0:
        raise ValueError(
            f"key: got {hk} key/value heads, expected a divisor of the query's {h} heads (shape {list(key.shape)})"
        )
    if d_value == 0:
        raise ValueError(f"value: got shape {list(value.shape)}, expected d_value at least 1")
    validate.shape("key", key, "b, l, k, r, hk, d", (b, l, k, r, hk, d))
    validate.shape("value", value, "b, l, k, r, hk, d_value", (b, l, k, r, hk, d_value))
    m = validate.integer("chunk_size", chunk_size, 1)

    either = (dtype, torch.float32)  # parameters and tables may stay in fp32 beside half-precision activations
    if neighbour_mask is not None:
        validate.tensor("neighbour_mask", neighbour_mask, (torch.bool,), device)
        validate.shape("neighbour_mask", neighbour_mask, "b, l, k, r", (b, l, k, r))
    if attention_bias is not None:
        validate.tensor("attention_bias", attention_bias, either, device)
        validate.shape("attention_bias", attention_bias, "h, m, r | k * r", (h, m, r), (h, m, k * r))

    if relative_key is not None:
        validate.tensor("relative_key", relative_key, either, device)
        validate.shape("relative_key", relative_key, "h, m + r - 1, d", (h, m + r - 1, d))
        if query_rotary is not None or key_rotary is not None:
            raise ValueError("relative_key: got rotary tables too, expected one kind of position: drop one of them")
    for name, x in (("content_bias", content_bias), ("relative_bias", relative_bias)):
        if x is not None:
            if relative_key is None:
                raise ValueError(
                    f"{name}: got a tensor without relative_key, expected both: it is part of the position"
                )
            validate.tensor(name, x, either, device)
            validate.shape(name, x, "h, d", (h, d))

    if not isinstance(rotary_interleaved, bool):
        raise TypeError(f"rotary_interleaved: got {rotary_interleaved!r}, expected True or False")
    if (query_rotary is None) != (key_rotary is None):
        raise ValueError(
            f"query_rotary and key_rotary: got only {'key' if query_rotary is None else 'query'}_rotary, "
            "expected both (a table of cos 1 and sin 0 turns nothing)"
        )
    if query_rotary is not None:
        width = _check_rotary("query_rotary", query_rotary, "m", m, d, either, device)
        key_width = _check_rotary("key_rotary", key_rotary, "r", r, d, either, device)
        if width != key_width:
            raise ValueError(f"key_rotary: got width {key_width}, expected {width}, the width of query_rotary")

    if (null_key is None) != (null_value is None):
        raise ValueError(
            f"null_key and null_value: got only null_{'value' if null_key is None else 'key'}, expected both or neither"
        )
    if null_key is not None:
        validate.tensor("null_key", null_key, either, device)
        validate.tensor("null_value", null_value, either, device)
        validate.shape("null_key", null_key, "h, d", (h, d))
        validate.shape("null_value", null_value, "h, d_value", (h, d_value))


def _check_rotary(name, tables, rows_name, rows, d, dtypes, device) -> int:
    """-> the tables' width, half of the dimensions that they turn."""
    if not isinstance(tables, (tuple, list)) or len(tables) != 2:
        raise TypeError(f"{name}: got {type(tables).__name__}, expected a pair of tensors (cos, sin)")
    for part, table in zip(("cos", "sin"), tables):
        validate.tensor(f"{name} ({part})", table, dtypes, device)
        validate.rank(f"{name} ({part})", table, f"{rows_name}, rotary_dim / 2")
    width = tables[0].shape[1]
    for part, table in zip(("cos", "sin"), tables):
        validate.shape(f"{name} ({part})", table, f"{rows_name}, rotary_dim / 2", (rows, width))
    if 2 * width > d:
        raise ValueError(f"{name}: got width {width}, which turns {2 * width} dimensions, expected at most d = {d}")
    return width


def _first_token(n, num_chunks, m, stride, align, query_offset, chunk_offset) -> int:
    """The token (of the query tensor) that is row 0 of key's first chunk; checks that the chunks cover all tokens."""
    validate.integer("query_offset", query_offset, 0)
    validate.integer("chunk_offset", chunk_offset, 0)
    if align == "end":
        if stride != m or query_offset != 0 or chunk_offset != 0:
            raise ValueError(
                f'align: got "end" with stride {stride}, query_offset {query_offset} and chunk_offset {chunk_offset}, '
                f"expected stride = chunk_size = {m} and no offsets: the end of the sequence is its only anchor"
            )
        first_token = (n - 1) % m
        needed = (n + m - 1) // m
    elif align == "start":
        first_token = m - 1 - query_offset + chunk_offset * stride
        needed = 0
        if n > 0 and query_offset + n >= m:
            needed = (query_offset + n - m) // stride + 1 - chunk_offset
            first_chunk = max(query_offset - (m - 1), 0) // stride
            if first_chunk < chunk_offset:
                raise ValueError(
                    f"chunk_offset: got {chunk_offset}, but the first retrieving token attends to chunk {first_chunk}; "
                    f"expected at most {first_chunk}"
                )
    else:
        raise ValueError(f'align: got {align!r}, expected "start" or "end"')
    if num_chunks < needed:
        raise ValueError(
            f"key: got l = {num_chunks} chunks of neighbours, expected at least {needed} for {n} tokens with "
            f"chunk_size {m}, stride {stride}, align {align!r}, query_offset {query_offset}, "
            f"chunk_offset {chunk_offset}"
        )
    return first_token


def _fused(backend: str, call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    query_cos, query_sin = call.query_rotary or (None, None)
    key_cos, key_sin = call.key_rotary or (None, None)
    tensors = (
        call.query, call.key, call.value, call.neighbour_mask, call.attention_bias,
        query_cos, query_sin, key_cos, key_sin, call.null_key, call.null_value,
    )  # fmt: skip
    settings = (call.rotary_interleaved, call.scale, call.stride, call.first_token)
    return FusedChunkedCrossAttention.apply(backend, settings, *(_unit_last_stride(x) for x in tensors))


def _unit_last_stride(x: torch.Tensor | None) -> torch.Tensor | None:
    """The kernels read vectors along the last dimension of floating tensors; any other stride is read in place."""
    if x is None or x.dtype == torch.bool or x.stride(-1) == 1 or x.shape[-1] <= 1:
        return x
    return x.contiguous()


class FusedChunkedCrossAttention(torch.autograd.Function):
    """Connects a backend's forward and backward ops to autograd. Keeps the inputs, the output and the lse."""

    @staticmethod
    def forward(ctx, backend, settings, *tensors):
        out, lse = BACKENDS[backend].forward(*tensors, *settings)
        ctx.backend, ctx.settings = backend, settings
        ctx.save_for_backward(*tensors, out, lse)
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx, grad_out, _):
        *tensors, out, lse = ctx.saved_tensors
        wanted = ctx.needs_input_grad[2:]  # query, key, value, mask, bias, four rotary tables, null key, null value
        bias_gradient, null_gradient = wanted[4], wanted[9] or wanted[10]
        query, key, value, bias, null_key, null_value = BACKENDS[ctx.backend].backward(
            _unit_last_stride(grad_out), *tensors, out, lse, *ctx.settings, bias_gradient, null_gradient
        )
        gradients = (query, key, value, None, bias, None, None, None, None, null_key, null_value)
        return None, None, *(gradient if want else None for gradient, want in zip(gradients, wanted))
