"""Generation: every token computed once equals everything computed anew, and each argument does what it says."""

from __future__ import annotations

import pytest
import torch
from models_common import Lookup, tiny

from retro_kernels.models import Neighbours
from retro_kernels.models.generation import Decoder, Retrieval, Sampling

PROMPTS = [[1, 2, 3], [5, 9, 33, 12, 7, 7, 60, 2, 41], [8] * 12, [3]]


def full_logits(model, sequence, lookup, stride, stale):
    """Of the last token, everything computed anew."""
    m, every = model.config.chunk_size, stride // model.config.chunk_size
    chunks = torch.tensor(sequence[: len(sequence) // m * m]).view(1, -1, m)
    if lookup is None or chunks.shape[1] == 0:
        return model(torch.tensor([sequence]))[0, -1]
    found = lookup.of(chunks[0])
    tokens, mask = found.tokens.clone(), found.mask.clone()
    for u in range(chunks.shape[1]):
        origin = u // every * every - (1 if stale else 0)
        tokens[u] = found.tokens[max(origin, 0)]
        mask[u] = found.mask[origin] if origin >= 0 else False
    return model(torch.tensor([sequence]), tokens[None], mask[None])[0, -1]


@pytest.mark.parametrize(
    ("preset", "stride", "stale", "form", "retrieves"),
    [
        ("tiny", 4, False, "key_value", True),
        ("tiny", 4, False, "encoded", True),
        ("tiny", 8, True, "key_value", True),
        ("tiny-rotary", 4, True, "key_value", True),
        ("tiny-rotary", 8, False, "key_value", True),
        ("tiny", 4, False, "key_value", False),
        ("tiny-rotary", 4, False, "key_value", False),
    ],
)
def test_incremental_equals_full_recomputation(preset, stride, stale, form, retrieves):
    model = tiny(preset)
    lookup = Lookup() if retrieves else None
    sequences = [list(prompt) for prompt in PROMPTS]
    retrieval = Retrieval(model, lookup, PROMPTS, None, stride, stale) if lookup else None
    decoder = Decoder(model, sequences, 40, retrieval, form)
    with torch.no_grad():
        logits = decoder.prefill()
        for step in range(15):
            for i, sequence in enumerate(sequences):
                expected = full_logits(model, sequence, lookup, stride, stale)
                torch.testing.assert_close(logits[i], expected, rtol=1e-4, atol=2e-5)
                sequence.append((7 * step + 13 * i) % 64)
            logits = decoder.step()
    if retrieval is not None:
        retrieval.close()


def test_each_chunk_is_retrieved_and_encoded_once_and_alone():
    model, lookup = tiny(), Lookup()
    encoded = []
    model.encoder.register_forward_pre_hook(lambda module, arguments: encoded.append(tuple(arguments[0].shape[:2])))
    out = model.generate([PROMPTS[1]], retriever=lookup, max_new_tokens=9)
    assert out.lengths == [18]
    asked = torch.cat(lookup.calls)
    assert torch.equal(asked, out.sequences[0, :16].view(4, 4))  # the last token completes no chunk
    assert encoded == [(1, 2), (1, 1), (1, 1)]  # the prompt's two chunks, then one at a time
    assert out.sources[0] == dict(enumerate(lookup.of(asked).sources))
    assert len(out.new_tokens(0)) == 9


@pytest.mark.parametrize("do_sample", [False, True])
def test_a_sequence_does_not_depend_on_the_others_of_its_batch(do_sample):
    model = tiny()
    options = {"retriever": Lookup(), "max_new_tokens": 12, "do_sample": do_sample}
    together = model.generate(PROMPTS, seed=5, **options)
    for i, prompt in enumerate(PROMPTS):
        alone = model.generate([prompt], seed=5 + i, **options)
        assert alone.new_tokens(0) == together.new_tokens(i)
    width = max(map(len, PROMPTS))
    padded = torch.tensor([[0] * (width - len(p)) + p for p in PROMPTS])
    there = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in PROMPTS])
    again = model.generate(padded, attention_mask=there, seed=5, **options)
    assert torch.equal(again.sequences, together.sequences)


def test_sampling():
    logits = torch.tensor([[2.0, 1.0, 0.5, -1.0]])
    draw = lambda **o: [  # noqa: E731
        Sampling(**o).choose(logits, [[]], [torch.Generator().manual_seed(seed)])[0] for seed in range(400)
    ]
    assert set(draw()) == {0}
    assert set(draw(do_sample=True, top_k=1)) == {0}
    assert set(draw(do_sample=True, top_k=2)) == {0, 1}
    assert set(draw(do_sample=True, top_p=0.5)) == {0}  # the first has 0.6
    assert set(draw(do_sample=True, top_p=0.7)) == {0, 1}
    assert set(draw(do_sample=True)) == {0, 1, 2, 3}
    assert set(draw(do_sample=True, temperature=0.01)) == {0}
    assert set(draw(do_sample=True, temperature=0.0, top_k=3)) == {0}
    assert set(draw(temperature=0.0)) == {0}
    share = draw(do_sample=True).count(0) / 400
    assert abs(share - float(logits.softmax(-1)[0, 0])) < 0.1
    assert Sampling(repetition_penalty=4.0).choose(logits, [[0, 0]], []) == [1]  # 2 / 4 < 1
    assert Sampling(repetition_penalty=1.5).choose(logits, [[0]], []) == [0]
    assert Sampling(repetition_penalty=9.0).choose(logits - 3, [[3, 0, 1]], []) == [2]
    assert Sampling(repetition_penalty=0.5).choose(logits - 3, [[2]], []) == [0]
    assert logits[0, 0] == 2.0


def test_ends_of_a_sequence():
    class Tokenizer:
        def decode(self, tokens):
            return "".join(chr(65 + t) for t in tokens)

    class Streamer:
        def __init__(self):
            self.put_tokens, self.ended = [], False

        def put(self, tokens):
            self.put_tokens += tokens.flatten().tolist()

        def end(self):
            self.ended = True

    model = tiny()
    free = model.generate(PROMPTS, max_new_tokens=12, do_sample=True).new_tokens
    options = {"max_new_tokens": 12, "do_sample": True, "pad_token_id": 7}
    eos = free(1)[5]
    ended = model.generate(PROMPTS, eos_token_id=eos, **options)
    for i in range(len(PROMPTS)):
        whole = free(i)
        kept = whole[: whole.index(eos) + 1] if eos in whole else whole
        assert ended.new_tokens(i) == kept
        assert ended.sequences[i, ended.lengths[i] :].eq(7).all()
    text = Tokenizer().decode(free(2))
    stopped = model.generate(PROMPTS, stop_strings=text[3:5], tokenizer=Tokenizer(), **options)
    assert Tokenizer().decode(stopped.new_tokens(2)) == text[: text.index(text[3:5]) + 2]
    streamer = Streamer()
    out = model.generate([PROMPTS[0]], streamer=streamer, **options)
    assert streamer.ended
    assert streamer.put_tokens == out.sequences[0].tolist()


def test_wrong_arguments_are_named():
    model = tiny(tokenizer="bytes")
    lookup = Lookup()
    lookup.tokenizer = "t5"
    fails = lambda chunks: (_ for _ in ()).throw(OSError("the index is gone"))  # noqa: E731
    for options, error, message in (
        ({"input_ids": []}, ValueError, "input_ids: got no prompt"),
        ({"input_ids": [[1], []]}, ValueError, "an empty one"),
        ({"input_ids": "text"}, TypeError, "input_ids: got 'text', expected tokens"),
        ({"input_ids": [1, 2]}, TypeError, r"input_ids: got \[1, 2\], expected tokens"),
        ({"input_ids": ["text"]}, TypeError, r"input_ids: got \['text'\], expected tokens"),
        ({"input_ids": [[1.5]]}, TypeError, r"input_ids: got \[\[1.5\]\], expected tokens, which are integers"),
        ({"input_ids": [["a"]]}, TypeError, r"input_ids: got \[\['a'\]\], expected tokens, which are integers"),
        ({"eos_token_id": "a"}, TypeError, "eos_token_id: got 'a'"),
        ({"eos_token_id": [3, 64]}, ValueError, "eos_token_id: got 64, expected from 0 to vocab_size - 1 = 63"),
        ({"retriever": "db"}, TypeError, "retriever: got str, expected a Retriever"),
        ({"input_ids": [[64]]}, ValueError, "input_ids: got token 64"),
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens: got 0"),
        ({"temperature": 0.5}, ValueError, "temperature: got a value with do_sample=False"),
        ({"temperature": -0.5, "do_sample": True}, ValueError, "temperature: got -0.5"),
        ({"top_p": 1.5, "do_sample": True}, ValueError, "top_p: got 1.5"),
        ({"top_k": 0, "do_sample": True}, ValueError, "top_k: got 0"),
        ({"stop_strings": "x"}, ValueError, "without a tokenizer"),
        ({"streamer": object(), "input_ids": [[1], [2]]}, ValueError, "expected a single prompt"),
        ({"stale": "yes"}, TypeError, "stale: got 'yes', expected a bool"),
        ({"stale": True}, ValueError, "without a retriever"),
        ({"retriever": lookup}, ValueError, "tokenizer 't5', expected 'bytes'"),
        ({"retriever": Lookup(), "retrieval_stride": 6}, ValueError, "a multiple of chunk_size = 4"),
        ({"retriever": Lookup(k=3)}, ValueError, r"tokens of shape \[2, 3, 8\] for 2 chunks"),
        ({"retriever": Lookup(r=9)}, ValueError, "retrieved_length = 8"),
        ({"retriever": Lookup(vocab_size=1000)}, ValueError, "the retriever's tokens: got token"),
        ({"retriever": lambda chunks: None}, TypeError, "retriever: got NoneType without tokens"),
        ({"retriever": lambda chunks: Neighbours(torch.zeros(1, 2, 8))}, TypeError, "tokens: got dtype"),
        ({"retriever": fails}, OSError, "the index is gone"),
    ):
        with pytest.raises(error, match=message):
            model.generate(**{"input_ids": [PROMPTS[1]], "max_new_tokens": 5, **options})
    with pytest.raises(ValueError, match="no chunked cross-attention"):
        tiny(cross_attention_layers=()).generate([[1]], retriever=Lookup())
    with pytest.raises(ValueError, match="at most max_length = 64"):
        tiny("tiny-rotary").generate([[1]], max_new_tokens=64)
    with pytest.raises(ValueError, match="in training mode"):
        tiny(dropout=0.1).train().generate([[1]])
    padded = torch.tensor([[1, 2, 0], [1, 2, 3]])
    with pytest.warns(UserWarning, match="input_ids: got rows that begin or end with pad_token_id = 0"):
        tiny(pad_token_id=0).generate(padded, max_new_tokens=1)
    tiny(pad_token_id=0).generate(padded, max_new_tokens=1, attention_mask=padded != 0)
    with torch.no_grad():
        model.final_norm.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="model: its logits are NaN"):
        model.generate([[1]])


DIALECTS = {
    "megatron": {
        "positions": "none",
        "absolute_positions": "both",
        "shared_embeddings": True,
        "encoder_dim": 32,
        "norm": "layer",
        "attention_biases": True,
        "feed_forward_biases": True,
        "encoder_conditioning": "normed",
        "encoder_cross_residual": "normed",
        "encoder_final_norm": False,
        "cross_attention_gate": 0.7,
    },
    "megatron, rotary": {
        "positions": "none",
        "self_positions": "rotary",
        "rotary_dim": 8,
        "rotary_interleaved": True,
        "rotary_frequencies": (1.0, 0.3, 0.1, 0.02),
        "num_kv_heads": 1,
        "cross_attention_kv_heads": 2,
        "qk_norm": True,
        "activation": "squared_relu",
    },
    "biases by distance": {"positions": "none", "self_positions": "bias", "self_num_buckets": 9},
}


@pytest.mark.parametrize("partial_chunk", ["zeros", "masked"])
@pytest.mark.parametrize("dialect", DIALECTS)
def test_chunks_that_end_with_the_prompt(dialect, partial_chunk):
    """Prompts of any length, in one batch: every token's logits are those of the whole sequence up to the border of a
    chunk, where aligning to the end and aligning to the prompt mean the same. One prompt is shorter than a chunk."""
    model = tiny(align="end", partial_chunk=partial_chunk, max_length=48, **DIALECTS[dialect])
    m, lookup, sequences = model.config.chunk_size, Lookup(), [list(prompt) for prompt in PROMPTS]
    retrieval = Retrieval(model, lookup, PROMPTS, None, None, False)
    decoder, steps = Decoder(model, sequences, 40, retrieval, "key_value"), []
    with torch.no_grad():
        steps.append(decoder.prefill())
        for step in range(2 * m):
            for i, sequence in enumerate(sequences):
                sequence.append((7 * step + 13 * i) % 64)
            steps.append(decoder.step())
    retrieval.close()
    for i, prompt in enumerate(PROMPTS):
        sequence, n = sequences[i], len(prompt) + 2 * m
        lead = -n % m
        chunks = torch.tensor([0] * lead + sequence[:n]).view(-1, m)
        found = lookup.of(chunks)
        whole = model(torch.tensor([sequence[:n]]), found.tokens[None], found.mask[None])[0]
        for step, logits in enumerate(steps):
            torch.testing.assert_close(logits[i], whole[len(prompt) - 1 + step], rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("dialect", ["biases by distance", "post"])
def test_other_dialects_aligned_to_the_start(dialect):
    """Learned biases by distance; and norms after each part, where a sequence's first chunk changes all its tokens."""
    post = {"norm_position": "post", "norm": "layer", "residual_scale": 1.5, "encoder_residual_scale": 1.2}
    model = tiny(**(post if dialect == "post" else DIALECTS[dialect]))
    lookup, sequences = Lookup(), [list(prompt) for prompt in PROMPTS]
    retrieval = Retrieval(model, lookup, PROMPTS, None, None, False)
    decoder = Decoder(model, sequences, 40, retrieval, "key_value")
    with torch.no_grad():
        logits = decoder.prefill()
        for step in range(12):
            for i, sequence in enumerate(sequences):
                expected = full_logits(model, sequence, lookup, 4, False)
                torch.testing.assert_close(logits[i], expected, rtol=1e-4, atol=2e-5)
                sequence.append((7 * step + 13 * i) % 64)
            logits = decoder.step()
    retrieval.close()
