"""Eager code on fake and meta tensors, as memory estimators and tracers run it: every operation, layer and model gives
fake results of the real shapes, forward and backward, and no check asks for numbers that are not there."""

from __future__ import annotations

import pytest
import torch
from small_calls import HK, OPERATIONS, B, D, E, H, K, L, M, N, R, draw, null, operation, tables
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import retro_kernels as rk

BACKENDS = (None, "reference", "cpu")


def starts(length):
    marked = torch.zeros(B, length, dtype=torch.bool)
    marked[:, 5] = True
    return marked


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", OPERATIONS)
def test_operations(name, backend):
    call, tensors, options = operation(name)
    expected = call(**tensors, **options, backend=backend)
    with FakeTensorMode():
        call, tensors, options = operation(name)
        tensors = {name: x.requires_grad_() for name, x in tensors.items()}
        out = call(**tensors, **options, backend=backend)
        out.sum().backward()
    assert isinstance(out, FakeTensor)
    assert (out.shape, out.dtype) == (expected.shape, expected.dtype)
    assert all(x.grad.shape == x.shape for x in tensors.values())


@pytest.mark.parametrize("backend", BACKENDS)
def test_documents(backend):
    with FakeTensorMode():
        q, kv, encoded, w = draw(B, N, H, D), draw(B, L, K, R, HK, D), draw(B, L, K, R, E), draw(HK, D, E)
        packed = starts(N)
        options = {"chunk_size": M, "sequence_starts": packed, "backend": backend}
        outs = [rk.chunked_cross_attention(q, kv, kv, **options)]
        for strategy in ("auto", "materialise", "absorb"):
            outs.append(rk.projected_chunked_cross_attention(q, encoded, w, w, strategy=strategy, **options))
        outs.append(
            rk.projected_chunked_cross_attention(q, encoded, w, w, strategy="materialise", recompute=True, **options)
        )
    assert all(out.shape == (B, N, H, D) for out in outs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("validate", [False, True])
def test_decoding(backend, validate):
    with FakeTensorMode():
        options = (
            tables(M, R)
            | null()
            | {
                "neighbour_mask": torch.rand(B, K, R) > 0.3,
                "position": torch.zeros(B, dtype=torch.int64),
                "chunk": torch.zeros(B, dtype=torch.int64),
                "valid": torch.ones(B, dtype=torch.bool),
                "chunk_size": M,
                "backend": backend,
                "validate": validate,
            }
        )
        q, kv, encoded, w = draw(B, 1, H, D), draw(B, K, R, HK, D), draw(B, K, R, E), draw(HK, D, E)
        outs = (
            rk.chunked_cross_attention_decode(q, kv, kv, **options),
            rk.projected_chunked_cross_attention_decode(q, encoded, w, w, **options),
        )
    assert all(out.shape == (B, 1, H, D) for out in outs)


@pytest.mark.filterwarnings("ignore:retro_kernels")  # that no fused kernel exists for the device type
def test_meta_tensors():
    """A model laid out on the meta device: nothing is computed, shapes are."""
    with torch.device("meta"):
        q, kv, encoded, w = draw(B, N, H, D), draw(B, L, K, R, HK, D), draw(B, L, K, R, E), draw(HK, D, E)
        position = torch.zeros(B, dtype=torch.int64)
        outs = [
            rk.chunked_cross_attention(q, kv, kv, chunk_size=M, sequence_starts=torch.zeros(B, N, dtype=torch.bool)),
            rk.projected_chunked_cross_attention(q, encoded, w, w, chunk_size=M),
            rk.chunked_cross_attention_decode(
                q[:, :1], kv[:, 0], kv[:, 0], chunk_size=M, position=position, validate=True
            ),
        ]
    assert [out.shape for out in outs] == [(B, N, H, D), (B, N, H, D), (B, 1, H, D)]


@pytest.mark.parametrize("positions", ["none", "relative", "rotary", "bias"])
def test_layers_and_their_cache(positions):
    given = {"relative": {"retrieved_length": R}, "bias": {"retrieved_length": R}}.get(positions, {})
    with FakeTensorMode():
        layer = rk.nn.ChunkedCrossAttention(
            16, context_dim=12, chunk_size=M, num_heads=2, positions=positions, null_slot=True, **given
        )
        hidden, encoded = draw(B, N, 16), draw(B, L, K, R, 12)
        for packed in (None, starts(N)):
            out = layer(hidden, encoded, sequence_starts=packed)
            out.sum().backward()
            assert out.shape == hidden.shape
        encoder = rk.nn.NeighbourEncoder(12, context_dim=16, num_heads=2, chunk_size=M, retrieved_length=R)
        assert encoder(encoded, hidden).shape == encoded.shape


def test_buckets_whose_number_is_not_told():
    options = {"chunk_size": M, "num_heads": 2, "positions": "bias", "retrieved_length": R}
    with FakeTensorMode():
        buckets = torch.zeros(M, R, dtype=torch.int64)
        assert rk.nn.ChunkedCrossAttention(16, bias_buckets=buckets, num_buckets=3, **options).num_heads == 2
        with pytest.raises(ValueError, match="num_buckets: got None"):
            rk.nn.ChunkedCrossAttention(16, bias_buckets=buckets, **options)


def test_the_model_and_its_loss():
    with FakeTensorMode():
        model = rk.models.Retro(rk.models.RetroConfig.preset("tiny"))
        size = model.config.chunk_size
        tokens, neighbours = (torch.randint(model.config.vocab_size, s) for s in ((B, 22), (B, 22 // size, 2, 8)))
        assert model(tokens, neighbours).shape == (B, 22, model.config.vocab_size)
        loss = model.loss(tokens, tokens, neighbours)
        loss.backward()
    assert isinstance(loss, FakeTensor)
