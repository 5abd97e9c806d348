"""`swap` and `Retro.from_peer` against labml's RETRO, as PyPI's retro-transformer 1.0.3 has it.

pip install --no-deps --target SOMEWHERE retro-transformer==1.0.3 && PYTHONPATH=SOMEWHERE pytest tests/integrations
"""

import copy
import random

import pytest
import torch
from torch import nn

from retro_kernels.integrations import base, swap
from retro_kernels.models import Neighbours, Retro

peer = pytest.importorskip(
    "retro_transformer.model",
    reason="retro-transformer is not installed (pip install --no-deps retro-transformer==1.0.3)",
)


def build(seed=0, dtype=torch.float32, **changes):
    torch.manual_seed(seed)
    own = {"n_layers": changes.pop("encoder_layers", 2), "ca_layers": changes.pop("encoder_ca", {1}), "n_heads": 3}
    sizes = {"chunk_len": 4, "d_model": 24, "d_k": 8, "d_ff": 32}
    sizes |= {name: changes.pop(name) for name in list(changes) if name in sizes}
    decoder = {"n_layers": 3, "ca_layers": {0, 2}, "n_heads": 2, **changes}
    encoder = peer.NearestNeighborEncoder(**sizes, **own)
    return peer.RetroModel(n_vocab=50, encoder=encoder, **sizes, **decoder).to(dtype)


def text(n, m=4, k=2, r=8, b=2):
    return torch.randint(50, (b, n)), torch.randint(50, (b, n // m, k, r))


def close(got, want, tolerance=2e-5):
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance * max(want.abs().max().item(), 1e-3))


def gradients(model, tokens, retrieved, gradient):
    model.zero_grad()
    out = model(tokens, retrieved)
    out.backward(gradient)
    return out, {name: x.grad for name, x in model.named_parameters() if x.requires_grad}


@pytest.mark.parametrize("block", range(10))
def test_swapped_and_converted_models_agree(block):
    """100 configurations: logits and every gradient of the swapped model; the converted model's logits; and undo gives
    the bits back."""
    for seed in range(10 * block, 10 * block + 10):
        draw = random.Random(seed)
        layers, encoder_layers, m = draw.randint(1, 4), draw.randint(1, 3), draw.choice([1, 2, 4, 7])
        model = build(
            seed,
            n_layers=layers,
            encoder_layers=encoder_layers,
            ca_layers=set(draw.sample(range(layers), draw.randint(1, layers))),
            encoder_ca=set(draw.sample(range(encoder_layers), draw.randint(0, encoder_layers))),
            chunk_len=m,
            d_k=draw.choice([4, 8, 10]),
            d_model=draw.choice([16, 23]),
            n_heads=draw.randint(1, 3),
        )
        tokens, retrieved = text(draw.randint(m, 4 * m + 1), m, draw.randint(1, 3), draw.choice([m, 2 * m, 5]))
        swapped = copy.deepcopy(model)
        report = swap(swapped)
        gradient = torch.randn(*tokens.shape, 50)
        want, wanted = gradients(model, tokens, retrieved, gradient)
        got, found = gradients(swapped, tokens, retrieved, gradient)
        close(got, want)
        largest = max(x.abs().max().item() for x in wanted.values() if x is not None)
        for name, x in wanted.items():
            assert (x is None) == (found[name] is None), name
            if x is not None:
                torch.testing.assert_close(found[name], x, rtol=2e-4, atol=2e-6 * largest, msg=name)
        close(Retro.from_peer(swapped, retrieved_length=retrieved.shape[-1])(tokens, retrieved), want)
        report.undo()
        assert torch.equal(swapped(tokens, retrieved), model(tokens, retrieved))


def test_short_sequences_and_chunks_that_do_not_fit(monkeypatch):
    monkeypatch.setattr(base, "_warned", set())
    model = build()
    swapped = copy.deepcopy(model)
    swap(swapped)
    assert torch.equal(swapped.cca[0](torch.ones(2, 3, 24), torch.ones(2, 0, 2, 8, 24)), torch.ones(2, 3, 24))
    h, e = torch.randn(2, 3, 24), torch.randn(2, 1, 2, 8, 24)
    with pytest.warns(UserWarning, match="1 chunks of 4 for 3 tokens"):
        assert torch.equal(swapped.cca[0](h, e), model.cca[0](h, e))


def test_generation_gives_the_tokens_of_computing_everything_anew():
    model = build()
    report = swap(model)
    lookup = lambda chunks: (chunks.sum(-1)[:, None, None] + torch.arange(8) + 5 * torch.arange(2)[:, None]) % 50  # noqa: E731

    made = report.generate([[1, 2, 3], [7] * 9], retriever=lambda chunks: Neighbours(lookup(chunks)), max_new_tokens=14)
    for i, prompt in enumerate([[1, 2, 3], [7] * 9]):
        sequence = list(prompt)
        for _ in range(14):
            chunks = torch.tensor(sequence[: len(sequence) // 4 * 4]).view(1, -1, 4)
            found = lookup(chunks[0])[None] if chunks.shape[1] else torch.zeros(1, 0, 2, 8, dtype=torch.int64)
            whole = model if chunks.shape[1] else Retro.from_peer(model)  # which refuses sequences without a chunk
            sequence.append(int(whole(torch.tensor([sequence]), found)[0, -1].argmax()))
        assert made.new_tokens(i) == sequence[len(prompt) :]


def test_a_state_dict_says_what_it_lacks(tmp_path):
    model = build()
    torch.save(model.state_dict(), tmp_path / "model.pt")
    tokens, retrieved = text(14)
    with pytest.raises(
        ValueError, match=r"cross_attention_layers: got none, .* expected the model's, its ca_layers counted"
    ):
        Retro.from_peer(tmp_path / "model.pt", chunk_size=4)
    told = {"chunk_size": 4, "cross_attention_layers": (1, 3), "encoder_cross_attention_layers": (2,)}
    close(Retro.from_peer(tmp_path / "model.pt", **told)(tokens, retrieved), model(tokens, retrieved))
    with pytest.raises(ValueError, match=r"cca\.1\..*left over"):
        Retro.from_peer(tmp_path / "model.pt", **{**told, "cross_attention_layers": (1,)})
    with torch.no_grad():
        for part in (*model.attn, *model.encoder.attn):
            part.rotary_pe.theta.mul_(0.5)
    close(Retro.from_peer(model)(tokens, retrieved), model(tokens, retrieved))
    with torch.no_grad():
        model.attn[1].rotary_pe.theta.mul_(0.5)
    with pytest.raises(ValueError, match=r"frequencies .* that differ between layers"):
        Retro.from_peer(model)


def test_what_the_weights_do_not_tell_is_refused_by_name():
    for change, message in (
        (lambda x: setattr(x.attn[1].norm, "eps", 1.0), r"eps is 1\.0 in attn\.1\.norm"),
        (lambda x: setattr(x.cca[1], "n_heads", 1), r"n_heads is 1 in cca\.1 and 2 in"),
        (lambda x: setattr(x.encoder.attn[0], "scale", 1.0), r"scale is 1\.0 in encoder\.attn\.0"),
        (lambda x: setattr(x.cca[0], "chunk_len", 2), "chunk_len is 2 in cca"),
        (lambda x: setattr(x.attn[1], "is_causal", False), r"of attn\.1, is_causal is False"),
        (lambda x: setattr(x.ffw[2], "act", nn.GELU()), r"of ffw\.2, act is a GELU, expected nn\.ReLU"),
        (lambda x: setattr(x.read, "forward", lambda y: y), "something else has replaced forward on read"),
    ):
        model = build()
        change(model)
        with pytest.raises(ValueError, match=f"^source: .*{message}"):
            Retro.from_peer(model)


class Sharper(nn.Softmax):
    def forward(self, x):
        return super().forward(2 * x)


def test_another_softmax_is_called(monkeypatch):
    """Put there before the swap, or after it."""
    monkeypatch.setattr(base, "_warned", set())
    model, given = build(), text(14)
    swapped = copy.deepcopy(model)
    model.cca[0].softmax = swapped.cca[0].softmax = Sharper(-1)
    assert "cca.0" in swap(swapped).replaced
    model.attn[1].softmax = swapped.attn[1].softmax = Sharper(-1)
    with pytest.warns(UserWarning, match="runs its own forward, because a part of it has hooks or was changed"):
        close(swapped(*given), model(*given))
    model.attn[2].softmax = nn.Softmax(dim=1)
    assert "softmax is Softmax(dim=1), expected nn.Softmax" in swap(model).skipped["attn.2"]


def test_what_is_not_the_known_version_is_left_alone(monkeypatch):
    model = build()
    model.attn[0].gate = nn.Linear(2, 2)
    monkeypatch.setattr(peer.CrossAttention, "forward", lambda self, e, h: e)
    report = swap(model, strict=False)
    assert set(report.skipped) == {"attn.0", "encoder.ca.0"}
    assert "its parts are" in report.skipped["attn.0"]
    assert "CrossAttention.forward is not that of retro-transformer 1.0.3" in report.skipped["encoder.ca.0"]
    with pytest.raises(ValueError, match="not that of retro-transformer"):
        Retro.from_peer(build())
