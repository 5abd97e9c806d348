"""`swap` against NeMo's chunked cross-attention, its own file, with stand-ins for what that imports (Apex, Megatron's
parallel layers, adapters): linear layers of one process, and the softmax that peers.md describes.

pip install --no-deps --target SOMEWHERE nemo-toolkit==1.23.0 && PYTHONPATH=SOMEWHERE pytest tests/integrations
"""

import contextlib
import copy
import types

import pytest
import torch

from benchmarks import peers
from retro_kernels.integrations import base, swap

M, K, R, B, D, H = 4, 2, 8, 2, 16, 2


@pytest.fixture(scope="module")
def peer():
    with contextlib.ExitStack() as stack:
        try:
            yield stack.enter_context(peers.nemo())
        except ImportError as error:
            pytest.skip(f"{error} (pip install --no-deps nemo-toolkit==1.23.0)")


def build(peer, **options):
    torch.manual_seed(0)
    settings = {"layer_number": 3, "num_attention_heads": H, "hidden_size": D, "chunk_size": M, "precision": 32}
    config = types.SimpleNamespace(sequence_parallel=False)
    return peer[0].ParallelChunkedCrossAttention(
        config, None, None, **{**settings, "attention_dropout": 0.0, **options}
    )


def arguments(peer, n, version, masked):
    """Of a call, as its decoder makes it."""
    chunks = n // M
    named = {"encoder_output": torch.randn(chunks, K, R, B, D)}
    rows, keys = torch.rand(B, chunks, M) >= 0.2, torch.rand(B, chunks, K * R) >= 0.3
    keys[0, 0] = False
    if not masked:
        rows[:], keys[:] = True, True
    mask = ~(rows[..., None] & keys[:, :, None]).flatten(0, 1)[:, None]
    if version:
        rotary = peer[1].RotaryEmbedding(8)
        named["rotary_pos_emb"] = rotary(2 * M - 1, offset=1 - M), rotary(R, offset=0 if version == 1 else 1 - M)
    return torch.randn(n, B, D), mask, named


def both(module, hidden, mask, named, gradient):
    leaves = hidden.clone().requires_grad_(), named["encoder_output"].clone().requires_grad_()
    out, bias = module(leaves[0], mask, **{**named, "encoder_output": leaves[1]})
    wanted = (*leaves, *module.parameters())
    return out, bias, *torch.autograd.grad(out + (0.0 if bias is None else bias), wanted, gradient)


@pytest.mark.parametrize("options", [{}, {"apply_query_key_layer_scaling": True}, {"bias": False, "kv_channels": 24}])
@pytest.mark.parametrize("version", [0, 1, 2])
def test_swapped_modules_agree(peer, version, options):
    module = build(peer, **options)
    swapped = copy.deepcopy(module)
    report = swap(swapped)
    assert report.replaced == [""]
    for n in (M, 2 * M - 1, 3 * M, 3 * M + 2):
        for masked in (False, True):
            hidden, mask, named = arguments(peer, n, version, masked)
            gradient = torch.randn_like(hidden)
            for got, want in zip(*(both(one, hidden, mask, named, gradient) for one in (swapped, module))):
                if want is not None:
                    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5 * max(want.abs().max().item(), 1e-3))
    report.undo()
    assert torch.equal(swapped(hidden, mask, **named)[0], module(hidden, mask, **named)[0])


def test_steps_of_generation_and_other_masks_run_its_own_code(peer, monkeypatch):
    monkeypatch.setattr(base, "_warned", set())
    module = build(peer)
    swapped = copy.deepcopy(module)
    swap(swapped)
    hidden, mask, named = arguments(peer, 3 * M, 2, False)
    mask = torch.rand(mask.shape) < 0.5
    with pytest.warns(UserWarning, match="no product"):
        assert torch.equal(swapped(hidden, mask, **named)[0], module(hidden, mask, **named)[0])
    named["encoder_output"] = named["encoder_output"][:2]
    with pytest.raises(AssertionError):
        swapped(hidden, mask, **named)


def test_what_is_not_the_known_version_is_left_alone(peer, monkeypatch):
    for options, reason in (({"headscale": True}, "its headscale is True"), ({"megatron_legacy": True}, "legacy")):
        report = swap(build(peer, **options), strict=False)
        assert reason in report.skipped[""]
        assert "rk.nn.ChunkedCrossAttention with biases=True" in report.skipped[""]
    monkeypatch.setattr(peer[0].CoreAttention, "forward", lambda self, *_: None)
    assert "CoreAttention.forward is not that of nemo-toolkit 1.23.0" in swap(build(peer), strict=False).skipped[""]
