"""A class of a peer's source is the peer's, wherever its file was copied to; what was changed in the copy is seen."""

import copy
import importlib.util
from pathlib import Path

import pytest
import torch

from benchmarks import peers
from retro_kernels.integrations import swap
from retro_kernels.models import Retro


@pytest.fixture
def load(tmp_path):
    """-> `load(path, before, after)`: the module of a copy of a file in which one text is replaced."""

    def make(path, before="", after=""):
        source = Path(path).read_text()
        assert before in source
        target = tmp_path / "model_of_mine.py"
        target.write_text(source.replace(before, after) if before else source)
        spec = importlib.util.spec_from_file_location("model_of_mine", target)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return make


def file_of(name):
    return pytest.importorskip(name, reason="the peer is not installed (`make peers`)").__file__


def retro_pytorch(peer):
    sizes = {"num_tokens": 50, "max_seq_len": 32, "enc_dim": 24, "enc_depth": 1, "dec_dim": 24, "dec_depth": 1}
    return peer.RETRO(dec_cross_attn_layers=(1,), dim_head=32, chunk_size=4, **sizes).eval()


def labml(peer):
    sizes = {"chunk_len": 4, "d_model": 24, "n_heads": 2, "d_k": 8, "d_ff": 32}
    encoder = peer.NearestNeighborEncoder(n_layers=1, ca_layers={0}, **sizes)
    return peer.RetroModel(n_vocab=50, n_layers=1, ca_layers={0}, encoder=encoder, **sizes)


@pytest.mark.parametrize(
    ("name", "build", "change"),
    [
        ("retro_pytorch.retro_pytorch", retro_pytorch, ("return self.ff(x)", "return 2 * self.ff(x)")),
        ("retro_transformer.model", labml, ("h = self.lin2(h)", "h = 2 * self.lin2(h)")),
    ],
)
def test_copies_of_whole_models(load, name, build, change):
    path = file_of(name)
    model = build(load(path))
    swapped = copy.deepcopy(model)
    assert len(swap(swapped).replaced) == 4
    tokens, neighbours = torch.randint(1, 50, (2, 9)), torch.randint(1, 50, (2, 2, 2, 8))
    want = model(tokens, neighbours)
    for got in (swapped(tokens, neighbours), Retro.from_peer(model)(tokens, neighbours)):
        torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5)

    other = build(load(path, *change))
    want = other(tokens, neighbours)
    assert len(swap(other).replaced) == 4  # its attentions are what they were
    torch.testing.assert_close(other(tokens, neighbours), want, rtol=2e-5, atol=2e-5)
    with pytest.raises(ValueError, match=r"FeedForward\.forward is not that of"):
        Retro.from_peer(other)


def test_a_changed_attention_is_left_alone(load):
    path = file_of("retro_pytorch.retro_pytorch")
    model = retro_pytorch(load(path, "sim = sim.masked_fill(~mask, mask_value)", "sim = sim.masked_fill(~mask, 0.0)"))
    report = swap(model, strict=False)
    assert report.replaced == []
    assert "Attention.forward is not that of 0.3.9" in report.skipped["decoder.layers.0.1.fn"]
    with pytest.raises(ValueError, match=r"Attention\.forward is not that of"):
        Retro.from_peer(model)


@pytest.mark.parametrize("package", peers.FLAMINGO)
def test_copies_of_flamingos(load, package):
    pytest.importorskip("einops_exts")
    try:
        with peers.flamingo(package) as peer:
            path = peer.__file__
    except ImportError as error:
        pytest.skip(str(error))
    visual = {"dim_visual": 16} if package == "open_flamingo" else {}
    model = load(path).MaskedCrossAttention(dim=16, **visual)
    given = torch.randn(2, 9, 16), torch.randn(2, 2, 5, 16), torch.arange(9).expand(2, 9) % 4 == 1
    want = model(*given)
    assert swap(model).replaced == [""]
    torch.testing.assert_close(model(*given), want, rtol=2e-5, atol=2e-5)
