"""Documents end: their end is a target, nothing of one document reaches another, and generation stops there."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from models_common import tiny

from retro_kernels.models import RetroConfig
from retro_kernels.models.data import IGNORED, TokenStream
from retro_kernels.models.evaluation import evaluate

M, N, END = 4, 16, 63
LENGTHS = (7, 4, 0, 19, 1)  # of documents: 2, 1, 0, 5 and 1 chunks
CONFIG = RetroConfig.preset("tiny", max_length=N, eos_token_id=END)


@pytest.fixture
def folder(tmp_path):
    random = np.random.default_rng(0)
    chunks = [-(-length // M) for length in LENGTHS]
    starts = np.concatenate(([0], np.cumsum(chunks)[:-1])) * M
    np.save(tmp_path / "tokens.npy", random.integers(1, 60, size=sum(chunks) * M, dtype=np.uint16))
    np.save(tmp_path / "document_starts.npy", starts)
    np.save(tmp_path / "document_ends.npy", starts + LENGTHS)
    np.save(tmp_path / "neighbours.npy", random.integers(60, size=(sum(chunks), 2, 2 * M), dtype=np.int32))
    (tmp_path / "data.json").write_text(json.dumps({"bytes": 3 * sum(LENGTHS)}))
    return tmp_path


def test_a_document_is_read_alone_and_its_end_is_a_target(folder):
    stream = TokenStream(folder, CONFIG)
    assert (stream.rows, stream.num_targets) == (3, sum(LENGTHS))
    batch = stream.batch(range(3))
    tokens = np.load(folder / "tokens.npy").astype(int).tolist()
    expected, targets, starts = [], [], []
    for begin, length in zip(np.load(folder / "document_starts.npy").tolist(), LENGTHS):
        own = tokens[begin : begin + length]
        filled = -(-length // M) * M - length
        expected += own + [END] * filled
        targets += [*own[1:], END][:length] + [IGNORED] * filled
        starts += [i == 0 for i in range(length + filled)]
    lacking = 3 * N - len(expected)
    assert batch.tokens.flatten().tolist() == expected + [END] * lacking
    assert batch.targets.flatten().tolist() == targets + [IGNORED] * lacking
    assert batch.sequence_starts.flatten().tolist() == starts + [False] * lacking
    assert batch.neighbour_mask.flatten().tolist() == [True] * len(expected) * 4 + [False] * lacking * 4
    alone = TokenStream(folder, dataclasses.replace(CONFIG, eos_token_id=None))
    assert (alone.num_targets, int((alone.batch(range(3)).targets != IGNORED).sum())) == (27, 27)


def test_the_loss_of_a_document_does_not_know_the_others(folder):
    model = tiny(max_length=N, eos_token_id=END)
    batch = TokenStream(folder, CONFIG).batch([0])  # documents of 7 and 4 tokens, and the third's first chunk
    loss = model.loss(*batch, reduction="none")[0]
    for first, last in ((0, 8), (8, 12), (12, 16)):
        alone = [None if x is None else x[:, first:last] for x in batch[:2]]
        near = [x[:, first // M : last // M] for x in batch[2:4]]
        torch.testing.assert_close(model.loss(*alone, *near, reduction="none")[0], loss[first:last])


def test_evaluation_counts_every_token_of_every_document_once(folder):
    model = tiny(max_length=N, eos_token_id=END)
    stream = TokenStream(folder, CONFIG)
    found = evaluate(model, stream, retrieval=["on", "off"], overlaps=(1.0,), batch_size=2)
    assert {x.tokens for x in found if x.max_overlap is None} == {sum(LENGTHS)}
    assert {x.tokens for x in found if x.max_overlap == 1.0} == {sum(LENGTHS)}
    assert all(x.bits_per_byte == pytest.approx(x.bits_per_token / 3) for x in found)


def test_generation_stops_at_the_end_that_was_learned(folder):
    model = tiny(max_length=N, eos_token_id=END)
    texts = [[5, 9, 2], [7, 6, 1, 3, 8, 4]]
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    rows = [torch.tensor([text + [END]]) for text in texts]
    for _ in range(60):
        optimiser.zero_grad()
        sum(model.loss(row[:, :-1], row[:, 1:]) for row in rows).backward()
        optimiser.step()
    made = model.generate([text[:1] for text in texts], max_new_tokens=20)
    assert [made.sequences[i, : made.lengths[i]].tolist() for i in range(2)] == [text + [END] for text in texts]


@pytest.mark.parametrize(
    ("starts", "ends"),
    [([0, 5], [4, 8]), ([4, 8], [8, 36]), ([0, 8], [9, 36]), ([0, 4], [4]), ([0, 4], [4, 37]), ([0, 4], [4, 8])],
)
def test_documents_that_do_not_lie_one_after_another_are_refused(folder, starts, ends):
    np.save(folder / "document_starts.npy", np.array(starts))
    np.save(folder / "document_ends.npy", np.array(ends))
    with pytest.raises(ValueError, match="expected documents one after another"):
        TokenStream(folder, CONFIG)
