"""`join_attention` against one softmax over all keys."""

from __future__ import annotations

import pytest
import torch

import retro_kernels as rk

B, N, H, D = 2, 5, 3, 4
INF = float("inf")


def attention(logits, value):
    """logits [b, n, h, t], value [b, t, h, d] -> out, lse; 0 and -inf where every logit is -inf."""
    lse = logits.logsumexp(-1)
    share = (logits - lse.masked_fill(lse == -INF, 0.0)[..., None]).exp()
    return torch.einsum("bnht,bthd->bnhd", share, value), lse


def parts(seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    logits = [torch.randn(B, N, H, t, dtype=dtype) for t in (6, 9)]
    values = [torch.randn(B, t, H, D, dtype=dtype) for t in (6, 9)]
    return logits, values


def test_it_is_one_softmax_over_all_keys_gradients_included():
    logits, values = parts()
    leaves = [*logits, *values, torch.randn(H, dtype=torch.float64)]
    for leaf in leaves:
        leaf.requires_grad_()
    bias = leaves[-1]
    (out_a, lse_a), (out_b, lse_b) = (attention(x, v) for x, v in zip(logits, values))
    out, lse = rk.join_attention(out_a, lse_a, out_b, lse_b, bias)
    whole, whole_lse = attention(torch.cat([logits[0], logits[1] + bias[:, None]], -1), torch.cat(values, 1))
    torch.testing.assert_close(out, whole, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lse, whole_lse, rtol=1e-12, atol=1e-12)
    weight, weight_lse = torch.randn_like(out), torch.randn_like(lse)
    got, expected = (
        torch.autograd.grad((x * weight).sum() + (y * weight_lse).sum(), leaves)
        for x, y in ((out, lse), (whole, whole_lse))
    )
    for x, y in zip(got, expected):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-10)


def test_gradcheck():
    torch.manual_seed(0)
    given = [torch.randn(size, dtype=torch.float64, requires_grad=True) for size in ((2, H, D), (2, H)) * 2 + ((H,),)]
    assert torch.autograd.gradcheck(rk.join_attention, given)
    assert torch.autograd.gradgradcheck(rk.join_attention, given)


def test_joining_is_associative():
    logits, values = parts()
    third, value = torch.randn(B, N, H, 3, dtype=torch.float64), torch.randn(B, 3, H, D, dtype=torch.float64)
    a, b, c = (attention(x, v) for x, v in zip([*logits, third], [*values, value]))
    left, right = rk.join_attention(*rk.join_attention(*a, *b), *c), rk.join_attention(*a, *rk.join_attention(*b, *c))
    for x, y in zip(left, right):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_closed_head_and_an_empty_second_attention_leave_the_first_to_the_bit(dtype):
    torch.manual_seed(0)
    out_a, out_b = torch.randn(2, B, N, H, D).to(dtype)
    lse_a, lse_b = torch.randn(2, B, N, H) * 10
    lse_b[:, 0] = -INF
    out, lse = rk.join_attention(out_a, lse_a, out_b, lse_b, torch.tensor([-INF, 0.0, 1.0]))
    assert out.dtype == dtype
    assert torch.equal(out[:, :, 0], out_a[:, :, 0])
    assert torch.equal(out[:, 0], out_a[:, 0])
    assert torch.equal(lse[:, 0], lse_a[:, 0])
    assert not torch.equal(out[:, 1:, 1:], out_a[:, 1:, 1:])


def test_where_nothing_is_seen_the_output_is_zero_and_no_gradient_is_nan():
    torch.manual_seed(0)
    given = [torch.randn(4, H, D), torch.randn(4, H), torch.randn(4, H, D), torch.randn(4, H), torch.randn(H)]
    given[1][0], given[3][0] = -INF, -INF
    given[1][1], given[3][2] = -INF, -INF
    given[4][0] = -INF
    for x in given:
        x.requires_grad_()
    out, lse = rk.join_attention(*given)
    assert torch.equal(out[0], torch.zeros(H, D))
    assert torch.all(lse[0] == -INF)
    torch.testing.assert_close(out[1, 1:], given[2][1, 1:])
    torch.testing.assert_close(out[2], given[0][2])
    for gradient in torch.autograd.grad((out.sum() + lse[1:, 1:].exp().sum()), given):
        assert torch.isfinite(gradient).all()
    (gradient,) = torch.autograd.grad(rk.join_attention(*given)[0].square().sum(), given[4])
    assert gradient[0] == 0
    assert gradient[1] != 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"out_b": torch.zeros(2, H, D + 1)}, "out_b: got shape"),
        ({"lse_a": torch.zeros(2, H, 1)}, "lse_a: got shape"),
        ({"lse_b": torch.zeros(2, H, dtype=torch.float64)}, "lse_b: got dtype"),
        ({"bias": torch.zeros(1)}, "bias: got shape"),
        ({"out_a": torch.zeros(H)}, "out_a: got shape"),
        ({"out_a": None}, "out_a: got NoneType"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    out, lse = torch.zeros(2, H, D), torch.zeros(2, H)
    given = {"out_a": out, "lse_a": lse, "out_b": out, "lse_b": lse} | change
    with pytest.raises((TypeError, ValueError), match=message):
        rk.join_attention(**given)
