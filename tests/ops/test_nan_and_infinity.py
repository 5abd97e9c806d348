"""NaN and infinity do what they do in PyTorch's softmax attention and nothing else: they are where the oracle has them.

A NaN logit gives NaN to the row's output and lse, and to every gradient that depends on the row; a +inf logit the same
with lse +inf; a row whose logits are all -inf outputs 0 with lse -inf and passes no gradient.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import cases
import oracle
import pytest
import torch
from cases import Case

import retro_kernels as rk

ALL_POSITIONS = ("relative", "relative_biases")
SMALL = {"b": 2, "n": 11, "m": 4, "k": 2, "r": 3, "h": 2, "d": 8, "d_value": 4, "e": 6, "positions": (4, 1, 9)}
CASES = tuple(
    Case(name, operation, **{**SMALL, **changes})
    for name, operation, changes in (
        ("plain", "cca", {}),
        ("mask", "cca", {"options": ("mask",), "l": 4}),
        ("null, bias", "cca", {"options": ("null", "bias"), "stride": 3}),
        ("wide bias", "cca", {"options": ("bias_per_neighbour", "mask")}),
        ("relative", "cca", {"options": (*ALL_POSITIONS, "mask", "null")}),
        ("rotary", "cca", {"options": ("rotary", "mask")}),
        ("grouped, end", "cca", {"h": 4, "hk": 2, "align": "end", "options": ("mask",)}),
        ("packed", "cca", {"documents": (7, 4), "stride": 2, "options": ("null",)}),
        ("one slot", "cca", {"k": 1, "r": 1}),
        ("absorb", "projected", {"strategy": "absorb"}),
        ("absorb, bias_key", "projected", {"strategy": "absorb", "options": ("bias_key",)}),
        (
            "absorb, all",
            "projected",
            {
                "strategy": "absorb",
                "h": 4,
                "hk": 2,
                "l": 4,
                "options": (*ALL_POSITIONS, "mask", "null", "bias", "bias_key", "bias_value"),
            },
        ),
        ("materialise", "projected", {"strategy": "materialise", "l": 4, "options": ("mask", "bias_value")}),
        ("self", "self", {}),
        ("self, relative", "self", {"options": (*ALL_POSITIONS, "mask", "bias"), "h": 4, "hk": 2}),
        ("causal", "self", {"causal": True, "r": 5, "options": ("mask",)}),
        ("causal, bias", "self", {"causal": True, "r": 5, "options": ("bias",)}),
        (
            "causal, packed",
            "self",
            {"causal": True, "l": 1, "k": 1, "r": 7, "documents": (4, 3), "options": ALL_POSITIONS},
        ),
        ("cross", "cross", {}),
        ("cross, relative", "cross", {"options": (*ALL_POSITIONS, "mask", "bias"), "h": 4, "hk": 2}),
        ("decode", "decode", {"options": ("valid",)}),
        ("decode, all", "decode", {"options": (*ALL_POSITIONS, "mask", "null", "bias"), "h": 4, "hk": 2}),
        ("decode, rotary", "decode", {"options": ("rotary", "mask")}),
        ("decode states", "projected_decode", {"options": ("mask", "null", "bias_key", "bias_value")}),
    )
)


def places(case: Case, arguments) -> dict[str, tuple[int, ...]]:
    """An element of a row that retrieves, the same of its output, and one of a slot that it sees, of key and value."""
    if case.operation in ("cca", "projected"):
        token, chunk, _ = list(oracle.retrieving_tokens(arguments, 0, case.n))[1]
        row, slots = (0, token, 0), (0, chunk)
    elif case.operation in ("self", "cross"):
        row, slots = (0, 1, 1 % case.k if case.chunks > 1 else 0, case.r - 2, 0), (0, 1)
        if case.chunks == 1:
            row, slots = (0, 0, 0, case.r - 2, 0), (0, 0)
        if case.operation == "self":
            slots = (*slots, row[2])
    else:
        row, slots = (0, 0, 0), (0,)
    mask = arguments.get("activation_mask" if case.operation == "cross" else "neighbour_mask")
    shape = case.slots_shape[len(slots) :]
    seen = torch.ones(shape, dtype=torch.bool) if mask is None else mask[slots]
    if case.causal:
        seen = seen & (torch.arange(case.r) <= row[3])
    slot = (*slots, *seen.nonzero()[-1].tolist())
    head = () if "encoded" in arguments else (0,)
    return {"query": (*row, 1), "grad_out": (*row, 1), "key": (*slot, *head, 1), "value": (*slot, *head, 1)}


def poisoned(case: Case, place: str, value: float):
    arguments = cases.make(case, torch.float32)
    grad_out = torch.randn(case.out_shape, generator=torch.Generator().manual_seed(1))
    at = places(case, arguments)[place]
    with torch.no_grad():
        if place == "grad_out":
            grad_out[at] = value
        else:
            arguments["encoded" if "encoded" in arguments and place != "query" else place][at] = value
    return arguments, grad_out


@functools.cache
def expect(case: Case, place: str, value: float):
    return cases.expect(*poisoned(case, place, value))


def hidden(case: Case, name: str, expected: torch.Tensor) -> torch.Tensor:
    """Where a result may be NaN although the oracle's is not, since 0 * NaN is part of every dense product: of a causal
    row with the tokens after it or of other documents, which stays in its neighbour; of a query with the distances that
    its row has not, in the gradient of `relative_key`, which stays in its head."""
    axes = 0
    if name == "gradient of relative_key":
        axes = 1
    elif case.causal and name.rpartition(" ")[2] in ("out", "lse", "query", "key", "value"):
        axes = 3
    if axes == 0:
        return torch.zeros_like(expected, dtype=torch.bool)
    tainted = (~expected.isfinite()).flatten(axes).any(-1)
    return tainted[(..., *(None,) * (expected.dim() - axes))].expand_as(expected)


def check(case: Case, backend: str, place: str, value: float) -> None:
    arguments, grad_out = poisoned(case, place, value)
    given, expected = cases.run(arguments, backend, grad_out), expect(case, place, value)
    for name, x in given.items():
        true = expected[name]
        if math.isinf(value) and not (name in ("out", "lse") and place in ("query", "key")):
            # Whether infinity is added to infinity or to its negative depends on the order of a sum.
            x, true = (y.masked_fill(~y.isfinite(), math.nan) for y in (x, true))
        may = hidden(case, name, expected[name])
        cases.assert_close({name: x.masked_fill(may, 0.0)}, {name: true.masked_fill(may, 0.0)}, 2e-5)
        assert not x[true.isnan()].isfinite().any(), name


def takes(case: Case, backend: str, place: str, value: float) -> bool:
    decoding = case.operation in ("decode", "projected_decode")
    if case.operation.startswith("projected") and place == "value":  # a state is poisoned as "key"
        return False
    if decoding and place == "grad_out" and backend != "reference":
        return False
    if case.name == "causal, bias" and place in ("key", "value"):
        return False  # reaches rows before it, and so their gradients of the bias
    if math.isinf(value) and place in ("query", "key"):
        # (q W) . E is infinity where q . (W E) is a difference of infinities; a single logit may be -inf
        return case.strategy != "absorb" and case.operation != "projected_decode" and case.name != "one slot"
    return True


def shrunk(every: tuple[Case, ...], *names: str) -> tuple[Case, ...]:
    """Triton's interpreter is slow: one case of each kernel, with one chunk of one sequence and one head of keys."""
    return tuple(
        dataclasses.replace(
            case,
            b=1,
            n=7,
            h=2 if case.hk else 1,
            hk=1 if case.hk else None,
            k=1 if case.operation == "self" else 2,
            l=1 if case.operation in ("self", "cross") else None,
        )
        for case in every
        if case.name in names
    )


IN_THE_INTERPRETER = shrunk(CASES, "wide bias", "absorb, all", "self, relative", "cross", "decode, all")
CHECKS = [
    (backend, place, value)
    for backend in ("reference", "cpu", "triton")
    for place in ("query", "key", "value", "grad_out")
    for value in (math.nan, math.inf, -math.inf)
    if backend != "triton" or math.isnan(value) or (place == "key" and value > 0)
]


@pytest.mark.parametrize(("backend", "place", "value"), CHECKS)
def test_it_is_where_the_oracle_has_it(backend, place, value, guarded):
    """In a row that retrieves, in a key and a value (or a state) that it sees, in the gradient of its output."""
    status = rk.backends()[backend]
    if not status.available:
        pytest.skip(status.reason)
    wrong = []
    for case in CASES if backend != "triton" else IN_THE_INTERPRETER:
        if takes(case, backend, place, value):
            try:
                check(case, backend, place, value)
            except AssertionError as error:
                wrong.append(f"{case.operation}, {case.name}: {error}")
    assert not wrong, "\n".join(wrong)


LEAST = torch.finfo(torch.float32).min
BIASES = {
    "-inf on a row": (-math.inf, ...),
    "+inf": (math.inf, 1),
    "NaN": (math.nan, 1),
    "-1e30 on a row": (-1e30, ...),
    "the least number on a row": (LEAST, ...),
}
BIASED = tuple(
    Case(name, operation, **{**SMALL, "options": ("bias", "mask"), **changes})
    for name, operation, changes in (
        ("cca", "cca", {}),
        ("cca, wide", "cca", {"options": ("bias_per_neighbour",)}),
        ("cca, null", "cca", {"options": ("bias", "null")}),
        ("absorb", "projected", {"strategy": "absorb"}),
        ("self", "self", {}),
        ("causal", "self", {"causal": True, "options": ("bias",)}),
        ("cross", "cross", {}),
        ("decode", "decode", {}),
        ("decode states", "projected_decode", {}),
    )
)


@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
def test_what_a_bias_can_do(backend, bias, guarded):
    """A row whose whole bias is -inf sees nothing, even where its output's gradient is NaN. One whose bias is finite
    sees its slots all the same, however large the number."""
    status = rk.backends()[backend]
    if not status.available:
        pytest.skip(status.reason)
    value, column = BIASES[bias]
    wrong = []
    for case in BIASED if backend != "triton" else shrunk(BIASED, "cca, wide", "absorb", "self", "decode"):
        if case.causal and bias in ("+inf", "NaN"):
            continue  # 0 * NaN, as in `hidden`
        arguments = cases.make(case, torch.float32)
        grad_out = torch.randn(case.out_shape, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            arguments["attention_bias"][0, 1, column] = value
        expected = cases.expect(arguments, grad_out)
        if value == -math.inf and not (expected["lse"] == -math.inf).all():
            grad_out = grad_out.masked_fill((expected["lse"] == -math.inf)[..., None], math.nan)
        given = cases.run(arguments, backend, grad_out)
        try:
            for name, x in given.items():
                large = expected[name].isfinite() & (expected[name].abs() > 1e6)
                if value == LEAST:  # out of range in base 2, in which kernels compute: it saturates
                    assert (x[large] < 0.6 * LEAST).all(), name
                else:
                    cases.assert_close({name: x[large]}, {name: expected[name][large]}, 1e-6)
                cases.assert_close({name: x[~large]}, {name: expected[name][~large]}, 2e-5)
        except AssertionError as error:
            wrong.append(f"{case.name}: {error}")
    assert not wrong, "\n".join(wrong)
