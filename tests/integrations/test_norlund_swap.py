"""`swap` against Norlund's attentions. Its code is in no package and needs a transformers of 2022: the four modules are
written in norlund_attentions.py from what their code does, and `swap` is told that theirs is the source it knows. With
NORLUND=.../src/modeling_retro.py of a clone (github.com/TobiasNorlund/retro @ 6945cdd) its own model is compared."""

import contextlib
import copy
import pickle
import random

import norlund_attentions
import pytest
import torch
from norlund_attentions import KINDS, D, E, M, MultiHead, know
from torch import nn

from benchmarks import peers
from retro_kernels.integrations import base, norlund, swap
from retro_kernels.models import Retro

K, R, B = 2, 6, 2


@pytest.fixture(autouse=True)
def known(monkeypatch, request):
    monkeypatch.setattr(base, "_warned", set())
    if "whole" not in request.node.name:
        know(monkeypatch)


def arguments(kind, n=14, hidden=0.3):
    """Of one call, the masks 1 where something is visible, in one chunk nowhere."""
    chunks = -(-n // M)
    sizes = {
        norlund.CCA: ((B, n, D), (B, chunks, K, R, E), (B, chunks, K, R)),
        norlund.CROSS: ((B, chunks, K, R, D), (B, chunks, M, E), (B, chunks, M)),
        norlund.ENCODER: ((B, chunks, K, R, D), (B, chunks, K, R)),
        norlund.DECODER: ((B, n, D), (B, n)),
    }[kind]
    mask = (torch.rand(sizes[-1]) >= hidden).float()
    mask[0, 0] = kind == norlund.DECODER
    mask[1, 0] = 1
    return *(torch.randn(size) for size in sizes[:-1]), mask


def both(module, given, gradient):
    leaves = [x.clone().requires_grad_() for x in given[:-1]]
    out, scores = module(*leaves, given[-1])
    assert scores is None
    return out, *torch.autograd.grad(out, (*leaves, *module.parameters()), gradient)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kind", norlund.ATTENTIONS)
def test_swapped_modules_agree(monkeypatch, kind, dtype):
    """In fp32 without rows that see nothing: there -10000 on every logit leaves those three digits."""
    if dtype == torch.float64:
        monkeypatch.setenv("RETRO_KERNELS_BACKEND", "reference")
    module = KINDS[kind]()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    module.to(dtype)
    swapped = copy.deepcopy(module)
    report = swap(swapped)
    assert report.replaced == [""]
    assert not report.seen
    tolerance = 1e-9 if dtype == torch.float64 else 1e-5
    for hidden in (0.0, 0.3) if dtype == torch.float64 else (0.0,):
        given = tuple(x.to(dtype) for x in arguments(kind, hidden=hidden))
        given[-1][0, 0] = given[-1][0, 0] if dtype == torch.float64 else 1
        gradient = torch.randn_like(given[0])
        for got, want in zip(both(swapped, given, gradient), both(module, given, gradient)):
            torch.testing.assert_close(got, want, rtol=10 * tolerance, atol=tolerance * want.abs().max().item())
    if dtype == torch.float32 and kind == norlund.DECODER:
        compiled = torch.compile(swapped, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(*given)[0], module(*given)[0], rtol=1e-4, atol=1e-5)
    report.undo()
    assert torch.equal(swapped(*given)[0], module(*given)[0])


@pytest.mark.parametrize("kind", norlund.ATTENTIONS)
def test_a_swapped_module_that_was_called_can_be_pickled(monkeypatch, kind):
    monkeypatch.setattr(norlund_attentions, kind, KINDS[kind], raising=False)
    module, given = KINDS[kind](), arguments(kind)
    swap(module)
    want = module(*given)[0]
    assert torch.equal(pickle.loads(pickle.dumps(module))(*given)[0], want)


def test_calls_that_are_not_covered_run_its_own_code():
    given = list(arguments(norlund.DECODER))
    given[-1][0, 0] = 0.0  # padding on the left
    module = KINDS[norlund.DECODER]()
    swapped = copy.deepcopy(module)
    swap(swapped)
    with pytest.warns(UserWarning, match="padding on the left"):
        assert torch.equal(swapped(*given)[0], module(*given)[0])
    given[-1][:] = 0.5
    with pytest.warns(UserWarning, match="other numbers than 0 and 1"):
        assert torch.equal(swapped(*given)[0], module(*given)[0])
    given[-1][:] = 1.0
    module.multi_head_attention.attn_dropout = swapped.multi_head_attention.attn_dropout = nn.Identity()
    with pytest.warns(UserWarning, match="has hooks or was changed"):
        assert torch.equal(swapped(*given)[0], module(*given)[0])
    chunked = KINDS[norlund.CCA]()
    swap(chunked)
    short = torch.randn(B, M - 1, D)
    assert torch.equal(chunked(short, torch.randn(B, 1, K, R, E), torch.ones(B, 1, K, R))[0], short)


def test_what_is_not_the_known_version_is_left_alone(monkeypatch):
    module = KINDS[norlund.CCA]()
    monkeypatch.setattr(MultiHead, "forward", lambda self, *_: None)
    report = swap(module, strict=False)
    assert "MultiHeadAttention.forward is not that of" in report.skipped[""]
    assert "rk.nn.ChunkedCrossAttention.norlund" in report.skipped[""]
    module.gate = nn.Linear(2, 2)
    assert "its parts are gate" in swap(module, strict=False).skipped[""]


@pytest.fixture
def peer():
    with contextlib.ExitStack() as stack:
        try:
            yield stack.enter_context(peers.norlund())
        except ImportError as error:
            pytest.skip(str(error))


def test_its_own_whole_model_agrees(peer):
    for seed in range(100):
        torch.manual_seed(seed)
        draw = random.Random(seed)
        m, k, layers, encoder_layers = (
            draw.choice([2, 4, 7]),
            draw.randint(1, 3),
            draw.randint(1, 3),
            draw.randint(1, 2),
        )
        r = draw.choice([m, 2 * m, 5])
        sizes = {"num_embeddings": 50, "chunk_size": m, "dropout_p": 0.0}
        sizes |= {"enc_hidden_dim": 12, "enc_ffn_dim": 16, "enc_num_heads": draw.randint(1, 3), "enc_qkv_dim": 12}
        sizes |= {"dec_hidden_dim": 16, "dec_ffn_dim": 20, "dec_num_heads": 2, "dec_qkv_dim": draw.choice([16, 24])}
        sizes |= {"enc_num_layers": encoder_layers, "dec_num_layers": layers}
        sizes["enc_ca_layers"] = draw.sample(range(encoder_layers), draw.randint(0, encoder_layers))
        sizes["dec_cca_layers"] = draw.sample(range(layers), draw.randint(1, layers))
        for name in ("enc_sa", "enc_ca", "dec_sa", "dec_cca"):
            sizes[f"{name}_pos_bias_num_buckets"] = draw.choice([4, 5, 64])
        model = peer.RetroModelLMHead(peer.RetroConfig(**sizes))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(0, 0.3)
        swapped = copy.deepcopy(model)
        report = swap(swapped)
        assert len(report.replaced) == layers + encoder_layers + sum(len(sizes[x]) for x in sizes if "ca_layers" in x)
        n = draw.randint(1, 4 * m + 1)
        tokens, neighbours = torch.randint(1, 50, (2, n)), torch.randint(0, 50, (2, -(-n // m), k, r))
        neighbours[0, 0] *= seed % 2  # a chunk without neighbours, and padding on the right
        tokens[1, -1] *= seed % 3 > 0 or n == 1
        outs = [x(tokens, neighbours).logits for x in (model, swapped)]
        gradient = torch.randn_like(outs[0])
        for out in outs:
            out.backward(gradient)
        torch.testing.assert_close(outs[1], outs[0], rtol=2e-5, atol=2e-5 * outs[0].abs().max().item())
        largest = max(x.grad.abs().max().item() for x in model.parameters() if x.grad is not None)
        for (name, x), y in zip(model.named_parameters(), swapped.parameters()):
            assert (x.grad is None) == (y.grad is None), name
            if x.grad is not None:
                torch.testing.assert_close(y.grad, x.grad, rtol=2e-4, atol=2e-6 * largest, msg=name)
        report.undo()
        assert torch.equal(swapped(tokens, neighbours).logits, model(tokens, neighbours).logits)
        if seed == 0:
            told = {"num_neighbours": k, "retrieved_length": r}
            Retro.from_peer(model, **told)
            given = model.base.decoder[0][2].__class__
            model.base.decoder[0][2].__class__ = type("Other", (nn.Module,), {"forward": given.forward})
            with pytest.raises(ValueError, match=r"base\.decoder\.0\.2 is a Other, which it has not"):
                Retro.from_peer(model, **told)
            model.base.decoder[0][2].__class__ = given
            model.base.final_layer_norm.eps = 1.0
            with pytest.raises(ValueError, match=r"base\.final_layer_norm has eps = 1\.0"):
                Retro.from_peer(model, **told)
            model.base.final_layer_norm.eps, model.base.decoder[0][2].gelu_act = 1e-8, torch.nn.ReLU()
            with pytest.raises(ValueError, match=r"gelu_act of base\.decoder\.0\.2 is a ReLU"):
                Retro.from_peer(model, **told)
