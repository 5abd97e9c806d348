"""What the tests of the model share."""

from __future__ import annotations

import torch

from retro_kernels.models import Neighbours, Retro, RetroConfig


def tiny(preset: str = "tiny", *, spread: float = 0.1, dtype: torch.dtype = torch.float32, **changes) -> Retro:
    """A model whose every parameter, gates and u and v included, was moved away from where it starts."""
    backend = changes.pop("backend", None)
    model = Retro(RetroConfig.preset(preset, **changes), backend=backend, dtype=dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(spread * torch.randn(parameter.shape).to(dtype))
    return model


def batch(model: Retro, b: int = 2, n: int = 22, k: int = 2, r: int = 8):
    """Random tokens, neighbours and a mask with some tokens missing."""
    size = (b, n // model.config.chunk_size, k, r)
    tokens, neighbours = (torch.randint(model.config.vocab_size, s) for s in ((b, n), size))
    return tokens, neighbours, torch.rand(size) > 0.3


class Lookup:
    """A retriever whose neighbours are a fixed function of the chunk's tokens, and which counts its calls."""

    def __init__(self, vocab_size: int = 64, k: int = 2, r: int = 8) -> None:
        self.vocab_size, self.k, self.r = vocab_size, k, r
        self.calls: list[torch.Tensor] = []

    def __call__(self, chunks: torch.Tensor) -> Neighbours:
        self.calls.append(chunks)
        return self.of(chunks)

    def of(self, chunks: torch.Tensor) -> Neighbours:
        weight = torch.arange(1, chunks.shape[1] + 1)
        start = (chunks * weight).sum(-1)[:, None, None]
        tokens = (start * 7 + 3 * torch.arange(self.r) + 11 * torch.arange(self.k)[:, None]) % self.vocab_size
        return Neighbours(tokens, tokens % 5 != 0, [f"passage {int(x)}" for x in start])
