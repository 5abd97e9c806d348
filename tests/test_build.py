"""The build: what the compiled library says about itself, and that an install without torch skips with a reason."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from retro_kernels import cuda_extension, extension

ROOT = Path(__file__).resolve().parent.parent
built = pytest.mark.skipif(not extension.LIBRARY.exists(), reason="the C++ extension was not built")
source_tree = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="not a source tree")


def setup_py(environment: dict[str, str], folder: Path) -> subprocess.CompletedProcess:
    """`setup.py --version`: decides what would be built and builds nothing."""
    return subprocess.run(
        [sys.executable, str(ROOT / "setup.py"), "--version"], cwd=folder, env={**os.environ, **environment},
        capture_output=True, text=True, check=False,
    )  # fmt: skip


@built
def test_the_library_says_how_it_was_built():
    metadata = extension.build_metadata()
    assert {"torch", "oldest_torch", "compiler", "machine", "levels", "flags", "git_commit"} <= set(metadata)
    assert metadata["levels"][0] == "portable"
    assert extension.why_not() is None
    assert set(extension.usable_isas()) <= set(metadata["levels"])
    assert extension.isa() in extension.usable_isas()


def test_a_missing_library_is_explained(tmp_path, monkeypatch):
    monkeypatch.setattr(extension, "LIBRARY", tmp_path / "_cpu.abi3.so")
    reason = extension.why_not.__wrapped__()
    assert "was not built" in reason
    assert "pip install --no-build-isolation" in reason
    assert extension.build_metadata() == {}


def test_a_skipped_library_is_explained(tmp_path, monkeypatch):
    """pip hides what a build prints, so the reason must outlive it."""
    (tmp_path / "_skipped.txt").write_text("torch cannot be imported in the build environment")
    monkeypatch.setattr(extension, "LIBRARY", tmp_path / "_cpu.abi3.so")
    assert "was not built (torch cannot be imported" in extension.why_not.__wrapped__()


def test_a_broken_library_is_explained(tmp_path, monkeypatch):
    library = tmp_path / "_cpu.abi3.so"
    library.write_bytes(b"not a library RETRO_KERNELS_BUILD" + b'{"torch": "2.12.0", "oldest_torch": "2.11"}\0')
    monkeypatch.setattr(extension, "LIBRARY", library)
    reason = extension.why_not.__wrapped__()
    assert "does not load" in reason
    assert "built against torch 2.12.0" in reason
    assert "\n" not in reason


def test_a_library_for_a_newer_torch_is_explained(tmp_path, monkeypatch):
    library = tmp_path / "_cpu.abi3.so"
    library.write_bytes(b'RETRO_KERNELS_BUILD{"torch": "99.1.0", "oldest_torch": "99.0"}\0')
    monkeypatch.setattr(extension, "LIBRARY", library)
    assert "upgrade torch" in extension.why_not.__wrapped__()


CUDA_BUILD = {"torch": "2.12.0", "oldest_torch": "2.11", "cuda": "13.0", "architectures": ["8.0", "9.0a", "8.0+PTX"]}


@pytest.mark.parametrize(
    ("built_for", "found", "sentences"),
    [
        ({}, {"cuda": None}, ["for CUDA 13.0", "has no CUDA"]),
        ({}, {"cuda": "12.8"}, ["built with CUDA 13.0", "CUDA 12.8, another major version", "nvcc of CUDA 12"]),
        ({}, {"cuda": "13.1", "available": False}, ["no CUDA device is usable", "driver"]),
        ({}, {"cuda": "13.1", "capability": (7, 5)}, ["compute capability 7.5", "8.0 (Ampere) or newer"]),
        ({"architectures": ["9.0a"]}, {"cuda": "13.1", "capability": (8, 6)},
         ["built for 9.0a", "compute capability 8.6", "RETRO_KERNELS_CUDA_ARCHS=8.6"]),
        ({"oldest_torch": "99.0"}, {"cuda": "13.1"}, ["torch 99.0 or newer", "upgrade torch"]),
        ({}, {"cuda": "13.1"}, ["does not load", "built against torch 2.12.0 and CUDA 13.0", "and CUDA 13.1"]),
    ],
)  # fmt: skip
def test_a_cuda_library_that_cannot_run_is_explained(tmp_path, monkeypatch, built_for, found, sentences):
    """One sentence each, which tells what it was built for from what is here."""
    import torch

    library = tmp_path / "_cuda.abi3.so"
    library.write_bytes(b"RETRO_KERNELS_BUILD" + json.dumps({**CUDA_BUILD, **built_for}).encode() + b"\0")
    monkeypatch.setattr(cuda_extension, "LIBRARY", library)
    monkeypatch.setattr(torch.version, "cuda", found["cuda"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: found.get("available", True))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: found.get("capability", (9, 0)))
    reason = cuda_extension.why_not.__wrapped__()
    assert "\n" not in reason
    for part in sentences:
        assert part in reason, reason


def test_a_missing_cuda_library_is_explained(tmp_path, monkeypatch):
    monkeypatch.setattr(cuda_extension, "LIBRARY", tmp_path / "_cuda.abi3.so")
    assert "RETRO_KERNELS_BUILD_CUDA=1 pip install" in cuda_extension.why_not.__wrapped__()
    (tmp_path / "_cuda_skipped.txt").write_text("there is no nvcc on the path")
    assert "was not built (there is no nvcc on the path)" in cuda_extension.why_not.__wrapped__()


@built
def test_an_instruction_set_that_cannot_run_is_explained():
    """In a process of its own, since the choice is made once."""
    code = "from retro_kernels import extension; print(extension.why_not())"
    result = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "RETRO_KERNELS_CPU_ISA": "abacus"}, cwd=ROOT,
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert '"abacus"' in result.stdout
    assert "portable" in result.stdout


@source_tree
def test_without_torch_the_build_skips_and_says_how_to_get_it(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('No module named torch')\n")
    environment = {"PYTHONPATH": str(tmp_path), "RETRO_KERNELS_BUILD_CPU": "auto", "RETRO_KERNELS_BUILD_CUDA": "auto"}
    result = setup_py(environment, ROOT)
    assert result.returncode == 0
    assert "skipped" in result.stderr
    assert "pip install --no-build-isolation" in result.stderr
    result = setup_py({**environment, "RETRO_KERNELS_BUILD_CPU": "1"}, ROOT)
    assert result.returncode != 0
    assert "torch cannot be imported" in result.stderr


@source_tree
def test_what_was_asked_for_and_cannot_be_built_fails():
    result = setup_py({"RETRO_KERNELS_BUILD_CUDA": "1", "CUDA_HOME": "/no/such/place"}, ROOT)
    assert result.returncode != 0
    assert "there is no nvcc in /no/such/place/bin" in result.stderr
    result = setup_py({"RETRO_KERNELS_CUDA_ARCHS": "7.5", "RETRO_KERNELS_BUILD_CUDA": "1", "CUDA_HOME": ""}, ROOT)
    assert result.returncode != 0
    assert "compute capabilities from 8.0 on" in result.stderr or "there is no nvcc" in result.stderr
    result = setup_py({"RETRO_KERNELS_BUILD_CPU": "1", "CXX": "no-such-compiler"}, ROOT)
    assert result.returncode != 0
    assert "no C++ compiler" in result.stderr
    result = setup_py({"RETRO_KERNELS_BUILD_CPU": "yes"}, ROOT)
    assert result.returncode != 0
    assert "expected auto, 1 or 0" in result.stderr


def test_the_cuda_library_names_the_libraries_that_it_needs():
    """torch_cuda by name (Python keeps its symbols to itself), built here without one; no driver, no CUDA runtime."""
    library = Path(cuda_extension.__file__).with_name("_cuda.abi3.so")
    if not library.exists():
        pytest.skip("the CUDA extension was not built here: make cuda")
    shown = subprocess.run(["readelf", "-d", str(library)], capture_output=True, text=True, check=True).stdout
    needed = set(re.findall(r"NEEDED.*\[(.*?)\.so", shown))
    assert {"libtorch_cpu", "libtorch_cuda"} <= needed
    assert not needed & {"libcuda", "libcudart", "libc10_cuda"}
