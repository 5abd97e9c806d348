"""A CUDA C++ kernel of sm_80 proved race-free: `.venv-sentryward/bin/python -m benchmarks.rehearsal.sentryward_cuda`.

sentryward takes nvcc's PTX, one launch with its sizes, and pointers to tensors that do not overlap, and proves that no
schedule of the threads has two of them at one place, one writing, without an order between them (cp.async included; the
products' numbers play no part). Chunked cross-attention's forward is shown race-free as it is, and not race-free with a
barrier taken out: the proof is one that can fail. No mask is given, because sentryward follows no branch on data. Of
the backward its solver comes to no end in 15 minutes on a busy machine; it and decoding are not shown.

Its input needs two things that the kernel has not, so it is compiled from a copy (`COPY`): its body in a kernel whose
pointers are parameters of their own and whose sizes are numbers, and cp.async with the size of its source in a register
instead of a predicate.

Needed: nvcc on the path; Python with sentryward 0.1.1.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from sentryward import verify

from benchmarks import rehearsal

PART = "sentryward"
SOURCES = Path(__file__).resolve().parents[2] / "csrc" / "cuda"
SECONDS = 900  # of a proof
THREADS = 128

# File, text, and what stands in its place: the same for every launch here.
COPY = (
    (
        "common/ptx.cuh",
        r"{\n.reg .pred zero;\nsetp.eq.b32 zero, %2, 0;\ncp.async.cg.shared.global [%0], [%1], 16, zero;\n}\n",
        "cp.async.cg.shared.global [%0], [%1], 16, %2;",
    ),
    ("common/ptx.cuh", '"r"(static_cast<int>(valid))', '"r"(valid ? 16 : 0)'),
)

WRAPPER = """
#include "common/platform.cuh"
#undef RK_KERNEL
#undef RK_PARAMETER
#define RK_KERNEL(threads, blocks) __device__ __forceinline__ void
#define RK_PARAMETER const
#include "sm80/forward.cuh"
using namespace retro_kernels;

// [1, chunks = 1, neighbours, tokens, heads, width], contiguous
__device__ __forceinline__ Strides strides(int64_t neighbours, int64_t tokens, int64_t width) {{
  return {{neighbours * tokens * {heads} * width, neighbours * tokens * {heads} * width, tokens * {heads} * width,
          {heads} * width, width}};
}}

extern "C" __global__ void __launch_bounds__({threads}) proved({parameters}) {{
  Problem p{{}};
  p.grouping = kClock, p.type = kBFloat16, p.dim = {dim}, p.batch = 1, p.heads = p.kv_heads = {heads};
  p.tokens = 63 + 64, p.query_neighbours = 1, p.chunks = 1, p.neighbours = {neighbours}, p.retrieved = 64;
  p.by_retrieved = {{0x80000000u, 6}};  // divisor(64)
  p.stride = 64, p.first_token = 63, p.first_group = 0, p.groups = 1, p.scale = 0.125f;
  p.query_stride = p.out_stride = strides(1, 127, {dim});
  p.key_stride = p.value_stride = strides({neighbours}, 64, {dim});
  p.lse_stride = strides(1, 127, 1);
  {assignments}
  sm80::attention_forward<BFloat16, {dim}, 4>(p);
}}
"""
FORWARD = ("const uint16_t* query", "const uint16_t* key", "const uint16_t* value", "uint16_t* out", "float* lse")


@dataclass(frozen=True)
class Proof:
    """64 rows of one chunk and `64 * neighbours` slots; a block a head. `barrier`: (file, text with a barrier, the same
    without it)."""

    dim: int
    neighbours: int
    heads: int = 1
    barrier: tuple[str, str, str] | None = None

    @property
    def name(self) -> str:
        size = f"forward, heads of {self.dim}, 64 rows, {64 * self.neighbours} slots, {self.heads} block(s)"
        return size + (", control: a barrier taken out" if self.barrier else "")

    def source(self) -> str:
        names = [parameter.split()[-1].lstrip("*") for parameter in FORWARD]
        return WRAPPER.format(
            dim=self.dim,
            heads=self.heads,
            neighbours=self.neighbours,
            threads=THREADS,
            parameters=", ".join(FORWARD),
            assignments=" ".join(f"p.{name} = {name};" for name in names),
        )

    @property
    def shared_bytes(self) -> int:
        """ForwardShape::shared_bytes."""
        return 5 * 2 * 64 * self.dim + 8 * (self.neighbours + 1)


OVERWRITTEN = ("sm80/forward.cuh", "block_barrier();  // the next round writes over this stage", "")
# Three tiles of slots: the third comes into the stage of the first.
PROOFS = (Proof(64, 1, heads=2), Proof(64, 3), Proof(128, 1), Proof(64, 3, barrier=OVERWRITTEN))


def replace(folder: Path, file: str, text: str, by: str) -> None:
    """ValueError where the text does not stand there exactly once."""
    found = (folder / file).read_text()
    if found.count(text) != 1:
        raise ValueError(f"{file}: has {found.count(text)} times, expected once: {text}")
    (folder / file).write_text(found.replace(text, by))


def verdict(proof: Proof) -> str:
    """-> what sentryward says of a launch."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "cuda"
        shutil.copytree(SOURCES, folder)
        for change in (*COPY, *([proof.barrier] if proof.barrier else [])):
            replace(folder, *change)
        (folder / "proved.cu").write_text(proof.source())
        subprocess.run(
            ["nvcc", "-std=c++17", "-O3", "-DUSE_CUDA", "-arch=sm_80", "-ptx", "proved.cu", "-o", "proved.ptx"],
            cwd=folder,
            check=True,
            capture_output=True,
        )
        launch = {
            "grid_dim": [proof.heads, 1, 1],
            "block_dim": [THREADS, 1, 1],
            "dynamic_shared_bytes": proof.shared_bytes,
        }
        given = {"schema": "spverify.kernel-input/v1", "entry": "proved", "launch": launch, "arguments": []}
        (folder / "input.json").write_text(json.dumps(given))
        found = verify(str(folder / "proved.ptx"), input=str(folder / "input.json"), timeout_seconds=SECONDS)
    reasons = sorted({f"{x['code']}: {x.get('message', '')}" for x in found.get("diagnostics") or []})
    return ": ".join([found["result"], *reasons[:2]])


def prove(proof: Proof) -> str:
    wanted = "potential_race" if proof.barrier else "race_free"
    found = verdict(proof)
    if found.split(":")[0] != wanted:
        raise AssertionError(f"{found}, expected {wanted}")
    return found


def main() -> None:
    with rehearsal.main(PART, __doc__ or "") as part:
        for proof in PROOFS:
            shown = "a race is found where a barrier is missing" if proof.barrier else "no race under any schedule"
            part.check("chunked_cross_attention", proof.name, shown, lambda proof=proof: prove(proof))


if __name__ == "__main__":
    main()
