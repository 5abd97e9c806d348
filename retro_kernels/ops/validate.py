"""Checks of arguments that every operation shares. Each error names the argument, what was given, what was expected."""

from __future__ import annotations

import math
from typing import Any

import torch

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def tensor(name: str, value: Any, dtype: tuple[torch.dtype, ...], device: torch.device | None = None) -> torch.Tensor:
    """Raises TypeError for what is no tensor or has another dtype, ValueError for another device."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name}: got {type(value).__name__}, expected a torch.Tensor")
    if value.layout != torch.strided:
        raise TypeError(f"{name}: got a {value.layout} tensor, expected a dense one (call .to_dense())")
    if value.dtype not in dtype:
        expected = " or ".join(dict.fromkeys(str(x) for x in dtype))
        raise TypeError(f"{name}: got dtype {value.dtype}, expected {expected}")
    if device is not None and value.device != device:
        raise ValueError(f"{name}: got a tensor on {value.device}, expected {device}, where the query is")
    return value


def rank(name: str, value: torch.Tensor, dims: str) -> None:
    """`dims` is written as in the docstrings: "b, n, h, d"."""
    if value.dim() != len(dims.split(",")):
        raise ValueError(f"{name}: got shape {list(value.shape)}, expected [{dims}]")


def shape(name: str, value: torch.Tensor, dims: str, *expected: tuple[Any, ...]) -> None:
    """Raises ValueError unless the shape is one of `expected`; nothing broadcasts."""
    given = tuple(value.shape)
    for candidate in expected:
        if len(given) == len(candidate) and all(x == y for x, y in zip(given, candidate)):
            return
    sizes = " or ".join(str(list(x)) for x in expected)
    raise ValueError(
        f"{name}: got shape {list(given)}, expected [{dims}] = {sizes} (no argument broadcasts: use expand)"
    )


def integer(name: str, value: Any, low: int, high: Any = None, high_name: str = "") -> Any:
    """Raises TypeError unless value is an int (or a symbolic one), ValueError outside [low, high]."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name}: got {value!r} ({type(value).__name__}), expected an int")
    if value < low or (high is not None and value > high):
        limit = f"from {low} to {high_name} = {high}" if high is not None else f"at least {low}"
        raise ValueError(f"{name}: got {value}, expected {limit}")
    return value


def number(name: str, value: Any) -> float:
    """Raises TypeError unless value is a real number, ValueError unless it is finite."""
    if isinstance(value, bool) or not isinstance(value, (int, float, torch.SymInt, torch.SymFloat)):
        raise TypeError(f"{name}: got {value!r} ({type(value).__name__}), expected a float")
    if not -math.inf < value < math.inf:
        raise ValueError(f"{name}: got {value}, expected a finite number")
    return float(value)
