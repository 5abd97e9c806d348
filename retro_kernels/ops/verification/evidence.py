"""Which GPU backend is the faster one, by measurement, and what is verified: evidence.json beside this file.

`python -m benchmarks.evidence` makes it from the results of the GPU suite; it is empty as long as no GPU has run that.
"devices": a device whose run was whole and right -> for each operation, dtype and head size that was timed the backend
that took less time. Where it says nothing, Triton comes before CUDA C++. "verified": the verdicts of those runs
(`records.py`).
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import torch

from ..compiling import constant

TABLE = Path(__file__).with_name("evidence.json")


@functools.lru_cache(maxsize=1)
def table() -> dict[str, dict[str, str]]:
    """Device -> "operation dtype head_dim" -> "triton" or "cuda"."""
    return json.loads(TABLE.read_text(encoding="utf-8"))["devices"]


def key(operation: str, dtype: str, head_dim: int) -> str:
    """`operation` is the public function's name, `dtype` torch's without "torch."."""
    return f"{operation} {dtype} {head_dim}"


def order(call: Any, default: tuple[str, ...]) -> tuple[str, ...]:
    """The backends in the order in which they are asked for this call."""
    query = call.query
    if query.device.type != "cuda":
        return default
    return order_of(call.operation, query.device, query.dtype, int(query.shape[-1]), default)


def order_of(
    operation: str, device: torch.device, dtype: torch.dtype, head_dim: int, default: tuple[str, ...]
) -> tuple[str, ...]:
    """The same for calls of a kind on a GPU."""
    winner = _winner(operation, device, dtype, head_dim)
    return default if winner is None else (winner, *(name for name in default if name != winner))


@constant  # a compiled graph has no file to read
def _winner(operation: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    if device.type != "cuda" or not table():
        return None
    return table().get(_device_name(device), {}).get(key(operation, str(dtype).removeprefix("torch."), head_dim))


@functools.lru_cache(maxsize=64)
def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device)
