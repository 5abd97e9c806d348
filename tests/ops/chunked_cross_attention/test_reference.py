"""The specification itself: against a loop over tokens written from the paper, and against finite differences."""

from __future__ import annotations

import math

import cases
import pytest
import torch

import retro_kernels as rk


def one_token_at_a_time(
    query, key, value, *, chunk_size, neighbour_mask=None, attention_bias=None, relative_key=None, content_bias=None,
    relative_bias=None, query_rotary=None, key_rotary=None, rotary_interleaved=False, null_key=None, null_value=None,
    scale=None, stride=None, align="start", query_offset=0, chunk_offset=0,
):  # fmt: skip
    """Sections 2 and 3 of the design, one dot product at a time, sharing nothing with the library."""
    b, n, h, d = query.shape
    _, _, k, r, hk, _ = key.shape
    s = stride or chunk_size
    scale = d**-0.5 if scale is None else scale
    out = torch.zeros(b, n, h, value.shape[-1], dtype=query.dtype)
    lse = torch.full((b, n, h), -math.inf, dtype=query.dtype)

    def turn(x, cos, sin):
        x = x.clone()
        for j in range(len(cos)):
            first, second = (2 * j, 2 * j + 1) if rotary_interleaved else (j, j + len(cos))
            a, c = x[first].item(), x[second].item()
            x[first], x[second] = a * cos[j] - c * sin[j], c * cos[j] + a * sin[j]
        return x

    for batch in range(b):
        for token in range(n):
            clock = token - (n - 1) % chunk_size if align == "end" else query_offset + token - (chunk_size - 1)
            if clock < 0:
                continue
            chunk, row = clock // s - chunk_offset, clock % s
            for head in range(h):
                q = query[batch, token, head]
                content = q if content_bias is None else q + content_bias[head]
                relative = q if relative_bias is None else q + relative_bias[head]
                if query_rotary is not None:
                    content = turn(q, query_rotary[0][row], query_rotary[1][row])
                logits, values = [], []
                if null_key is not None:
                    logits.append(scale * content.dot(null_key[head]).item())
                    values.append(null_value[head])
                for j in range(k):
                    for t in range(r):
                        if neighbour_mask is not None and not neighbour_mask[batch, chunk, j, t]:
                            continue
                        x = key[batch, chunk, j, t, head // (h // hk)]
                        if key_rotary is not None:
                            x = turn(x, key_rotary[0][t], key_rotary[1][t])
                        logit = scale * content.dot(x).item()
                        if relative_key is not None:
                            logit += scale * relative.dot(relative_key[head, row - t + r - 1]).item()
                        if attention_bias is not None:
                            shared = attention_bias.shape[2] == r
                            logit += attention_bias[head, row, t if shared else j * r + t].item()
                        logits.append(logit)
                        values.append(value[batch, chunk, j, t, head // (h // hk)])
                if logits:
                    top = max(logits)
                    weights = [math.exp(x - top) for x in logits]
                    lse[batch, token, head] = top + math.log(sum(weights))
                    out[batch, token, head] = sum(w / sum(weights) * v for w, v in zip(weights, values))
    return out, lse


@pytest.mark.parametrize("case", [c for c in (*cases.CASES, *cases.RELATIVE) if c.n < 100 and c.r < 100], ids=str)
def test_equals_a_loop_over_tokens(case):
    arguments = cases.as_dtype(cases.make(case, torch.float64), torch.float64)
    with torch.no_grad():
        given = rk.chunked_cross_attention(**arguments, return_lse=True, backend="reference")
        expected = one_token_at_a_time(**arguments)
    for x, y in zip(given, expected):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


GRADCHECK = ("odd_sizes", "mask_rows_empty", "bias_per_neighbour", "everything", "relative_all", "end", "offset_chunks")


@pytest.mark.parametrize("case", [c for c in (*cases.CASES, *cases.RELATIVE) if c.name in GRADCHECK], ids=str)
def test_gradients_equal_finite_differences(case):
    arguments = cases.make(case, torch.float64)
    inputs = cases.differentiable(arguments)

    def call(*tensors):
        changed = {**arguments, **dict(zip(inputs, tensors))}
        return rk.chunked_cross_attention(**changed, backend="reference")

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


def test_neighbours_are_exchangeable():
    """Positions restart for every neighbour, so their order cannot matter (it does in one peer: peers.md, 1.4)."""
    case = cases.Case("", k=3, options=("mask", "bias", "rotary", "null"))
    arguments = cases.make(case, torch.float64)
    order = [2, 0, 1]
    moved = {**arguments, **{name: arguments[name][:, :, order] for name in ("key", "value", "neighbour_mask")}}
    torch.testing.assert_close(
        rk.chunked_cross_attention(**moved, backend="reference"),
        rk.chunked_cross_attention(**arguments, backend="reference"),
    )


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


def test_dropout_keeps_the_mean_and_follows_the_generator():
    case = cases.Case("", b=4, n=64, m=8)
    arguments = cases.make(case, torch.float32)
    kept = rk.chunked_cross_attention(**arguments, backend="reference")
    torch.manual_seed(1)
    first = rk.chunked_cross_attention(**arguments, dropout_p=0.5, backend="reference")
    torch.manual_seed(1)
    again = rk.chunked_cross_attention(**arguments, dropout_p=0.5, backend="reference")
    assert torch.equal(first, again)
    many = torch.stack(
        [rk.chunked_cross_attention(**arguments, dropout_p=0.5, backend="reference").detach() for _ in range(400)]
    )
    standard_error = many.std(0) / 20
    assert ((many.mean(0) - kept).abs() <= 6 * standard_error + 1e-6).all()


def test_a_second_derivative_exists_on_the_reference():
    arguments = cases.make(cases.Case("", b=1, n=9, m=4, r=3, d=4), torch.float64)
    query = arguments["query"]

    def call(q):
        return rk.chunked_cross_attention(**{**arguments, "query": q}, backend="reference")

    assert torch.autograd.gradgradcheck(call, (query,), fast_mode=True)
