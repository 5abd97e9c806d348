"""What the operating system refuses is a line and an exit code in every command, and text never commands a terminal."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest
import typer
from retrieval_common import database_of, write_texts
from typer.testing import CliRunner

from retro_kernels.cli import app
from retro_kernels.cli.db_common import printable, say_json, show_errors, show_progress
from retro_kernels.retrieval import Progress


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("errors")
    database_of(folder / "db")
    write_texts(folder / "texts.jsonl", ["some text"])
    (folder / "file").touch()
    return {"db": str(folder / "db"), "texts": str(folder / "texts.jsonl"), "under": str(folder / "file" / "below")}


@pytest.mark.parametrize("where", ["under", "/proc/nope"])
@pytest.mark.parametrize(
    "command",
    [
        ["build", "texts", "--out", "PLACE", "--tokenizer", "bytes", "--embedder", "none"],
        ["export", "db", "PLACE"],
        ["index", "PLACE"],
        ["info", "PLACE"],
        ["verify", "PLACE"],
        ["query", "PLACE", "words"],
        ["neighbours", "PLACE", "texts", "--out", "PLACE"],
        ["evaluate", "db", "--query-file", "PLACE"],
        ["import", "retro-pytorch", "PLACE", "--out", "PLACE"],
    ],
    ids=lambda command: command[0],
)
def test_what_the_system_refuses_is_one_line(places: dict[str, str], command: list[str], where: str):
    pytest.importorskip("pyarrow")
    given = [places.get(where, where) if word == "PLACE" else places.get(word, word) for word in command]
    done = CliRunner().invoke(app, ["db", *given])
    assert done.exit_code == 1, (done.output, done.exception)
    assert isinstance(done.exception, SystemExit)
    assert done.output.startswith("error: ")
    assert len(done.output.splitlines()) == 1


@pytest.mark.parametrize(
    ("number", "advice"), [(errno.EROFS, "can be written"), (errno.ENOSPC, "free space"), (errno.EACCES, "permission")]
)
def test_the_line_names_the_file_and_what_to_do(number: int, advice: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(typer.Exit) as left, show_errors(code=2):
        raise OSError(number, "No", "a/\x1b[31mfile")
    assert left.value.exit_code == 2
    said = capsys.readouterr().err
    assert said.startswith("error: a/\\x1b[31mfile: No: ")
    assert advice in said


def test_text_cannot_command_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert printable("a\x1b]0;title\x07\x9b\x7f\udcff\tb\nc é") == "a\\x1b]0;title\\x07\\x9b\\x7f\\udcff\tb\nc é"
    say_json({"text": "\x1b\x9b\udcff é"})
    said = capsys.readouterr().out
    assert json.loads(said) == {"text": "\x1b\x9b\udcff é"}
    assert not set(said) & set("\x1b\x9b")
    database = database_of(tmp_path / "\x1b[31mred", 3)
    shown = CliRunner().invoke(app, ["db", "info", str(database.folder / "nothing")])
    assert "\x1b[31m" not in shown.output


def test_the_index_command_gives_another_index(tmp_path: Path):
    """It had not been importable since a move of files."""
    database_of(tmp_path / "db", index=None)
    done = CliRunner().invoke(app, ["db", "index", str(tmp_path / "db"), "--index", "exact"])
    assert done.exit_code == 0, done.output
    assert "exact over" in done.output


def test_progress_in_a_pipe_is_a_line_at_the_start_and_one_at_the_end(capsys: pytest.CaptureFixture[str]):
    with show_progress() as report:
        for done in (0.1, 0.2, 1.0, 1.0):
            report(Progress("build", 3, 40, done, 10.0, 4.0))
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "build: 10%, 3 documents, 40 chunks, 10 chunks/s, 0:00:04 left",
        "build: 100%, 3 documents, 40 chunks, 10 chunks/s, 0:00:04 left",
    ]
