"""One small call of every fused operation, with all the options that go together."""

from __future__ import annotations

import torch

import retro_kernels as rk

B, N, M, L, K, R, H, HK, D, E = 2, 13, 4, 3, 2, 5, 4, 2, 8, 12


def draw(*shape):
    return torch.randn(*shape)


def tables(rows, slots):
    return {
        "attention_bias": draw(H, rows, slots),
        "relative_key": draw(H, rows + slots - 1, D),
        "content_bias": draw(H, D),
        "relative_bias": draw(H, D),
    }


def null():
    return {"null_key": draw(H, D), "null_value": draw(H, D)}


def operation(name):
    """-> the call, its differentiable tensors by name, which of them have a batch axis, and the other arguments."""
    if name == "cca":
        tensors = {"query": draw(B, N, H, D), "key": draw(B, L, K, R, HK, D), "value": draw(B, L, K, R, HK, D)}
        return (
            rk.chunked_cross_attention,
            tensors | tables(M, R) | null(),
            {"chunk_size": M, "neighbour_mask": torch.rand(B, L, K, R) > 0.3},
        )
    if name in ("materialise", "absorb"):
        tensors = {"query": draw(B, N, H, D), "encoded": draw(B, L, K, R, E)}
        weights = {
            "w_key": draw(HK, D, E),
            "w_value": draw(HK, D, E),
            "bias_key": draw(HK, D),
            "bias_value": draw(HK, D),
        }
        return (
            rk.projected_chunked_cross_attention,
            tensors | weights | tables(M, R) | null(),
            {"chunk_size": M, "strategy": name, "neighbour_mask": torch.rand(B, L, K, R) > 0.3},
        )
    if name == "self":
        tensors = {x: draw(B, L, K, R, h, D) for x, h in (("query", H), ("key", HK), ("value", HK))}
        return rk.neighbour_self_attention, tensors | tables(R, R), {}
    if name == "packed":
        starts = torch.zeros(B, R, dtype=torch.bool)
        starts[:, 3] = True
        tensors = {x: draw(B, 1, 1, R, h, D) for x, h in (("query", H), ("key", HK), ("value", HK))}
        return rk.neighbour_self_attention, tensors, {"causal": True, "sequence_starts": starts}
    tensors = {"query": draw(B, L, K, R, H, D), "key": draw(B, L, M, HK, D), "value": draw(B, L, M, HK, D)}
    return rk.neighbour_cross_attention, tensors | tables(R, M), {"activation_mask": torch.rand(B, L, M) > 0.3}


OPERATIONS = ("cca", "materialise", "absorb", "self", "packed", "cross")
