"""`join_attention`: two attentions over different keys, joined as if all keys had stood under one softmax."""

from __future__ import annotations

import torch

from . import checks
from .attention.reference import accumulation_dtype


def join_attention(
    out_a: torch.Tensor,
    lse_a: torch.Tensor,
    out_b: torch.Tensor,
    lse_b: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Two attentions of the same queries over different keys -> the attention over all these keys.

    Each softmax is known by its result and the log of its sum, and that is enough: with the shares

        w_a = exp(lse_a - lse),  w_b = exp(lse_b + bias - lse),  lse = log(exp(lse_a) + exp(lse_b + bias))

    the result is w_a * out_a + w_b * out_b. It is plain PyTorch, differentiable any number of times, gradients of both
    log-sum-exps included. Joining is associative, so that parts of any number join one after the other: the neighbours
    of a chunk, the blocks of ring attention, a text and what was retrieved for it.

    Args:
        out_a, out_b: [..., h, d_value], in one dtype.
        lse_a, lse_b: [..., h], natural logarithms, in fp32 (or out's dtype); -inf where an attention saw nothing. Its
            output there must be finite and is otherwise of no account.
        bias: [h], added to all logits of the second: how readily each head looks there. -inf leaves `out_a` as it is,
            to the bit, and has no gradient.

    Returns:
        out [..., h, d_value] in the dtype of `out_a` (0 where neither saw anything) and lse [..., h] in the dtype of
        accumulation (fp32, or fp64 for fp64; -inf there).

    Raises TypeError or ValueError for wrong dtypes, sizes and devices.
    """
    checks.tensor("out_a", out_a, checks.FLOATING)
    if out_a.dim() < 2:
        raise ValueError(f"out_a: got shape {list(out_a.shape)}, expected [..., h, d_value]")
    accumulated = accumulation_dtype(out_a.dtype)
    checks.tensor("out_b", out_b, (out_a.dtype,), out_a.device)
    checks.shape("out_b", out_b, "..., h, d_value", tuple(out_a.shape))
    for name, lse in (("lse_a", lse_a), ("lse_b", lse_b)):
        checks.tensor(name, lse, (accumulated, out_a.dtype), out_a.device)
        checks.shape(name, lse, "..., h", tuple(out_a.shape[:-1]))
    a, b = lse_a.to(accumulated), lse_b.to(accumulated)
    if bias is not None:
        checks.tensor("bias", bias, checks.FLOATING, out_a.device)
        checks.shape("bias", bias, "h", (out_a.shape[-2],))
        b = b + bias.to(accumulated)
    # The largest is subtracted only for the range of exp, so it needs no gradient; 0 serves where there is no key.
    largest = torch.maximum(a, b).detach()
    empty = largest == -torch.inf
    largest = largest.masked_fill(empty, 0.0)
    share_a, share_b = (a - largest).exp(), (b - largest).exp()
    total = (share_a + share_b).masked_fill(empty, 1.0)
    share_a, share_b = (share_a / total)[..., None], (share_b / total)[..., None]
    out = share_a * out_a.to(accumulated) + share_b * out_b.to(accumulated)
    return out.to(out_a.dtype), (total.log() + largest).masked_fill(empty, -torch.inf)
