"""The harness gets the log-likelihoods of the logits, over windows too, with the neighbours that a retriever gives."""

from __future__ import annotations

import math
import sys
import types

import pytest
import torch
from models_common import Lookup, tiny

from retro_kernels.integrations import lm_eval
from retro_kernels.tokenizers import ByteTokenizer

N, M = 16, 4


@pytest.mark.parametrize("retrieves", [False, True])
@pytest.mark.parametrize(("length", "first"), [(1, 0), (9, 0), (9, 6), (16, 3), (17, 0), (50, 0), (50, 41), (50, 49)])
def test_log_likelihoods_are_those_of_the_logits(length, first, retrieves):
    model = tiny(max_length=N)
    retriever = Lookup() if retrieves else None
    tokens = torch.randint(64, (length,)).tolist()
    found, best = lm_eval.log_likelihoods(model, tokens, first, retriever)
    assert found.shape == best.shape == (length - first,)
    for i, (score, is_best) in enumerate(zip(found.tolist(), best.tolist())):
        at = first + i
        if at == 0:
            assert score == pytest.approx(-math.log(64))
            continue
        possible = []  # with each context that begins at a chunk's border and is no longer than a window
        for start in range(max(at - N, 0) // M * M, at, M):
            given = torch.tensor([tokens[start:at]])
            chunks = given.shape[1] // M
            near = (None, None)
            if retrieves and chunks:
                neighbours = retriever.of(given[0, : chunks * M].view(chunks, M))
                near = (neighbours.tokens[None], neighbours.mask[None])
            with torch.no_grad():
                logits = model(given, *near)[0, -1].log_softmax(-1)
            likeliest = int(logits.argmax()) == tokens[at]
            possible.append((at - start, float(logits[tokens[at]]), likeliest))
        matching = [(context, b) for context, value, b in possible if value == pytest.approx(score, abs=1e-5)]
        assert matching, (at, score, possible)
        assert matching[0][1] == is_best
        # None has less context than half a window, where there is as much.
        assert max(context for context, _ in matching) >= min(at, N // 2)


def test_the_adapter_answers_the_harness(tmp_path, monkeypatch):
    class TemplateLM:
        backend = "causal"

        def _encode_pair(self, context, continuation):
            whole = self.tok_encode(context + continuation)
            return self.tok_encode(context), whole[len(self.tok_encode(context)) :]

    registered = {}
    model_module = types.SimpleNamespace(TemplateLM=TemplateLM)
    registry = types.SimpleNamespace(register_model=lambda name: lambda kind: registered.setdefault(name, kind))
    monkeypatch.setitem(sys.modules, "lm_eval", types.ModuleType("lm_eval"))
    monkeypatch.setitem(sys.modules, "lm_eval.api", types.ModuleType("lm_eval.api"))
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", model_module)
    monkeypatch.setitem(sys.modules, "lm_eval.api.registry", registry)
    pytest.importorskip("tqdm")
    lm_eval.model_class.cache_clear()
    model = tiny(vocab_size=257, tokenizer="bytes", eos_token_id=256, max_length=N)
    model.save_pretrained(tmp_path)
    kind = lm_eval.model_class()
    lm_eval.model_class.cache_clear()
    assert registered == {"retro-kernels": kind}
    lm = kind(str(tmp_path), device="cpu")

    def request(*given):
        return types.SimpleNamespace(args=given)

    scores = lm.loglikelihood([request("a text", " of it"), request("", "text")])
    whole, _ = lm_eval.log_likelihoods(model, list(b"a text of it"), 6)
    assert scores[0][0] == pytest.approx(float(whole.sum()), rel=1e-5)
    assert scores[1][0] == pytest.approx(lm.loglikelihood_rolling([request("text")])[0], rel=1e-6)
    text = lm.generate_until([request("a text", {"until": ["\x00"], "max_gen_toks": 7})])[0]
    made = ByteTokenizer().decode(model.generate([list(b"a text")], max_new_tokens=7).new_tokens(0))
    assert text == made.split("\x00")[0]
