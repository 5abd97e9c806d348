"""The private ops of the absorbed strategy: keys and values never exist.

With K = E W_k^T + b_k and V = E W_v^T + b_v for encoder states E [S, e] of one chunk (S = k * r), a head's logits and
output are

    q' . K_j = (q' W_k) . E_j + q' . b_k        sum_j p_j V_j = (sum_j p_j E_j) W_v^T + (sum_j p_j) b_v

so W_k is applied to the query and W_v after the weighted sum. A kernel gets the call in the form of
`ops/attention/common.py`, grouping CLOCK: the clock (or `chunk_spans`), rows, slots, masks, relative positions, the
additive bias, the null slot and dropout mean what they mean there; there is no rotation. In particular

    q' = q + content_bias                   logit = scale * (q' . K_j + (q + relative_bias) . relative_key[...]) + bias
    the null slot's logit is scale * q' . null_key, and its probability is not part of sum_j p_j above
    with dropout, p_j is the kept and scaled probability

`bias_key` shifts all logits of a row alike: only the null slot and the log-sum-exp see it.

Nothing of the size of queries times e, or of queries times keys, is kept in global memory, and nothing of the size
of K and V: scratch there is bounded by a constant number of fp32 copies of the weights (at most `PARTIAL_COPIES` of
each weight's gradient) and of one chunk's states. Every sum has a fixed order: results are bitwise reproducible.
"""

from __future__ import annotations

import dataclasses

import torch

from .. import common

SLOTS = (
    "Tensor query, Tensor encoded, Tensor w_key, Tensor w_value, Tensor? bias_key, Tensor? bias_value, Tensor? mask, "
    "Tensor? attention_bias, Tensor? relative_key, Tensor? content_bias, Tensor? relative_bias, "
    "Tensor? null_key, Tensor? null_value, Tensor? chunk_spans, Tensor? dropout_seed"
)
SETTINGS = "float scale, float dropout_p, SymInt stride, SymInt first_token"
# Places in SLOTS of what has a gradient; the backward returns them in this order.
DIFFERENTIABLE = (0, 1, 2, 3, 4, 5, 7, 8, 9, 10, 11, 12)
# Places of what the backward's flags ask for: the states, the weights, the bias, the relative positions, the null slot.
FLAGS = ((1,), (2, 3, 4, 5), (7,), (8, 9, 10), (11, 12))

PARTIAL_COPIES = 4  # of the weights' gradients; they are large: 29 MB in fp32 at 32 heads of 128 and e = 896


def forward_schema(backend: str) -> str:
    """query [b, n, h, d], encoded [b, l, k, r, e], w_key [hk, d, e], w_value [hk, d_value, e], bias_key [hk, d],
    bias_value [hk, d_value], mask bool [b, l, k, r], attention_bias [h, m, r | k * r], relative_key [h, m + r - 1, d],
    content_bias, relative_bias, null_key [h, d], null_value [h, d_value], chunk_spans int32 [b, l, 2],
    dropout_seed int64 [1] -> out [b, n, h, d_value] in the query's dtype, lse [b, n, h] fp32, or with an attention_bias
    [2, b, n, h], two planes of it (`ops/attention/common.py`)."""
    return f"absorbed_forward_{backend}({SLOTS}, {SETTINGS}) -> (Tensor out, Tensor lse)"


def backward_schema(backend: str) -> str:
    """The gradients of its outputs (grad_lse [b, n, h], of the natural log-sum-exp), the forward's arguments, its
    outputs, and which gradients are wanted -> gradients of query, encoded, w_key, w_value, bias_key, bias_value,
    attention_bias, relative_key, content_bias, relative_bias, null_key, null_value,
    each contiguous, shaped and typed as its input; those absent or not wanted have no elements."""
    return (
        f"absorbed_backward_{backend}(Tensor grad_out, Tensor? grad_lse, {SLOTS}, Tensor out, Tensor lse, {SETTINGS}, "
        "bool encoded_gradient, bool weight_gradient, bool bias_gradient, bool relative_gradient, bool null_gradient) "
        "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
    )


def allocate_forward(
    query: torch.Tensor, w_value: torch.Tensor, attention_bias: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """out and lse, uninitialised; with an `attention_bias` lse has two planes."""
    b, n, h, _ = query.shape
    out = common.allocate((b, n, h, w_value.shape[1]), query.dtype, query.device)
    planes = () if attention_bias is None else (2,)
    return out, common.allocate((*planes, b, n, h), torch.float32, query.device)


def allocate_backward(
    query, encoded, w_key, w_value, bias_key, bias_value, attention_bias, relative_key, content_bias, relative_bias,
    null_key, null_value,
    encoded_gradient, weight_gradient, bias_gradient, relative_gradient, null_gradient,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """The twelve gradients in the schema's order, uninitialised."""

    def like(tensor: torch.Tensor | None, wanted: bool) -> torch.Tensor:
        if tensor is None or not wanted:
            return query.new_empty((0,))
        return common.allocate(tuple(tensor.shape), tensor.dtype, tensor.device)

    return (
        like(query, True),
        like(encoded, encoded_gradient),
        *(like(x, weight_gradient) for x in (w_key, w_value, bias_key, bias_value)),
        like(attention_bias, bias_gradient),
        *(like(x, relative_gradient) for x in (relative_key, content_bias, relative_bias)),
        *(like(x, null_gradient) for x in (null_key, null_value)),
    )


def _fake_forward(query, encoded, w_key, w_value, *_):
    return allocate_forward(query, w_value)


def _fake_forward_of_two_planes(query, encoded, w_key, w_value, bias_key, bias_value, mask, attention_bias, *_):
    return allocate_forward(query, w_value, attention_bias)


def _fake_backward(grad_out, grad_lse, *inputs):
    return allocate_backward(*(inputs[place] for place in DIFFERENTIABLE), *inputs[-5:])


def register(backend: str, forward, backward, devices: tuple[str, ...], *, two_planes: bool = False):
    """Registers `absorbed_forward_<backend>` and `absorbed_backward_<backend>`; returns both callables. `two_planes`:
    so is its lse with an attention_bias."""
    fake = _fake_forward_of_two_planes if two_planes else _fake_forward
    return common.register_pair(
        "absorbed", backend, schemas=(forward_schema(backend), backward_schema(backend)),
        implementations=(forward, backward), fakes=(fake, _fake_backward), devices=devices,
        differentiable=DIFFERENTIABLE,
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Call:
    """One validated call of the absorbed strategy, tensors as in `forward_schema`. `rows` is m, the rows of tables."""

    operation: str
    query: torch.Tensor
    encoded: torch.Tensor
    w_key: torch.Tensor
    w_value: torch.Tensor
    bias_key: torch.Tensor | None
    bias_value: torch.Tensor | None
    mask: torch.Tensor | None
    attention_bias: torch.Tensor | None
    relative_key: torch.Tensor | None
    content_bias: torch.Tensor | None
    relative_bias: torch.Tensor | None
    null_key: torch.Tensor | None
    null_value: torch.Tensor | None
    chunk_spans: torch.Tensor | None
    dropout_seed: torch.Tensor | None
    scale: float
    dropout_p: float
    rows: int
    stride: int
    first_token: int
    return_lse: bool
