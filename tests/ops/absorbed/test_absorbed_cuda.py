"""The absorbed kernel for Hopper in the emulator, forward, against the reference in fp64."""

from __future__ import annotations

import pytest
import torch

import retro_kernels as rk

pytestmark = pytest.mark.usefixtures("emulated")
HALVES = (torch.bfloat16, torch.float16)


def draw(dtype, *shape, scale=1.0):
    return (scale * torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))).to(dtype)


def make(dtype, b, n, h, hk, d, l, k, r, e, masked=False):
    x = {
        "query": draw(dtype, b, n, h, d),
        "encoded": draw(dtype, b, l, k, r, e),
        "w_key": draw(dtype, hk, d, e, scale=e**-0.5),
        "w_value": draw(dtype, hk, d, e + 8, scale=e**-0.5)[..., 8:],
    }
    if masked:
        mask = torch.rand(b, l, k, r, generator=torch.Generator().manual_seed(1)) < 0.6
        mask[0, 0] = False
        x["neighbour_mask"] = mask
        x["encoded"][~mask] = float("nan")
    return x


def call(x, backend, **options):
    return rk.projected_chunked_cross_attention(**x, strategy="absorb", backend=backend, return_lse=True, **options)


def agree(x, dtype, **options):
    """q W_k, the probabilities and the weighted sum of states are rounded: errors of about 2^-8 in bf16."""
    given = call(x, "cuda", **options)
    wide = {name: y.double() if y.is_floating_point() else y for name, y in x.items()}
    expected = call(wide, "reference", **options)
    limits = {torch.bfloat16: (1.2e-2, 4e-3), torch.float16: (1.5e-3, 5e-4)}[dtype]
    for g, e, limit in zip(given, expected, limits):
        assert torch.equal(g.isfinite(), e.isfinite())
        assert (g.double() - e).nan_to_num(0, 0, 0).abs().max() <= limit * e.nan_to_num(0, 0, 0).abs().max().clamp(
            min=1
        )
    return given


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("d", [64, 96, 128])
def test_heads_slots_and_widths(d, masked, dtype):
    """Three heads of one key/value head, so one block has a head too many; 48 and 136 of 128 and 256 slots; a last
    block of 40 columns."""
    agree(make(dtype, 2, 30, 3, 1, d, 2, 2, 24, 104, masked), dtype, chunk_size=16)
    if d != 96:
        agree(make(dtype, 1, 20, 2, 2, d, 1, 1, 136, 72, masked), dtype, chunk_size=16)


def test_the_paper_s_shape():
    """64 rows, 256 slots: every row of a tile is used, in two items of two heads, and tokens that attend to nothing."""
    agree(make(torch.bfloat16, 1, 130, 2, 2, 64, 2, 2, 128, 64), torch.bfloat16, chunk_size=64)


@pytest.mark.parametrize(("h", "k", "r"), [(3, 2, 16), (7, 2, 16), (8, 1, 32), (8, 4, 8)])
def test_blocks_that_share_states_give_what_each_gives_alone(h, k, r, monkeypatch):
    """2 blocks share a chunk's states for 3 heads, 4 for 7 and 8, by whole neighbours or parts of them; one block
    computes 2 heads alone. In any order of blocks, warps and boxes, with masked states that are NaN."""
    x = make(torch.bfloat16, 1, 40, h, 1, 64, 2, k, r, 72, masked=True)
    together = agree(x, torch.bfloat16, chunk_size=16)
    for seed in (1, 2):
        monkeypatch.setenv("RETRO_KERNELS_EMULATOR_SEED", str(seed))
        assert all(torch.equal(a, b) for a, b in zip(together, call(x, "cuda", chunk_size=16)))
    for head in range(0, h, 2):
        alone = call(x | {"query": x["query"][:, :, head : head + 2]}, "cuda", chunk_size=16)
        assert all(torch.equal(a[:, :, head : head + 2], b) for a, b in zip(together, alone))


def test_strides_offsets_and_alignment():
    x = make(torch.float16, 2, 40, 2, 1, 64, 4, 2, 16, 64, masked=True)
    x["query"] = draw(torch.float16, 2, 2, 40, 64).transpose(1, 2)
    x["encoded"] = x["encoded"].transpose(0, 1).contiguous().transpose(0, 1)
    agree(x, torch.float16, chunk_size=16, stride=12, scale=-0.2)
    agree(x, torch.float16, chunk_size=16, query_offset=37, chunk_offset=1)
    agree(x, torch.float16, chunk_size=16, align="end")


def test_writes_its_outputs_and_nothing_else(monkeypatch, guarded):
    """Outputs are NaN before, between guard bands; an order of warps and boxes drawn at random changes no bit."""
    x = make(torch.bfloat16, 1, 40, 3, 3, 64, 2, 2, 16, 72, masked=True)
    first = agree(x, torch.bfloat16, chunk_size=16)
    for seed in (1, 2, 3):
        monkeypatch.setenv("RETRO_KERNELS_EMULATOR_SEED", str(seed))
        assert all(torch.equal(a, b) for a, b in zip(first, call(x, "cuda", chunk_size=16)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bias_key": torch.zeros(1, 64)}, "no bias_key"),
        ({"null_key": torch.zeros(2, 64), "null_value": torch.zeros(2, 64)}, "no null_key"),
        ({"dropout_p": 0.5}, "no dropout_p"),
        ({"encoded": draw(torch.bfloat16, 1, 1, 3, 128, 64)}, "256 states"),
        ({"encoded": draw(torch.bfloat16, 1, 1, 2, 12, 64)}, "multiple of 8 tokens"),
        ({"query": draw(torch.bfloat16, 1, 20, 2, 64).requires_grad_()}, "no_grad"),
    ],
)
def test_refusals_name_what_is_not_taken(change, message):
    x = make(torch.bfloat16, 1, 20, 2, 1, 64, 1, 2, 16, 64) | {"chunk_size": 16} | change
    with pytest.raises(ValueError, match=message):
        rk.projected_chunked_cross_attention(**x, strategy="absorb", backend="cuda")


@pytest.mark.parametrize("what", ["NaN of query", "NaN of encoded", "inf of query"])
def test_what_is_not_finite_comes_out_as_of_pytorch(what):
    """Of the rows whose logits it reaches, all of the output is NaN, and nothing of any other row."""
    x = make(torch.bfloat16, 1, 40, 3, 1, 64, 2, 2, 24, 104, masked=True)
    x["encoded"] = x["encoded"].abs()
    x["w_key"][:, 3] = 0.1  # so that inf in the query makes no logit inf - inf
    clean, name = call(x, "cuda", chunk_size=16), what.split(" of ")[1]
    value = float("nan") if what.startswith("NaN") else float("inf")
    touched = torch.zeros(1, 40, 3, dtype=torch.bool)
    if name == "query":
        x[name] = x[name].clone()
        x[name][0, 33, 1, 3] = value
        touched[0, 33, 1] = True
    else:
        x[name][(0, 1, *x["neighbour_mask"][0, 1].nonzero()[5], 3)] = value
        touched[0, 31:] = True
    out, lse = call(x, "cuda", chunk_size=16)
    assert out[touched].isnan().all()
    assert torch.equal(out[~touched], clean[0][~touched])
    assert torch.equal(lse[~touched], clean[1][~touched])
    assert lse[touched].isnan().all() if what.startswith("NaN") else (lse[touched] == value).all()
