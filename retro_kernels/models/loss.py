"""Cross-entropy of a readout without all its logits in memory at a time."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

IGNORED = -100
LOGITS_AT_A_TIME = 1 << 24  # 64 MB in fp32


def linear_cross_entropy(
    activations: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    reduction: str = "mean",
) -> torch.Tensor:
    """cross_entropy(activations @ weight.T + bias, targets) in fp32 (fp64 for fp64), a slice of the tokens at a time;
    the backward pass makes each slice's logits again.

    torch 2.13 has a `linear_cross_entropy` of its own, whose form that saves memory cannot be compiled and gives no
    loss per token; torch 2.11, which is supported too, need not have it.

    Args:
        activations: [..., model_dim]. weight: [vocab_size, model_dim]. bias: [vocab_size], or None.
        targets: int64 [...], -100 where nothing counts. reduction: "mean" over those that count, "sum", or "none".

    Raises ValueError for another reduction.
    """
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction: got {reduction!r}, expected 'mean', 'sum' or 'none'")
    x, flat = activations.flatten(0, -2), targets.flatten()
    rows = max(1, LOGITS_AT_A_TIME // weight.shape[0])
    sliced = x.shape[0] > rows

    def entropy(x: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        logits = F.linear(x, weight, bias)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        return F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="none")

    if sliced and torch.is_grad_enabled():
        parts = [checkpoint(entropy, *part, use_reentrant=False) for part in zip(x.split(rows), flat.split(rows))]
    else:
        parts = [entropy(*part) for part in zip(x.split(rows), flat.split(rows))]
    losses = torch.cat(parts)
    if reduction == "none":
        return losses.view(targets.shape)
    return losses.sum() if reduction == "sum" else losses.sum() / (flat != IGNORED).sum()
