"""What `swap` does where there is nothing it knows, or something that only looks like it. Needs no peer."""

import pytest
import torch
from torch import nn

import retro_kernels as rk
from retro_kernels.integrations import swap, unswap


class ChunkedCrossAttention(nn.Module):
    """Named as retro-pytorch's, but not built as it."""

    def __init__(self):
        super().__init__()
        self.attention = nn.Linear(2, 2)

    def forward(self, x):
        return self.attention(x)


@pytest.fixture
def lookalike(monkeypatch):
    monkeypatch.setattr(ChunkedCrossAttention, "__module__", "retro_pytorch.retro_pytorch")
    return nn.Sequential(nn.Linear(2, 2), ChunkedCrossAttention())


def test_nothing_found_raises_unless_told_not_to():
    model = nn.Sequential(nn.Linear(2, 2), nn.GELU())
    with pytest.raises(ValueError, match=r"GELU.*Linear.*retro_pytorch\.retro_pytorch\.ChunkedCrossAttention"):
        swap(model)
    report = swap(model, strict=False)
    assert report.replaced == []
    assert report.skipped == {}
    assert "found only modules of other classes (GELU, Linear, Sequential)" in str(report)
    report.undo()
    assert unswap(model) == []


def test_a_module_of_the_right_name_and_another_structure_is_skipped_with_the_reason(lookalike):
    with pytest.raises(ValueError, match=r"1: its parts are attention"):
        swap(lookalike)
    report = swap(lookalike, strict=False)
    assert list(report.skipped) == ["1"]
    assert "forward" not in vars(lookalike[1])
    assert lookalike(torch.ones(1, 2)).shape == (1, 2)


def test_arguments_are_checked():
    with pytest.raises(TypeError, match="model"):
        swap("model")
    with pytest.raises(ValueError, match=r"positions.*as_trained"):
        swap(nn.Linear(2, 2), positions="right")


def test_the_report_prints_as_text_and_as_a_table(lookalike):
    rich = pytest.importorskip("rich.console")
    report = swap(lookalike, strict=False)
    assert "skipped 1: its parts are attention" in str(report)
    console = rich.Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(report)
    assert "0 replaced, 1 skipped" in console.export_text()


def test_what_is_known_and_not_replaced_is_named_with_what_serves_instead():
    from retro_kernels.models import Retro, RetroConfig

    class Retrofitted(nn.Module):
        pass

    mengzi = type("Re_gptBlock", (nn.Module,), {})()
    flamingo = type("MaskedCrossAttention", (nn.Module,), {})()
    for module, message in (
        (Retro(RetroConfig.preset("tiny")), "fused already"),
        (
            nn.Sequential(nn.Linear(2, 2), mengzi),
            r"1: mengzi-retrieval-lm's Re_gptBlock: .*ChunkedCrossAttention\.retro_pytorch",
        ),
        (flamingo, "Flamingo's .*of another package"),
        (nn.Sequential(type("RetroCCA", (nn.Module,), {})()), r"0: \S+RetroCCA: by its name chunked cross-attention"),
        (
            rk.nn.ChunkedCrossAttention(8, context_dim=8, num_heads=2, chunk_size=4),
            "nn.chunked_cross_attention.*fused already",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            swap(module)
        report = swap(module, strict=False)
        assert report.replaced == []
        assert len(report.seen) == 1
        assert "seen" in str(report)


def test_a_decoder_of_transformers_is_pointed_to_retrofit():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=10, n_positions=64)
    model = transformers.GPT2LMHeadModel(config)
    with pytest.raises(ValueError, match=r"a GPT2LMHeadModel of transformers.*rk\.retrofit"):
        swap(model)
    rk.retrofit(model, chunk_size=2, retrieved_length=2)
    with pytest.raises(ValueError, match=r"a GPT2LMHeadModel that rk\.retrofit has made a RETRO of"):
        swap(model)
