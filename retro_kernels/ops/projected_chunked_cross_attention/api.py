"""`projected_chunked_cross_attention`: checks the arguments, chooses between making keys and values and absorbing their
projections, and runs the chosen strategy."""

from __future__ import annotations

import torch
from torch.utils.checkpoint import checkpoint

from .. import backends as backend_choice
from .. import validate
from ..attention import arguments
from ..attention.common import attended_chunks
from ..attention.run import autocast, without_autocast
from ..chunked_cross_attention.api import clock
from ..common import Fused
from . import cpu, materialise, reference
from .common import DIFFERENTIABLE, FLAGS, Call

BACKENDS = {"reference": reference, "cpu": cpu}
STRATEGIES = ("auto", "materialise", "absorb")
RECOMPUTED_SLICES = 16  # with `recompute`: K and V of one slice, and their gradients, are alive at a time


def projected_chunked_cross_attention(
    query: torch.Tensor,
    encoded: torch.Tensor,
    w_key: torch.Tensor,
    w_value: torch.Tensor,
    *,
    chunk_size: int,
    bias_key: torch.Tensor | None = None,
    bias_value: torch.Tensor | None = None,
    strategy: str = "auto",
    recompute: bool = False,
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
    sequence_starts: torch.Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """`chunked_cross_attention` from the encoder's states, with keys and values

        K = encoded w_key^T + bias_key        V = encoded w_value^T + bias_value

    Two strategies compute it. "materialise" makes K and V side by side in one matrix product, of the chunks that are
    attended to, and keeps them for the backward. "absorb" applies w_key to the query and w_value after the weighted
    sum, inside one kernel: K and V never exist, neither in memory nor for the backward.

    Args:
        query: [b, n, h, d]; fp16, bf16, fp32 or fp64.
        encoded: [b, l, k, r, e] in the query's dtype, the output of the neighbour encoder.
        w_key: [hk, d, e], w_value: [hk, d_value, e], in the query's dtype: `linear.weight.view(hk, d, e)`.
        bias_key: [hk, d], bias_value: [hk, d_value].
        strategy: "materialise", "absorb", or "auto", which is "materialise" until the absorbed kernels are measured.
        recompute: with "materialise", do not keep K and V for the backward but make them again there, a slice of the
            chunks (of the sequences, with `sequence_starts` or align="end") at a time.
        query_rotary, key_rotary: only with "materialise": a rotation of the key stands between w_key and the query, and
            differs for every token of a neighbour.
        backend: of the fused kernel: with "materialise" of `chunked_cross_attention`, with "absorb" of the absorbed
            one. The reference has one way for both.
        All others: as in `chunked_cross_attention`.

    Returns:
        [b, n, h, d_value], and with `return_lse` also the log-sum-exp [b, n, h].

    Raises:
        What `chunked_cross_attention` raises, and ValueError for an unknown strategy, for rotary positions with
        "absorb", and for `recompute` with "absorb", which keeps nothing to recompute.
    """
    validate.tensor("query", query, validate.FLOATING)
    (query, encoded, w_key, w_value, bias_key, bias_value, attention_bias, relative_key, content_bias, relative_bias,
     null_key, null_value) = autocast(
        query, encoded, w_key, w_value, bias_key, bias_value, attention_bias, relative_key, content_bias, relative_bias,
        null_key, null_value,
    )  # fmt: skip
    m = validate.integer("chunk_size", chunk_size, 1)
    _check(query, encoded, w_key, w_value, bias_key, bias_value, neighbour_mask)
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy: got {strategy!r}, expected one of {', '.join(STRATEGIES)}")
    rotary = query_rotary is not None or key_rotary is not None
    if strategy == "absorb":
        if rotary:
            raise ValueError(
                'strategy: got "absorb" with query_rotary and key_rotary, expected "materialise" or "auto": every '
                "key is turned by its own angle after w_key, so w_key cannot be applied to the query instead"
            )
        if recompute:
            raise ValueError(
                'recompute: got True with strategy="absorb", which keeps neither keys nor values, expected False'
            )
    if neighbour_mask is not None:  # NaN in a masked token would reach the gradients of w_key and w_value
        encoded = encoded.masked_fill(~neighbour_mask[..., None], 0.0)
    shared = {
        "attention_bias": attention_bias, "relative_key": relative_key, "content_bias": content_bias,
        "relative_bias": relative_bias, "null_key": null_key, "null_value": null_value, "scale": scale,
    }  # fmt: skip
    if strategy == "absorb":
        out, lse = _absorb(
            query, encoded, w_key, w_value, bias_key, bias_value, neighbour_mask, m, dropout_p, stride, align,
            query_offset, chunk_offset, sequence_starts, backend, **shared,
        )  # fmt: skip
    else:
        shared |= {
            "query_rotary": query_rotary, "key_rotary": key_rotary, "rotary_interleaved": rotary_interleaved,
            "dropout_p": dropout_p, "stride": stride, "align": align, "chunk_size": m, "backend": backend,
        }  # fmt: skip
        out, lse = _materialise(
            query, encoded, (w_key, w_value), (bias_key, bias_value), neighbour_mask, recompute, query_offset,
            chunk_offset, sequence_starts, **shared,
        )  # fmt: skip
    return (out, lse) if return_lse else out


def _check(query, encoded, w_key, w_value, bias_key, bias_value, neighbour_mask) -> None:
    validate.rank("query", query, "b, n, h, d")
    b, _, h, d = query.shape
    dtype, device = query.dtype, query.device
    validate.tensor("encoded", encoded, (dtype,), device)
    validate.rank("encoded", encoded, "b, l, k, r, e")
    for name, weight in (("w_key", w_key), ("w_value", w_value)):
        validate.tensor(name, weight, (dtype,), device)
        validate.rank(name, weight, "hk, d, e")
    _, l, k, r, e = encoded.shape
    hk, d_value = w_key.shape[0], w_value.shape[1]
    validate.shape("encoded", encoded, "b, l, k, r, e", (b, l, k, r, e))
    if hk == 0 or h % hk != 0:
        raise ValueError(f"w_key: got {hk} key/value heads, expected a divisor of the query's {h} heads")
    validate.shape("w_key", w_key, "hk, d, e", (hk, d, e))
    validate.shape("w_value", w_value, "hk, d_value, e", (hk, d_value, e))
    either = (dtype, torch.float32)
    for name, bias, size in (("bias_key", bias_key, d), ("bias_value", bias_value, d_value)):
        if bias is not None:
            validate.tensor(name, bias, either, device)
            validate.shape(name, bias, "hk, " + ("d" if name == "bias_key" else "d_value"), (hk, size))
    arguments.check_mask("neighbour_mask", neighbour_mask, query, "b, l, k, r", (b, l, k, r))


def _materialise(
    query, encoded, weights, biases, neighbour_mask, recompute, query_offset, chunk_offset, sequence_starts, **options
) -> tuple[torch.Tensor, torch.Tensor]:
    b, n, l = query.shape[0], query.shape[1], encoded.shape[1]
    m, align = options["chunk_size"], options["align"]
    first, last = 0, l
    by_chunk = sequence_starts is None and align == "start"
    stride, first_token, _, _ = clock(
        "encoded", query, l, m, options["stride"], align, query_offset, chunk_offset, sequence_starts
    )
    if sequence_starts is None:
        first, last = attended_chunks(n, l, stride, first_token)

    def attend(sequences: slice, tokens: slice, chunks: slice) -> tuple[torch.Tensor, torch.Tensor]:
        mine = dict(options)
        if sequence_starts is not None:
            mine["sequence_starts"] = sequence_starts[sequences]
        elif align == "start":
            mine |= {"query_offset": query_offset + tokens.start, "chunk_offset": chunk_offset + chunks.start}
        mask = None if neighbour_mask is None else neighbour_mask[sequences, chunks]
        return materialise.attend(
            query[sequences, tokens], encoded[sequences, chunks], weights, biases, neighbour_mask=mask, **mine
        )

    whole = (slice(0, b), slice(0, n), slice(first, last))
    if not recompute:
        return attend(*whole)
    if b >= RECOMPUTED_SLICES or not by_chunk or last - first < 2:
        axis = 0
        size = max(1, -(-b // RECOMPUTED_SLICES))
        slices = [(slice(i, min(i + size, b)), *whole[1:]) for i in range(0, b, size)]
    else:
        axis = 1
        borders = [*range(first, last, -(-(last - first) // RECOMPUTED_SLICES)), last]
        # A slice's tokens are those that attend to its chunks; the first also takes the tokens before any chunk.
        token = [0, *(first_token + u * stride for u in borders[1:-1]), n]
        slices = [
            (whole[0], slice(*token[i : i + 2]), slice(*borders[i : i + 2])) for i in range(len(borders) - 1)
        ]  # fmt: skip
    parts = [checkpoint(attend, *part, use_reentrant=False) for part in slices or [whole]]
    out, lse = (torch.cat(x, dim=axis) for x in zip(*parts))
    return out, lse


def _absorb(
    query, encoded, w_key, w_value, bias_key, bias_value, neighbour_mask, m, dropout_p, stride, align, query_offset,
    chunk_offset, sequence_starts, backend, *, attention_bias, relative_key, content_bias, relative_bias, null_key,
    null_value, scale,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    k, r = encoded.shape[2:4]
    arguments.check_positions(
        query, arguments.Tables(m, r, "m", "r", (("k * r", k * r),)), attention_bias, relative_key, content_bias,
        relative_bias, None, None, False,
    )  # fmt: skip
    arguments.check_null_slot(query, w_value.shape[1], null_key, null_value)
    stride, first_token, spans, missing = clock(
        "encoded", query, encoded.shape[1], m, stride, align, query_offset, chunk_offset, sequence_starts
    )
    dropout_p, dropout_seed = arguments.checked_dropout(dropout_p, query)
    call = Call(
        operation="projected_chunked_cross_attention", query=query, encoded=encoded, w_key=w_key, w_value=w_value,
        bias_key=bias_key, bias_value=bias_value, mask=neighbour_mask, attention_bias=attention_bias,
        relative_key=relative_key, content_bias=content_bias, relative_bias=relative_bias, null_key=null_key,
        null_value=null_value, chunk_spans=spans, dropout_seed=dropout_seed,
        scale=arguments.checked_scale(scale, query), dropout_p=dropout_p, rows=m, stride=stride,
        first_token=first_token,
    )  # fmt: skip
    chosen = backend_choice.choose(call.operation, BACKENDS, call, backend)
    if chosen == "reference":
        with without_autocast(query):
            out, lse = reference.absorbed(call)
    else:
        tensors = (
            call.query, call.encoded, call.w_key, call.w_value, call.bias_key, call.bias_value, call.mask,
            call.attention_bias, call.relative_key, call.content_bias, call.relative_bias, call.null_key,
            call.null_value, call.chunk_spans, call.dropout_seed,
        )  # fmt: skip
        settings = (call.scale, call.dropout_p, call.stride, call.first_token)
        module = BACKENDS[chosen]
        out, lse = Fused.apply(module.forward, module.backward, DIFFERENTIABLE, FLAGS, settings, *tensors)
    if missing is not None:
        out = out.masked_fill(missing[..., None, None], float("nan"))
    return out, lse
