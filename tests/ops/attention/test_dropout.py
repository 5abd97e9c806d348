"""Dropout: which probabilities are kept is Philox of seed and logical position, in every backend alike."""

from __future__ import annotations

import cases
import pytest
import torch

from retro_kernels.ops import dropout
from retro_kernels.ops.backends import ATTENTION as BACKENDS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.gpu


@pytest.fixture(params=list(BACKENDS))
def backend(request):
    reason = BACKENDS[request.param].unavailable()
    if reason is not None:
        pytest.skip(reason)
    return request.param


def philox_in_python(key, counter, rounds):
    """Salmon et al. 2011, figure and constants of section 4, on Python's integers."""
    c, k = list(counter), list(key)
    for _ in range(rounds):
        first, second = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(second >> 32) ^ c[1] ^ k[0], second & 0xFFFFFFFF, (first >> 32) ^ c[3] ^ k[1], first & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c


def test_philox_is_philox():
    """The ten-round test vector that its authors publish (Random123, kat_vectors) fixes the round and the key
    schedule; the tensor form agrees with that round by round."""
    ones = 0xFFFFFFFF
    assert philox_in_python((ones, ones), (ones,) * 4, 10) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]
    assert philox_in_python((0, 0), (0,) * 4, 10) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    seed = torch.tensor([0x123456789ABCDEF0])
    counter = (0xFFFFFFFF, 17, 0x80000001, 0)
    given = dropout.philox(seed, tuple(torch.tensor([word]) for word in counter))
    expected = philox_in_python((0x9ABCDEF0, 0x12345678), counter, 7)
    assert [int(word) for word in given] == expected


def test_a_slot_s_lot_is_where_the_documentation_says():
    seed = torch.tensor([987654321987])
    kept = dropout.survivors(seed, 0.5, torch.tensor(3), torch.tensor(41), 21)
    key = (987654321987 & 0xFFFFFFFF, 987654321987 >> 32)
    for slot in range(21):
        word = philox_in_python(key, (slot // 8, 41, 3, 0), 7)[slot % 8 // 2]
        assert bool(kept[1 + slot]) == ((word >> 16 * (slot % 2)) & 0xFFFF >= 32768)
    assert bool(kept[0]) == (philox_in_python(key, (0xFFFFFFFF, 41, 3, 0), 7)[0] & 0xFFFF >= 32768)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_lots_are_fair_and_independent(p):
    """Over a million slots: the mean and the variance of what is kept, and the correlation between neighbouring slots,
    rows, heads and seeds, each within 5 standard errors."""
    head, place = torch.arange(8)[:, None], torch.arange(512)
    kept = [dropout.survivors(torch.tensor([seed]), p, head, place, 255).double() for seed in (1, 2)]
    q = 1 - dropout.threshold(p) / 65536
    error = (q * (1 - q) / kept[0].numel()) ** 0.5
    for one in kept:
        assert abs(one.mean() - q) < 5 * error
        by_row = one.mean(-1)  # independent slots: the variance of a row's mean is q (1 - q) / slots
        assert abs(by_row.var() / (q * (1 - q) / 256) - 1) < 5 * (2 / by_row.numel()) ** 0.5
        centred = (one - q) / (q * (1 - q)) ** 0.5
        for shift, axis in ((1, 2), (2, 2), (8, 2), (1, 1), (1, 0)):
            pairs = centred.narrow(axis, shift, one.shape[axis] - shift) * centred.narrow(
                axis, 0, one.shape[axis] - shift
            )
            assert abs(pairs.mean()) < 5 / pairs.numel() ** 0.5, (shift, axis)
    product = (kept[0] - q) * (kept[1] - q) / (q * (1 - q))
    assert abs(product.mean()) < 5 / product.numel() ** 0.5


@pytest.mark.parametrize("operation", ["cca", "self", "cross"])
def test_every_backend_drops_the_same(operation, backend):
    """With one-hot values the output is the dropped probability matrix itself: zero exactly where the reference's is,
    and scaled by 1 / (1 - p) elsewhere."""
    case = cases.Case(
        "",
        operation,
        b=1,
        n=13,
        m=4,
        k=1,
        r=8,
        l=2 if operation != "cca" else None,
        h=2,
        d=8,
        d_value=4 if operation == "cross" else 8,
    )
    arguments = {name: x for name, x in cases.make(case, torch.float32, DEVICE).items() if name != "dropout_p"}
    one_hot = torch.eye(case.d_value, device=DEVICE)[:, None].expand(*arguments["value"].shape)
    arguments["value"] = one_hot.contiguous()
    call = cases.operation(arguments)
    whole = call(**arguments, backend=backend)
    torch.manual_seed(5)
    dropped = call(**arguments, dropout_p=0.375, backend=backend)
    torch.manual_seed(5)
    expected = call(**arguments, dropout_p=0.375, backend="reference")
    assert torch.equal(dropped == 0, expected == 0)
    assert 0.2 < float((dropped == 0).double().mean() - (whole == 0).double().mean()) < 0.6
    torch.testing.assert_close(dropped, torch.where(expected == 0, 0.0, whole / 0.625), rtol=1e-5, atol=1e-6)


def test_a_run_follows_torch_s_generator(backend):
    arguments = cases.make(cases.Case("", b=1, n=13, m=4, k=1, r=5, h=1, d=8, dropout_p=0.5), torch.float32, DEVICE)
    call = cases.operation(arguments)
    torch.manual_seed(1)
    first, second = call(**arguments, backend=backend), call(**arguments, backend=backend)
    torch.manual_seed(1)
    again = call(**arguments, backend=backend)
    assert torch.equal(first, again)
    assert not torch.equal(first, second)


def test_forward_and_backward_agree(backend):
    """out is linear in value, so <out(v), g> = <v, dv(g)> holds only if the backward drops what the forward did."""
    case = cases.Case("", b=2, n=29, m=8, r=11, h=2, d=16, dropout_p=0.5, options=("mask",))
    arguments = cases.make(case, torch.float32, DEVICE)
    grad_out = torch.randn(case.out_shape, device=DEVICE)
    result = cases.run(arguments, backend, grad_out)
    left = (result["out"].double() * grad_out.double()).sum()
    right = (arguments["value"].double() * result["gradient of value"].double()).sum()
    torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-4)


def test_the_mean_over_seeds_is_the_output_without_dropout():
    case = cases.Case("", b=1, n=24, m=8, h=1)
    arguments = cases.make(case, torch.float32)
    name = "cpu" if BACKENDS["cpu"].unavailable() is None else "reference"
    del arguments["dropout_p"]
    call = cases.operation(arguments)
    expected = call(**arguments, backend=name).detach()
    many = torch.stack([call(**arguments, dropout_p=0.5, backend=name).detach() for _ in range(400)])
    standard_error = many.std(0) / 20
    assert ((many.mean(0) - expected).abs() <= 6 * standard_error + 1e-6).all()


def test_a_probability_that_rounds_to_nothing_draws_no_seed():
    """p is a multiple of 2^-16; the generator is left alone where nothing would be dropped."""
    arguments = cases.make(cases.Case("", b=1, n=8, r=3), torch.float32)
    before = torch.get_rng_state()
    first = cases.operation(arguments)(**{**arguments, "dropout_p": 1e-6}, backend="reference")
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, cases.operation(arguments)(**arguments, backend="reference"))
