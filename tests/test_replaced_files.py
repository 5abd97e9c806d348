"""Files are replaced whole or not at all, in one place; of several writers none loses what another wrote."""

from __future__ import annotations

import ast
import os
import threading
import time
from pathlib import Path

import pytest

from retro_kernels import files
from retro_kernels.ops import tuning

ROOT = Path(__file__).resolve().parents[1]


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    files.write_bytes(path, b"old")

    def fail_halfway():
        with files.replaced(path) as temporary:
            temporary.write_bytes(b"ne")
            assert path.read_bytes() == b"old"
            raise RuntimeError("half")

    with pytest.raises(RuntimeError, match="half"):
        fail_halfway()
    assert path.read_bytes() == b"old"
    assert [x.name for x in tmp_path.iterdir()] == ["file"]
    with files.replaced(path, concurrent=True) as mine:
        assert str(os.getpid()) in mine.name
        mine.write_bytes(b"new")
    assert path.read_bytes() == b"new"
    assert [x.name for x in tmp_path.iterdir()] == ["file"]


def test_content_is_on_the_disk_before_the_name_and_the_name_before_it_returns(tmp_path, monkeypatch):
    steps = []
    rename, sync = os.replace, os.fsync
    monkeypatch.setattr(os, "replace", lambda a, b: (steps.append("rename"), rename(a, b)))
    monkeypatch.setattr(os, "fsync", lambda number: (steps.append("sync"), sync(number)))
    files.write_json(tmp_path / "x.json", {"b": 1, "a": 2})
    assert steps == ["sync", "rename", "sync"]
    assert (tmp_path / "x.json").read_text() == '{\n "a": 2,\n "b": 1\n}\n'
    with pytest.raises(ValueError, match="JSON"):
        files.write_json(tmp_path / "x.json", float("nan"))


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_lock_is_held_by_one(tmp_path, kind):
    path = tmp_path if kind == "folder" else tmp_path / "lock"
    with files.lock(path, wait=False), pytest.raises(BlockingIOError), files.lock(path, wait=False):
        pass
    with files.lock(path, wait=True):
        pass


def test_tunings_that_are_saved_at_once_are_all_kept(tmp_path, monkeypatch):
    path, load = tmp_path / "tuning.json", tuning.load
    monkeypatch.setattr(tuning, "load", lambda path=None: (load(path), time.sleep(0.01))[0])
    threads = [threading.Thread(target=tuning.save, args=(f"key {i}", {"settings": i}, path)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(load(path)) == [f"key {i}" for i in range(4)]


def test_files_are_renamed_in_one_place():
    """Everything else calls `files.replaced` or `files.move`, which sync what they rename."""
    found = []
    for folder in ("retro_kernels", "benchmarks"):
        for path in (ROOT / folder).rglob("*.py"):
            text = path.read_text()
            for node in ast.walk(ast.parse(text)) if "os.re" in text else ():
                if isinstance(node, ast.Attribute) and ast.unparse(node) in ("os.replace", "os.rename"):
                    found.append(path.relative_to(ROOT).as_posix())
    assert found == ["retro_kernels/files.py"]
