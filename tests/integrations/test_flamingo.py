"""`swap` against Flamingo's cross-attention, open_flamingo's and flamingo-pytorch's own.

pip install --no-deps --target SOMEWHERE open-flamingo==2.0.1 flamingo-pytorch==0.1.2 einops-exts==0.0.4
PYTHONPATH=SOMEWHERE pytest tests/integrations/test_flamingo.py
"""

import contextlib
import copy

import pytest
import torch
from torch import nn

from benchmarks import peers
from retro_kernels.integrations import base, swap, unswap

DIM, H, D, S = 12, 2, 8, 5


@pytest.fixture(scope="module", params=peers.FLAMINGO)
def peer(request):
    pytest.importorskip("einops_exts")
    with contextlib.ExitStack() as stack:
        try:
            yield stack.enter_context(peers.flamingo(request.param)).MaskedCrossAttention
        except ImportError as error:
            pytest.skip(str(error))


@pytest.fixture
def pair(peer, monkeypatch):
    """-> a block of it unswapped and swapped, and the width of its media."""
    monkeypatch.setattr(base, "_warned", set())
    torch.manual_seed(0)
    visual = {"dim_visual": 10} if "open" in peer.__module__ else {}
    model = nn.ModuleList([peer(dim=DIM, heads=H, dim_head=D, **visual)])
    swapped = copy.deepcopy(model)
    assert swap(swapped).replaced == ["0"]
    return model[0], swapped[0], visual.get("dim_visual", DIM)


def compare(pair, locations, t, n=None, **options):
    model, swapped, width = pair
    b = 3 if locations is None else locations.shape[0]
    n = n or locations.shape[1]
    given = torch.randn(b, n, DIM), torch.randn(b, t, S, width)
    gradient = torch.randn(b, n, DIM)
    found = []
    for one in (model, swapped):
        x, media = (y.clone().requires_grad_() for y in given)
        out = one(x, media, media_locations=locations, **options)
        found.append((out, *torch.autograd.grad(out, (x, media, *one.parameters()), gradient, allow_unused=True)))
    for got, want in zip(found[1], found[0]):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5 * max(want.abs().max().item(), 1))


def places(n, *rows):
    locations = torch.zeros(len(rows), n, dtype=torch.bool)
    for row, at in enumerate(rows):
        locations[row, list(at)] = True
    return locations


@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
def test_every_token_attends_to_the_media_before_it(pair, monkeypatch, backend):
    """Chunks of any lengths, of one token too; text before the first media; rows without, and with all media."""
    monkeypatch.setenv("RETRO_KERNELS_BACKEND", backend)
    compare(pair, places(13, (0, 4, 5), (3, 12), ()), 3)
    compare(pair, places(1, (0,), ()), 2)
    for seed in range(1 if backend == "triton" else 10):
        torch.manual_seed(seed)
        compare(pair, torch.rand(2, 9 + 7 * seed) < 0.2, 1 + 2 * seed)  # where media are too few: all are averaged


def test_text_that_follows_all_its_media(pair):
    if "open" in type(pair[0]).__module__:
        compare(pair, places(7, (0, 4), (), (1, 2, 6)), 2, 4, use_cached_media=True)
        compare(pair, None, 2, 4, use_cached_media=True)
    else:
        compare(pair, None, 2, 4)


@pytest.mark.filterwarnings("ignore")
def test_compiled_exported_copied_and_half(pair):
    model, swapped, width = pair
    x, media, locations = torch.randn(2, 9, DIM), torch.randn(2, 3, S, width), places(9, (0, 4), (3, 5, 6, 7))
    want = model(x, media, locations)
    for other in (
        torch.compile(swapped, fullgraph=True, backend="aot_eager"),
        torch.export.export(swapped, (x, media, locations)).module(),
        copy.deepcopy(swapped),
    ):
        torch.testing.assert_close(other(x, media, locations), want, rtol=1e-4, atol=1e-5)
    halves = [one.bfloat16()(x.bfloat16(), media.bfloat16(), locations).float() for one in (swapped, model)]
    errors = [(half - want).abs().max() for half in halves]
    assert errors[0] <= 2 * errors[1]
    unswap(swapped)
    assert torch.equal(*(one(x.bfloat16(), media.bfloat16(), locations) for one in (swapped, model)))


def test_calls_that_are_not_covered_run_its_own_code(pair):
    model, swapped, width = pair
    x, media, locations = torch.randn(2, 9, DIM), torch.randn(2, 3, S, width), places(9, (0, 4), (3, 5))
    with pytest.warns(UserWarning, match="expected bool"):
        assert torch.equal(swapped(x, media, locations.long()), model(x, media, locations.long()))
    model.only_attend_immediate_media = swapped.only_attend_immediate_media = False
    with pytest.warns(UserWarning, match="attends to all media"):
        assert torch.equal(swapped(x, media, locations), model(x, media, locations))
    with pytest.raises(TypeError):
        swapped(x, media, locations, nonsense=True)


def test_what_is_not_the_known_version_is_left_alone(peer, monkeypatch):
    visual = {"dim_visual": DIM} if "open" in peer.__module__ else {}
    model = peer(dim=DIM, **visual)
    monkeypatch.setattr(peer, "forward", lambda self, *_, **__: None)
    report = swap(model, strict=False)
    assert "MaskedCrossAttention.forward is not that of" in report.skipped[""]
    assert not report.seen
