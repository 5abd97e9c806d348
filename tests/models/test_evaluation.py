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
from retro_kernels.models.evaluation import evaluate


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
