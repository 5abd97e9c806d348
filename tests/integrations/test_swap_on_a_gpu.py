"""`swap` on a faked GPU: what it leaves alone, and what it says."""

import warnings

import pytest

pytest.importorskip("retro_pytorch", reason="the peer is not installed (extra `peers`)")

import torch
from faked_gpu import NAME, fake, spoilt
from retro_pytorch.retro_pytorch import RETRO

import retro_kernels as rk
from retro_kernels import extension, testing
from retro_kernels.integrations import retro_pytorch, swap
from retro_kernels.ops.verification import verdicts
from retro_kernels.ops.verification.classes import Class, features

pytestmark = pytest.mark.skipif(extension.why_not() is not None, reason=str(extension.why_not()))


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    fake(monkeypatch, tmp_path)
    yield
    verdicts.forget()


def retro():
    torch.manual_seed(1)
    return RETRO(
        num_tokens=50,
        max_seq_len=32,
        enc_dim=36,
        enc_depth=1,
        dec_dim=24,
        dec_depth=2,
        dec_cross_attn_layers=(1,),
        dim_head=40,
        heads=2,
        chunk_size=8,
    )


def nan(out, lse):
    return out * float("nan"), lse


def test_where_the_kernels_prove_themselves_everything_is_swapped(gpu):
    report = swap(retro())
    assert len(report.replaced) == 5
    assert f"on {NAME} calls take triton by default" in report.backend_note
    assert "passed its check" in report.backend_note
    assert report.backend_note in str(report)


def test_where_only_the_next_backend_does_it_is_named(gpu, monkeypatch):
    spoilt(monkeypatch, "triton", forward=nan)
    assert f"on {NAME} calls take cuda by default" in swap(retro()).backend_note


def test_where_the_default_is_the_reference_the_model_stays_as_it_is(gpu, monkeypatch):
    for name in ("triton", "cuda"):
        spoilt(monkeypatch, name, forward=nan)
    model = retro()
    with pytest.warns(UserWarning, match=r"5 modules are left as it is.*slow reference.*force=True"):
        report = swap(model)
    assert report.replaced == []
    assert len(report.skipped) == 5
    assert all(NAME in reason and "its check failed" in reason for reason in report.skipped.values())
    assert not any("forward" in vars(module) for module in model.modules())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        forced = swap(model, force=True)
    assert len(forced.replaced) == 5
    assert "calls take reference by default" in forced.backend_note


def test_the_class_that_swap_asks_about_is_that_of_the_calls(gpu, monkeypatch):
    """Of chunked cross-attention, which needs no guess."""
    model = retro()
    (module,) = (x for x in model.modules() if type(x).__name__ == "ChunkedCrossAttention")
    expected = retro_pytorch.likely_class(module)
    asked = []
    monkeypatch.setattr(
        rk.ops.backends.classes,
        "features",
        lambda call: asked.append(Class.of(call.operation, features(call))) or features(call),
    )
    swap(model)
    model(torch.randint(1, 50, (1, 17)), torch.randint(1, 50, (1, 2, 2, 16)), return_loss=False)
    assert expected in asked
    assert testing.class_case(expected, True).m == 13
