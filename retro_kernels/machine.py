"""The processor, the driver and the packages of this machine, for `doctor` and for what benchmarks record."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
import subprocess
from functools import cache
from pathlib import Path

INSTRUCTIONS = (
    "avx2",
    "fma",
    "avx512f",
    "avx512bw",
    "avx512_vnni",
    "avx512_bf16",
    "amx_bf16",
    "asimd",
    "bf16",
    "sve",
)
"""The instruction sets that matter to the kernels."""


def package_version(name: str) -> str | None:
    """The installed version, from the package's metadata: nothing is imported."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def cpu_model() -> str:
    """The processor's name, as the system has it."""
    return _cpu()[0] or platform.processor() or platform.machine()


def cpu_features() -> list[str]:
    """Those of `INSTRUCTIONS` that the processor reports."""
    return [name for name in INSTRUCTIONS if name in _cpu()[1]]


@cache
def _cpu() -> tuple[str, frozenset[str]]:
    """The model and the flags of the first processor in /proc/cpuinfo."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return "", frozenset()
    facts: dict[str, str] = {}
    for line in lines:
        name, _, value = line.partition(":")
        facts.setdefault(name.strip().lower(), value.strip())
    model = facts.get("model name") or facts.get("hardware") or ""
    return model, frozenset((facts.get("flags") or facts.get("features") or "").split())


def driver_version() -> str | None:
    """Of NVIDIA's driver; None where there is no nvidia-smi. Raises OSError where nvidia-smi fails."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    if done.returncode or not done.stdout.strip():
        raise OSError(f"nvidia-smi fails: {(done.stderr or done.stdout).strip()[:200]}")
    return done.stdout.splitlines()[0].strip()
