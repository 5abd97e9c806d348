"""Which attention probabilities dropout keeps: a counter-based random function, the same in every backend.

The generator is Philox4x32 with 7 rounds, the fewest that pass BigCrush (Salmon et al. 2011, "Parallel random numbers:
as easy as 1, 2, 3"). One evaluation serves 8 neighbouring slots of a row, 16 bits each:

    key      (seed & 0xffffffff, seed >> 32)            `dropout_seed`, one int64 drawn from torch's generator
    counter  (slot // 8, place, b * h + head, 0)        place: the row's index in query's axes (lq, kq, n)
    lot      bits of word (slot % 8) // 2 of the four that come out: the low half for an even slot, the high half else

The null slot's counter begins with 0xffffffff and its lot is the low half of word 0. A slot is kept when its lot is at
least `threshold(p)`; what is kept is scaled by `1 / (1 - threshold(p) / 65536)`. So p is rounded to a multiple of
2^-16, and nothing depends on how a backend cuts the work up.
"""

from __future__ import annotations

import torch

ROUNDS = 7
NULL_COUNTER = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = 0xFFFFFFFF
_stream = 0


def threshold(p: float) -> int:
    """Of 65536 equally likely lots, those below are dropped."""
    return min(round(p * 65536), 65535)


def survivor_scale(p: float) -> float:
    return 1.0 / (1.0 - threshold(p) / 65536)


def draw_seed(device: torch.device) -> torch.Tensor:
    """int64 [1] from torch's generator of that device: reproducible by manual_seed, replayed by checkpointing, and
    drawn without synchronising."""
    drawn = torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64, device=device)
    return drawn ^ _stream if _stream else drawn


def set_stream(number: int) -> None:
    """Gives this process its own seeds (0: those drawn), although its torch generator goes the same way as others'.
    So must processes do that hold different heads of the same activations, whose other dropout has to agree."""
    global _stream
    _stream = number * 0x9E3779B97F4A7C15 & (2**63 - 1)


def philox(seed: torch.Tensor, counter: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Philox4x32-7 of four int64 tensors of 32-bit words that broadcast -> four such tensors."""

    def high(multiplier: int, x: torch.Tensor) -> torch.Tensor:
        # bits 32 to 63 of a product of 32-bit words, which int64 cannot hold whole
        return (multiplier * (x >> 16) + (multiplier * (x & 0xFFFF) >> 16)) >> 16

    c0, c1, c2, c3 = (word & _LOW for word in counter)
    key = [seed & _LOW, (seed >> 32) & _LOW]
    for _ in range(ROUNDS):
        c0, c1, c2, c3 = (
            high(_MULTIPLIERS[1], c2) ^ c1 ^ key[0],
            (c2 * _MULTIPLIERS[1]) & _LOW,
            high(_MULTIPLIERS[0], c0) ^ c3 ^ key[1],
            (c0 * _MULTIPLIERS[0]) & _LOW,
        )
        key = [(word + weyl) & _LOW for word, weyl in zip(key, _WEYL)]
    return c0, c1, c2, c3


def survivors(seed: torch.Tensor, p: float, head: torch.Tensor, place: torch.Tensor, slots: int) -> torch.Tensor:
    """bool [*rows, 1 + slots], the null slot first, for rows whose b * h + head and place are the (broadcasting)
    tensors given."""
    device = seed.device
    head, place = (x[..., None].to(torch.int64) for x in torch.broadcast_tensors(head, place))
    zero = torch.zeros((), dtype=torch.int64, device=device)
    null = philox(seed, (zero + NULL_COUNTER, place, head, zero))[0] & 0xFFFF
    words = philox(seed, (torch.arange(-(-slots // 8), device=device), place, head, zero))
    lots = torch.stack([half for word in words for half in (word & 0xFFFF, word >> 16)], dim=-1)
    return torch.cat([null, lots.flatten(-2)[..., :slots]], dim=-1) >= threshold(p)
