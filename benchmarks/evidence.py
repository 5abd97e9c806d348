"""Generates the table by which the dispatcher chooses between Triton and CUDA C++ on a GPU:

    python -m benchmarks.evidence        from benchmarks/results/*.csv to retro_kernels/ops/verification/evidence.json

Only what was measured counts: a device gets an entry when the GPU suite ran there in full and no check of the CUDA C++
kernels failed; an operation, dtype and head size when both backends were timed in the same run, without options. The
winner is the one with the smaller geometric mean of its times over all workloads, and of forward and of forward and
backward alike.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections import defaultdict
from pathlib import Path

from retro_kernels.bench import results
from retro_kernels.bench.operations import CCA, DTYPES, ENCODER_CROSS, ENCODER_SELF, PLAIN
from retro_kernels.ops.verification import evidence

OPERATIONS = {
    CCA: "chunked_cross_attention",
    ENCODER_SELF: "neighbour_self_attention",
    ENCODER_CROSS: "neighbour_cross_attention",
}
BACKENDS = ("triton", "cuda")
REQUIRED = tuple(
    f"{kernels} {part}"
    for kernels in ("triton", "cuda-sm80")
    for part in ("bf16 attention", "fp16 attention", "bf16 decode", "execution", "memcheck", "racecheck", "initcheck")
)
"""Parts of `benchmarks.gpu`; on compute capability 9.0 those of cuda-sm90 too, wherever the run has them."""


def winners(document: dict) -> dict[str, str] | None:
    """Key of `evidence.key` -> backend, of one run; None when the run does not verify the device."""
    settings = document.get("settings") or {}
    statuses = {part["name"]: part["status"] for part in document.get("parts") or []}
    if settings.get("suite") != "gpu" or settings.get("reduced") is not False or document.get("interrupted"):
        return None
    hopper = [name.replace("sm80", "sm90") for name in REQUIRED] if "cuda-sm90 execution" in statuses else []
    if any(statuses.get(name) != "ok" for name in (*REQUIRED, *hopper)):
        return None
    times: dict[str, dict[tuple, dict[str, float]]] = defaultdict(lambda: defaultdict(dict))
    for row in document["rows"]:
        backend = re.fullmatch(r"retro_kernels\[(\w+)\]", row["variant"])
        size = re.search(r"heads of (\d+)", row["shape"])
        if not (backend and size and row["operation"] in OPERATIONS):
            continue
        if row["status"] != "ok" or row["option"] != PLAIN or backend[1] not in BACKENDS:
            continue
        dtype = str(DTYPES[row["dtype"]]).removeprefix("torch.")
        key = evidence.key(OPERATIONS[row["operation"]], dtype, int(size[1]))
        times[key][row["workload"], row["mode"]][backend[1]] = row["p50_ms"]
    found = {}
    for key, cases in sorted(times.items()):
        both = [case for case in cases.values() if len(case) == len(BACKENDS)]
        if both:
            ratio = sum(math.log(case["cuda"] / case["triton"]) for case in both)
            found[key] = "cuda" if ratio < 0 else "triton"
    return found


def verified(folder: Path) -> list[dict]:
    """The self-check's verdicts of every such run, in the form of `retro_kernels/ops/records.py`."""
    records = []
    for file in results.committed(folder):
        document = results.load(file)
        if winners(document) is not None:
            records += document.get("verified") or []
    return records.checked(records)


def collect(folder: Path) -> dict[str, dict[str, str]]:
    """Device -> its winners, of every result in `folder`."""
    devices = {}
    for file in results.committed(folder):
        document = results.load(file)
        found = winners(document)
        if found is not None:
            devices[document["environment"]["device"]] = found
    return devices


RESULTS = Path(__file__).with_name("results")


def main() -> None:
    devices = collect(RESULTS)
    document = {"generated_by": "python -m benchmarks.evidence", "devices": devices, "verified": verified(RESULTS)}
    evidence.TABLE.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(f"{evidence.TABLE}: {len(devices)} devices", file=sys.stderr)


if __name__ == "__main__":
    main()
