"""What the host does for the CUDA kernels, in the emulator: which kernels take a call, how they are launched, and what
it makes of the driver's answers. The encoder of tensor maps is csrc/cuda/emulator/driver.h's, which holds its caller to
the contract of cuda.h; a thread has a context there only once it has made one current."""

from __future__ import annotations

import shutil
import subprocess
import threading
from pathlib import Path

import emulator
import pytest
import torch

import retro_kernels as rk
from retro_kernels import cuda_extension

pytestmark = pytest.mark.usefixtures("emulated")
NONE = {"sm80": 0, "sm90": 0, "decode": 0, "overlapping": 0}


@pytest.fixture(autouse=True)
def counts(emulated):
    cuda_extension.launches()
    yield
    cuda_extension.set_kernels("")


def attend(**options):
    query, key = torch.randn(1, 21, 2, 64).bfloat16(), torch.randn(1, 2, 2, 8, 2, 64).bfloat16()
    tensors = [x.requires_grad_() for x in (query, key, key.clone())]
    return rk.chunked_cross_attention(*tensors, chunk_size=8, backend="cuda", **options), tensors


@pytest.mark.parametrize("name", ["sm80", "sm90", "sm90 only"])
def test_launches_are_counted_by_the_kernels_that_took_them(name):
    cuda_extension.set_kernels(name)
    out, tensors = attend()
    assert cuda_extension.launches() == NONE | {name[:4]: 1}
    torch.autograd.grad(out.sum(), tensors)
    assert cuda_extension.launches() == NONE | {name[:4]: 1}
    assert cuda_extension.launches() == NONE


def test_what_hopper_s_kernels_do_not_take_counts_as_sm80_s():
    cuda_extension.set_kernels("sm90")
    attend(sequence_starts=torch.zeros(1, 21, dtype=torch.bool))
    assert cuda_extension.launches() == NONE | {"sm80": 1}


def test_an_empty_call_launches_nothing():
    cuda_extension.set_kernels("sm90")
    empty = torch.randn(0, 21, 2, 64).bfloat16()
    rk.chunked_cross_attention(empty, *[torch.randn(0, 2, 2, 8, 2, 64).bfloat16()] * 2, chunk_size=8, backend="cuda")
    assert cuda_extension.launches() == NONE


@pytest.mark.parametrize(("compiled_for", "overlapping"), [("80", 0), ("86", 0), ("90", 4), ("100", 4)])
def test_kernels_overlap_where_the_loaded_code_waits(compiled_for, overlapping, monkeypatch):
    """By the virtual architecture that the loaded code was compiled for: a newer GPU runs PTX of sm_80, which has no
    wait. (A thread that may start early and does not wait is a fault in the emulator.) Two projections, attention and
    its combination."""
    monkeypatch.setenv("RETRO_KERNELS_EMULATOR_COMPILED_FOR", compiled_for)
    states, weight = torch.randn(1, 2, 8, 40), torch.randn(2, 16, 40)
    rk.projected_chunked_cross_attention_decode(
        torch.randn(1, 1, 2, 16), states, weight, weight, chunk_size=8, position=torch.tensor([9]), backend="cuda"
    )
    assert cuda_extension.launches() == NONE | {"decode": 4, "overlapping": overlapping}


@pytest.mark.parametrize("backward", [False, True])
def test_a_fresh_thread_makes_its_context_current(backward):
    """Without one the encoder answers CUDA_ERROR_INVALID_CONTEXT, as the driver does."""
    cuda_extension.set_kernels("sm90 only")
    results = []

    def call():
        try:
            grad_out = torch.ones_like(out)
            results.append(torch.autograd.grad(out, tensors, grad_out) if backward else attend())
        except RuntimeError as error:
            results.append(error)

    out, tensors = attend()
    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    assert not isinstance(results[0], RuntimeError), results[0]


def test_a_tensor_that_the_encoder_refuses_is_sm80_s_work(monkeypatch):
    monkeypatch.setenv("RETRO_KERNELS_EMULATOR_DRIVER_ERROR", "1")  # CUDA_ERROR_INVALID_VALUE
    cuda_extension.set_kernels("sm90")
    attend()
    assert cuda_extension.launches() == NONE | {"sm80": 1}
    cuda_extension.set_kernels("sm90 only")
    with pytest.raises(RuntimeError, match="copy engine cannot walk"):
        attend()


@pytest.mark.parametrize("error", [3, 201, 999])
def test_any_other_answer_of_the_driver_is_an_error(error, monkeypatch):
    monkeypatch.setenv("RETRO_KERNELS_EMULATOR_DRIVER_ERROR", str(error))
    cuda_extension.set_kernels("sm90")
    with pytest.raises(RuntimeError, match=f"cuTensorMapEncodeTiled failed: error {error}"):
        attend()
    assert cuda_extension.launches() == NONE


def cuda_include() -> Path | None:
    nvcc = shutil.which("nvcc")
    found = Path(nvcc).resolve().parent.parent / "include" if nvcc else None
    return next((x for x in (found, Path("/usr/local/cuda/include")) if x and (x / "cuda.h").exists()), None)


@pytest.mark.skipif(cuda_include() is None, reason="there is no cuda.h")
def test_the_stand_in_driver_has_the_numbers_of_cuda_h(tmp_path):
    """What the emulator's driver.h defines in place of cuda.h has cuda.h's values, and the encoder its signature."""
    names = [
        line.split("{")[1].split("}")[0]
        for line in (emulator.SOURCES / "emulator" / "driver.h").read_text().splitlines()
        if line.startswith("enum ")
    ]
    values = [entry.split("=") for line in names for entry in line.split(",")]
    source = tmp_path / "numbers.cpp"
    source.write_text(
        "#include <cuda.h>\n#include <type_traits>\n"
        + "".join(f"static_assert({name.strip()} == {value.strip()});\n" for name, value in values)
        + "using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, "
        "const cuuint64_t*, const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave, "
        "CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);\n"
        "static_assert(std::is_same_v<Encode, decltype(&cuTensorMapEncodeTiled)>);\n"
        "static_assert(alignof(CUtensorMap) % 64 == 0 && sizeof(CUtensorMap) == 128);\n"
    )
    command = [*emulator.compiler(), "-std=c++17", "-fsyntax-only", f"-I{cuda_include()}", f"-I{emulator.SOURCES}"]
    done = subprocess.run([*command, str(source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(values) == 8
