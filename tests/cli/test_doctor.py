"""`retro-kernels doctor` tells what is there, and still tells when parts of the installation are broken."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from retro_kernels.cli import app, doctor

ROOT = Path(__file__).resolve().parents[2]
SECTIONS = ("versions", "devices", "compilers", "backends", "extension", "environment variables")


def invoke(*arguments):
    return CliRunner().invoke(app, list(arguments))


def test_json_has_every_section(monkeypatch):
    monkeypatch.setenv("RETRO_KERNELS_BACKEND", "reference")
    result = invoke("doctor", "--json")
    document = json.loads(result.stdout)
    assert set(document) == {"fused_backend_can_run", *SECTIONS}
    assert result.exit_code == (0 if document["fused_backend_can_run"] else 1)
    names = {name: {entry["name"]: entry for entry in document[name]} for name in SECTIONS}
    assert names["versions"]["torch"]["status"] == "ok"
    assert {"reference", "cpu", "triton", "cuda"} <= set(names["backends"])
    assert names["backends"]["reference"]["value"] == "can run"
    for entry in names["backends"].values():
        assert entry["value"] == "can run" or entry["remedy"], entry
    assert names["environment variables"]["RETRO_KERNELS_BACKEND"]["value"] == "reference"


def test_tables():
    result = invoke("doctor")
    for title in SECTIONS:
        assert title in result.stdout
    assert "can run here" in result.stdout


def test_exit_code_without_a_fused_backend(monkeypatch):
    monkeypatch.setattr(doctor, "backends", lambda: ([doctor.Entry("reference", "can run", "ok")], False))
    result = invoke("doctor")
    assert result.exit_code == 1
    assert "No fused backend can run here" in result.stdout


def test_what_the_install_built_is_one_sentence(tmp_path, monkeypatch):
    from retro_kernels import cuda_extension, extension

    monkeypatch.setattr(extension, "LIBRARY", tmp_path / "_cpu.abi3.so")
    monkeypatch.setattr(cuda_extension, "LIBRARY", tmp_path / "_cuda.abi3.so")
    (tmp_path / "_cpu.abi3.so").touch()
    (tmp_path / "_cuda_skipped.txt").write_text("there is no nvcc on the path\ninstall it")
    sentence = "built the CPU kernels; left out the CUDA kernels (there is no nvcc on the path)"
    assert doctor.built().value == sentence
    assert doctor.extension()[0].value == sentence


def test_nvcc_is_looked_for_among_pips_packages(tmp_path, monkeypatch):
    """Where setup.py looks too."""
    nvcc = tmp_path / "nvidia" / "cu13" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text("#!/bin/sh\necho Cuda compilation tools, release 13.0, V13.0.88\n")
    nvcc.chmod(0o755)
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.setenv("PATH", "/bin")
    monkeypatch.setattr(doctor.sysconfig, "get_path", lambda name: str(tmp_path))
    assert doctor._program("nvcc").value == f"Cuda compilation tools, release 13.0, V13.0.88 ({nvcc})"
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "nowhere"))
    assert doctor._program("nvcc").value == "not found"


@pytest.mark.parametrize(
    "name", ["_cpu", "_gpus", "_driver", "_program", "_version", "built", "_extension", "_cuda_extension"]
)
def test_a_probe_that_raises_becomes_a_line(monkeypatch, name):
    """Whatever one probe meets, the others are shown and there is no traceback."""

    def broken(*arguments):
        raise OSError("the probe broke\nwith a second line")

    monkeypatch.setattr(doctor, name, broken)
    result = invoke("doctor", "--json")
    assert result.exit_code in (0, 1)
    text = json.loads(result.stdout)
    shown = [entry for section in SECTIONS for entry in text[section] if "the probe broke" in entry["value"]]
    assert shown
    assert all(entry["status"] == "problem" for entry in shown)
    assert "second line" not in result.stdout


def test_backends_that_raise_become_a_line(monkeypatch):
    import retro_kernels as rk

    def broken():
        raise RuntimeError("half an installation")

    monkeypatch.setattr(rk, "backends", broken)
    entries, fused = doctor.backends()
    assert not fused
    assert "half an installation" in entries[0].value


def test_loaded_is_told_from_installed(monkeypatch):
    import numpy

    monkeypatch.setattr(numpy, "__version__", "0.0.1")
    entry = doctor._version("numpy")
    assert entry.status == "problem"
    assert "0.0.1 is loaded" in entry.value


@pytest.mark.parametrize(
    "module",
    ["torch", "triton", "faiss", "retro_kernels/nn", "retro_kernels/extension", "retro_kernels/cuda_extension"],
)
def test_a_broken_package_is_reported(tmp_path, module):
    """In a process of its own where importing one module raises: exit code 0 or 1, a full report, no traceback."""
    hook = (
        "import sys\n"
        "class Broken:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name == {module.replace('/', '.')!r}:\n"
        "            raise ImportError('broken on purpose')\n"
        "sys.meta_path.insert(0, Broken())\n"
    )
    (tmp_path / "sitecustomize.py").write_text(hook)
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join((str(tmp_path), str(ROOT)))}
    done = subprocess.run(
        [sys.executable, "-c", "from retro_kernels.cli import main; main()", "doctor", "--json"],
        capture_output=True,
        text=True,
        env=variables,
        timeout=120,
        cwd=tmp_path,
    )
    assert done.returncode in (0, 1), done.stderr
    assert "Traceback" not in done.stderr
    document = json.loads(done.stdout)
    assert "broken on purpose" in done.stdout
    assert document["fused_backend_can_run"] == (done.returncode == 0)
