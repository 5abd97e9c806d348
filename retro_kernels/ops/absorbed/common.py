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
from collections.abc import Callable

import torch

from .. import call as calls
from .. import memory
from ..call import Length, differentiable, optional, outside

PARTIAL_COPIES = 4  # of the weights' gradients; they are large: 29 MB in fp32 at 32 heads of 128 and e = 896


@calls.described
@dataclasses.dataclass(kw_only=True, eq=False)
class Call(calls.Call):
    """One checked call of the absorbed strategy, which is also the form of the private ops.

    query [b, n, h, d], encoded [b, l, k, r, e], w_key [hk, d, e], w_value [hk, d_value, e], bias_key [hk, d],
    bias_value [hk, d_value], mask bool [b, l, k, r], attention_bias [h, m, r | k * r], relative_key [h, m + r - 1, d],
    content_bias, relative_bias, null_key [h, d], null_value [h, d_value], chunk_spans int32 [b, l, 2],
    dropout_seed int64 [1]. `rows` is m, the rows of tables.

    Results: out [b, n, h, d_value] in the query's dtype, lse [b, n, h] fp32, or with an attention_bias [2, b, n, h],
    two planes of it (`ops/attention/common.py`).
    """

    query: torch.Tensor = differentiable()
    encoded: torch.Tensor = differentiable("encoded")
    w_key: torch.Tensor = differentiable("weight")
    w_value: torch.Tensor = differentiable("weight")
    bias_key: torch.Tensor | None = optional("weight")
    bias_value: torch.Tensor | None = optional("weight")
    mask: torch.Tensor | None = None
    attention_bias: torch.Tensor | None = optional("bias")
    relative_key: torch.Tensor | None = optional("relative")
    content_bias: torch.Tensor | None = optional("relative")
    relative_bias: torch.Tensor | None = optional("relative")
    null_key: torch.Tensor | None = optional("null")
    null_value: torch.Tensor | None = optional("null")
    chunk_spans: torch.Tensor | None = None
    dropout_seed: torch.Tensor | None = None
    scale: float
    dropout_p: float = 0.0
    stride: Length
    first_token: Length
    rows: int = outside()
    operation: str = outside()
    return_lse: bool = outside()


def allocate_forward(
    query: torch.Tensor, w_value: torch.Tensor, attention_bias: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """out and lse, uninitialised; with an `attention_bias` lse has two planes."""
    b, n, h, _ = query.shape
    out = memory.allocate((b, n, h, w_value.shape[1]), query.dtype, query.device)
    planes = () if attention_bias is None else (2,)
    return out, memory.allocate((*planes, b, n, h), torch.float32, query.device)


def register(
    backend: str, attend: Callable, gradients: Callable, devices: tuple[str, ...], *, two_planes: bool = False
) -> tuple[Callable, Callable | None]:
    """Registers `absorbed_forward_<backend>` and `absorbed_backward_<backend>`; returns both callables. `two_planes`:
    so is its lse with an attention_bias."""

    def outputs(call: Call) -> tuple[torch.Tensor, torch.Tensor]:
        return allocate_forward(call.query, call.w_value, call.attention_bias if two_planes else None)

    return calls.register("absorbed", backend, Call, attend, gradients, devices=devices, outputs=outputs)
