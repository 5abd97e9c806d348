"""What the three attentions reduce to, and the private ops that every fused backend registers for it.

A *group* is the set of query rows and key slots that see each other. Tensors are

    query [b, lq, kq, n, h, d]    key, value [b, l, k, r, hk, d | d_value]    out [b, lq, kq, n, h, d_value]

and `grouping` says what a group is:

    CLOCK      lq = kq = 1. Group (b, u): tokens of the sequence n by the clock below, all k * r slots of chunk u of l.
               (chunked cross-attention)
    NEIGHBOUR  lq = l, kq = k, n = r. Group (b, u, j): the n rows and the r slots of one neighbour.
               (neighbour self-attention; with l = k = 1 and `causal` a decoder's self-attention)
    CHUNK      lq = l, k = 1. Group (b, u): the kq * n rows of all neighbours of chunk u, and the r slots of chunk u.
               (neighbour cross-attention: r is the paper's m)

*Clock.* Token j of the sequence has clock c = j - first_token. It attends when c >= 0, to chunk c // stride (counted in
`key`'s own chunk axis), as row c % stride. `first_token` may be negative (a slice of a longer sequence whose first
token is already inside a chunk). So chunk u is attended by the `stride` tokens from first_token + u * stride, those
outside [0, n) left out. Tokens with c < 0 output 0 with lse -inf; there are at most chunk_size - 1 of them. Chunks that
no token attends to are not read and get zero gradient. With `chunk_spans` (int32 [b, l, 2], packed documents) chunk u
of sequence b is instead attended by the chunk_spans[b, u, 1] <= stride tokens from chunk_spans[b, u, 0], as rows from
0 on; spans do not overlap and lie inside [0, n); tokens in no span output 0 with lse -inf. In the other groupings
stride = n and first_token = 0.

*Row* is the row in the chunk under CLOCK, and the index on the axis n otherwise; *slot* (neighbour-major) is j * r + t
for token t of neighbour j; M is the number of rows of the tables: m (>= stride) under CLOCK, n otherwise. The logit is

    scale * ((q + content_bias) . k + (q + relative_bias) . relative_key[row - t + r - 1]) + attention_bias[row, t]

(attention_bias[row, slot] where it is that wide) with q and k rotated by row and by t. The null slot's logit is
scale * q' . null_key, q' rotated or with content_bias. With logit_softcap c > 0 what is x without the bias becomes
c * tanh(x / c), the null slot's logit too; 0 stands for no cap.
`causal` (NEIGHBOUR only): row i sees t <= i; with `first_visible` (int32 [b, n], lq = kq = 1) only
first_visible[b, i] <= t, and rotary tables are read at i - first_visible[b, i] and t - first_visible[b, t]: positions
restart in every document. There is no attention_bias with `first_visible` (with `causal` alone there may be). A row
always sees itself unless it is masked.

*Log-sum-exp.* lse is a natural logarithm, fp32. Exactly -inf means, and is the only mark of, a row that saw nothing: no
slot, or -inf logits only. Such a row has output 0 and passes no gradient. A +inf logit gives lse +inf and output NaN, a
NaN logit both NaN; the gradients that depend on such a row are NaN. The backward recomputes a row's probabilities from
its lse, which the rounding of lse spoils by |lse| * 1e-7: that is what large logits cost (docs/numerics.md). An
`attention_bias` may be a mask of large finite numbers, and add -1e30 to a whole row, beside which the logarithm of the
sum is lost. So where there is one, a backend may return lse as two planes [2, b, lq, kq, n, h] (its `register` says so
with `two_planes`; the backward gets them as they were returned), in base 2:

    s = the logit * log2(e); a finite bias times log2(e) saturates at the largest finite number
    plane 0 = max(s)        plane 1 = log2(sum of 2^(s - max(s)))
    the backward's probability is 2^min((s - plane 0) - plane 1, 0), exact at any magnitude

Plane 0 is exactly -inf for a row that saw nothing, +inf and NaN where the lse is, with 0 in plane 1. `plain_lse` makes
the lse of both.

*Dropout.* See `dropout.py`: a slot of a row is kept or not by a function of the seed, b * h + head, the row's place in
query's axes (lq, kq, n), and the slot.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch

from .. import call as calls
from .. import memory
from ..call import Length, differentiable, optional, outside

CLOCK, NEIGHBOUR, CHUNK = 0, 1, 2

PARTIAL_COPIES = 32  # partial sums of parameter gradients: at most this many of each, on any device


@calls.described
@dataclasses.dataclass(kw_only=True, eq=False)
class Call(calls.Call):
    """One checked call in the form that this module's docstring fixes, which is also that of the private ops.

    mask bool [b, l, k, r], True = attend; attention_bias [h, M, r] or [h, M, k * r]; relative_key [h, M + r - 1, d];
    content_bias, relative_bias, null_key [h, d]; null_value [h, d_value]; cos and sin [M | r, rotary_dim / 2];
    dropout_seed int64 [1], given when dropout_p > 0. `rows` is M, the rows of tables.

    Results: out [b, lq, kq, n, h, d_value] in the query's dtype, lse [b, lq, kq, n, h] fp32 (natural logarithm, null
    slot included, before dropout), or with an attention_bias two planes of it (see above).
    """

    query: torch.Tensor = differentiable()
    key: torch.Tensor = differentiable()
    value: torch.Tensor = differentiable()
    mask: torch.Tensor | None = None
    attention_bias: torch.Tensor | None = optional("bias")
    relative_key: torch.Tensor | None = optional("relative")
    content_bias: torch.Tensor | None = optional("relative")
    relative_bias: torch.Tensor | None = optional("relative")
    query_cos: torch.Tensor | None = None
    query_sin: torch.Tensor | None = None
    key_cos: torch.Tensor | None = None
    key_sin: torch.Tensor | None = None
    null_key: torch.Tensor | None = optional("null")
    null_value: torch.Tensor | None = optional("null")
    chunk_spans: torch.Tensor | None = None
    first_visible: torch.Tensor | None = None
    dropout_seed: torch.Tensor | None = None
    grouping: int
    causal: bool = False
    rotary_interleaved: bool = False
    scale: float
    logit_softcap: float = 0.0
    dropout_p: float = 0.0
    stride: Length
    first_token: Length = 0
    rows: int = outside()
    operation: str = outside()
    return_lse: bool = outside()

    @property
    def query_rotary(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """cos and sin by row."""
        return None if self.query_cos is None or self.query_sin is None else (self.query_cos, self.query_sin)

    @property
    def key_rotary(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """cos and sin by slot."""
        return None if self.key_cos is None or self.key_sin is None else (self.key_cos, self.key_sin)


def allocate_forward(
    query: torch.Tensor, value: torch.Tensor, attention_bias: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """out and lse, uninitialised; with an `attention_bias` lse has two planes."""
    out = memory.allocate((*query.shape[:-1], value.shape[-1]), query.dtype, query.device)
    planes = () if attention_bias is None else (2,)
    return out, memory.allocate((*planes, *query.shape[:-1]), torch.float32, query.device)


def plain_lse(lse: torch.Tensor, axes: int = 5) -> torch.Tensor:
    """The natural log-sum-exp, of one plane, which has so many axes, or of two."""
    return lse if lse.dim() == axes else (lse[0] + lse[1]) * math.log(2)


def register(
    backend: str, attend: Callable, gradients: Callable, devices: tuple[str, ...], *, two_planes: bool = False
) -> tuple[Callable, Callable | None]:
    """Registers `attention_forward_<backend>` and `attention_backward_<backend>`; returns both callables. `two_planes`:
    so is its lse with an attention_bias."""

    def outputs(call: Call) -> tuple[torch.Tensor, torch.Tensor]:
        return allocate_forward(call.query, call.value, call.attention_bias if two_planes else None)

    return calls.register("attention", backend, Call, attend, gradients, devices=devices, outputs=outputs)


def attended_chunks(n: int, num_chunks: int, stride: int, first_token: int) -> tuple[int, int]:
    """[first, last) chunks that at least one of the n tokens attends to by the clock."""
    if n == 0 or n <= first_token:
        return 0, 0
    return max(0, -first_token // stride), min(num_chunks, (n - 1 - first_token) // stride + 1)


def turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """Turns the first 2 * width dimensions of x [..., d] by angles of [..., width]: dimension j pairs with j + width,
    or, interleaved, 2j with 2j + 1."""
    width = cos.shape[-1]
    turned, rest = x[..., : 2 * width], x[..., 2 * width :]
    if interleaved:
        first, second = turned[..., 0::2], turned[..., 1::2]
    else:
        first, second = turned[..., :width], turned[..., width:]
    pair = (first * cos - second * sin, second * cos + first * sin)
    turned = torch.stack(pair, dim=-1).flatten(-2) if interleaved else torch.cat(pair, dim=-1)
    return torch.cat([turned, rest], dim=-1)
