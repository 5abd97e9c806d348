"""The kernels compile for sm_80, sm_90 and sm_100 under the shipped launch settings: no global atomic, shared memory
that fits, WGMMA in every product on sm_90, and no spill, but for what `aot.MAY_SPILL` and `aot.NOT_ALL_WGMMA` name.

All of them take minutes, so their results are committed (compiled_settings.json), tied to the kernels' source by a
hash; a few are compiled anew in every run.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

import aot

FRESH = (
    "sm_90 forward clock bf16 128 plain",
    "sm_90 forward chunk bf16 64 relative",
    "sm_80 forward neighbour bf16 64 plain",
    "sm_100 forward causal bf16 64 plain",
    "sm_90 backward clock bf16 128 plain",
    "sm_90 backward_rows neighbour bf16 128 plain",
)


@pytest.fixture(scope="module")
def committed():
    return json.loads(aot.TABLE.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def fresh():
    """Compiled in a process of their own: in this one the kernels may be the interpreter's."""
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    out = subprocess.run(
        [sys.executable, aot.__file__, "--list", *FRESH], env=environment, capture_output=True, text=True
    )
    assert out.returncode == 0, out.stderr
    return json.loads(out.stdout.splitlines()[-1])


def test_the_committed_table_is_of_these_kernels_and_settings(committed):
    assert committed["kernels"] == aot.kernels_hash(), (
        "the kernels or their launch settings have changed since the table was made: run "
        "`python tests/ops/attention/aot.py` without TRITON_INTERPRET and commit the result"
    )
    assert list(committed["results"]) == aot.identifiers()


@pytest.mark.parametrize("identifier", aot.identifiers())
def test_every_setting_passed_the_gate(identifier, committed):
    assert aot.faults(identifier, committed["results"][identifier]) == []


@pytest.mark.parametrize("identifier", FRESH)
def test_the_settings_of_the_main_workloads_compile_anew(identifier, fresh):
    result = fresh[identifier]
    print(f"{identifier}: {result['settings']}: {result['registers']} registers, {result['shared']} bytes shared")
    assert aot.faults(identifier, result) == []
