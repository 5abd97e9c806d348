"""Random calls of every operation on the CPU against the oracle: sizes, options, dtypes and strides that no list has
together. The same on every run; `python tests/ops/test_fuzz.py BACKEND FIRST LAST` runs other seeds."""

from __future__ import annotations

import random
import sys

import cases
import pytest
import torch
from cases import Case

import retro_kernels as rk
from retro_kernels import testing

OPERATIONS = ("cca", "projected", "self", "cross", "decode", "projected_decode")
FP32 = (
    "attention_bias",
    "relative_key",
    "content_bias",
    "relative_bias",
    "null_key",
    "null_value",
    "bias_key",
    "bias_value",
)


def draw(seed: int) -> tuple[Case, torch.dtype]:
    """A random case (test_matrix.py has the empty sizes) and the dtype of its query."""
    r = random.Random(seed)
    operation = OPERATIONS[seed % len(OPERATIONS)]
    dtype = r.choice((torch.float32, torch.float32, torch.bfloat16, torch.float16))
    chance = lambda p: r.random() < p  # noqa: E731
    hk = r.choice((1, 2, 3))
    size = {
        "b": r.randint(1, 2),
        "n": r.randint(1, 24),
        "m": r.randint(1, 9),
        "k": r.randint(1, 3),
        "r": r.randint(1, 10),
        "h": hk * r.choice((1, 1, 2)),
        "hk": hk,
        "d": r.choice((1, 3, 8, 16, 17, 33)),
        "e": r.choice((1, 7, 16, 40)),
        "d_value": r.choice((1, 4, 16, 19)),
    }
    options = [x for x in ("mask", "strided") if chance(0.4)]
    if "mask" in options and chance(0.3):
        options.append("empty_chunk")
    absorb = operation == "projected" and chance(0.6)
    states = operation in ("projected", "projected_decode")
    position = r.choice(("none", "relative", "rotary"))
    if position == "relative":
        options.append("relative")
        options += [x for x in ("content_bias", "relative_bias") if chance(0.5)]
    elif position == "rotary" and size["d"] > 2 and not absorb and operation != "projected_decode":
        options.append(r.choice(("rotary", "rotary_partial")))
        options += ["rotary_interleaved"] * chance(0.5)
        if operation == "decode" and chance(0.5):
            options.append("turned")
    if chance(0.4):
        options.append("bias_per_neighbour" if operation not in ("self", "cross") and chance(0.5) else "bias")
    if operation not in ("self", "cross") and chance(0.4):
        options.append("null")
    if states:
        options += [x for x in ("bias_key", "bias_value") if chance(0.4)]
    if chance(0.2) and not states and operation != "decode" and "strided" not in options:
        options.append("expanded")
    more: dict = {"scale": r.choice((None, None, 0.4, -0.3)), "fp32": tuple(x for x in FP32 if chance(0.3))}
    if operation in ("decode", "projected_decode"):
        more["t"] = r.randint(1, size["m"])
        first = r.randint(0, 3) * size["m"] - 1  # the first row of a chunk, or tokens before all of them
        more["positions"] = tuple(max(0, first + r.randint(0, size["m"] - more["t"])) for _ in range(2))
        if first < 0:  # these must end where the first chunk does
            more["positions"] = (0,)
        options += [x for x in ("valid", "chunk") if chance(0.3)]
        if chance(0.2):
            options.append(r.choice(("int8", "float8_e4m3fn")))
            options = [x for x in options if x not in ("strided",)]
    elif chance(0.2):
        more["dropout_p"] = r.choice((0.1, 0.5))
    if operation == "projected":
        more["strategy"] = "absorb" if absorb else "materialise"
    if operation in ("cca", "projected"):
        more |= _clock(r, size)
    if operation == "self" and chance(0.5):
        more["causal"] = True
        if chance(0.5) and "bias" not in options:
            size |= {"k": 1}
            more |= {"l": 1, "documents": _parts(r, size["r"])}
    if operation in ("self", "cross") and "l" not in more:
        more["l"] = r.randint(1, 2)
    return Case(f"seed {seed}", operation, **size, **more, options=tuple(options)), dtype


def _clock(r: random.Random, size: dict) -> dict:
    kind = r.choice(("start", "start", "stride", "end", "offset", "packed"))
    m = size["m"]
    more: dict = {}
    if kind in ("stride", "offset", "packed"):
        more["stride"] = r.randint(1, m)
    if kind == "end":
        more["align"] = "end"
    if kind == "offset":
        more["query_offset"] = r.randint(0, 20)
        more["chunk_offset"] = r.randint(0, max(more["query_offset"] - (m - 1), 0) // more["stride"])
    if kind == "packed":
        more["documents"] = _parts(r, size["n"])
    more["l"] = Case("", **size, **more).chunks + r.choice((0, 0, 1))
    return more


def _parts(r: random.Random, total: int) -> tuple[int, ...]:
    parts = []
    while total > 0:
        parts.append(r.randint(1, total))
        total -= parts[-1]
    return tuple(parts)


def check(seed: int, backend: str) -> None:
    case, dtype = draw(seed)
    arguments = cases.make(case, dtype, seed=seed)
    grad_out = torch.randn(case.out_shape, generator=torch.Generator().manual_seed(seed)).to(dtype).double()
    expected, given = cases.expect(arguments, grad_out), cases.run(arguments, backend, grad_out)
    for name, x in given.items():
        like = {"out": dtype, "lse": torch.float32}.get(name)
        assert x.dtype == (like or arguments[name.removeprefix("gradient of ")].dtype), f"dtype of {name}"
    expected = {name: expected[name] for name in given}
    if dtype == torch.float32:
        cases.assert_close(given, expected, 2e-5)
    else:
        # twice the error of plain PyTorch and twice the floor, of the terms, which are of order 1, where their sum is
        # less: of a bias on all slots alike the gradient is exactly 0, and what is left of it rounding of the output
        plain = cases.same_precision(arguments, grad_out)
        for name, true in expected.items():
            cases.error(given[name], true)  # the same shape, and infinite in the same places
            found, limit = (_difference(x[name], true) for x in (given, plain))
            limit = 2 * limit + 2 * testing.HALF_FLOOR[dtype]
            assert found <= limit, f"{name}: error {found:.2e}, expected at most {limit:.2e}"


def _difference(given: torch.Tensor, true: torch.Tensor) -> float:
    finite = true.isfinite()
    if not finite.any():
        return 0.0
    return (given.double() - true)[finite].abs().max().item() / max(1.0, true[finite].abs().max().item())


@pytest.mark.parametrize("tens", range(15))
def test_random_calls(tens, guarded):
    """Ten seeds each."""
    status = rk.backends()["cpu"]
    if not status.available:
        pytest.skip(status.reason)
    for seed in range(10 * tens, 10 * tens + 10):
        try:
            check(seed, "cpu")
        except Exception as error:
            raise AssertionError(f"{draw(seed)}: {error}") from error


if __name__ == "__main__":
    backend, first, last = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    failed = 0
    for seed in range(first, last):
        try:
            with testing.guard_bands():
                check(seed, backend)
        except Exception as error:
            failed += 1
            print(f"{draw(seed)}\n    {type(error).__name__}: {str(error)[:300]}", flush=True)
    print(f"{last - first} cases, {failed} failed")
