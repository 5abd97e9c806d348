"""Evaluation: bits per byte with the neighbours, without, and with random ones, and by overlap with the database."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from ..nn import common
from ..ops import checks
from ..retrieval.corpus.filters import longest_common_stretch
from .data import IGNORED, TokenStream, other_rows
from .retro import Retro

MODES = ("on", "off", "random")
OVERLAPS = (0.0625, 0.125, 0.25, 0.5, 1.0)
CHUNKS_AT_ONCE = 1024
NO_TOKEN = -2
"""Fills a chunk up, and is in no neighbour."""


@dataclass(frozen=True)
class Result:
    """The loss of a model on a stream.

    Attributes:
        retrieval: "on", "off" or "random" (the neighbours of another row). num_neighbours: k; 0 where it is off.
        max_overlap: only chunks that have at most this share of their tokens in one piece in a neighbour; None: all.
        tokens: how many were predicted, ends of documents included. bits_per_token. bits_per_byte: of the original
            text, by the bytes that the stream has for each token to predict; None where it does not say how many.
    """

    retrieval: str
    num_neighbours: int
    max_overlap: float | None
    tokens: int
    bits_per_token: float
    bits_per_byte: float | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@torch.no_grad()
def evaluate(
    model: Retro,
    stream: TokenStream,
    *,
    retrieval: Collection[str] = MODES,
    num_neighbours: Collection[int] | None = None,
    overlaps: Sequence[float] = (),
    batch_size: int = 8,
    max_rows: int | None = None,
    window_stride: int | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> list[Result]:
    """The model's loss on every row of the stream (`max_rows` of them, the first), for each kind of retrieval and each
    k. All predict the same tokens.

    `overlaps`: shares a between 0 and 1. For each there is a result of the chunks C with r(C) <= a alone, where r(C) is
    the longest stretch of C that a neighbour of C holds, as a share of C (section 2.6): what the model gains there is
    not copied. `progress`: called with the passes over a batch that are done, and their number.

    `window_stride`: tokens from one window of `max_length` to the next, a multiple of chunk_size; default `max_length`.
    With less, windows overlap, and of each but the first only the last `window_stride` tokens count: no token is
    predicted from little context.

    Raises ValueError for an unknown kind of retrieval, for a k that the stream does not have, for an overlap outside
    [0, 1], and for "on", "random" or overlaps of a stream without neighbours.
    """
    for mode in retrieval:
        common.one_of("retrieval", mode, MODES)
    for overlap in overlaps:
        if not 0.0 <= overlap <= 1.0:
            raise ValueError(f"overlaps: got {overlap}, expected 0 to 1")
    checks.integer("batch_size", batch_size, 1)
    stored = 0 if stream.neighbours is None else stream.neighbours.shape[1]
    if stored == 0 and (overlaps or set(retrieval) - {"off"}):
        raise ValueError(f"retrieval: {stream.folder} has no neighbours, expected retrieval=('off',) and no overlaps")
    ks = [model.config.num_neighbours] if num_neighbours is None else list(num_neighbours)
    for k in ks:
        checks.integer("num_neighbours", k, 1, max(stored, 1), f"those of {stream.folder}")
    count = stream.rows if max_rows is None else min(stream.rows, checks.integer("max_rows", max_rows, 1))
    n, m = model.config.max_length, model.config.chunk_size
    stride = n if window_stride is None else checks.integer("window_stride", window_stride, 1, n, "max_length")
    if stride % m:
        raise ValueError(f"window_stride: got {stride}, expected a multiple of chunk_size = {m}")
    limit = count * n
    starts = list(range(0, limit - n + stride, stride))
    ring = other_rows(stream.rows, seed) if "random" in retrieval else []
    other = [ring[start // n] * n for start in starts] if ring else []
    variants = [(mode, k) for mode in retrieval for k in ([0] if mode == "off" else ks)]
    losses: dict[tuple[str, int], list[torch.Tensor]] = {variant: [] for variant in variants}
    there = []
    training, device = model.training, model.embedding.weight.device
    parts = [range(at, min(at + batch_size, len(starts))) for at in range(0, len(starts), batch_size)]
    model.eval()
    try:
        for i, part in enumerate(parts):
            some = [starts[number] for number in part]
            for j, (mode, k) in enumerate(variants):
                batch = stream.windows(some, k, [other[number] for number in part] if mode == "random" else None)
                loss = model.loss(*batch.to(device), reduction="none").float().cpu()
                losses[mode, k].append(loss)
                if progress is not None:
                    progress(i * len(variants) + j + 1, len(parts) * len(variants))
            there.append(batch.targets != IGNORED)
    finally:
        model.train(training)
    places = np.asarray(starts)[:, None] + np.arange(n)
    new = (np.arange(n) >= n - stride) | (places[:, :1] == 0)
    counts = torch.cat(there).flatten() & torch.from_numpy(new & (places < limit)).flatten()
    share = torch.from_numpy(_overlap_of_targets(stream, places, limit)) if overlaps else torch.zeros(0)
    total = stream.num_targets if stream.documents is not None else len(stream.tokens)
    per_byte = total / stream.bytes if stream.bytes else None
    results = []
    for (mode, k), found in losses.items():
        loss = torch.cat(found).flatten()
        for limit in (None, *overlaps):
            kept = loss[counts if limit is None else counts & (share <= limit)]
            bits = float(kept.double().mean()) / math.log(2) if kept.numel() else math.nan
            results.append(Result(mode, k, limit, kept.numel(), bits, None if per_byte is None else bits * per_byte))
    return results


def draw_overlaps(results: Sequence[Result], path: str | os.PathLike[str]) -> None:
    """The paper's picture of leakage (its figure 6): bits per byte (per token, where bytes are not known) of the chunks
    with at most so much overlap, over the overlap; a line for every kind of retrieval and k.

    Raises ValueError for results without overlaps, for another kind of file, and where matplotlib is not installed.
    """
    lines: dict[tuple[str, int], list[Result]] = {}
    for result in results:
        if result.max_overlap is not None and result.tokens:
            lines.setdefault((result.retrieval, result.num_neighbours), []).append(result)
    if not lines:
        raise ValueError("plot: got results of no overlap, expected some: give overlaps")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("plot: matplotlib is not installed: pip install matplotlib") from error
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    per_byte = all(x.bits_per_byte is not None for line in lines.values() for x in line)
    for (mode, k), line in lines.items():
        line = sorted(line, key=lambda x: x.max_overlap or 0.0)
        name = "retrieval off" if mode == "off" else f"{'neighbours' if mode == 'on' else 'random neighbours'}, k = {k}"
        shares = [x.max_overlap or 0.0 for x in line]
        bits = [(x.bits_per_byte if per_byte else x.bits_per_token) or 0.0 for x in line]
        axes.plot(shares, bits, {"on": "o-", "off": "s:", "random": "x--"}[mode], label=name)
    axes.set(
        xlabel="longest stretch shared with a neighbour, at most (share of the chunk)",
        ylabel="bits per byte" if per_byte else "bits per token",
        ylim=(0, None),
    )
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    try:
        figure.savefig(path)
    except ValueError as error:
        raise ValueError(f"plot: got {os.fspath(path)!r}, expected a name that ends in .svg, .png or .pdf") from error


def unchanged_by_retrieval(results: Sequence[Result]) -> list[Result]:
    """The results with retrieval on that equal those with it off to the bit, although neighbours were given: as a rule
    the model has not learned to read them, or they did not reach it."""
    off = {(x.max_overlap, x.bits_per_token) for x in results if x.retrieval == "off" and x.tokens}
    return [x for x in results if x.retrieval == "on" and (x.max_overlap, x.bits_per_token) in off]


def _overlap_of_targets(stream: TokenStream, places: np.ndarray, limit: int) -> np.ndarray:
    """r(C) of the chunk C that the target of each place belongs to, flat. A document's end belongs to its last chunk; a
    target beyond the first `limit` tokens is given 2, more than any share."""
    m = stream.config.chunk_size
    share = np.append(_overlaps(stream, min(limit, len(stream.tokens)) // m), 2.0)
    place = places.flatten()
    target = place + 1
    if stream.documents is not None:
        starts, ends = stream.documents
        target = np.minimum(target, ends[np.searchsorted(starts, place, side="right") - 1] - 1)
    return share[np.minimum(target // m, len(share) - 1)]


def _overlaps(stream: TokenStream, chunks: int) -> np.ndarray:
    """r(C) of the first chunks, [chunks]: of the tokens that a chunk has, so many stand in one piece in a neighbour."""
    if stream.neighbours is None:
        raise ValueError(f"{stream.folder}: no neighbours to overlap with")
    m = stream.config.chunk_size
    found = np.empty(chunks)
    for first in range(0, chunks, CHUNKS_AT_ONCE):
        some = slice(first, min(first + CHUNKS_AT_ONCE, chunks))
        tokens = np.asarray(stream.tokens[some.start * m : some.stop * m], dtype=np.int64).reshape(-1, m)
        lengths = np.full(len(tokens), m)
        if stream.documents is not None:
            starts, ends = stream.documents
            begin = np.arange(some.start, some.stop) * m
            lengths = np.minimum(ends[np.searchsorted(starts, begin, side="right") - 1] - begin, m)
            tokens = np.where(np.arange(m) < lengths[:, None], tokens, NO_TOKEN)
        neighbours = np.asarray(stream.neighbours[some], dtype=np.int64)
        shared = longest_common_stretch(torch.from_numpy(tokens), torch.from_numpy(neighbours))
        found[some] = shared.amax(-1).numpy() / np.maximum(lengths, 1) if neighbours.shape[1] else 0.0
    return found
