"""The rehearsal without a GPU: its page is what its committed results say, and its checks can fail."""

import json

import pytest

from benchmarks import rehearsal
from benchmarks.rehearsal import run


def test_the_page_is_generated_from_the_committed_results():
    """By `python -m benchmarks.rehearsal.run --page`."""
    assert run.PAGE.read_text() == run.page()


def test_the_committed_results_are_whole():
    """Their controls are among them, and all that is not shown is on the page."""
    page, found = run.PAGE.read_text(), run.committed()
    assert found
    for name, document in found.items():
        assert document["part"] == name
        assert document["versions"]["python"].startswith("3.")
        assert any("control" in row["operation"] + row["case"] for row in document["rows"])
        for row in document["rows"]:
            assert set(row) == {"part", "operation", "case", "shown", "ok", "detail", "seconds"}
            assert row["ok"] or f"NOT SHOWN: {row['operation']}, {row['case']}" in page


def test_a_part_says_what_it_could_not_show(tmp_path, monkeypatch, capsys):
    out = tmp_path / "rows.json"
    monkeypatch.setattr("sys.argv", ["part", "--out", str(out)])

    mask = {"is": ValueError("off by one")}

    def see():
        if isinstance(mask["is"], Exception):
            raise mask["is"]
        return mask["is"]

    def run_part():
        with rehearsal.main("a part", "") as part:
            part.check("cca", "plain", "right", lambda: "fine")
            part.check("cca", "mask", "right", see)

    with pytest.raises(SystemExit) as ended:
        run_part()
    assert ended.value.code == 1
    rows = json.loads(out.read_text())
    assert [(row["case"], row["ok"], row["detail"]) for row in rows] == [
        ("plain", True, "fine"),
        ("mask", False, "ValueError: off by one"),
    ]
    mask["is"] = "right now"  # and what was shown is not shown again
    with pytest.raises(SystemExit) as ended:
        run_part()
    assert ended.value.code == 0
    assert "plain" not in capsys.readouterr().out.split("1 of 2 shown")[1]
    assert [row["detail"] for row in json.loads(out.read_text())] == ["fine", "right now"]


def test_a_part_that_checks_nothing_fails(monkeypatch):
    monkeypatch.setattr("sys.argv", ["part"])
    with pytest.raises(SystemExit) as ended, rehearsal.main("a part", ""):
        pass
    assert ended.value.code == 1
