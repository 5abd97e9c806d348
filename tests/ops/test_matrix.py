"""Every operation with every option, at ordinary sizes and with each size 0, both ways, against the oracle."""

from __future__ import annotations

import dataclasses
import functools

import cases
import pytest
import torch
from cases import Case

import retro_kernels as rk
from retro_kernels import testing

RELATIVE = ("relative", "relative_biases")
# What chunked cross-attention takes, from keys and values or from states.
CLOCK = {
    "plain": {},
    "mask": {"options": ("mask",)},
    "a masked chunk": {"options": ("mask", "empty_chunk")},
    "a masked chunk, null": {"options": ("mask", "empty_chunk", "null")},
    "bias": {"options": ("bias",)},
    "wide bias": {"options": ("bias_per_neighbour",)},
    "null": {"options": ("null",)},
    "relative": {"options": ("relative",)},
    "relative, u": {"options": ("relative", "content_bias")},
    "relative, v": {"options": ("relative", "relative_bias", "null")},
    "scale": {"scale": -0.7, "options": ("null",)},
    "stride": {"stride": 3, "options": ("bias",)},
    "stride of one": {"stride": 1, "options": RELATIVE},
    "end": {"align": "end", "options": ("mask",)},
    "offset": {"query_offset": 6, "options": ("null",)},
    "offset of chunks": {"query_offset": 18, "chunk_offset": 3, "options": RELATIVE},
    "skipped chunks": {"query_offset": 18, "chunk_offset": 1},
    "offset, stride": {"query_offset": 11, "chunk_offset": 2, "stride": 3, "options": ("bias_per_neighbour",)},
    "surplus": {"l": 6, "options": ("mask",)},
    "packed": {"documents": (5, 2, 4), "options": RELATIVE},
    "packed, stride": {"documents": (7, 4), "stride": 2, "l": 7, "options": ("bias", "null", "mask")},
    "grouped": {"h": 4, "hk": 2, "options": ("null",)},
    "dropout": {"dropout_p": 0.3, "options": ("null",)},
    "all": {
        "h": 4,
        "hk": 2,
        "stride": 3,
        "dropout_p": 0.2,
        "l": 5,
        "options": (*RELATIVE, "mask", "null", "bias_per_neighbour"),
    },
}
ROTARY = {
    "rotary": {"d": 8, "options": ("rotary", "null")},
    "rotary, partial": {"d": 7, "options": ("rotary_partial",)},
    "rotary, interleaved": {"d": 8, "options": ("rotary_interleaved", "mask")},
    "rotary, partial, interleaved": {"d": 7, "options": ("rotary_partial", "rotary_interleaved")},
}
BIASES = {
    "biases": {"options": ("bias_key", "bias_value")},
    "biases, null": {"options": ("bias_key", "bias_value", "null", "mask", "empty_chunk")},
}
ENCODER = {
    "plain": {},
    "mask": {"options": ("mask",)},
    "a masked chunk": {"options": ("mask", "empty_chunk")},
    "bias": {"options": ("bias",)},
    "relative": {"options": ("relative",)},
    "relative, u": {"options": ("relative", "content_bias")},
    "relative, v": {"options": ("relative", "relative_bias")},
    **{
        name: {**changes, "options": tuple(x for x in changes["options"] if x != "null")}
        for name, changes in ROTARY.items()
    },
    "scale": {"scale": -0.7},
    "grouped": {"h": 4, "hk": 2},
    "dropout": {"dropout_p": 0.3},
    "all": {"h": 4, "hk": 2, "dropout_p": 0.2, "options": (*RELATIVE, "mask", "bias")},
}
DECODER = {
    "causal": {"causal": True, "options": ("mask", "bias")},
    "causal, relative": {"causal": True, "options": RELATIVE},
    "packed": {"causal": True, "l": 1, "k": 1, "r": 7, "documents": (4, 1, 2), "options": ("rotary", "mask"), "d": 8},
    "packed, relative": {"causal": True, "l": 1, "k": 1, "r": 7, "documents": (4, 1, 2), "options": RELATIVE},
}
STEP = {
    **{
        name: CLOCK[name]
        for name in (
            "plain",
            "mask",
            "a masked chunk, null",
            "bias",
            "wide bias",
            "null",
            "relative",
            "relative, u",
            "relative, v",
            "scale",
            "grouped",
        )
    },
    "valid": {"options": ("valid", "null", "mask")},
    "chunk": {"options": ("chunk", "bias")},
    "one token": {"t": 1, "options": ("null",)},
    "all": {"h": 4, "hk": 2, "options": (*RELATIVE, "mask", "null", "bias_per_neighbour", "valid")},
}
QUANTISED = {"int8": {"options": ("int8",)}, "float8": {"options": ("float8_e4m3fn", "mask")}}
TURNED = {
    "turned": {"d": 8, "options": ("rotary", "turned")},
    "turned, interleaved": {"d": 7, "options": ("rotary_partial", "rotary_interleaved", "turned")},
}

SMALL = {"b": 2, "n": 11, "m": 4, "k": 2, "r": 3, "h": 2, "d": 5, "d_value": 3, "e": 6, "positions": (4, 1, 9)}
# Operation, the options that it takes, the strategies, the sizes that can be 0.
OPERATIONS = (
    ("cca", CLOCK | ROTARY, ("",), "bnlkr"),
    ("projected", CLOCK | BIASES, ("absorb", "materialise"), "bnlkr"),
    ("projected", ROTARY, ("materialise",), "bnlkr"),
    ("self", ENCODER | DECODER, ("",), "blkr"),
    ("cross", ENCODER, ("",), "blkrm"),
    ("decode", STEP | ROTARY | TURNED | QUANTISED, ("",), "btkr"),
    ("projected_decode", STEP | BIASES | QUANTISED, ("",), "btkr"),
)


def without(case: Case, size: str) -> Case | None:
    """The case with that size 0, and what belongs to it fitted; None where the option needs it."""
    changes = {size: 0}
    if size == "n":
        changes |= {"l": 2, **({} if case.documents is None else {"documents": ()})}
    if size == "l" and case.operation in ("cca", "projected"):  # no token may need a chunk
        changes |= {"n": 3, "query_offset": 0, "chunk_offset": 0, "align": "start"}
        if case.documents is not None:
            changes["documents"] = (2, 1)
    if case.operation == "self" and case.documents is not None:
        if size in "lk":
            return None
        if size == "r":
            changes["documents"] = ()
    return dataclasses.replace(case, **changes)


def every_case() -> list[Case]:
    every = []
    for operation, options, strategies, sizes in OPERATIONS:
        for strategy in strategies:
            for option, changes in options.items():
                start = " ".join(x for x in (operation, strategy, option) if x)
                case = Case(start, operation, **{**SMALL, **({"strategy": strategy} if strategy else {}), **changes})
                every.append(case)
                for size in sizes:
                    empty = without(case, size)
                    if empty is not None:
                        every.append(dataclasses.replace(empty, name=f"{start}, {size} = 0"))
    return every


CASES = every_case()


def in_the_interpreter(case: Case) -> Case | None:
    """Triton's interpreter is slow, and what Triton does with every option is in test_conformance.py: here the empty
    sizes, plain and with as much as goes together, of one sequence; None for the others. (Materialised projections are
    chunked cross-attention there.)"""
    start, _, size = case.name.rpartition(", ")
    option = start.rpartition(" ")[2]
    if not size.endswith(" = 0") or option not in ("plain", "all", "int8") or case.strategy == "materialise":
        return None
    return dataclasses.replace(case, b=min(case.b, 1), h=2, hk=None if case.hk is None else 1)


TOLERANCE = {"reference": 1e-11, "cpu": testing.FP32_TOLERANCE, "triton": testing.FP32_TOLERANCE}


CHECKS = [
    (backend, case)
    for backend in TOLERANCE
    for case in (CASES if backend != "triton" else filter(None, map(in_the_interpreter, CASES)))
]


def drawn(case: Case):
    """The arguments in fp32, and the output's gradient: of an empty result the one of out.sum().backward()."""
    grad_out = torch.randn(case.out_shape, generator=torch.Generator().manual_seed(1))
    if 0 in case.out_shape:
        grad_out = torch.ones(()).expand(case.out_shape)
    return cases.make(case, torch.float32), grad_out


@functools.cache
def expect(case: Case) -> dict[str, torch.Tensor]:
    """By the oracle, once for all backends."""
    return cases.expect(*drawn(case))


@pytest.mark.parametrize(("backend", "case"), CHECKS, ids=str)
def test_every_option_and_every_empty_size(backend, case, guarded):
    status = rk.backends()[backend]
    if not status.available:
        pytest.skip(status.reason)
    arguments, grad_out = drawn(case)
    if backend == "reference":
        arguments = cases.as_dtype(arguments, torch.float64)
    given, expected = cases.run(arguments, backend, grad_out), expect(case)
    for name, x in given.items():
        like = "query" if name in ("out", "lse") else name.removeprefix("gradient of ")
        assert x.dtype == arguments[like].dtype, name
        # Of what is exactly 0 (a single slot's gradient) rounding is all that there is, and error() counts it by 0.1.
        nothing = not expected[name].isfinite().any() or expected[name][expected[name].isfinite()].abs().max() < 1e-9
        cases.assert_close({name: x}, {name: expected[name]}, TOLERANCE[backend] * (2 if nothing else 1))


def on_cuda(case: Case) -> Case | None:
    """An empty size with what the CUDA kernels take of its options, and a head that they take; None for the others."""
    if " = 0" not in case.name or case.causal or case.dropout_p or case.strategy == "materialise":
        return None
    taken = {"mask", "empty_chunk"}
    if case.operation in ("decode", "projected_decode"):
        taken = set(case.options)
        if "turned" not in taken:
            taken -= {"rotary", "rotary_partial", "rotary_interleaved"}
    if case.strategy == "absorb":
        if case.documents is not None or case.chunks * case.k * case.r == 0:
            return None
        case = dataclasses.replace(case, r=8)
    options = tuple(option for option in case.options if option in taken)
    return dataclasses.replace(case, d=64, d_value=64, e=64, options=options)


# Once each: many cases come to the same without what CUDA does not take.
CUDA = list({dataclasses.replace(case, name=""): case for case in map(on_cuda, CASES) if case is not None}.values())


@pytest.mark.parametrize("case", CUDA, ids=str)
def test_every_empty_size_of_the_cuda_kernels(case, emulated, guarded):
    """In the emulator, in bf16; decoding and absorbing have a forward alone."""
    arguments = cases.make(case, torch.bfloat16)
    grad_out = None
    if case.operation in ("cca", "self", "cross"):
        grad_out = torch.randn(case.out_shape, generator=torch.Generator().manual_seed(1))
        if 0 in case.out_shape:
            grad_out = torch.ones(()).expand(case.out_shape)
    given, expected = cases.run(arguments, "cuda", grad_out), cases.expect(arguments, grad_out)
    plain = cases.same_precision(arguments, grad_out)
    cases.assert_twice(given, plain, {name: expected[name] for name in given}, torch.bfloat16)
