"""The private ops every fused CCA backend registers: one schema, one fake, whatever computes behind it.

`api.py` has reduced the public options to this form before an op is called:

*Clock.* Token j of the query tensor has clock c = j - first_token. It attends when c >= 0, to chunk
c // stride (counted in `key`'s own chunk axis), as row c % stride. `first_token` may be negative (a slice of a
longer sequence whose first token is already inside a chunk). So chunk u is attended by the `stride` tokens from
first_token + u * stride, those outside [0, n) left out. Tokens with c < 0 output 0 with lse -inf; there are at most
chunk_size - 1 of them. Chunks that no token attends to are not read and get zero gradient.

*Scale* multiplies the content logit (and the null slot's), the bias is added after it.
"""

from __future__ import annotations

import dataclasses

import torch

from .. import common

SLOTS = (
    "Tensor query, Tensor key, Tensor value, Tensor? neighbour_mask, Tensor? attention_bias, "
    "Tensor? query_cos, Tensor? query_sin, Tensor? key_cos, Tensor? key_sin, "
    "Tensor? null_key, Tensor? null_value"
)
SETTINGS = "bool rotary_interleaved, float scale, SymInt stride, SymInt first_token"

PARTIAL_COPIES = 32  # partial sums of parameter gradients (bias, null slot): at most this many, on any device


def forward_schema(backend: str) -> str:
    """query [b, n, h, d], key/value [b, l, k, r, hk, d | d_value], neighbour_mask bool [b, l, k, r],
    attention_bias [h, m, r] or [h, m, k*r], cos/sin [m | r, rotary_dim / 2], null_key/null_value [h, d | d_value]
    -> out [b, n, h, d_value] in the query's dtype, lse [b, n, h] fp32 (natural logarithm, null slot included)."""
    return f"cca_forward_{backend}({SLOTS}, {SETTINGS}) -> (Tensor out, Tensor lse)"


def backward_schema(backend: str) -> str:
    """The forward's arguments, its outputs, and which parameter gradients are wanted -> gradients of query, key,
    value, attention_bias, null_key, null_value, each contiguous, shaped and typed as its input; those not wanted
    have no elements."""
    return (
        f"cca_backward_{backend}(Tensor grad_out, {SLOTS}, Tensor out, Tensor lse, {SETTINGS}, "
        "bool bias_gradient, bool null_gradient) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
    )


def allocate_forward(query: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """out and lse, uninitialised."""
    b, n, h, _ = query.shape
    out = common.allocate((b, n, h, value.shape[-1]), query.dtype, query.device)
    return out, common.allocate((b, n, h), torch.float32, query.device)


def allocate_backward(query, key, value, attention_bias, null_key, null_value, bias_gradient, null_gradient):
    """The six gradients in the schema's order, uninitialised."""

    def like(tensor: torch.Tensor | None, wanted: bool) -> torch.Tensor:
        if tensor is None or not wanted:
            return query.new_empty((0,))
        return common.allocate(tuple(tensor.shape), tensor.dtype, tensor.device)

    return (
        like(query, True),
        like(key, True),
        like(value, True),
        like(attention_bias, bias_gradient),
        like(null_key, null_gradient),
        like(null_value, null_gradient),
    )


def fake_forward(query, key, value, *_):
    return allocate_forward(query, value)


def fake_backward(grad_out, query, key, value, neighbour_mask, attention_bias, query_cos, query_sin, key_cos, key_sin,
                  null_key, null_value, out, lse, rotary_interleaved, scale, stride, first_token,
                  bias_gradient, null_gradient):  # fmt: skip
    return allocate_backward(query, key, value, attention_bias, null_key, null_value, bias_gradient, null_gradient)


def register(backend: str, forward, backward, devices: tuple[str, ...]):
    """Registers `cca_forward_<backend>` and `cca_backward_<backend>`; returns both callables."""
    forward_op = common.register(forward_schema(backend), implementation=forward, fake=fake_forward, devices=devices)
    backward_op = common.register(
        backward_schema(backend), implementation=backward, fake=fake_backward, devices=devices
    )
    common.refuse_second_derivative(f"cca_backward_{backend}")
    return forward_op, backward_op


def attended_chunks(n: int, num_chunks: int, stride: int, first_token: int) -> tuple[int, int]:
    """[first, last) chunks that at least one of the n tokens attends to."""
    if n <= first_token:
        return 0, 0
    return max(0, -first_token // stride), min(num_chunks, (n - 1 - first_token) // stride + 1)


@dataclasses.dataclass(frozen=True)
class Call:
    """One validated call, as `api.py` hands it to a backend. Tensors have the shapes of `api.chunked_cross_attention`;
    the alignment and the offsets have become `first_token` (see the clock above)."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    neighbour_mask: torch.Tensor | None
    attention_bias: torch.Tensor | None
    relative_key: torch.Tensor | None
    content_bias: torch.Tensor | None
    relative_bias: torch.Tensor | None
    query_rotary: tuple[torch.Tensor, torch.Tensor] | None
    key_rotary: tuple[torch.Tensor, torch.Tensor] | None
    rotary_interleaved: bool
    null_key: torch.Tensor | None
    null_value: torch.Tensor | None
    scale: float
    dropout_p: float
    chunk_size: int
    stride: int
    first_token: int
