"""The specification itself: against the oracle, a loop over tokens, and against finite differences."""

from __future__ import annotations

import cases
import pytest
import torch

import retro_kernels as rk

SMALL = [c for c in cases.EVERY if c.n < 100 and c.r < 100 and c.m < 100]


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_equals_a_loop_over_tokens(case):
    """Results and gradients, against the oracle."""
    arguments = cases.make(case, torch.float64)
    grad_out = torch.randn(case.out_shape, dtype=torch.float64)
    cases.assert_close(cases.run(arguments, "reference", grad_out), cases.expect(arguments, grad_out), 1e-11)


GRADCHECK = (
    "odd_sizes",
    "mask_rows_empty",
    "bias_per_neighbour",
    "everything",
    "relative_all",
    "end",
    "offset_chunks",
    "dropout_all",
    "packed_stride",
    "self_relative_all",
    "self_mask",
    "self_dropout",
    "causal_packed_relative",
    "causal_mask",
    "cross_relative_all",
    "cross_mask",
    "cross_dropout",
)


@pytest.mark.parametrize("case", [c for c in cases.EVERY if c.name in GRADCHECK], ids=str)
def test_gradients_equal_finite_differences(case):
    arguments = cases.make(case, torch.float64)
    inputs = cases.differentiable(arguments)

    def call(*tensors):
        torch.manual_seed(3)  # every evaluation must drop the same
        changed = {**arguments, **dict(zip(inputs, tensors))}
        return cases.operation(arguments)(**changed, backend="reference")

    assert torch.autograd.gradcheck(call, tuple(inputs.values()), fast_mode=True)


def test_the_paper_s_example_is_causal():
    """With m = 4, chunk u's neighbours first influence token (u + 1) m - 1 (peers.md, section 5)."""
    case = cases.Case("", b=1, n=14, m=4)
    arguments = cases.make(case, torch.float64)
    out = rk.chunked_cross_attention(**arguments, backend="reference")
    first = []
    for chunk in range(3):
        touched = [
            token
            for token in range(14)
            if torch.autograd.grad(out[:, token].sum(), arguments["key"], retain_graph=True)[0][:, chunk].any()
        ]
        first.append(touched[0])
        assert touched == list(range((chunk + 1) * 4 - 1, min((chunk + 2) * 4 - 1, 14)))
    assert first == [3, 7, 11]


@pytest.mark.parametrize("operation", ["cca", "self", "cross"])
def test_neighbours_are_exchangeable(operation):
    """Positions restart for every neighbour, so in CCA their order cannot matter (it does in one peer: peers.md, 1.4),
    and the encoder's output is permuted with them."""
    positions = "rotary" if operation == "cca" else "relative"
    null = ("null",) if operation == "cca" else ()
    arguments = cases.make(cases.Case("", operation, k=3, options=("mask", "bias", positions, *null)), torch.float64)
    order = [2, 0, 1]
    # What has an axis of neighbours. The activations of the cross-attention are the chunk's, whatever was retrieved.
    per_neighbour = {"cca": ("key", "value"), "self": ("query", "key", "value"), "cross": ("query",)}[operation]
    names = [*per_neighbour, *(["neighbour_mask"] if operation != "cross" else [])]
    moved = {**arguments, **{name: arguments[name][:, :, order] for name in names}}
    call = cases.operation(arguments)
    given, expected = call(**moved, backend="reference"), call(**arguments, backend="reference")
    torch.testing.assert_close(given, expected if operation == "cca" else expected[:, :, order])


@pytest.mark.parametrize("stride", [None, 3])
def test_a_slice_equals_the_slice_of_the_whole(stride):
    case = cases.Case("", n=60, m=8, stride=stride, options=("mask", "bias", "rotary", "null"))
    arguments = cases.make(case, torch.float64)
    whole = rk.chunked_cross_attention(**arguments, backend="reference")
    for start, stop in ((0, 7), (3, 20), (7, 8), (25, 60), (31, 32)):
        first = max(start - 7, 0) // (stride or 8)
        part = {
            **arguments,
            "query": arguments["query"][:, start:stop],
            "query_offset": start,
            "chunk_offset": first,
            **{name: arguments[name][:, first:] for name in ("key", "value", "neighbour_mask")},
        }
        given = rk.chunked_cross_attention(**part, backend="reference")
        torch.testing.assert_close(given, whole[:, start:stop], rtol=1e-12, atol=1e-12)


def test_packed_documents_equal_separate_calls():
    """CCA and causal self-attention with positions: a row of documents is its documents one by one."""
    lengths = (17, 3, 8, 17)
    packed = cases.make(
        cases.Case("", b=1, n=45, documents=lengths, options=("mask", "bias", "rotary", "null")), torch.float64
    )
    decoder = cases.make(
        cases.Case("", "self", b=1, l=1, k=1, r=45, causal=True, documents=lengths, options=("mask", "rotary")),
        torch.float64,
    )
    whole = rk.chunked_cross_attention(**packed, backend="reference")
    whole_decoder = rk.neighbour_self_attention(**decoder, backend="reference")
    token = chunk = 0
    for length in lengths:
        chunks = length // 8
        here, there = slice(token, token + length), slice(chunk, chunk + chunks)
        alone = {name: x for name, x in packed.items() if name != "sequence_starts"}
        alone["query"] = packed["query"][:, here]
        alone |= {name: packed[name][:, there] for name in ("key", "value", "neighbour_mask")}
        given = rk.chunked_cross_attention(**alone, backend="reference")
        torch.testing.assert_close(given, whole[:, here], rtol=1e-12, atol=1e-12)

        alone = {name: x for name, x in decoder.items() if name != "sequence_starts"}
        alone |= {name: decoder[name][:, :, :, here] for name in ("query", "key", "value", "neighbour_mask")}
        alone |= {name: tuple(table[:length] for table in decoder[name]) for name in ("query_rotary", "key_rotary")}
        given = rk.neighbour_self_attention(**alone, backend="reference")
        torch.testing.assert_close(given, whole_decoder[:, :, :, here], rtol=1e-12, atol=1e-12)
        token, chunk = token + length, chunk + chunks


def test_a_second_derivative_exists_on_the_reference():
    arguments = cases.make(cases.Case("", b=1, n=9, m=4, r=3, d=4), torch.float64)
    query = arguments["query"]

    def call(q):
        return rk.chunked_cross_attention(**{**arguments, "query": q}, backend="reference")

    assert torch.autograd.gradgradcheck(call, (query,), fast_mode=True)
