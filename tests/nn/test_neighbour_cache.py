"""Decoding token by token from the cache against the layers' full computation: every form of positions and of cache,
ragged batches whose sequences join and leave, quantised storage, and calls that must write nothing."""

import pathlib
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import retro_kernels
from retro_kernels.nn import (
    ChunkedCrossAttention,
    NeighbourCache,
    NeighbourEncoder,
    RelativePositions,
    project_neighbours,
)
from retro_kernels.nn.neighbour_cache import quantise
from retro_kernels.ops.backends import backends

FUSED = ["cpu"] if backends()["cpu"].available else []
BACKENDS = ["reference", *FUSED]
FORMS = ["key_value", "encoded"]
QUANTISED = [torch.int8, torch.float8_e4m3fn]
B, K, R, M, DIM, CONTEXT = 3, 2, 6, 4, 24, 20
SIZES = {"num_slots": B, "num_neighbours": K, "retrieved_length": R}
OPTIONS = {
    "none": {},
    "none, biases": {"biases": True},
    "null slot, grouped heads": {"null_slot": True, "num_kv_heads": 2, "value_head_dim": 5, "biases": True},
    "relative": {"positions": "relative", "null_slot": True},
    "relative without u and v": {"positions": "relative", "relative_biases": False, "num_kv_heads": 1},
    "rotary": {"positions": "rotary", "null_slot": True, "biases": ("out",)},
    "rotary, partial, interleaved": {"positions": "rotary", "rotary_dim": 4, "rotary_interleaved": True},
    "bias": {"positions": "bias", "scale": 1.0, "biases": ("key",)},
    "bias of each neighbour": {"positions": "bias", "num_neighbours": K, "null_slot": True},
}


def build(backend="reference", **options):
    """A small fp32 layer with nothing left at an initial zero."""
    settings = {"num_heads": 4, "head_dim": 8, "context_dim": CONTEXT, "chunk_size": M, "retrieved_length": R}
    layer = ChunkedCrossAttention(DIM, backend=backend, **{**settings, **options})
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.3)
    return layer


def data(n, chunks=None, b=B, dtype=torch.float32):
    chunks = n // M if chunks is None else chunks
    mask = torch.rand(b, chunks, K, R) > 0.3
    mask[0, 0] = False  # a chunk that retrieved nothing
    return torch.randn(b, n, DIM, dtype=dtype), torch.randn(b, chunks, K, R, CONTEXT, dtype=dtype), mask


def completed(position):
    """The chunk that is complete with the token at this position, or None."""
    return (position + 1) // M - 1 if (position + 1) % M == 0 else None


def decode(layer, cache, hidden, encoded, mask, tokens=1):
    """All sequences from their first token on, up to `tokens` at a time but never across a border."""
    slots, out, position = list(range(len(hidden))), [], 0
    cache.join(slots)
    while position < hidden.shape[1]:
        if completed(position) is not None:
            cache.fill(slots, completed(position), encoded[:, completed(position)], mask[:, completed(position)])
        border = position + 1
        while border < hidden.shape[1] and border < position + tokens and completed(border) is None:
            border += 1
        out.append(layer.decode(hidden[:, position:border], cache, torch.full((len(hidden),), position)))
        position = border
    return torch.cat(out, 1)


def forms(options):
    return FORMS[:1] if options.get("positions") == "rotary" else FORMS


CASES = [(name, form) for name, options in OPTIONS.items() for form in forms(options)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("name", "form"), CASES)
def test_token_by_token_is_the_full_computation(name, form, backend):
    """Three borders and an incomplete chunk; one token and three at a time. Bit for bit on the reference, where a layer
    that projected tokens in products of another number of rows would differ."""
    layer = build(backend, **OPTIONS[name])
    hidden, encoded, mask = data(4 * M + 2)
    full = layer(hidden, encoded, mask)
    for tokens in (1, 3):
        given = decode(layer, NeighbourCache([layer], form=form, **SIZES), hidden, encoded, mask, tokens)
        if backend == "reference":
            assert torch.equal(given, full)
        else:
            torch.testing.assert_close(given, full, atol=2e-5, rtol=1e-5)


def test_bit_for_bit_rests_on_products_of_one_size(monkeypatch):
    """What the test above needs on processors whose products round otherwise for another number of rows: every
    projection of the full computation and of decoding is a product of as many rows."""
    layer = build("reference")
    sizes = set()
    for module in (layer.w_query, layer.w_out):
        module.register_forward_hook(lambda _, inputs, __: sizes.add(inputs[0].flatten(0, -2).shape[0]))
    hidden, encoded, mask = data(4 * M + 2)
    layer(hidden, encoded, mask)
    decode(layer, NeighbourCache([layer], **SIZES), hidden, encoded, mask)
    assert len(sizes) == 1
    monkeypatch.setattr("retro_kernels.nn.common.exact", lambda backend: False)
    layer(hidden, encoded, mask)
    assert len(sizes) > 1


@torch.no_grad()
def test_bits_do_not_depend_on_the_batch():
    """At the size of a real layer: one sequence alone in the full computation, three in the cache."""
    layer = ChunkedCrossAttention.paper(256, num_heads=4, context_dim=160, chunk_size=64, backend="reference")
    hidden, encoded = torch.randn(3, 130, 256), torch.randn(3, 2, 2, 128, 160)
    full = torch.cat([layer(hidden[i : i + 1], encoded[i : i + 1]) for i in range(3)])
    for form in FORMS:
        cache = NeighbourCache([layer], num_slots=3, num_neighbours=2, form=form)
        for position in (62, 63, 64, 100, 127, 129):
            if position >= 63:
                chunk = (position - 63) // 64
                cache.fill([0, 1, 2], chunk, encoded[:, chunk])
            given = layer.decode(hidden[:, position : position + 1], cache, torch.full((3,), position))
            assert torch.equal(given[:, 0], full[:, position])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", FORMS)
def test_tokens_that_retrieve_nothing(form, backend):
    """Exactly 0 before the first chunk and in a free slot, although the output projection has a bias and the hidden
    state is NaN; exactly that bias where every neighbour is masked."""
    layer = build(backend, biases=("out",))
    cache = NeighbourCache([layer], form=form, **SIZES)
    cache.join([0, 1])
    cache.fill(1, 0, torch.full((1, K, R, CONTEXT), float("nan")), torch.zeros(1, K, R, dtype=torch.bool))
    hidden = torch.full((B, 1, DIM), float("nan"))
    hidden[1] = 1.0
    out = layer.decode(hidden, cache, torch.tensor([M - 2, M - 1, -7]))
    assert (out[0] == 0).all()
    assert torch.equal(out[1, 0], layer.w_out.bias)
    assert (out[2] == 0).all()


class Decoder(nn.Module):
    """Self-attention, chunked cross-attention and feed-forward, twice. The encoder reads the activations in front of
    the first chunked cross-attention, as in the paper."""

    def __init__(self, backend):
        super().__init__()
        self.mix = nn.ModuleList(nn.Linear(DIM, DIM) for _ in range(2))
        self.cca = nn.ModuleList(build(backend, positions="relative", biases=("out",)) for _ in range(2))
        self.encoder = NeighbourEncoder(
            CONTEXT, num_heads=2, num_layers=1, context_dim=DIM, chunk_size=M, retrieved_length=R, backend=backend
        )

    def attend(self, i, hidden, past, visible):
        """Self-attention of hidden [b, n, dim] to past [b, n', dim], with visible bool [b, n, n']."""
        return hidden + F.scaled_dot_product_attention(hidden, past, self.mix[i](past), attn_mask=visible)

    def full(self, hidden, neighbours):
        """One whole sequence: hidden [1, n, dim], neighbours [1, l, k, r, context]."""
        causal = torch.ones(hidden.shape[1], hidden.shape[1], dtype=torch.bool).tril()[None]
        for i, cca in enumerate(self.cca):
            hidden = self.attend(i, hidden, hidden, causal)
            if i == 0:
                encoded = self.encoder(neighbours, hidden)
            hidden = hidden + cca(hidden, encoded)
        return hidden


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_a_generation_loop(form, backend):
    """Four sequences of different lengths in three slots: they join at different steps, one in a slot that another
    left, retrieve when their own chunks are complete, and give what each gives when computed whole and alone."""
    model = Decoder(backend).eval()
    lengths, begins, slot_of = [14, 7, 11, 9], [0, 2, 5, 10], [0, 1, 2, 1]
    sequences = [torch.randn(1, n, DIM) for n in lengths]
    neighbours = [torch.randn(1, n // M, K, R, CONTEXT) for n in lengths]
    outputs = [[] for _ in lengths]

    cache = NeighbourCache(list(model.cca), form=form, **SIZES)
    slots = torch.arange(B)
    position = torch.zeros(B, dtype=torch.int64)  # of each slot's new token; anything where the slot is free
    past = torch.zeros(3, B, max(lengths), DIM)  # what each self-attention saw, and what the encoder will
    running = {}  # slot -> sequence
    filled = 0
    for step in range(max(begin + n for begin, n in zip(begins, lengths))):
        for which in range(len(lengths)):
            if begins[which] == step:
                running[slot_of[which]] = which
                position[slot_of[which]] = 0
                cache.join(slot_of[which])
        hidden = torch.zeros(B, 1, DIM)
        for slot, which in running.items():
            hidden[slot] = sequences[which][:, position[slot]]

        visible = torch.arange(past.shape[2]) <= position[:, None, None]
        for i, cca in enumerate(model.cca):
            past[i, slots, position] = hidden[:, 0]
            hidden = model.attend(i, hidden, past[i], visible)
            if i == 0:
                past[2, slots, position] = hidden[:, 0]
                due = {slot: completed(int(position[slot])) for slot in running}
                due = {slot: chunk for slot, chunk in due.items() if chunk is not None}
                if due:
                    found = torch.cat([neighbours[running[slot]][:, u : u + 1] for slot, u in due.items()])
                    rows = torch.stack([past[2, slot, u * M : (u + 1) * M] for slot, u in due.items()])
                    cache.fill(due.keys(), due.values(), model.encoder(found, rows)[:, 0])
                    filled += len(due)
            hidden = hidden + cca.decode(hidden, cache, position)

        for slot, which in list(running.items()):
            outputs[which].append(hidden[slot])
            position[slot] += 1
            if position[slot] == lengths[which]:
                del running[slot]
                position[slot] = 0
                cache.leave(slot)

    assert filled == sum(n // M for n in lengths)
    for sequence, retrieved, output in zip(sequences, neighbours, outputs):
        torch.testing.assert_close(torch.stack(output, 1), model.full(sequence, retrieved), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", QUANTISED)
def test_quantised_states_are_the_full_computation_on_what_is_stored(dtype, backend):
    """And what is stored is near what was given: int8 to half a step, float8 to a sixteenth of each number."""
    layer = build(backend, positions="relative", null_slot=True)
    hidden, encoded, mask = data(3 * M)
    encoded[1, 0, 0, 0] = 0.0  # its scale is 0
    codes, scale = quantise(encoded.flatten(0, 1), dtype)
    stored = (codes.float() * scale[..., None]).view(encoded.shape)
    step = scale[..., None].expand(codes.shape)
    if dtype == torch.float8_e4m3fn:  # three bits behind the leading one, down to 2 ** -9
        step = torch.maximum(encoded.flatten(0, 1).abs() / 8, step * 2**-9)
    assert ((stored - encoded).flatten(0, 1).abs() <= 0.5001 * step).all()
    assert codes.float().abs().amax(-1).unique().tolist() == [0.0, 127.0 if dtype == torch.int8 else 448.0]
    cache = NeighbourCache([layer], form="encoded", dtype=dtype, **SIZES)
    given = decode(layer, cache, hidden, encoded.masked_fill(~mask[..., None], float("nan")), mask)
    torch.testing.assert_close(given, layer(hidden, stored, mask), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", QUANTISED)
def test_quantised_keys_and_values(dtype, backend):
    """Turned keys among them: the error of the output is of the size of the quantisation's, and is not zero."""
    layer = build(backend, positions="rotary", num_kv_heads=2)
    hidden, encoded, mask = data(3 * M)
    full = layer(hidden, encoded, mask)
    given = decode(layer, NeighbourCache([layer], dtype=dtype, **SIZES), hidden, encoded, mask)
    error = (given - full).norm() / full.norm()
    assert 1e-4 < error < (0.02 if dtype == torch.int8 else 0.08)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["null slot, grouped heads", "rotary"])
def test_bfloat16_and_autocast(name, backend):
    """Within the rounding of the full computation in the same precision. A cache of another dtype is refused."""
    layer = build(backend, **OPTIONS[name])
    hidden, encoded, mask = data(3 * M)
    for form in forms(OPTIONS[name]):
        with torch.autocast("cpu", torch.bfloat16):
            full = layer(hidden, encoded, mask)
            stored = encoded if form == "key_value" else encoded.bfloat16()
            cache = NeighbourCache([layer], form=form, dtype=torch.bfloat16, **SIZES)
            given = decode(layer, cache, hidden, stored, mask)
            scale = full.abs().max()
            torch.testing.assert_close(given.float(), full.float(), atol=0.03 * scale.item(), rtol=0.03)
            wrong = NeighbourCache([layer], form=form, **SIZES)
            with pytest.raises(TypeError, match="bfloat16"):
                layer.decode(hidden[:, :1], wrong, torch.zeros(B, dtype=torch.int64))
            if form == "key_value":
                with pytest.raises(TypeError, match="bfloat16"):
                    wrong.fill([0, 1, 2], 0, encoded[:, 0], mask[:, 0])
        twin = build(backend, **OPTIONS[name]).bfloat16()
        twin.load_state_dict(layer.state_dict())
        cache = NeighbourCache([twin], form=form, **SIZES)
        given = decode(twin, cache, hidden.bfloat16(), encoded.bfloat16(), mask)
        expected = twin(hidden.bfloat16(), encoded.bfloat16(), mask)
        torch.testing.assert_close(given.float(), expected.float(), atol=0.03 * scale.item(), rtol=0.03)


def test_one_product_for_all_layers():
    """Equal to every layer's own projections, also where the layers' heads differ; the gradients too."""
    layers = [
        build(**options)
        for options in (
            {},
            {"biases": True},
            {"num_kv_heads": 2, "value_head_dim": 5},
            {"num_heads": 6, "biases": ("value",)},
        )
    ]
    encoded = torch.randn(B, K, R, CONTEXT)
    parameters = [x for layer in layers for module in (layer.w_key, layer.w_value) for x in module.parameters()]
    results = []
    for pairs in (project_neighbours(layers, encoded), [layer.keys_and_values(encoded) for layer in layers]):
        made = [x for pair in pairs for x in pair]
        results.append([*made, *torch.autograd.grad(sum(x.square().sum() for x in made), parameters)])
    for one, each in zip(*results):
        torch.testing.assert_close(one, each, atol=1e-4, rtol=1e-5)

    hidden, encoded, mask = data(3 * M)
    for layer in layers:
        shared = NeighbourCache(layers, one_product=True, **SIZES)
        full = layer(hidden, encoded, mask)
        torch.testing.assert_close(decode(layer, shared, hidden, encoded, mask), full, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_tables_of_positions_are_made_once(form, monkeypatch):
    layer = build(positions="relative")
    calls = []
    forward = RelativePositions.forward
    monkeypatch.setattr(RelativePositions, "forward", lambda *x, **y: calls.append(1) or forward(*x, **y))
    cache = NeighbourCache([layer], form=form, **SIZES)
    decode(layer, cache, *data(2 * M))
    assert len(calls) == 1


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", FORMS)
def test_memory_stays_where_it_is(form, backend):
    """What a CUDA graph needs: whatever joins, leaves and is filled, decoding reads the same addresses."""
    layer = build(backend)
    cache = NeighbourCache([layer], form=form, dtype=torch.int8, **SIZES)

    def addresses():
        stored = [x for store in cache._stores for x in (store.data, store.scale)]
        return [x.data_ptr() for x in (*stored, cache.valid, cache.chunk, cache.neighbour_mask)]

    before = addresses()
    with torch.inference_mode():
        hidden, encoded, mask = data(3 * M)
        decode(layer, cache, hidden, encoded, mask)
    cache.leave([1])
    cache.fill(torch.tensor([2, 0]), torch.tensor([4, 9]), encoded[:2, 0].clone())
    assert addresses() == before
    assert cache.chunk.tolist() == [9, -1, 4]
    assert cache.valid.tolist() == [True, False, True]
    with torch.inference_mode():
        made_in_inference_mode = NeighbourCache([layer], form=form, **SIZES)
    made_in_inference_mode.fill(0, 0, torch.randn(1, K, R, CONTEXT))


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float8_e4m3fn])
def test_in_one_graph_nothing_waits_for_data(form, dtype, backend):
    """A full graph cannot look at values. Slots in a tensor that are out of range are left out there, as on a GPU, and
    a token past its border comes out NaN, alone."""
    layer = build(backend, positions="relative", biases=("out",))
    cache, eager = (NeighbourCache([layer], form=form, dtype=dtype, **SIZES) for _ in range(2))
    hidden, encoded, mask = data(M + 1, chunks=3)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(slots, chunk, encoded, mask, hidden, position):
        cache.fill(slots, chunk, encoded, mask)
        return layer.decode(hidden, cache, position)

    positions = torch.tensor([M - 1, M, 2 * M])  # the last is beyond chunk 0
    for slots, kept in (([1, 0], [1, 0]), ([7, 2], [2]), ([-1, 3], [])):
        out = step(torch.tensor(slots), torch.tensor([0, 0]), encoded[0, :2], mask[0, :2], hidden[:, :1], positions)
        places = [slots.index(slot) for slot in kept]
        eager.fill(kept, 0, encoded[0, places], mask[0, places])
        for mine, other in zip(cache._stores, eager._stores):
            assert torch.equal(mine.data.float(), other.data.float())
        for name in ("valid", "chunk", "neighbour_mask"):
            assert torch.equal(getattr(cache, name), getattr(eager, name))
        wanted = layer.decode(hidden[:, :1], eager, torch.tensor([M - 1, M, M]))
        torch.testing.assert_close(out[:2], wanted[:2], atol=1e-5, rtol=1e-5)
        assert out[2].isnan().all() if eager.valid[2] else (out[2] == 0).all()


@pytest.mark.parametrize("form", FORMS)
def test_bad_calls_write_nothing(form):
    layer, other = build(), build()
    cache = NeighbourCache([layer], form=form, **SIZES)
    cache.fill([0, 1], 0, torch.randn(2, K, R, CONTEXT))
    tensors = [cache.valid, cache.chunk, cache.neighbour_mask, *(store.data for store in cache._stores)]
    before = [x.clone() for x in tensors]
    good = torch.randn(2, K, R, CONTEXT)
    mask = torch.ones(2, K, R, dtype=torch.bool)
    for arguments, kind, message in [
        (([0, 3], 1, good), ValueError, "slots: got 3"),
        (([-1, 0], 1, good), ValueError, "slots: got -1"),
        ((torch.tensor([0, 9]), 1, good), ValueError, "slots: got 9"),
        (([1, 1], 1, good), ValueError, "twice"),
        (([0, 1.0], 1, good), TypeError, "slots"),
        ((torch.tensor([0, 1], dtype=torch.int32), 1, good), TypeError, "slots"),
        ((torch.tensor([0, 1], device="meta"), 1, good), ValueError, "slots"),
        ((torch.tensor([[0, 1]]), 1, good), ValueError, "slots"),
        (([0, 1], -1, good), ValueError, "chunk: got -1"),
        (([0, 1], [1, 2, 3], good), ValueError, "chunk: got 3"),
        (([0, 1], 1, good[:1]), ValueError, "encoded"),
        (([0, 1], 1, good[..., 1:]), ValueError, "encoded"),
        (([0, 1], 1, good.double()), TypeError, "encoded"),
        (([0, 1], 1, good.long()), TypeError, "encoded"),
        (([0, 1], 1, good.to("meta")), ValueError, "encoded"),
        (([0, 1], 1, good, mask.int()), TypeError, "neighbour_mask"),
        (([0, 1], 1, good, mask[:, :1]), ValueError, "neighbour_mask"),
    ]:
        with pytest.raises(kind, match=message):
            cache.fill(*arguments)
    for call in (cache.join, cache.leave):
        with pytest.raises(ValueError, match="slots: got 3"):
            call([0, 3])
    hidden, position = torch.randn(B, 1, DIM), torch.tensor([M - 1, M, 0])
    for arguments, kind, message in [
        ((hidden, cache.chunk, position), TypeError, "cache: got Tensor"),
        ((hidden[:2], cache, position), ValueError, "hidden"),
        ((hidden[..., 1:], cache, position), ValueError, "hidden"),
        ((hidden.long(), cache, position), TypeError, "hidden"),
        ((hidden.to("meta"), cache, position), ValueError, "hidden"),
        ((hidden, cache, position.int()), TypeError, "position"),
        ((hidden, cache, position[:2]), ValueError, "position"),
        ((hidden, cache, torch.tensor([M - 1, 2 * M - 1, 0])), ValueError, "holds chunk 0"),  # beyond the cache
        ((hidden.expand(B, 2, DIM), cache, torch.tensor([M, 2 * M - 2, 0])), ValueError, "border"),
        ((hidden, cache, torch.tensor([M - 1, -1, 0])), ValueError, "position: got -1"),
    ]:
        with pytest.raises(kind, match=message):
            layer.decode(*arguments)
    with pytest.raises(ValueError, match="cache"):
        other.decode(hidden, cache, position)
    assert all(torch.equal(x, y) for x, y in zip(tensors, before))
    cache.join(2)
    with pytest.raises(ValueError, match="holds chunk -1"):  # it was never filled
        layer.decode(hidden, cache, torch.tensor([M - 1, M, M - 1]))
    layer.dropout = 0.1
    with pytest.raises(ValueError, match="dropout"):
        layer.decode(hidden, cache, position)
    layer.eval().decode(hidden, cache, position)


def test_no_slots_and_no_tokens_are_valid():
    layer = build()
    cache = NeighbourCache([layer], **SIZES)
    none = torch.empty(0, dtype=torch.int64)
    cache.fill([], 0, torch.randn(0, K, R, CONTEXT))
    cache.fill(none, none, torch.randn(0, K, R, CONTEXT))
    cache.join([])
    assert not cache.valid.any()
    assert layer.decode(torch.randn(B, 0, DIM), cache, torch.zeros(B, dtype=torch.int64)).shape == (B, 0, DIM)


def test_wrong_constructor_arguments_are_named():
    layer = build()
    for layers, options, kind, message in [
        ([], {}, ValueError, "layers"),
        ([nn.Linear(2, 2)], {}, TypeError, "layers: got Linear at 0"),
        ([layer, build(chunk_size=8)], {}, ValueError, "chunk_size 8 at 1"),
        ([layer, build(context_dim=CONTEXT + 1)], {}, ValueError, "context_dim"),
        ([layer, build().double()], {}, ValueError, "dtype"),
        ([layer, build(device="meta")], {}, ValueError, "device"),
        ([build(stride=2)], {}, ValueError, "stride"),
        ([layer], {"form": "values"}, ValueError, "form"),
        ([layer], {"dtype": torch.int32}, ValueError, "dtype"),
        ([layer], {"num_slots": 0}, ValueError, "num_slots"),
        ([layer], {"num_neighbours": 2.0}, TypeError, "num_neighbours"),
        ([layer], {"form": "encoded", "one_product": True}, ValueError, "one_product"),
        ([layer, build(positions="rotary")], {"form": "encoded"}, ValueError, r"layers\[1\] has rotary"),
        ([build(positions="bias")], {"retrieved_length": R + 1}, ValueError, "retrieved_length"),
    ]:
        with pytest.raises(kind, match=message):
            NeighbourCache(layers, **{**SIZES, **options})
    layer.w_key = nn.Sequential(layer.w_key)  # as an adapter would
    NeighbourCache([layer], **SIZES).fill(0, 0, torch.randn(1, K, R, CONTEXT))
    with pytest.raises(TypeError, match="w_key"):
        NeighbourCache([layer], form="encoded", **SIZES)
    with pytest.raises(TypeError, match="w_key"):
        project_neighbours([layer], torch.randn(1, K, R, CONTEXT))


def test_bytes_at_7b():
    """The paper's largest model: 32 heads of 128, k = 2 neighbours of 128 tokens, encoder states 896 wide, bf16, 8
    layers with chunked cross-attention (9, 12, ..., 30). The encoded form is at most 1/8 of one layer's keys and values
    and 1/60 of all layers', and int8 about half of bf16, its scales included."""
    layers = [
        ChunkedCrossAttention.paper(4096, num_heads=32, device="meta", dtype=torch.bfloat16) for _ in range(9, 33, 3)
    ]
    assert len(layers) == 8

    def size(number, form, dtype=None, slots=64):
        cache = NeighbourCache(layers[:number], num_slots=slots, num_neighbours=2, form=form, dtype=dtype)
        return cache.bytes

    tokens, rest = 64 * 2 * 128, 64 * (1 + 8)  # the mask is a byte a token; valid and chunk are 1 + 8 bytes a slot
    assert size(1, "key_value") == tokens * (2 * 4096 * 2 + 1) + rest
    assert size(8, "key_value") == tokens * (8 * 2 * 4096 * 2 + 1) + rest
    assert size(8, "encoded") == size(1, "encoded") == tokens * (896 * 2 + 1) + rest
    assert 8 * size(1, "encoded") <= size(1, "key_value")
    assert 60 * size(8, "encoded") <= size(8, "key_value")
    for dtype in QUANTISED:
        assert size(8, "encoded", dtype) == tokens * (896 + 4 + 1) + rest
        assert size(8, "key_value", dtype) == tokens * (8 * 2 * (4096 + 4) + 1) + rest


def test_the_page():
    """The section's snippet runs as it stands."""
    text = (pathlib.Path(__file__).parents[2] / "docs" / "layers.md").read_text()
    section = text.split("## Generation\n", 1)[1].split("\n## ", 1)[0]
    (snippet,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    scope = {"torch": torch, "rk": retro_kernels}
    exec(compile(snippet, "layers.md", "exec"), scope)
    assert scope["position"].tolist() == [130] * 4
    assert not scope["cache"].valid.any()
    assert scope["hidden"].isfinite().all()
