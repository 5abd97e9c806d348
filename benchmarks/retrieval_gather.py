"""Measures how many chunks a second the store reads at random, from page cache.

    python -m benchmarks.retrieval_gather --out results.json

A store of 4 M chunks of 64 tokens (uint16, documents of 1,024 chunks) is written to a temporary folder and read once;
then 8,192 random chunks at a time are gathered, alone and with their continuations, with their masks. `rows_per_second`
is of the median round; a row of 128 tokens is two chunks. On a machine with a GPU the same is gathered into pinned
memory, and by the GPU from a store that was loaded onto it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from retro_kernels.bench import environment, results
from retro_kernels.retrieval import Database, ShardWriter, finish_database

CHUNK, DOCUMENT = 64, 1024
ROWS, ROUNDS = 8192, 200


def store(folder: Path, chunks: int) -> Database:
    writer = ShardWriter(folder, 0, chunk_size=CHUNK)
    random = np.random.default_rng(0)
    for _ in range(chunks // DOCUMENT):
        writer.add(random.integers(0, 30522, CHUNK * DOCUMENT), np.arange(DOCUMENT), path="random")
    writer.commit()
    return finish_database(folder, 1, chunk_size=CHUNK, tokenizer={"name": "random"})


def measure(database: Database, length: int, pinned: bool) -> dict[str, Any]:
    """-> the row of gathering `length` tokens from every chunk."""
    device = database.device
    generator = torch.Generator().manual_seed(1)
    drawn = [torch.randint(len(database), (ROWS,), generator=generator).to(device) for _ in range(ROUNDS)]
    out = None
    if pinned:
        tokens = torch.empty(ROWS, length, dtype=torch.int32, pin_memory=True)
        out = tokens, torch.empty(ROWS, length, dtype=torch.bool, pin_memory=True)
    # Every page that will be read has been read before.
    database.chunks(torch.arange(len(database)), 1)
    times = []
    for ids in drawn:
        if device.type == "cuda":
            torch.cuda.synchronize()
        begun = time.perf_counter()
        database.chunks(ids, length, out=out)
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begun)
    seconds = statistics.median(times)
    return {
        "store": device.type,
        "pinned": pinned,
        "chunks": len(database),
        "length": length,
        "rows": ROWS,
        "seconds": seconds,
        "quantiles": statistics.quantiles(times, n=5),
        "rows_per_second": ROWS / seconds,
        "chunks_per_second": ROWS * (length // CHUNK) / seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chunks", type=int, default=4 << 20)
    parser.add_argument("--out", type=Path, help="write the rows to this file; otherwise they are printed")
    asked = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kinds = [("cpu", False)]
    kinds += [("cpu", True), ("cuda", False)] if device.type == "cuda" else []
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        store(Path(folder) / "db", asked.chunks)
        for where, pinned in kinds:
            database = Database(Path(folder) / "db").to(where)
            rows += [measure(database, length, pinned) for length in (CHUNK, 2 * CHUNK)]
    document = {"environment": environment.collect(device), "threads": torch.get_num_threads(), "rows": rows}
    if asked.out is None:
        print(json.dumps(rows, indent=1))
    else:
        results.save(document, asked.out)


if __name__ == "__main__":
    main()
