"""Bad input is named before any kernel runs; the choice of a backend is never silent."""

from __future__ import annotations

import math
import warnings

import cases
import pytest
import torch

import retro_kernels as rk
from retro_kernels.ops import backends as backend_choice
from retro_kernels.ops.backends import ATTENTION as BACKENDS

SHAPE = cases.Case("", b=2, n=21, m=8, k=2, r=16, h=4, hk=2, d=16, d_value=12)


def arguments(**changes):
    return {**cases.make(SHAPE, torch.float32), **changes}


def zeros(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


def tables(rows, width=4):
    return zeros(rows, width), zeros(rows, width)


RELATIVE = {"relative_key": zeros(4, 23, 16)}
BAD = {
    # name: (what is changed, error, words the message must hold)
    "query is a list": ({"query": [1.0]}, TypeError, ("query", "list", "torch.Tensor")),
    "query of integers": ({"query": zeros(2, 21, 4, 16, dtype=torch.int64)}, TypeError, ("query", "int64", "float32")),
    "query of rank 3": ({"query": zeros(2, 21, 64)}, ValueError, ("query", "[2, 21, 64]", "b, n, h, d")),
    "query without heads": ({"query": zeros(2, 21, 0, 16)}, ValueError, ("query", "h at least 1")),
    "query on another device": ({"query": zeros(2, 21, 4, 16).to("meta")}, ValueError, ("key", "cpu", "meta")),
    "sparse key": ({"key": zeros(2, 2, 2, 16, 2, 16).to_sparse()}, TypeError, ("key", "sparse", "dense")),
    "key of rank 5": ({"key": zeros(2, 2, 32, 2, 16)}, ValueError, ("key", "b, l, k, r, hk, d")),
    "key of another dtype": ({"key": zeros(2, 2, 2, 16, 2, 16).half()}, TypeError, ("key", "float16", "float32")),
    "key of another head size": ({"key": zeros(2, 2, 2, 16, 2, 8)}, ValueError, ("key", "8", "16")),
    "key of another batch": ({"key": zeros(1, 2, 2, 16, 2, 16)}, ValueError, ("key", "[1, 2, 2, 16, 2, 16]", "expand")),
    "heads that do not divide": ({"key": zeros(2, 2, 2, 16, 3, 16)}, ValueError, ("3", "divisor", "4")),
    "no key/value heads": ({"key": zeros(2, 2, 2, 16, 0, 16)}, ValueError, ("0", "divisor")),
    "too few chunks": (
        {"key": zeros(2, 1, 2, 16, 2, 16), "value": zeros(2, 1, 2, 16, 2, 12)},
        ValueError,
        ("l = 1", "at least 2"),
    ),
    "value of other neighbours": ({"value": zeros(2, 2, 3, 16, 2, 12)}, ValueError, ("value", "3")),
    "value of other heads": ({"value": zeros(2, 2, 2, 16, 1, 12)}, ValueError, ("value", "[2, 2, 2, 16, 1, 12]")),
    "value without size": ({"value": zeros(2, 2, 2, 16, 2, 0)}, ValueError, ("value", "d_value")),
    "chunk size 0": ({"chunk_size": 0}, ValueError, ("chunk_size", "0", "at least 1")),
    "chunk size of a float": ({"chunk_size": 8.0}, TypeError, ("chunk_size", "8.0", "int")),
    "chunk size True": ({"chunk_size": True}, TypeError, ("chunk_size", "True", "int")),
    "mask of floats": ({"neighbour_mask": zeros(2, 2, 2, 16)}, TypeError, ("neighbour_mask", "float32", "bool")),
    "mask of another shape": (
        {"neighbour_mask": zeros(2, 2, 1, 16, dtype=torch.bool)},
        ValueError,
        ("neighbour_mask", "[2, 2, 2, 16]"),
    ),
    "bias of another shape": ({"attention_bias": zeros(4, 8, 17)}, ValueError, ("attention_bias", "[4, 8, 16]", "32")),
    "bias of fp64": ({"attention_bias": zeros(4, 8, 16).double()}, TypeError, ("attention_bias", "float64")),
    "relative key too short": ({"relative_key": zeros(4, 22, 16)}, ValueError, ("relative_key", "22", "23")),
    "u without relative key": ({"content_bias": zeros(4, 16)}, ValueError, ("content_bias", "relative_key")),
    "v without relative key": ({"relative_bias": zeros(4, 16)}, ValueError, ("relative_bias", "relative_key")),
    "u of another shape": ({**RELATIVE, "content_bias": zeros(16)}, ValueError, ("content_bias", "[16]", "[4, 16]")),
    "relative and rotary": (
        {**RELATIVE, "query_rotary": tables(8), "key_rotary": tables(16)},
        ValueError,
        ("relative_key", "rotary"),
    ),
    "rotary for the query only": ({"query_rotary": tables(8)}, ValueError, ("query_rotary", "key_rotary", "both")),
    "rotary of one tensor": (
        {"query_rotary": zeros(8, 4), "key_rotary": tables(16)},
        TypeError,
        ("query_rotary", "Tensor", "cos, sin"),
    ),
    "rotary of too few rows": (
        {"query_rotary": tables(7), "key_rotary": tables(16)},
        ValueError,
        ("query_rotary (cos)", "[7, 4]", "[8, 4]"),
    ),
    "rotary wider than the head": (
        {"query_rotary": tables(8, 9), "key_rotary": tables(16, 9)},
        ValueError,
        ("query_rotary", "18", "16"),
    ),
    "rotary of two widths": (
        {"query_rotary": tables(8, 4), "key_rotary": tables(16, 5)},
        ValueError,
        ("key_rotary", "5", "4"),
    ),
    "interleaved of an int": ({"rotary_interleaved": 1}, TypeError, ("rotary_interleaved", "1", "True or False")),
    "null key only": ({"null_key": zeros(4, 16)}, ValueError, ("null_key", "null_value", "both")),
    "null value of another size": (
        {"null_key": zeros(4, 16), "null_value": zeros(4, 16)},
        ValueError,
        ("null_value", "[4, 16]", "[4, 12]"),
    ),
    "scale of a string": ({"scale": "1"}, TypeError, ("scale", "'1'", "float")),
    "scale of NaN": ({"scale": math.nan}, ValueError, ("scale", "nan", "finite")),
    "dropout of 1": ({"dropout_p": 1.0}, ValueError, ("dropout_p", "1.0")),
    "negative dropout": ({"dropout_p": -0.1}, ValueError, ("dropout_p", "-0.1")),
    "negative stride": ({"stride": -1}, ValueError, ("stride", "-1", "8")),
    "stride 0": ({"stride": 0}, ValueError, ("stride", "0", "from 1")),
    "stride beyond the chunk": ({"stride": 9}, ValueError, ("stride", "9", "chunk_size = 8")),
    "unknown alignment": ({"align": "left"}, ValueError, ("align", "left", "start")),
    "end with a stride": ({"align": "end", "stride": 4}, ValueError, ("align", "stride 4")),
    "end with an offset": ({"align": "end", "query_offset": 1}, ValueError, ("align", "query_offset 1")),
    "negative offset": ({"query_offset": -1}, ValueError, ("query_offset", "-1")),
    "chunk offset past the queries": ({"chunk_offset": 1}, ValueError, ("chunk_offset", "1", "chunk 0")),
    "unknown backend": ({"backend": "fast"}, ValueError, ("backend", "fast", "triton")),
    "starts of integers": ({"sequence_starts": zeros(2, 21)}, TypeError, ("sequence_starts", "float32", "bool")),
    "starts of another length": (
        {"sequence_starts": zeros(2, 20, dtype=torch.bool)},
        ValueError,
        ("sequence_starts", "[2, 20]", "[2, 21]"),
    ),
    "starts aligned to the end": (
        {"sequence_starts": zeros(2, 21, dtype=torch.bool), "align": "end"},
        ValueError,
        ("sequence_starts", "'end'"),
    ),
    "starts with an offset": (
        {"sequence_starts": zeros(2, 21, dtype=torch.bool), "query_offset": 3},
        ValueError,
        ("sequence_starts", "query_offset 3"),
    ),
    "too few chunks for the documents": (
        {"sequence_starts": zeros(2, 40, dtype=torch.bool), "query": zeros(2, 40, 4, 16)},
        ValueError,
        ("l = 2", "at least 5", "row 0"),
    ),
}

ENCODER = cases.Case("", "self", l=1, k=1, r=16, h=4, hk=2, d=16, d_value=12, causal=True)
BAD_SELF = {
    "query of rank 4": ({"query": zeros(2, 16, 4, 16)}, ValueError, ("query", "[2, 16, 4, 16]", "b, l, k, r, h, d")),
    "key of other tokens": ({"key": zeros(2, 1, 1, 15, 2, 16)}, ValueError, ("key", "15", "16")),
    "value of other heads": ({"value": zeros(2, 1, 1, 16, 1, 12)}, ValueError, ("value", "[2, 1, 1, 16, 1, 12]")),
    "heads that do not divide": ({"key": zeros(2, 1, 1, 16, 3, 16)}, ValueError, ("3", "divisor", "4")),
    "mask of floats": ({"neighbour_mask": zeros(2, 1, 1, 16)}, TypeError, ("neighbour_mask", "float32", "bool")),
    "bias of another shape": ({"attention_bias": zeros(4, 16, 8)}, ValueError, ("attention_bias", "[4, 16, 16]")),
    "relative key too short": ({"relative_key": zeros(4, 30, 16)}, ValueError, ("relative_key", "2 r - 1", "31")),
    "causal of an int": ({"causal": 1}, TypeError, ("causal", "1", "True or False")),
    "dropout of 1": ({"dropout_p": 1.0}, ValueError, ("dropout_p", "1.0")),
    "starts without causal": (
        {"causal": False, "sequence_starts": zeros(2, 16, dtype=torch.bool)},
        ValueError,
        ("sequence_starts", "causal"),
    ),
    "starts with a bias": (
        {"attention_bias": zeros(4, 16, 16), "sequence_starts": zeros(2, 16, dtype=torch.bool)},
        ValueError,
        ("attention_bias", "sequence_starts"),
    ),
}
CROSS = cases.Case("", "cross", l=2, k=3, r=16, m=8, h=4, hk=2, d=16, d_value=12)
BAD_CROSS = {
    "key with an axis of neighbours": ({"key": zeros(2, 2, 3, 8, 2, 16)}, ValueError, ("key", "b, l, m, hk, d")),
    "key of other chunks": ({"key": zeros(2, 3, 8, 2, 16)}, ValueError, ("key", "[2, 3, 8, 2, 16]", "expand")),
    "value of other activations": ({"value": zeros(2, 2, 7, 2, 12)}, ValueError, ("value", "7", "8")),
    "mask of another shape": (
        {"activation_mask": zeros(2, 2, 16, dtype=torch.bool)},
        ValueError,
        ("activation_mask", "[2, 2, 8]"),
    ),
    "bias of another shape": ({"attention_bias": zeros(4, 8, 16)}, ValueError, ("attention_bias", "[4, 16, 8]")),
    "relative key too long": ({"relative_key": zeros(4, 24, 16)}, ValueError, ("relative_key", "r + m - 1", "23")),
    "key rotary of the query's length": (
        {"query_rotary": tables(16), "key_rotary": tables(16)},
        ValueError,
        ("key_rotary (cos)", "[8, 4]"),
    ),
    "v without relative key": ({"relative_bias": zeros(4, 16)}, ValueError, ("relative_bias", "relative_key")),
}
EVERY_BAD = [
    (case, name, *row)
    for case, table in ((SHAPE, BAD), (ENCODER, BAD_SELF), (CROSS, BAD_CROSS))
    for name, row in table.items()
]


@pytest.mark.parametrize(
    ("case", "changes", "error", "words"),
    [(case, *row) for case, _, *row in EVERY_BAD],
    ids=[f"{case.operation}: {name}" for case, name, *_ in EVERY_BAD],
)
def test_bad_input_is_named(case, changes, error, words):
    good = cases.make(case, torch.float32)
    with pytest.raises(error) as raised:
        cases.operation(good)(**{**good, **changes})
    for word in words:
        assert word in str(raised.value), f"{word!r} is not in {str(raised.value)!r}"


def test_a_missing_chunk_size_is_pythons_own_error():
    x = arguments()
    del x["chunk_size"]
    with pytest.raises(TypeError, match="chunk_size"):
        rk.chunked_cross_attention(**x)


def test_backends_says_what_runs_and_why_not():
    status = rk.backends()
    assert list(status) == ["reference", "cpu", "triton", "cuda"]
    assert status["reference"].available
    assert status["reference"].reason is None
    for one in status.values():
        assert one.available == (one.reason is None)


def test_a_named_backend_never_falls_back(monkeypatch):
    monkeypatch.setattr(BACKENDS["cpu"], "unavailable", lambda: "it was not built")
    with pytest.raises(RuntimeError, match=r"cpu.*it was not built"):
        rk.chunked_cross_attention(**arguments(), backend="cpu")
    with pytest.raises(RuntimeError, match="cuda"):
        rk.chunked_cross_attention(**arguments(), backend="cuda")


def test_the_environment_is_read_at_every_call_and_the_argument_wins(monkeypatch):
    monkeypatch.setattr(BACKENDS["triton"], "unavailable", lambda: "no GPU")
    rk.chunked_cross_attention(**arguments(), backend="reference")
    monkeypatch.setenv("RETRO_KERNELS_BACKEND", "triton")
    with pytest.raises(RuntimeError, match=r"RETRO_KERNELS_BACKEND='triton'.*no GPU"):
        rk.chunked_cross_attention(**arguments())
    rk.chunked_cross_attention(**arguments(), backend="reference")
    monkeypatch.setenv("RETRO_KERNELS_BACKEND", "quick")
    with pytest.raises(ValueError, match="RETRO_KERNELS_BACKEND: got 'quick'"):
        rk.chunked_cross_attention(**arguments())


def test_the_default_warns_once_when_only_the_reference_is_left(monkeypatch):
    monkeypatch.setattr(BACKENDS["cpu"], "unavailable", lambda: "it was not built; run pip")
    monkeypatch.setattr(backend_choice, "_warned", set())
    with pytest.warns(UserWarning, match=r"pure-PyTorch reference.*it was not built; run pip"):
        rk.chunked_cross_attention(**arguments())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rk.chunked_cross_attention(**arguments())


def test_autocast_casts_every_floating_input():
    case = cases.Case("", options=("bias", "null", "rotary"))
    x = cases.make(case, torch.float32)
    expected = rk.chunked_cross_attention(
        **cases.as_dtype(x, torch.bfloat16) | {name: x[name] for name in ("query_rotary", "key_rotary")},
        backend="reference",
    )
    with torch.autocast("cpu", torch.bfloat16):
        out, lse = rk.chunked_cross_attention(**x, return_lse=True, backend="reference")
    assert out.dtype == torch.bfloat16
    assert lse.dtype == torch.float32
    assert torch.equal(out, expected)
    (gradient,) = torch.autograd.grad(out.float().sum(), x["query"])
    assert gradient.dtype == torch.float32


def test_autocast_leaves_fp64_alone():
    x = cases.make(cases.Case(""), torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert rk.chunked_cross_attention(**x, backend="reference").dtype == torch.float64
