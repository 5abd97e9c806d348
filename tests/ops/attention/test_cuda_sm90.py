"""The Hopper kernels in the emulator, alone, so that what they do not take raises: all three attentions against the
reference, forward and backward, and everything asynchronous (boxes, products, barriers) in a drawn order."""

from __future__ import annotations

import cases
import pytest
import test_cuda
import torch

import retro_kernels as rk
from retro_kernels import cuda_extension

pytestmark = pytest.mark.usefixtures("guarded")
HALVES = (torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def hopper(emulated):
    """Every test is the work of these kernels alone, by the count of their launches."""
    cuda_extension.launches()
    cuda_extension.set_kernels("sm90 only")
    yield
    launched = cuda_extension.launches()
    assert launched["sm90"] > 0
    assert launched["sm80"] == 0
    cuda_extension.set_kernels("")


def agree(operation, tensors, dtype, **arguments):
    """Out within twice the error of the same computation with rounded probabilities, about 2^-8 in bf16; lse tight."""
    given = operation(*tensors, return_lse=True, backend="cuda", **arguments)
    wide = [x.double() for x in tensors]
    expected = operation(*wide, return_lse=True, backend="reference", **arguments)
    limit = {torch.bfloat16: 8e-3, torch.float16: 1e-3}[dtype]
    for g, e, tolerance in zip(given, expected, (limit, 1e-5)):
        assert torch.equal(g.isfinite(), e.isfinite())
        assert (g.double() - e).nan_to_num(0, 0, 0).abs().max() <= tolerance * e.nan_to_num(0, 0, 0).abs().max()
    return given


def draw(dtype, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


CLOCKS = {
    "retro": {"b": 2, "n": 150, "h": 2, "hk": 2, "l": 2, "k": 2, "r": 128, "d": 64, "m": 64},
    "wide": {"b": 1, "n": 100, "h": 3, "hk": 1, "l": 2, "k": 1, "r": 70, "d": 128, "m": 48},
    "middle": {"b": 1, "n": 40, "h": 1, "hk": 1, "l": 3, "k": 3, "r": 8, "d": 96, "m": 16},
    "long chunks": {"b": 1, "n": 300, "h": 2, "hk": 1, "l": 2, "k": 1, "r": 40, "d": 64, "m": 128},
    "surplus chunks": {"b": 2, "n": 40, "h": 1, "hk": 1, "l": 4, "k": 2, "r": 20, "d": 64, "m": 16},
}


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", CLOCKS)
@pytest.mark.parametrize("masked", [False, True])
def test_chunked_cross_attention(name, dtype, masked):
    """Masked tokens hold NaN, and one chunk of the first sequence sees nothing."""
    b, n, h, hk, l, k, r, d, m = CLOCKS[name].values()
    query, key, value = draw(dtype, b, n, h, d), draw(dtype, b, l, k, r, hk, d), draw(dtype, b, l, k, r, hk, d)
    mask = None
    if masked:
        mask = torch.rand(b, l, k, r, generator=torch.Generator().manual_seed(1)) < 0.6
        mask[0, 0] = False
        key[~mask] = value[~mask] = float("nan")
    agree(rk.chunked_cross_attention, (query, key, value), dtype, chunk_size=m, neighbour_mask=mask)


def test_strides_offsets_and_retrieval_strides():
    """Heads before tokens, a slice of a longer sequence, chunks that overlap."""
    key, value = (draw(torch.float16, 1, 4, 2, 2, 24, 64).transpose(3, 4) for _ in range(2))
    query = draw(torch.float16, 1, 2, 50, 64).transpose(1, 2)
    agree(rk.chunked_cross_attention, (query, key, value), torch.float16, chunk_size=16, stride=12, scale=-0.3)
    agree(
        rk.chunked_cross_attention, (query, key, value), torch.float16, chunk_size=16, query_offset=37, chunk_offset=1
    )
    agree(rk.chunked_cross_attention, (query, key, value), torch.float16, chunk_size=16, align="end")


@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize("masked", [False, True])
def test_neighbour_self_attention(d, masked):
    """130 rows: the third tile of rows and of slots has two."""
    x = [draw(torch.bfloat16, 1, 2, 2, 130, 2, d) for _ in range(3)]
    mask = torch.rand(1, 2, 2, 130, generator=torch.Generator().manual_seed(1)) < 0.6 if masked else None
    agree(rk.neighbour_self_attention, x, torch.bfloat16, neighbour_mask=mask)


@pytest.mark.parametrize("masked", [False, True])
def test_neighbour_cross_attention(masked):
    query, key, value = (draw(torch.float16, 2, 2, *shape, 64) for shape in ((3, 70, 4), (33, 2), (33, 2)))
    mask = torch.rand(2, 2, 33, generator=torch.Generator().manual_seed(1)) < 0.6 if masked else None
    agree(rk.neighbour_cross_attention, (query, key, value), torch.float16, activation_mask=mask)


def test_any_order_of_warps_and_boxes_gives_the_same_bits(monkeypatch):
    """A missing wait, fence or barrier would show: what is on its way is NaN, and warps are held back at random."""
    b, n, h, hk, l, k, r, d, m = CLOCKS["wide"].values()
    query, key, value = draw(torch.bfloat16, b, n, h, d), *(draw(torch.bfloat16, b, l, k, r, hk, d) for _ in range(2))
    mask = torch.rand(b, l, k, r, generator=torch.Generator().manual_seed(1)) < 0.6
    key[~mask] = value[~mask] = float("nan")

    def call():
        return rk.chunked_cross_attention(
            query, key, value, chunk_size=m, neighbour_mask=mask, return_lse=True, backend="cuda"
        )

    first = call()
    for seed in range(1, 5):
        monkeypatch.setenv("RETRO_KERNELS_EMULATOR_SEED", str(seed))
        assert all(torch.equal(x, y) for x, y in zip(first, call()))


# Each way through the backward: one block of rows, one tile of slots, two sweeps; one panel of columns and two.
GRADIENTS = (
    "plain",
    "no token attends",
    "incomplete chunk",
    "surplus chunks",
    "odd sizes",
    "keys of many tiles",
    "grouped",
    "grouped, keys of two tiles",
    "multi query, mask",
    "mask, an empty chunk",
    "scale of zero",
    "stride",
    "end",
    "offset of chunks",
    "strided",
    "self",
    "self, odd",
    "self, two tiles",
    "self, sweeps",
    "self, grouped",
    "cross",
    "cross, odd",
    "cross, long",
    "cross, many neighbours",
    "cross, grouped",
    "cca",
    "cca, 128",
)
ORDERS = ("plain", "grouped, keys of two tiles", "self, two tiles", "cross, odd")
BY_NAME = {case.name: case for case in (*test_cuda.CCA, *test_cuda.ENCODER, *test_cuda.PAPER)}


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients_are_within_twice_the_error_of_pytorch(name):
    test_cuda.check(BY_NAME[name], torch.bfloat16)


@pytest.mark.parametrize("name", ["mask, an empty chunk", "self, two tiles", "cross, long", "cca"])
def test_the_gradient_of_the_log_sum_exp(name):
    test_cuda.check(BY_NAME[name], torch.bfloat16, of_lse=True)


@pytest.mark.parametrize("name", ORDERS)
def test_gradients_in_fp16(name):
    test_cuda.check(BY_NAME[name], torch.float16)


@pytest.mark.parametrize("name", ORDERS)
def test_any_order_of_warps_and_boxes_gives_the_same_gradients(name, monkeypatch):
    arguments = test_cuda.make(BY_NAME[name], torch.bfloat16)
    grad_out = torch.randn(BY_NAME[name].out_shape)
    expected = cases.run(arguments, "cuda", grad_out)
    for seed in range(1, 4):
        monkeypatch.setenv("RETRO_KERNELS_EMULATOR_SEED", str(seed))
        given = cases.run(arguments, "cuda", grad_out)
        assert all(torch.equal(given[key], x) for key, x in expected.items())


@pytest.mark.parametrize("name", ["masked tokens", "surplus chunks", "tokens before the first chunk"])
def test_what_is_not_attended_reaches_no_gradient(name):
    test_cuda.test_what_is_not_attended_reaches_nothing(name, float("nan"))


def test_what_is_not_taken_is_the_older_kernels_work_and_raises_without_them():
    query, key = draw(torch.float16, 1, 170, 1, 64), draw(torch.float16, 1, 2, 1, 8, 1, 64)
    with pytest.raises(RuntimeError, match=r'"sm90 only".*no multiple of 64'):
        rk.chunked_cross_attention(query, key, key, chunk_size=72, backend="cuda")
    with pytest.raises(RuntimeError, match=r'"sm90 only".*copy engine'):
        rk.chunked_cross_attention(
            query, key.expand(1, 2, 2, 8, 1, 64), key.expand(1, 2, 2, 8, 1, 64), chunk_size=64, backend="cuda"
        )
    cuda_extension.set_kernels("sm90")
    rk.chunked_cross_attention(query, key, key, chunk_size=72, backend="cuda")
    assert cuda_extension.launches()["sm80"] == 1
    rk.chunked_cross_attention(query, key, key, chunk_size=64, backend="cuda")
