"""Neighbours that hold the answer, until a model copies from them: without, one that begins with fresh weights has
little reason to look at its neighbours, which on most texts say little, and never learns to."""

from __future__ import annotations

import numpy as np
import torch

from .data import Batch
from .loss import IGNORED

ENOUGH = 1 / 3
"""The model copies when its loss on oracle rows is under so much of that on the same rows without neighbours."""
FLOOR = 0.1
"""The share of oracle rows that stays, so that what was learned is kept."""
CHECKED_EVERY = 10
"""Updates from one comparison with the loss without neighbours to the next."""


class Curriculum:
    """Which rows of a run are oracle rows: all, until the model copies; then fewer from update to update, over as many
    updates as that took, down to FLOOR.

    In an oracle row each chunk's first neighbour is the text itself, as long as a retrieved neighbour is and within the
    row and its document: of half the chunks from the chunk's beginning on, as a perfect match of the database has it;
    of the others from a random token of it on, so that what follows has to be found by what it says, not by its place.

    Attributes:
        copied_at: updates after which the model copied, None: not yet. All that a resumed run needs.
    """

    def __init__(self, chunk_size: int, seed: int) -> None:
        self.chunk_size, self.seed = chunk_size, seed
        self.copied_at: int | None = None

    def share(self, step: int) -> float:
        """Of oracle rows in the update of this number, from 0."""
        if self.copied_at is None:
            return 1.0
        return max(FLOOR, 1 - (1 - FLOOR) * (step - self.copied_at) / self.copied_at)

    def due(self, step: int) -> bool:
        """Whether the loss without neighbours is to be measured in this update."""
        return self.copied_at is None and step % CHECKED_EVERY == CHECKED_EVERY - 1

    def judge(self, step: int, oracle: float, without: float) -> None:
        """After the update of this number, with the two losses on its oracle rows."""
        if oracle < ENOUGH * without:
            self.copied_at = step + 1

    def put(self, batch: Batch, place: int, step: int) -> tuple[Batch, torch.Tensor]:
        """The batch with oracle neighbours, of which the first row is the run's number `place` -> and which rows have
        them, bool [b]."""
        assert batch.neighbours is not None
        assert batch.neighbour_mask is not None
        m, (b, chunks, _, r) = self.chunk_size, batch.neighbours.shape
        n, device = batch.tokens.shape[1], batch.tokens.device
        chosen, begins = np.zeros(b, bool), np.zeros((b, chunks), np.int64)
        for i in range(b):
            random = np.random.default_rng([self.seed, place + i])
            chosen[i] = random.random() < self.share(step)
            begins[i] = np.where(random.random(chunks) < 0.5, 0, random.integers(m, size=chunks))
        begins += m * np.arange(chunks)
        index = torch.from_numpy(begins)[..., None].to(device) + torch.arange(r, device=device)
        there = index < n
        flat = index.clamp(max=n - 1).flatten(1)
        if batch.sequence_starts is not None:
            document = batch.sequence_starts.cumsum(1)
            there &= (document.gather(1, flat) == document[:, ::m][:, :chunks].repeat_interleave(r, 1)).view_as(there)
        rows = torch.from_numpy(chosen).to(device)
        neighbours, mask = batch.neighbours.clone(), batch.neighbour_mask.clone()
        tokens = batch.tokens.gather(1, flat).view_as(index)
        neighbours[:, :, 0] = torch.where(rows[:, None, None], tokens, neighbours[:, :, 0])
        mask[:, :, 0] = torch.where(rows[:, None, None], there, mask[:, :, 0])
        return batch._replace(neighbours=neighbours, neighbour_mask=mask), rows


def may_see(batch: Batch, chunk_size: int) -> torch.Tensor:
    """Which tokens have a target and a chunk whose neighbours they may see: bool [b, n]."""
    place = torch.arange(batch.tokens.shape[1], device=batch.tokens.device).expand_as(batch.tokens)
    if batch.sequence_starts is not None:
        place = place - torch.where(batch.sequence_starts, place, 0).cummax(1).values
    return (place >= chunk_size - 1) & (batch.targets != IGNORED)
