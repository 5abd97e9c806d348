"""What the raw CUDA operations ask of every tensor for itself: no dtype, shape or device is assumed from another's. And
sizes of zero, of which every one is valid."""

from __future__ import annotations

import itertools

import cases
import pytest
import torch

import retro_kernels as rk
from retro_kernels import cuda_extension

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int8, torch.int32, torch.int64, torch.bool)
OWN_DTYPE = {"null_value": (torch.float16, torch.bfloat16, torch.float32)}  # those that any call takes


def half(*shape):
    return torch.randn(shape).bfloat16()


def attention() -> dict:
    keys = {name: half(2, 2, 2, 16, 2, 64) for name in ("key", "value")}
    spans = torch.tensor([[[7, 8], [15, 6]]] * 2, dtype=torch.int32)
    return {
        "query": half(2, 1, 1, 21, 4, 64),
        **keys,
        "mask": torch.rand(2, 2, 2, 16) < 0.7,
        "chunk_spans": spans,
        "out": half(2, 1, 1, 21, 4, 64),
        "lse": torch.randn(2, 1, 1, 21, 4),
        "grouping": 0,
        "scale": 0.1,
        "stride": 8,
        "first_token": 7,
    }


def backward() -> dict:
    x = attention()
    grads = {"grad_out": half(2, 1, 1, 21, 4, 64), "grad_lse": torch.randn(2, 1, 1, 21, 4)}
    return {**grads, **x} | {f"grad_{name}": torch.empty_like(x[name]) for name in ("query", "key", "value")}


def absorbed() -> dict:
    x = {name: y for name, y in attention().items() if name not in ("chunk_spans", "grouping")}
    x |= {name: half(64).expand(2, 2, 2, 16, 2, 64) for name in ("key", "value")}
    return x | {"encoded": half(2, 2, 2, 16, 40), "w_key": half(2, 64, 40), "w_value": half(2, 64, 40)}


def decode() -> dict:
    numbers = {
        "sums": (2, 2, 3, 4, 24),
        "statistics": (2, 2, 2, 3, 4),
        "lse": (2, 3, 4),
        "logit_bias": (2, 3, 4, 22),
        "null_logit": (2, 3, 4),
    }
    return {
        "query": half(2, 3, 4, 40),
        "key": half(2, 2, 11, 2, 40),
        "value": half(2, 2, 11, 2, 24),
        "mask": torch.rand(2, 2, 11) < 0.7,
        "null_value": half(4, 24),
        "key_scale": None,
        "value_scale": None,
        "position": torch.tensor([9, 10]),
        "valid": torch.tensor([True, True]),
        "chunk": torch.tensor([0, 0]),
        "out": half(2, 3, 4, 24),
        "scale": 0.1,
        "chunk_size": 8,
        "tile": 16,
        **{name: torch.randn(shape) for name, shape in numbers.items()},
    }


def quantised() -> dict:
    x = decode()
    for name in ("key", "value"):
        x[name] = torch.randint(-127, 128, x[name].shape, dtype=torch.int8)
        x[f"{name}_scale"] = torch.rand(2, 2, 11)
    return x


def project() -> dict:
    return {"x": half(3, 4, 16), "weight": half(2, 16, 40), "transposed": False, "out": half(3, 4, 40)}


OPERATIONS = {
    "attention_forward": attention,
    "attention_backward": backward,
    "absorbed_forward": absorbed,
    "decode_attend": decode,
    "decode_attend, quantised": quantised,
    "decode_project": project,
}
OUTPUTS = {
    "attention_forward": ("out", "lse"),
    "attention_backward": ("grad_query", "grad_key", "grad_value"),
    "absorbed_forward": ("out", "lse"),
    "decode_attend": ("sums", "statistics", "out", "lse"),
    "decode_project": ("out",),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_every_tensor_is_checked_for_itself(name, emulated):
    operation_name = name.split(",")[0]
    operation = getattr(torch.ops.retro_kernels_cuda_emulator, operation_name)
    arguments = OPERATIONS[name]()
    operation(**arguments)

    def refused(changed: str, to: torch.Tensor, why: str) -> None:
        try:
            operation(**arguments | {changed: to})
        except RuntimeError:
            return
        pytest.fail(f"{changed} {why} is taken")

    for given, x in arguments.items():
        if not isinstance(x, torch.Tensor):
            continue
        for dtype in DTYPES:
            if dtype != x.dtype and dtype not in OWN_DTYPE.get(given, ()):
                refused(given, torch.zeros(x.shape, dtype=dtype), f"of {dtype}")
        for axis in range(x.dim()):
            shape = list(x.shape)
            shape[axis] += 1
            refused(given, torch.zeros(shape, dtype=x.dtype), f"of shape {shape}")
        refused(given, torch.zeros(x.shape[1:], dtype=x.dtype), "without its first axis")
        refused(given, x.to("meta"), "on another device")
        if given in OUTPUTS[operation_name]:
            refused(given, torch.zeros(*x.shape, 2, dtype=x.dtype)[..., 0], "with gaps")


def empties(operation: str) -> list[cases.Case]:
    """Each size, and each two of them, zero: b, n, l, k, r and m."""
    sizes = {"cca": "bnlkr", "self": "blkr", "cross": "blkrm"}[operation]
    common = {"d": 64, "n": 21, "h": 2, "m": 8, "l": 2, "k": 2, "r": 8, "b": 2}
    found = []
    for zero in (*sizes, *itertools.combinations(sizes, 2)):
        case = cases.Case("+".join(zero), operation, **common | dict.fromkeys(zero, 0), options=("mask",))
        if operation == "cca" and case.l == 0 and case.n:
            case = cases.Case(case.name, operation, **common | dict.fromkeys(zero, 0) | {"n": 5}, options=("mask",))
        found.append(case)
    return found


@pytest.mark.usefixtures("guarded")
@pytest.mark.parametrize("kernels", ["sm80", "sm90"])
@pytest.mark.parametrize("operation", ["cca", "self", "cross"])
def test_sizes_of_zero(operation, kernels, emulated):
    """Forward and backward: an output of a row without slots is 0, so is every gradient."""
    cuda_extension.set_kernels(kernels)
    try:
        for case in empties(operation):
            arguments = cases.make(case, torch.bfloat16)
            grad_out = torch.randn(case.out_shape)
            given, expected = (cases.run(arguments, backend, grad_out) for backend in ("cuda", "reference"))
            cases.assert_close(given, expected, 8e-3)
    finally:
        cuda_extension.set_kernels("")


@pytest.mark.parametrize("sizes", ["b", "t", "k", "r", "bt", "bk", "tr", "kr"])
@pytest.mark.parametrize("projected", [False, True])
def test_decoding_sizes_of_zero(sizes, projected, emulated):
    b, t, k, r = (0 if name in sizes else size for name, size in {"b": 2, "t": 3, "k": 2, "r": 11}.items())
    x = {
        "query": torch.randn(b, t, 4, 16),
        "position": torch.full((b,), 9),
        "null_key": torch.randn(4, 16),
        "null_value": torch.randn(4, 24),
        "attention_bias": torch.randn(4, 8, k * r),
        "neighbour_mask": torch.rand(b, k, r) < 0.5,
    }
    if projected:
        operation = rk.projected_chunked_cross_attention_decode
        x |= {"encoded": torch.randn(b, k, r, 40), "w_key": torch.randn(2, 16, 40), "w_value": torch.randn(2, 24, 40)}
    else:
        operation = rk.chunked_cross_attention_decode
        x |= {"key": torch.randn(b, k, r, 2, 16), "value": torch.randn(b, k, r, 2, 24)}
    results = [operation(**x, chunk_size=8, return_lse=True, backend=backend) for backend in ("cuda", "reference")]
    for given, expected in zip(*results):
        assert given.shape == expected.shape
        torch.testing.assert_close(given, expected, rtol=1e-5, atol=1e-5)
