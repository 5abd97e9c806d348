"""Every operation with every size that may be 0 at 0, and every option: the value that the docstrings give, gradients
of 0 in their inputs' shapes, and the process lives. A sum's gradient is expanded, with strides of 0."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

import retro_kernels as rk
from retro_kernels.ops.backends import ATTENTION as BACKENDS

SIZES = {"b": 2, "n": 9, "m": 4, "l": 2, "k": 2, "r": 5, "t": 1}
H, D, D_VALUE, E = 2, 16, 8, 24
OPTIONS = ("mask", "bias", "wide bias", "relative", "rotary", "null", "dropout")


@pytest.fixture(params=["reference", "cpu", "triton"])
def backend(request):
    reason = BACKENDS[request.param].unavailable()
    if reason is not None:
        pytest.skip(reason)
    return request.param


def tables(option: str, rows: int, slots: int, neighbours: int, mask: tuple[int, ...], name="neighbour_mask") -> dict:
    """The arguments of an option. `rows` and `slots` are those of the tables of positions."""
    x = torch.randn
    return {
        "": {},
        "mask": {name: torch.zeros(mask, dtype=torch.bool)},
        "bias": {"attention_bias": x(H, rows, slots)},
        "wide bias": {"attention_bias": x(H, rows, neighbours * slots)},
        "relative": {
            "relative_key": x(H, max(rows + slots - 1, 0), D),
            "content_bias": x(H, D),
            "relative_bias": x(H, D),
        },
        "rotary": {"query_rotary": (x(rows, 4), x(rows, 4)), "key_rotary": (x(slots, 4), x(slots, 4))},
        "null": {"null_key": x(H, D), "null_value": x(H, D_VALUE)},
        "dropout": {"dropout_p": 0.5},
    }[option]


def check(function: Any, arguments: dict[str, Any], expected: torch.Tensor, **settings) -> None:
    """Forward gives `expected`, and the gradient of the sum is 0 but that of null_value and bias_value."""
    floating = {
        name: x.requires_grad_()
        for name, x in arguments.items()
        if isinstance(x, torch.Tensor) and x.is_floating_point()
    }
    out, lse = function(**arguments, **settings, return_lse=True)
    assert torch.equal(out, expected)
    assert lse.shape == out.shape[:-1]
    assert not lse.isnan().any()
    gradients = torch.autograd.grad(out.sum(), list(floating.values()))
    for (name, x), gradient in zip(floating.items(), gradients):
        assert gradient.shape == x.shape, name
        if name not in ("null_value", "bias_value"):
            assert not gradient.any(), name


def retrieving(b: int, n: int, m: int, null_value: torch.Tensor | None) -> torch.Tensor:
    """The output where there is no slot but the null slot."""
    out = torch.zeros(b, n, H, D_VALUE)
    if null_value is not None:
        out[:, m - 1 :] = null_value.detach()
    return out


@pytest.mark.parametrize("option", ["", *OPTIONS])
@pytest.mark.parametrize("empty", ["b", "n", "l", "k", "r", "k r", "n l", "b k"])
def test_chunked_cross_attention(empty, option, backend):
    b, n, m, l, k, r, _ = (0 if letter in empty.split() else size for letter, size in SIZES.items())
    if "l" in empty and n > 0:
        n = m - 1
    given = tables(option, m, r, k, (b, l, k, r))
    query, key = torch.randn(b, n, H, D), torch.randn(b, l, k, r, H, D)
    arguments = {"query": query, "key": key, "value": torch.randn(b, l, k, r, H, D_VALUE), **given}
    expected = retrieving(b, n, m, given.get("null_value"))
    check(rk.chunked_cross_attention, arguments, expected, chunk_size=m, backend=backend)


@pytest.mark.parametrize("option", ["", "bias", "relative", "null"])
@pytest.mark.parametrize("offset", [1, 3, 4, 7, 1000])
def test_no_tokens_behind_an_offset(offset, option, backend):
    """A slice without tokens of a longer sequence, its chunks given or not."""
    m, k, r = 4, 2, 5
    for l, chunk_offset in itertools.product((0, 2), (0, 1)):
        arguments = {
            "query": torch.randn(2, 0, H, D),
            "key": torch.randn(2, l, k, r, H, D),
            "value": torch.randn(2, l, k, r, H, D_VALUE),
            **tables(option, m, r, k, (2, l, k, r)),
        }
        check(
            rk.chunked_cross_attention,
            arguments,
            torch.zeros(2, 0, H, D_VALUE),
            chunk_size=m,
            query_offset=offset,
            chunk_offset=chunk_offset,
            backend=backend,
        )


@pytest.mark.parametrize("option", ["", "mask", "bias", "relative", "rotary", "dropout", "causal"])
@pytest.mark.parametrize("empty", ["b", "l", "k", "r", "l r"])
def test_neighbour_self_attention(empty, option, backend):
    b, l, k, r = (0 if letter in empty.split() else SIZES[letter] for letter in "blkr")
    given = {"causal": True} if option == "causal" else tables(option, r, r, 1, (b, l, k, r))
    shape = (b, l, k, r, H)
    arguments = {
        "query": torch.randn(*shape, D),
        "key": torch.randn(*shape, D),
        "value": torch.randn(*shape, D_VALUE),
        **given,
    }
    check(rk.neighbour_self_attention, arguments, torch.zeros(*shape, D_VALUE), backend=backend)


@pytest.mark.parametrize("option", ["", "mask", "bias", "relative", "rotary", "dropout"])
@pytest.mark.parametrize("empty", ["b", "l", "k", "r", "m", "r m", "k m"])
def test_neighbour_cross_attention(empty, option, backend):
    b, l, k, r, m = (0 if letter in empty.split() else SIZES[letter] for letter in "blkrm")
    given = tables(option, r, m, 1, (b, l, m), "activation_mask")
    arguments = {
        "query": torch.randn(b, l, k, r, H, D),
        "key": torch.randn(b, l, m, H, D),
        "value": torch.randn(b, l, m, H, D_VALUE),
        **given,
    }
    check(rk.neighbour_cross_attention, arguments, torch.zeros(b, l, k, r, H, D_VALUE), backend=backend)


@pytest.mark.parametrize("option", ["", "mask", "bias", "wide bias", "relative", "null", "projection biases"])
@pytest.mark.parametrize("empty", ["b", "n", "l", "k", "r", "n l", "n offset"])
@pytest.mark.parametrize("strategy", ["materialise", "absorb", "auto"])
def test_projected_chunked_cross_attention(strategy, empty, option, backend):
    b, n, m, l, k, r, _ = (0 if letter in empty.split() else size for letter, size in SIZES.items())
    if empty == "l":
        n = m - 1
    if option == "projection biases":
        given = {"bias_key": torch.randn(H, D), "bias_value": torch.randn(H, D_VALUE)}
    else:
        given = tables(option, m, r, k, (b, l, k, r))
    arguments = {
        "query": torch.randn(b, n, H, D),
        "encoded": torch.randn(b, l, k, r, E),
        "w_key": torch.randn(H, D, E),
        "w_value": torch.randn(H, D_VALUE, E),
        **given,
    }
    offsets = {"query_offset": 9, "chunk_offset": 1} if "offset" in empty else {}
    check(
        rk.projected_chunked_cross_attention,
        arguments,
        retrieving(b, n, m, given.get("null_value")),
        chunk_size=m,
        strategy=strategy,
        backend=backend,
        **offsets,
    )


@pytest.mark.parametrize("option", ["", "mask", "bias", "wide bias", "relative", "relative wide bias", "null"])
@pytest.mark.parametrize("empty", ["b", "t", "k", "r", "b t", "k r"])
@pytest.mark.parametrize("form", ["keys and values", "states"])
def test_decoding(form, empty, option, backend):
    b, t, k, r = (0 if letter in empty.split() else SIZES[letter] for letter in "btkr")
    m = 4
    given: dict[str, Any] = {}
    for name in ("relative", "wide bias") if option == "relative wide bias" else (option,):
        given |= tables(name, m, r, k, (b, k, r))
    settings = {"chunk_size": m, "position": torch.full((b,), 5), "backend": backend, "return_lse": True}
    query = torch.randn(b, t, H, D)
    with torch.no_grad():
        if form == "states":
            out, lse = rk.projected_chunked_cross_attention_decode(
                query, torch.randn(b, k, r, E), torch.randn(H, D, E), torch.randn(H, D_VALUE, E), **given, **settings
            )
        else:
            cache = torch.randn(b, k, r, H, D), torch.randn(b, k, r, H, D_VALUE)
            out, lse = rk.chunked_cross_attention_decode(query, *cache, **given, **settings)
    expected = torch.zeros(b, t, H, D_VALUE)
    if "null_value" in given:
        expected = expected + given["null_value"]
    assert torch.allclose(out, expected, atol=1e-6)
    assert lse.shape == (b, t, H)
    assert not lse.isnan().any()
    assert (lse == -float("inf")).all() or "null_value" in given
