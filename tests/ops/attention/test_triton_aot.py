"""The kernels compile under the shipped launch settings, on the Tritons of `aot.VERSIONS`, without a spill but for what
`aot.MAY_SPILL` names: no global atomic, shared memory that fits (of two programs, for relative positions on sm_90),
WGMMA in every product on sm_90 where, and only where, `aot.all_by_wgmma` says so.

What was compiled, of which version, is committed (compiled_settings.json), tied to the kernels' code by a hash and to
the settings entry by entry; a few are compiled anew in every run.
"""

from __future__ import annotations

import json
import os
import re
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
SM_89 = "sm_89 forward clock bf16 64 plain"
BELOW_WGMMA_BEFORE_3_9 = {"backward_queries 64 relative"}


@pytest.fixture(scope="module")
def fresh():
    """Compiled in a process of their own: in this one the kernels may be the interpreter's."""
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    out = subprocess.run(
        [sys.executable, aot.__file__, "--list", *FRESH, SM_89, f"{SM_89} throughout"],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert out.returncode == 0, out.stderr
    return json.loads(out.stdout.splitlines()[-1])


COMMITTED = aot.read(aot)


def test_the_committed_table_is_of_these_kernels():
    table = json.loads(aot.TABLE.read_text(encoding="utf-8"))
    assert table["kernels"] == aot.kernels_hash(), (
        "the kernels have changed since the table was made: run `python tests/ops/attention/aot.py` without "
        "TRITON_INTERPRET, with each Triton of its VERSIONS, and commit the result"
    )
    assert tuple(table["columns"]) == aot.COLUMNS


@pytest.mark.parametrize("version", aot.VERSIONS)
def test_everything_that_is_listed_is_compiled_as_it_is_chosen(version):
    rows = COMMITTED[version]
    assert {x: row["settings"] for x, row in rows.items()} == {
        x: aot.described(x, version) for x in aot.identifiers(version)
    }


def test_the_page_is_what_the_table_says():
    """By `python tests/ops/attention/aot.py --page`."""
    assert aot.page(COMMITTED) in aot.PAGE.read_text()


@pytest.mark.parametrize("version", aot.VERSIONS)
def test_every_setting_passed_the_gate(version):
    rows = COMMITTED[version]
    assert {x: found for x in rows if (found := aot.faults(x, rows[x]))} == {}


def test_what_may_spill_does():
    """Somewhere; what no longer spills is taken off the list."""
    rows = [(x, row["stack"] or 0) for versions in COMMITTED.values() for x, row in versions.items()]
    for pattern, most in aot.MAY_SPILL.items():
        assert max(stack for x, stack in rows if re.fullmatch(pattern, x)) == most, pattern


@pytest.mark.parametrize("version", aot.VERSIONS)
def test_what_is_below_a_wgmma(version):
    """Heads of 64 and 128 on sm_90. The gate holds each kernel to it, in both directions."""
    always = {
        "backward 128 options",
        "backward_bias 128 options",
        "backward_bias 128 relative",
        "backward_keys 128 relative",
        "backward_queries 128 relative",
    }
    expected = {"3.6.0": BELOW_WGMMA_BEFORE_3_9, "3.9.0": {"backward 64 relative"}}[version]
    assert aot.below_wgmma(version) == always | expected


def result(**others):
    row = dict.fromkeys(aot.COLUMNS, 0) | {"settings": "64x32, 4 warps, 2 stages", "registers": 200, "wgmma": 6}
    return row | others


@pytest.mark.parametrize(
    ("found", "says"),
    [
        (result(), None),
        (result(stack=8), "spills 8 bytes"),
        (result(shared=116 << 10), "no room for two programs"),
        (result(shared=228 << 10), "needs 233472 bytes of shared memory"),
        (result(mma=2), "all_by_wgmma says otherwise"),
        (result(settings="32x32, 4 warps, 2 stages"), "all_by_wgmma says otherwise"),
        (result(atomics=1), "atomic"),
        (result(contracted=1), "no bound"),
    ],
)
def test_the_gate_can_fail(found, says):
    faults = aot.faults("sm_90 forward clock bf16 64 relative", found)
    assert faults == [] if says is None else any(says in fault for fault in faults)


def test_sm_89_has_sm_86s_ptx(fresh):
    """Which aot.py takes for granted: compiled for sm_89 throughout, the machine code is the same."""
    assert fresh[SM_89] == fresh[f"{SM_89} throughout"]


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
