"""The GPU suite's command: it runs from end to end on a CPU, and whatever breaks, hangs or is killed costs one item."""

import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
import zipfile

import gpu_problems
import pytest
import torch

from benchmarks import gpu, gpu_kit
from retro_kernels import cuda_extension
from retro_kernels.bench import results

VARIABLES = {**os.environ, "PYTHONPATH": str(gpu.ROOT)}


@pytest.fixture(autouse=True)
def quick_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def part_of(tmp_path, code, seconds=60, name="stand-in"):
    """A part whose tests are this file's."""
    file = tmp_path / "test_stand_in.py"
    file.write_text(code)
    return gpu.Part(name, "correctness", seconds, (str(file),))


def run(tmp_path, part, **options):
    said = []
    code = gpu.run(tmp_path / "out", [[part]], True, options.pop("limit", 200), say=said.append, **options)
    return code, results.load(tmp_path / "out" / results.FILE), "\n".join(said)


def outcomes(document):
    return {entry["check"].rpartition("::")[2]: entry["status"] for entry in document["checks"]}


def test_a_reduced_run(tmp_path, capsys):
    """The first minute of a run on a GPU, as a CPU has it: the smoke test and the first timing, each checked first."""
    assert gpu.main(["--reduced", "--out", str(tmp_path / "out"), "smoke", "headline"]) == 0
    document = results.load(tmp_path / "out" / results.FILE)
    assert {part["name"]: part["status"] for part in document["parts"]} == {"smoke": "ok", "headline": "ok"}
    assert sum("test_smoke" in entry["check"] for entry in document["checks"]) == 2
    assert document["ceilings"]["copy_bytes_per_second"] > 0
    timed = {row["variant"]: row for row in document["rows"] if row["status"] == "ok"}
    assert "eager" in timed
    assert any(name.startswith("retro_kernels") for name in timed)
    assert all(row["wall_ms"] is not None for row in timed.values())
    files = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert files == ["bench.json", "items.jsonl", "log.txt", "report.html", "table.md"]
    assert "No part failed" in capsys.readouterr().out


BREAKS = """
import os
import re
import pytest
from benchmarks import gpu_part

def test_a(): pass
def test_b(): assert 1 == 2
def test_c(): pytest.skip("no such thing here")
def test_d(): os._exit(9)
def test_e(): pass
def test_f():
    gpu_part.alive = lambda: False  # as after an illegal access
    raise RuntimeError("CUDA error: an illegal memory access was encountered")
def test_g(): pass
"""


def test_a_crash_and_a_spoilt_context_cost_one_test_each(tmp_path):
    """The rest runs in fresh processes; nothing runs twice, and failures stay failures."""
    code, document, said = run(tmp_path, part_of(tmp_path, BREAKS))
    assert code == 1
    expected = {"a": "ok", "b": "failed", "c": "skipped", "d": "failed", "e": "ok", "f": "failed", "g": "ok"}
    assert outcomes(document) == {f"test_{name}": status for name, status in expected.items()}
    details = {entry["check"][-6:]: entry["detail"] for entry in document["checks"]}
    assert "ended with 9" in details["test_d"]
    assert "illegal memory access" in details["test_f"]
    assert details["test_c"] == "no such thing here"
    assert document["parts"][0] | {"seconds": 0} == {
        "name": "stand-in",
        "status": "failed",
        "detail": "3 ok, 3 failed, 1 skipped",
        "seconds": 0,
    }
    assert said.count("fresh process") == 2
    assert not document["interrupted"]


def test_what_hangs_ends_with_its_part_and_is_done_again_by_a_resumed_run(tmp_path, monkeypatch):
    """What was finished is not done again."""
    hangs = "import time\ndef test_a(): pass\ndef test_b(): time.sleep(600)\ndef test_c(): pass\n"
    finished = gpu.Running.finished

    def late(self, say):
        """The part's time is up as soon as test_b has begun."""
        if any("test_b" in entry.get("item", "") for entry in self.items.entries()):
            self.until = 0.0
        return finished(self, say)

    with monkeypatch.context() as patch:
        patch.setattr(gpu.Running, "finished", late)
        code, document, _ = run(tmp_path, part_of(tmp_path, hangs))
    assert code == 1
    assert outcomes(document) == {"test_a": "ok"}
    assert document["parts"][0]["status"] == "incomplete"
    assert "while" in document["parts"][0]["detail"]
    code, document, _ = run(
        tmp_path,
        part_of(
            tmp_path,
            hangs.replace("time.sleep(600)", "pass").replace(
                "def test_a(): pass", "def test_a(): assert False, 'done twice'"
            ),
        ),
        former=tmp_path / "out",
    )
    assert code == 0
    assert outcomes(document) == {"test_a": "ok", "test_b": "ok", "test_c": "ok"}
    # Another command adds its part to them: so the sanitizers' verdicts come beside the rest.
    code, document, _ = run(tmp_path, part_of(tmp_path, "def test_a(): pass", name="another"), former=tmp_path / "out")
    assert code == 0
    assert {part["name"]: part["status"] for part in document["parts"]} == {"stand-in": "ok", "another": "ok"}
    assert len(document["checks"]) == 4


def test_a_part_begins_only_where_time_is_left(tmp_path):
    """Of the limit what passed before the run is taken off: it counts from the start of the process."""
    code, document, _ = run(tmp_path, part_of(tmp_path, "def test_a(): pass"), limit=100, spent=85)
    assert code == 1
    assert document["parts"][0]["detail"] == "the time was used up"
    assert document["checks"] == []
    assert document["seconds"] >= 85


def test_a_run_of_other_code_is_not_gone_on_with(tmp_path, monkeypatch):
    gpu_out = tmp_path / "out"
    gpu_out.mkdir()
    (gpu_out / gpu.ITEMS).write_text(json.dumps({"identity": gpu.identity(True)}) + "\n")
    monkeypatch.setattr(gpu_kit, "source_hash", lambda: "other")
    with pytest.raises(ValueError, match=r"of another run .*sources"):
        gpu.resume(gpu_out, tmp_path / "new.jsonl", gpu.identity(True))
    with pytest.raises(ValueError, match="does not exist"):
        gpu.resume(tmp_path / "nothing", tmp_path / "new.jsonl", gpu.identity(True))


SLOW = """
import pytest, time
@pytest.mark.parametrize("number", range(1000))
def test_slow(number): time.sleep(0.1)
"""
KILLED = """
import signal, sys
from pathlib import Path
from benchmarks import gpu
signal.signal(signal.SIGTERM, gpu._interrupt)
part = gpu.Part("stand-in", "correctness", 300, (sys.argv[2],))
sys.exit(gpu.run(Path(sys.argv[1]), [[part]], True, 300.0))
"""


@pytest.mark.parametrize("how", ["SIGKILL", "SIGTERM"])
def test_a_suite_that_is_killed_leaves_what_it_had(tmp_path, how):
    """The results are a whole document at any time; SIGTERM also leaves the table and the report. No process is left:
    a part whose suite is gone begins nothing more."""
    out, file = tmp_path / "out", part_of(tmp_path, SLOW).tests[0]
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(out), file], env=VARIABLES)
    items = out / gpu.ITEMS
    while not items.exists() or items.read_text().count('"ok"') < 10:
        assert process.poll() is None
        time.sleep(0.1)
    time.sleep(0.5)
    process.send_signal(getattr(signal, how))
    process.wait(60)
    document = results.load(out / results.FILE)
    assert document["interrupted"] is True
    assert sum(entry["status"] == "ok" for entry in document["checks"]) >= 10
    assert document["parts"][0]["status"] == "incomplete"
    if how == "SIGTERM":
        assert process.returncode == 1
        assert sorted(path.name for path in out.iterdir()) == [
            "bench.json",
            "items.jsonl",
            "log.txt",
            "report.html",
            "table.md",
        ]
    if how == "SIGKILL":  # the part's process finds out by itself
        until = time.monotonic() + 60
        while '"ended": "late"' not in items.read_text():
            assert time.monotonic() < until
            time.sleep(0.1)
    before = items.read_text()
    time.sleep(0.5)
    assert items.read_text() == before


def test_a_line_cut_off_by_a_kill_is_left_out(tmp_path):
    (tmp_path / gpu.ITEMS).write_text('{"part": "a", "item": "x", "status": "ok"}\n{"part": "a", "item": "y", "sta')
    assert list(gpu.last_outcomes(gpu.read(tmp_path / gpu.ITEMS))) == [("a", "x")]


def test_the_limit_counts_from_the_start_of_the_process():
    code = "import time; time.sleep(0.5); from benchmarks import gpu; print(gpu.since_start())"
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=VARIABLES)
    assert 0.45 <= float(done.stdout) <= time.monotonic() - began + 0.05


GPU = ("triton", "cuda-sm90", "cuda-sm80")


def test_every_part_on_a_gpu_has_cases(monkeypatch):
    """No part's words select nothing there, and every case is in some part."""
    monkeypatch.setattr(gpu_problems, "ON_GPU", True)
    targets = {x.name: x for x in (gpu_problems.Target("triton", "triton"), gpu_problems.SM90, gpu_problems.SM80)}
    names = {part.name for stage in gpu.stages(GPU) for part in stage}
    for name in GPU:
        for dtype, kind in gpu_problems.DTYPES.items():
            for part, cases in gpu_problems.PARTS.items():
                found = gpu_problems.problems(targets[name], kind, cases)
                assert (f"{name} {dtype} {part}" in names) == bool(found)
    assert {f"{name} execution" for name in GPU} <= names


def test_parts_are_chosen_by_name_and_by_group(capsys):
    def names(wanted):
        return [part.name for stage in gpu.chosen(wanted, GPU) for part in stage]

    assert names([])[:2] == ["smoke", "headline"]
    assert not any("check" in name and "self" not in name for name in names([]))
    assert names(["headline"]) == ["headline"]
    assert len(names(["sanitizers"])) == 9
    with pytest.raises(SystemExit):
        gpu.main(["nothing"])
    assert "expected one of" in capsys.readouterr().err


def test_the_extension_is_taken_out_of_a_wheel(tmp_path, monkeypatch):
    monkeypatch.setenv("RETRO_KERNELS_CUDA_LIBRARY", "")
    for name, content in (("good", {"retro_kernels/_cuda.abi3.so": b"library"}), ("bad", {"other": b""})):
        with zipfile.ZipFile(tmp_path / f"{name}.whl", "w") as archive:
            for file, data in content.items():
                archive.writestr(file, data)
    monkeypatch.setattr(cuda_extension, "LIBRARY", tmp_path / "_cuda.abi3.so")
    gpu.prepare(tmp_path / "good.whl", tmp_path / "out", True, 1.0, print)
    with open(os.environ["RETRO_KERNELS_CUDA_LIBRARY"], "rb") as file:
        assert file.read() == b"library"
    with pytest.raises(ValueError, match="RETRO_KERNELS_BUILD_CUDA=1"):
        gpu.prepare(tmp_path / "bad.whl", tmp_path / "out", True, 1.0, print)


def test_where_nvcc_is_found_is_left_to_setup_py(tmp_path, monkeypatch):
    """It looks among pip's packages and in /usr/local/cuda too; where there is none, its reason is said."""
    said = []

    def build(command, **options):
        assert command[1:] == [str(gpu.ROOT / "setup.py"), "build_ext", "--inplace"]
        assert options["env"]["RETRO_KERNELS_BUILD_CUDA"] == "1"
        return subprocess.CompletedProcess(command, 1, "", "there is no nvcc anywhere")

    monkeypatch.delenv("RETRO_KERNELS_CUDA_LIBRARY", raising=False)
    monkeypatch.setattr(cuda_extension, "LIBRARY", tmp_path / "absent.so")
    monkeypatch.setattr(gpu_kit, "unpack", list)
    monkeypatch.setattr(gpu.subprocess, "run", build)
    gpu.prepare(None, tmp_path, False, 60.0, said.append)
    assert "there is no nvcc anywhere" in said[-1]


def test_the_kernels_that_ran_are_told_apart(emulated_library):
    """What another set of kernels computed in a test's place fails it, and so does a test that launches nothing."""
    case = gpu_problems.case("", d=64, b=1, n=17, m=8, r=8, k=1, h=1)
    arguments = gpu_problems.testing.make(case, torch.bfloat16)
    for target in (gpu_problems.SM80, gpu_problems.SM90):
        with target.alone(case):
            gpu_problems.testing.run(arguments, "cuda")

    def computed_by_others():
        with gpu_problems.SM90.alone(case):
            cuda_extension.set_kernels("sm80")
            gpu_problems.testing.run(arguments, "cuda")

    def computed_by_nobody():
        with gpu_problems.SM80.alone(case):
            pass

    with pytest.raises(gpu_problems.testing.Wrong, match="launches of sm90 alone"):
        computed_by_others()
    with pytest.raises(gpu_problems.testing.Wrong, match="launches of sm80 alone"):
        computed_by_nobody()


@pytest.fixture
def emulated_library():
    import emulator

    if emulator.compiler() is None or not emulator.SOURCES.exists():
        pytest.skip("there is no C++ compiler, or this is not a source tree")
    cuda_extension.emulate(emulator.build())
    yield
    cuda_extension.emulate(None)


def a_kit(folder, **changes):
    """A kit of this machine but for `changes`; its extension is no library, and its one Triton kernel no kernel."""
    folder.mkdir()
    (folder / "entry").mkdir()
    (folder / "entry" / "kernel.cubin").write_bytes(b"kernel")
    group = {"child_paths": {"kernel.cubin": "/where/it/was/made/entry/kernel.cubin"}}
    (folder / "entry" / "__grp__kernel.json").write_text(json.dumps(group))
    with tarfile.open(folder / gpu_kit.CACHE, "w:xz") as archive:
        archive.add(folder / "entry", "entry")
    (folder / gpu_kit.EXTENSION).write_bytes(b"library")
    (folder / gpu_kit.KEY).write_text(json.dumps({**gpu_kit.key(), "cuda": "13.0", "entries": 1, **changes}))
    return folder


@pytest.fixture
def cuda_13(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    for name in ("RETRO_KERNELS_CUDA_LIBRARY", "TRITON_CACHE_DIR"):
        monkeypatch.setenv(name, "")  # so that what unpack sets is undone
        monkeypatch.delenv(name)


def test_a_kit_that_fits_is_used(tmp_path, cuda_13):
    said = gpu_kit.unpack(a_kit(tmp_path / "kit"), tmp_path / "cache")
    assert said == ["kit: its CUDA extension is used", "kit: 1 Triton kernels are used"]
    assert os.environ["RETRO_KERNELS_CUDA_LIBRARY"] == str(tmp_path / "kit" / gpu_kit.EXTENSION)
    cache = gpu_kit.Path(os.environ["TRITON_CACHE_DIR"])
    assert gpu_kit.entries(cache) == 1
    # Triton looks for an entry's files at the paths of this file.
    paths = json.loads((cache / "entry" / "__grp__kernel.json").read_text())["child_paths"]
    assert paths == {"kernel.cubin": str(cache / "entry" / "kernel.cubin")}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"csrc": "other"}, r"CUDA extension is not used, .* csrc other, here"),
        ({"cuda": "12.8"}, r"CUDA extension is not used, .* cuda 12.8, here 13.0"),
        ({"compiler": "other"}, r"1 Triton kernels will not be found, .* compiler other, here"),
        ({"python": "3.9"}, r"1 Triton kernels will not be found, .* python 3.9, here"),
        ({"kernels": "other"}, r"the package has changed since"),
    ],
)
def test_a_kit_that_does_not_fit_is_said(changes, said, tmp_path, cuda_13):
    found = gpu_kit.unpack(a_kit(tmp_path / "kit", **changes), tmp_path / "cache")
    assert re.search(said, "\n".join(found))
    assert ("RETRO_KERNELS_CUDA_LIBRARY" in os.environ) == ("not used" not in said)


def test_no_kit_is_said(tmp_path, cuda_13):
    assert "no kit" in gpu_kit.unpack(tmp_path / "nothing")[0]
    assert "TRITON_CACHE_DIR" not in os.environ
