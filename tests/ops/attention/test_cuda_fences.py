"""Every fence of the Hopper kernels is missed when it is left out: the emulator knows which bytes ordinary stores have
written since their thread's last fence.proxy.async, which mbarriers no fence.mbarrier_init has followed, and whether a
wgmma.fence came before a product. And the descriptors and faults of emulator_faults.cpp (test_cuda.py)."""

from __future__ import annotations

import re

import emulator
import pytest
import torch

import retro_kernels as rk
from retro_kernels import cuda_extension

FENCE = re.compile(r"\bfence_(async|products|barriers)\(\);")
SITES = [
    (file.name, number)
    for file in sorted((emulator.SOURCES / "sm90").glob("*.cuh"))
    if file.name != "hopper.cuh"
    for number, line in enumerate(file.read_text().splitlines(), 1)
    if FENCE.search(line)
]


@pytest.fixture(autouse=True)
def hopper(emulated):
    cuda_extension.set_kernels("sm90 only")
    yield
    cuda_extension.set_kernels("")


def draw(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).bfloat16()


def attend(**options):
    """Rows that do not fill a tile, two tiles of slots, some hidden; forward and, with an option, backward."""
    query, key, value = draw(1, 30, 1, 64), draw(1, 2, 2, 16, 1, 64), draw(1, 2, 2, 16, 1, 64)
    tensors = [x.requires_grad_(bool(options)) for x in (query, key, value)]
    mask = torch.arange(16).expand(1, 2, 2, 16) != 3
    out = rk.chunked_cross_attention(*tensors, chunk_size=12, neighbour_mask=mask, backend="cuda")
    if options:
        torch.autograd.grad(out, tensors, torch.ones_like(out))


def absorb():
    """Two heads of a cluster's blocks, 48 of 128 slots, two blocks of columns."""
    states, weight = draw(1, 2, 2, 24, 72), draw(1, 64, 72)
    mask = torch.arange(24).expand(1, 2, 2, 24) != 3
    with torch.no_grad():
        rk.projected_chunked_cross_attention(
            draw(1, 30, 4, 64),
            states,
            weight,
            weight,
            chunk_size=12,
            neighbour_mask=mask,
            strategy="absorb",
            backend="cuda",
        )


def run(file: str) -> None:
    if file == "absorbed.cuh":
        absorb()
    else:
        attend(**({"backward": True} if file == "backward.cuh" else {}))


def test_with_all_fences_nothing_is_missed():
    run("absorbed.cuh")
    run("backward.cuh")


@pytest.mark.parametrize("site", SITES, ids=lambda site: f"{site[0]}:{site[1]}")
def test_a_fence_left_out_is_missed(site, monkeypatch):
    monkeypatch.setenv("RETRO_KERNELS_EMULATOR_SKIP", f"{site[0]}:{site[1]}")
    with pytest.raises(RuntimeError, match=r"in the emulator: .*fence"):
        run(site[0])


def _texts():
    return [file.read_text() for file in (emulator.SOURCES / "sm90").glob("*.cuh") if file.name != "hopper.cuh"]


def test_the_sites_are_all():
    """No line has two."""
    assert len(SITES) == sum(map(len, map(FENCE.findall, _texts())))
    assert len(SITES) >= 19
    assert {file for file, _ in SITES} == {"absorbed.cuh", "backward.cuh", "forward.cuh", "rows.cuh", "slots.cuh"}
