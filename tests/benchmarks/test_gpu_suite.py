"""The GPU suite runs from end to end on a CPU, and a part that breaks neither stops the rest nor goes unsaid."""

import functools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import emulator
import pytest
import torch

from benchmarks import gpu_checks, gpu_suite, results
from retro_kernels import cuda_extension

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def quick_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_reduced_suite(tmp_path):
    """Every part but the slowest to start, in its own process, as on a GPU."""
    said = []
    names = [name for name in gpu_suite.parts() if name not in ("real text", "correctness fp16")]
    code = gpu_suite.run(tmp_path / "out", reduced=True, only=names, say=said.append)
    document = results.load(tmp_path / "out" / results.FILE)
    statuses = {part["name"]: part["status"] for part in document["parts"]}
    assert code == 0, said
    assert statuses["machine"] == statuses["benchmarks"] == "ok"
    assert statuses["beyond 2^31 elements"] == "skipped"
    assert {entry["what"]: entry["reason"] for entry in document["skipped"]}["correctness bf16"]
    timed = [row for row in document["rows"] if row["status"] == "ok"]
    assert {row["variant"] for row in timed} >= {"eager", "sdpa[flash]"}
    assert any(row["variant"].startswith("retro_kernels") for row in timed)
    assert all(entry["status"] != "failed" for entry in document["checks"])
    files = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert len(files) <= 8
    assert {"bench.json", "log.txt", "report.html", "table.md"} <= set(files)
    assert "No part failed" in "\n".join(said)


def test_a_failing_part_is_said_and_the_rest_runs(tmp_path, monkeypatch):
    """Parts run in processes of their own: here stand-ins for them, one of which dies without a word."""
    script = (
        "import json,sys;"
        "a=dict(zip(sys.argv[1::2],sys.argv[2::2]));"
        "name=a['--part'];"
        "sys.exit(3) if name=='dies' else None;"
        "part={'name':name,'status':'failed' if name=='fails' else 'ok','detail':'d','seconds':1.0};"
        "open(a['--work']+'/'+name+'.json','w').write(json.dumps({'part':part}))"
    )

    def start(part, work, seconds, reduced):
        command = [gpu_suite.sys.executable, "-c", script, "--part", part.name, "--work", str(work)]
        return gpu_suite.subprocess.Popen(command)

    def nothing(context):
        return ""

    monkeypatch.setattr(gpu_suite, "_start", start)
    stages = tuple((gpu_suite.Part(name, nothing, 30),) for name in ("dies", "fails", "works"))
    monkeypatch.setattr(gpu_suite, "STAGES", stages)
    said = []
    assert gpu_suite.run(tmp_path, reduced=True, say=said.append) == 1
    parts = {part["name"]: part for part in json.loads((tmp_path / results.FILE).read_text())["parts"]}
    assert "ended with 3" in parts["dies"]["detail"]
    assert [parts[name]["status"] for name in ("dies", "fails", "works")] == ["failed", "failed", "ok"]
    assert "2 parts failed" in "\n".join(said)


KILLED = """
import signal, subprocess, sys
from pathlib import Path
from benchmarks import gpu_suite

PART = '''
import json, os, sys, time
file, parent = sys.argv[1], os.getppid()
for number in range(1000):
    checks = [{"check": str(i), "status": "ok", "detail": ""} for i in range(number + 1)]
    with open(file + ".new", "w") as stream:
        json.dump({"checks": checks}, stream)
    os.replace(file + ".new", file)
    print(number, flush=True)
    time.sleep(0.1)
    if os.getppid() != parent:
        break
'''

def start(part, work, seconds, reduced):
    return subprocess.Popen([sys.executable, "-c", PART, str(gpu_suite._file(work, part.name))])

gpu_suite._start = start
gpu_suite.STAGES = ((gpu_suite.Part("slow", None, 300),),)
signal.signal(signal.SIGTERM, gpu_suite._interrupt)
sys.exit(gpu_suite.run(Path(sys.argv[1]), reduced=True))
"""


@pytest.mark.parametrize("how", ["SIGKILL", "SIGTERM"])
def test_a_suite_that_is_killed_leaves_what_it_had(tmp_path, how):
    """At any time the results are a whole document, with every check but the last ones; SIGTERM also leaves the table
    and the report, and no process."""
    root = str(Path(__file__).resolve().parents[2])
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE, text=True,
                               env={**os.environ, "PYTHONPATH": root})  # fmt: skip
    for line in process.stdout:
        if line.strip() == "20":
            break
    time.sleep(1)
    process.send_signal(getattr(signal, how))
    process.wait(60)
    document = results.load(tmp_path / results.FILE)
    assert document["interrupted"] is True
    assert len(document["checks"]) >= 15
    assert document["parts"][-1]["name"] == "slow"
    if how == "SIGTERM":
        assert process.returncode == 1
        assert sorted(path.name for path in tmp_path.iterdir()) == ["bench.json", "log.txt", "report.html", "table.md"]


def test_a_part_whose_context_is_spoilt_goes_on_in_a_fresh_process(tmp_path, monkeypatch):
    """What was checked is kept and not checked again; the failure stays one."""
    made = []

    def part(context):
        return gpu_suite.checks(context, [(name, functools.partial(check, name)) for name in "abc"])

    def check(name):
        made.append(name)
        if name == "b":
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return "fine"

    monkeypatch.setattr(gpu_suite, "STAGES", ((gpu_suite.Part("p", part, 5),),))
    monkeypatch.setattr(gpu_suite, "alive", lambda context: False)
    statuses = []
    for _ in range(2):
        gpu_suite.run_part("p", tmp_path, 5.0, True)
        found = json.loads((tmp_path / "p.json").read_text())
        statuses.append(found["part"]["status"])
    assert statuses == ["again", "failed"]
    assert made == ["a", "b", "c"]
    assert [entry["status"] for entry in found["checks"]] == ["ok", "failed", "ok"]


def test_the_limit_counts_from_the_start_of_the_process():
    code = "import time; time.sleep(0.5); from benchmarks import gpu_suite; print(gpu_suite.since_start())"
    began = time.monotonic()
    root = str(Path(__file__).resolve().parents[2])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                          env={**os.environ, "PYTHONPATH": root})  # fmt: skip
    assert 0.45 <= float(done.stdout) <= time.monotonic() - began + 0.05


def test_compiled_calls_are_judged_by_the_error_rule(monkeypatch):
    """The case may have values of another size than its keys, and a compiler's other rounding is no fault."""
    case = gpu_checks.Case("", b=1, n=37, m=8, k=2, r=8, h=2, hk=1, d=32, d_value=16, options=gpu_checks.EVERY)
    for dtype in ("fp32", "bf16"):
        assert "fullgraph" in gpu_checks.check_compiled(case, CPU, "cpu", "aot_eager", dtype)
    real = gpu_checks.torch.compile

    def wrong(function, **options):
        compiled = real(function, **options)
        return lambda *leaves: compiled(*leaves) * 1.001

    monkeypatch.setattr(gpu_checks.torch, "compile", wrong)
    with pytest.raises(gpu_checks.Wrong, match="of the compiled call"):
        gpu_checks.check_compiled(case, CPU, "cpu", "aot_eager", "fp32")


def test_a_part_that_raises_leaves_its_reason(tmp_path, monkeypatch):
    def broken(context):
        context.add("rows", {"kept": 1})
        raise ValueError("sticky")

    monkeypatch.setattr(gpu_suite, "STAGES", ((gpu_suite.Part("broken", broken, 5),),))
    gpu_suite.run_part("broken", tmp_path, 5.0, True)
    found = json.loads((tmp_path / "broken.json").read_text())
    assert found["part"]["status"] == "failed"
    assert "sticky" in found["part"]["detail"]
    assert found["rows"] == [{"kept": 1}]


def test_checks_go_on_after_a_failure_and_stop_at_the_deadline(tmp_path):
    def wrong():
        raise gpu_checks.Wrong("off by one")

    context = gpu_suite.Context(True, gpu_suite.time.monotonic() + 60, tmp_path / "c.json", {})
    with pytest.raises(RuntimeError, match="1 of 2"):
        gpu_suite.checks(context, [("a", wrong), ("b", lambda: "fine")])
    assert [entry["status"] for entry in context.found["checks"]] == ["failed", "ok"]
    late = gpu_suite.Context(True, 0.0, tmp_path / "l.json", {})
    with pytest.raises(TimeoutError, match="0 of 1"):
        gpu_suite.checks(late, [("a", lambda: "fine")])


@pytest.mark.parametrize("case", gpu_checks.cases(reduced=False), ids=lambda case: case.name)
def test_cases_are_valid_calls(case):
    """Every case of the full suite is accepted and its reference agrees with itself (shrunk where that is free)."""
    small = gpu_checks.Case(**{**vars(case), "b": 1, "h": 2, "hk": 1 if case.hk < case.h else 2})
    if case.r > 1000:
        small = gpu_checks.replace(small, r=200)
    found = gpu_checks.check_case(small, "fp32", CPU, "reference")
    assert "largest error" in found


def test_checks_see_faults(monkeypatch):
    """A backend that misplaces one token fails the error rule; one that writes past its outputs fails the guards."""
    case = gpu_checks.cases(reduced=True)[0]
    real = gpu_checks.call

    def shifted(case, arguments, grad_out, backend):
        results = real(case, arguments, grad_out, "reference")
        if backend == "faulty":
            results["output"] = results["output"].roll(1, dims=1)
        return results

    monkeypatch.setattr(gpu_checks, "call", shifted)
    with pytest.raises(gpu_checks.Wrong, match="output: error"):
        gpu_checks.check_case(case, "fp32", CPU, "faulty")

    def changing(case, arguments, grad_out, backend):
        return {"output": torch.rand(3)}

    monkeypatch.setattr(gpu_checks, "call", changing)
    with pytest.raises(gpu_checks.Wrong, match="differs in trial"):
        gpu_checks.check_deterministic(case, "fp32", CPU, "faulty", 3)
    with pytest.raises(gpu_checks.Wrong, match="NaN surrounds"):
        gpu_checks.check_guard_bands(case, "fp32", CPU, "faulty")


def test_a_write_past_the_end_is_seen(monkeypatch):
    common = __import__("retro_kernels.ops.common", fromlist=["common"])

    def overrun(case, arguments, grad_out, backend):
        out = common.allocate((4,), torch.float32, CPU)
        if out.storage_offset():  # within guard bands
            out.as_strided((5,), (1,), out.storage_offset()).fill_(1.0)
        return {"output": torch.zeros(1)}

    monkeypatch.setattr(gpu_checks, "call", overrun)
    with pytest.raises(gpu_checks.Wrong, match="guard band"):
        gpu_checks.check_guard_bands(gpu_checks.cases(reduced=True)[0], "fp32", CPU, "faulty")


@pytest.mark.parametrize("operation", ["cca", "self", "cross"])
def test_dropout_mask_check_sees_one_other_slot(operation, monkeypatch):
    """The check passes on the reference itself and fails when a single probability more is dropped."""
    case = gpu_checks.Case("", operation, b=1, n=21, m=8, r=16, h=2, hk=1, d=16)
    detail = gpu_checks.check_dropout_mask(case, CPU, "reference")
    assert "the same kept" in detail
    share = float(detail.split("(")[1].split()[0])
    assert 0.5 < share < 0.85  # 0.75 of the slots of rows that attend
    real, calls = gpu_checks.call, []

    def other(*arguments):
        results = real(*arguments)
        calls.append(1)
        if len(calls) == 2:
            results["output"] = results["output"].contiguous()
            flat = results["output"].view(-1)
            flat[flat.nonzero()[0]] = 0.0
        return results

    monkeypatch.setattr(gpu_checks, "call", other)
    with pytest.raises(gpu_checks.Wrong, match="1 of "):
        gpu_checks.check_dropout_mask(case, CPU, "reference")


def test_every_kernel_is_exercised_for_the_sanitizer():
    assert "20 calls" in gpu_checks.exercise(CPU, "reference")


def test_every_cuda_kernel_is_exercised_for_the_sanitizer():
    """In the emulator, forward and backward, every head size, dtype and form of the sm_80 kernels, and decoding."""
    if emulator.compiler() is None or not emulator.SOURCES.exists():
        pytest.skip("there is no C++ compiler, or this is not a source tree")
    cuda_extension.emulate(emulator.build())
    try:
        assert "42 calls" in gpu_checks.exercise(CPU, "cuda")
    finally:
        cuda_extension.emulate(None)


def test_a_sanitizer_that_finds_something_fails_its_part(tmp_path, monkeypatch):
    """With a stand-in for the program: its exit code and its summary are what the part reports."""
    monkeypatch.setattr(gpu_suite, "backend_of", lambda context, name: name)
    monkeypatch.setattr(gpu_suite.shutil, "which", lambda name, path=None: str(tmp_path / name))
    program = tmp_path / "compute-sanitizer"

    def run(code):
        program.write_text(f"#!/bin/sh\necho '========= ERROR SUMMARY: {code} errors'\nexit {code}\n")
        program.chmod(0o755)
        context = gpu_suite.Context(False, gpu_suite.time.monotonic() + 30, tmp_path / "s.json", {})
        return gpu_suite.sanitized("memcheck")(context)

    assert run(0) == "ERROR SUMMARY: 0 errors"
    with pytest.raises(RuntimeError, match="memcheck: ERROR SUMMARY: 9 errors"):
        run(9)
    monkeypatch.setattr(gpu_suite.shutil, "which", lambda name, path=None: None)
    with pytest.raises(gpu_suite.Skip, match="not installed"):
        run(0)


def test_command_line(capsys):
    assert gpu_suite.main(["--list"]) == 0
    assert "benchmarks" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        gpu_suite.main(["--only", "nothing"])


def test_the_cuda_parts_run_in_the_emulator(tmp_path, monkeypatch):
    """What a GPU will run, on tiny shapes: the CUDA C++ kernels' correctness and execution, without a failure."""
    if emulator.compiler() is None or not emulator.SOURCES.exists():
        pytest.skip("there is no C++ compiler, or this is not a source tree")
    monkeypatch.setenv(gpu_suite.EMULATOR, str(emulator.build()))
    said = []
    names = ["cuda correctness bf16", "cuda decoding", "cuda absorbing"]
    assert gpu_suite.run(tmp_path / "out", reduced=True, only=names, say=said.append) == 0, said
    document = results.load(tmp_path / "out" / results.FILE)
    assert {part["name"]: part["status"] for part in document["parts"]} == dict.fromkeys(names, "ok")
    assert {entry["status"] for entry in document["checks"]} == {"ok"}


def test_the_cuda_cases_are_of_every_kind():
    cases = gpu_checks.cuda_cases(reduced=False)
    assert len({case.name for case in cases}) == len(cases) >= 25
    assert {case.d for case in cases} == {64, 96, 128}
    assert {case.operation for case in cases} == {"cca", "self", "cross"}
    for case in cases:
        assert set(case.options) <= set(gpu_checks.CUDA_TAKES)


def test_the_extension_is_taken_out_of_a_wheel(tmp_path, monkeypatch):
    monkeypatch.setenv(gpu_suite.LIBRARY, "")
    for name, content in (("good", {"retro_kernels/_cuda.abi3.so": b"library"}), ("bad", {"other": b""})):
        with gpu_suite.zipfile.ZipFile(tmp_path / f"{name}.whl", "w") as archive:
            for file, data in content.items():
                archive.writestr(file, data)
    gpu_suite.prepare_extension(tmp_path / "good.whl", tmp_path / "out", True, print)
    assert gpu_suite.Path(gpu_suite.os.environ[gpu_suite.LIBRARY]).read_bytes() == b"library"
    with pytest.raises(ValueError, match="RETRO_KERNELS_BUILD_CUDA=1"):
        gpu_suite.prepare_extension(tmp_path / "bad.whl", tmp_path / "out", True, print)


def test_where_nvcc_is_found_is_left_to_setup_py(tmp_path, monkeypatch):
    """It looks among pip's packages and in /usr/local/cuda too; where there is none, its reason is said."""
    said, root = [], gpu_suite.Path(gpu_suite.__file__).resolve().parents[1]

    def run(command, **options):
        assert command[1:] == [str(root / "setup.py"), "build_ext", "--inplace"]
        assert options["env"]["RETRO_KERNELS_BUILD_CUDA"] == "1"
        return gpu_suite.subprocess.CompletedProcess(command, 1, "", "there is no nvcc anywhere")

    monkeypatch.setattr(cuda_extension, "LIBRARY", tmp_path / "absent.so")
    monkeypatch.setattr(gpu_suite.shutil, "which", lambda name: None)
    monkeypatch.setattr(gpu_suite.subprocess, "run", run)
    gpu_suite.prepare_extension(None, tmp_path, False, said.append)
    assert "there is no nvcc anywhere" in said[-1]
