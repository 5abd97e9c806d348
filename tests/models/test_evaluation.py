"""Evaluation counts every token once, whatever the neighbours, and tells copying from reading."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from models_common import tiny
from training_common import ROWS, M, N, stream_of
from typer.testing import CliRunner

from retro_kernels.cli import app
from retro_kernels.models.evaluation import evaluate, unchanged_by_retrieval


@pytest.fixture
def stream(tmp_path):
    return stream_of(tmp_path / "data")


@pytest.fixture
def model(stream):
    return tiny(max_length=N, tokenizer="letters")


def test_bits_are_those_of_the_logits(model, stream):
    results = {(x.retrieval, x.num_neighbours): x for x in evaluate(model, stream, num_neighbours=(1, 2), batch_size=4)}
    assert set(results) == {("on", 1), ("on", 2), ("off", 0), ("random", 1), ("random", 2)}
    for (mode, k), result in results.items():
        assert result.tokens == ROWS * N
        assert result.bits_per_byte == pytest.approx(result.bits_per_token / 3)
        if mode == "random":
            continue
        batch = stream.batch(range(ROWS), k)
        logits = model(batch.tokens, batch.neighbours, batch.neighbour_mask)
        nats = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten()).item()
        assert result.bits_per_token == pytest.approx(nats / math.log(2), rel=1e-5)
    assert len({x.bits_per_token for x in results.values()}) == 5
    assert evaluate(model, stream, max_rows=2, retrieval=["off"])[0].tokens == 2 * N


def test_by_overlap_only_such_chunks_count(model, stream):
    """A chunk's neighbours are made to share all, half or none of it; a chunk's bits are those of its own tokens."""
    m, chunks = M, ROWS * N // M
    neighbours = np.full((chunks, 2, 8), 63, dtype=np.int32)
    tokens = np.asarray(stream.tokens) % 60
    np.save(stream.folder / "tokens.npy", tokens)
    kinds = np.arange(chunks) % 3
    for u, kind in enumerate(kinds):
        shared = (0, m // 2, m)[kind]
        neighbours[u, 1, 2 : 2 + shared] = tokens[u * m : u * m + shared]
    np.save(stream.folder / "neighbours.npy", neighbours)
    stream = type(stream)(stream.folder, stream.config)
    results = {x.max_overlap: x for x in evaluate(model, stream, retrieval=["off"], overlaps=(0.0, 0.5, 1.0))}
    # The stream's first token has none before it to be predicted from.
    counts = [m * int((kinds <= i).sum()) - 1 for i in range(3)]
    assert [results[limit].tokens for limit in (0.0, 0.5, 1.0)] == counts
    batch = stream.batch(range(ROWS))
    with torch.no_grad():
        loss = model.loss(batch.tokens, batch.targets, reduction="none").flatten()
    own = [loss[max(u * m - 1, 0) : u * m - 1 + m] for u in range(chunks) if kinds[u] == 0]
    assert results[0.0].bits_per_token == pytest.approx(float(torch.cat(own).mean()) / math.log(2), rel=1e-5)


def test_wrong_arguments_are_named(model, stream):
    for options, message in (
        ({"retrieval": ["maybe"]}, "retrieval: got 'maybe'"),
        ({"num_neighbours": [3]}, "num_neighbours: got 3"),
        ({"overlaps": [2.0]}, "overlaps: got 2.0"),
        ({"batch_size": 0}, "batch_size: got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate(model, stream, **options)
    (stream.folder / "neighbours.npy").unlink()
    with pytest.raises(ValueError, match="has no neighbours"):
        evaluate(model, type(stream)(stream.folder, stream.config))


def test_windows_that_overlap_count_every_token_once_with_more_context(model, stream):
    whole = evaluate(model, stream, retrieval=["on", "off"])
    overlapping = evaluate(model, stream, retrieval=["on", "off"], window_stride=M, batch_size=5)
    assert {x.tokens for x in overlapping} == {x.tokens for x in whole} == {ROWS * N}
    tokens = torch.from_numpy(np.asarray(stream.tokens, dtype=np.int64))
    nats = []
    with torch.no_grad():
        for at in range(ROWS * N):  # each token after at most N, at least N - M + 1 before it
            start = max((at - N) // M * M + M, 0)
            loss = model.loss(tokens[None, start : at + 1], tokens[None, start + 1 : at + 2], reduction="none")
            nats.append(float(loss[0, -1]))
    off = next(x for x in overlapping if x.retrieval == "off")
    assert off.bits_per_token == pytest.approx(np.mean(nats) / math.log(2), rel=1e-5)
    assert evaluate(model, stream, retrieval=["off"], window_stride=N) == evaluate(model, stream, retrieval=["off"])
    for stride, message in ((N + M, "expected an integer from 1 to|window_stride"), (3, "multiple of chunk_size")):
        with pytest.raises(ValueError, match=message):
            evaluate(model, stream, window_stride=stride)


def test_retrieval_that_changes_nothing_is_said_loudly(model, stream, tmp_path):
    assert unchanged_by_retrieval(evaluate(model, stream)) == []
    with torch.no_grad():
        for block in model.blocks:
            if block.cross_attention is not None:
                block.cross_attention.w_out.weight.zero_()
    assert [x.retrieval for x in unchanged_by_retrieval(evaluate(model, stream))] == ["on"]
    model.save_pretrained(tmp_path / "model")
    arguments = ["evaluate", str(tmp_path / "model"), str(stream.folder), "--device", "cpu", "--json"]
    result = CliRunner().invoke(app, arguments)
    assert "RETRIEVAL CHANGES NOTHING" in result.stderr
    assert len(json.loads(result.stdout)) == 3


def test_progress_is_told(model, stream):
    seen = []
    evaluate(model, stream, batch_size=4, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(i + 1, 6) for i in range(6)]


def test_the_command(model, stream, tmp_path):
    model.save_pretrained(tmp_path / "model")
    arguments = ["evaluate", str(tmp_path / "model"), str(stream.folder), "--device", "cpu"]
    result = CliRunner().invoke(app, [*arguments, "--json", "--overlap", "0.5"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert [(x["retrieval"], x["max_overlap"]) for x in found] == [
        (mode, limit) for mode in ("on", "off", "random") for limit in (None, 0.5)
    ]
    result = CliRunner().invoke(app, arguments)
    assert f"{found[0]['bits_per_byte']:.4f}" in result.stdout
    result = CliRunner().invoke(app, ["evaluate", str(tmp_path), str(stream.folder)])
    assert result.exit_code == 2
    assert "config.json is not there" in result.output
