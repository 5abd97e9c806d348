"""`rk.retrofit` on tiny random decoders of every family."""

from __future__ import annotations

import copy
import itertools
import pickle
import warnings

import pytest
import torch

import retro_kernels as rk

transformers = pytest.importorskip("transformers")
from decoders import FAMILIES, SETTINGS, K, M, R, V, batch, decoder  # noqa: E402
from models_common import Lookup  # noqa: E402
from oracle_llama import logits as oracle  # noqa: E402

from retro_kernels.integrations.retrofit.call import ModelCall, joined  # noqa: E402
from retro_kernels.models import Neighbours  # noqa: E402

JOINS = ("softmax", "add")
BOTH = [*((name, "softmax") for name in FAMILIES), ("llama", "add"), ("gpt2", "add")]
OPEN = {"softmax": 1.0, "add": 1.0}


class Retriever(Lookup):
    """Neighbours that are a fixed function of the chunk, and never a special token."""

    def __init__(self):
        super().__init__(V, K, R)

    def of(self, chunks: torch.Tensor) -> Neighbours:
        found = super().of(chunks)
        return found._replace(tokens=2 + found.tokens % (V - 2))


def opened(name="llama", join="softmax", dtype=torch.float32, **changes):
    sizes = {key: changes.pop(key) for key in [*changes] if key.startswith("num_hidden")}
    model = decoder(name, dtype, **sizes)
    rk.retrofit(model, join=join, **{"gate": OPEN[join], **SETTINGS, **changes})
    return model


@pytest.mark.parametrize("name", FAMILIES)
def test_one_softmax_is_the_decoders_own_attention_to_the_neighbour_before_the_text(name):
    """A text of one token after a neighbour stands just where it would in one sequence with it, so that the logits are
    those of the plain decoder on that sequence: of every family, with its projections, norms, rotary tables, windows
    and caps. (The neighbour's first token is seen here.)"""
    model = decoder(name)
    rk.retrofit(model, gate=0.0, chunk_size=1, num_neighbours=1, retrieved_length=8)
    model.retro.visible = lambda mask: mask
    torch.manual_seed(0)
    neighbours, ids = torch.randint(2, V, (2, 1, 1, 8)), torch.randint(2, V, (2, 1))
    place = {} if model.retro.frequencies else {"position_ids": torch.full((2, 1), 8)}
    with torch.no_grad():
        logits = model(ids, neighbours=neighbours, **place).logits[:, 0]
        whole = model(torch.cat([neighbours[:, 0, 0], ids], 1)).logits[:, -1]
        alone = model(ids, **place).logits[:, 0]
    torch.testing.assert_close(logits, whole, rtol=1e-4, atol=1e-5)
    assert (alone - whole).abs().max() > 0.1


@pytest.mark.parametrize("name", ["llama", "phi", "qwen3"])
def test_with_the_texts_own_positions_all_of_it_stands_behind_its_neighbour(name):
    """positions="text": a text whose every token sees one neighbour has the logits of one sequence that begins with it,
    also token by token. (The neighbour's first token is seen here.)"""
    model = decoder(name)
    rk.retrofit(model, gate=0.0, positions="text", chunk_size=1, num_neighbours=1, retrieved_length=8)
    model.retro.visible = lambda mask: mask
    torch.manual_seed(0)
    neighbours, ids = torch.randint(2, V, (2, 1, 1, 8)), torch.randint(2, V, (2, 6))
    each = neighbours.expand(-1, 6, -1, -1)
    with torch.no_grad():
        logits = model(ids, neighbours=each).logits
        whole = model(torch.cat([neighbours[:, 0, 0], ids], 1)).logits[:, 8:]
        begun = model(ids[:, :5], neighbours=each, use_cache=True)
        step = model(ids[:, 5:], neighbours=each, past_key_values=begun.past_key_values).logits[:, 0]
    torch.testing.assert_close(logits, whole, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(step, whole[:, -1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("join", "positions"), [("softmax", "text"), ("softmax", "chunk"), ("add", "chunk")])
def test_a_llama_written_down_token_by_token_and_its_gradients(join, positions):
    """Grouped heads, biases, neighbours that end early or are missing, a last incomplete chunk; gradients of gates and
    of the decoder, which here reads the neighbours with a gradient."""
    model = opened("llama", join, torch.float64, freeze=False, num_hidden_layers=2, positions=positions)
    for part in model.retro.parts():
        part.gate.weight.data = torch.randn(4, dtype=torch.float64)
    ids, neighbours, mask = batch(1, 2 * M + 3)
    mask[0, 1] = False
    weight = torch.randn(ids.shape[1], V, dtype=torch.float64)
    gates = {part.layer: part.gate.weight for part in model.retro.parts()}
    leaves = dict(model.named_parameters())
    with torch.enable_grad():
        found = model(ids, neighbours=neighbours, neighbour_mask=mask).logits[0]
        expected = oracle(model, ids[0], neighbours[0], mask[0], gates, join, M, R)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        ours, theirs = (torch.autograd.grad((x * weight).sum(), list(leaves.values())) for x in (found, expected))
    for name, x, y in zip(leaves, ours, theirs):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("join", JOINS)
def test_neighbours_that_look_at_their_chunk_written_down_and_their_gradients(join):
    """Of the gate, too, that the look at the chunk is behind; in layers 1 and 2, so that it is in layer 1."""
    model = opened("llama", join, torch.float64, freeze=False, encoder="own+cross", layers=[1, 2])
    for part in model.retro.parts():
        part.gate.weight.data = torch.randn(4, dtype=torch.float64)
    first, second = model.retro.parts()
    first.cross.weight.data = torch.randn(4, dtype=torch.float64)
    assert second.cross is None
    ids, neighbours, mask = batch(1, 2 * M + 3)
    neighbours, mask = neighbours[..., :5], mask[..., :5]
    weight = torch.randn(ids.shape[1], V, dtype=torch.float64)
    gates = {1: first.gate.weight, 2: second.gate.weight}
    leaves = dict(model.named_parameters())
    with torch.enable_grad():
        found = model(ids, neighbours=neighbours, neighbour_mask=mask).logits[0]
        expected = oracle(model, ids[0], neighbours[0], mask[0], gates, join, M, R, (1, first.cross.weight))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        ours, theirs = (torch.autograd.grad((x * weight).sum(), list(leaves.values())) for x in (found, expected))
    for name, x, y in zip(leaves, ours, theirs):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi", "gemma2"])
def test_neighbours_that_look_at_their_chunk_are_read_alike_with_and_without_the_cache(name, tmp_path):
    """Closed they are the decoder's own, to the bit. Rotary positions, partly turned and none; a cap; grouped heads; a
    batch padded on the left whose chunks end at different steps, beams, and a prompt in pieces."""
    given = {"layers": [1, 2]}
    model, own = opened(name, encoder="own+cross", **given), opened(name, **given)
    ids, neighbours, mask = batch(3, 22)
    read = {"neighbours": neighbours, "neighbour_mask": mask}
    with torch.no_grad():
        plain = own(ids, **read).logits
        assert torch.equal(model(ids, **read).logits, plain)
        model.retro.force = True  # all is computed
        assert torch.equal(model(ids, **read).logits, plain)
        model.retro.force = False
        model.retro.parts()[0].cross.weight.copy_(torch.tensor([0.7, -0.5, 1.0, 0.0]))
        changed = (model(ids, **read).logits - plain).abs().amax((0, 2)) > 1e-4
        assert changed.nonzero()[0].item() == M - 1
    prompts, there = ids[:, :11], torch.ones(3, 11, dtype=torch.long)
    for row, width in zip(there, (3, 8, 0)):
        row[:width] = 0
    more = {"retriever": Retriever(), "max_new_tokens": 11, "pad_token_id": 0, "do_sample": False}
    out = model.generate(prompts, attention_mask=there, **more)
    assert torch.equal(out, model.generate(prompts, attention_mask=there, use_cache=False, **more))
    for row, width in enumerate((3, 8, 0)):
        assert torch.equal(model.generate(prompts[row : row + 1, width:], **more)[0], out[row, width:])
    beams = {**more, "num_beams": 2, "attention_mask": there}
    assert torch.equal(model.generate(prompts, **beams), model.generate(prompts, use_cache=False, **beams))
    with torch.no_grad():
        whole = model(ids, retriever=Retriever()).logits
        cache, parts = transformers.DynamicCache(), []
        for start, end in itertools.pairwise((0, 5, 6, 9, 17, 18, 22)):
            parts.append(model(ids[:, start:end], past_key_values=cache, retriever=Retriever()).logits)
        torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-5)
    model.retro.save_pretrained(tmp_path)
    again = decoder(name)
    rk.retrofit(again, tmp_path)
    assert torch.equal(again.generate(prompts, attention_mask=there, **more), out)


def test_where_neighbours_cannot_look_at_their_chunk_is_said():
    model = opened(encoder="own+cross").train()
    _checkpoint(model, use_reentrant=False)
    with pytest.raises(ValueError, match="under gradient checkpointing"):
        gradients(model)
    with pytest.raises(ValueError, match="expected 0 too"):
        model.retro.keep_layers([1])
    model = opened(encoder="own+cross", num_hidden_layers=1)
    ids, neighbours, mask = batch()
    given = {"neighbours": neighbours, "neighbour_mask": mask, "use_cache": False}
    with torch.no_grad(), pytest.raises(torch._dynamo.exc.Unsupported, match=r"under torch\.compile, expected"):
        torch.compile(model, backend="eager", fullgraph=True)(ids, **given)
    model = decoder("mistral", sliding_window=5)
    rk.retrofit(model, encoder="own+cross", gate=1.0, **SETTINGS)
    with torch.no_grad():
        model.retro.parts()[0].cross.weight.fill_(1.0)
    with pytest.raises(ValueError, match=r"keeps \d tokens, expected a whole chunk of 8"):
        model.generate(batch(1, 3)[0], retriever=Retriever(), max_new_tokens=9, pad_token_id=0)


@pytest.mark.parametrize("join", JOINS)
@pytest.mark.parametrize("name", FAMILIES)
def test_closed_gates_are_the_base_to_the_bit_and_neighbours_change_nothing_before_their_row(name, join):
    model = decoder(name)
    ids, neighbours, mask = batch()
    with torch.no_grad():
        base = model(ids).logits
        names, trained = set(model.state_dict()), [x.requires_grad for x in model.parameters()]
        report = rk.retrofit(model, join=join, **SETTINGS)
        assert torch.equal(model(ids).logits, base)
        model.retro.close_gates()
        model.retro.force = True  # all is computed, and none of it is seen
        assert torch.equal(model(ids, neighbours=neighbours, neighbour_mask=mask).logits, base)
        model.retro.force = False
        model.retro.set_gates(OPEN[join])
        logits = model(ids, neighbours=neighbours, neighbour_mask=mask).logits
        assert torch.equal(logits[:, : M - 1], base[:, : M - 1])
        assert not torch.equal(logits[:, M - 1], base[:, M - 1])
        other = neighbours.clone()
        other[:, 1] = (other[:, 1] + 1) % V
        changed = (model(ids, neighbours=other, neighbour_mask=mask).logits != logits).any(-1).any(0)
        assert changed.nonzero()[0].item() == 2 * M - 1
    assert names < set(model.state_dict())
    assert isinstance(model, transformers.PreTrainedModel)
    report.undo()
    report.undo()
    assert set(model.state_dict()) == names
    assert [x.requires_grad for x in model.parameters()] == trained
    assert torch.equal(model(ids).logits, base)


@pytest.mark.parametrize(("name", "join"), BOTH)
def test_generation_from_the_cache_is_what_computing_it_all_again_gives(name, join):
    """In a batch padded on the left, whose chunks end at different steps; by beams, several texts of each; and each
    text alone."""
    model = opened(name, join)
    ids, _, _ = batch(3, 11)
    padding = (3, 8, 0)
    mask = torch.ones_like(ids)
    for row, width in zip(mask, padding):
        row[:width] = 0
    retriever = Retriever()
    given = {"retriever": retriever, "max_new_tokens": 11, "pad_token_id": 0, "do_sample": False}
    out = model.generate(ids, attention_mask=mask, **given)
    found = model.retro.sources(out, mask)
    assert torch.equal(out, model.generate(ids, attention_mask=mask, use_cache=False, **given))
    assert not torch.equal(out, model.generate(ids, attention_mask=mask, **{**given, "retriever": None}))
    for row, width in enumerate(padding):
        alone = model.generate(ids[row : row + 1, width:], **given)
        assert torch.equal(alone[0], out[row, width:])
        # The chunk that the last token completes is retrieved by the step that would come next.
        chunks = out[row, width:-1].unfold(0, M, M)
        assert [found[row][u] for u in range(len(chunks))] == retriever.of(chunks).sources
    beams = {**given, "num_beams": 2, "num_return_sequences": 2, "attention_mask": mask, "max_new_tokens": 9}
    assert torch.equal(model.generate(ids, **beams), model.generate(ids, use_cache=False, **beams))


class FewTokens:
    """Counts the tokens that the embedding is asked for, of texts and of neighbours."""

    def __init__(self, model):
        self.seen = []
        model.get_input_embeddings().register_forward_hook(
            lambda _, given, out: self.seen.append(tuple(given[0].shape))
        )


@pytest.mark.parametrize("adapt", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_one_new_token_gets_the_logits_of_the_whole_text(name, adapt):
    """Steps take both attentions under one softmax in a way of their own: heads of every bias, closed ones too, in a
    batch of which one text is padded."""
    model = opened(name, adapt=adapt)
    torch.manual_seed(0)
    with torch.no_grad():
        for part in model.retro.parts():
            part.gate.weight.copy_(torch.tensor([-torch.inf, -1.0, 0.5, 2.0]))
            for x in (part.query_map, part.value_map) if adapt else ():
                x.weight.normal_(std=0.2)
    ids, _, _ = batch(2, 27)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    retriever, n = Retriever(), 22
    place = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        whole = model(ids, attention_mask=mask, position_ids=place, retriever=retriever).logits
        first = {"attention_mask": mask[:, :n], "position_ids": place[:, :n], "use_cache": True}
        cache = model(ids[:, :n], retriever=retriever, **first).past_key_values
        for i in range(n, 27):
            given = {"attention_mask": mask[:, : i + 1], "past_key_values": cache, "retriever": retriever}
            step = model(ids[:, i : i + 1], position_ids=place[:, i : i + 1], **given).logits
            torch.testing.assert_close(step, whole[:, i : i + 1], rtol=1e-4, atol=1e-4)


def test_a_token_costs_a_step_and_a_chunk_its_neighbours_once():
    model, retriever = opened(), Retriever()
    ids, _, _ = batch(2, 2 * M)
    count = FewTokens(model)
    model.generate(ids, retriever=retriever, max_new_tokens=2 * M, do_sample=False, pad_token_id=0)
    steps = [shape for shape in count.seen if shape[1] == 1]
    assert len(steps) == 2 * M - 1
    (prompts, r), prompt, (completed, _) = [shape for shape in count.seen if shape[1] != 1]
    assert (r, prompt) == (R, (2, 2 * M))
    assert prompts <= 2 * 2 * K  # 2 chunks of 2 rows; equal neighbours are read once
    assert completed <= 2 * K
    assert [len(call) for call in retriever.calls] == [4, 2]


def test_equal_neighbours_are_read_once():
    model, retriever = opened(), Retriever()
    ids = batch(1, M)[0].expand(3, -1)
    count = FewTokens(model)
    model.generate(ids, retriever=retriever, max_new_tokens=1, pad_token_id=0)
    assert count.seen == [(K, R), (3, M)]


def test_sampling_draws_the_same_tokens_with_and_without_the_cache():
    model, retriever = opened(), Retriever()
    ids, _, _ = batch(1, 13)
    given = {"do_sample": True, "num_return_sequences": 3, "retriever": retriever, "max_new_tokens": 12}
    out = []
    for cached in (True, False):
        torch.manual_seed(5)
        out.append(model.generate(ids, use_cache=cached, pad_token_id=0, **given))
    assert torch.equal(*out)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_assisted_decoding_takes_tokens_back_from_the_cache(name):
    model, retriever = opened(name), Retriever()
    ids, _, _ = batch(1, 13)
    given = {"retriever": retriever, "max_new_tokens": 24, "do_sample": False, "pad_token_id": 0}
    plain = model.generate(ids, **given)
    assert torch.equal(model.generate(ids, prompt_lookup_num_tokens=3, **given), plain)
    assert plain.shape[1] == 37


def test_a_cache_may_be_filled_piece_by_piece_and_cropped():
    model = opened()
    ids, neighbours, mask = batch(2, 30)
    given = {"neighbours": neighbours, "neighbour_mask": mask}
    with torch.no_grad():
        whole = model(ids, **given).logits
        for cuts in ((0, 3, 11, 30), (0, 7, 8, 30), (0, 16, 17, 18, 30)):
            cache, parts = transformers.DynamicCache(config=model.config), []
            for start, end in itertools.pairwise(cuts):
                out = model(ids[:, start:end], past_key_values=cache, **given)
                parts.append(out.logits)
            torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-5)
        cache.crop(-17)
        again = model(ids[:, 13:], past_key_values=cache, **given).logits
        torch.testing.assert_close(again, whole[:, 13:], rtol=1e-4, atol=1e-5)
        cache.crop(3 - 30)  # before the first chunk's end: what was read of it is seen no more
        again = [model(ids[:, i : i + 1], past_key_values=cache, **given).logits for i in range(3, 10)]
        torch.testing.assert_close(torch.cat(again, 1), whole[:, 3:10], rtol=1e-4, atol=1e-5)


def test_neighbours_of_the_prompt_serve_a_generation_without_a_retriever():
    model = opened()
    ids, neighbours, mask = batch(2, 2 * M)
    given = {"neighbours": neighbours, "neighbour_mask": mask, "do_sample": False, "pad_token_id": 0}
    out = model.generate(ids, max_new_tokens=M, **given)
    no = torch.zeros(2, 1, K, R, dtype=torch.long)
    longer = {
        "neighbours": torch.cat([neighbours, no], 1),
        "neighbour_mask": torch.cat([mask, no.bool()], 1),
    }
    with torch.no_grad():
        logits = model(out, **longer).logits
    assert torch.equal(logits[:, 2 * M - 1 : -1].argmax(-1), out[:, 2 * M :])


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_makes_no_difference(side):
    model = opened()
    ids, neighbours, mask = batch(1, 20)
    with torch.no_grad():
        plain = model(ids, neighbours=neighbours, neighbour_mask=mask).logits
        pad = torch.zeros(1, 5, dtype=torch.long)
        left = side == "left"
        padded = torch.cat([pad, ids] if left else [ids, pad], 1)
        there = torch.cat([pad, torch.ones_like(ids)] if left else [torch.ones_like(ids), pad], 1)
        more = torch.cat([neighbours, neighbours[:, :1]], 1), torch.cat([mask, mask[:, :1]], 1)
        given = {"neighbours": more[0], "neighbour_mask": more[1], "attention_mask": there}
        if left:
            given["position_ids"] = (there.cumsum(1) - 1).clamp(min=0)
        logits = model(padded, **given).logits
    torch.testing.assert_close(logits[:, 5:] if left else logits[:, :20], plain, rtol=1e-4, atol=1e-5)


def test_what_a_masked_neighbour_token_is_reaches_nothing():
    model = opened()
    ids, neighbours, mask = batch()
    with torch.no_grad():
        first = model(ids, neighbours=neighbours, neighbour_mask=mask).logits
        other = torch.where(mask, neighbours, -1)
        assert torch.equal(model(ids, neighbours=other, neighbour_mask=mask).logits, first)
        # Neither does a hole within a neighbour.
        mask[0, 0, 0, 4] = False
        a = model(ids, neighbours=neighbours, neighbour_mask=mask).logits
        neighbours[0, 0, 0, 4] = 3
        assert torch.equal(model(ids, neighbours=neighbours, neighbour_mask=mask).logits, a)


def test_a_layer_whose_gates_are_closed_runs_nothing_of_ours(monkeypatch):
    model = opened()
    ids, neighbours, mask = batch()
    count = FewTokens(model)
    model.retro.close_gates()
    with torch.no_grad():
        model(ids, neighbours=neighbours, neighbour_mask=mask)
    assert count.seen == [tuple(ids.shape)]
    model.retro.parts()[1].gate.weight.data[2] = 0.0
    layers, attention = [], ModelCall.keys_and_values
    monkeypatch.setattr(
        ModelCall, "keys_and_values", lambda self, part: (layers.append(part.layer), attention(self, part))[1]
    )
    with torch.no_grad():
        model(ids, neighbours=neighbours, neighbour_mask=mask)
    assert layers == [1]


def test_neighbours_are_read_up_to_the_highest_open_layer_and_the_cache_keeps_no_other():
    model = opened()
    ran = []
    for i, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_hook(lambda module, given, out, i=i: ran.append((i, out.shape[-2])))
    ids, _, _ = batch(1, M)
    with torch.no_grad():
        whole = model(ids, retriever=Retriever()).logits
        assert [i for i, n in ran if n == R] == [0, 1]  # of the last layer, only its keys and values
        model.retro.parts()[2].gate.weight.fill_(-torch.inf)
        ran.clear()
        given = {"retriever": Retriever(), "use_cache": True}
        cache = model(ids, **given).past_key_values
        assert [i for i, n in ran if n == R] == [0]
        model(ids[:, :1], past_key_values=cache, **given)
        assert set(cache.retro.held) == {0, 1}
        model.retro.set_gates(0.0)
        with pytest.raises(ValueError, match=r"while the gates of layers \[2\] were closed"):
            model(ids[:, :1], past_key_values=cache, **given)
    assert whole.shape == (1, M, V)


@pytest.mark.parametrize("join", JOINS)
def test_gains_are_what_closing_a_head_costs_and_layers_that_are_not_kept_are_the_bases(join, tmp_path):
    model = opened(join=join, dtype=torch.float64)
    with torch.no_grad():
        for part in model.retro.parts():
            part.gate.weight.copy_(torch.randn(4))
    ids, neighbours, mask = batch()
    given = {"neighbours": neighbours, "neighbour_mask": mask}
    found = model.retro.gains(ids, **given)

    def loss():
        logits = model(ids, **given).logits[:, M - 1 : -1]
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, M:].flatten()).item()

    with torch.no_grad():
        model.retro.shares = {part.layer: torch.ones(4, dtype=torch.float64) for part in model.retro.parts()}
        for layer, head in ((0, 1), (2, 3)):
            losses = []
            for share in (1 + 1e-2, 1 - 1e-2):  # norms are in fp32
                model.retro.shares[layer][head] = share
                losses.append(loss())
            model.retro.shares[layer][head] = 1.0
            slope = (losses[1] - losses[0]) / 2e-2
            assert found[layer][head].item() == pytest.approx(slope, rel=1e-3, abs=1e-5)
        model.retro.shares = None
        model.retro.close_gates()
        model.retro.parts()[1].gate.weight.fill_(1.0)
        expected = model(ids, **given).logits
        model.retro.keep_layers([1])
        assert torch.equal(model(ids, **given).logits, expected)
    assert [hasattr(layer.self_attn, "retro") for layer in model.model.layers] == [False, True, False]
    model.retro.save_pretrained(tmp_path)
    again = decoder(dtype=torch.float64)
    report = rk.retrofit(again, tmp_path)
    assert (report.layers, report.added) == ([1], 4)
    with torch.no_grad():
        assert torch.equal(again(ids, **given).logits, expected)
    for wrong in ([], [0]):
        with pytest.raises(ValueError, match=r"expected some of \[1\]"):
            model.retro.keep_layers(wrong)
    model.retro.undo()
    assert not any("retro" in name for name in model.state_dict())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_short_join_is_join_attention(dtype):
    torch.manual_seed(0)
    given = [torch.randn(6, 3, 4).to(dtype), torch.randn(6, 3), torch.randn(6, 3, 4).to(dtype), torch.randn(6, 3)]
    given[3][:2] = -torch.inf
    given[1][0] = -torch.inf  # a row of padding
    found = joined(*given)
    assert torch.equal(found[:2], given[0][:2])
    torch.testing.assert_close(found[1:], rk.join_attention(*given)[0][1:])
    for x in given:
        x.requires_grad_()
    for x in torch.autograd.grad(joined(*given).float().sum(), given):
        assert torch.isfinite(x).all()


def gradients(model, **given):
    ids, neighbours, mask = batch()
    model.zero_grad()
    model(ids, neighbours=neighbours, neighbour_mask=mask, labels=ids, **given).loss.backward()
    return {name: x.grad.clone() for name, x in model.named_parameters() if x.grad is not None}


def test_a_closed_factor_learns():
    model = opened(join="add", gate=0.0)
    found = gradients(model)
    assert set(found) == {f"model.layers.{i}.self_attn.retro.gate.weight" for i in range(3)}
    assert all(x.abs().min() > 0 for x in found.values())


@pytest.mark.parametrize(
    ("name", "join", "freeze"),
    [("llama", "softmax", True), ("llama", "softmax", False), ("llama", "add", False), ("gpt2", "softmax", False)],
)
def test_gradients_under_checkpointing(name, join, freeze):
    model = opened(name, join, freeze=freeze).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    plain = gradients(model)
    assert len(plain) == 3 or not freeze
    _checkpoint(model, use_reentrant=False)
    again = gradients(model)
    assert set(again) == set(plain)
    for key, value in plain.items():
        torch.testing.assert_close(again[key], value, rtol=1e-5, atol=1e-7)
    _checkpoint(model, use_reentrant=True)
    model.enable_input_require_grads()
    with pytest.raises(RuntimeError, match="use_reentrant"):
        gradients(model)


def _checkpoint(model, use_reentrant):
    with warnings.catch_warnings():  # transformers has a new name for it
        warnings.simplefilter("ignore", FutureWarning)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})


def test_a_deep_copy_and_a_pickle_are_models_of_their_own():
    model = opened()
    ids, neighbours, mask = batch()
    given = {"neighbours": neighbours, "neighbour_mask": mask}
    with torch.no_grad():
        logits = model(ids, **given).logits
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(other(ids, **given).logits, logits)
            other.retro.close_gates()
            assert torch.equal(other(ids, **given).logits, other(ids).logits)
            assert torch.equal(model(ids, **given).logits, logits)
            other.retro.undo()
            assert set(other.state_dict()) < set(model.state_dict())


def test_a_cast_model_computes_in_its_type():
    model = opened()
    ids, neighbours, mask = batch()
    given = {"neighbours": neighbours, "neighbour_mask": mask}
    with torch.no_grad():
        exact = model(ids, **given).logits
        off = model(ids).logits
        model.to(torch.bfloat16)
        cast, plain = model(ids, **given).logits.float(), model(ids).logits.float()
    assert (cast - exact).norm() < 3 * (plain - off).norm()


def test_the_implementation_of_attention_may_be_changed_afterwards():
    model = opened()
    ids, neighbours, mask = batch()
    with torch.no_grad():
        out = model(ids, neighbours=neighbours, neighbour_mask=mask).logits
        model.set_attn_implementation("eager")
        again = model(ids, neighbours=neighbours, neighbour_mask=mask).logits
    torch.testing.assert_close(again, out, rtol=1e-4, atol=1e-5)


def test_compiled_it_is_one_graph():
    model = opened(num_hidden_layers=1)
    ids, neighbours, mask = batch()
    given = {"neighbours": neighbours, "neighbour_mask": mask, "use_cache": False}
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(ids, **given).logits, model(ids, **given).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("join", JOINS)
def test_saved_and_put_on_the_base_again(tmp_path, join):
    model = opened(join=join, layers=[0, 2], tokenizer="words", positions="text")
    for i, part in enumerate(model.retro.parts()):
        part.gate.weight.data += 0.1 * i
    model.retro.save_pretrained(tmp_path / "retro")
    ids, neighbours, mask = batch()
    given = {"neighbours": neighbours, "neighbour_mask": mask}
    base = decoder()
    rk.retrofit(base, tmp_path / "retro")
    assert base.retro.settings == model.retro.settings
    with torch.no_grad():
        assert torch.equal(base(ids, **given).logits, model(ids, **given).logits)
    half = decoder(dtype=torch.bfloat16)
    rk.retrofit(half, tmp_path / "retro")
    other = decoder(seed=1)
    with pytest.raises(ValueError, match="weights are not those"):
        rk.retrofit(other, tmp_path / "retro")
    assert not hasattr(other, "retro")
    with pytest.raises(FileNotFoundError, match=r"retro\.json"):
        rk.retrofit(decoder(), tmp_path)
    path, older = tmp_path / "retro" / "retro.json", decoder()
    path.write_text(path.read_text().replace('"positions": "text",', ""))
    rk.retrofit(older, tmp_path / "retro")  # written when there was no choice
    assert older.retro.positions == "chunk"
    for name in ("retro.safetensors", "retro.json"):
        content = (tmp_path / "retro" / name).read_bytes()
        (tmp_path / "retro" / name).write_bytes(content[: len(content) // 2])
        base = decoder()
        with pytest.raises(ValueError, match=rf"{name}: cannot be read"):
            rk.retrofit(base, tmp_path / "retro")
        assert not hasattr(base, "retro")
        (tmp_path / "retro" / name).write_bytes(content)


def test_the_base_is_saved_and_loaded_as_ever(tmp_path):
    model = opened("gemma2")  # its embeddings are tied
    ids, _, _ = batch()
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)


class Table(torch.nn.Module):
    """An encoder that is a table."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inner = torch.nn.Embedding(V, 20)

    def forward(self, tokens, mask):
        return self.inner(tokens)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("join", JOINS)
@pytest.mark.parametrize("encoder", ["fresh", Table])
def test_other_encoders(tmp_path, name, join, encoder):
    encoder = encoder if isinstance(encoder, str) else encoder()
    model = opened(name, join, encoder=encoder, init="random")
    assert torch.equal(decoder(name)(batch()[0]).logits, model(batch()[0]).logits)
    found = gradients(model)
    trained = {key for key, x in model.named_parameters() if x.requires_grad}
    assert set(found) == trained
    assert any(key.startswith("retro.encoder.") for key in trained)
    ids, _, _ = batch(2, 11)
    given = {"retriever": Retriever(), "max_new_tokens": 15, "pad_token_id": 0, "do_sample": False}
    assert torch.equal(model.generate(ids, **given), model.generate(ids, use_cache=False, **given))
    model.retro.save_pretrained(tmp_path)
    base = decoder(name)
    rk.retrofit(base, tmp_path, encoder="own" if isinstance(encoder, str) else Table())
    ids, neighbours, mask = batch()
    with torch.no_grad():
        expected = model(ids, neighbours=neighbours, neighbour_mask=mask).logits
        assert torch.equal(base(ids, neighbours=neighbours, neighbour_mask=mask).logits, expected)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "phi", "opt"])
def test_new_projections_begin_as_copies_of_the_layers_own(name):
    """Of what the layer itself reads they make its keys and values: fused, biased, partly turned."""
    own, fresh = opened(name), opened(name, encoder="fresh")
    tokens = batch()[1][0, 0]
    read = {}
    for attention in own.retro.attentions():
        attention.register_forward_pre_hook(
            lambda module, args, kwargs: read.update({module.layer_idx: kwargs.get("hidden_states", *args[:1])}),
            with_kwargs=True,
        )
    with torch.no_grad():
        expected = own.retro.encode(tokens, None)
        for part in fresh.retro.parts():
            frequencies = None if part.rotary is None else fresh.retro.tables()[part.rotary[0]]
            for x, y in zip(part.keys_and_values(read[part.layer], frequencies), expected[part.layer]):
                torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)
    trained = {key for key, x in fresh.named_parameters() if x.requires_grad}
    assert set(gradients(fresh)) == trained


def test_keys_with_norms_cannot_begin_as_copies():
    model = decoder("qwen3")
    before = set(model.state_dict())
    with pytest.raises(ValueError, match="no linear map"):
        rk.retrofit(model, encoder="fresh", **SETTINGS)
    assert set(model.state_dict()) == before
    rk.retrofit(model, encoder="fresh", init="random", **SETTINGS)


@pytest.mark.parametrize("join", JOINS)
def test_maps_of_each_head_change_nothing_at_first_and_learn(tmp_path, join):
    plain, model = opened("qwen2", join), opened("qwen2", join, adapt=True)
    ids, neighbours, mask = batch()
    given = {"neighbours": neighbours, "neighbour_mask": mask}
    with torch.no_grad():
        assert torch.equal(model(ids, **given).logits, plain(ids, **given).logits)
    found = gradients(model)
    assert {key.rpartition(".retro.")[2] for key in found} == {
        "gate.weight",
        "query_map.weight",
        "value_map.weight",
    }
    assert all(x.abs().max() > 0 for x in found.values())
    with torch.no_grad():
        for name, x in model.named_parameters():
            if "_map." in name:
                x.normal_(std=0.3)
    prompt = {"retriever": Retriever(), "max_new_tokens": 15, "pad_token_id": 0, "do_sample": False}
    out = model.generate(ids[:, :11], **prompt)
    assert torch.equal(out, model.generate(ids[:, :11], use_cache=False, **prompt))
    model.retro.save_pretrained(tmp_path)
    again = decoder("qwen2")
    rk.retrofit(again, tmp_path)
    with torch.no_grad():
        logits = model(ids, **given).logits
        assert torch.equal(again(ids, **given).logits, logits)
        # A map of the values is one of what is found: a head's own dimensions, mixed.
        part = model.retro.parts()[0]
        x = torch.randn(3, 4, 8)
        w = part.value_map.weight
        expected = torch.stack([x[:, h] @ (torch.eye(8) + w[h]) for h in range(4)], 1)
        torch.testing.assert_close(part.value_map(x), expected)
        assert not torch.equal(plain(ids, **given).logits, logits)


# -- bad input: a sentence each, and the model as it was


def test_models_that_cannot_be_retrofitted():
    for model, message in (
        (torch.nn.Linear(2, 2), "expected a decoder of transformers"),
        (
            transformers.T5ForConditionalGeneration(
                transformers.T5Config(vocab_size=V, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
            ),
            "an encoder and a decoder",
        ),
        (decoder().model, "predicts no tokens"),
        (
            transformers.BloomForCausalLM(transformers.BloomConfig(vocab_size=V, hidden_size=16, n_layer=1, n_head=2)),
            "AttentionInterface",
        ),
        (
            transformers.GPTJForCausalLM(
                transformers.GPTJConfig(vocab_size=V, n_embd=16, n_layer=1, n_head=2, n_positions=64, rotary_dim=4)
            ),
            "how it knows positions",
        ),
        (decoder(rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}), "dynamic"),
    ):
        before = set(model.state_dict())
        with pytest.raises(ValueError, match=message):
            rk.retrofit(model, **SETTINGS)
        assert set(model.state_dict()) == before
        assert "forward" not in vars(model)
        assert not any("LayerConfig" in type(vars(x).get("config")).__name__ for x in model.modules())
    with pytest.raises(TypeError, match="expected a torch"):
        rk.retrofit("model")
    model = decoder()
    rk.retrofit(model, **SETTINGS)
    with pytest.raises(ValueError, match="retrofitted already"):
        rk.retrofit(model, **SETTINGS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": [3]}, r"layers: got 3, expected some of \[0, 1, 2\]"),
        ({"layers": []}, "at least one"),
        ({"layers": [1, 1]}, "none twice"),
        ({"join": "sum"}, "join: got 'sum'"),
        ({"encoder": "big"}, "encoder: got 'big'"),
        ({"init": "random"}, 'init: got "random"'),
        ({"positions": "rows"}, "positions: got 'rows'"),
        ({"encoder": Table()}, "states are 20 wide, expected 32"),
        ({"chunk_size": 0}, "chunk_size: got 0"),
        ({"encoder": torch.nn.Identity(), "init": "random"}, "encoder: gave"),
    ],
)
def test_wrong_settings_are_named_and_leave_the_model_alone(change, message):
    model = decoder()
    base = set(model.state_dict())
    encoder = change.get("encoder")
    if isinstance(encoder, torch.nn.Identity):
        encoder.forward = lambda tokens, mask: tokens
    with pytest.raises(ValueError, match=message):
        rk.retrofit(model, **{**SETTINGS, **change})
    assert set(model.state_dict()) == base
    assert "forward" not in vars(model)


def test_wrong_neighbours_are_named():
    model = opened(tokenizer="words")
    ids, neighbours, mask = batch()
    for change, message in (
        ({"neighbours": neighbours[0]}, r"expected \[b, l, k, r\]"),
        ({"neighbours": neighbours.float()}, "neighbours: got dtype"),
        ({"neighbours": neighbours[:1]}, "got batch 1, expected 2"),
        ({"neighbours": neighbours[:, :1], "neighbour_mask": mask[:, :1]}, "got l = 1 chunks, expected at least 3"),
        ({"neighbours": torch.cat([neighbours] * 2, -1), "neighbour_mask": None}, "of r = 24 tokens"),
        ({"neighbour_mask": mask[:, :1]}, "neighbour_mask: got shape"),
        ({"neighbours": None}, "without neighbours"),
        ({"neighbours": neighbours + V}, "of another tokenizer"),
        ({"attention_mask": torch.ones(2, 1, 30, 30)}, r"attention_mask: got shape \[2, 1"),
        ({"retriever": 3}, "retriever: got int"),
        ({"neighbors": neighbours}, "got the argument 'neighbors', expected 'neighbours'"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            model(ids, **{"neighbours": neighbours, "neighbour_mask": mask, **change})
    retriever = Retriever()
    right = torch.ones_like(ids)
    right[0, -3:] = 0
    with pytest.raises(ValueError, match="padding on the right"):
        model.generate(ids, attention_mask=right, retriever=retriever, max_new_tokens=2, pad_token_id=0)
    retriever.tokenizer = "letters"
    with pytest.raises(ValueError, match="tokenizer 'letters', expected 'words'"):
        model(ids, retriever=retriever)
    with pytest.raises(ValueError, match="gave tokens of shape"):
        model(ids, retriever=lambda chunks: Neighbours(torch.zeros(1, 1, 1, dtype=torch.long)))
    with pytest.raises(ValueError, match="whose size is fixed"):
        model.generate(ids, retriever=Retriever(), cache_implementation="static", max_new_tokens=2, pad_token_id=0)
    plain = model(ids, use_cache=True)
    with pytest.raises(ValueError, match="read without neighbours"):
        model(ids[:, :1], past_key_values=plain.past_key_values, retriever=Retriever())


def test_neighbours_that_change_nothing_are_pointed_out():
    model = opened()
    ids, neighbours, mask = batch()
    with pytest.warns(RuntimeWarning, match="changed nothing.*every token of the neighbours is masked"):
        model(ids, neighbours=neighbours, neighbour_mask=torch.zeros_like(mask))
