"""The layer against formulas written from scratch, one token and one head at a time: the paper's conventions and each
peer's (peers.md 1.0)."""

import copy
import math

import pytest
import torch

from retro_kernels.nn import ChunkedCrossAttention
from retro_kernels.nn.positions import t5_buckets
from retro_kernels.ops.backends import backends

FUSED = ["cpu"] if backends()["cpu"].available else []
BACKENDS = ["reference", *FUSED]
B, K, R, M, DIM, CONTEXT, H, D = 2, 2, 6, 4, 12, 10, 3, 8


def build(recipe=ChunkedCrossAttention, **options):
    """A small fp64 layer on the reference, with nothing left at an initial zero."""
    settings = {
        "num_heads": H,
        "head_dim": D,
        "context_dim": CONTEXT,
        "chunk_size": M,
        "backend": "reference",
        **options,
    }
    layer = recipe(DIM, **settings).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.5)
    return layer


def data(n, chunks, k=K, r=R, dtype=torch.float64):
    hidden = torch.randn(B, n, DIM, dtype=dtype)
    encoded = torch.randn(B, chunks, k, r, CONTEXT, dtype=dtype)
    return hidden, encoded, torch.rand(B, chunks, k, r) > 0.3


def by_token(layer, hidden, encoded, mask, place, logit):
    """`place(i)` -> (chunk, row) or None; `logit(head, row, j, t, q, key)` -> the logit of one neighbour token."""
    out = torch.zeros(B, hidden.shape[1], DIM, dtype=torch.float64)
    heads_per_kv = layer.num_heads // layer.num_kv_heads
    for b in range(B):
        for i in range(hidden.shape[1]):
            if place(i) is None:
                continue
            u, row = place(i)
            heads = []
            for head in range(layer.num_heads):
                kv = head // heads_per_kv
                q = layer.w_query(hidden[b, i]).view(layer.num_heads, -1)[head]
                logits, values = [], []
                if layer.null_key is not None:
                    logits.append(logit(head, row, None, None, q, layer.null_key[head]))
                    values.append(layer.null_value[head])
                for j in range(encoded.shape[2]):
                    for t in range(encoded.shape[3]):
                        if mask is None or mask[b, u, j, t]:
                            key = layer.w_key(encoded[b, u, j, t]).view(layer.num_kv_heads, -1)[kv]
                            logits.append(logit(head, row, j, t, q, key))
                            values.append(layer.w_value(encoded[b, u, j, t]).view(layer.num_kv_heads, -1)[kv])
                heads.append(torch.stack(logits).softmax(0) @ torch.stack(values))
            out[b, i] = layer.w_out(torch.cat(heads))
    return out


def front(i):
    """The paper's alignment: token i >= m - 1 attends to chunk (i - m + 1) // m."""
    return None if i < M - 1 else divmod(i - (M - 1), M)


def end(n):
    """Megatron's: the incomplete chunk comes first."""
    first = (n - 1) % M
    return lambda i: None if i < first else divmod(i - first, M)


def turn(x, position, width, interleaved):
    """Rotary embedding of one vector, pair by pair."""
    x = x.clone()
    for j in range(width // 2):
        angle = position * 10000.0 ** (-2 * j / width)
        one, two = (2 * j, 2 * j + 1) if interleaved else (j, j + width // 2)
        a, b = x[one].clone(), x[two].clone()
        x[one], x[two] = a * math.cos(angle) - b * math.sin(angle), b * math.cos(angle) + a * math.sin(angle)
    return x


def rotary(scale, width, interleaved, query_position):
    def logit(head, row, j, t, q, key):
        q = turn(q, query_position(row), width, interleaved)
        return scale * (q @ (key if t is None else turn(key, t, width, interleaved)))  # the null key is not rotated

    return logit


def plain(head, row, j, t, q, key):
    return D**-0.5 * (q @ key)


@pytest.mark.parametrize("n", [3, 4, 7, 8, 11])
def test_labml_no_positions_and_biases_everywhere(n):
    layer = build(ChunkedCrossAttention.labml)
    hidden, encoded, _ = data(n, n // M)
    torch.testing.assert_close(layer(hidden, encoded), by_token(layer, hidden, encoded, None, front, plain))


@pytest.mark.parametrize("n", [1, 3, 8, 10])
def test_megatron_aligns_to_the_end(n):
    layer = build(ChunkedCrossAttention.megatron)
    hidden, encoded, _ = data(n, -(-n // M))
    torch.testing.assert_close(layer(hidden, encoded), by_token(layer, hidden, encoded, None, end(n), plain))


def test_rpt_interleaved_rotary_null_slot_and_mask():
    layer = build(ChunkedCrossAttention.rpt, retrieved_length=R)
    hidden, encoded, mask = data(11, 2)
    mask[0, 0] = False  # only the null slot is left
    logit = rotary(D**-0.5, D, True, lambda row: M - 1 + row)
    # Frequencies are those of an fp32 table, here of exact arithmetic.
    torch.testing.assert_close(
        layer(hidden, encoded, mask), by_token(layer, hidden, encoded, mask, front, logit), atol=1e-6, rtol=1e-6
    )


@pytest.mark.parametrize(
    ("name", "position"),
    [
        ("as_trained", lambda row: 2 * M - 2 if row == 0 else 0),
        ("paper", lambda row: M - 1 + row),
        ([0.5, 2, -1, 7], lambda row: [0.5, 2, -1, 7][row]),
    ],
)
def test_retro_pytorch_partial_rotary_with_explicit_query_positions(name, position):
    layer = build(ChunkedCrossAttention.retro_pytorch, query_positions=name, rotary_dim=4)
    hidden, encoded, mask = data(10, 2)
    logit = rotary(D**-0.5, 4, False, position)
    torch.testing.assert_close(
        layer(hidden, encoded, mask), by_token(layer, hidden, encoded, mask, front, logit), atol=1e-6, rtol=1e-6
    )


def test_norlund_bias_counts_on_through_the_neighbours():
    """Scale 1 and one bias per clamped offset; a chunk beyond the last complete one is handed over and unused."""
    layer = build(ChunkedCrossAttention.norlund, retrieved_length=R, num_neighbours=K, num_buckets=7)
    assert layer.attention_bias.shape == (H, 7)

    def logit(head, row, j, t, q, key):
        offset = min(max(j * R + t - row, -3), 3)
        return q @ key + layer.attention_bias[head, offset + 3]

    hidden, encoded, mask = data(10, 3)
    torch.testing.assert_close(layer(hidden, encoded, mask), by_token(layer, hidden, encoded, mask, front, logit))
    assert t5_buckets(2, 5, 4).tolist() == [[1, 2, 3, 3, 3], [0, 1, 2, 3, 3]]  # offsets -1 ... 2


@pytest.mark.parametrize("num_neighbours", [None, K])
def test_dense_bias_serves_shorter_or_fewer_neighbours(num_neighbours):
    layer = build(positions="bias", retrieved_length=R, num_neighbours=num_neighbours)
    k, r = (K, R - 2) if num_neighbours is None else (1, R)
    hidden, encoded, mask = data(9, 2, k=k, r=r)

    def logit(head, row, j, t, q, key):
        return D**-0.5 * (q @ key) + layer.attention_bias[head, row, t if num_neighbours is None else j * R + t]

    torch.testing.assert_close(layer(hidden, encoded, mask), by_token(layer, hidden, encoded, mask, front, logit))


@pytest.mark.parametrize("biases", [True, False])
def test_paper_relative_positions_are_those_of_equation_6(biases):
    """Distance i - t + m - 1, restarted for every neighbour, through W of [sin | cos], with u and v or without."""
    layer = build(ChunkedCrossAttention.paper, relative_biases=biases)
    weight = layer.relative.projection.weight.view(H, D, DIM)
    zero = torch.zeros(H, D, dtype=torch.float64)
    u, v = (layer.relative.content_bias, layer.relative.relative_bias) if biases else (zero, zero)

    def logit(head, row, j, t, q, key):
        distance = row - t + M - 1
        angles = [distance * 10000.0 ** (-2 * x / DIM) for x in range(DIM // 2)]
        sinusoid = torch.tensor([math.sin(x) for x in angles] + [math.cos(x) for x in angles], dtype=torch.float64)
        return D**-0.5 * ((q + u[head]) @ key + (q + v[head]) @ (weight[head] @ sinusoid))

    hidden, encoded, mask = data(10, 2)
    torch.testing.assert_close(layer(hidden, encoded, mask), by_token(layer, hidden, encoded, mask, front, logit))


def test_grouped_heads_value_size_and_stride():
    layer = build(num_heads=4, num_kv_heads=2, value_head_dim=5, stride=3, scale=-0.7, biases=("query", "out"))
    hidden, encoded, mask = data(12, 3)
    expected = by_token(
        layer,
        hidden,
        encoded,
        mask,
        lambda i: None if i < M - 1 else divmod(i - (M - 1), 3),
        lambda head, row, j, t, q, key: -0.7 * (q @ key),
    )
    torch.testing.assert_close(layer(hidden, encoded, mask), expected)


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("recipe", ["paper", "labml", "megatron", "rpt", "retro_pytorch", "norlund"])
def test_fused_backends_agree_with_the_reference(backend, recipe):
    """Output and every gradient, through the projections, in fp32."""
    extra = {"retrieved_length": R} if recipe in ("norlund", "rpt") else {}
    layer = build(getattr(ChunkedCrossAttention, recipe), **extra).float()
    hidden, encoded, mask = data(11, 3, dtype=torch.float32)
    results = []
    for name in ("reference", backend):
        layer.backend = name
        inputs = [x.clone().requires_grad_() for x in (hidden, encoded)]
        out = layer(*inputs, mask)
        results.append((out, torch.autograd.grad(out.square().sum(), [*inputs, *layer.parameters()])))
    torch.testing.assert_close(results[1][0], results[0][0], atol=1e-4, rtol=1e-4)
    # One floor for all: the softmax cancels the gradient of the key's bias to rounding noise.
    floor = 1e-5 * max(want.abs().max().item() for want in results[0][1])
    for got, want in zip(results[1][1], results[0][1]):
        torch.testing.assert_close(got, want, atol=floor, rtol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("align", ["start", "end"])
def test_tokens_before_the_first_chunk_are_exactly_zero(backend, align):
    """Also with a bias on the output projection; the same for a sequence shorter than a chunk and for none at all."""
    layer = build(biases=True, null_slot=True, align=align, backend=backend).float()
    for n in (0, 2, 3, 4, 9, 11):
        hidden, encoded, mask = data(n, n // M if align == "start" else -(-n // M), dtype=torch.float32)
        out = layer(hidden, encoded, mask)
        first = min(n, M - 1 if align == "start" else (n - 1) % M)
        assert out.shape == hidden.shape
        assert (out[:, :first] == 0).all()
        assert (out[:, first:] != 0).any(-1).all()
        out.sum().backward()  # also where nothing attends, every parameter has a gradient, as DDP expects
        assert all(parameter.grad is not None for parameter in layer.parameters())


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_in_masked_surplus_and_early_tokens_reaches_nothing(backend):
    layer = build(null_slot=True, biases=True, backend=backend).float()
    hidden, encoded, mask = data(9, 2, dtype=torch.float32)
    mask[0, 1] = False
    surplus = torch.randn(B, 1, K, R, CONTEXT)
    results = []
    for poison in (1.0, float("nan"), float("inf")):
        layer.zero_grad()
        h, e = hidden.clone(), torch.cat([encoded.masked_fill(~mask[..., None], poison), surplus * poison], 1)
        h[:, : M - 1] = poison
        inputs = [h.requires_grad_(), e.requires_grad_()]
        out = layer(*inputs, torch.cat([mask, torch.ones_like(mask[:, :1])], 1))
        results.append((out, *torch.autograd.grad(out.sum(), [*inputs, *layer.parameters()])))
    for other in results[1:]:
        for got, want in zip(other, results[0]):
            assert torch.equal(got, want)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("stride", [M, 3])
def test_a_slice_with_offsets_equals_the_slice_of_the_whole(backend, stride):
    layer = build(biases=True, null_slot=True, stride=stride, backend=backend).float()
    n = 14
    hidden, encoded, mask = data(n, (n - M) // stride + 1, dtype=torch.float32)
    whole = layer(hidden, encoded, mask)
    for start, stop in ((0, 5), (2, 9), (5, 6), (6, 14), (9, 14)):
        first = max(start - (M - 1), 0) // stride
        part = layer(hidden[:, start:stop], encoded[:, first:], mask[:, first:], start, first)
        torch.testing.assert_close(part, whole[:, start:stop], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(layer(hidden[:, start:stop], encoded, mask, query_offset=start), part)


@pytest.mark.parametrize("backend", BACKENDS)
def test_dropout_acts_in_training_only(backend):
    """It is reproduced by torch's seed, drops the same in every backend, and is right on average."""
    layer = build(dropout=0.5, backend=backend, null_slot=True).float()
    hidden, encoded, mask = data(9, 2, dtype=torch.float32)
    torch.manual_seed(1)
    one = layer(hidden, encoded, mask)
    assert not torch.equal(layer(hidden, encoded, mask), one)
    torch.manual_seed(1)
    assert torch.equal(layer(hidden, encoded, mask), one)
    layer.backend = "reference"
    torch.manual_seed(1)
    torch.testing.assert_close(layer(hidden, encoded, mask), one, atol=1e-5, rtol=1e-5)
    layer.backend = backend
    with torch.no_grad():
        mean = torch.stack([layer(hidden, encoded, mask) for _ in range(400)]).mean(0)
    layer.eval()
    expected = layer(hidden, encoded, mask)
    assert torch.equal(expected, layer(hidden, encoded, mask))
    assert (mean - expected).abs().max() < 0.25 * expected.abs().max()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("stride", [M, 3])
def test_packed_documents_equal_separate_calls(backend, stride):
    """Documents of 9, 3 and 6 tokens in one row, one of 18 in the other: output and gradients, NaN where nobody looks,
    and exactly 0 before each document's first chunk although the output projection has a bias."""
    layer = build(ChunkedCrossAttention.paper, biases=True, null_slot=True, stride=stride, backend=backend).float()
    hidden, encoded, mask = data(18, (18 - M) // stride + 1, dtype=torch.float32)
    starts = torch.zeros(B, 18, dtype=torch.bool)
    starts[0, [0, 9, 12]] = True
    documents = [(0, 0, 9), (0, 9, 12), (0, 12, 18), (1, 0, 18)]
    want, chunk = [], [0, 0]
    for row, begin, end in documents:
        count = (end - begin - M) // stride + 1 if end - begin >= M else 0
        here = slice(row, row + 1), slice(chunk[row], chunk[row] + count)
        want.append(layer(hidden[row : row + 1, begin:end], encoded[here], mask[here])[0])
        chunk[row] += count
    gradient = torch.randn(B, 18, DIM)
    total = sum((x * gradient[row, begin:end]).sum() for x, (row, begin, end) in zip(want, documents))
    wanted = torch.autograd.grad(total, list(layer.parameters()))
    for row, begin, end in documents:
        hidden[row, begin : min(begin + M - 1, end)] = float("nan")
    got = layer(hidden, encoded, mask, sequence_starts=starts)
    for x, (row, begin, end) in zip(want, documents):
        torch.testing.assert_close(got[row, begin:end], x, atol=1e-5, rtol=1e-5)
        assert (got[row, begin : min(begin + M - 1, end)] == 0).all()
    for x, y in zip(torch.autograd.grad((got * gradient).sum(), list(layer.parameters())), wanted):
        torch.testing.assert_close(x, y, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="sequence_starts"):
        layer(hidden, encoded, mask, query_offset=1, sequence_starts=starts)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_copies_and_casts(backend):
    layer = build(ChunkedCrossAttention.retro_pytorch, backend=backend).float()
    hidden, encoded, mask = data(9, 2, dtype=torch.float32)
    expected = layer(hidden, encoded, mask)
    twin = copy.deepcopy(layer)
    assert torch.equal(twin(hidden, encoded, mask), expected)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(hidden, encoded, mask)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), expected, atol=0.3, rtol=0.1)
    twin.bfloat16()
    assert twin.rotary.key_cos.dtype == torch.float32  # a position rounded to bf16 would turn by a wrong angle
    out = twin(hidden.bfloat16(), encoded.bfloat16(), mask)
    torch.testing.assert_close(out.float(), expected, atol=0.3, rtol=0.1)
    (out.sum() + 0).backward()
    assert all(parameter.grad.isfinite().all() for parameter in twin.parameters())


@pytest.mark.parametrize("backend", FUSED)  # the reference traces too, but for a minute
def test_compiles_in_one_graph_for_any_length(backend):
    layer = build(ChunkedCrossAttention.retro_pytorch, backend=backend).float()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (9, 14, 23):
        hidden, encoded, mask = data(n, n // M, dtype=torch.float32)
        torch.testing.assert_close(compiled(hidden, encoded, mask), layer(hidden, encoded, mask), atol=1e-5, rtol=1e-5)


def test_state_dict_holds_parameters_only_and_meta_construction_works():
    layer = ChunkedCrossAttention.retro_pytorch(DIM, num_heads=H, head_dim=D, chunk_size=M, context_dim=CONTEXT)
    assert set(layer.state_dict()) == {
        "w_query.weight",
        "w_key.weight",
        "w_value.weight",
        "w_out.weight",
        "w_out.bias",
        "null_key",
        "null_value",
    }
    with torch.device("meta"):
        empty = ChunkedCrossAttention.retro_pytorch(DIM, num_heads=H, head_dim=D, chunk_size=M, context_dim=CONTEXT)
    assert empty.rotary.key_cos.is_meta
    empty = empty.to_empty(device="cpu")
    empty.load_state_dict(layer.state_dict())
    hidden, encoded, mask = data(9, 2, dtype=torch.float32)
    for x in (layer, empty):
        x.backend = "reference"
    assert torch.equal(empty(hidden, encoded, mask), layer(hidden, encoded, mask))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_kv_heads": 2}, "num_kv_heads"),
        ({"head_dim": None, "num_heads": 5}, "head_dim"),
        ({"head_dim": 0}, "head_dim"),
        ({"stride": M + 1}, "stride"),
        ({"align": "middle"}, "align"),
        ({"align": "end", "stride": 2}, "stride"),
        ({"dropout": 1.0}, "dropout"),
        ({"positions": "sinusoid"}, "positions"),
        ({"biases": ("key", "null")}, "biases"),
        ({"biases": "out"}, "biases"),
        ({"rotary_dim": 4}, "rotary_dim"),
        ({"positions": "rotary", "rotary_dim": 3}, "rotary_dim"),
        ({"positions": "rotary", "rotary_dim": D + 2}, "rotary_dim"),
        ({"positions": "rotary", "query_positions": [0, 1]}, "query_positions"),
        ({"positions": "rotary", "key_positions": [0, 1], "retrieved_length": 3}, "key_positions"),
        ({"positions": "rotary", "relative_biases": False}, "relative_biases"),
        ({"positions": "relative", "relative_dim": 5}, "model_dim"),
        ({"num_neighbours": 2}, "num_neighbours"),
        ({"positions": "bias", "num_buckets": 3}, "num_buckets"),
        ({"positions": "bias", "bias_buckets": torch.zeros(M, 3, dtype=torch.int64)}, "bias_buckets"),
        (
            {"positions": "bias", "retrieved_length": 2, "bias_buckets": torch.full((M, 2), 4), "num_buckets": 4},
            "bias_buckets",
        ),
    ],
)
def test_wrong_constructor_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)


def test_wrong_inputs_are_named():
    layer = build(positions="rotary", retrieved_length=R).float()
    hidden, encoded, mask = data(9, 2, dtype=torch.float32)
    for arguments, kind, message in [
        ((hidden[0], encoded), ValueError, "hidden"),
        ((hidden[..., :-1], encoded), ValueError, "model_dim"),
        ((hidden, encoded[0]), ValueError, "encoded"),
        ((hidden, encoded[..., 1:]), ValueError, "context_dim"),
        ((hidden, encoded[:1]), ValueError, "encoded"),
        ((hidden, encoded[:, :1]), ValueError, "chunks"),
        ((hidden, encoded, mask.int()), TypeError, "neighbour_mask"),
        ((hidden, encoded, mask[:, :1]), ValueError, "neighbour_mask"),
        ((hidden, encoded, mask, -1), ValueError, "query_offset"),
        ((hidden, encoded, mask, 0, 1), ValueError, "chunk_offset"),
        ((hidden, torch.cat([encoded, encoded], 3)), ValueError, "retrieved_length"),
        ((hidden.long(), encoded), TypeError, "hidden"),
    ]:
        with pytest.raises(kind, match=message):
            layer(*arguments)
    bias = build(positions="bias", num_neighbours=K, retrieved_length=R).float()
    with pytest.raises(ValueError, match="num_neighbours"):
        bias(hidden, torch.cat([encoded, encoded], 2))
    with pytest.raises(ValueError, match="retrieved_length"):
        bias(hidden, encoded[:, :, :, 1:])
