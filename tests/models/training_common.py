"""A small stream of tokens whose neighbours hold what comes next, and the settings of a short run."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from retro_kernels.models import RetroConfig
from retro_kernels.models.data import TokenStream
from retro_kernels.models.training_config import TrainingConfig

ROWS, N, M = 6, 16, 4
# Where a gradient is rounding only, Adam would move a weight by its sign: an epsilon above the rounding makes updates
# that can be compared.
COMPARABLE = {"epsilon": 1e-3, "evaluation_rows": 2}


def stream_of(folder: Path, *, write: bool = True, dropout: float = 0.0, seed: int = 0) -> TokenStream:
    config = RetroConfig.preset("tiny", max_length=N, tokenizer="letters", dropout=dropout)
    if write:
        folder.mkdir(parents=True, exist_ok=True)
        random = np.random.default_rng(seed)
        tokens = random.integers(64, size=ROWS * N + 3, dtype=np.uint16)
        neighbours = random.integers(64, size=(ROWS * N // M, 2, 8), dtype=np.int32)
        neighbours[:, 1, 5:] = -1
        for u in range(len(neighbours) - 1):
            neighbours[u, 0, :M] = tokens[(u + 1) * M : (u + 2) * M]
        np.save(folder / "tokens.npy", tokens)
        np.save(folder / "neighbours.npy", neighbours)
        facts = {"tokenizer": "letters", "chunk_size": M, "bytes": 3 * len(tokens)}
        (folder / "data.json").write_text(json.dumps(facts))
    return TokenStream(folder, config)


def settings(output: Path, **changes) -> TrainingConfig:
    given = {
        "steps": 6,
        "batch_size": 4,
        "learning_rate": 1e-2,
        "warmup_steps": 2,
        "save_every": 2,
        "log_every": 1,
        "keep": 9,
        **changes,
    }
    return TrainingConfig(output=str(output), **given)
