"""The CUDA kernels spill nothing and fit into shared memory on every architecture that they are compiled for.

All of them take a minute or two of nvcc, so their table is committed (cuda_resources.json), tied to the sources by a
hash; one file of them is compiled anew in every run where there is an nvcc.
"""

from __future__ import annotations

import json
import shutil

import cuda_resources
import emulator
import pytest

pytestmark = pytest.mark.skipif(not emulator.SOURCES.exists(), reason="not a source tree")
FRESH = ("sm80/forward.cu", "sm_80")


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


def test_nothing_spills_and_all_fits(committed):
    for source, entry in committed.items():
        for architecture in cuda_resources.architectures(source):
            for name, costs in entry[architecture].items():
                label = f"{source} {architecture} {name}: {costs}"
                assert costs["spills"] == 0, label
                assert costs["stack"] == 0, label
                assert costs["registers"] <= 255, label
                assert costs["shared"] <= cuda_resources.LARGEST_SHARED[architecture], label


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc")
def test_a_file_compiled_anew_costs_what_the_table_says(committed):
    source, architecture = FRESH
    fresh = cuda_resources.measure(source, architecture, cuda_resources.dynamic_shared())
    assert fresh == committed[source][architecture]
