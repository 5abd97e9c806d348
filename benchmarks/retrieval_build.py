"""Measures building a retrieval database: its speed as a share of the embedder's own, and its memory.

    python -m benchmarks.retrieval_build python3.11-doc/html/_sources --every 5 --out results.json
    python -m benchmarks.retrieval_build python3.11-doc/html/_sources --given --copies 20 --out results.json

The first builds the database of every 5th file, then gives the same texts to the embedder alone, in the same process
and in the same windows. The second builds with embeddings that are there already, from 20 copies of the files, none of
which is left out as a duplicate: what is left is the rest of the pipeline. Each appends a row to the results. Peak
memory is the process's own, torch and model included, right after the build.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from retro_kernels import retrieval
from retro_kernels.bench import environment, results
from retro_kernels.retrieval.corpus.readers import find
from retro_kernels.retrieval.embedders import DEFAULT_EMBEDDER


class Timed:
    """An embedder that remembers what it was given and how long that took."""

    def __init__(self, inner: retrieval.Embedder) -> None:
        self.inner, self.identity, self.dim = inner, inner.identity, inner.dim
        self.windows: list[list[str]] = []
        self.seconds = 0.0

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        begun = time.perf_counter()
        found = self.inner(texts)
        self.seconds += time.perf_counter() - begun
        self.windows.append(list(texts))
        return found


class StoredEmbeddings:
    """Embeddings that are there already: the same rows again and again, as long as there are chunks."""

    dim = 384

    def __init__(self) -> None:
        self.identity = {"name": "given", "kind": "benchmark", "sha256": "0"}
        self._rows = np.random.default_rng(0).standard_normal((1 << 14, self.dim), np.float32)

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        return np.resize(self._rows, (len(texts), self.dim))


def measure(corpus: Path, every: int, copies: int, given: bool, index: str | None, device: str) -> dict[str, Any]:
    """-> the row of one build."""
    files = [piece.path for piece in find([corpus])[0]][::every]
    embedder = Timed(StoredEmbeddings() if given else retrieval.load_embedder(DEFAULT_EMBEDDER, device=device))
    stages: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        files += [
            _copy(path, Path(folder) / f"copy {number}" / str(at))
            for number in range(1, copies)
            for at, path in enumerate(files)
        ]
        begun = time.perf_counter()

        def note(at: retrieval.Progress) -> None:
            stages[at.stage] = time.perf_counter() - begun

        database = retrieval.build_database(
            files,
            Path(folder) / "db",
            tokenizer=DEFAULT_EMBEDDER,
            embedder=embedder,
            index=index,
            progress=note,
            keep_duplicates=copies > 1,
        )
        seconds = time.perf_counter() - begun
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        chunks, documents = len(database), database.num_documents
        size = sum(os.path.getsize(path) for path in files)
        stored = sum(path.stat().st_size for path in (Path(folder) / "db").rglob("*") if path.is_file())
    row: dict[str, Any] = {
        "embedder": embedder.identity,
        "index": index,
        "files": len(files),
        "text_bytes": size,
        "documents": documents,
        "chunks": chunks,
        "seconds": seconds,
        "until": stages,
        "seconds_in_embedder": embedder.seconds,
        "chunks_per_second": chunks / seconds,
        "megabytes_per_minute": 60e-6 * size / seconds,
        "peak_bytes": peak,
        "database_bytes": stored,
    }
    if not given:
        begun = time.perf_counter()
        for window in embedder.windows:
            embedder.inner(window)
        alone = time.perf_counter() - begun
        row |= {"seconds_embedder_alone": alone, "share_of_embedder": alone / seconds}
    return row


def _copy(path: str, copy: Path) -> str:
    copy.parent.mkdir(exist_ok=True)
    return shutil.copyfile(path, copy.with_suffix(Path(path).suffix)).as_posix()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path, help="a folder, as for `db build`")
    parser.add_argument("--every", type=int, default=1, help="take every Nth file only")
    parser.add_argument("--copies", type=int, default=1, help="take the files so many times")
    parser.add_argument("--given", action="store_true", help="embeddings are given: time the rest of the pipeline")
    parser.add_argument("--index", default="none", help="as for `db build`")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, help="append the row to this file; otherwise it is printed")
    asked = parser.parse_args()
    index = None if asked.index == "none" else asked.index
    row = measure(asked.corpus, asked.every, asked.copies, asked.given, index, asked.device)
    row |= {
        "corpus": asked.corpus.name,
        "every": asked.every,
        "copies": asked.copies,
        "threads": torch.get_num_threads(),
    }
    if asked.out is None:
        print(json.dumps(row, indent=1))
        return
    document = json.loads(asked.out.read_text()) if asked.out.exists() else {"rows": []}
    device = torch.device("cuda" if torch.cuda.is_available() and asked.device != "cpu" else "cpu")
    document["environment"] = environment.collect(device)
    document["rows"].append(row)
    results.save(document, asked.out)


if __name__ == "__main__":
    main()
