"""The encoder against formulas written from scratch, one token and one head at a time: the paper's form and each peer's
(peers.md 1); and what holds for every form: independence of neighbours, masks, partial chunks, dropout, bad input."""

import copy
import math
import pickle

import pytest
import torch
from torch import nn

from retro_kernels import backends
from retro_kernels.nn import NeighbourEncoder
from retro_kernels.nn.positions import t5_buckets

FUSED = ["cpu"] if backends()["cpu"].available else []
BACKENDS = ["reference", *FUSED]
B, L, K, R, M, DIM, CONTEXT, H, D, N = 2, 3, 2, 5, 4, 12, 10, 2, 8, 10
RECIPES = ["paper", "retro_pytorch", "megatron", "norlund", "labml"]


def build(recipe=NeighbourEncoder, **options):
    """A small fp64 encoder on the reference, with nothing left at an initial zero or one."""
    settings = {"num_heads": H, "head_dim": D, "chunk_size": M, "retrieved_length": R, "backend": "reference"}
    if recipe != NeighbourEncoder.megatron:  # which is as wide as its decoder
        settings["context_dim"] = CONTEXT
    encoder = recipe(DIM, **{**settings, **options}).double()
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.normal_(std=0.5)
    return encoder


def data(n=N, chunks=L, k=K, r=R, dtype=torch.float64, context=CONTEXT):
    embeddings, hidden = torch.randn(B, chunks, k, r, DIM, dtype=dtype), torch.randn(B, n, context, dtype=dtype)
    return embeddings, hidden, torch.rand(B, chunks, k, r) > 0.3


def recipe(name, dtype=torch.float32, **options):
    """An encoder of each recipe with inputs that it takes."""
    encoder = build(getattr(NeighbourEncoder, name), **options).to(dtype)
    return encoder, data(dtype=dtype, context=DIM if name == "megatron" else CONTEXT)


# A form of the encoder, written per token


def rms(norm, x):
    return norm.weight * x / (x @ x / len(x) + norm.eps).sqrt()


def layer_norm(norm, x):
    centred = x - x.mean()
    return norm.weight * centred / (centred @ centred / len(x) + norm.eps).sqrt() + norm.bias


def gelu(x):
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def plain(feed_forward, x, activation=gelu):
    return feed_forward.w_out(activation(feed_forward.w_in(x)))


def attend(attention, tokens, slots, visible, logit):
    """Each of `tokens` attends to the visible of `slots`; `logit(attention, head, t, s, q, key)`."""
    out = []
    for t, x in enumerate(tokens):
        heads = []
        for head in range(H):
            part = slice(head * D, (head + 1) * D)
            q = attention.w_query(x)[part]
            seen = [s for s in range(len(slots)) if visible[s]]
            logits = [logit(attention, head, t, s, q, attention.w_key(slots[s])[part]) for s in seen]
            values = [attention.w_value(slots[s])[part] for s in seen]
            heads.append(
                torch.stack(logits).softmax(0) @ torch.stack(values) if seen else torch.zeros(D, dtype=torch.float64)
            )
        out.append(attention.w_out(torch.cat(heads)))
    return out


def by_token(encoder, embeddings, chunk_of, mask, norm, logit, cross_logit, feed_forward=plain, onto_normed=False):
    """`chunk_of(b, u)` -> the activations of a chunk and which of them are attended to."""
    out = torch.zeros_like(embeddings)
    for b, u, j in ((b, u, j) for b in range(B) for u in range(embeddings.shape[1]) for j in range(K)):
        x = list(embeddings[b, u, j])
        activations, there = chunk_of(b, u)
        for layer in encoder.layers:
            normed = [norm(layer.self_norm, t) for t in x]
            added = attend(layer.self_attention, normed, normed, mask[b, u, j], logit)
            x = [old + new for old, new in zip(x, added)]
            if layer.cross_attention is not None:
                normed = [norm(layer.cross_norm, t) for t in x]
                added = attend(layer.cross_attention, normed, activations, there, cross_logit)
                x = [old + new for old, new in zip(normed if onto_normed else x, added)]
            x = [t + feed_forward(layer.feed_forward, norm(layer.feed_forward_norm, t)) for t in x]
        if encoder.final_norm is not None:
            x = [norm(encoder.final_norm, t) for t in x]
        out[b, u, j] = torch.stack(x)
    return out


def front(hidden):
    """Chunk u of the front-aligned sequence; what the last one lacks is not attended to."""

    def chunk_of(b, u):
        tokens = [hidden[b, i] for i in range(u * M, min(u * M + M, hidden.shape[1]))]
        return tokens, [True] * len(tokens)

    return chunk_of


def scaled(attention, head, t, s, q, key):
    return D**-0.5 * (q @ key)


def relative(attention, head, t, s, q, key):
    """Content and position with u and v: the distance is t - s, in self-attention and in equation 7."""
    table = attention.relative
    angles = [(t - s) * 10000.0 ** (-2 * x / DIM) for x in range(DIM // 2)]
    sinusoid = torch.tensor([math.sin(x) for x in angles] + [math.cos(x) for x in angles], dtype=torch.float64)
    position = table.projection.weight.view(H, D, DIM)[head] @ sinusoid
    return D**-0.5 * ((q + table.content_bias[head]) @ key + (q + table.relative_bias[head]) @ position)


def rotary(width):
    def turn(x, position):
        x = x.clone()
        for j in range(width // 2):
            angle = position * 10000.0 ** (-2 * j / width)
            a, b = x[j].clone(), x[j + width // 2].clone()
            x[j], x[j + width // 2] = (
                a * math.cos(angle) - b * math.sin(angle),
                b * math.cos(angle) + a * math.sin(angle),
            )
        return x

    return lambda attention, head, t, s, q, key: D**-0.5 * (turn(q, t) @ turn(key, s))


def clamped(attention, head, t, s, q, key):
    """Norlund: no scale, one bias for each offset s - t, clamped to as many as there are."""
    biases = attention.attention_bias[head]
    high = len(biases) // 2
    low = high - len(biases) + 1
    return q @ key + biases[min(max(s - t, low), high) - low]


def test_the_paper():
    """Relative positions with u and v in both attentions, P_enc = 1, a mask, and a partial last chunk."""
    encoder = build(NeighbourEncoder.paper)
    embeddings, hidden, mask = data()
    mask[0, 1, 0] = False  # a neighbour of padding only: its self-attention gives 0
    want = by_token(encoder, embeddings, front(hidden), mask, rms, relative, relative)
    torch.testing.assert_close(encoder(embeddings, hidden, mask), want)


def test_the_papers_u_and_v_start_at_zero_and_can_be_left_out():
    encoder = NeighbourEncoder.paper(DIM, num_heads=H, head_dim=D)
    tables = [m for m in encoder.modules() if type(m).__name__ == "RelativePositions"]
    assert len(tables) == 3
    assert not any(x.any() for table in tables for x in (table.content_bias, table.relative_bias))
    without = NeighbourEncoder.paper(DIM, num_heads=H, head_dim=D, relative_biases=False)
    assert not any("content_bias" in name for name, _ in without.named_parameters())


def test_retro_pytorch():
    encoder = build(NeighbourEncoder.retro_pytorch, rotary_dim=4, num_layers=1)
    embeddings, hidden, mask = data(chunks=2)
    want = by_token(encoder, embeddings, front(hidden), mask, rms, rotary(4), rotary(4))
    got = encoder(embeddings, hidden, mask)
    assert got.shape == (B, 2, K, R, CONTEXT)  # projected to the decoder's width
    torch.testing.assert_close(got, encoder.w_out(want), atol=1e-6, rtol=1e-6)  # frequencies of an fp32 table


@pytest.mark.parametrize("n", [10, 12])
def test_megatron_attends_to_the_zeros_of_its_first_chunk(n):
    """End-aligned: the incomplete chunk comes first and is filled up with zeros, which are attended to."""
    encoder = build(NeighbourEncoder.megatron).eval()
    embeddings, hidden, _ = data(n=n, context=DIM)

    def chunk_of(b, u):
        first = n % M or M
        given = hidden[b, : n % M or M] if u == 0 else hidden[b, first + (u - 1) * M : first + u * M]
        return [*given, *torch.zeros(M - len(given), DIM, dtype=torch.float64)], [True] * M

    everything = torch.ones(B, L, K, R, dtype=torch.bool)
    want = by_token(encoder, embeddings, chunk_of, everything, layer_norm, scaled, scaled, onto_normed=True)
    torch.testing.assert_close(encoder(embeddings, hidden), want)


def test_norlund():
    def gated(feed_forward, x):
        gate = feed_forward.w_gate(x)
        smooth = 0.5 * gate * (1 + torch.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)))
        return feed_forward.w_out(smooth * feed_forward.w_in(x))

    encoder = build(NeighbourEncoder.norlund, num_buckets=6, cross_num_buckets=5)
    assert [layer.cross_attention is None for layer in encoder.layers] == [True, False]
    embeddings, hidden, mask = data()
    want = by_token(encoder, embeddings, front(hidden), mask, rms, clamped, clamped, gated)
    torch.testing.assert_close(encoder(embeddings, hidden, mask), want)
    assert t5_buckets(2, 5, 4).tolist() == [[1, 2, 3, 3, 3], [0, 1, 2, 3, 3]]  # offsets -1 ... 2


def test_labml():
    encoder = build(NeighbourEncoder.labml, cross_attention_layers=(2,))
    embeddings, hidden, _ = data(chunks=2)

    def chunk_of(b, u):
        return [layer_norm(encoder.context_norm, x) for x in hidden[b, u * M : u * M + M]], [True] * M

    everything = torch.ones(B, 2, K, R, dtype=torch.bool)
    want = by_token(
        encoder, embeddings, chunk_of, everything, layer_norm, rotary(D), scaled, lambda f, x: plain(f, x, torch.relu)
    )
    torch.testing.assert_close(encoder(embeddings, hidden), want, atol=1e-6, rtol=1e-6)


def test_dense_biases_serve_shorter_neighbours():
    encoder = build(positions="bias", cross_positions="none")

    def logit(attention, head, t, s, q, key):
        return D**-0.5 * (q @ key) + attention.attention_bias[head, t, s]

    embeddings, hidden, mask = data(r=R - 2)
    want = by_token(encoder, embeddings, front(hidden), mask, rms, logit, scaled)
    torch.testing.assert_close(encoder(embeddings, hidden, mask), want)
    with pytest.raises(ValueError, match="retrieved_length"):
        encoder(*data(r=R + 1))


def test_post_norm_and_a_norm_of_ones_own():
    """norm(residual_scale * x + f(x)), checked through one layer whose attention adds nothing."""
    made = []

    def own_norm(width):
        made.append(nn.LayerNorm(width))
        return made[-1]

    encoder = build(
        norm=own_norm,
        norm_position="post",
        residual_scale=1.7,
        num_layers=1,
        cross_attention_layers=(),
        final_norm=False,
    )
    assert len(made) == 2
    nn.init.zeros_(encoder.layers[0].self_attention.w_out.weight)
    embeddings, hidden, _ = data()
    layer = encoder.layers[0]
    x = layer.self_norm(1.7 * embeddings)
    want = layer.feed_forward_norm(1.7 * x + layer.feed_forward(x))
    torch.testing.assert_close(encoder(embeddings, hidden), want)


# What holds for every form


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_neighbours_permute_and_do_not_see_each_other(backend, name):
    encoder, (embeddings, hidden, mask) = recipe(name, backend=backend, num_layers=2)
    encoder.eval()
    embeddings, mask = torch.randn(B, L, 3, R, DIM), torch.rand(B, L, 3, R) > 0.3
    if name == "retro_pytorch":
        embeddings, mask = embeddings[:, :2], mask[:, :2]
    out = encoder(embeddings, hidden, mask)
    order = [2, 0, 1]
    torch.testing.assert_close(encoder(embeddings[:, :, order], hidden, mask[:, :, order]), out[:, :, order])
    torch.testing.assert_close(encoder(embeddings[:, :, 1:2], hidden, mask[:, :, 1:2]), out[:, :, 1:2])


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("name", RECIPES)
def test_fused_backends_agree_with_the_reference(backend, name):
    """Output and every gradient in fp32."""
    encoder, (embeddings, hidden, mask) = recipe(name)
    encoder.eval()
    results = []
    for chosen in ("reference", backend):
        for module in encoder.modules():
            if hasattr(module, "backend"):
                module.backend = chosen
        inputs = [x.clone().requires_grad_() for x in (embeddings, hidden)]
        out = encoder(*inputs, mask)
        results.append((out, torch.autograd.grad(out.square().sum(), [*inputs, *encoder.parameters()])))
    torch.testing.assert_close(results[1][0], results[0][0], atol=1e-4, rtol=1e-4)
    floor = 1e-5 * max(want.abs().max().item() for want in results[0][1])
    for got, want in zip(results[1][1], results[0][1]):
        torch.testing.assert_close(got, want, atol=floor, rtol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_masked_tokens_reach_only_their_own_rows(backend):
    encoder, (embeddings, hidden, mask) = recipe("paper", backend=backend)
    mask[0, 0, 0] = False
    noise = torch.where(mask[..., None], 0.0, torch.randn_like(embeddings))
    results = []
    for x in (embeddings, embeddings + noise):
        x = x.requires_grad_(not x.requires_grad) if x.is_leaf else x.detach().requires_grad_()
        encoder.zero_grad()
        out = encoder(x, hidden, mask)
        out[mask].square().sum().backward()
        results.append((out.detach(), x.grad, [p.grad.clone() for p in encoder.parameters()]))
    torch.testing.assert_close(results[1][0][mask], results[0][0][mask], atol=1e-5, rtol=1e-5)
    assert (results[0][1][~mask] == 0).all()
    for got, want in zip(results[1][2], results[0][2]):
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_a_partial_chunk_lacks_is_not_attended_to(backend):
    """The l-th, incomplete chunk equals that chunk alone; tokens that no chunk has reach nothing, NaN included."""
    encoder, (embeddings, hidden, mask) = recipe("paper", backend=backend)
    out = encoder(embeddings, hidden, mask)
    alone = encoder(embeddings[:, 2:], hidden[:, 2 * M :], mask[:, 2:])
    torch.testing.assert_close(out[:, 2:], alone, atol=1e-5, rtol=1e-5)
    poisoned = hidden.clone()
    poisoned[:, 2 * M :] = float("nan")
    complete = encoder(embeddings[:, :2], poisoned, mask[:, :2])
    torch.testing.assert_close(complete, out[:, :2], atol=1e-5, rtol=1e-5)
    complete.sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in encoder.parameters())


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_stride_gives_overlapping_chunks(backend):
    """Each of them as if it were alone; the activations' gradients add up where they overlap."""
    encoder = build(stride=2, backend=backend).float()
    embeddings, hidden, mask = data(chunks=4, dtype=torch.float32)
    inputs = [hidden.clone().requires_grad_() for _ in range(2)]
    together = encoder(embeddings, inputs[0], mask)
    apart = torch.cat(
        [encoder(embeddings[:, u : u + 1], inputs[1][:, 2 * u : 2 * u + M], mask[:, u : u + 1]) for u in range(4)], 1
    )
    torch.testing.assert_close(together, apart, atol=1e-5, rtol=1e-5)
    gradient = torch.randn_like(together)
    one, two = (torch.autograd.grad(x, y, gradient)[0] for x, y in zip((together, apart), inputs))
    torch.testing.assert_close(one, two, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_documents_equal_separate_calls(backend):
    """Documents of 9, 3 and 6 tokens in one row (2, 0 and 1 chunks of 4), and one of 18 in the other (4 chunks)."""
    encoder = build(backend=backend).float()
    embeddings, hidden, mask = data(n=18, chunks=4, dtype=torch.float32)
    starts = torch.zeros(B, 18, dtype=torch.bool)
    starts[0, [0, 9, 12]] = True
    out = encoder(embeddings, hidden, mask, sequence_starts=starts)
    for row, tokens, chunks in [
        (0, slice(0, 8), slice(0, 2)),
        (0, slice(12, 16), slice(2, 3)),
        (1, slice(0, 16), slice(0, 4)),
    ]:
        row = slice(row, row + 1)
        want = encoder(embeddings[row, chunks], hidden[row, tokens], mask[row, chunks])
        torch.testing.assert_close(out[row, chunks], want, atol=1e-5, rtol=1e-5)
    changed = encoder(embeddings, torch.randn_like(hidden), mask, sequence_starts=starts)
    torch.testing.assert_close(changed[0, 3], out[0, 3], atol=1e-5, rtol=1e-5)  # a surplus chunk sees no activations


@pytest.mark.parametrize("option", ["dropout", "hidden_dropout", "feed_forward_dropout"])
def test_dropout_acts_in_training_only(option):
    encoder = build(**{option: 0.5}).float()
    embeddings, hidden, mask = data(dtype=torch.float32)
    plain_encoder = build().float()
    plain_encoder.load_state_dict(encoder.state_dict())
    assert not torch.equal(encoder(embeddings, hidden, mask), encoder(embeddings, hidden, mask))
    torch.manual_seed(3)
    one = encoder(embeddings, hidden, mask)
    torch.manual_seed(3)
    assert torch.equal(encoder(embeddings, hidden, mask), one)
    encoder.eval()
    torch.testing.assert_close(encoder(embeddings, hidden, mask), plain_encoder(embeddings, hidden, mask))


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_casts_copies_and_pickles(backend, name):
    encoder, (embeddings, hidden, mask) = recipe(name, backend=backend)
    encoder.eval()
    expected = encoder(embeddings, hidden, mask)
    assert torch.equal(copy.deepcopy(encoder)(embeddings, hidden, mask), expected)
    assert torch.equal(pickle.loads(pickle.dumps(encoder))(embeddings, hidden, mask), expected)
    scale = expected.abs().max().item()
    with torch.autocast("cpu", torch.bfloat16):
        out = encoder(embeddings, hidden, mask)
    torch.testing.assert_close(out.float(), expected, atol=0.1 * scale, rtol=0.1)
    twin = copy.deepcopy(encoder).bfloat16()
    out = twin(embeddings.bfloat16(), hidden.bfloat16(), mask)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), expected, atol=0.1 * scale, rtol=0.1)
    out.sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in twin.parameters())


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("name", ["paper", "retro_pytorch", "norlund"])
def test_compiles_in_one_graph(backend, name):
    encoder, (embeddings, hidden, mask) = recipe(name, backend=backend)
    compiled = torch.compile(encoder, fullgraph=True, backend="aot_eager")
    want = encoder(embeddings, hidden, mask)
    torch.testing.assert_close(compiled(embeddings, hidden, mask), want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_chunks_no_neighbours_no_tokens(backend):
    encoder = build(backend=backend).float()
    for n, chunks, k, r in ((0, 0, 2, 5), (3, 0, 2, 5), (8, 2, 0, 5), (8, 2, 2, 0), (3, 1, 2, 5)):
        embeddings, hidden, mask = data(n=n, chunks=chunks, k=k, r=r, dtype=torch.float32)
        out = encoder(embeddings, hidden, mask)
        assert out.shape == embeddings.shape
        assert out.isfinite().all()
        out.sum().backward()
        assert all(parameter.grad is not None for parameter in encoder.parameters())


def test_state_dict_holds_parameters_only_and_meta_construction_works():
    encoder = NeighbourEncoder.labml(DIM, num_heads=H, chunk_size=M, retrieved_length=R)
    assert set(encoder.state_dict()) == {name for name, _ in encoder.named_parameters()}
    with torch.device("meta"):
        empty = NeighbourEncoder.labml(DIM, num_heads=H, chunk_size=M, retrieved_length=R)
    empty = empty.to_empty(device="cpu")
    empty.load_state_dict(encoder.state_dict())
    embeddings, hidden, mask = data(dtype=torch.float32, context=DIM)
    for x in (encoder, empty):
        for module in x.modules():
            if hasattr(module, "backend"):
                module.backend = "reference"
    assert torch.equal(empty(embeddings, hidden, mask), encoder(embeddings, hidden, mask))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_kv_heads": 3}, "num_kv_heads"),
        ({"head_dim": None, "num_heads": 5}, "head_dim"),
        ({"num_layers": 0}, "num_layers"),
        ({"stride": M + 1}, "stride"),
        ({"align": "end", "stride": 2}, "stride"),
        ({"align": "middle"}, "align"),
        ({"partial_chunk": "dropped"}, "partial_chunk"),
        ({"cross_attention_layers": (0,)}, "cross_attention_layers"),
        ({"cross_attention_layers": (3,)}, "cross_attention_layers"),
        ({"cross_residual": "output"}, "cross_residual"),
        ({"cross_residual": "normed", "norm_position": "post"}, "cross_residual"),
        ({"residual_scale": 2.0}, "residual_scale"),
        ({"norm": "batch"}, "norm"),
        ({"norm": nn.LayerNorm, "norm_eps": 1e-3}, "norm_eps"),
        ({"norm_position": "both"}, "norm_position"),
        ({"positions": "sinusoid"}, "positions"),
        ({"cross_positions": "sinusoid"}, "cross_positions"),
        ({"rotary_dim": 4}, "rotary_dim"),
        ({"positions": "rotary", "rotary_dim": D + 2}, "rotary_dim"),
        ({"positions": "rotary", "relative_biases": False}, "relative_biases"),
        ({"relative_dim": 5}, "model_dim"),
        ({"num_buckets": 5}, "num_buckets"),
        ({"positions": "bias", "cross_positions": "none", "cross_num_buckets": 5}, "cross_num_buckets"),
        ({"biases": ("key", "null")}, "biases"),
        ({"activation": "tanh"}, "activation"),
        ({"feed_forward_dim": 0}, "feed_forward_dim"),
        ({"dropout": 1.0}, "dropout"),
        ({"hidden_dropout": -0.1}, "hidden_dropout"),
        ({"feed_forward_dropout": 1}, "feed_forward_dropout"),
    ],
)
def test_wrong_constructor_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)


def test_wrong_inputs_are_named():
    encoder = build(positions="rotary").float()
    embeddings, hidden, mask = data(dtype=torch.float32)
    for arguments, kind, message in [
        ((embeddings[0], hidden), ValueError, "embeddings"),
        ((embeddings[..., 1:], hidden), ValueError, "model_dim"),
        ((embeddings, hidden[0]), ValueError, "hidden"),
        ((embeddings, hidden[..., 1:]), ValueError, "context_dim"),
        ((embeddings, hidden[:1]), ValueError, "hidden"),
        ((embeddings, hidden[:, :8]), ValueError, "ends after 8 tokens"),
        ((embeddings, hidden, mask.int()), TypeError, "neighbour_mask"),
        ((embeddings, hidden, mask[:, :1]), ValueError, "neighbour_mask"),
        ((torch.cat([embeddings] * 2, 3), hidden), ValueError, "retrieved_length"),
        ((embeddings.long(), hidden), TypeError, "embeddings"),
        ((embeddings, hidden, mask, torch.ones(B, 3, dtype=torch.bool)), ValueError, "sequence_starts"),
    ]:
        with pytest.raises(kind, match=message):
            encoder(*arguments)
    end = build(align="end").float()
    with pytest.raises(ValueError, match="embeddings"):
        end(embeddings[:, :2], hidden)
    with pytest.raises(ValueError, match="align"):
        end(embeddings, hidden, None, torch.ones(B, N, dtype=torch.bool))
