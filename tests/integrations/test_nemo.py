"""`swap` against NeMo's chunked cross-attention, its own file, with stand-ins for what that imports (Apex, Megatron's
parallel layers, adapters): linear layers of one process, and the softmax that peers.md describes.

pip install --no-deps --target SOMEWHERE nemo-toolkit==1.23.0 && PYTHONPATH=SOMEWHERE pytest tests/integrations
"""

import contextlib
import copy
import enum
import importlib.util
import sys
import types
from pathlib import Path

import pytest
import torch
from torch import nn

from retro_kernels.integrations import base, swap

HOME = "nemo.collections.nlp.modules.common.megatron"
M, K, R, B, D, H = 4, 2, 8, 2, 16, 2


class Linear(nn.Linear):
    """Megatron's: with its bias, or beside it."""

    def __init__(self, inputs, outputs, *, bias=True, skip_bias_add=False, **_):
        super().__init__(inputs, outputs, bias=bias)
        self.skip = skip_bias_add

    def forward(self, x):
        out = nn.functional.linear(x, self.weight, None if self.skip else self.bias)
        return out, self.bias if self.skip else None


class Softmax(nn.Module):
    def __init__(self, fp16, bf16, kind, fusion, mask_func, in_fp32, scale):
        super().__init__()
        self.scale = scale

    def forward(self, x, mask):
        x = x * (self.scale or 1.0)
        return x.masked_fill(mask, -10000.0).softmax(-1) * ~mask.all(-1, keepdim=True)


class Base(nn.Module):
    def __init__(self, config=None):
        super().__init__()


class Adapters:
    def set_accepted_adapter_types(self, _):
        pass

    def is_adapter_available(self):
        return False


class Anything(types.ModuleType):
    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {"_target_": name})


@pytest.fixture(scope="module")
def peer():
    package = importlib.util.find_spec("nemo")
    if package is None or package.origin is None:
        pytest.skip("NeMo is not installed (pip install --no-deps nemo-toolkit==1.23.0)")
    folder = Path(package.origin).parents[1].joinpath(*HOME.split("."))
    kinds = {name: enum.Enum(name, "self_attn cross_attn padding causal") for name in ("AttnType", "AttnMaskType")}
    split = types.SimpleNamespace(
        ColumnParallelLinear=Linear,
        RowParallelLinear=Linear,
        split_tensor_along_last_dim=lambda x, parts, contiguous_split_chunks: x.chunk(parts, -1),
        random=types.SimpleNamespace(get_cuda_rng_tracker=lambda: types.SimpleNamespace(fork=contextlib.nullcontext)),
    )
    one = {"get_tensor_model_parallel_world_size": lambda: 1, "get_tensor_model_parallel_rank": lambda: 0}
    given = {
        "apex.transformer.enums": kinds,
        "apex.transformer.utils": {"divide": lambda x, y: x // y},
        "megatron.core": {"tensor_parallel": split, "parallel_state": types.SimpleNamespace(**one)},
        "nemo.core": {"adapter_mixins": types.SimpleNamespace(AdapterModuleMixin=Adapters)},
        f"{HOME}.module": {"MegatronModule": Base},
        f"{HOME}.fused_softmax": {"MatchedScaleMaskSoftmax": Softmax},
        f"{HOME}.adapters.parallel_adapters": {},
        f"{HOME}.position_embedding": {},
        f"{HOME}.utils": {},
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, parts in given.items():
            stems = [name.rsplit(".", i)[0] for i in range(name.count(".") + 1)]
            for stem in reversed(stems):
                if stem == name or not isinstance(sys.modules.get(stem), Anything):
                    module = Anything(stem)
                    module.__path__ = []
                    patch.setitem(sys.modules, stem, module)
            for part, value in parts.items():
                setattr(sys.modules[name], part, value)
        for name in ("position_embedding.rotary_position_embedding", "attention"):
            path = folder.joinpath(*name.split(".")).with_suffix(".py")
            spec = importlib.util.spec_from_file_location(f"{HOME}.{name}", path)
            patch.setitem(sys.modules, f"{HOME}.{name}", importlib.util.module_from_spec(spec))
            spec.loader.exec_module(sys.modules[f"{HOME}.{name}"])
        yield sys.modules[f"{HOME}.attention"], sys.modules[f"{HOME}.position_embedding.rotary_position_embedding"]


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
