"""The specification itself: against a loop over tokens written from the paper, and against finite differences."""

from __future__ import annotations

import itertools
import math

import cases
import pytest
import torch

import retro_kernels as rk


def one_row(x, head, query, row, slots, query_row=None):
    """One row of one head: `slots` are (t, key vector, value vector, key's table row, column of the bias). Sections 2
    and 3 of the design, one dot product at a time, sharing nothing with the library. -> out, lse"""
    scale = query.shape[-1] ** -0.5 if x.get("scale") is None else x["scale"]
    interleaved = x.get("rotary_interleaved", False)

    def turn(vector, table, position):
        if table is None:
            return vector
        cos, sin = table[0][position], table[1][position]
        vector = vector.clone()
        for j in range(len(cos)):
            first, second = (2 * j, 2 * j + 1) if interleaved else (j, j + len(cos))
            a, c = vector[first].item(), vector[second].item()
            vector[first], vector[second] = a * cos[j] - c * sin[j], c * cos[j] + a * sin[j]
        return vector

    def plus(name):
        return query if x.get(name) is None else query + x[name][head]

    content = turn(plus("content_bias"), x.get("query_rotary"), row if query_row is None else query_row)
    relative_key, bias, null_key = (x.get(name) for name in ("relative_key", "attention_bias", "null_key"))
    r = None if relative_key is None else x["slots_of_a_neighbour"]
    logits, values = [], []
    if null_key is not None:
        logits.append(scale * content.dot(null_key[head]).item())
        values.append(x["null_value"][head])
    for t, key, value, key_row, column in slots:
        logit = scale * content.dot(turn(key, x.get("key_rotary"), key_row)).item()
        if relative_key is not None:
            logit += scale * plus("relative_bias").dot(relative_key[head, row - t + r - 1]).item()
        if bias is not None:
            logit += bias[head, row, t if bias.shape[2] == x["slots_of_a_neighbour"] else column].item()
        logits.append(logit)
        values.append(value)
    if not logits:
        return 0.0, -math.inf
    top = max(logits)
    weights = [math.exp(logit - top) for logit in logits]
    total = sum(weights)
    return sum(w / total * v for w, v in zip(weights, values)), top + math.log(total)


def empty_results(x):
    shape = (*x["query"].shape[:-1], x["value"].shape[-1])
    return torch.zeros(shape, dtype=torch.float64), torch.full(shape[:-1], -math.inf, dtype=torch.float64)


def visible_pairs(mask, *place):
    """Whether the mask lets the slot at `place` be seen."""
    return mask is None or bool(mask[place])


def document_of_each_token(x, batch, n):
    """The first token of the document that each token of the row belongs to."""
    starts = x.get("sequence_starts")
    first = []
    for token in range(n):
        begins = token == 0 or (starts is not None and bool(starts[batch, token]))
        first.append(token if begins else first[-1])
    return first


def cca_by_token(x):
    query, key, value, m = x["query"], x["key"], x["value"], x["chunk_size"]
    b, n, h, _ = query.shape
    _, _, k, r, hk, _ = key.shape
    s = x.get("stride") or m
    x = {**x, "slots_of_a_neighbour": r}
    out, lse = empty_results(x)
    for batch in range(b):
        first = document_of_each_token(x, batch, n)
        chunks_before = 0  # of the documents before this one
        for token in range(n):
            if token > 0 and first[token] != first[token - 1]:
                length = token - first[token - 1]
                chunks_before += (length - m) // s + 1 if length >= m else 0
            clock = token - first[token] + x["query_offset"] - (m - 1)
            if x["align"] == "end":
                clock = token - (n - 1) % m
            if clock < 0:
                continue
            chunk, row = chunks_before + clock // s - x["chunk_offset"], clock % s
            for head in range(h):
                kv = head // (h // hk)
                slots = [
                    (t, key[batch, chunk, j, t, kv], value[batch, chunk, j, t, kv], t, j * r + t)
                    for j in range(k)
                    for t in range(r)
                    if visible_pairs(x.get("neighbour_mask"), batch, chunk, j, t)
                ]
                out[batch, token, head], lse[batch, token, head] = one_row(
                    x, head, query[batch, token, head], row, slots
                )
    return out, lse


def self_attention_by_token(x):
    query, key, value = x["query"], x["key"], x["value"]
    b, l, k, r, h, _ = query.shape
    hk = key.shape[-2]
    x = {**x, "slots_of_a_neighbour": r}
    out, lse = empty_results(x)
    for batch, u, j in itertools.product(range(b), range(l), range(k)):
        first = document_of_each_token(x, batch, r)
        for token, head in itertools.product(range(r), range(h)):
            kv = head // (h // hk)
            slots = [
                (t, key[batch, u, j, t, kv], value[batch, u, j, t, kv], t - first[t], t)
                for t in range(r)
                if visible_pairs(x.get("neighbour_mask"), batch, u, j, t)
                and first[t] == first[token]
                and (t <= token or not x["causal"])
            ]
            at = (batch, u, j, token, head)
            out[at], lse[at] = one_row(x, head, query[at], token, slots, token - first[token])
    return out, lse


def cross_attention_by_token(x):
    query, key, value = x["query"], x["key"], x["value"]
    b, l, k, r, h, _ = query.shape
    m, hk = key.shape[2:4]
    x = {**x, "slots_of_a_neighbour": m}
    out, lse = empty_results(x)
    for batch, u, j, token, head in itertools.product(range(b), range(l), range(k), range(r), range(h)):
        kv = head // (h // hk)
        slots = [
            (i, key[batch, u, i, kv], value[batch, u, i, kv], i, i)
            for i in range(m)
            if visible_pairs(x.get("activation_mask"), batch, u, i)
        ]
        at = (batch, u, j, token, head)
        out[at], lse[at] = one_row(x, head, query[at], token, slots)
    return out, lse


LOOPS = {"cca": cca_by_token, "self": self_attention_by_token, "cross": cross_attention_by_token}
SMALL = [c for c in cases.EVERY if c.n < 100 and c.r < 100 and c.m < 100]


@pytest.mark.parametrize("case", [c for c in SMALL if c.dropout_p == 0], ids=str)
def test_equals_a_loop_over_tokens(case):
    arguments = cases.as_dtype(cases.make(case, torch.float64), torch.float64)
    with torch.no_grad():
        given = cases.operation(arguments)(**arguments, return_lse=True, backend="reference")
        expected = LOOPS[case.operation](arguments)
    for x, y in zip(given, expected):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


GRADCHECK = ("odd_sizes", "mask_rows_empty", "bias_per_neighbour", "everything", "relative_all", "end", "offset_chunks",
             "dropout_all", "packed_stride", "self_relative_all", "self_mask", "self_dropout", "causal_packed_relative",
             "causal_mask", "cross_relative_all", "cross_mask", "cross_dropout")  # fmt: skip


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
