"""Oracle neighbours, until a model copies, and then fewer."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from training_common import ROWS, M, settings, stream_of

from retro_kernels.models import Retro, curriculum
from retro_kernels.models.curriculum import Curriculum, may_see
from retro_kernels.models.data import Batch
from retro_kernels.models.training import Trainer


def test_oracle_neighbours_are_the_text_itself_within_the_document():
    b, n, m, r = 40, 24, 4, 8
    tokens = torch.arange(n).repeat(b, 1)
    starts = torch.zeros(b, n, dtype=torch.bool)
    starts[:, 12] = True
    retrieved = torch.full((b, n // m, 2, r), 60)
    batch = Batch(tokens, tokens, retrieved, torch.ones_like(retrieved, dtype=torch.bool), starts)
    of = Curriculum(m, seed=3)
    found, rows = of.put(batch, 5, 0)
    assert rows.all()
    assert (found.neighbours[:, :, 1] == 60).all()
    assert found.neighbour_mask[:, :, 1].all()
    offsets = found.neighbours[:, :, 0, 0] - m * torch.arange(n // m)
    assert set(offsets.flatten().tolist()) == set(range(m))
    assert 0.5 < (offsets == 0).float().mean() < 0.75  # a half, and a quarter of the other
    place = found.neighbours[:, :, 0, :1] + torch.arange(r)
    ends = torch.where(torch.arange(n // m) < 3, 12, n)[:, None]
    assert torch.equal(found.neighbour_mask[:, :, 0], place < ends)
    assert torch.equal(found.neighbours[:, :, 0][place < ends], place[place < ends])
    # A row is what its number makes it, in whatever batch it comes.
    later = batch._replace(tokens=tokens[7:], neighbours=retrieved[7:], neighbour_mask=batch.neighbour_mask[7:])
    again, _ = of.put(later._replace(sequence_starts=starts[7:]), 12, 0)
    assert torch.equal(again.neighbours, found.neighbours[7:])
    of.copied_at = 10
    _, rows = of.put(batch, 5, 15)  # the share is 0.55 there
    assert 10 < rows.sum() < 33
    assert torch.equal(of.put(batch, 5, 15)[0].neighbours[~rows], retrieved[~rows])
    seen = may_see(batch, m)[0].nonzero()[:, 0].tolist()
    assert seen == [*range(3, 12), *range(15, 24)]


def test_the_share_falls_once_the_model_copies_and_a_tenth_stays():
    of = Curriculum(4, seed=0)
    assert of.share(10_000) == 1.0
    assert [step for step in range(25) if of.due(step)] == [9, 19]
    of.judge(19, oracle=1.01, without=3.0)
    assert of.copied_at is None
    of.judge(19, oracle=0.99, without=3.0)
    assert of.copied_at == 20
    assert not of.due(29)
    assert [of.share(step) for step in (20, 30, 40, 1000)] == pytest.approx([1.0, 0.55, 0.1, 0.1])


def metrics(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: x for key, x in line.items() if "second" not in key} for line in lines]


def test_a_killed_run_goes_on_with_its_curriculum_to_the_bit_and_logs_the_losses_apart(tmp_path, monkeypatch):
    """By a criterion that is met at the first look, so that the share falls; a run that was stopped after that has the
    weights of one that was not."""
    stream = stream_of(tmp_path / "data", dropout=0.1)
    monkeypatch.setattr(curriculum, "CHECKED_EVERY", 4)
    monkeypatch.setattr(curriculum, "ENOUGH", 1.1)
    given = {"steps": 12, "save_every": 6, "oracle": True, "clip": None}
    runs = []
    for name, stops in (("whole", 0), ("parts", 8)):
        run = Trainer(stream.config, stream, settings(tmp_path / name, **given), say=lambda text: None)
        update = run._update

        def stopped(batches, run=run, update=update, stops=stops):
            if run.step == stops:
                raise KeyboardInterrupt
            return update(batches)

        if stops:
            run._update = stopped
            with pytest.raises(KeyboardInterrupt):
                run.run()
            run = Trainer(stream.config, stream, settings(tmp_path / name, **given), say=lambda text: None)
            assert run.step == 6
            assert run.curriculum.copied_at == 4
        run.run()
        runs.append(Retro.from_pretrained(tmp_path / name / "step-00000012").state_dict())
    assert all(torch.equal(x, runs[1][name]) for name, x in runs[0].items())
    lines = metrics(tmp_path / "whole")
    assert lines == metrics(tmp_path / "parts")
    assert "loss_retrieved" not in lines[0]
    assert "loss_retrieved" in lines[-1]
    assert [line["oracle_share"] for line in lines[4:9]] == pytest.approx([1.0, 0.775, 0.55, 0.325, 0.1])
    assert [i for i, line in enumerate(lines) if "loss_without" in line] == [3]


def test_losses_apart_are_means_over_the_tokens_that_may_see(tmp_path, monkeypatch):
    monkeypatch.setattr(curriculum, "CHECKED_EVERY", 1)
    stream = stream_of(tmp_path / "data")
    given = {"batch_size": ROWS, "micro_batch_size": 2, "oracle": True, "steps": 1}
    run = Trainer(stream.config, stream, settings(tmp_path / "run", **given), say=lambda text: None)
    model = Retro(stream.config).eval()
    model.load_state_dict(run.model.state_dict())
    run.run()
    order = np.random.default_rng([0, 0]).permutation(ROWS)
    batch, _ = run.curriculum.put(stream.batch(list(order)), 0, 0)
    with torch.no_grad():
        on, off = (model.loss(*x, reduction="none")[:, M - 1 :].mean() for x in (batch, batch[:2]))
    (line,) = metrics(tmp_path / "run")
    assert line["loss_oracle"] == pytest.approx(on.item(), rel=1e-5)
    assert line["loss_without"] == pytest.approx(off.item(), rel=1e-5)
    assert line["oracle_share"] == 1.0
    assert math.isfinite(line["loss"])


def test_where_there_can_be_no_oracle_is_said(tmp_path):
    stream = stream_of(tmp_path / "data")
    plain = dataclasses.replace(stream.config, cross_attention_layers=())
    with pytest.raises(ValueError, match="oracle: got True without neighbours"):
        Trainer(plain, stream, settings(tmp_path / "run", oracle=True))
    (tmp_path / "data" / "neighbours.npy").unlink()
    stream = stream_of(tmp_path / "data", write=False)
    with pytest.raises(ValueError, match="oracle: got True without neighbours"):
        Trainer(stream.config, stream, settings(tmp_path / "run", oracle=True))
