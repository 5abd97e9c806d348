"""Every shipped launch setting compiles for sm_80, sm_90 and sm_100: no global atomic, shared memory that fits, and
no spill but for the settings that `aot.MAY_SPILL` names with a limit (backward of heads wider than 128).

All of them take minutes, so their results are committed (compiled_settings.json), tied to the kernels' source by a
hash; the settings of the main workloads are compiled anew in every run.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

import aot

FRESH = [
    identifier
    for identifier in aot.identifiers()
    if identifier.split()[1] in ("forward", "backward")
    and identifier.split()[2:4] in (["bf16", "64"], ["bf16", "128"])
    and (identifier.startswith("sm_90") or identifier.endswith("plain"))
]


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
        "`python tests/ops/chunked_cross_attention/aot.py` without TRITON_INTERPRET and commit the result"
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
