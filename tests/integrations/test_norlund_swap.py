"""`swap` against Norlund's attentions. Its code is in no package and needs a transformers of 2022: the four modules are
written here from what their code does, and `swap` is told that theirs is the source it knows. With
NORLUND=.../src/modeling_retro.py of a clone (github.com/TobiasNorlund/retro @ 6945cdd) its own model is compared."""

import contextlib
import copy
import random

import pytest
import torch
from torch import nn

from benchmarks import peers
from retro_kernels.integrations import base, norlund, swap

M, K, R, B, D, E = 4, 2, 6, 2, 12, 8


class Bias(nn.Module):
    def __init__(self, buckets, heads, both_ways):
        super().__init__()
        self.relative_attention_bias = nn.Embedding(buckets, heads)
        self.high = buckets // 2 if both_ways else 0

    def forward(self, rows, keys):
        low = self.high + 1 - self.relative_attention_bias.num_embeddings
        offset = torch.arange(keys) - torch.arange(rows)[:, None]
        return self.relative_attention_bias(offset.clamp(low, self.high) - low).permute(2, 0, 1)


class MultiHead(nn.Module):
    def __init__(self, width, heads, buckets, both_ways, dropout):
        super().__init__()
        self.heads = heads
        self.attn_dropout, self.resid_dropout = nn.Dropout(dropout), nn.Dropout(dropout)
        self.final_proj = nn.Linear(width, width, bias=False)
        self.positional_bias = Bias(buckets, heads, both_ways)

    def forward(self, q, k, v, added):
        """q [b, rows, width], k and v [b, keys, width], added [b, rows, keys]."""
        q, k, v = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (q, k, v))
        logits = q @ k.transpose(-1, -2) + self.positional_bias(q.shape[2], k.shape[2]) + added[:, None]
        out = (self.attn_dropout(logits.softmax(-1)) @ v).transpose(1, 2).flatten(2)
        return self.resid_dropout(self.final_proj(out))


class Attention(nn.Module):
    """Any of the four, whose class has its name."""

    def __init__(self, width=D, source=E, heads=2, buckets=7, dropout=0.0):
        super().__init__()
        kind = type(self).__name__
        self.num_heads, self.ln = heads, nn.LayerNorm(width)
        if kind in norlund.SELF:
            self.qkv_proj = nn.Linear(width, 3 * width, bias=False)
        else:
            self.q_proj, self.kv_proj = nn.Linear(width, width, bias=False), nn.Linear(source, 2 * width, bias=False)
        self.multi_head_attention = MultiHead(width, heads, buckets, kind != norlund.DECODER, dropout)
        self.chunk_size = M

    def forward(self, x, *given):
        kind, normed, mask = type(self).__name__, self.ln(x), given[-1]
        if kind in norlund.SELF:
            q, k, v = self.qkv_proj(normed).chunk(3, -1)
        else:
            q, (k, v) = self.q_proj(normed), self.kv_proj(given[0]).chunk(2, -1)
        hidden, out = (1.0 - mask) * -10000.0, torch.zeros_like(x)
        if kind == norlund.DECODER:
            future = torch.ones(x.shape[1], x.shape[1]).triu(1) * -10000.0
            out = self.multi_head_attention(q, k, v, hidden[:, None] + future)
        elif kind == norlund.CCA:
            for u in range(x.shape[1] // M):
                rows = slice((u + 1) * M - 1, (u + 2) * M - 1)
                parts = (y[:, u].flatten(1, 2) for y in (k, v))
                made = self.multi_head_attention(q[:, rows], *parts, hidden[:, u].flatten(1)[:, None])
                out[:, rows] = made * mask[:, u].flatten(1).any(-1)[:, None, None]
        else:
            for u, j in [(u, j) for u in range(x.shape[1]) for j in range(x.shape[2])]:
                at = (slice(None), u) if kind == norlund.CROSS else (slice(None), u, j)
                out[:, u, j] = self.multi_head_attention(q[:, u, j], k[at], v[at], hidden[at][:, None])
        return x + out, None


KINDS = {name: type(name, (Attention,), {}) for name in norlund.ATTENTIONS}


@pytest.fixture(autouse=True)
def known(monkeypatch, request):
    monkeypatch.setattr(base, "_warned", set())
    if "whole" in request.node.name:
        return
    for name in norlund.ATTENTIONS:
        monkeypatch.setitem(norlund.KNOWN_SOURCES, f"{name}.forward", base.digest(Attention.forward.__code__))
    for name, kind in (("MultiHeadAttention", MultiHead), ("RelativePositionBias", Bias)):
        monkeypatch.setitem(norlund.KNOWN_SOURCES, f"{name}.forward", base.digest(kind.forward.__code__))


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
