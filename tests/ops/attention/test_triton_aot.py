"""The kernels compile under the shipped launch settings, on the Tritons of `aot.VERSIONS`, without a spill but for what
`aot.MAY_SPILL` names: no global atomic, shared memory that fits, WGMMA in every product on sm_90 where
`aot.all_by_wgmma` says so.

What was compiled, of which version, is committed (compiled_settings.json), tied to the kernels' source by a hash and to
the settings entry by entry; a few are compiled anew in every run.
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
        "the kernels have changed since the table was made: run `python tests/ops/attention/aot.py` without "
        "TRITON_INTERPRET, with each Triton of its VERSIONS, and commit the result"
    )
    assert tuple(committed["versions"]) == aot.VERSIONS
    for version, rows in committed["versions"].items():
        assert {x: row["settings"] for x, row in rows.items()} == {x: aot.described(x, version) for x in rows}


@pytest.mark.parametrize("version", aot.VERSIONS)
def test_the_settings_of_the_paper_are_compiled(version, committed):
    """Heads of 64, forward and backward, plain and with relative positions."""
    wanted = aot.product((90, 80), ("clock",), ("bf16",), (64,), ("plain", "relative"), version)
    lacking = {x for x in wanted if x not in committed["versions"][version]}
    assert {x.split()[1] for x in lacking} <= {"backward_null"}


@pytest.mark.parametrize("version", aot.VERSIONS)
def test_every_setting_passed_the_gate(version, committed):
    rows = committed["versions"][version]
    assert {x: found for x in rows if (found := aot.faults(x, rows[x]))} == {}


def test_an_older_triton_takes_what_it_does_not_spill():
    identifier = "sm_90 backward_queries clock bf16 64 relative"
    assert aot.described(identifier, "3.6.0") == aot.described(identifier, "3.8.1") == "32x64, 8 warps, 1 stages"
    assert aot.described(identifier, "3.9.0") == aot.described(identifier, "3.10.0") == "64x32, 8 warps, 1 stages"
    assert aot.described("sm_90 backward clock bf16 64 relative", "3.6.0") is None, "two launches"


@pytest.mark.parametrize("identifier", FRESH)
def test_the_settings_of_the_main_workloads_compile_anew(identifier, fresh):
    result = fresh[identifier]
    print(f"{identifier}: {result['settings']}: {result['registers']} registers, {result['shared']} bytes shared")
    assert aot.faults(identifier, result) == []
