"""The model against Algorithm 1 written out in loops, its causality by gradients, and the ways to run it."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from models_common import batch, tiny

from retro_kernels.models import Retro, RetroConfig
from retro_kernels.models import loss as loss_module
from retro_kernels.nn import RetroDecoderBlock


# Algorithm 1 in loops over sequences, heads, queries and keys, from the model's weights alone.
def rms(x, norm):
    return x / (x.pow(2).mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight


def sinusoid(distance: int, width: int) -> torch.Tensor:
    angles = [distance * 10000.0 ** (-2 * j / width) for j in range(width // 2)]
    return torch.tensor([math.sin(a) for a in angles] + [math.cos(a) for a in angles], dtype=torch.float64)


def attention(part, queries, sources, visible, distance):
    """queries [i, width], sources [j, width'] -> [i, width]; `visible(i, j)`, `distance(i, j)`."""
    h = part.num_heads
    split = lambda y: y.unflatten(-1, (h, -1))  # noqa: E731
    q, key, value = split(part.w_query(queries)), split(part.w_key(sources)), split(part.w_value(sources))
    relative, d = part.relative, q.shape[-1]
    rows = []
    for i in range(len(queries)):
        shown = [j for j in range(len(sources)) if visible(i, j)]
        if not shown:
            rows.append(torch.zeros_like(part.w_out(q[i].flatten())))
            continue
        heads = []
        for head in range(h):
            logits = []
            for j in shown:
                position = split(relative.projection(sinusoid(distance(i, j), relative.model_dim)))[head]
                content = (q[i, head] + relative.content_bias[head]) @ key[j, head]
                logits.append((content + (q[i, head] + relative.relative_bias[head]) @ position) / math.sqrt(d))
            weights = torch.stack(logits).softmax(0)
            heads.append(sum(w * value[j, head] for w, j in zip(weights, shown)))
        rows.append(part.w_out(torch.cat(heads)))
    return torch.stack(rows)


def feed_forward(part, x):
    return part.w_out(F.gelu(part.w_in(x)))


def encode(model, neighbour, mask, chunk):
    """One neighbour's tokens [r], which of them there are, and the activations of its chunk [m, d] -> [r, e]."""
    x = (model.embedding if model.config.shared_embeddings else model.encoder_embedding).weight[neighbour]
    for number, layer in enumerate(model.encoder.layers, start=1):
        normed = rms(x, layer.self_norm)
        x = x + attention(layer.self_attention, normed, normed, lambda i, j: mask[j], lambda i, j: i - j)
        if number in model.config.encoder_cross_attention_layers:
            normed = rms(x, layer.cross_norm)
            x = x + attention(layer.cross_attention, normed, chunk, lambda i, j: True, lambda i, j: i - j)
        x = x + feed_forward(layer.feed_forward, rms(x, layer.feed_forward_norm))
    return rms(x, model.encoder.final_norm)


def algorithm_1(model, tokens, neighbours, mask):
    """tokens [n], neighbours and mask [l, k, r] -> logits [n, vocab_size]."""
    config = model.config
    n, m, (l, k, r) = len(tokens), config.chunk_size, neighbours.shape
    h = model.embedding.weight[tokens]
    encoded = None
    for p, block in enumerate(model.blocks, start=1):
        normed = rms(h, block.self_norm)
        h = h + attention(block.self_attention, normed, normed, lambda i, j: j <= i, lambda i, j: i - j)
        if p == min(config.cross_attention_layers):
            encoded = [
                [encode(model, neighbours[u, j], mask[u, j], h[u * m : (u + 1) * m]) for j in range(k)]
                for u in range(l)
            ]
        if p in config.cross_attention_layers:
            normed, added = rms(h, block.cross_norm), torch.zeros_like(h)
            for u in range(l):
                first, last = (u + 1) * m - 1, min((u + 2) * m - 1, n)
                source, there = torch.cat(encoded[u]), mask[u].flatten()
                added[first:last] = attention(
                    block.cross_attention,
                    normed[first:last],
                    source,
                    lambda i, j, there=there: there[j],
                    lambda i, j: i - j % r + m - 1,
                )
            h = h + added
        h = h + feed_forward(block.feed_forward, rms(h, block.feed_forward_norm))
    return rms(h, model.final_norm) @ model.embedding.weight.T


@pytest.mark.parametrize("shared", [False, True])
def test_the_model_is_algorithm_1(shared):
    model = tiny(
        dtype=torch.float64,
        backend="reference",
        chunk_size=3,
        model_dim=12,
        encoder_dim=12 if shared else 6,
        vocab_size=16,
        encoder_head_dim=4,
        shared_embeddings=shared,
    )
    assert (model.encoder_embedding is None) == shared
    tokens, neighbours, mask = batch(model, b=2, n=11, k=2, r=5)
    mask[1, 2] = False  # nothing retrieved
    with torch.no_grad():
        got = model(tokens, neighbours, mask)
        for row in range(2):
            expected = algorithm_1(model, tokens[row], neighbours[row], mask[row])
            torch.testing.assert_close(got[row], expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("preset", ["tiny", "tiny-rotary"])
def test_without_neighbours_it_is_the_decoder_alone_to_the_bit(preset):
    model = tiny(preset)
    decoder = Retro(RetroConfig.preset(preset, cross_attention_layers=(), cross_attention_gate=False)).eval()
    names = decoder.state_dict()
    assert not any("cross" in name or "encoder" in name for name in names)
    decoder.load_state_dict({name: value for name, value in model.state_dict().items() if name in names})
    tokens, neighbours, mask = batch(model)
    expected = decoder(tokens)
    assert torch.equal(model(tokens), expected)
    assert torch.equal(model(tokens, neighbours, torch.zeros_like(mask)), expected)
    assert torch.equal(model(tokens[:, :3], neighbours), model(tokens[:, :3]))  # shorter than a chunk
    assert not torch.allclose(model(tokens, neighbours, mask), expected)
    if preset == "tiny-rotary":  # the gate
        for block in model.blocks:
            if block.gate is not None:
                torch.nn.init.zeros_(block.gate)
        assert torch.equal(model(tokens, neighbours, mask), expected)


@pytest.mark.parametrize("preset", ["tiny", "tiny-rotary"])
def test_what_influences_what_by_gradients(preset):
    """A token's logits depend on the tokens up to it, each of them, in its own sequence; on chunk u's neighbours from
    token (u + 1) m - 1 on; on nothing else."""
    model = tiny(preset, spread=0.3)
    m, n = model.config.chunk_size, 14
    tokens, neighbours, _ = batch(model, b=2, n=n)
    seen = {}
    for name in ("embedding", "encoder_embedding"):
        getattr(model, name).register_forward_hook(
            lambda module, arguments, result, name=name: seen.__setitem__(name, result.retain_grad() or result)
        )
    logits = model(tokens, neighbours)
    for i in range(n):
        own, retrieved = torch.autograd.grad(
            logits[0, i].square().sum(),
            (seen["embedding"], seen["encoder_embedding"]),
            retain_graph=True,
            materialize_grads=True,
        )
        assert not own[1].any()
        assert not retrieved[1].any()
        assert own[0].abs().sum(-1).gt(0).tolist() == [j <= i for j in range(n)]
        attended = max((i + 1) // m, 0)
        reached = retrieved[0].abs().sum((1, 2, 3)).gt(0).tolist()
        # Neighbours of earlier chunks reach a token through the decoder's self-attention in the layers after the first.
        assert reached == [u < attended for u in range(n // m)]


@pytest.mark.parametrize("shared", [False, True])
def test_gradients_reach_every_parameter_and_pass_through_the_encoders_conditioning(shared):
    model = tiny(tied_embeddings=False, shared_embeddings=shared, **({"encoder_dim": 32} if shared else {}))
    tokens, neighbours, mask = batch(model)
    conditioning = []
    model.encoder.register_forward_pre_hook(lambda module, arguments: conditioning.append(arguments[1]))
    model.loss(tokens, tokens.roll(-1, 1), neighbours, mask).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []
    first = model.blocks[model.config.cross_attention_layers[0] - 1]
    first.zero_grad()
    through_encoder = torch.autograd.grad(
        model.encode(neighbours, conditioning[0], mask).square().sum(), conditioning[0]
    )[0]
    m = model.config.chunk_size
    complete = tokens.shape[1] // m * m
    assert through_encoder[:, :complete].abs().sum(-1).gt(0).all()
    assert not through_encoder[:, complete:].any()


def test_documents_packed_into_a_row_equal_each_alone():
    model = tiny()
    m = model.config.chunk_size
    lengths = [7, 13, 3]
    tokens = torch.randint(64, (1, sum(lengths)))
    starts = torch.zeros_like(tokens, dtype=torch.bool)
    documents, at, chunks = [], 0, 0
    for length in lengths:
        starts[0, at] = True
        documents.append((at, at + length, chunks, chunks + length // m))
        at, chunks = at + length, chunks + length // m
    neighbours = torch.randint(64, (1, chunks, 2, 8))
    packed = model(tokens, neighbours, sequence_starts=starts)
    for first, last, low, high in documents:
        alone = model(tokens[:, first:last], neighbours[:, low:high])
        torch.testing.assert_close(packed[:, first:last], alone, rtol=1e-4, atol=1e-5)


def test_compiled_without_a_graph_break_it_is_the_same():
    model = tiny()
    tokens, neighbours, mask = batch(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for run in (lambda f: f(tokens, neighbours, mask), lambda f: f(tokens)):
        results = []
        for f in (model, compiled):
            model.zero_grad()
            logits = run(f)
            logits.logsumexp(-1).sum().backward()
            results.append((logits.detach(), model.embedding.weight.grad.clone()))
        for got, expected in zip(results[1], results[0]):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_activation_checkpointing_changes_no_gradient():
    model = tiny(dropout=0.2, hidden_dropout=0.2).train()
    tokens, neighbours, mask = batch(model)
    gradients = []
    for checkpointed in (False, True):
        model.activation_checkpointing = checkpointed
        model.zero_grad()
        torch.manual_seed(3)
        model.loss(tokens, tokens, neighbours, mask).backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(x, y) for x, y in zip(*gradients))


@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_errs_no_more_than_pytorchs_own_attention_in_bfloat16(autocast):
    exact = tiny(dtype=torch.float64, backend="reference")
    tokens, neighbours, mask = batch(exact)
    expected = exact(tokens, neighbours, mask)
    errors = []
    for backend in (None, "reference"):
        model = Retro(exact.config, backend=backend).eval()
        model.load_state_dict(exact.state_dict())
        if not autocast:
            model.bfloat16()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            logits = model(tokens, neighbours, mask)
        errors.append(((logits.double() - expected).abs().max() / expected.abs().max()).item())
    assert errors[0] <= 2 * errors[1] + 2**-9
    assert errors[1] < 0.1  # and both are of the same model


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_the_sliced_loss_is_cross_entropy(monkeypatch, reduction):
    monkeypatch.setattr(loss_module, "LOGITS_AT_A_TIME", 3 * 17)
    x, weight = torch.randn(2, 5, 8, requires_grad=True), torch.randn(17, 8, requires_grad=True)
    targets = torch.randint(17, (2, 5))
    targets[0, 1] = -100
    got = loss_module.linear_cross_entropy(x, weight, targets, reduction=reduction)
    expected = F.cross_entropy((x @ weight.T).flatten(0, 1), targets.flatten(), reduction=reduction)
    torch.testing.assert_close(got, expected.view(got.shape))
    gradients = [torch.autograd.grad(y.square().sum(), (x, weight)) for y in (got, expected)]
    torch.testing.assert_close(gradients[0], gradients[1])


def test_fresh_weights_have_the_deviation_asked_for():
    torch.manual_seed(0)
    model = Retro(RetroConfig.preset("tiny", model_dim=64, num_layers=4, initializer_range=0.1))
    assert abs(model.embedding.weight.std().item() - 0.1) < 0.005
    attention = model.blocks[-1].self_attention
    assert abs(attention.w_query.weight.std().item() - 0.1) < 0.005
    assert abs(attention.w_out.weight.std().item() - 0.1 / 8**0.5) < 0.002


def test_wrong_input_is_named():
    model = tiny()
    tokens, neighbours, mask = batch(model)
    for arguments, message in (
        ((tokens.float(),), "tokens: got dtype torch.float32"),
        ((tokens[0],), "tokens: got shape"),
        ((tokens + 64,), "tokens: got token .* expected 0 to vocab_size - 1 = 63"),
        ((tokens, neighbours - 64), "neighbours: got token -"),
        ((tokens, neighbours[:, :4]), "at least l = 5 chunks of 4 in 22 tokens"),
        ((tokens, neighbours[:1]), "b = 2"),
        ((tokens, neighbours.repeat(1, 1, 1, 2)), "r = 16, expected at most retrieved_length = 8"),
        ((tokens, neighbours, mask[:, :, :1]), "neighbour_mask: got shape"),
        ((tokens, neighbours, mask.long()), "neighbour_mask: got dtype"),
        ((tokens, None, mask), "neighbour_mask: got one without neighbours"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            model(*arguments)
    with pytest.raises(ValueError, match="cross_attention_layers is empty"):
        tiny(cross_attention_layers=())(tokens, neighbours)
    with pytest.raises(ValueError, match="n = 65, expected at most max_length = 64"):
        tiny("tiny-rotary")(torch.zeros(1, 65, dtype=torch.int64))
    with pytest.raises(ValueError, match="gate: got True"):
        RetroDecoderBlock(8, num_heads=1, gate=True)
    with pytest.raises(ValueError, match="reduction"):
        model.loss(tokens, tokens, reduction="max")
