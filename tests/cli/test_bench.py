"""`retro-kernels bench` checks its options, prints one table, writes its files, and keeps what an interruption left."""

import html
import json
import sys

import pytest
from typer.testing import CliRunner

from retro_kernels.bench import bench, results, suite, tables, timing
from retro_kernels.cli import app
from retro_kernels.cli.bench import load

CEILINGS = timing.Ceilings(1e10, {"fp32": 1e11, "bf16": 2e11}, {"fp32": 1e11, "bf16": 2e11}, {})


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Ceilings are given, not measured. No figures are drawn:
    they take most of the time, and test_report.py has them."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(timing, "measure_ceilings", lambda *arguments: CEILINGS)


def invoke(tmp_path, *arguments):
    fixed = (
        "--out",
        str(tmp_path),
        "--device",
        "cpu",
        "--no-compile",
        "--no-real-text",
        "--workload",
        "tiny",
        "--seconds",
        "0",
    )
    if "--operation" not in arguments:
        fixed += ("--operation", "cca")
    return CliRunner().invoke(app, ["bench", *fixed, *arguments])


def test_writes_table_page_and_raw_numbers(tmp_path):
    result = invoke(tmp_path, "--dtype", "fp32")
    assert result.exit_code == 0, result.output
    assert "Chunked cross-attention" in result.output
    assert "report.html: tables, plots, and why" in result.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bench.json", "report.html", "table.md"]
    document = results.load(tmp_path / results.FILE)
    assert {row["mode"] for row in document["rows"]} == {"forward", "forward+backward"}
    assert {row["dtype"] for row in document["rows"]} == {"fp32"}
    environment = document["environment"]
    assert environment["packages"]["torch"]
    assert environment["torch_threads"] >= 1
    assert document["settings"]["seed"]
    assert {"what": "real text", "reason": "switched off for this run (--no-real-text)"} in document["skipped"]


def test_a_quick_run_ends_with_a_line_an_operation_and_the_place_of_the_report(tmp_path):
    """What was compared, how much faster, where the rest stands: no list of what was not timed, which the page has."""
    result = invoke(tmp_path, "--quick", "--dtype", "fp32", "--mode", "forward")
    assert result.exit_code == 0, result.output
    shown = result.output[result.output.index("How many times faster") :].splitlines()
    (line,) = [line.split() for line in shown if line.startswith("cca ")]
    assert line[:2] == ["cca", "tiny"]
    assert float(line[2].removesuffix("x")) > 0
    assert "report.html" in shown[-1]
    assert len(shown) <= 12
    document = results.load(tmp_path / results.FILE)
    reasons = [why for _, why in tables.not_timed(document)]
    assert reasons
    page = (tmp_path / "report.html").read_text()
    assert all(html.escape(why) in page for why in reasons)


def test_json_on_standard_output(tmp_path):
    result = invoke(tmp_path, "--dtype", "fp32", "--mode", "forward", "--json")
    document = json.loads(result.stdout)
    assert document["schema"] == results.SCHEMA
    assert {row["mode"] for row in document["rows"]} == {"forward"}


def test_every_operation_and_option(tmp_path):
    chosen = [x for name in ("cca", "encoder-self", "encoder-cross", "causal-self") for x in ("--operation", name)]
    chosen += [x for name in ("plain", "relative", "dropout") for x in ("--option", name)]
    result = invoke(tmp_path, *chosen, "--dtype", "fp32", "--mode", "forward", "--backend", "reference")
    assert result.exit_code == 0, result.output
    rows = results.load(tmp_path / results.FILE)["rows"]
    assert len({(row["operation"], row["option"]) for row in rows if row["status"] == "ok"}) == 12
    table = (tmp_path / "table.md").read_text()
    for title in ("Encoder self-attention", "Encoder cross-attention", "Causal self-attention", "relative positions"):
        assert title in table
        assert title in result.output


def test_interrupted_runs_write_what_is_there(tmp_path, monkeypatch):
    real = suite._case
    done = []

    def once(*arguments):
        if done:
            raise KeyboardInterrupt
        done.append(1)
        return real(*arguments)

    monkeypatch.setattr(suite, "_case", once)
    result = invoke(tmp_path, "--dtype", "fp32")
    assert result.exit_code == 130
    document = results.load(tmp_path / results.FILE)
    assert document["interrupted"]
    assert {row["mode"] for row in document["rows"]} == {"forward"}
    assert "Interrupted" in result.output


def test_a_wrong_kernel_fails_the_command(tmp_path, monkeypatch):
    import retro_kernels as rk

    real = rk.chunked_cross_attention

    def wrong(query, key, value, *, backend=None, **options):
        out = real(query, key, value, backend="reference", **options)
        return out if backend == "reference" else out + 1

    monkeypatch.setattr(rk, "chunked_cross_attention", wrong)
    states = {name: rk.BackendStatus(name in ("reference", "cpu"), "off") for name in ("reference", "cpu")}
    monkeypatch.setattr(rk, "backends", lambda: states)
    result = invoke(tmp_path, "--dtype", "fp32", "--mode", "forward")
    assert result.exit_code == 1
    assert "retro_kernels[cpu]: wrong" in result.output.replace("\n", " ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--workload", "nothing"), "unknown workload"),
        (("--operation", "nothing"), "unknown operation"),
        (("--option", "nothing"), "unknown option"),
        (("--mode", "nothing"), "expected forward or forward+backward"),
        (("--dtype", "int8"), "expected fp32, bf16 or fp16"),
        (("--seconds", "-1"), "seconds: got -1.0"),
        (("--minutes", "-1"), "minutes: got -1.0"),
        (("--text-length", "5000"), "expected 64 to 2048"),
        (("--text-length", "0"), "text length: got 0"),
        (("--dtype", "fp16"), "on a CPU"),
    ],
)
def test_bad_options_are_refused(tmp_path, arguments, message):
    result = invoke(tmp_path, *arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.output.replace("│", " ").split())


def test_quick_has_every_operation_and_lists_the_rest():
    options = bench.Options(quick=True, device="cpu").resolved()
    assert {case.operation for case in options.cases()} == {
        "cca",
        "encoder-self",
        "encoder-cross",
        "cca-layer",
        "cca-decode",
    }
    assert {case.option for case in options.cases()} >= {"plain", "relative"}
    assert any("retro-7.5b" in left for left in bench._untimed_cases(options))
    assert bench._untimed_cases(bench.Options(device="cpu").resolved()) == []
    assert options.dtypes == ["fp32", "bf16"]
    (case, *_) = options.cases()
    assert (case.operation, case.option) == ("cca", "plain")  # what the library is for comes first, should time run out
    assert bench._quick_skip(case, "fp32", "forward", "flex[folded]")
    assert bench._quick_skip(case, "fp32", "forward", "sdpa[flash]") is None


def test_a_limited_time_drops_the_largest_and_says_so(tmp_path):
    cases = bench.Options(device="cpu").cases()
    sizes = [case.on("cpu").with_option("plain").flops("forward") for case in cases if case.name == "encoder-4096"]
    assert cases[-1].on("cpu").flops("forward") >= max(sizes)
    result = invoke(tmp_path, "--dtype", "fp32", "--minutes", "0")
    assert result.exit_code == 0, result.output
    document = results.load(tmp_path / results.FILE)
    assert document["rows"] == []
    assert {"what": "cca plain tiny", "reason": "the time given to this run was used up"} in document["skipped"]


def test_suite_is_found_without_being_installed():
    assert hasattr(load("workloads"), "WORKLOADS")
