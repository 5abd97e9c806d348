"""What the checks of a call have found is remembered: the same bits, the same gradients, and nothing that could have
changed since is taken for granted."""

from __future__ import annotations

import pytest
import torch
from small_calls import HK, OPERATIONS, B, D, H, K, L, M, N, R, draw, operation
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils.checkpoint import checkpoint

import retro_kernels as rk
from retro_kernels.ops import checks as validate
from retro_kernels.ops import plans
from retro_kernels.ops.backends import ATTENTION as BACKENDS

pytestmark = pytest.mark.skipif(BACKENDS["cpu"].unavailable() is not None, reason="the CPU kernels are not built")
PLANNED = [name for name in OPERATIONS if name in ("cca", "self", "cross")]


@pytest.fixture(autouse=True)
def _no_plans():
    plans._plans.clear()
    yield
    plans._plans.clear()


@pytest.fixture
def checks(monkeypatch):
    """Counts what a call checks."""
    counted = []
    tensor = validate.tensor

    def count(*arguments):
        counted.append(arguments[0])
        return tensor(*arguments)

    monkeypatch.setattr(validate, "tensor", count)
    return counted


def results(call, tensors, options):
    leaves = [x.detach().clone().requires_grad_() for x in tensors.values()]
    out = call(**dict(zip(tensors, leaves)), **options)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), leaves)]


@pytest.mark.parametrize("name", PLANNED)
def test_the_second_call_is_not_checked_and_gives_the_same(name, checks):
    call, tensors, options = operation(name)
    first = results(call, tensors, options)
    assert checks
    checks.clear()
    for x, y in zip(first, results(call, tensors, options), strict=True):
        assert torch.equal(x, y)
    with torch.no_grad():
        assert torch.equal(call(**tensors, **options), first[0])
    with torch.inference_mode():
        assert torch.equal(call(**tensors, **options), first[0])
    assert not checks
    names = list(tensors)
    for wanted in names:  # gradients only where they are wanted
        given = {x: y.detach().clone().requires_grad_(x == wanted) for x, y in tensors.items()}
        (gradient,) = torch.autograd.grad(call(**given, **options).square().sum(), given[wanted])
        torch.testing.assert_close(gradient, first[1 + names.index(wanted)])
    assert not checks


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", PLANNED)
def test_checkpointing_repeats_by_a_plan_what_it_did_without_one(name, reentrant):
    """It compares what both save for the backward."""
    call, tensors, options = operation(name)
    expected = results(call, tensors, options)[1:]
    plans._plans.clear()
    leaves = [x.detach().clone().requires_grad_() for x in tensors.values()]
    out = checkpoint(lambda *x: call(**dict(zip(tensors, x)), **options), *leaves, use_reentrant=reentrant)
    out.square().sum().backward()
    for leaf, gradient in zip(leaves, expected, strict=True):
        assert torch.equal(leaf.grad, gradient)


@pytest.mark.parametrize("name", PLANNED)
def test_strides_are_read_and_not_remembered(name):
    call, tensors, options = operation(name)
    expected = results(call, tensors, options)
    strided = {x: y.transpose(0, -1).contiguous().transpose(0, -1) for x, y in tensors.items()}
    for x, y in zip(results(call, strided, options), expected, strict=True):
        torch.testing.assert_close(x, y)


def test_a_rotation_is_part_of_the_call(checks):
    q, kv = draw(B, N, H, D), draw(B, L, K, R, HK, D)

    def turned(angle):
        tables = [(torch.full((rows, D // 2), angle).cos(), torch.full((rows, D // 2), angle).sin()) for rows in (M, R)]
        return rk.chunked_cross_attention(q, kv, kv, chunk_size=M, query_rotary=tables[0], key_rotary=tables[1])

    first, second = turned(0.0), turned(0.0)
    assert torch.equal(first, second)
    checks.clear()
    turned(1.0)
    assert not checks
    with pytest.raises(TypeError, match="query_rotary"):
        rk.chunked_cross_attention(q, kv, kv, chunk_size=M, query_rotary=kv, key_rotary=kv)


def call(query, key_value, **options):
    return rk.chunked_cross_attention(query, key_value, key_value, **{"chunk_size": M, **options})


@pytest.fixture
def known(checks):
    q, kv = draw(B, N, H, D), draw(B, L, K, R, HK, D)
    call(q, kv)
    checks.clear()
    call(q, kv)
    assert not checks
    return q, kv


def test_what_is_wrong_is_refused_after_what_was_right(known):
    q, kv = known
    for wrong, error in (
        ({"chunk_size": 2}, ValueError),
        ({"chunk_size": [4]}, TypeError),
        ({"stride": 9}, ValueError),
        ({"align": "middle"}, ValueError),
        ({"query_offset": -1}, ValueError),
        ({"scale": float("inf")}, ValueError),
        ({"scale": "1"}, TypeError),
        ({"dropout_p": False}, TypeError),
        ({"dropout_p": 1.0}, ValueError),
        ({"backend": "gpu"}, ValueError),
        ({"backend": "cuda"}, RuntimeError),
        ({"rotary_interleaved": 2}, TypeError),
        ({"neighbour_mask": torch.ones(B, L, K, R)}, TypeError),
        ({"null_key": draw(H, D)}, ValueError),
    ):
        with pytest.raises(error):
            call(q, kv, **wrong)
    for bad, error in (
        (q[:, :, :, :4], ValueError),
        (q.half(), TypeError),
        (q.to_sparse(), TypeError),
        ("q", TypeError),
    ):
        with pytest.raises(error):
            call(bad, kv)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_what_surrounds_a_call_is_asked_every_time(known, monkeypatch):
    q, kv = known
    expected = call(q, kv)
    monkeypatch.setenv("RETRO_KERNELS_BACKEND", "reference")
    assert call(q.double(), kv.double()).dtype == torch.float64
    monkeypatch.setenv("RETRO_KERNELS_BACKEND", "nothing")
    with pytest.raises(ValueError, match="RETRO_KERNELS_BACKEND"):
        call(q, kv)
    monkeypatch.delenv("RETRO_KERNELS_BACKEND")
    with torch.autocast("cpu", torch.bfloat16):
        assert call(q, kv).dtype == torch.bfloat16
    assert torch.equal(torch.func.vmap(call)(q[None], kv[None])[0], expected)
    with FakeTensorMode() as mode:
        assert isinstance(call(mode.from_tensor(q), mode.from_tensor(kv)), FakeTensor)
    with torch.autograd.forward_ad.dual_level(), pytest.raises(RuntimeError, match="forward-mode"):
        call(torch.autograd.forward_ad.make_dual(q, q), kv)
    traced = torch.jit.trace(call, (q, kv))
    assert torch.equal(traced(2 * q, kv), call(2 * q, kv))


def test_dropout_draws_anew_and_does_not_disturb(known):
    q, kv = known
    first, second = call(q, kv, dropout_p=0.5), call(q, kv, dropout_p=0.5)
    assert not torch.equal(first, second)
    assert not torch.equal(first, call(q, kv))


def test_autograd_around_a_known_call(known):
    q, kv = known
    leaf = q.clone().requires_grad_()
    out = 2 * call(leaf, kv)
    (gradient,) = torch.autograd.grad(out.sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        gradient.sum().backward()
    with torch.autograd.graph.save_on_cpu():
        torch.testing.assert_close(torch.autograd.grad(2 * call(leaf, kv).sum(), leaf)[0], gradient)
    moved = q.clone().requires_grad_()
    changed = moved * 1
    out = call(changed, kv)
    changed.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()
    again = torch.utils.checkpoint.checkpoint(call, leaf, kv, use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(2 * again.sum(), leaf)[0], gradient)


def test_plans_are_few(monkeypatch):
    monkeypatch.setattr(plans, "_MOST", 3)
    kv = draw(B, L + 1, K, R, HK, D)
    for n in range(N, N + 5):
        call(draw(B, n, H, D), kv)
        assert 1 <= len(plans._plans) <= 3
