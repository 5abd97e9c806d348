"""Describes what a number depends on besides the code: versions, device, threads, commit. A probe may fail alone."""

from __future__ import annotations

import datetime
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from retro_kernels import machine

PACKAGES = ("torch", "triton", "numpy", "faiss-cpu", "faiss-gpu", "retro-pytorch", "transformers", "retro_kernels")
VARIABLES = ("RETRO_KERNELS_BACKEND", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "TRITON_INTERPRET", "CUDA_VISIBLE_DEVICES")


def commit() -> str | None:
    """The commit of the tree this file lies in, '+changes' when tracked files differ from it, None outside git."""
    here = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(here), *arguments], capture_output=True, text=True, timeout=10)
        if done.returncode:
            raise OSError(done.stderr.strip())
        return done.stdout.strip()

    try:
        if not git("ls-files", "--error-unmatch", "environment.py"):
            return None
        return git("rev-parse", "--short=12", "HEAD") + ("+changes" if git("status", "-uno", "--porcelain") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _driver() -> str | None:
    try:
        return machine.driver_version()
    except (OSError, subprocess.SubprocessError):
        return None


def device_name(device) -> str:
    import torch

    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{machine.cpu_model()}, {torch.get_num_threads()} threads"


def device_slug(device) -> str:
    """A folder name for this device: 'nvidia-h100-80gb-hbm3', 'cpu-amd-epyc-2-threads'."""
    import torch

    prefix = "" if torch.device(device).type == "cuda" else "cpu "
    return re.sub(r"[^a-z0-9]+", "-", (prefix + device_name(device)).lower()).strip("-")


def default_backend(device) -> str:
    """The backend that a call on this device takes when it names none, as far as is known, and why."""
    from retro_kernels.ops import backends
    from retro_kernels.ops.backends import ATTENTION as BACKENDS

    name, why = backends.outlook(BACKENDS, device)
    return f"{name}: {why}"


def collect(device) -> dict:
    """Everything recorded beside the numbers, as JSON-ready values."""
    import torch

    device = torch.device(device)
    result: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": commit(),
        "python": platform.python_version(),
        "system": platform.platform(),
        "packages": {name: version for name in PACKAGES if (version := machine.package_version(name))},
        "device": device_name(device),
        "device_slug": device_slug(device),
        "cpu": machine.cpu_model(),
        "cpu_features": machine.cpu_features(),
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "torch_threads": torch.get_num_threads(),
        "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        "environment": {name: os.environ[name] for name in VARIABLES if name in os.environ},
        "command": " ".join(Path(part).name if i == 0 else part for i, part in enumerate(sys.argv)),
    }
    result["default_backend"] = default_backend(device)
    result["packages"]["torch"] = torch.__version__  # the metadata lacks the build's "+cpu" on some wheels
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        result |= {
            "gpu": properties.name,
            "gpu_capability": f"{properties.major}.{properties.minor}",
            "gpu_memory_bytes": properties.total_memory,
            "gpu_l2_bytes": getattr(properties, "L2_cache_size", None),
            "gpu_multiprocessors": properties.multi_processor_count,
            "driver": _driver(),
            "cuda": torch.version.cuda,
        }
    return result
