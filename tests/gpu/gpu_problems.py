"""The problems of the GPU suite, and whose kernels compute them.

A problem is a `testing.Case` of the sizes that RETRO has. Where there is no GPU the same tests take the same cases at
an eighth of the size on the CPU's kernels.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator

import torch

from retro_kernels import cuda_extension, testing
from retro_kernels.testing import Case

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
TRIALS = 1000 if ON_GPU else 3

ALL = ("mask", "empty_chunk", "bias", "rotary_partial", "null")
RELATIVE = ("relative", "relative_biases")
BASE = {"b": 2, "n": 200, "m": 64, "k": 2, "r": 128, "h": 4, "d": 64}


def case(name: str, operation: str = "cca", **changes) -> Case:
    encoder = {"l": 2} if operation in ("self", "cross") else {}
    return Case(name, operation, **{**BASE, **encoder, **changes})


ODD = {"b": 1, "n": 45, "m": 13, "k": 3, "r": 37, "h": 2, "hk": 1, "d": 20}
CLOCK = (
    case("plain"),
    case("head size 128", d=128),
    case("everything at once", d=128, d_value=96, hk=2, options=ALL),
    case("mask", options=("mask", "empty_chunk")),
    case("everything masked", options=("mask", "all_masked")),
    case("everything masked, null slot", options=("mask", "all_masked", "null")),
    case("bias shared by the neighbours", options=("bias",)),
    case("bias of its own for each neighbour", options=("bias_per_neighbour",)),
    case("null slot", options=("null",)),
    case("rotary, halves", options=("rotary",)),
    case("rotary, interleaved", options=("rotary_interleaved",)),
    case("negative scale", scale=-0.3),
    case("grouped heads", hk=1),
    case("value wider than key", d=32, d_value=80),
    case("stride below the chunk size", n=150, stride=24, options=ALL),
    case("aligned to the end", align="end", options=ALL),
    case("a slice of a longer sequence", n=90, query_offset=100),
    case("surplus chunks", l=5),
    case("shorter than a chunk", n=40, l=1),
    case("head size 256", d=256, h=2),
    case("head size 96, grouped heads, mask", d=96, hk=2, options=("mask",)),
    case("head size 72", d=72, b=1, n=45, m=16, r=20, h=2, hk=1, options=ALL),
    case("odd sizes", **ODD, options=ALL),
    case("chunks of 100", m=100, n=310, options=ALL),
    case("ten neighbours", k=10, n=130),
    case("one neighbour, one token, null slot", k=1, r=1, n=130, options=("null",)),
    case("relative positions", options=RELATIVE),
    case("relative positions, head size 128, null slot", d=128, options=(*RELATIVE, "null", "mask")),
    case("relative positions, odd sizes", **ODD, options=RELATIVE),
    case("dropout", dropout_p=0.25),
    case("dropout, relative positions, null slot", dropout_p=0.25, options=(*RELATIVE, "null", "mask")),
    case("packed", n=328, documents=(72, 40, 152, 64), options=("mask", "null")),
    case("packed, relative positions, dropout", n=328, documents=(136, 192), dropout_p=0.25, options=RELATIVE),
)


def encoder(operation: str) -> tuple[Case, ...]:
    def named(name: str, **changes) -> Case:
        return case(f"{operation} {name}", operation, **changes)

    odd = {**ODD, "l": 2}
    return (
        named("plain"),
        named("head size 128", d=128),
        named("mask, bias, rotary, grouped heads", hk=2, options=("mask", "bias", "rotary")),
        named("everything masked", options=("mask", "all_masked")),
        named("relative positions", options=RELATIVE),
        named("relative positions, head size 128, mask", d=128, options=(*RELATIVE, "mask")),
        named("dropout", dropout_p=0.25),
        named("dropout, relative positions", dropout_p=0.25, options=(*RELATIVE, "mask")),
        named("odd sizes", **odd, options=RELATIVE),
        named("many rows", b=1, k=1, r=300, m=70, h=2, options=RELATIVE),
        named("ten neighbours", b=1, k=10, h=2),
    )


ROW = {"b": 1, "l": 1, "k": 1, "h": 2, "causal": True}
DECODER = (
    case("causal", "self", **ROW, r=200),
    case("causal, relative positions, dropout", "self", **ROW, r=333, dropout_p=0.25, options=RELATIVE),
    case("causal, a long row", "self", **{**ROW, "h": 1}, r=4096, options=RELATIVE),
    case("causal, packed", "self", **ROW, r=304, documents=(72, 8, 128, 96), options=("mask",)),
    case("causal, packed, relative positions", "self", **ROW, r=304, documents=(152, 152), options=RELATIVE),
    case("causal, packed, rotary", "self", **ROW, r=304, documents=(40, 264), options=("rotary",)),
    case("self, long", "self", b=1, l=1, k=1, r=700, h=2, hk=1, options=("mask",)),
)


def absorb(name: str, **changes) -> Case:
    return case(f"absorb {name}", "projected", **{"e": 896, "strategy": "absorb", **changes})


EVERY = (*RELATIVE, "mask", "null", "bias", "bias_key", "bias_value")
ABSORB = (
    absorb("plain"),
    absorb("head size 128", d=128),
    absorb("every option, grouped heads", d=128, hk=2, options=EVERY),
    absorb("mask", d=128, options=("mask", "empty_chunk")),
    absorb("mask, grouped heads", d=128, hk=2, options=("mask",)),
    absorb("everything masked, null slot", options=("mask", "all_masked", "null")),
    absorb("bias of its own for each neighbour", options=("bias_per_neighbour", "bias_key", "bias_value")),
    absorb("relative positions", d=128, options=RELATIVE),
    absorb("stride below the chunk size", n=150, stride=24, options=("null",)),
    absorb("a slice of a longer sequence", n=90, query_offset=100),
    absorb("surplus chunks", l=5),
    absorb("odd sizes", **{**ODD, "n": 80}, d_value=40, e=100, options=EVERY),
    absorb("states of 4096", b=1, n=130, d=128, e=4096),
    absorb("ten neighbours", k=10, n=130),
    absorb("dropout", dropout_p=0.25, options=(*RELATIVE, "mask", "null")),
    absorb("packed", n=328, documents=(72, 40, 152, 64), options=("mask", "null")),
    absorb("one multi-query head", h=8, hk=1),
)


def decode(name: str, operation: str = "decode", **changes) -> Case:
    """Of the sequences one has no chunk yet, and one has just begun its first."""
    sizes = {"b": 5, "t": 1, "m": 64, "k": 2, "r": 128, "h": 8, "d": 128, **changes}
    places = (2 * sizes["m"], 0, sizes["m"] - 1, 2 * sizes["m"], 2 * sizes["m"])
    return Case(f"{operation} {name}", operation, **{"positions": places, **sizes})


STATES = {"operation": "projected_decode", "h": 32, "e": 896}
WIDE = {"k": 3, "r": 37, "h": 6, "hk": 3, "d": 72, "d_value": 40, "m": 13}
DECODE = (
    decode("plain"),
    decode("every option, grouped heads, new tokens", hk=2, t=4, options=(*RELATIVE, "mask", "null", "valid")),
    decode("mask, bias, null slot", options=("mask", "bias", "null", "valid")),
    decode("turned keys", options=("rotary", "null")),
    decode("turned keys, rows", t=3, options=("rotary", "mask")),
    decode("keys turned before", options=("rotary", "turned", "mask")),
    decode("head size 64", d=64, t=2),
    decode("head size 256", d=256, h=4, options=("mask",)),
    decode("odd sizes", **WIDE, options=(*RELATIVE, "mask", "null")),
    decode("odd sizes, new tokens", **WIDE, t=5, options=("mask", "rotary")),
    decode("one sequence of many heads", b=1, h=32),
    decode("forty neighbours", b=3, k=40),
    decode("batch of 64", b=64, h=32, options=("mask", "valid")),
    decode("one multi-query head", h=32, hk=1, options=("mask", "bias")),
    *(
        decode(f"{kind}, {word}", hk=hk, options=(kind, "mask", *more))
        for kind in ("int8", "float8_e4m3fn")
        for word, hk, more in (("one row", 8, ()), ("rows", 2, ("null", "valid")), ("turned keys", 8, ("rotary",)))
    ),
    decode("plain", **STATES),
    decode(
        "every option, biases",
        **{**STATES, "hk": 8, "t": 2},
        options=(*RELATIVE, "mask", "null", "bias_key", "bias_value", "valid"),
    ),
    decode("float8", **STATES, options=("float8_e4m3fn", "mask")),
    decode("int8, batch of 64", **{**STATES, "b": 64}, options=("int8",)),
    decode("states of 4096", **{**STATES, "b": 2, "e": 4096}),
)

CASES = (*CLOCK, *encoder("self"), *encoder("cross"), *DECODER, *ABSORB, *DECODE)
PARTS = {"attention": (*CLOCK, *encoder("self"), *encoder("cross"), *DECODER), "absorb": ABSORB, "decode": DECODE}


def by_name(name: str) -> Case:
    return next(x for x in CASES if x.name == name)


def reduced(case: Case) -> Case:
    """At an eighth of the size; a head at a quarter."""
    if case.operation.endswith("decode"):
        m = max(6, case.m // 8)
        sizes = {"b": min(case.b, 5), "k": min(case.k, 3), "m": m, "positions": (2 * m, 0, m - 1, 2 * m, 2 * m)}
    else:
        sizes = {"m": max(1, case.m // 8), "n": case.n // 8, "query_offset": case.query_offset // 8}
        sizes["stride"] = case.stride and case.stride // 8
        if case.documents is not None:
            sizes |= {"documents": tuple(x // 8 for x in case.documents)}
    return dataclasses.replace(
        case,
        **sizes,
        r=max(1, case.r // 8),
        e=max(8, case.e // 16),
        d=case.d // 4,
        d_value=case.d_value and case.d_value // 4,
    )


@dataclasses.dataclass(frozen=True)
class Target:
    """Whose kernels a test is for. `kernels`: the set of CUDA C++ kernels that must have run it alone."""

    name: str
    backend: str
    kernels: str = ""

    def __str__(self) -> str:
        return self.name

    def takes(self, case: Case, dtype: torch.dtype) -> str | None:
        """Why the kernels do not take a case, by what they are documented to take; None where they must."""
        if self.backend != "cuda":
            return None
        options = set(case.options)
        if case.operation.endswith("decode"):
            if "rotary" in options and "turned" not in options:
                return "key_rotary"
            widths = [case.d, case.d_value or case.d, *([case.e] if case.operation == "projected_decode" else [])]
            return "rows that are no multiple of 8" if any(width % 8 for width in widths) else None
        if dtype == torch.float32:
            return "float32"
        if options - {"mask", "empty_chunk", "all_masked"} or case.dropout_p or case.causal:
            return "options"
        if case.d not in (64, 96, 128) or case.d_value not in (None, case.d):
            return "head sizes"
        if case.operation == "projected":
            if self.kernels != "sm90":
                return "the absorbed kernel is one of sm90's"
            if case.documents is not None or case.k * case.r > 256 or case.r % 8:
                return "packed, or more than 256 states, or no multiple of 8"
        if self.kernels == "sm90":
            if case.documents is not None:
                return "packed documents"
            stride = case.stride or case.m
            if case.operation in ("cca", "projected") and stride > 64 and stride % 64:
                return "chunks above 64 that are no multiple of 64"
        return None

    def fit(self, case: Case) -> Case:
        """The case as near as the kernels take it: for CUDA C++ with one of its head sizes and without other options.
        (Two cases may become one.)"""
        if self.backend != "cuda" or case.operation.endswith("decode"):
            return case
        options = tuple(x for x in case.options if x in ("mask", "empty_chunk", "all_masked"))
        d = min((64, 96, 128), key=lambda size: abs(size - case.d))
        return dataclasses.replace(case, d=d, d_value=None, options=options, dropout_p=0.0)

    def problem(self, case: Case) -> Case:
        """What the suite computes for a case here: on a GPU the case, elsewhere a reduced one."""
        return self.fit(case if ON_GPU else reduced(case))

    @contextlib.contextmanager
    def alone(self, case: Case | None = None) -> Iterator[None]:
        """Within it these kernels take every call, and at its end they must have launched something: what another set
        of kernels computed in their place is no evidence."""
        if self.backend != "cuda":
            yield
            return
        expected = "decode" if case is not None and case.operation.endswith("decode") else self.kernels
        cuda_extension.set_kernels("sm90 only" if self.kernels == "sm90" else self.kernels)
        try:
            cuda_extension.launches()
            yield
            found = cuda_extension.launches()
        finally:
            cuda_extension.set_kernels("")
        others = {name: count for name, count in found.items() if name not in (expected, "overlapping") and count}
        if not found[expected] or others:
            raise testing.Wrong(f"expected launches of {expected} alone, got {found}")


SM80, SM90 = Target("cuda-sm80", "cuda", "sm80"), Target("cuda-sm90", "cuda", "sm90")


@functools.cache
def targets() -> tuple[Target, ...]:
    """Of this machine."""
    if not ON_GPU:
        return (Target("cpu", "cpu"),)
    hopper = torch.cuda.get_device_capability() == (9, 0)
    return (Target("triton", "triton"), *((SM90,) if hopper else ()), SM80)


# On a CPU, whose own tests have every option in every dtype: in bf16 all cases, in the others the plain ones.
FEW = ("plain", "self plain", "cross plain", "absorb plain", "decode plain", "projected_decode plain")


def problems(target: Target, dtype: torch.dtype, cases: tuple[Case, ...] = CASES) -> list[Case]:
    """The cases that a target takes in a dtype, each once."""
    found: dict[str, Case] = {}
    for one in cases:
        fitted = target.problem(one)
        wanted = ON_GPU or dtype == torch.bfloat16 or one.name in FEW
        if wanted and target.takes(fitted, dtype) is None:
            found.setdefault(repr(dataclasses.replace(fitted, name="")), fitted)
    return list(found.values())
