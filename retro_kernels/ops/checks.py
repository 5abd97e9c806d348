"""Checks of arguments that the operations share, by the names and letters of their signatures. Each error names the
argument, what was given, what was expected."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch

from . import dropout as random
from .compiling import has_autocast

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


@dataclasses.dataclass(frozen=True)
class Tables:
    """Sizes of what is indexed by row and by slot: `rows` and `slots` with their letters, and other widths that
    `attention_bias` may have besides (`wide`)."""

    rows: int
    slots: int
    row_letter: str
    slot_letter: str
    wide: tuple[tuple[str, int], ...] = ()


def heads(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, query_dims: str, key_dims: str) -> None:
    """One dtype and device, ranks, and head counts and sizes that fit; the sizes of other axes are the caller's.

    Raises TypeError or ValueError naming the argument.
    """
    rank("query", query, query_dims)
    dtype, device = query.dtype, query.device
    for name, x in (("key", key), ("value", value)):
        tensor(name, x, (dtype,), device)
        rank(name, x, key_dims)
    h, d = query.shape[-2:]
    hk = key.shape[-2]
    for name, size in (("h", h), ("d", d)):
        if size == 0:
            raise ValueError(f"query: got shape {list(query.shape)}, expected [{query_dims}] with {name} at least 1")
    if hk == 0 or h % hk != 0:
        raise ValueError(
            f"key: got {hk} key/value heads, expected a divisor of the query's {h} heads (shape {list(key.shape)})"
        )
    if value.shape[-1] == 0:
        raise ValueError(f"value: got shape {list(value.shape)}, expected d_value at least 1")


def mask(name: str, given: torch.Tensor | None, query: torch.Tensor, dims: str, sizes: tuple[int, ...]) -> None:
    """Raises TypeError unless a mask is bool, ValueError unless it has the sizes."""
    if given is not None:
        tensor(name, given, (torch.bool,), query.device)
        shape(name, given, dims, sizes)


def positions(
    given: Mapping[str, Any],
    tables: Tables,
    query_rotary: Any,
    key_rotary: Any,
    rotary_interleaved: Any,
    key_may_be_turned: bool = False,
) -> None:
    """The additive bias, the relative positions and the rotary tables of a call whose tensors are `given` by name.
    `key_may_be_turned`: the query's table may come alone, for keys that were turned before."""
    query, attention_bias, relative_key = (given[name] for name in ("query", "attention_bias", "relative_key"))
    h, d = query.shape[-2:]
    device = query.device
    either = (query.dtype, torch.float32)  # parameters and tables may stay in fp32 beside half-precision activations
    row, slot = tables.row_letter, tables.slot_letter
    if attention_bias is not None:
        tensor("attention_bias", attention_bias, either, device)
        widths = (*tables.wide, (slot, tables.slots))
        dims = f"h, {row}, " + " | ".join(letter for letter, _ in reversed(widths))
        shape("attention_bias", attention_bias, dims, *((h, tables.rows, width) for _, width in reversed(widths)))
    if relative_key is not None:
        tensor("relative_key", relative_key, either, device)
        distances = f"2 {row} - 1" if row == slot else f"{row} + {slot} - 1"
        expected = (h, max(tables.rows + tables.slots - 1, 0), d)
        shape("relative_key", relative_key, f"h, {distances}, d", expected)
        if query_rotary is not None or key_rotary is not None:
            raise ValueError("relative_key: got rotary tables too, expected one kind of position: drop one of them")
    for name in ("content_bias", "relative_bias"):
        x = given[name]
        if x is not None:
            if relative_key is None:
                raise ValueError(
                    f"{name}: got a tensor without relative_key, expected both: it is part of the position"
                )
            tensor(name, x, either, device)
            shape(name, x, "h, d", (h, d))

    if not isinstance(rotary_interleaved, bool):
        raise TypeError(f"rotary_interleaved: got {rotary_interleaved!r}, expected True or False")
    if (query_rotary is None) != (key_rotary is None) and not (key_may_be_turned and key_rotary is None):
        raise ValueError(
            f"query_rotary and key_rotary: got only {'key' if query_rotary is None else 'query'}_rotary, "
            "expected both (a table of cos 1 and sin 0 turns nothing)"
        )
    if query_rotary is not None:
        width = _check_rotary("query_rotary", query_rotary, row, tables.rows, d, either, device)
    if query_rotary is not None and key_rotary is not None:
        key_width = _check_rotary("key_rotary", key_rotary, slot, tables.slots, d, either, device)
        if width != key_width:
            raise ValueError(f"key_rotary: got width {key_width}, expected {width}, the width of query_rotary")


def _check_rotary(name, tables, rows_name, rows, d, dtypes, device) -> int:
    """-> the tables' width, half of the dimensions that they turn."""
    if not isinstance(tables, (tuple, list)) or len(tables) != 2:
        raise TypeError(f"{name}: got {type(tables).__name__}, expected a pair of tensors (cos, sin)")
    for part, table in zip(("cos", "sin"), tables):
        tensor(f"{name} ({part})", table, dtypes, device)
        rank(f"{name} ({part})", table, f"{rows_name}, rotary_dim / 2")
    width = tables[0].shape[1]
    for part, table in zip(("cos", "sin"), tables):
        shape(f"{name} ({part})", table, f"{rows_name}, rotary_dim / 2", (rows, width))
    if 2 * width > d:
        raise ValueError(f"{name}: got width {width}, which turns {2 * width} dimensions, expected at most d = {d}")
    return width


def null_slot(given: Mapping[str, Any], d_value: int) -> None:
    query, null_key, null_value = given["query"], given["null_key"], given["null_value"]
    if (null_key is None) != (null_value is None):
        raise ValueError(
            f"null_key and null_value: got only null_{'value' if null_key is None else 'key'}, expected both or neither"
        )
    if null_key is not None:
        h, d = query.shape[-2:]
        either = (query.dtype, torch.float32)
        tensor("null_key", null_key, either, query.device)
        tensor("null_value", null_value, either, query.device)
        shape("null_key", null_key, "h, d", (h, d))
        shape("null_value", null_value, "h, d_value", (h, d_value))


def pair(tables: Any) -> tuple[Any, Any]:
    """cos and sin, or None twice. (What is no pair stays what it is, for the check of positions to refuse.)"""
    if tables is None:
        return None, None
    return (tables[0], tables[1]) if type(tables) in (tuple, list) and len(tables) == 2 else (tables, tables)


def scale_of(scale: Any, query: torch.Tensor) -> float:
    return query.shape[-1] ** -0.5 if scale is None else number("scale", scale)


def softcap_of(logit_softcap: Any) -> float:
    """-> the cap, or 0 for None: no cap."""
    if logit_softcap is None:
        return 0.0
    cap = number("logit_softcap", logit_softcap)
    if not 0.0 < cap < math.inf:
        raise ValueError(f"logit_softcap: got {cap}, expected a positive number, or None for no cap")
    return cap


def dropout_of(dropout_p: Any, query: torch.Tensor) -> tuple[float, torch.Tensor | None]:
    """-> p, and a fresh seed from torch's generator, or 0 and None where nothing would be dropped."""
    dropout_p = number("dropout_p", dropout_p)
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p: got {dropout_p}, expected 0 <= dropout_p < 1")
    if random.threshold(dropout_p) == 0:
        return 0.0, None
    return dropout_p, random.draw_seed(query.device)


def document_starts(sequence_starts: torch.Tensor, query: torch.Tensor, b: int, n: int) -> torch.Tensor:
    """int64 [b, n]: where each token's document begins. The first token of a row begins one, marked or not."""
    tensor("sequence_starts", sequence_starts, (torch.bool,), query.device)
    shape("sequence_starts", sequence_starts, "b, n", (b, n))
    token = torch.arange(n, device=query.device)
    return torch.where(sequence_starts, token, 0).cummax(1).values if n > 0 else token.expand(b, n)


_AS_THEY_ARE = ("query_cos", "query_sin", "key_cos", "key_sin", "key_scale", "value_scale")


def autocast(given: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors of a call, floating ones cast to the autocast dtype where the query's device has autocast on. Like
    torch's own, it leaves fp64 alone; rotary tables, quantised caches and their scales stay as they are, and so does
    what is on another device, for the checks to refuse."""
    device = given["query"].device
    if not (has_autocast(device.type) and torch.is_autocast_enabled(device.type)):
        return dict(given)
    dtype = torch.get_autocast_dtype(device.type)

    def cast(name: str, x: Any) -> Any:
        wanted = isinstance(x, torch.Tensor) and x.dtype in FLOATING and x.dtype != torch.float64
        return x.to(dtype) if wanted and name not in _AS_THEY_ARE and x.device == device else x

    return {name: cast(name, x) for name, x in given.items()}
