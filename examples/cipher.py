"""A proof that retrieval works: text enciphered with a key that only the retrieved neighbours have.

Every chunk is enciphered with a key of as many random letters (a one-time pad on a plain text of one letter), and the
key is in one of the neighbours of the chunk before, marked, at a random place among them; the others are noise. Who
reads the key knows every letter; for everybody else each letter is uniform, so that no model can do better than chance.

    python examples/cipher.py       a minute or two; prints the loss with retrieval, without, and chance
"""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import dataclass

import torch

from retro_kernels.models import Retro, RetroConfig

NOTHING = -100


@dataclass(frozen=True)
class Cipher:
    """`letters` letters and one more token, which marks the key; the sizes are those of the model."""

    letters: int
    chunk_size: int
    num_chunks: int
    num_neighbours: int

    @property
    def config(self) -> RetroConfig:
        return RetroConfig(
            vocab_size=self.letters + 1,
            model_dim=64,
            num_layers=2,
            num_heads=4,
            cross_attention_layers=(1, 2),
            chunk_size=self.chunk_size,
            num_neighbours=self.num_neighbours,
            retrieved_length=self.chunk_size + 1,
            encoder_dim=64,
            encoder_layers=1,
            encoder_heads=4,
            encoder_head_dim=16,
            max_length=self.chunk_size * self.num_chunks,
        )

    def batch(self, size: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """-> tokens [b, n], targets [b, n] (the enciphered letters only) and neighbours [b, l, k, m + 1]."""
        m, l, k = self.chunk_size, self.num_chunks, self.num_neighbours

        def random(*shape: int, high: int = self.letters) -> torch.Tensor:
            return torch.randint(high, shape, generator=generator)

        neighbours, key = random(size, l, k, m + 1), random(size, l, m)
        place = random(size, l, 1, high=k)[..., None].expand(-1, -1, 1, m + 1)
        mark = torch.full((size, l, 1), self.letters)
        neighbours.scatter_(2, place, torch.cat([mark, key], -1)[:, :, None])
        # The key of chunk u enciphers chunk u + 1, whose letters are those that its attending tokens predict.
        pad = torch.cat([random(size, m), key[:, :-1].flatten(1)], 1)
        tokens = self.letters - 1 - pad
        targets = torch.full_like(tokens, NOTHING)
        targets[:, m - 1 : -1] = tokens[:, m:]
        return tokens, targets, neighbours


def train(
    cipher: Cipher, steps: int, batch_size: int, learning_rate: float, *, retrieval: bool, report: int = 0
) -> Retro:
    """A model trained on the cipher from seed 0, with or without its neighbours."""
    torch.manual_seed(0)
    model = Retro(cipher.config)
    generator = torch.Generator().manual_seed(1)
    optimiser = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    start = time.perf_counter()
    for step in range(1, steps + 1):
        for group in optimiser.param_groups:
            group["lr"] = learning_rate * min(1.0, step / 20, 2 * (1 - (step - 1) / steps))
        tokens, targets, neighbours = cipher.batch(batch_size, generator)
        loss = model.loss(tokens, targets, neighbours if retrieval else None)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if report and step % report == 0:
            print(f"step {step:5d}  loss {loss.item():.4f}  {time.perf_counter() - start:.0f} s", flush=True)
    return model.eval()


@torch.no_grad()
def evaluate(cipher: Cipher, model: Retro, size: int = 64) -> dict[str, float]:
    """The loss in nats on fresh text: with the neighbours, without, and with those of another text."""
    tokens, targets, neighbours = cipher.batch(size, torch.Generator().manual_seed(2))
    return {
        name: float(model.loss(tokens, targets, given))
        for name, given in (("retrieval", neighbours), ("none", None), ("of another text", neighbours.roll(1, 0)))
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--letters", type=int, default=26)
    parser.add_argument("--chunk-size", type=int, default=16)
    parser.add_argument("--chunks", type=int, default=8)
    parser.add_argument("--neighbours", type=int, default=2)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    given = parser.parse_args()
    cipher = Cipher(given.letters, given.chunk_size, given.chunks, given.neighbours)
    print(f"chance: {math.log(cipher.letters):.4f} nats a letter")
    for retrieval in (True, False):
        print(f"trained {'with' if retrieval else 'without'} retrieval")
        model = train(cipher, given.steps, given.batch, given.learning_rate, retrieval=retrieval, report=100)
        for name, loss in evaluate(cipher, model).items():
            print(f"  {name}: {loss:.4f} nats a letter")


if __name__ == "__main__":
    main()
