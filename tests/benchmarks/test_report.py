"""Results survive being written and read, tables say what the numbers say, and the README's table cannot go stale."""

import json
import re
import sys

import pytest

from retro_kernels.bench import report, results, tables


def row(
    variant,
    p50,
    *,
    workload="retro-172m",
    dtype="bf16",
    mode="forward",
    status="ok",
    reason=None,
    memory=1e6,
    operation="cca",
    option="plain",
):
    timed = status == "ok"
    return {
        "operation": operation,
        "option": option,
        "workload": workload,
        "shape": "b=1",
        "dtype": dtype,
        "mode": mode,
        "variant": variant,
        "status": status,
        "reason": reason,
        "p20_ms": p50 * 0.9 if timed else None,
        "p50_ms": p50 if timed else None,
        "p80_ms": p50 * 1.2 if timed else None,
        "samples": 5,
        "cuda_graph": False,
        "tflops": 1.0 / p50 if timed else None,
        "gigabytes_per_second": 20.0 / p50 if timed else None,
        "limit_ms": 1.0,
        "percent_of_limit": 100 / p50 if timed else None,
        "bound": "memory",
        "flops": 10**9,
        "bytes": 2 * 10**7,
        "peak_extra_bytes": memory,
        "checked": "every element",
        "errors": [{"name": "output", "largest": 1e-3, "relative": 1e-3, "cosine": 1.0, "worst": [0]}] if timed else [],
    }


@pytest.fixture
def document():
    environment = {
        "date": "2026-01-01 00:00 UTC",
        "commit": "abc",
        "packages": {"torch": "2.13.0"},
        "device": "a <CPU>",
        "device_slug": "a-cpu",
    }
    made = results.new(environment, {"quick": True})
    made["ceilings"] = {
        "copy_bytes_per_second": 2e10,
        "matrix_flops_per_second": {"bf16": 1e12},
        "matrix_product_flops_per_second": {"bf16": 1e12},
        "multiply_add_flops_per_second": {},
    }
    made["rows"] = [
        row("eager", 12.0, memory=8e6),
        row("sdpa[math]", 9.0),
        row("sdpa[flash]", 6.0, memory=4e6),
        row("compile[sdpa]", 0.0, status="skipped", reason="compile exceeded 20 s"),
        row("flex[folded]", 0.0, status="wrong", reason="output: error"),
        row("retro_kernels[cpu]", 2.0, memory=2e6),
    ]
    swapped = {"p20_ms": 1.0, "p50_ms": 2.0, "p80_ms": 3.0, "samples": 4, "peak_extra_bytes": 5e6}
    made["real_text"] = {
        "model": "retro-pytorch",
        "parameters": 12345,
        "length": 64,
        "device": "cpu",
        "finished": True,
        "description": {"text": "plays"},
        "swap": "swap: 4 replaced",
        "swapped": "4 decoder cross-attentions",
        "notes": ["dropout 0"],
        "comparisons": [
            {
                "dtype": "fp32",
                "rule": "close",
                "passed": True,
                "worst": "x: 1e-7",
                "loss_original": 1.5,
                "loss_swapped": 1.5,
                "tensors": 7,
            }
        ],
        "rows": [
            {"dtype": "fp32", "stage": "training step", "variant": "retro-pytorch", **swapped, "p50_ms": 3.0},
            {"dtype": "fp32", "stage": "training step", "variant": "retro-pytorch + rk.swap", **swapped},
        ],
    }
    made["skipped"] = [{"what": "everything else", "reason": "quick"}]
    made["seconds"] = 1.0
    return made


def test_round_trip(document, tmp_path):
    path = tmp_path / "deep" / results.FILE
    results.save(document, path)
    assert results.load(path) == document
    assert [p.name for p in path.parent.iterdir()] == [results.FILE]


def test_a_failed_write_leaves_the_old_results(document, tmp_path):
    path = tmp_path / results.FILE
    results.save(document, path)
    with pytest.raises(ValueError, match="JSON"):
        results.save({**document, "seconds": float("nan")}, path)
    assert results.load(path) == document
    assert [p.name for p in tmp_path.iterdir()] == [results.FILE]


def test_another_schema_is_refused(document, tmp_path):
    path = tmp_path / results.FILE
    path.write_text(json.dumps({**document, "schema": 99}))
    with pytest.raises(ValueError, match="got schema 99, expected 2"):
        results.load(path)


def test_a_table_gives_every_page_that_its_document_gives(document, tmp_path, monkeypatch):
    """Only each row's errors are fewer: the table keeps the largest."""
    document["rows"][0] |= {"cache_bytes": 5, "chosen": True, "predicted_ms": 0.1 + 0.2, "cuda_graph": True}
    results.save(document, tmp_path / "x.csv")
    lines = (tmp_path / "x.csv").read_text().splitlines()
    assert len(lines) == len(document) - 1 + 1 + len(document["rows"])
    table = results.load(tmp_path / "x.csv")
    assert report.markdown(table) == report.markdown(document)
    assert report.readme_markdown(table) == report.readme_markdown(document)
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # figures take seconds
    assert report.page(table) == report.page(document).replace("output 1e-03", "largest 1e-03")
    rates = ("tflops", "gigabytes_per_second", "limit_ms", "percent_of_limit")
    for found, given in zip(table["rows"], document["rows"]):
        if given["status"] == "ok":
            assert [found[name] for name in rates] == pytest.approx([given[name] for name in rates], rel=1e-8)
    first = table["rows"][0]
    assert (first["cache_bytes"], first["chosen"], first["cuda_graph"]) == (5, True, True)
    assert first["predicted_ms"] == pytest.approx(0.3, rel=1e-9)
    assert table["rows"][3]["reason"] == "compile exceeded 20 s"
    assert table["rows"][3]["p50_ms"] is None


def test_the_committed_pages_are_what_the_committed_tables_say(capsys):
    assert report.main(["--check"]) == 0, capsys.readouterr().out


def test_compact_json_is_json_with_short_values_on_one_line():
    value = {"name": "x" * 100, "rows": [{"step": i, "values": list(range(30))} for i in range(3)], "none": None}
    text = results.compact_json(value).decode()
    assert json.loads(text) == value
    assert len(text.splitlines()) == 2 + 2 + 2 + 3


def test_summary_takes_the_fastest_that_was_right(document):
    ((title, rows),) = tables.sections(document)
    head, (cells,), left = tables.section_cells(document, rows)
    assert (title, left) == ("Chunked cross-attention", 3)
    shown = dict(zip(head, cells))
    assert shown["ours ms"] == "2.00"
    assert shown["SDPA ms"] == "6.00"
    assert shown["comp. ms"] == "-"
    assert (shown["vs SDPA"], shown["vs eager"], shown["vs comp."]) == ("3.00x", "6.00x", "-")
    assert (shown["limit"], shown["MB"], shown["SDPA MB"]) == ("50%", "2.00", "4.00")


def test_a_speedup_is_over_the_fastest_alternative_of_all(document):
    (line,) = tables.speedups(document)
    assert line["times"] == {("bf16", "forward"): 3.0}
    assert line["against"] == ["sdpa[flash]"]
    document["rows"].append(row("compile[eager]", 1.0))
    head, (cells,) = tables.speedup_cells(document)
    assert dict(zip(head, cells)) == {
        "operation": "cca",
        "workload": cells[1],
        "bf16\nfwd": "0.50x",
        "against": "compile",
    }


def test_options_have_a_section_that_tells_their_cost(document):
    other = {"operation": "encoder-cross", "option": "relative", "workload": "encoder-896"}
    document["rows"] += [
        row("eager", 9.0, **other),
        row("sdpa[flash rows]", 6.0, **other),
        row("retro_kernels[cpu]", 2.5, **other),
        row("retro_kernels[cpu] without", 2.0, **other),
    ]
    _, (title, rows) = tables.sections(document)
    assert title == "With the paper's relative positions, with u and v"
    head, (cells,), left = tables.section_cells(document, rows)
    shown = dict(zip(head, cells))
    assert cells[:left] == ["encoder-cross", "encoder-896", "bf16", "fwd"]
    assert (shown["ours ms"], shown["without"], shown["costs"]) == ("2.50", "2.00", "+25%")
    assert shown["vs SDPA"] == "2.40x"
    page = report.page(document)
    assert page.count("<svg") == 6
    assert "With the paper&#x27;s relative positions" in page


def test_a_fused_backend_stands_before_the_reference(document):
    document["rows"].append(row("retro_kernels[reference]", 0.5))
    assert tables.summary(document)[0]["ours"]["variant"] == "retro_kernels[cpu]"


def test_what_was_not_timed_is_listed_with_its_reason(document):
    listed = dict(tables.not_timed(document))
    assert listed["compile[sdpa] (everywhere)"] == "compile exceeded 20 s"
    assert listed["flex[folded] (everywhere)"] == "wrong: output: error"
    assert listed["everything else"] == "quick"


def test_page_is_self_contained(document):
    page = report.page(document)
    assert page.count("<svg") == 4  # swap, speed, roofline, memory
    assert "a &lt;CPU&gt;" in page
    assert not re.search(r"""(src|href)=["']?https?:""", page)
    assert "currentColor" in page
    assert "compile exceeded 20 s" in page
    assert "4 decoder cross-attentions" in page
    ids = re.findall(r'<clipPath id="([^"]+)"', page)
    assert len(ids) == len(set(ids))


def test_page_of_an_interrupted_run_says_so(document):
    document.update(rows=[], real_text=None, ceilings=None, interrupted=True)
    assert "interrupted" in report.page(document)


def test_no_figures_without_matplotlib(document, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    page = report.page(document)
    assert "<svg" not in page
    assert "No figure" in page


def test_readme_table_is_generated_and_checked(document, tmp_path, capsys):
    results.save(document, tmp_path / results.FILE)
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- results:begin -->\ntyped by hand\n<!-- results:end -->\nafter\n")
    assert report.main([str(tmp_path / results.FILE), "--add", "--root", str(tmp_path)]) == 0
    assert report.main(["--check", "--root", str(tmp_path)]) == 1
    assert "benchmarks/results/a-cpu.md, README.md: not what the results say" in capsys.readouterr().out
    assert report.main(["--readme", "--root", str(tmp_path)]) == 0
    text = readme.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "typed by hand" not in text
    assert "benchmarks/results/a-cpu.csv" in text
    assert "training step" not in text
    assert "benchmarks/results/a-cpu.md" in text
    assert (tmp_path / "benchmarks" / "results" / "a-cpu.md").read_text() == report.markdown(document)
    assert report.main(["--check", "--root", str(tmp_path)]) == 0


def test_the_readme_shows_one_table_and_the_page_all_of_them(document):
    step = {"mode": "forward+backward", "workload": "retro-7.5b"}
    document["rows"] += [
        row("sdpa[flash]", 9.0, **step),
        row("eager", 7.0, **step),
        row("retro_kernels[cpu]", 2.0, **step),
        row("retro_kernels[cpu]", 2.0, **step | {"workload": "gqa-8b"}),
        row("retro_kernels[cpu]", 2.0, option="dropout", **step),
        row("retro_kernels[cpu]", 2.0, operation="encoder-self", workload="encoder-896"),
        row("retro_kernels[cpu absorb]", 2.0, operation="cca-layer"),
    ]
    short, whole = report.readme_markdown(document), report.markdown(document)
    line = "| Chunked cross-attention | retro-7.5b | bf16 | 2.00 | 9.00 | - | 7.00 | 3.50x |"
    assert line in short
    assert short.count("| bf16 |") == 1
    for text in ("gqa-8b", "dropout 0.1", "Encoder self-attention", "The layer:"):
        assert text in whole, text
        assert text not in short, text


def test_scratch_memory_is_shown_and_compared_at_the_whole_length(document):
    """It stands in place of the peak, which older results have alone."""
    common = {"operation": "cca-projected", "workload": "retro-7.5b", "mode": "forward+backward"}
    made = {**row("retro_kernels[cpu materialise]", 4.0, memory=9e6, **common), "strategy": "materialise"}
    absorbed = {**row("retro_kernels[cpu absorb]", 2.0, memory=3e6, **common), "strategy": "absorb"}
    made["chosen"], absorbed["chosen"] = False, True
    old = tables.section_cells(document, [made, absorbed])
    shown = dict(zip(old[0], old[1][0]))
    assert (shown["MB K, V"], shown["MB abs."]) == ("9.00", "3.00")
    assert not any(name.startswith("scratch") for name in old[0])
    assert "Scratch" not in tables.remark([made, absorbed])

    made |= {"scratch_bytes": 8 * 10**6, "whole_scratch_bytes": 600 * 10**6}
    absorbed |= {"scratch_bytes": 10**6, "whole_scratch_bytes": 50 * 10**6}
    new = tables.section_cells(document, [made, absorbed])
    shown = dict(zip(new[0], new[1][0]))
    assert (shown["scratch K, V"], shown["scratch abs."]) == ("8.00", "1.00")
    assert not any(name.startswith("MB") for name in new[0])
    assert "retro-7.5b: bf16 fwd+bwd 600 and 50.0 MB (12.0x)." in tables.remark([made, absorbed])


def test_a_readme_without_marks_is_refused(document, tmp_path, capsys):
    (tmp_path / "README.md").write_text("nothing\n")
    assert report.main(["--readme", "--root", str(tmp_path)]) == 2
    assert "<!-- results:begin -->" in capsys.readouterr().err


def test_non_finite_numbers_become_text():
    assert results.finite({"a": [float("inf"), 1.0]}) == {"a": ["inf", 1.0]}


def test_a_gpu_s_tables_tell_what_eager_calls_take_beside_graphs(document):
    """Through the CSV that is committed, too; a CPU's tables have no such columns."""
    assert not any("wall" in name for name in tables.section_cells(document, document["rows"])[0])
    for row in document["rows"]:
        row |= {"cuda_graph": True, "wall_ms": 1.25}
    again = results.from_csv(results.to_csv(document))
    for made in (document, again):
        head, cells, _ = tables.section_cells(made, tables.sections(made)[0][1])
        assert head[-2:] == tables.WALL_HEAD
        assert cells[0][-2] == "1.25"
        assert all(len(row) == len(head) for row in cells)
        assert "Wall:" in tables.legend(tables.sections(made)[0][1])
