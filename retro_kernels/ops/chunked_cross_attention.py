"""`chunked_cross_attention`: checks the arguments, reduces alignment, offsets and documents to the clock or the spans
of `ops/attention/common.py`, and runs it on the backend that `ops/backends.py` chooses."""

from __future__ import annotations

import torch

from . import backends, checks, plans
from .attention.common import CLOCK, Call, plain_lse
from .compiling import readable


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
    logit_softcap: float | None = None,
    dropout_p: float = 0.0,
    stride: int | None = None,
    align: str = "start",
    query_offset: int = 0,
    chunk_offset: int = 0,
    sequence_starts: torch.Tensor | None = None,
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
        logit_softcap: c > 0: scaled logits x become c * tanh(x / c), before the bias is added (Gemma 2); None: no cap.
            "cuda" refuses it.
        dropout_p: in [0, 1), on the probabilities; rounded to a multiple of 2 ** -16. Every backend drops the same
            probabilities for the same state of torch's generator (`ops/dropout.py`).
        stride: tokens between retrievals, 1 <= stride <= m; default m.
        align: "end" puts the incomplete chunk first (Megatron): token i >= p = (n - 1) mod m has chunk (i - p) // m.
        query_offset, chunk_offset: the absolute position of query[:, 0] and absolute chunk of key[:, 0], for a slice of
            a longer sequence.
        sequence_starts: bool [b, n], True at the first token of every document packed into a row. The chunks restart
            with each document: a row's chunks are those of its documents one after the other, (n_i - m) // stride + 1
            for a document of n_i >= m tokens and none for a shorter one. Excludes `align="end"` and offsets.
        return_lse: also return the natural logarithm of the softmax's sum. It has a gradient,
            0 where nothing is visible.
        backend: "reference", "cpu", "triton" or "cuda"; None chooses, RETRO_KERNELS_BACKEND overrides None.

    Returns:
        [b, n, h, d_value] in the query's dtype (0 where nothing is visible), and with `return_lse` also [b, n, h] in
        fp32 (fp64 for fp64; -inf where nothing is visible).

    Raises:
        TypeError: an argument of the wrong type or dtype. ValueError: a wrong size, device or combination, an unknown
        backend, or an option that the named backend refuses. RuntimeError: the named backend cannot run here; a second
        derivative of a fused backend. With `sequence_starts` the number of chunks depends on data: too few raise on a
        CPU; on a GPU, in a compiled graph and under vmap, which do not look at data, the tokens left without come out
        NaN.
    """
    query_cos, query_sin = checks.pair(query_rotary)
    key_cos, key_sin = checks.pair(key_rotary)
    given = {
        "query": query,
        "key": key,
        "value": value,
        "mask": neighbour_mask,
        "attention_bias": attention_bias,
        "relative_key": relative_key,
        "content_bias": content_bias,
        "relative_bias": relative_bias,
        "query_cos": query_cos,
        "query_sin": query_sin,
        "key_cos": key_cos,
        "key_sin": key_sin,
        "null_key": null_key,
        "null_value": null_value,
    }
    signature = None
    if type(dropout_p) in (int, float) and dropout_p == 0 and sequence_starts is None:
        signature = plans.signature(
            backend,
            (
                "chunked_cross_attention",
                chunk_size,
                rotary_interleaved,
                scale,
                logit_softcap,
                stride,
                align,
                query_offset,
                chunk_offset,
                return_lse,
            ),
            given,
        )
        plan = plans.get(signature)
        if plan is not None:
            out, lse = plan(given)
            return (out, plain_lse(lse).view(out.shape[:-1])) if return_lse else out
    checks.tensor("query", query, checks.FLOATING)
    tensors = checks.autocast(given)
    query, key, value = (tensors[name] for name in ("query", "key", "value"))
    checks.heads(query, key, value, "b, n, h, d", "b, l, k, r, hk, d")
    b, n, h, d = query.shape
    _, l, k, r, hk, _ = key.shape
    d_value = value.shape[-1]
    checks.shape("key", key, "b, l, k, r, hk, d", (b, l, k, r, hk, d))
    checks.shape("value", value, "b, l, k, r, hk, d_value", (b, l, k, r, hk, d_value))
    m = checks.integer("chunk_size", chunk_size, 1)
    checks.mask("neighbour_mask", neighbour_mask, query, "b, l, k, r", (b, l, k, r))
    checks.positions(
        tensors,
        checks.Tables(m, r, "m", "r", (("k * r", k * r),)),
        query_rotary,
        key_rotary,
        rotary_interleaved,
    )
    checks.null_slot(tensors, d_value)
    stride, first_token, spans, missing = clock(
        "key", query, l, m, stride, align, query_offset, chunk_offset, sequence_starts
    )
    dropout_p, dropout_seed = checks.dropout_of(dropout_p, query)
    call = Call(
        operation="chunked_cross_attention",
        grouping=CLOCK,
        **{**tensors, "query": query.view(b, 1, 1, n, h, d)},
        rotary_interleaved=rotary_interleaved,
        chunk_spans=spans,
        dropout_seed=dropout_seed,
        scale=checks.scale_of(scale, query),
        logit_softcap=checks.softcap_of(logit_softcap),
        dropout_p=dropout_p,
        rows=m,
        stride=stride,
        first_token=first_token,
        return_lse=return_lse,
    )
    chosen = backends.choose(backends.ATTENTION, call, backend)
    out, lse = plans.run(backends.ATTENTION, chosen, call, signature, given, (b, n, h, d_value))
    if missing is not None:
        out = out.masked_fill(missing[..., None, None], float("nan"))
    return (out, plain_lse(lse).view(b, n, h)) if return_lse else out


def attend_spans(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    spans: torch.Tensor,
    *,
    scale: float | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """`chunked_cross_attention` without a clock: chunk u of sequence b is attended by the spans[b, u, 1] tokens from
    spans[b, u, 0] on, chunks of any lengths. A token in no span outputs 0.

    Args:
        query, key, value: as there.
        spans: int32 [b, l, 2]. They lie inside [0, n) and do not overlap, which is not checked.

    Returns: [b, n, h, d_value]. Raises: as there.
    """
    checks.tensor("query", query, checks.FLOATING)
    given = checks.autocast({"query": query, "key": key, "value": value})
    query, key, value = given.values()
    checks.heads(query, key, value, "b, n, h, d", "b, l, k, r, hk, d")
    b, n, h, d = query.shape
    l = key.shape[1]
    checks.shape("key", key, "b, l, k, r, hk, d", (b, l, *key.shape[2:5], d))
    checks.shape("value", value, "b, l, k, r, hk, d_value", (*key.shape[:5], value.shape[-1]))
    checks.tensor("spans", spans, (torch.int32,), query.device)
    checks.shape("spans", spans, "b, l, 2", (b, l, 2))
    rows = max(n, 1) if isinstance(n, int) else n
    call = Call(
        operation="chunked_cross_attention",
        grouping=CLOCK,
        query=query.view(b, 1, 1, n, h, d),
        key=key,
        value=value,
        chunk_spans=spans.contiguous(),
        scale=checks.scale_of(scale, query),
        rows=rows,
        stride=rows,
        return_lse=False,
    )
    chosen = backends.choose(backends.ATTENTION, call, backend)
    return plans.run(backends.ATTENTION, chosen, call, None, given, (b, n, h, value.shape[-1]))[0]


def clock(
    name: str,
    query: torch.Tensor,
    num_chunks: int,
    m: int,
    stride: int | None,
    align: str,
    query_offset: int,
    chunk_offset: int,
    sequence_starts: torch.Tensor | None,
) -> tuple[int, int, torch.Tensor | None, torch.Tensor | None]:
    """-> stride and first token of the clock (`ops/attention/common.py`), and with `sequence_starts` the spans and what
    `_spans` says is missing. Checks that the `num_chunks` of the argument `name` cover all tokens."""
    b, n = query.shape[:2]
    s = m if stride is None else checks.integer("stride", stride, 1, m, "chunk_size")
    if sequence_starts is None:
        return s, _first_token(name, n, num_chunks, m, s, align, query_offset, chunk_offset), None, None
    if align != "start" or query_offset != 0 or chunk_offset != 0:
        raise ValueError(
            f"sequence_starts: got align {align!r}, query_offset {query_offset} and chunk_offset {chunk_offset} "
            'too, expected align="start" and no offsets: every document has its own clock'
        )
    starts = checks.document_starts(sequence_starts, query, b, n)
    return s, m - 1, *_spans(name, starts, num_chunks, m, s)


def _first_token(name, n, num_chunks, m, stride, align, query_offset, chunk_offset) -> int:
    """The token (of the query tensor) that is row 0 of the first chunk; checks that the chunks cover all tokens."""
    checks.integer("query_offset", query_offset, 0)
    checks.integer("chunk_offset", chunk_offset, 0)
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
            f"{name}: got l = {num_chunks} chunks of neighbours, expected at least {needed} for {n} tokens with "
            f"chunk_size {m}, stride {stride}, align {align!r}, query_offset {query_offset}, "
            f"chunk_offset {chunk_offset}"
        )
    return first_token


def _spans(
    name: str, starts: torch.Tensor, num_chunks: int, m: int, stride: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """From each token's document start [b, n]: int32 [b, l, 2], the first token of every chunk's rows and their number
    (0 for surplus chunks), and where a shortage cannot be raised bool [b, n], the tokens whose chunk is not there."""
    b, n = starts.shape
    token = torch.arange(n, device=starts.device).expand(b, n)
    clock = token - starts - (m - 1)
    begins = (clock >= 0) & (clock % stride == 0)
    chunk = begins.cumsum(1) - 1
    synchronous = starts.device.type == "cpu" and readable(starts)
    if synchronous and n > 0 and b > 0:
        needed = chunk[:, -1] + 1
        if int(needed.max()) > num_chunks:
            row = int(needed.argmax())
            raise ValueError(
                f"{name}: got l = {num_chunks} chunks of neighbours, expected at least {int(needed.max())} for the "
                f"documents of row {row} with chunk_size {m}, stride {stride}"
            )
    # A chunk's rows end with its stride or its document, whichever is first. Tokens that begin no chunk that is there
    # are written to a column of their own, which is cut off.
    target = torch.where(begins & (chunk < num_chunks), chunk, num_chunks)
    attending = (clock >= 0) & (chunk < num_chunks)
    count = starts.new_zeros(b, num_chunks + 1)
    count = count.scatter_add(1, torch.where(attending, chunk, num_chunks), torch.ones_like(chunk))
    first = starts.new_zeros(b, num_chunks + 1).scatter(1, target, token)
    spans = torch.stack([first, count], dim=-1)[:, :num_chunks].to(torch.int32).contiguous()
    return spans, None if synchronous else (clock >= 0) & (chunk >= num_chunks)
