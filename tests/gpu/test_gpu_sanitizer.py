"""NVIDIA's compute-sanitizer over every kernel (`sanitized.py`): memcheck, racecheck, initcheck.

racecheck does not understand every way of waiting for Hopper's copy engine: it reports hazards in kernels of NVIDIA's
own (github.com/NVIDIA/cutlass/issues/2626). So what it reports is judged by kernel: ALLOWED names those whose reports
are no verdict, each with its reason, and what was allowed is said. Everything else fails.
"""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import gpu_problems as problems
import pytest
import sanitized

ROOT = Path(__file__).resolve().parents[2]


@dataclasses.dataclass(frozen=True)
class Allowed:
    """Kernels whose reports are no verdict. `control`: of racecheck alone, and only where it reports a kernel of
    NVIDIA's own in the same run, with copies and barriers of the same kind; where it understands that one, it is to be
    believed."""

    kernel: str
    reason: str
    control: bool = False


OTHERS = r"at::native|at_cuda_detail|cub::|cutlass|cublas|nvjet|gemm|gemv|xmma"
CONTROL = r"cutlass|nvjet"  # kernels of NVIDIA's that use the copy engine
ALLOWED = (
    Allowed(OTHERS, "a kernel of cuBLAS or of torch, none of ours"),
    Allowed(
        r"\bretro_kernels::sm90::", "boxes of the copy engine and mbarriers, which the tool misreads", control=True
    ),
)
# What begins a report, and what names a kernel in it. All that memcheck finds counts.
REPORTS = {
    "racecheck": (r"(Error|Warning): Race reported", r"access at (.+?)\+0x[0-9a-f]+"),
    "initcheck": (r"Uninitialized ", r"\bat (.+?)\+0x[0-9a-f]+"),
}


@dataclasses.dataclass
class Verdict:
    faults: list[str]
    allowed: dict[str, int]


def reports_of(tool: str, output: str) -> list[tuple[str, list[str]]]:
    """(a report's text, the kernels that it names) of what the tool printed."""
    begins, kernel = REPORTS[tool]
    found: list[list[str]] = []
    for line in output.splitlines():
        text = line.removeprefix("=========").strip()
        if not line.startswith("========="):
            continue
        if re.match(begins, text):
            found.append([text])
        elif found and re.match(r"(and|at) ", text):
            found[-1].append(text)
    return [(" ".join(report), re.findall(kernel, " ".join(report))) for report in found]


def judge(tool: str, output: str, code: int) -> Verdict:
    """What of a run counts against the kernels. A run without a summary proves nothing, and fails."""
    summary = [line for line in output.splitlines() if re.search(r"(ERROR|RACECHECK) SUMMARY", line)]
    if not summary:
        return Verdict([f"exit code {code} and no summary: {output[-1500:]}"], {})
    if tool not in REPORTS:
        return Verdict([f"{summary[-1].strip('= ')}: {output[-3000:]}"] if code else [], {})
    verdict, reports = Verdict([], {}), reports_of(tool, output)
    control = any(re.search(CONTROL, kernel) for _, kernels in reports for kernel in kernels)
    for text, kernels in reports:
        reasons = [
            next((x.reason for x in ALLOWED if re.search(x.kernel, kernel) and _counts(x, tool, control)), None)
            for kernel in kernels
        ]
        if not kernels or None in reasons:
            verdict.faults.append(text)
        else:
            verdict.allowed[reasons[0]] = verdict.allowed.get(reasons[0], 0) + 1
    if code and not reports:
        verdict.faults.append(f"exit code {code}: {output[-3000:]}")
    return verdict


def _counts(allowed: Allowed, tool: str, control: bool) -> bool:
    return not allowed.control or (tool == "racecheck" and control)


def sanitizer() -> str | None:
    places = os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer"])
    return shutil.which("compute-sanitizer", path=places)


@pytest.mark.gpu
@pytest.mark.sanitizer
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck"])
def test_sanitizer(tool, target, record_property):
    program = sanitizer()
    if not problems.ON_GPU or program is None:
        pytest.skip("needs a CUDA device and compute-sanitizer, which is part of the CUDA toolkit")
    command = [program, "--tool", tool, "--error-exitcode", "9", "--launch-timeout", "120"]
    # No filter by kernel: what a kernel that is left out has written would be unwritten to initcheck.
    command += ["--print-limit", "100000", *(["--racecheck-report", "analysis"] if tool == "racecheck" else [])]
    command += [sys.executable, str(ROOT / "tests" / "gpu" / "sanitized.py"), target.name]
    command += ["--control"] if tool == "racecheck" else []
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    # torch's caching allocator would hide what lies beyond a tensor.
    variables = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONPATH": path}
    done = subprocess.run(command, env=variables, capture_output=True, text=True)
    verdict = judge(tool, done.stdout + done.stderr, done.returncode)
    if f"calls of {target}" not in done.stdout:
        verdict.faults.append(f"the program did not reach its end: {(done.stdout + done.stderr)[-3000:]}")
    for reason, count in verdict.allowed.items():
        record_property("allowed", f"{count} reports: {reason}")
    assert not verdict.faults, "\n".join(verdict.faults)[:6000]


def test_every_kernel_is_called_under_the_sanitizer(capsys):
    """The program itself, on the CPU's kernels; and what it would call of CUDA C++."""
    if not problems.ON_GPU:
        assert sanitized.main("cpu", control=True) == 28
    for target in (problems.SM80, problems.SM90):
        taken = sanitized.calls(target)
        assert {case.d for case, _ in taken if case.operation == "cca"} == {64, 96, 128}
        assert {case.operation for case, _ in taken} >= {"cca", "self", "cross", "decode", "projected_decode"}
    assert "projected" in {case.operation for case, _ in sanitized.calls(problems.SM90)}


OURS = "void retro_kernels::sm80::(anonymous namespace)::attention_forward<__nv_bfloat16, (int)64>(Problem)"
HOPPER = OURS.replace("sm80", "sm90")
THEIRS = "void cutlass::device_kernel<cutlass::gemm::kernel::GemmUniversal>(Params)"


def report(*kernels: str) -> str:
    lines = [f"========= Error: Race reported between Write access at {kernels[0]}+0xa70 in /a/file.cuh:98"]
    lines += [f"=========     and Read access at {kernel}+0x1b0 in /a/file.cuh:22 [7 hazards]" for kernel in kernels]
    return "\n".join([*lines, "========= "])


@pytest.mark.parametrize(
    ("reports", "faults", "allowed"),
    [
        ([], 0, 0),
        ([report(OURS)], 1, 0),
        ([report(THEIRS)], 0, 1),
        ([report(HOPPER)], 1, 0),  # the tool understood NVIDIA's kernel, so it is believed
        ([report(THEIRS), report(HOPPER)], 0, 2),
        ([report(THEIRS), report(OURS)], 1, 1),
        ([report(THEIRS, OURS)], 1, 0),  # one report that names both
        ([report("attention_forward_kernel")], 1, 0),  # Triton's
    ],
)
def test_races_are_judged_by_kernel(reports, faults, allowed):
    summary = f"========= RACECHECK SUMMARY: {len(reports)} hazards displayed ({len(reports)} errors, 0 warnings)"
    verdict = judge("racecheck", "\n".join(["========= COMPUTE-SANITIZER", *reports, summary]), 9 if reports else 0)
    assert (len(verdict.faults), sum(verdict.allowed.values())) == (faults, allowed)


@pytest.mark.parametrize(("kernel", "faults"), [(OURS, 1), (HOPPER, 1), (THEIRS, 0), ("forward_kernel", 1)])
def test_unwritten_memory_is_judged_by_kernel(kernel, faults):
    lines = [
        "========= Uninitialized __global__ memory read of size 4 bytes",
        f"=========     at {kernel}+0x1b0",
        "=========     by thread (0,0,0) in block (0,0,0)",
        "========= ERROR SUMMARY: 1 error",
    ]
    verdict = judge("initcheck", "\n".join(lines), 9)
    assert (len(verdict.faults), sum(verdict.allowed.values())) == (faults, 1 - faults)


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck"])
def test_a_sanitizer_that_says_nothing_or_ends_badly_is_no_pass(tool):
    assert judge(tool, "", 0).faults
    assert judge(tool, "========= Device not supported", 1).faults
    summary = "RACECHECK SUMMARY" if tool == "racecheck" else "ERROR SUMMARY"
    assert judge(tool, f"========= {summary}: 3 errors", 9).faults
    assert not judge(tool, f"========= {summary}: 0 errors", 0).faults
