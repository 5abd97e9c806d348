"""One decode call, what of it is done in PyTorch on small tensors, and the private op for the rest.

Token j of sequence b is at position p = position[b] + j. Its clock is c = p - (m - 1); with c >= 0 it attends, as row
c mod m, to the neighbours of chunk c // m. The cache holds one chunk a sequence: `chunk[b]`, or, where that is not
given, the chunk of the call's first retrieving token. The state of a token is

    IDLE     c < 0, or its sequence is not valid: out 0, lse -inf, and the cache is not read for it
    ATTENDS  its chunk is the cache's
    BEYOND   its chunk is another one, or its position is negative: out and lse NaN

The private op takes what is large, the cache, in place, and everything else reduced to three small tensors:

    logit_bias  [b, t, h, r | k * r] fp32  the additive bias and the relative positions' logits of each token's row
    null_logit  [b, t, h] fp32             the null slot's logit
    query       [b, t, h, d]               turned, or with content_bias

so that its logits are scale * key_scale[slot] * (query . key[slot]) + logit_bias[.., t | slot], the product capped
before the bias is added where there is a `logit_softcap` (relative positions, which belong under the cap, are then
refused), and its values
value_scale[slot] * value[slot]. A null slot without `null_value` has the value 0 (decoding from encoder states adds
what it stands for itself).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

from .. import call as calls
from .. import memory
from ..attention.common import turn
from ..call import Length

IDLE, ATTENDS, BEYOND = 0, 1, 2

QUANTISED = (torch.int8, torch.float8_e4m3fn)


@calls.described
@dataclasses.dataclass(kw_only=True, eq=False)
class Call(calls.Call):
    """What the private op takes: query [b, t, h, d]; key, value [b, k, r, hk, d | d_value], in the query's dtype or
    quantised; mask bool [b, k, r]; null_value [h, d_value]; key_cos, key_sin [r, w]; key_scale, value_scale fp32
    [b, k, r]; position int64, valid bool and chunk int64 [b], contiguous; every last stride 1 but the masks' and the
    scales' -> out [b, t, h, d_value] in the query's dtype, lse [b, t, h] fp32, the null slot included."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    mask: torch.Tensor | None = None
    logit_bias: torch.Tensor | None = None
    null_logit: torch.Tensor | None = None
    null_value: torch.Tensor | None = None
    key_cos: torch.Tensor | None = None
    key_sin: torch.Tensor | None = None
    key_scale: torch.Tensor | None = None
    value_scale: torch.Tensor | None = None
    position: torch.Tensor
    valid: torch.Tensor | None = None
    chunk: torch.Tensor | None = None
    rotary_interleaved: bool = False
    scale: float
    logit_softcap: float = 0.0
    chunk_size: Length


@dataclasses.dataclass(kw_only=True, eq=False)
class DecodeCall:
    """One checked call. With w_key [hk, d, e], w_value [hk, d_value, e] and their biases, the projection, key and value
    are both the encoder states [b, k, r, 1, e]."""

    operation: str
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    w_key: torch.Tensor | None = None
    w_value: torch.Tensor | None = None
    bias_key: torch.Tensor | None = None
    bias_value: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    attention_bias: torch.Tensor | None = None
    relative_key: torch.Tensor | None = None
    content_bias: torch.Tensor | None = None
    relative_bias: torch.Tensor | None = None
    query_cos: torch.Tensor | None = None
    query_sin: torch.Tensor | None = None
    key_cos: torch.Tensor | None = None
    key_sin: torch.Tensor | None = None
    rotary_interleaved: bool = False
    null_key: torch.Tensor | None = None
    null_value: torch.Tensor | None = None
    key_scale: torch.Tensor | None = None
    value_scale: torch.Tensor | None = None
    position: torch.Tensor
    valid: torch.Tensor | None = None
    chunk: torch.Tensor | None = None
    chunk_size: int
    scale: float
    logit_softcap: float = 0.0

    @property
    def query_rotary(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """cos and sin by row."""
        return None if self.query_cos is None or self.query_sin is None else (self.query_cos, self.query_sin)

    @property
    def key_rotary(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """cos and sin by slot."""
        return None if self.key_cos is None or self.key_sin is None else (self.key_cos, self.key_sin)

    def needs_gradient(self) -> bool:
        """Whether autograd would record this call."""
        parts = [getattr(self, field.name) for field in dataclasses.fields(self)]
        calls.refuse_forward_mode(parts)
        return torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and calls.requires_grad(x) for x in parts)


def allocate_outputs(query: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """out and lse, uninitialised."""
    out = memory.allocate((*query.shape[:-1], value.shape[-1]), query.dtype, query.device)
    return out, memory.allocate(tuple(query.shape[:-1]), torch.float32, query.device)


def register(backend: str, attend: Callable, devices: tuple[str, ...]) -> Callable:
    """Registers `decode_forward_<backend>`; returns the callable."""

    def outputs(call: Call) -> tuple[torch.Tensor, torch.Tensor]:
        return allocate_outputs(call.query, call.value)

    return calls.register("decode", backend, Call, attend, devices=devices, outputs=outputs)[0]


def project(x: torch.Tensor, weight: torch.Tensor, transposed: bool) -> torch.Tensor:
    """x [n, h, d | e] times weight [hk, d, e], or, `transposed`, weight [hk, d_value, e] the other way round, head i by
    matrix i // (h / hk) -> [n, h, e | d_value]. For backends without a kernel for it."""
    n, h, size = x.shape
    hk = weight.shape[0]
    # [hk, n * group, size]: the heads that share weights, side by side
    folded = x.reshape(n, hk, h // hk, size).transpose(0, 1).reshape(hk, n * (h // hk), size)
    out = torch.bmm(folded, weight.transpose(1, 2) if transposed else weight)
    return out.view(hk, n, h // hk, out.shape[-1]).transpose(0, 1).reshape(n, h, out.shape[-1])


def clock(call: DecodeCall) -> torch.Tensor:
    """int64 [b, t]: tokens since the first that attends to anything."""
    token = torch.arange(call.query.shape[1], device=call.position.device)
    return call.position[:, None] + token - (call.chunk_size - 1)


def rows(call: DecodeCall) -> torch.Tensor:
    """int64 [b, t]: each token's row in its chunk, some row in [0, m) for a token that does not attend."""
    return torch.remainder(clock(call), call.chunk_size)


def states(call: DecodeCall) -> torch.Tensor:
    """int64 [b, t]: IDLE, ATTENDS or BEYOND."""
    m = call.chunk_size
    since = clock(call)
    held = (call.position - (m - 1)).clamp(min=0) // m if call.chunk is None else call.chunk
    state = torch.where(torch.div(since, m, rounding_mode="floor") == held[:, None], ATTENDS, BEYOND)
    state = torch.where(since >= 0, state, IDLE)
    state = torch.where(since + (m - 1) >= 0, state, BEYOND)
    return state if call.valid is None else torch.where(call.valid[:, None], state, IDLE)


def content_query(call: DecodeCall) -> torch.Tensor:
    """The query as the content term and the null slot see it, [b, t, h, d] in the query's dtype."""
    if call.query_rotary is not None:
        row = rows(call)
        cos, sin = (table[row].float()[:, :, None] for table in call.query_rotary)
        return turn(call.query.float(), cos, sin, call.rotary_interleaved).to(call.query.dtype)
    if call.content_bias is not None:
        return (call.query + call.content_bias).to(call.query.dtype)
    return call.query


def logit_bias(call: DecodeCall, product: Callable[..., torch.Tensor] = project) -> torch.Tensor | None:
    """[b, t, h, r | k * r] fp32, or None where there is neither a bias nor relative positions. `product` is `project`,
    or does the same.

    The relative logits multiply each query with the whole table and then take the r distances of its row: with h of
    them a table of m + r - 1 rows is 0.7 of the keys of two neighbours, read once for all sequences; gathered per token
    first it would be read and written for each of them.
    """
    if call.attention_bias is None and call.relative_key is None:
        return None
    row = rows(call)
    total = None
    k, r = call.key.shape[1:3]
    if call.relative_key is not None:
        query = call.query if call.relative_bias is None else (call.query + call.relative_bias).to(call.query.dtype)
        b, t, h, d = query.shape
        table = call.relative_key.to(query.dtype)  # [h, m + r - 1, d]
        by_distance = product(query.reshape(b * t, h, d), table, True).view(b, t, h, table.shape[1])
        distance = row[..., None] - torch.arange(r, device=row.device) + (r - 1)
        total = call.scale * by_distance.gather(-1, distance[:, :, None].expand(b, t, h, r)).float()
    if call.attention_bias is not None:
        bias = call.attention_bias[:, row].permute(1, 2, 0, 3).float()
        wide = bias.shape[-1]
        if total is not None and wide != r:
            total = total.repeat(1, 1, 1, k)
        total = bias if total is None else total + bias
    return None if total is None else total.contiguous()


def null_logit(call: DecodeCall, content: torch.Tensor) -> torch.Tensor | None:
    """[b, t, h] fp32."""
    if call.null_key is None:
        return None
    logit = call.scale * (content.float() * call.null_key.float()).sum(-1)
    if call.logit_softcap > 0.0:
        logit = call.logit_softcap * torch.tanh(logit / call.logit_softcap)
    return logit.contiguous()


def refusal(name: str, call: DecodeCall, largest_head: int) -> str | None:
    """What no fused backend takes."""
    query = call.query
    if query.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f'query is {query.dtype}; the {name} kernels take float32, float16, bfloat16: use backend="reference"'
    if call.needs_gradient():
        return (
            "an argument requires a gradient, and decoding has none: call it under torch.no_grad(), or train with "
            f'the full operation ({call.operation.removesuffix("_decode")}), or use backend="reference", which '
            "PyTorch differentiates"
        )
    sizes = (query.shape[-1], call.key.shape[-1], call.value.shape[-1])
    if max(sizes) > largest_head:
        return (
            f"sizes of a head or an encoder state are {sizes[1]} and {sizes[2]}; the {name} kernels take at most "
            f'{largest_head}: use backend="reference"'
        )
    if call.logit_softcap > 0.0 and call.relative_key is not None:
        return (
            "logit_softcap with relative_key: the cap is of both terms' sum, which the decode kernels do not form: use "
            'backend="reference"'
        )
    if call.key_rotary is not None and call.key_rotary[0].shape[-1] > 128:
        return f"key_rotary turns {2 * call.key_rotary[0].shape[-1]} dimensions; the {name} kernels turn at most 256"
    return None
