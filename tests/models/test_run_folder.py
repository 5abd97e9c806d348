"""A run's folder: one trainer at a time, what is broken is passed over with a sentence, other data are refused; and
what a trainer does beside training: schedules, held-out text, early stopping, callbacks."""

from __future__ import annotations

import itertools
import json
import os
import random
import resource
import shutil
import stat
import sys
import types

import numpy as np
import pytest
import torch
import yaml
from test_training import metrics_of, trainer, weights_of
from training_common import ROWS, N, settings, stream_of
from typer.testing import CliRunner

from retro_kernels.cli import app
from retro_kernels.models import Retro
from retro_kernels.models.callbacks import Callback, duration
from retro_kernels.models.run_folder import checkpoints
from retro_kernels.models.training import Trainer
from retro_kernels.models.training_config import TrainingConfig


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda number: None)  # a kill keeps the page cache; syncing takes seconds


@pytest.fixture
def stream(tmp_path):
    return stream_of(tmp_path / "data")


def quiet(stream, output, said=None, **changes):
    return Trainer(stream.config, stream, settings(output, **changes), say=([] if said is None else said).append)


def kept(folder, step):
    """Weights that do not change with their file, which is mapped."""
    return {name: x.clone() for name, x in weights_of(folder, step).items()}


def test_two_trainers_of_one_folder(stream, tmp_path):
    first = trainer(stream, tmp_path / "run")
    with pytest.raises(BlockingIOError, match="another process trains there"):
        trainer(stream, tmp_path / "run")
    with pytest.raises(ValueError, match="micro_batch_size"):
        trainer(stream, tmp_path / "other", micro_batch_size=3)
    trainer(stream, tmp_path / "other", steps=1)  # a trainer that could not begin holds nothing
    first.run()
    assert trainer(stream, tmp_path / "run").step == 6  # one that is done neither
    del first


def test_a_broken_checkpoint_is_passed_over_with_a_sentence(stream, tmp_path):
    trainer(stream, tmp_path / "run", steps=4).run()
    expected = kept(tmp_path / "run", 4)
    path = tmp_path / "run" / "step-00000004" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-7] ^= 1
    path.write_bytes(content)
    said = []
    run = quiet(stream, tmp_path / "run", said, steps=4)
    assert run.step == 2
    assert "step-00000004 is broken (model.safetensors: altered" in said[0]
    assert (tmp_path / "run" / "broken-step-00000004").is_dir()
    run.run()
    got = weights_of(tmp_path / "run", 4)
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    for checkpoint in checkpoints(tmp_path / "run"):
        (checkpoint / "checksums.json").write_text("{}")
    with pytest.raises(ValueError, match="no checkpoint is whole"):
        quiet(stream, tmp_path / "run")


def test_what_a_full_disk_or_a_power_cut_leaves_is_mended(stream, tmp_path):
    trainer(stream, tmp_path / "run", steps=4).run()
    expected = metrics_of(tmp_path / "run")
    with (tmp_path / "run" / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 5, "lo\xff')
    (tmp_path / "run" / "settings.json").write_text("")
    said = []
    quiet(stream, tmp_path / "run", said, steps=4)
    assert any("1 broken line left out" in text for text in said)
    assert metrics_of(tmp_path / "run") == expected
    assert json.loads((tmp_path / "run" / "settings.json").read_text())["seed"] == 0


def test_mutated_folders_are_resumed_or_refused_in_a_sentence(stream, tmp_path):
    """One byte changed, cut off, or a file gone, anywhere: what was trained comes out, or a line says why not."""
    trainer(stream, tmp_path / "whole", steps=4).run()
    expected = {step: kept(tmp_path / "whole", step) for step in (2, 4)}
    draw = random.Random(0)
    for number in range(12):
        run = tmp_path / f"run {number}"
        shutil.copytree(tmp_path / "whole", run)
        path = draw.choice(sorted(p for p in run.rglob("*") if p.is_file()))
        content = bytearray(path.read_bytes())
        kind = draw.choice(("flip", "cut", "gone", "empty"))
        if kind == "flip" and content:
            content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        path.write_bytes(content[: {"cut": len(content) // 2, "empty": 0}.get(kind, len(content))])
        if kind == "gone":
            path.unlink()
        resumed = quiet(stream, run, steps=4)
        got = resumed.model.state_dict()
        assert all(torch.equal(x, expected[resumed.step][name]) for name, x in got.items()), (kind, path)


@pytest.mark.parametrize("limit", [100_000, 600_000], ids=["weights", "optimiser"])
def test_a_checkpoint_that_cannot_be_written_is_a_line_and_no_loss(tmp_path, limit):
    """The system refuses a large file in the middle of a save: as on a full disk."""
    stream_of(tmp_path / "data")
    document = {
        "model": {"preset": "tiny", "max_length": N},
        "data": "data",
        "training": {"output": "run", "steps": 2, "batch_size": 2, "save_every": 1},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(document))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        result = CliRunner().invoke(app, ["train", str(tmp_path / "run.yaml"), "--device", "cpu"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (result.exit_code, checkpoints(tmp_path / "run")) == (2, [])
    assert "error:" in result.output
    assert "step-00000001" in result.output
    result = CliRunner().invoke(app, ["train", str(tmp_path / "run.yaml"), "--device", "cpu"])
    assert (result.exit_code, len(checkpoints(tmp_path / "run"))) == (0, 2)


def test_other_data_are_named_and_refused(stream, tmp_path):
    trainer(stream, tmp_path / "run", steps=2).run()
    neighbours = np.load(stream.folder / "neighbours.npy")
    neighbours[0, 0, 0] ^= 1
    np.save(stream.folder / "neighbours.npy", neighbours)
    with pytest.raises(ValueError, match=r"another data \(neighbours\.npy\); continue it with the same"):
        quiet(stream, tmp_path / "run")


def test_files_have_the_mode_of_the_umask(stream, tmp_path):
    before = os.umask(0o027)
    try:
        trainer(stream, tmp_path / "run", steps=1).run()
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert set(modes.values()) == {0o640}, modes


def test_schedules():
    def rates(schedule, **changes):
        given = {"steps": 100, "warmup_steps": 10, "learning_rate": 1.0, "final_learning_rate": 0.2, **changes}
        run = TrainingConfig(output="x", schedule=schedule, **given)
        return [run.rate(step) for step in range(101)]

    for schedule in ("cosine", "linear", "constant", "wsd"):
        found = rates(schedule)
        assert found[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
        assert all(x >= y for x, y in itertools.pairwise(found[9:]))
        assert found[100] == pytest.approx(1.0 if schedule == "constant" else 0.2)
    assert rates("linear")[55] == pytest.approx(0.6)
    assert rates("wsd", decay_steps=40)[60] == 1.0
    assert rates("wsd", decay_steps=40)[80] == pytest.approx(0.6)
    assert rates("cosine", warmup_steps=None)[9] == pytest.approx(1.0)  # by default a tenth of the steps
    with pytest.raises(ValueError, match="schedule: got 'step'"):
        TrainingConfig(output="x", steps=1, schedule="step")


class Recorder(Callback):
    def __init__(self):
        self.calls = []

    def __getattribute__(self, name):
        if name.startswith("on_"):
            return lambda trainer, *given: self.calls.append((name, given))
        return object.__getattribute__(self, name)


def test_held_out_text_stops_the_run_and_the_best_is_kept(tmp_path):
    """A corpus that can only be learned by heart: what is held out gets worse, and the training ends."""
    stream, held_out = stream_of(tmp_path / "data"), stream_of(tmp_path / "held out", seed=1)
    recorder, said = Recorder(), []

    def run_of(output, **changes):
        given = {"steps": 200, "save_every": 100, "evaluate_every": 5, "patience": 2, "keep": 1, **changes}
        return Trainer(
            stream.config,
            stream,
            settings(output, **given),
            held_out=held_out,
            say=said.append,
            callbacks=[recorder],
        )

    run = run_of(tmp_path / "run")
    run.run()
    assert 10 < run.step < 200
    assert "Stopped early: 2 evaluations" in "\n".join(said)
    lines = [line for line in metrics_of(tmp_path / "run") if "held_out_on" in line]
    losses = {line["step"]: line["held_out_on"] for line in lines}
    best = min(losses, key=losses.__getitem__)
    assert list(losses) == list(range(5, run.step + 1, 5))
    assert run.step == best + 10
    assert [int(path.name[5:]) for path in checkpoints(tmp_path / "run")] == [best, run.step]
    assert (tmp_path / "run" / "best").resolve().name == f"step-{best:08d}"
    model = Retro.from_pretrained(tmp_path / "run" / "best")
    with torch.no_grad():
        batch = held_out.batch(range(ROWS))
        assert float(model.loss(*batch)) == pytest.approx(losses[best], rel=1e-5)
        off = float(model.loss(*batch[:2]))
    assert next(line for line in lines if line["step"] == best)["held_out_off"] == pytest.approx(off, rel=1e-5)
    names = [name for name, _ in recorder.calls]
    assert (names[0], names[-1], names.count("on_evaluation")) == ("on_begin", "on_end", len(losses))
    assert names.count("on_step") == run.step
    assert run_of(tmp_path / "run").run() != 0.0  # stopped is stopped
    assert len(checkpoints(tmp_path / "run")) == 2


def test_a_run_begins_with_the_weights_of_another(stream, tmp_path):
    trainer(stream, tmp_path / "first", steps=2).run()
    start = str(tmp_path / "first" / "step-00000002")
    run = trainer(stream, tmp_path / "second", start_from=start)
    expected = weights_of(tmp_path / "first", 2)
    assert all(torch.equal(x, expected[name]) for name, x in run.model.state_dict().items())
    assert run.step == 0


def test_it_says_what_is_to_come_and_what_makes_no_sense(stream, tmp_path):
    said = []
    quiet(stream, tmp_path / "run", said, batch_size=12, steps=1000, warmup_steps=1000)
    text = "\n".join(said)
    assert f"{ROWS} rows of {N} tokens" in text
    assert "million parameters (decoder" in text
    assert "batch_size 12 is more than the 6 rows there are: every update sees all of them, about 2.0 times" in text
    assert "warmup_steps 1000 is not less than steps 1000" in text
    said.clear()
    quiet(stream, tmp_path / "other", said, batch_size=4, micro_batch_size=1, steps=3, log_every=100).run()
    assert any("1 of 4 micro-batches" in line for line in said)
    assert any(line.startswith("step 1/3  loss") and line.endswith("left") for line in said)
    assert [duration(x) for x in (1.24, 61, 3700, 5e5)] == ["1.2 s", "1 min 1 s", "1 h 1 min", "6 days"]


def test_loggers(stream, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="log_to: got 'mlflow'"):
        settings(tmp_path / "run", log_to=["mlflow"])
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ValueError, match=r"log_to: tensorboard is not installed: pip install 'retro_kernels\[tens"):
        trainer(stream, tmp_path / "run", log_to=["tensorboard"])
    logged, begun = [], []

    class Run:
        id = "abc"

        def log(self, values, step):
            logged.append((step, values["loss"]))

        def finish(self):
            logged.append("finished")

    fake = types.SimpleNamespace(init=lambda **given: begun.append(given) or Run())
    monkeypatch.setitem(sys.modules, "wandb", fake)
    trainer(stream, tmp_path / "run", log_to="wandb", steps=2).run()
    assert [x if x == "finished" else x[0] for x in logged] == [1, 2, "finished"]
    trainer(stream, tmp_path / "run", log_to="wandb", steps=3).run()
    assert [given["id"] for given in begun] == [None, "abc"]


def test_the_commands_paths_and_errors(tmp_path):
    """Everything in the file is relative to the file; what the system refuses is a line."""
    stream_of(tmp_path / "data")
    stream_of(tmp_path / "held", seed=1)
    (tmp_path / "config").mkdir()
    path = tmp_path / "config" / "run.yaml"
    document = {
        "model": {"preset": "tiny", "max_length": N},
        "data": {"folder": "../data", "held_out": "../held"},
        "training": {"output": "../run", "steps": 2, "batch_size": 2},
    }
    path.write_text(yaml.safe_dump(document))

    def invoke(code):
        result = CliRunner().invoke(app, ["train", str(path), "--device", "cpu"])
        assert result.exit_code == code, result.output
        return result.output

    for command in (["train", str(path)], ["evaluate", "m", "d"], ["generate", "m", "prompt"]):
        result = CliRunner().invoke(app, [*command, "--device", "gpu"])
        assert result.exit_code == 2
        assert "device: got 'gpu'; expected" in result.output
    output = invoke(0)
    assert "held-out loss: on 4." in output
    assert (tmp_path / "run" / "best").is_symlink()
    for change, message in (
        ({"training": {**document["training"], "output": "run.yaml/run"}}, "run.yaml"),
        ({"training": {**document["training"], "output": "/proc/nowhere/run"}}, "/proc/nowhere"),
        ({"model": "tiny"}, "got model 'tiny', expected settings"),
        ({"data": {"folder": "../data", "held": "x"}}, "got data with folder, held"),
        ({"model": {"preset": "tini"}}, "run.yaml: preset: got 'tini', expected one of retro-172m"),
        (
            {"model": {"preset": "tiny", "chunksize": 4}},
            "model: got the setting 'chunksize', expected one such as chunk_size",
        ),
        ({"training": {**document["training"], "stepps": 3}}, "got the setting 'stepps', expected one such as steps"),
    ):
        path.write_text(yaml.safe_dump({**document, **change}))
        output = invoke(2)
        assert message in output
        assert "Traceback" not in output
