"""The CUDA kernels spill nothing and fit into shared memory on every architecture that they are compiled for.

All of them take a minute or two of nvcc, so their table is committed (cuda_resources.json), tied to the sources by a
hash; one file of them is compiled anew in every run where there is an nvcc.
"""

from __future__ import annotations

import json
import re
import shutil

import cuda_resources
import emulator
import pytest

pytestmark = pytest.mark.skipif(not emulator.SOURCES.exists(), reason="not a source tree")
FRESH = ("sm80/forward.cu", "compute_80", "sm_80")


@pytest.fixture(scope="module")
def committed():
    return json.loads(cuda_resources.TABLE.read_text(encoding="utf-8"))


def test_the_committed_table_is_of_these_kernels(committed):
    assert list(committed) == cuda_resources.sources()
    for source, entry in committed.items():
        assert entry["hash"] == cuda_resources.source_hash(source), (
            f"{source}, or what it includes, has changed since the table was made: run "
            "`python tests/ops/attention/cuda_resources.py` and commit the result"
        )
        assert [name for name in entry if name != "hash"] == cuda_resources.architectures(source)


@pytest.mark.parametrize(
    ("header", "same"),
    [
        ("int x = 1;  // said otherwise\n\n// and more\n", True),
        ("int x = 2;  // said\n", False),
        ('int x = 1; const char* y = "a//b";\n', False),
    ],
)
def test_the_hash_is_of_code_and_not_of_comments(header, same, tmp_path, monkeypatch):
    monkeypatch.setattr(emulator, "SOURCES", tmp_path)
    (tmp_path / "kernel.cu").write_text('#include "header.cuh"\n')
    (tmp_path / "header.cuh").write_text("int x = 1;  // said\n")
    before = cuda_resources.source_hash("kernel.cu")
    (tmp_path / "header.cuh").write_text(header)
    assert (cuda_resources.source_hash("kernel.cu") == before) == same


def test_nothing_spills_and_all_fits(committed):
    for source, entry in committed.items():
        for architecture in cuda_resources.architectures(source):
            for name, costs in entry[architecture].items():
                label = f"{source} {architecture} {name}: {costs}"
                assert costs["spills"] == 0, label
                assert costs["stack"] == 0, label
                assert costs["registers"] <= 255, label
                assert costs["shared"] <= cuda_resources.LARGEST_SHARED[architecture], label


# Of a multiprocessor: registers, which a warp takes in units of 256, and bytes of shared memory, of which a block takes
# a KiB more than it asks for (CUDA Programming Guide, compute capabilities).
REGISTERS, SHARED = 65536, {"sm_80": 164 << 10, "sm_90a": 228 << 10, "sm_100": 228 << 10}
BACKWARD = re.compile(r"attention_backward<(?:BFloat16|Float16), (\d+), (\d+), \d+, (true|false)>")


def test_two_blocks_of_the_backward_share_a_multiprocessor(committed):
    """But for heads of 128 in several blocks of rows, and what fills an A100's shared memory."""
    for architecture, shared in SHARED.items():
        for name, costs in committed["sm80/backward.cu"][architecture].items():
            dim, rows, one_block = BACKWARD.fullmatch(name).groups()
            alone = (dim, one_block) == ("128", "false") or (int(dim) > 64 and rows == "128" and shared < 200 << 10)
            alone = alone or (dim, rows) == ("128", "128")
            by_registers = REGISTERS // (8 * 256 * -(-costs["registers"] * 32 // 256))
            by_shared = shared // (costs["shared"] + 1024)
            assert min(by_registers, by_shared) >= (1 if alone else 2), f"{architecture} {name}: {costs}"


def test_the_machine_code_has_what_it_must_and_nothing_that_stalls(committed):
    """A decode kernel's launch may overlap its predecessor where the code was compiled for 9.0 or newer
    (kOldestThatWaits in launch.cuh): there, and there alone, each waits."""
    for source, entry in committed.items():
        for architecture in cuda_resources.architectures(source):
            for name, costs in entry[architecture].items():
                label = f"{source} {architecture} {name}: {costs}"
                assert costs["loop_fences"] == 0, label
                assert costs["dummy_products"] == 0, label
                assert costs["setmaxnreg"] == (2 if source.startswith("sm90/") else 0), label
                assert (costs["waits"] > 0) == (source.startswith("decode/") and architecture == "sm_90a"), label


CODE = """
\t\tFunction : void retro_kernels::sm90::kernel<(int)3>(Problem)
        /*0000*/                   USETMAXREG.DEALLOC.CTAPOOL 0x28 ;
        /*0010*/                   MEMBAR.ALL.GPU ;
        /*0020*/                   I2F.U32.RP R0, R1 ;
        /*0030*/                   MEMBAR.ALL.GPU ;
        /*0040*/                   HGMMA.64x8x16.F16 RZ, gdesc[URZ], RZ, !UPT ;
        /*0050*/              @!P0 BRA 0xb0 ;
        /*0060*/              @!P0 BRA 0x20 ;
        /*0070*/                   ACQBULK ;
        /*0080*/                   MEMBAR.ALL.GPU ;
        /*0090*/                   EXIT ;
        /*00a0*/                   BRA 0xa0 ;
        /*00b0*/                   MEMBAR.ALL.CTA ;
        /*00c0*/                   BRA 0x70 ;
"""


def test_what_the_lint_sees():
    """One of three fences is in a loop: 0x80 is reached from below and not again."""
    found = {"loop_fences": 1, "loop_divisions": 1, "dummy_products": 1, "setmaxnreg": 1, "waits": 1}
    assert cuda_resources.inspect(CODE) == {"kernel<3>": found}


@pytest.mark.skipif(shutil.which("nvcc") is None or cuda_resources.disassembler() is None, reason="there is no nvcc")
def test_a_file_compiled_anew_costs_what_the_table_says(committed):
    source, virtual, real = FRESH
    fresh = cuda_resources.measure(source, virtual, [real], cuda_resources.dynamic_shared())
    assert fresh[real] == committed[source][real]
