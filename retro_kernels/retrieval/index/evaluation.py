"""Measures an index against exact search: recall and speed over its settings."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..database import Database
from .devices import find_device
from .index import Index, open_index

NPROBES, EF_SEARCHES, RERANKS = (1, 4, 16, 64, 256), (16, 64, 256), (0, 4, 16)
LEAST_SECONDS = 0.5
"""That a setting is timed, whole passes over the queries."""


@dataclasses.dataclass(frozen=True)
class Point:
    """One setting of the index."""

    settings: dict[str, int]
    recall: float
    """The share of the true k nearest that is among the k found."""
    queries_per_second: float
    """Measured with all queries in one call."""


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The result of `evaluate_search`."""

    description: str
    k: int
    num_queries: int
    exact_queries_per_second: float
    points: list[Point]
    """Empty where the database's own search is exact."""
    recommended: dict[str, int]
    reason: str
    embedded_recall: float | None = None
    """The recall of exact search asked with what a retriever embeds of the chunks' tokens, against that asked with
    their stored keys: 1, unless the database's keys are not its embedder's. None where nothing was embedded."""

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def evaluate_search(
    database: Database,
    *,
    k: int = 2,
    num_queries: int = 1000,
    queries: np.ndarray | Tensor | None = None,
    embed: Callable[[Tensor], Tensor] | None = None,
    recall: float = 0.95,
    seed: int = 0,
    device: str | torch.device = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Recall@k and queries a second of every setting of the database's index, and the fastest that reaches `recall`.

    queries: floating [q, dim] that are not in the database; by default `num_queries` of its own chunks, drawn with
    `seed`, each without itself among what is found. embed: makes their queries [q, dim] of their tokens [q, m] (-1:
    none), as `Retriever.embed_chunks`; without it their stored keys are the queries. progress: called with the
    settings that are done and all.

    Raises ValueError for k, num_queries or recall that cannot be, DatabaseError as `open_index` does.
    """
    for name, value in {"k": k, "num_queries": num_queries}.items():
        if value < 1:
            raise ValueError(f"{name}: got {value}; expected at least 1")
    if not 0.0 < recall <= 1.0:
        raise ValueError(f"recall: got {recall}; expected more than 0 and at most 1")
    index = open_index(database, device=device)
    own = None
    if queries is None:
        own = torch.from_numpy(
            np.random.default_rng(seed).choice(len(database), min(num_queries, len(database)), replace=False)
        )
        queries = index.keys[own].cpu()
    given = torch.as_tensor(queries)
    truth = Index(database, find_device(device), {})
    true, seconds = _time_search(functools.partial(_search_others, truth, given, own, k, {}))
    embedded_recall = None
    if own is not None and embed is not None:
        tokens, mask = database.chunks(own, database.chunk_size)
        given = embed(tokens.long().masked_fill_(~mask, -1)).cpu()
        embedded_recall = _recall(_search_others(truth, given, own, k, {}), true)
    exact_rate = len(given) / seconds
    sweep = _sweep(index)
    points = []
    for done, settings in enumerate(sweep):
        if progress is not None:
            progress(done, len(sweep))
        found, seconds = _time_search(functools.partial(_search_others, index, given, own, k, settings))
        points.append(Point(settings, _recall(found, true), len(given) / seconds))
    if progress is not None:
        progress(len(sweep), len(sweep))
    recommended, reason = _recommend(points, recall)
    return Evaluation(index.description, k, len(given), exact_rate, points, recommended, reason, embedded_recall)


def _recall(found: Tensor, true: Tensor) -> float:
    """The share of the ids `true` [q, k] (-1: none) that are in the same row of `found` [q, k]."""
    hits = (found[:, :, None] == true[:, None]) & (true[:, None] >= 0)
    return float(hits.sum() / (true >= 0).sum().clamp(min=1))


def plot(evaluation: Evaluation, path: Path) -> None:
    """Draws recall against queries a second. Raises ImportError, naming the extra, without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f"a plot needs matplotlib ({error}): pip install 'retro_kernels[bench]'") from error
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    names = sorted({point.settings.get("rerank", 0) for point in evaluation.points})
    for rerank in names:
        chosen = [point for point in evaluation.points if point.settings.get("rerank", 0) == rerank]
        label = f"compared again: {rerank} x k" if rerank else "as the index finds them"
        axes.plot([p.recall for p in chosen], [p.queries_per_second for p in chosen], marker="o", label=label)
        for point in chosen:
            text = ", ".join(f"{name} {value}" for name, value in point.settings.items() if name != "rerank")
            axes.annotate(
                text, (point.recall, point.queries_per_second), xytext=(4, 5), textcoords="offset points", fontsize=7
            )
    axes.plot([1.0], [evaluation.exact_queries_per_second], marker="*", markersize=12, linestyle="none", label="exact")
    axes.set(xlabel=f"recall@{evaluation.k}", ylabel="queries a second", yscale="log", title=evaluation.description)
    axes.title.set_fontsize(9)
    axes.grid(True, which="both", alpha=0.25)
    axes.legend(fontsize=8)
    figure.savefig(path)


def _search_others(index: Index, queries: Tensor, own: Tensor | None, k: int, settings: dict[str, int]) -> Tensor:
    """-> ids [q, k] without the query itself."""
    ids = index.search(queries, k if own is None else k + 1, **settings)[1]
    if own is None:
        return ids
    # A stable sort moves the query's own number, or, where it was not found, the last one, behind the others.
    others = (ids == own[:, None]).long().argsort(dim=-1, stable=True)
    return ids.gather(-1, others)[:, :k]


def _time_search(search: Callable[[], Tensor]) -> tuple[Tensor, float]:
    """-> what it finds, and the seconds of the fastest pass."""
    found = search()
    best, begun = float("inf"), time.perf_counter()
    while best == float("inf") or time.perf_counter() - begun < LEAST_SECONDS:
        start = time.perf_counter()
        search()
        best = min(best, time.perf_counter() - start)
    return found, best


def _sweep(index: Index) -> list[dict[str, int]]:
    known = index.known_settings()
    if not known:
        return []
    looks: list[dict[str, int]] = [{}]
    if "nprobe" in known:
        looks = [{"nprobe": n} for n in NPROBES if n <= index.num_lists]
    elif "ef_search" in known:
        looks = [{"ef_search": n} for n in EF_SEARCHES]
    return [{**look, "rerank": rerank} for rerank, look in itertools.product(RERANKS, looks)]


def _recommend(points: list[Point], recall: float) -> tuple[dict[str, int], str]:
    if not points:
        return {}, "search is exact: there is nothing to set"
    enough = [point for point in points if point.recall >= recall]
    if enough:
        best = max(enough, key=lambda point: point.queries_per_second)
        return best.settings, f"the fastest with recall of at least {recall}"
    best = max(points, key=lambda point: (point.recall, point.queries_per_second))
    return best.settings, f"none reaches {recall}; this has the highest recall: another index can do better"
