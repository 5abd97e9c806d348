"""A model divided among two processes, by rows or by projections, has the loss and the gradients of one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models_common import tiny
from safetensors.torch import load_file
from training_common import settings, stream_of
from two_processes import DIVIDED, RUNS, example

from retro_kernels.models.training import Trainer
from retro_kernels.models.training_config import TrainingConfig


def run_both(folder: Path, what: str) -> None:
    """Runs two_processes.py as both of its processes."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])}
    command = [sys.executable, str(Path(__file__).parent / "two_processes.py")]
    both = [
        subprocess.Popen([*command, str(rank), str(folder), what], env=environment, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    try:
        for process in both:
            _, errors = process.communicate(timeout=180)
            assert process.returncode == 0, errors
    finally:
        for process in both:
            process.kill()


def test_rows_and_projections_divided_give_the_loss_and_every_gradient_of_one_process(tmp_path):
    run_both(tmp_path, "gradients")
    for name in DIVIDED:
        model, inputs = example(name)
        loss = model.loss(*inputs, reduction="sum")
        loss.backward()
        expected = {"loss": loss.detach(), **{key: p.grad for key, p in model.named_parameters()}}
        assert all(x.any() for x in expected.values())
        for kind in ("context", "context-checkpointed", *(["tensor"] if name != "tiny-rotary" else [])):
            got = load_file(tmp_path / f"{kind}.{name}.safetensors")
            assert got.keys() == expected.keys()
            for key, x in expected.items():
                torch.testing.assert_close(
                    got[key],
                    x,
                    rtol=1e-4,
                    atol=1e-5 * max(float(x.abs().max()), 1.0),
                    msg=lambda text, at=(kind, name, key): f"{at}: {text}",
                )
    # Other heads are dropped otherwise; dropout of activations, which both processes hold, has to be the same.
    first, second = (load_file(tmp_path / f"seeds.{rank}") for rank in (0, 1))
    assert first["other"] == second["other"]
    assert first["attention"] != second["attention"]


def test_what_cannot_be_divided_is_named(tmp_path):
    stream = stream_of(tmp_path / "data")
    for changes, message in (
        ({"context_parallel": 2}, "their product divides the 1 processes"),
        ({"tensor_parallel": 3}, "their product divides the 1 processes"),
    ):
        with pytest.raises(ValueError, match=message):
            Trainer(stream.config, stream, settings(tmp_path / "run", **changes))
    with pytest.raises(ValueError, match="compile: got True with context_parallel"):
        TrainingConfig(output="x", steps=1, context_parallel=2, compile=True)
    with pytest.raises(ValueError, match="context_parallel: got 0"):
        TrainingConfig(output="x", steps=1, context_parallel=0)

    class Thirds:
        size, rank = 3, 0

    model = tiny()
    model.context = Thirds()
    with pytest.raises(ValueError, match="n = 6 on one of 3 processes that share a row, expected a multiple"):
        model(torch.zeros(1, 6, dtype=torch.int64))
    assert set(RUNS) == {"ddp", "fsdp", "context-ddp", "context-fsdp", "tensor"}
