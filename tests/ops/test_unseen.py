"""What no row sees reaches nothing: NaN in all of it at once leaves every result finite, and right by the oracle.

Masked slots, surplus and skipped chunks, tokens before the first chunk with their output's gradient, rows that see
nothing, sequences that are not valid, and the rows of every table that no token's row and slot come to.
"""

from __future__ import annotations

import dataclasses
import math

import cases
import oracle
import pytest
import torch
from cases import Case

import retro_kernels as rk

SMALL = {"b": 2, "n": 11, "m": 4, "k": 2, "r": 3, "h": 2, "d": 8, "d_value": 4, "e": 6, "positions": (4, 1)}
RELATIVE = ("relative", "relative_biases", "mask")
CLOCK = {
    "surplus, a masked chunk": {"l": 5, "options": ("mask", "empty_chunk", "bias")},
    "one row of a chunk": {"n": 4, "l": 2, "options": ("mask", "bias_per_neighbour", "null")},
    "stride": {"stride": 2, "options": ("bias", "null")},
    "relative, stride": {"stride": 2, "l": 6, "options": (*RELATIVE, "bias")},
    "relative, one row": {"n": 4, "options": RELATIVE},
    "end": {"align": "end", "l": 5, "options": ("mask",)},
    "skipped chunks": {"query_offset": 18, "chunk_offset": 1, "options": ("mask", "null")},
    "packed": {"documents": (6, 2, 3), "l": 3, "stride": 2, "options": (*RELATIVE, "bias")},
    "no token attends": {"n": 3, "l": 2, "options": ("null", "bias")},
}
ROTARY = {"rotary": {"stride": 2, "l": 6, "options": ("rotary", "mask", "empty_chunk")}}
ENCODER = {
    "a masked chunk": {"options": ("mask", "empty_chunk", "bias")},
    "relative": {"options": (*RELATIVE, "empty_chunk")},
    "rotary": {"options": ("rotary", "mask", "empty_chunk")},
}
STEP = {
    "idle": {"options": ("mask", "null", "bias"), "positions": (4, 0)},
    "idle, relative": {"options": (*RELATIVE, "bias_per_neighbour"), "positions": (4, 0)},
    "not valid": {"options": ("mask", "valid", "null", "relative")},
    "one sequence idle": {"options": ("mask", "null"), "positions": (4, 1)},
    "idle, biases of states": {"options": ("mask", "bias_key"), "positions": (4, 0)},
}
CASES = [
    Case(f"{strategy or operation} {name}", operation, **{**SMALL, "strategy": strategy, **changes})
    for operation, options, strategy in (
        ("cca", CLOCK | ROTARY, None),
        ("projected", CLOCK, "absorb"),
        ("projected", CLOCK | ROTARY, "materialise"),
        ("self", ENCODER, None),
        ("cross", ENCODER, None),
        ("decode", STEP, None),
        ("projected_decode", STEP, None),
    )
    for name, changes in options.items()
]


def seen(case: Case, arguments):
    """The mask, or what stands for none; of each row of the query that sees some slot, where in the mask its slots are
    and its row in the tables; and all rows that attend, a null slot or nothing more."""
    query, mask = arguments["query"], arguments.get("neighbour_mask", arguments.get("activation_mask"))
    rows: dict[tuple[int, ...], tuple[tuple[int, ...], int]] = {}  # -> where its slots are, its row
    if case.operation in ("cca", "projected"):
        for sequence in range(case.b):
            for token, chunk, row in oracle.retrieving_tokens(arguments, sequence, case.n):
                rows[sequence, token] = (sequence, chunk), row
    elif case.operation in ("decode", "projected_decode"):
        for sequence in range(case.b):
            for token in range(case.t):
                clock = int(arguments["position"][sequence]) + token - (case.m - 1)
                if clock >= 0 and ("valid" not in arguments or bool(arguments["valid"][sequence])):
                    rows[sequence, token] = (sequence,), clock % case.m
    else:
        for place in torch.cartesian_prod(*map(torch.arange, query.shape[:-2])).tolist():
            rows[tuple(place)] = tuple(place[:3] if case.operation == "self" else place[:2]), place[3]
    shown = torch.ones(case.slots_shape, dtype=torch.bool) if mask is None else mask
    return shown, {place: (of, row) for place, (of, row) in rows.items() if shown[of].any()}, set(rows)


def poison(case: Case, arguments, grad_out, distances_too: bool) -> None:
    """In place. `distances_too`: rows of `relative_key` that no row and slot have, but which a kernel's products with
    the table as a whole read."""
    shown, rows, attending = seen(case, arguments)
    if "null_key" in arguments:  # which a row that sees no other slot is read for
        holding = attending
    else:
        holding = set(rows)
    read = torch.zeros_like(shown)
    slots = case.m if case.operation == "cross" else case.r
    tables = {
        (row, t) for of, row in rows.values() for t in torch.where(shown[of].reshape(-1, slots).any(0))[0].tolist()
    }
    for of, _ in rows.values():
        read[of] = shown[of]
    for place in torch.cartesian_prod(*map(torch.arange, arguments["query"].shape[:-2])).tolist():
        if tuple(place) not in holding:
            arguments["query"][tuple(place)] = grad_out[tuple(place)] = math.nan
    for name in {"key", "value", "encoded"} & set(arguments):
        arguments[name][~read] = math.nan
    used_rows, used_slots = {row for row, _ in tables}, {t for _, t in tables}
    if "attention_bias" in arguments:
        for row in set(range(case.tables[0])) - used_rows:
            arguments["attention_bias"][:, row] = math.nan
    if "relative_key" in arguments and distances_too:
        distances = {row - t + slots - 1 for row, t in tables}
        for x in set(range(arguments["relative_key"].shape[1])) - distances:
            arguments["relative_key"][:, x] = math.nan
    for name, used in (("query_rotary", used_rows), ("key_rotary", used_slots)):
        for table in arguments.get(name, ()):
            for place in set(range(table.shape[0])) - used:
                table[place] = math.nan


# The interpreter is slow: a case of each kernel.
IN_THE_INTERPRETER = ("cca surplus, a masked chunk", "absorb packed", "self a masked chunk", "decode idle")
CHECKS = [
    (backend, case if backend != "triton" else dataclasses.replace(case, h=1))
    for backend in ("reference", "cpu", "triton")
    for case in CASES
    if backend != "triton" or case.name in IN_THE_INTERPRETER
]


@pytest.mark.parametrize(("backend", "case"), CHECKS, ids=str)
def test_it_reaches_nothing(backend, case, guarded):
    status = rk.backends()[backend]
    if not status.available:
        pytest.skip(status.reason)
    arguments = cases.make(case, torch.float32)
    grad_out = torch.randn(case.out_shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        poison(case, arguments, grad_out, backend == "reference")
    given, expected = cases.run(arguments, backend, grad_out), cases.expect(arguments, grad_out)
    assert not any(x.isnan().any() for x in expected.values())
    cases.assert_close(given, {name: expected[name] for name in given}, 2e-5)
