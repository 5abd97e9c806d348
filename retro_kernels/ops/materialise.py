"""The materialised strategy: keys and values are made by a matrix product and attended to in place.

The products are PyTorch's: on a CPU their bits may depend on the number of threads, and what follows with them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from . import call
from .chunked_cross_attention import chunked_cross_attention


def _products(
    encoded: torch.Tensor, bias: torch.Tensor | None, weights: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, ...]:
    flat = [weight.flatten(0, 1) for weight in weights]
    sizes = [weight.shape[0] for weight in flat]
    if encoded.is_cuda and len(flat) > 1:
        parts = F.linear(encoded, torch.cat(flat), bias).split(sizes, dim=-1)
    else:  # a CPU gains nothing by one product, and to lay wide weights side by side costs up to half of it
        biases = [None] * len(flat) if bias is None else bias.split(sizes)
        parts = [F.linear(encoded, weight, part) for weight, part in zip(flat, biases)]
    return tuple(part.unflatten(-1, weight.shape[:2]) for part, weight in zip(parts, weights))


class _Products:
    """The rule (`call.py`) of `project`. It keeps nothing but its arguments.

    A masked token's key and value are never read and their gradients are exactly 0, so the forward may compute them
    from whatever the token holds; 0 times NaN would reach a weight's gradient only, whose product is therefore taken
    with a copy of the states in which masked tokens are 0. The copy lives in the backward alone.
    """

    keeps_results = False
    direct = False

    @staticmethod
    def forward(encoded, mask, bias, *weights):
        return _products(encoded, bias, weights)

    @staticmethod
    def backward(saved, grads, needed):
        encoded, mask, bias, *weights = saved
        encoded_wanted, _, bias_wanted, *weights_wanted = needed
        flat = [grad.reshape(-1, grad.shape[-2] * grad.shape[-1]) for grad in grads]
        grad_encoded = grad_bias = None
        grad_weights: list[torch.Tensor | None] = [None] * len(weights)
        if encoded_wanted:
            grad_encoded = flat[0] @ weights[0].flatten(0, 1)
            for grad, weight in zip(flat[1:], weights[1:]):
                grad_encoded = torch.addmm(grad_encoded, grad, weight.flatten(0, 1))
            grad_encoded = grad_encoded.view(encoded.shape)
        if any(weights_wanted):
            states = encoded if mask is None else encoded.masked_fill(~mask[..., None], 0.0)
            states = states.reshape(-1, encoded.shape[-1])
            grad_weights = [
                (grad.t() @ states).view(weight.shape) if wanted else None
                for grad, weight, wanted in zip(flat, weights, weights_wanted)
            ]
        if bias is not None and bias_wanted:
            grad_bias = torch.cat([grad.sum(0) for grad in flat])
        return grad_encoded, None, grad_bias, *grad_weights


def project(
    encoded: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor | None],
    mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, ...]:
    """`encoded` [..., e] through every weight [hk, d, e] (+ bias [hk, d]) -> [..., hk, d] each; on a GPU in one matrix
    product, side by side in memory. `mask` [...], True = attend: what the others hold, NaN included, reaches no
    gradient, provided that the gradients of their keys and values are 0."""
    bias = None
    if any(x is not None for x in biases):
        bias = torch.cat(
            [
                weight.new_zeros(weight.shape[:2]).flatten() if x is None else x.to(weight.dtype).flatten()
                for weight, x in zip(weights, biases)
            ]
        )
    return call.record(_PRODUCTS, (encoded, mask, bias, *weights))


_PRODUCTS = _Products()


def attend(
    query: torch.Tensor,
    encoded: torch.Tensor,
    weights: tuple[torch.Tensor, torch.Tensor],
    biases: tuple[torch.Tensor | None, torch.Tensor | None],
    *,
    used: torch.Tensor | None = None,
    return_lse: bool,
    **options,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """-> out and, with `return_lse`, lse of `chunked_cross_attention` on the projected states. `used`: bool [b, l, k,
    r], the tokens that some query sees; None: those of the `neighbour_mask`, or all."""
    key, value = project(encoded, weights, biases, options.get("neighbour_mask") if used is None else used)
    found = chunked_cross_attention(query, key, value, return_lse=return_lse, **options)
    return found if isinstance(found, tuple) else (found, None)
