"""Recall and speed of indexes over the real embeddings of a database, against exact search and FAISS's own exact index.

    python -m benchmarks.retrieval_search DB --out results.json [--index IVF1024,SQ8 ...]

Every index is built in a copy of the database that links the shards; its settings are swept by
`retrieval.index.evaluation`, with 1,000 of the database's own chunks as queries, each without itself. Exact search is
timed beside FAISS's IndexFlatL2 in the same rounds.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from retro_kernels.bench import environment, results
from retro_kernels.retrieval import Database, open_index, replace_index
from retro_kernels.retrieval.index.evaluation import evaluate_search
from retro_kernels.retrieval.index.index import import_faiss

INDEXES = ("IVF{lists},SQ8", "IVF{lists},RaBitQ", "OPQ48,IVF{lists},PQ48")
BATCHES, KS, ROUNDS = (1, 64, 1024), (2, 64), 5


def exact_rows(database: Database) -> list[dict[str, Any]]:
    """Queries a second of exact search, ours and FAISS's, in alternating rounds; the fastest round counts."""
    ours = open_index(database)
    flat = import_faiss().IndexFlatL2(database.dim)
    for _, block in database.embeddings():
        flat.add(np.asarray(block, np.float32))
    rows = []
    for batch in BATCHES:
        queries = ours.keys[torch.arange(0, len(database), max(1, len(database) // batch))[:batch]]
        for k in KS:
            searches = {
                "ours": functools.partial(ours.search, queries, k),
                "faiss": functools.partial(flat.search, queries.numpy(), k),
            }
            best = dict.fromkeys(searches, float("inf"))
            for _ in range(ROUNDS):
                for name, search in searches.items():
                    begun = time.perf_counter()
                    search()
                    best[name] = min(best[name], time.perf_counter() - begun)
            rows.append({"batch": batch, "k": k, **{f"{name}_ms": 1e3 * seconds for name, seconds in best.items()}})
    return rows


def index_row(folder: Path, spec: str) -> dict[str, Any]:
    begun = time.perf_counter()
    database = replace_index(folder, spec)
    seconds = time.perf_counter() - begun
    entry = database.manifest["index"]
    return {
        "spec": entry["spec"],
        "asked": spec,
        "why": entry["why"],
        "build_seconds": seconds,
        "bytes": sum(file["bytes"] for file in entry["files"]),
        **dataclasses.asdict(evaluate_search(database)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("database", type=Path, help="a database with embeddings of real text")
    parser.add_argument("--index", action="append", help="a FAISS factory string; may be repeated")
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=asked.database.parent) as temporary:
        folder = Path(temporary) / "db"
        # The shards are linked: nothing is written in them, and the index lies beside.
        shutil.copytree(asked.database, folder, copy_function=lambda a, b: Path(b).hardlink_to(a))
        database = replace_index(folder, "exact")
        most = len(database) // 39
        specs = asked.index or [name.format(lists=1 << (most.bit_length() - 1)) for name in INDEXES]
        document = {
            "database": asked.database.name,
            "chunks": len(database),
            "dim": database.dim,
            "embedder": database.manifest["embedder"],
            "threads": torch.get_num_threads(),
            "exact": exact_rows(database),
            "rows": [index_row(folder, spec) for spec in specs],
        }
    document["environment"] = environment.collect(torch.device("cpu"))
    results.save(document, asked.out)
    print(json.dumps({row["spec"]: row["recommended"] for row in document["rows"]}, indent=1))


if __name__ == "__main__":
    main()
