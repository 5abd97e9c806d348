"""`retro-kernels db info` and `db verify` on a whole, a damaged and an absent database."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from typer.testing import CliRunner

from retro_kernels.cli import app
from retro_kernels.retrieval import ShardWriter, finish_database


def test_info_and_verify(tmp_path: Path):
    folder = tmp_path / "db"
    writer = ShardWriter(folder, 0, chunk_size=4)
    writer.add(np.arange(9), np.arange(3), path="a.txt")
    entry = writer.commit()
    finish_database(folder, 1, chunk_size=4, tokenizer={"name": "letters"})
    run = CliRunner()
    shown = run.invoke(app, ["db", "info", str(folder)])
    assert shown.exit_code == 0
    assert "3 of 4 tokens (uint16)" in shown.output
    assert "letters" in shown.output
    checked = run.invoke(app, ["db", "verify", str(folder)])
    assert checked.exit_code == 0
    assert "every checksum and count holds" in checked.output
    tokens = folder / entry["files"]["tokens"]["path"]
    tokens.write_bytes(bytes(tokens.stat().st_size))
    damaged = run.invoke(app, ["db", "verify", str(folder)])
    assert damaged.exit_code == 1
    assert "tokens: altered" in damaged.output
    absent = run.invoke(app, ["db", "info", str(tmp_path / "nothing")])
    assert absent.exit_code == 1
    assert "no finished retrieval database" in absent.output
