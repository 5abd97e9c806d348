"""`projected_chunked_cross_attention`: checks the arguments, chooses between making keys and values and absorbing their
projections, and runs the chosen strategy."""

from __future__ import annotations

import dataclasses
import operator
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from . import backends as backend_choice
from . import checks, materialise, plans
from .absorbed import cost_model
from .absorbed.common import Call
from .attention.common import attended_chunks, plain_lse
from .backends import ABSORBED
from .call import requires_grad
from .chunked_cross_attention import clock

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

    Two strategies compute it. "materialise" makes K and V, on a GPU side by side in one matrix product, of the chunks
    that are attended to, and keeps them for the backward. "absorb" applies w_key to the query and w_value after the
    weighted sum, inside one kernel: K and V never exist, neither in memory nor for the backward.

    Args:
        query: [b, n, h, d]; fp16, bf16, fp32 or fp64.
        encoded: [b, l, k, r, e] in the query's dtype, the output of the neighbour encoder.
        w_key: [hk, d, e], w_value: [hk, d_value, e], in the query's dtype: `linear.weight.view(hk, d, e)`.
        bias_key: [hk, d], bias_value: [hk, d_value].
        strategy: "materialise", "absorb", or "auto": the one that `cost_model.py` predicts to be faster, with or
            without a backward as the inputs ask for it, or the one that needs less memory where both take about as
            long. "auto" takes "absorb" only where a fused kernel does it. `rk.explain` says what is taken and why.
        recompute: with "materialise", do not keep K and V for the backward but make them again there, a slice of the
            chunks (of the sequences, with `sequence_starts` or align="end") at a time. With "auto" it makes
            "materialise" dearer, and "absorb" needs it not.
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
    given = prepare(
        query,
        encoded,
        w_key,
        w_value,
        chunk_size=chunk_size,
        bias_key=bias_key,
        bias_value=bias_value,
        strategy=strategy,
        recompute=recompute,
        neighbour_mask=neighbour_mask,
        attention_bias=attention_bias,
        relative_key=relative_key,
        content_bias=content_bias,
        relative_bias=relative_bias,
        query_rotary=query_rotary,
        key_rotary=key_rotary,
        rotary_interleaved=rotary_interleaved,
        null_key=null_key,
        null_value=null_value,
        scale=scale,
        dropout_p=dropout_p,
        stride=stride,
        align=align,
        query_offset=query_offset,
        chunk_offset=chunk_offset,
        sequence_starts=sequence_starts,
        return_lse=return_lse,
        backend=backend,
    )
    if strategy == "auto":
        # Whether absorbing is refused is asked last: on a GPU it may take a check of the kernels.
        strategy = cost_model.faster(given.call.query.device, given.call.query.dtype, work(given))
        if strategy == "absorb" and absorb_refusal(given) is not None:
            strategy = "materialise"
    out, lse = _absorb(given) if strategy == "absorb" else _materialise(given)
    return out if lse is None or not return_lse else (out, lse)


@dataclasses.dataclass(frozen=True)
class ProjectedArguments:
    """One validated call. `call` is it in the absorbed form, without a seed for dropout; the rest is what only keys and
    values that are made can use, and what places the slices of a longer sequence."""

    call: Call
    missing: torch.Tensor | None
    recompute: bool
    query_rotary: Any
    key_rotary: Any
    rotary_interleaved: bool
    align: str
    query_offset: int
    chunk_offset: int
    sequence_starts: torch.Tensor | None
    backend: str | None


def prepare(
    query,
    encoded,
    w_key,
    w_value,
    *,
    chunk_size,
    bias_key=None,
    bias_value=None,
    strategy="auto",
    recompute=False,
    neighbour_mask=None,
    attention_bias=None,
    relative_key=None,
    content_bias=None,
    relative_bias=None,
    query_rotary=None,
    key_rotary=None,
    rotary_interleaved=False,
    null_key=None,
    null_value=None,
    scale=None,
    dropout_p=0.0,
    stride=None,
    align="start",
    query_offset=0,
    chunk_offset=0,
    sequence_starts=None,
    return_lse=False,
    backend=None,
) -> ProjectedArguments:
    """Autocast and every check of `projected_chunked_cross_attention`."""
    checks.tensor("query", query, checks.FLOATING)
    tensors = checks.autocast(
        {
            "query": query,
            "encoded": encoded,
            "w_key": w_key,
            "w_value": w_value,
            "bias_key": bias_key,
            "bias_value": bias_value,
            "mask": neighbour_mask,
            "attention_bias": attention_bias,
            "relative_key": relative_key,
            "content_bias": content_bias,
            "relative_bias": relative_bias,
            "null_key": null_key,
            "null_value": null_value,
        }
    )
    query, encoded, w_value = tensors["query"], tensors["encoded"], tensors["w_value"]
    m = checks.integer("chunk_size", chunk_size, 1)
    _check(**{name: tensors[name] for name in CHECKED})
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy: got {strategy!r}, expected one of {', '.join(STRATEGIES)}")
    if strategy == "absorb":
        if query_rotary is not None or key_rotary is not None:
            raise ValueError(f"strategy: got {strategy!r} with query_rotary and key_rotary, {ROTARY}")
        if recompute:
            raise ValueError(
                'recompute: got True with strategy="absorb", which keeps neither keys nor values, expected False'
            )
    k, r = encoded.shape[2:4]
    tables = checks.Tables(m, r, "m", "r", (("k * r", k * r),))
    checks.positions(tensors, tables, query_rotary, key_rotary, rotary_interleaved)
    checks.null_slot(tensors, w_value.shape[1])
    stride, first_token, spans, missing = clock(
        "encoded", query, encoded.shape[1], m, stride, align, query_offset, chunk_offset, sequence_starts
    )
    call = Call(
        operation="projected_chunked_cross_attention",
        **tensors,
        chunk_spans=spans,
        dropout_seed=None,
        scale=checks.scale_of(scale, query),
        dropout_p=dropout_p,
        rows=m,
        stride=stride,
        first_token=first_token,
        return_lse=return_lse,
    )
    return ProjectedArguments(
        call,
        missing,
        recompute,
        query_rotary,
        key_rotary,
        rotary_interleaved,
        align,
        query_offset,
        chunk_offset,
        sequence_starts,
        backend,
    )


ROTARY = (
    'expected "materialise" or "auto": every key is turned by its own angle after w_key, so w_key cannot be applied '
    "to the query instead"
)


def absorb_refusal(given: ProjectedArguments) -> str | None:
    """Why "auto" may not take "absorb", or None."""
    if given.query_rotary is not None:
        return "every key is turned by its own angle after w_key, so w_key cannot be applied to the query instead"
    name, _ = backend_choice.requested_backend(given.backend)
    if name == "reference":
        return "the reference makes keys and values either way"
    if name is not None:
        return backend_choice.why_not(ABSORBED, name, given.call)
    name, reasons = backend_choice.first_fused(ABSORBED, given.call)
    return None if name else "no fused kernel can absorb this call: " + ("; ".join(reasons) or "none on this device")


def work(given: ProjectedArguments, backward: bool | None = None) -> cost_model.Work:
    """The sizes of a call for the cost model, and which gradients it asks for; `backward` overrides whether any. Packed
    documents are counted as if every token attended."""
    call = given.call
    b, n, h, d = call.query.shape
    l, k, r, e = call.encoded.shape[1:]
    if torch.compiler.is_compiling():  # no shape of batch or length is to be baked into the graph by this choice
        b, l = 1, 32
        queries = l * call.stride
    elif given.sequence_starts is not None:
        queries = n
    else:
        first, last = attended_chunks(n, l, call.stride, call.first_token)
        l, queries = last - first, max(0, n - max(0, call.first_token))

    def wanted(*tensors: torch.Tensor | None) -> bool:
        return any(x is not None and requires_grad(x) for x in tensors)

    encoded, weights = wanted(call.encoded), wanted(call.w_key, call.w_value, call.bias_key, call.bias_value)
    if backward is None:
        rest = (
            call.query,
            call.attention_bias,
            call.relative_key,
            call.content_bias,
            call.relative_bias,
            call.null_key,
            call.null_value,
        )
        backward = torch.is_grad_enabled() and (encoded or weights or wanted(*rest))
    elif backward and not (encoded or weights):
        encoded = weights = True
    fixed = operator.index  # makes the sizes of a model constants of a compiled graph; eagerly it does nothing
    return cost_model.Work(
        queries=fixed(b * queries),
        chunks=fixed(b * l),
        slots=fixed(k * r),
        encoder_dim=fixed(e),
        heads=fixed(h),
        kv_heads=fixed(call.w_key.shape[0]),
        head_dim=fixed(d),
        value_dim=fixed(call.w_value.shape[1]),
        itemsize=call.query.itemsize,
        backward=backward,
        encoded_gradient=encoded,
        weight_gradient=weights,
        recompute=given.recompute,
    )


CHECKED = ("query", "encoded", "w_key", "w_value", "bias_key", "bias_value", "mask")


def _check(query, encoded, w_key, w_value, bias_key, bias_value, mask) -> None:
    checks.rank("query", query, "b, n, h, d")
    b, _, h, d = query.shape
    dtype, device = query.dtype, query.device
    checks.tensor("encoded", encoded, (dtype,), device)
    checks.rank("encoded", encoded, "b, l, k, r, e")
    for name, weight in (("w_key", w_key), ("w_value", w_value)):
        checks.tensor(name, weight, (dtype,), device)
        checks.rank(name, weight, "hk, d, e")
    _, l, k, r, e = encoded.shape
    hk, d_value = w_key.shape[0], w_value.shape[1]
    checks.shape("encoded", encoded, "b, l, k, r, e", (b, l, k, r, e))
    if hk == 0 or h % hk != 0:
        raise ValueError(f"w_key: got {hk} key/value heads, expected a divisor of the query's {h} heads")
    checks.shape("w_key", w_key, "hk, d, e", (hk, d, e))
    checks.shape("w_value", w_value, "hk, d_value, e", (hk, d_value, e))
    either = (dtype, torch.float32)
    for name, bias, size in (("bias_key", bias_key, d), ("bias_value", bias_value, d_value)):
        if bias is not None:
            checks.tensor(name, bias, either, device)
            checks.shape(name, bias, "hk, " + ("d" if name == "bias_key" else "d_value"), (hk, size))
    checks.mask("neighbour_mask", mask, query, "b, l, k, r", (b, l, k, r))


def _materialise(given: ProjectedArguments) -> tuple[torch.Tensor, torch.Tensor | None]:
    call, sequence_starts = given.call, given.sequence_starts
    b, n, l = call.query.shape[0], call.query.shape[1], call.encoded.shape[1]
    first, last = 0, l
    by_chunk = sequence_starts is None and given.align == "start"
    if sequence_starts is None:
        first, last = attended_chunks(n, l, call.stride, call.first_token)
    used = call.mask
    if call.chunk_spans is not None:  # chunks that no document needs hold anything
        needed = (call.chunk_spans[..., 1] > 0)[..., None, None].expand(call.encoded.shape[:4])
        used = needed if used is None else used & needed
    options = {
        "attention_bias": call.attention_bias,
        "relative_key": call.relative_key,
        "content_bias": call.content_bias,
        "relative_bias": call.relative_bias,
        "null_key": call.null_key,
        "null_value": call.null_value,
        "query_rotary": given.query_rotary,
        "key_rotary": given.key_rotary,
        "rotary_interleaved": given.rotary_interleaved,
        "scale": call.scale,
        "dropout_p": call.dropout_p,
        "stride": call.stride,
        "align": given.align,
        "chunk_size": call.rows,
        "return_lse": call.return_lse,
        "backend": given.backend,
    }

    def attend(sequences: slice, tokens: slice, chunks: slice) -> tuple[torch.Tensor, torch.Tensor | None]:
        mine = dict(options)
        if sequence_starts is not None:
            mine["sequence_starts"] = sequence_starts[sequences]
        elif given.align == "start":
            mine |= {
                "query_offset": given.query_offset + tokens.start,
                "chunk_offset": given.chunk_offset + chunks.start,
            }
        return materialise.attend(
            call.query[sequences, tokens],
            call.encoded[sequences, chunks],
            (call.w_key, call.w_value),
            (call.bias_key, call.bias_value),
            used=None if used is None else used[sequences, chunks],
            neighbour_mask=None if call.mask is None else call.mask[sequences, chunks],
            **mine,
        )

    whole = (slice(0, b), slice(0, n), slice(first, last))
    if not given.recompute:
        return attend(*whole)
    if b >= RECOMPUTED_SLICES or not by_chunk or last - first < 2:
        axis = 0
        size = max(1, -(-b // RECOMPUTED_SLICES))
        slices = [(slice(i, min(i + size, b)), *whole[1:]) for i in range(0, b, size)]
    else:
        axis = 1
        borders = [*range(first, last, -(-(last - first) // RECOMPUTED_SLICES)), last]
        # A slice's tokens are those that attend to its chunks; the first also takes the tokens before any chunk.
        token = [0, *(call.first_token + u * call.stride for u in borders[1:-1]), n]
        slices = [(whole[0], slice(*token[i : i + 2]), slice(*borders[i : i + 2])) for i in range(len(borders) - 1)]
    parts = [checkpoint(attend, *part, use_reentrant=False) for part in slices or [whole]]
    outs, lses = zip(*parts)
    return torch.cat(outs, dim=axis), torch.cat(lses, dim=axis) if call.return_lse else None


def _absorb(given: ProjectedArguments) -> tuple[torch.Tensor, torch.Tensor]:
    dropout_p, dropout_seed = checks.dropout_of(given.call.dropout_p, given.call.query)
    call = dataclasses.replace(given.call, dropout_p=dropout_p, dropout_seed=dropout_seed)
    chosen = backend_choice.choose(ABSORBED, call, given.backend)
    b, n, h, _ = call.query.shape
    out, lse = plans.run(ABSORBED, chosen, call, None, {}, (b, n, h, call.w_value.shape[1]))
    lse = plain_lse(lse, axes=3)
    if given.missing is not None:
        out = out.masked_fill(given.missing[..., None, None], float("nan"))
    return out, lse
