"""`retro-kernels verify` and what doctor and `rk.backends()` say, on a faked GPU."""

import json

import pytest
import torch
from faked_gpu import NAME, fake, spoilt
from typer.testing import CliRunner

import retro_kernels as rk
from retro_kernels import extension, testing
from retro_kernels.cli import app, doctor, verify
from retro_kernels.ops import backends
from retro_kernels.ops.backends import ATTENTION as BACKENDS
from retro_kernels.ops.verification import self_check, verdicts
from retro_kernels.ops.verification.classes import Class

pytestmark = pytest.mark.skipif(extension.why_not() is not None, reason=str(extension.why_not()))

TWO = [Class("chunked_cross_attention", "float32", size, size, 16) for size in (16, 32)]


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """Checks run in this process, and there are two classes only."""
    fake(monkeypatch, tmp_path)
    monkeypatch.setattr(backends, "devices", lambda: [torch.device("cpu")])
    monkeypatch.setattr(verify, "classes", lambda backend, every: TWO)
    monkeypatch.setattr(
        self_check,
        "check_in_children",
        lambda wanted, device: (self_check.check_here(*one, device) for one in wanted),
    )
    yield tmp_path / "verified.json"
    verdicts.forget()


def invoke(*arguments):
    return CliRunner().invoke(app, ["verify", "--device", "cpu", *arguments])


def test_a_table_an_exit_code_and_a_memory(gpu):
    result = invoke("--backend", "triton")
    assert result.exit_code == 0, result.stdout
    assert result.stdout.count("passed") == 3
    assert NAME in result.stdout
    assert str(gpu) in result.stdout
    (record,) = json.loads(gpu.read_text())["devices"]
    assert len(record["verdicts"]) == 2


def test_what_has_passed_is_not_checked_again_unless_asked(gpu, monkeypatch):
    invoke()
    made, check = [], testing.check_class
    monkeypatch.setattr(testing, "check_class", lambda *x: made.append(x) or check(*x))
    assert invoke().exit_code == 0
    assert made == []
    assert invoke("--again").exit_code == 0
    assert len(made) == 4


def test_a_failure_is_exit_code_1_and_is_checked_again(gpu, monkeypatch):
    spoilt(monkeypatch, "triton", forward=lambda out, lse: (out + 1, lse))
    result = invoke("--json")
    assert result.exit_code == 1
    verdicts = json.loads(result.stdout)["verdicts"]
    assert [(x["backend"], x["status"]) for x in verdicts] == [
        ("triton", "failed"),
        ("triton", "failed"),
        ("cuda", "passed"),
        ("cuda", "passed"),
    ]
    monkeypatch.setitem(BACKENDS, "triton", BACKENDS["cpu"])
    assert invoke().exit_code == 0


def test_what_could_not_be_checked_is_exit_code_2(gpu, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(testing, "check_class", full)
    assert invoke().exit_code == 2


def test_without_a_gpu_there_is_nothing_to_check():
    result = CliRunner().invoke(app, ["verify"])
    if not torch.cuda.is_available():
        assert result.exit_code == 2
        assert "Nothing can be checked here" in result.output


def test_an_unknown_backend_is_named():
    result = CliRunner().invoke(app, ["verify", "--backend", "cpu"])
    assert result.exit_code == 2
    assert "got 'cpu'" in result.output


@pytest.mark.parametrize("every", [False, True])
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_every_class_can_be_made_and_is_there_once(backend, every):
    found = verify.classes(backend, every)
    assert len(set(found)) == len(found) > (40 if every else 10)
    for wanted in found:
        for odd in (True, False):
            assert testing.class_case(wanted, odd).operation == testing.SHORT_NAMES[wanted.operation]


def test_doctor_and_backends_tell_the_default_and_why(gpu, monkeypatch):
    entries, fused = doctor.backends()
    shown = {entry.name: entry for entry in entries}[f"default on {NAME}"]
    assert (fused, shown.value) == (True, "triton")
    assert "nothing is checked yet" in shown.remedy
    spoilt(monkeypatch, "triton", forward=lambda out, lse: (out + 1, lse))
    invoke()
    shown = {entry.name: entry for entry in doctor.backends()[0]}[f"default on {NAME}"]
    assert shown.value == "cuda"
    assert "2 classes of calls passed their check" in shown.remedy
    assert "2 failed" in rk.backends()["triton"].default
    assert "the default on" in rk.backends()["cuda"].default
    spoilt(monkeypatch, "cuda", forward=lambda out, lse: (out + 1, lse))
    invoke("--again")
    entries, fused = doctor.backends()
    shown = {entry.name: entry for entry in entries}[f"default on {NAME}"]
    assert (fused, shown.value, shown.status) == (False, "reference", "problem")
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 1
    assert "slow pure-PyTorch reference by default" in " ".join(result.stdout.split())
