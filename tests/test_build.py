"""The build: what the compiled library says about itself, what setup.py builds, leaves out with a reason, or refuses.

Its commands run on a copy of the package with empty kernels, a torch that is a version file, and compilers that are
shell scripts: what is tested is the way through them."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from retro_kernels import cuda_extension, extension

ROOT = Path(__file__).resolve().parent.parent
built = pytest.mark.skipif(not extension.LIBRARY.exists(), reason="the C++ extension was not built")
source_tree = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="not a source tree")


VARIABLES = (
    "RETRO_KERNELS_CUDA_ARCHS",
    "TORCH_CUDA_ARCH_LIST",
    "CUDA_HOME",
    "CUDA_PATH",
    "CXX",
    "MAX_JOBS",
    "RETRO_KERNELS_BUILD_CPU",
    "RETRO_KERNELS_BUILD_CUDA",
)


def setup_py(environment: dict[str, str], root: Path = ROOT, *command: str) -> subprocess.CompletedProcess:
    """`setup.py --version` decides what would be built and builds nothing."""
    clean = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    return subprocess.run(
        [sys.executable, "setup.py", *(command or ["--version"])],
        cwd=root,
        env={**clean, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def fake_torch(folder: Path, version: str, cuda: str | None) -> str:
    """A folder for PYTHONPATH."""
    (folder / "torch").mkdir(parents=True)
    (folder / "torch" / "__init__.py").write_text("raise RuntimeError('the build must not import torch')")
    (folder / "torch" / "version.py").write_text(f"__version__ = {version!r}\ncuda = {cuda!r}\n")
    return str(folder)


# Makes every file that is asked for with -o, beside a dependency file that names no header.
COMPILER = """
case "$*" in *--version*) echo "fake 1.0"; exit;; *-mavx*) exit 1;; esac
while [ $# -gt 0 ]; do
  case "$1" in
    -o) echo made > "$2";; -MF) echo "x: " > "$2";;
    *fails.cpp) echo "fails.cpp:1: error: no"; exit 1;;
  esac
  shift
done
"""


@pytest.fixture
def project(tmp_path) -> SimpleNamespace:
    """A copy of what setup.py reads, and of the package; the kernels are empty, the compilers fake."""
    root, bin = tmp_path / "project", tmp_path / "bin"
    ignore = shutil.ignore_patterns("*.so", "*.txt", "__pycache__", "results")
    for folder in ("retro_kernels", "benchmarks"):
        shutil.copytree(ROOT / folder, root / folder, ignore=ignore)
    for file in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / file, root)
    (root / "csrc" / "cpu").mkdir(parents=True)
    shutil.copy(ROOT / "csrc" / "toolchain.py", root / "csrc")
    for name in ("bindings", "decode_bindings", "dispatch", "level_portable"):
        (root / "csrc" / "cpu" / f"{name}.cpp").touch()
    (root / "csrc" / "cuda" / "sm80").mkdir(parents=True)
    (root / "csrc" / "cuda" / "sm80" / "forward.cu").touch()
    for name in ("c++", "g++"):
        script(bin / name, COMPILER)
    nvcc = script(bin / "nvcc", f"case $* in *--version*) echo release 13.0,; exit;; esac\n{COMPILER}")
    environment = {
        "PATH": f"{bin}:/usr/bin:/bin",
        "PYTHONPATH": fake_torch(tmp_path / "site", "2.13.0+cu130", "13.0"),
    }
    return SimpleNamespace(root=root, bin=bin, nvcc=nvcc, environment=environment, folder=tmp_path)


def wheel(project: SimpleNamespace, **variables: str) -> tuple[str, dict[str, str]]:
    """The wheel's name, and the name and text of each file in it."""
    shutil.rmtree(project.root / "dist", ignore_errors=True)
    done = setup_py({**project.environment, **variables}, project.root, "--quiet", "bdist_wheel")
    assert done.returncode == 0, done.stderr
    (path,) = (project.root / "dist").glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        return path.name, {name: archive.read(name).decode(errors="replace") for name in archive.namelist()}


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
    """pip hides what a build prints, so the reason and its remedy must outlive it."""
    (tmp_path / "_skipped.txt").write_text("there is no C++ compiler\ninstall g++")
    monkeypatch.setattr(extension, "LIBRARY", tmp_path / "_cpu.abi3.so")
    assert extension.why_not.__wrapped__() == "the C++ extension was not built (there is no C++ compiler): install g++"


def test_a_source_folder_that_hides_the_built_copy_names_it(tmp_path, monkeypatch):
    """Python looks into the current folder first, where `pip install .` leaves nothing."""
    source, site = tmp_path / "source" / "retro_kernels", tmp_path / "site"
    (site / "retro_kernels").mkdir(parents=True)
    (site / "retro_kernels" / "_cpu.abi3.so").touch()
    information = site / "retro_kernels-0.1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: retro_kernels\nVersion: 0.1.0\n")
    source.mkdir(parents=True)
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setattr(extension, "LIBRARY", source / "_cpu.abi3.so")
    assert str(site) not in extension.why_not.__wrapped__()  # not a source folder
    (source.parent / "setup.py").touch()
    reason = extension.why_not.__wrapped__()
    assert f"the installed copy {site / 'retro_kernels'}, which the source folder hides" in reason
    assert "pip install --no-build-isolation -e ." in reason


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
        (
            {"architectures": ["9.0a"]},
            {"cuda": "13.1", "capability": (8, 6)},
            ["built for 9.0a", "compute capability 8.6", "RETRO_KERNELS_CUDA_ARCHS=8.6"],
        ),
        ({"oldest_torch": "99.0"}, {"cuda": "13.1"}, ["torch 99.0 or newer", "upgrade torch"]),
        ({}, {"cuda": "13.1"}, ["does not load", "built against torch 2.12.0 and CUDA 13.0", "and CUDA 13.1"]),
    ],
)
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


@pytest.mark.parametrize(
    ("cuda", "remedy"), [(None, "install a CUDA build of PyTorch, then run"), ("12.8", "with an nvcc of CUDA 12")]
)
def test_a_missing_cuda_library_is_explained(tmp_path, monkeypatch, cuda, remedy):
    """With what helps this torch: to compile it beside a CPU torch gives a library that cannot be loaded."""
    import torch

    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(cuda_extension, "LIBRARY", tmp_path / "_cuda.abi3.so")
    assert remedy in cuda_extension.why_not.__wrapped__()
    (tmp_path / "_cuda_skipped.txt").write_text("there is no nvcc on the path")
    assert "was not built (there is no nvcc on the path)" in cuda_extension.why_not.__wrapped__()


@built
def test_an_instruction_set_that_cannot_run_is_explained():
    """In a process of its own, since the choice is made once."""
    code = "from retro_kernels import extension; print(extension.why_not())"
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "RETRO_KERNELS_CPU_ISA": "abacus"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert '"abacus"' in result.stdout
    assert "portable" in result.stdout


@source_tree
def test_without_torch_the_build_skips_and_says_how_to_get_it(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('No module named torch')\n")
    environment = {"PYTHONPATH": str(tmp_path)}
    result = setup_py(environment)
    assert result.returncode == 0
    assert "skipped" in result.stderr
    assert "pip install --no-build-isolation" in result.stderr
    result = setup_py({**environment, "RETRO_KERNELS_BUILD_CPU": "1"})
    assert result.returncode != 0
    assert "torch cannot be imported" in result.stderr


@source_tree
@pytest.mark.parametrize(
    ("variables", "sentences"),
    [
        ({"RETRO_KERNELS_BUILD_CPU": "yes"}, ["expected auto, 1 or 0"]),
        ({"RETRO_KERNELS_BUILD_CPU": "1", "CXX": "no-such-compiler"}, ["no C++ compiler", "install g++"]),
        (
            {"RETRO_KERNELS_BUILD_CUDA": "1", "CUDA_HOME": "/no/such/place"},
            ["there is no nvcc in /no/such/place/bin (CUDA_HOME)", "cuda-toolkit[nvcc,nvvm,crt,cudart]==13.0.*"],
        ),
        ({"RETRO_KERNELS_CUDA_ARCHS": "7.5"}, ["RETRO_KERNELS_CUDA_ARCHS is '7.5'", "from 8.0 on"]),
        ({"RETRO_KERNELS_CUDA_ARCHS": "Hopper"}, ["RETRO_KERNELS_CUDA_ARCHS is 'Hopper'", "from 8.0 on"]),
        ({"TORCH_CUDA_ARCH_LIST": "7.5"}, ["TORCH_CUDA_ARCH_LIST is '7.5'", "8.0 or newer"]),
        ({"RETRO_KERNELS_CUDA_ARCHS": "native"}, ["nvidia-smi shows no GPU", "RETRO_KERNELS_CUDA_ARCHS"]),
    ],
)
def test_what_was_asked_for_and_cannot_be_built_fails(project, variables, sentences):
    script(project.bin / "nvidia-smi", "exit 9")
    result = setup_py({**project.environment, **variables}, project.root)
    assert result.returncode != 0
    for sentence in sentences:
        assert sentence in result.stderr


@source_tree
def test_a_wheel_says_in_its_name_and_inside_what_was_built(project):
    """pip replaces one by another only if their versions differ, and its last line is all that pip shows."""
    (project.root / "retro_kernels" / "zzz_deleted.py").touch()
    name, files = wheel(project)
    assert re.match(r"retro_kernels-0\.1\.0\+cpu\.cu130-cp310-abi3-linux_", name)
    assert {"_cpu.abi3.so", "_cuda.abi3.so", "py.typed", "zzz_deleted.py"} <= {Path(file).name for file in files}
    assert not [file for file in files if "skipped" in file or file.startswith(("tests", "csrc"))]

    # The same folder again, with CUDA off: nothing of the first build is in it.
    (project.root / "retro_kernels" / "zzz_deleted.py").unlink()
    name, files = wheel(project, RETRO_KERNELS_BUILD_CUDA="0")
    assert re.match(r"retro_kernels-0\.1\.0\+cpu-cp310-abi3-linux_", name)
    assert "retro_kernels/_cuda.abi3.so" not in files
    assert "retro_kernels/zzz_deleted.py" not in files
    assert files["retro_kernels/_cuda_skipped.txt"].startswith("RETRO_KERNELS_BUILD_CUDA was 0\n")

    name, files = wheel(project, RETRO_KERNELS_BUILD_CPU="0", RETRO_KERNELS_BUILD_CUDA="0")
    assert name == "retro_kernels-0.1.0-py3-none-any.whl"
    assert not [file for file in files if file.endswith(".so")]


@source_tree
def test_a_compilation_that_fails_fails_the_install(project):
    """With what the compiler said; an old library of build/ does not take the new one's place."""
    wheel(project)
    (project.root / "csrc" / "cuda" / "fails.cpp").touch()
    result = setup_py(project.environment, project.root, "--quiet", "bdist_wheel")
    assert result.returncode != 0
    assert "compiling the CUDA kernels failed" in result.stderr
    assert "RETRO_KERNELS_BUILD_CUDA=0 installs without them" in result.stderr
    assert result.stderr.rstrip().endswith("fails.cpp:1: error: no")
    (project.root / "csrc" / "cpu" / "dispatch.cpp").unlink()
    script(project.bin / "c++", COMPILER.replace("*fails.cpp)", "*dispatch.cpp)"))
    result = setup_py({**project.environment, "RETRO_KERNELS_BUILD_CUDA": "0"}, project.root, "-q", "bdist_wheel")
    assert result.returncode != 0
    assert "compiling the CPU kernels failed" in result.stderr


@source_tree
def test_only_what_changed_is_compiled_again(project):
    def compiled(**variables: str) -> set[str]:
        result = setup_py({**project.environment, **variables}, project.root, "build_ext", "--inplace")
        assert result.returncode == 0, result.stderr
        return set(re.findall(r"compiling (\S+)", result.stderr))

    assert len(compiled()) == 7
    assert compiled() == set()
    header = project.folder / "a header.h"
    header.touch()
    objects = project.root / "build" / "cpu"
    (objects / "dispatch.o.d").write_text(f"dispatch.o: \\\n {str(header).replace(' ', chr(92) + ' ')}\n")
    os.utime(objects / "dispatch.o", (1, 1))
    assert compiled() == {"csrc/cpu/dispatch.cpp"}
    assert compiled(RETRO_KERNELS_CUDA_ARCHS="9.0") == {"csrc/cuda/sm80/forward.cu", "build/cuda/build_info.cpp"}


@source_tree
def test_an_sdist_has_what_a_build_needs_and_its_wheel_the_version_that_pip_expects(project):
    done = setup_py(project.environment, project.root, "--quiet", "sdist")
    assert done.returncode == 0, done.stderr
    (path,) = (project.root / "dist").glob("*.tar.gz")
    assert path.name == "retro_kernels-0.1.0.tar.gz"
    with tarfile.open(path) as archive:
        archive.extractall(project.folder)
    project.root = project.folder / "retro_kernels-0.1.0"
    name, files = wheel(project)
    assert name.startswith("retro_kernels-0.1.0-cp310-abi3-linux_")
    assert {"retro_kernels/_cpu.abi3.so", "retro_kernels/_cuda.abi3.so"} <= set(files)


@source_tree
def test_the_manifest_names_every_folder():
    """In an archive of a clone there is no git to ask."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(["git", "-C", str(ROOT), "ls-files"], capture_output=True, text=True, check=True).stdout
    folders = {line.split("/")[0] for line in listed.splitlines() if "/" in line}
    grafted = set(re.findall(r"^graft (\S+)", (ROOT / "MANIFEST.in").read_text(), re.MULTILINE))
    assert folders - grafted == {"retro_kernels"}


@source_tree
@pytest.mark.parametrize(
    ("torch", "cuda", "variables", "reason", "remedy"),
    [
        ("2.13.0+cpu", None, {}, "torch 2.13.0+cpu is a build without CUDA", "with a CUDA build of PyTorch, run"),
        (
            "2.15.0+cu132",
            "13.2",
            {"CUDA_HOME": "/no/such/place"},
            "there is no nvcc in /no/such/place/bin",
            'pip install "cuda-toolkit[nvcc,nvvm,crt,cudart]==13.2.*"',
        ),
        (
            "2.12.0+cu128",
            "12.8",
            {"CUDA_HOME": "fake"},
            "is of CUDA 13.0 and torch of CUDA 12.8",
            "install NVIDIA's toolkit of CUDA 12",
        ),
        ("2.10.0", "13.0", {}, "torch is 2.10.0, and the kernels need 2.11", "upgrade torch"),
        ("2.13.0", "13.0", {"RETRO_KERNELS_BUILD_CUDA": "0"}, "RETRO_KERNELS_BUILD_CUDA was 0", "without that setting"),
    ],
)
def test_a_part_that_is_left_out_has_its_own_reason_and_remedy(project, torch, cuda, variables, reason, remedy):
    (project.folder / "fake").symlink_to(project.folder)
    variables = {name: value.replace("fake", str(project.folder / "fake")) for name, value in variables.items()}
    environment = {**project.environment, "PYTHONPATH": fake_torch(project.folder / "other", torch, cuda), **variables}
    result = setup_py(environment, project.root, "build_py")
    assert result.returncode == 0, result.stderr
    said = next((project.root / "build").rglob("_cuda_skipped.txt")).read_text()
    assert reason in said.split("\n")[0]
    assert remedy in said.split("\n")[1]
    assert "RETRO_KERNELS_BUILD_CUDA=1" not in said or cuda is None
    if cuda == "12.8":
        result = setup_py({**environment, "RETRO_KERNELS_BUILD_CUDA": "1"}, project.root)
        assert result.returncode != 0, "minutes of compiling what this torch refuses"


@source_tree
def test_nvcc_needs_a_host_compiler_that_it_works_with(project):
    """Where torch has CUDA and nvcc is there, a C++ compiler that is not, or that nvcc refuses, ends the install."""
    tools = project.folder / "tools"
    tools.mkdir()
    for name in ("sh", "git", "uname", "cat"):
        (tools / name).symlink_to(shutil.which(name))
    (tools / "nvcc").symlink_to(project.nvcc)
    result = setup_py({**project.environment, "PATH": str(tools)}, project.root)
    assert result.returncode != 0
    assert "there is no C++ compiler" in result.stderr
    assert "RETRO_KERNELS_BUILD_CUDA=0" in result.stderr
    script(project.nvcc, "case $* in *--version*) echo release 13.0,;; *-E*) echo unsupported GNU; exit 1;; esac")
    result = setup_py(project.environment, project.root)
    assert result.returncode != 0
    assert "does not compile an empty file: unsupported GNU" in result.stderr


@pytest.fixture
def build(monkeypatch, tmp_path):
    """csrc/toolchain.py, with a torch of CUDA 13.2 in a folder of its own."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    specification = importlib.util.spec_from_file_location("toolchain", ROOT / "csrc" / "toolchain.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    torch = module.Torch("2.15.0+cu132", "13.2", tmp_path / "site" / "torch")
    monkeypatch.setattr(module, "torch_installation", lambda: torch)
    monkeypatch.setattr(module, "TOOLKITS", (f"{tmp_path}/cuda", f"{tmp_path}/cuda-*"))
    return module


@source_tree
def test_an_assembler_may_be_older_than_its_compiler(build, tmp_path, monkeypatch):
    monkeypatch.setattr(build.platform, "machine", lambda: "x86_64")
    old = script(tmp_path / "c++", 'case "$(cat)" in *tdpbf16ps*) exit 1;; esac')
    assert list(build.levels([str(old)])) == ["portable", "avx2", "avx512", "avx512_bf16"]


@source_tree
def test_build_isolation_does_not_hide_torch(tmp_path):
    """pip takes the environment's own packages off the path of the process that builds."""
    fake_torch(tmp_path / "venv", "2.13.0+cu130", "13.0")
    code = (
        f"import runpy, sysconfig; sysconfig.get_path = lambda name: {str(tmp_path / 'venv')!r}; "
        f"print(runpy.run_path({str(ROOT / 'setup.py')!r})['toolchain'].torch_installation())"
    )
    # -S: without site-packages, so that no torch can be imported; setuptools alone is put back.
    import setuptools

    packages = tmp_path / "packages"
    packages.mkdir()
    for name in ("setuptools", "_distutils_hack", "pkg_resources"):
        folder = Path(setuptools.__file__).parents[1] / name
        if folder.exists():
            (packages / name).symlink_to(folder)
    result = subprocess.run(
        [sys.executable, "-S", "-c", code],
        env={**os.environ, "PYTHONPATH": str(packages)},
        capture_output=True,
        text=True,
        check=False,
    )
    folder = tmp_path / "venv" / "torch"
    assert result.stdout == f"Torch(version='2.13.0+cu130', cuda='13.0', folder={folder!r})\n", result.stderr


@source_tree
def test_the_nvcc_of_torchs_cuda_is_found_wherever_it_is(build, tmp_path, monkeypatch):
    """On the path, among pip's packages, in /usr/local; the first of torch's major, or else the first."""

    def place(folder: str, release: str) -> Path:
        return script(tmp_path / folder / "nvcc", f"echo Cuda compilation tools, release {release}, V1")

    def found() -> tuple[Path, str]:
        return build.nvcc.__wrapped__()

    monkeypatch.setenv("PATH", f"{tmp_path / 'path'}:/usr/bin:/bin")
    monkeypatch.setattr(build.shutil, "which", lambda name: str(tmp_path / "path" / "nvcc") if on_path else None)
    monkeypatch.setattr(build.sysconfig, "get_path", lambda name: str(tmp_path / "purelib"))
    on_path = False
    with pytest.raises(build.CannotBuild, match="no nvcc on the path, among pip's packages or in /usr/local/cuda"):
        found()
    old = place("cuda-12.8/bin", "12.8")
    assert found() == (old, "12.8")
    local = place("cuda-13.1/bin", "13.1")
    assert found() == (local, "13.1")
    of_pip = place("site/nvidia/cu13/bin", "13.2")
    assert found() == (of_pip, "13.2")
    first, on_path = place("path", "13.0"), True
    assert found() == (first, "13.0")
    place("path", "12.6")
    assert found() == (of_pip, "13.2")
    monkeypatch.setenv("CUDA_HOME", str(old.parents[1]))
    assert found() == (old, "12.8")


@source_tree
@pytest.mark.parametrize(
    ("variables", "names"),
    [
        ({}, ["8.0", "9.0a", "8.0+PTX"]),
        ({"RETRO_KERNELS_CUDA_ARCHS": "80;90"}, ["8.0", "9.0a", "9.0+PTX"]),
        ({"RETRO_KERNELS_CUDA_ARCHS": "8.0+PTX"}, ["8.0", "8.0+PTX"]),
        ({"RETRO_KERNELS_CUDA_ARCHS": "8.0+PTX 8.9, sm_120"}, None),
        ({"RETRO_KERNELS_CUDA_ARCHS": "8.0+PTX 8.9, 120"}, ["8.0", "8.9", "12.0", "8.0+PTX"]),
        ({"RETRO_KERNELS_CUDA_ARCHS": "9.0a"}, ["9.0a"]),
        ({"RETRO_KERNELS_CUDA_ARCHS": "native"}, ["8.6", "9.0a", "9.0+PTX"]),
        ({"TORCH_CUDA_ARCH_LIST": "7.0 7.5 8.0 8.6 9.0+PTX"}, ["8.0", "8.6", "9.0a", "9.0+PTX"]),
        ({"TORCH_CUDA_ARCH_LIST": "8.6", "RETRO_KERNELS_CUDA_ARCHS": "8.9"}, ["8.9", "8.9+PTX"]),
    ],
)
def test_architectures_as_people_write_them(build, monkeypatch, tmp_path, variables, names):
    script(tmp_path / "bin" / "nvidia-smi", "printf '9.0\\n8.6\\n9.0\\n'")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if names is None:
        with pytest.raises(SystemExit, match="expected compute capabilities"):
            build.architectures()
    else:
        assert build.architectures() == names


@source_tree
@pytest.mark.parametrize(
    ("cxx", "flags"),
    [
        ("g++-13", ["-ccbin", "g++-13"]),
        ("ccache g++", ["-ccbin", "g++"]),
        ("ccache", ["-ccbin", "ccache"]),
        ("sccache clang++ -m64", ["-ccbin", "clang++", "-Xcompiler=-m64"]),
    ],
)
def test_nvcc_gets_the_compiler_and_not_its_launcher(build, monkeypatch, tmp_path, cxx, flags):
    nvcc = script(tmp_path / "nvcc", "exit 0")
    monkeypatch.setattr(build, "compiler", lambda: (cxx.split(), "fake"))
    assert build.nvcc_command(nvcc) == [str(nvcc), *flags]


@source_tree
def test_jobs_count_the_memory_that_the_page_cache_would_give_up(build, monkeypatch):
    monkeypatch.setattr(build.os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    text = "MemTotal: 99 kB\nMemFree: 1 kB\nMemAvailable:    8388608 kB\n"
    monkeypatch.setattr(build.Path, "read_text", lambda self: text)
    assert build.jobs(1 << 30) == 8
    assert build.jobs(2 << 30) == 4
    assert build.jobs(1 << 40) == 1
    monkeypatch.setenv("MAX_JOBS", "3")
    assert build.jobs(1 << 30) == 3


@source_tree
def test_a_compiler_that_is_killed_is_said(build, tmp_path):
    compiler = script(tmp_path / "compiler", "echo one; echo 'a.cpp:1: error: first'; yes | head -99; kill -9 $$")
    with pytest.raises(build.CompileError) as error:
        build.run("CPU", [str(compiler)])
    assert "Memory may have run out: set MAX_JOBS=1" in str(error.value)
    assert "a.cpp:1: error: first\n...\ny\n" in str(error.value)


def test_the_cuda_library_names_the_libraries_that_it_needs():
    """torch_cuda by name (Python keeps its symbols to itself), built here without one; no driver, no CUDA runtime."""
    library = Path(cuda_extension.__file__).with_name("_cuda.abi3.so")
    if not library.exists():
        pytest.skip("the CUDA extension was not built here: make cuda")
    shown = subprocess.run(["readelf", "-d", str(library)], capture_output=True, text=True, check=True).stdout
    needed = set(re.findall(r"NEEDED.*\[(.*?)\.so", shown))
    assert {"libtorch_cpu", "libtorch_cuda"} <= needed
    assert not needed & {"libcuda", "libcudart", "libc10_cuda"}
