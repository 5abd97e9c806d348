"""Decoding, `chunked_cross_attention_decode` and `projected_chunked_cross_attention_decode`: check the arguments, do
what of the call is small in PyTorch (`decoding/common.py`), and run the rest on the backend that
`ops/backends.py` chooses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from . import backends, checks, plans
from .call import dispatch
from .compiling import readable, without_autocast
from .decoding import common, cpu
from .decoding.common import QUANTISED, DecodeCall


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
    logit_softcap: float | None = None,
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
        attention_bias, relative_key, content_bias, relative_bias, null_key, null_value, scale, logit_softcap: as in
            the full operation, tables indexed by each token's row. Fused backends refuse a cap with `relative_key`.
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
        "key_scale": key_scale,
        "value_scale": value_scale,
        "position": position,
        "valid": valid,
        "chunk": chunk,
    }
    signature = _signature(
        backend,
        ("chunked_cross_attention_decode", chunk_size, rotary_interleaved, scale, logit_softcap, validate),
        given,
    )
    plan = plans.get(signature)
    if plan is not None:
        out, lse = plan(given)
        return (out, lse) if return_lse else out
    _check_query(query)
    tensors = checks.autocast(given)
    query, key, value = (tensors[name] for name in ("query", "key", "value"))
    k, r, d_value = _check_keys_and_values(query, key, value, key_scale, value_scale)
    call = _checked(
        DecodeCall(
            operation="chunked_cross_attention_decode",
            **tensors,
            rotary_interleaved=rotary_interleaved,
            chunk_size=chunk_size,
            scale=checks.scale_of(scale, query),
            logit_softcap=checks.softcap_of(logit_softcap),
        ),
        d_value,
        k,
        r,
        query_rotary,
        key_rotary,
        validate,
    )
    out, lse = _run(call, backend, signature, given, validate)
    return (out, lse) if return_lse else out


def projected_chunked_cross_attention_decode(
    query: torch.Tensor,
    encoded: torch.Tensor,
    w_key: torch.Tensor,
    w_value: torch.Tensor,
    *,
    chunk_size: int,
    position: torch.Tensor,
    bias_key: torch.Tensor | None = None,
    bias_value: torch.Tensor | None = None,
    encoded_scale: torch.Tensor | None = None,
    valid: torch.Tensor | None = None,
    chunk: torch.Tensor | None = None,
    neighbour_mask: torch.Tensor | None = None,
    attention_bias: torch.Tensor | None = None,
    relative_key: torch.Tensor | None = None,
    content_bias: torch.Tensor | None = None,
    relative_bias: torch.Tensor | None = None,
    query_rotary: Any = None,
    key_rotary: Any = None,
    rotary_interleaved: bool = False,
    null_key: torch.Tensor | None = None,
    null_value: torch.Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    validate: bool = False,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """`chunked_cross_attention_decode` from the encoder's states: their keys and values are never made.

    W_k acts on the query and W_v on the weighted sum of the states, so the cache is k * r states of e numbers, shared
    by all heads and all layers, instead of keys and values of 2 hk d numbers for each layer. W_k and W_v are read
    besides, once whatever the batch: up to a batch of about e / (k r) a cache of keys and values has fewer bytes to
    read.

    Args:
        query: [b, t, h, d].
        encoded: [b, k, r, e] in the query's dtype, or int8 or float8_e4m3fn with `encoded_scale`; e is at most 4096 on
            the fused backends.
        w_key, w_value: [hk, d, e] and [hk, d_value, e] in the query's dtype; query head i uses those of i // (h / hk).
        bias_key, bias_value: [hk, d] and [hk, d_value], in fp32 or the query's dtype.
        encoded_scale: fp32 [b, k, r], what a quantised cache is multiplied with.
        query_rotary, key_rotary, rotary_interleaved: refused. A turned key is not a projection of the state.

    The other arguments, the result and the errors are those of `chunked_cross_attention_decode`.
    """
    given = {
        "query": query,
        "key": encoded,
        "value": encoded,
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
        "key_scale": encoded_scale,
        "value_scale": encoded_scale,
        "position": position,
        "valid": valid,
        "chunk": chunk,
    }
    signature = None
    if query_rotary is None and key_rotary is None:
        signature = _signature(
            backend,
            ("projected_chunked_cross_attention_decode", chunk_size, rotary_interleaved, scale, validate),
            given,
        )
        plan = plans.get(signature)
        if plan is not None:
            out, lse = plan(given)
            return (out, lse) if return_lse else out
    _check_query(query)
    for name, wanted in (
        ("query_rotary", query_rotary is not None),
        ("key_rotary", key_rotary is not None),
        ("rotary_interleaved", rotary_interleaved),
    ):
        if wanted:
            raise ValueError(
                f"{name}: rotary positions cannot be used with a cache of encoder states: keys are turned after W_k, "
                "by an angle of their own each, so that W_k cannot act on the query instead. Cache keys and values "
                "and call chunked_cross_attention_decode"
            )
    tensors = checks.autocast(given)
    query, encoded, w_key, w_value = (tensors[name] for name in ("query", "key", "w_key", "w_value"))
    k, r = _check_states(query, encoded, encoded_scale)
    d_value = _check_projection(query, w_key, w_value, tensors["bias_key"], tensors["bias_value"], encoded.shape[-1])
    tensors |= dict.fromkeys(("key", "value"), encoded.unsqueeze(3))
    call = _checked(
        DecodeCall(
            operation="projected_chunked_cross_attention_decode",
            **tensors,
            chunk_size=chunk_size,
            scale=checks.scale_of(scale, query),
        ),
        d_value,
        k,
        r,
        None,
        None,
        validate,
    )
    out, lse = _run(call, backend, signature, given, validate)
    return (out, lse) if return_lse else out


def _check_keys_and_values(
    query: torch.Tensor, key: Any, value: Any, key_scale: torch.Tensor | None, value_scale: torch.Tensor | None
) -> tuple[int, int, int]:
    """-> k, r, d_value."""
    b, _, h, d = query.shape
    k, r, hk = _check_cache("key", key, key_scale, "key_scale", query, "b, k, r, hk, d")
    _check_cache("value", value, value_scale, "value_scale", query, "b, k, r, hk, d_value")
    d_value = value.shape[-1]
    checks.shape("key", key, "b, k, r, hk, d", (b, k, r, hk, d))
    checks.shape("value", value, "b, k, r, hk, d_value", (b, k, r, hk, d_value))
    if hk == 0 or h % hk != 0:
        raise ValueError(
            f"key: got {hk} key/value heads, expected a divisor of the query's {h} heads (shape {list(key.shape)})"
        )
    if d_value == 0:
        raise ValueError(f"value: got shape {list(value.shape)}, expected d_value at least 1")
    return k, r, d_value


def _check_query(query: Any) -> None:
    checks.tensor("query", query, checks.FLOATING)
    checks.rank("query", query, "b, t, h, d")
    for name, size in (("h", query.shape[2]), ("d", query.shape[3])):
        if size == 0:
            raise ValueError(f"query: got shape {list(query.shape)}, expected [b, t, h, d] with {name} at least 1")


def _check_cache(
    name: str, cache: Any, scale: torch.Tensor | None, scale_name: str, query: torch.Tensor, dims: str
) -> tuple[Any, ...]:
    """Type, dtype, device and rank of a cache, and that it is quantised exactly when there is a scale -> its sizes
    after the batch, but the last."""
    if isinstance(cache, torch.Tensor) and cache.dtype not in (query.dtype, *QUANTISED):
        raise TypeError(
            f"{name}: got dtype {cache.dtype}, expected {query.dtype}, the query's, or a quantised cache "
            f"(torch.int8 or torch.float8_e4m3fn with {scale_name})"
        )
    checks.tensor(name, cache, (query.dtype, *QUANTISED), query.device)
    checks.rank(name, cache, dims)
    if (scale is not None) != (cache.dtype in QUANTISED):
        raise ValueError(
            f"{scale_name}: got {'none' if scale is None else 'a tensor'} with a {name} of dtype {cache.dtype}, "
            "expected one exactly when the cache is int8 or float8_e4m3fn"
        )
    if scale is not None:
        checks.tensor(scale_name, scale, (torch.float32,), query.device)
        checks.shape(scale_name, scale, "b, k, r", (query.shape[0], *cache.shape[1:3]))
    return tuple(cache.shape[1:-1])


def _check_states(query: torch.Tensor, encoded: Any, encoded_scale: torch.Tensor | None) -> tuple[int, int]:
    """-> k, r."""
    k, r = _check_cache("encoded", encoded, encoded_scale, "encoded_scale", query, "b, k, r, e")
    e = encoded.shape[-1]
    checks.shape("encoded", encoded, "b, k, r, e", (query.shape[0], k, r, e))
    if e == 0:
        raise ValueError(f"encoded: got shape {list(encoded.shape)}, expected e at least 1")
    return k, r


def _check_projection(query, w_key, w_value, bias_key, bias_value, e: int) -> int:
    """-> d_value."""
    _, _, h, d = query.shape
    for name, weight in (("w_key", w_key), ("w_value", w_value)):
        checks.tensor(name, weight, (query.dtype,), query.device)
        if weight.dim() != 3:
            raise ValueError(f"{name}: got shape {list(weight.shape)}, expected [hk, d, e]")
    hk, d_value = w_key.shape[0], w_value.shape[1]
    if hk == 0 or h % hk != 0:
        raise ValueError(f"w_key: got {hk} key/value heads, expected a divisor of the query's {h} heads")
    if d_value == 0:
        raise ValueError(f"w_value: got shape {list(w_value.shape)}, expected d_value at least 1")
    checks.shape("w_key", w_key, "hk, d, e", (hk, d, e))
    checks.shape("w_value", w_value, "hk, d_value, e", (hk, d_value, e))
    for name, bias, letter, size in (("bias_key", bias_key, "d", d), ("bias_value", bias_value, "d_value", d_value)):
        if bias is not None:
            checks.tensor(name, bias, (query.dtype, torch.float32), query.device)
            checks.shape(name, bias, f"hk, {letter}", (hk, size))
    return d_value


def _checked(
    call: DecodeCall, d_value: int, k: int, r: int, query_rotary: Any, key_rotary: Any, synchronise: bool
) -> DecodeCall:
    """What both operations check alike, the border among it -> the call with its numbers as kernels take them."""
    query, b = call.query, call.query.shape[0]
    call.chunk_size = m = checks.integer("chunk_size", call.chunk_size, 1)
    checks.tensor("position", call.position, (torch.int64,), query.device)
    checks.shape("position", call.position, "b", (b,))
    for name, x, dtype in (("valid", call.valid, torch.bool), ("chunk", call.chunk, torch.int64)):
        if x is not None:
            checks.tensor(name, x, (dtype,), query.device)
            checks.shape(name, x, "b", (b,))
    checks.mask("neighbour_mask", call.mask, query, "b, k, r", (b, k, r))
    tables = checks.Tables(m, r, "m", "r", (("k * r", k * r),))
    interleaved = call.rotary_interleaved
    checks.positions(vars(call), tables, query_rotary, key_rotary, interleaved, key_may_be_turned=True)
    checks.null_slot(vars(call), d_value)
    _place(call, synchronise)
    return call


def _place(call: DecodeCall, synchronise: bool) -> None:
    """Makes what says where the tokens are contiguous, and checks it where it may be looked at."""
    call.position = call.position.contiguous()
    call.valid = None if call.valid is None else call.valid.contiguous()
    call.chunk = None if call.chunk is None else call.chunk.contiguous()
    if (synchronise or call.query.device.type == "cpu") and readable(call.position, call.chunk, call.valid):
        _check_border(call, call.query.shape[1])


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


def _signature(backend: str | None, options: tuple[Any, ...], given: Mapping[str, Any]) -> tuple[Any, ...] | None:
    signature = plans.signature(backend, options, given)
    if signature is not None and torch.is_grad_enabled():
        for x in given.values():
            if x is not None and x.requires_grad:  # which a fused backend refuses
                return None
    return signature


class _Plan:
    """How the calls of one signature are run (`plans.py`)."""

    def __init__(self, module: Any, call: DecodeCall, given: Mapping[str, Any], synchronise: bool) -> None:
        self.module, self.template, self.synchronise = module, plans.Template(call, given), synchronise

    def __call__(self, given: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        call = self.template.fill([given[name] for name in self.template.present])
        if call.w_key is not None:  # encoder states
            call.value = call.key
        _place(call, self.synchronise)
        return _attend(call, self.module, self._kernel)

    def _kernel(self, call: common.Call) -> tuple[torch.Tensor, torch.Tensor]:
        call.memory = self.template.memory  # type: ignore[misc]
        return self.module.attend(call)


def _run(
    call: DecodeCall, backend: str | None, signature: Any, given: Mapping[str, Any], synchronise: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """-> out [b, t, h, d_value], lse [b, t, h]."""
    chosen = backends.choose(backends.DECODING, call, backend)
    module = backends.DECODING[chosen]
    if signature is not None and chosen in plans.REMEMBERED:
        plan = _Plan(module, call, given, synchronise)
        plans.keep(signature, plan)
        return plan(given)
    with without_autocast(call.query):
        if chosen == "reference":
            return module.attend(call)
        return _attend(call, module, lambda kernel: dispatch(module, kernel))


def _attend(call: DecodeCall, module: Any, kernel: Callable) -> tuple[torch.Tensor, torch.Tensor]:
    """The call by the `kernel` of a fused backend, with what comes before and after it."""
    # The CPU's own product keeps decoding with relative positions bitwise the same for any number of threads.
    logit_bias = common.logit_bias(call, cpu.project_few if module is cpu else common.project)
    content = common.content_query(call)
    null_logit = common.null_logit(call, content)
    if call.w_key is None or call.w_value is None:
        return kernel(_kernel_call(call, content, logit_bias, null_logit, call.null_value))
    return _attend_projected(call, call.w_key, call.w_value, content, logit_bias, null_logit, module.project, kernel)


def _attend_projected(
    call: DecodeCall,
    w_key: torch.Tensor,
    w_value: torch.Tensor,
    content: torch.Tensor,
    logit_bias: torch.Tensor | None,
    null_logit: torch.Tensor | None,
    project: Callable,
    kernel: Callable,
) -> tuple[torch.Tensor, torch.Tensor]:
    """W_k acts on the query and W_v on the weighted sum of the states, [b, t, h, e] each: no key or value exists.

    `bias_key` adds the same to all logits of a row but the null slot's, so it is taken from the null slot's instead and
    given back to the lse. `bias_value` comes in with all the weight that the null slot leaves.
    """
    b, t, h, _ = call.query.shape
    hk, d_value, e = w_value.shape
    shift = None
    if call.bias_key is not None:
        bias = call.bias_key.float().repeat_interleave(h // hk, dim=0)
        shift = call.scale * (content.float() * bias).sum(-1)
    absorbed = project(content.flatten(0, 1), w_key, False).view(b, t, h, e)
    shifted = null_logit if null_logit is None or shift is None else null_logit - shift
    weighted, lse = kernel(_kernel_call(call, absorbed, logit_bias, shifted, None))
    out = project(weighted.flatten(0, 1), w_value, True).view(b, t, h, d_value)
    if null_logit is None and call.bias_value is None:
        return out, lse if shift is None else torch.where(lse == float("-inf"), lse, lse + shift)
    empty = lse == float("-inf")
    p_null = 0.0 if shifted is None else (shifted - lse).exp().masked_fill(empty, 0.0)[..., None]
    total = out.float()
    if call.bias_value is not None:
        bias = call.bias_value.float().repeat_interleave(h // hk, dim=0)
        total = total + (1.0 - p_null) * bias * ~empty[..., None]
    if call.null_value is not None:
        total = total + p_null * call.null_value.float()
    return total.to(call.query.dtype), lse if shift is None else torch.where(empty, lse, lse + shift)


def _kernel_call(
    call: DecodeCall,
    query: torch.Tensor,
    logit_bias: torch.Tensor | None,
    null_logit: torch.Tensor | None,
    null_value: torch.Tensor | None,
) -> common.Call:
    key = _unit_last_stride(call.key)
    return common.Call(
        query=_unit_last_stride(query),
        key=key,
        value=key if call.value is call.key else _unit_last_stride(call.value),
        mask=call.mask,
        logit_bias=logit_bias,
        null_logit=null_logit,
        null_value=_unit_last_stride(null_value),
        key_cos=_unit_last_stride(call.key_cos),
        key_sin=_unit_last_stride(call.key_sin),
        key_scale=call.key_scale,
        value_scale=call.value_scale,
        position=call.position,
        valid=call.valid,
        chunk=call.chunk,
        rotary_interleaved=call.rotary_interleaved,
        scale=call.scale,
        logit_softcap=call.logit_softcap,
        chunk_size=call.chunk_size,
    )


def _unit_last_stride(x: Any) -> Any:
    """As `memory.unit_last_stride`, of integers too: caches may be int8."""
    return x if x is None or x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()
