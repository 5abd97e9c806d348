"""Retro in EleutherAI's lm-evaluation-harness: likelihoods, rolling perplexity and generation, with retrieval or
without.

    python -m retro_kernels.integrations.lm_eval run --model retro-kernels \\
        --model_args pretrained=run/best,db=db --tasks wikitext

is the harness's own command (`pip install 'retro_kernels[lm-eval]'`), which knows the model "retro-kernels" too.
Without `db` retrieval is off. A database that holds the task's texts answers with them: `max_overlap` drops such
neighbours.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from ..models import Retro
    from ..models.generation import Retriever


@torch.no_grad()
def log_likelihoods(
    model: Retro, tokens: Sequence[int], first: int, retriever: Retriever | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The log-likelihood, in nats, of each token from `first` on after those before it, and whether it is the
    likeliest: fp32 and bool [len(tokens) - first].

    Longer texts go through windows of `max_length` tokens that begin at chunk borders and overlap by half. A text's
    first token, which follows nothing, counts as one of `vocab_size` equally likely ones. With a retriever every
    complete chunk is looked up, and informs what follows.
    """
    config, device = model.config, model.embedding.weight.device
    n, m = config.max_length, config.chunk_size
    step = max(n // 2 // m, 1) * m
    found = torch.full((len(tokens),), -math.log(config.vocab_size))
    best = torch.zeros(len(tokens), dtype=torch.bool)
    known = max(first, 1)  # tokens before have their numbers
    start = max(known - n, 0) // m * m + (m if known - n > 0 else 0)
    while known < len(tokens):
        window = torch.tensor([list(tokens[start : start + n + 1])], device=device)
        inputs, targets = window[:, : min(n, window.shape[1] - 1)], window[:, 1:]
        given: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None)
        chunks = inputs.shape[1] // m
        if retriever is not None and chunks:
            near = retriever(inputs[0, : chunks * m].view(chunks, m).cpu())
            mask = None if near.mask is None else near.mask[None].to(device)
            given = (near.tokens[None].to(device), mask)
        hidden = model.activations(inputs, *given)[0, known - start - 1 :]
        scores = model.read(hidden).float().log_softmax(-1)
        wanted = targets[0, known - start - 1 :, None]
        count = len(wanted)
        found[known : known + count] = scores.gather(-1, wanted)[:, 0].cpu()
        best[known : known + count] = (scores.argmax(-1) == wanted[:, 0]).cpu()
        known += count
        start += step
    return found[first:], best[first:]


@cache
def model_class() -> Any:
    """The harness's model class, registered there as "retro-kernels". Raises ImportError where it is not installed."""
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model

    @register_model("retro-kernels")
    class RetroLM(TemplateLM):
        """`pretrained`: a model's folder. `db`: a database's, to retrieve from; None: retrieval is off.
        `num_neighbours`, `max_overlap`: of the retrieval."""

        def __init__(
            self,
            pretrained: str,
            db: str | None = None,
            num_neighbours: int | None = None,
            max_overlap: float | None = None,
            device: str | None = None,
            batch_size: int | str = 1,
            max_batch_size: int | None = None,
        ) -> None:
            super().__init__()
            from ..models import Retro
            from ..tokenizers import load_model_tokenizer

            device = ("cuda" if torch.cuda.is_available() else "cpu") if device is None else device
            self.model = Retro.from_pretrained(pretrained, device=device)
            self.tokens = load_model_tokenizer(Path(pretrained), self.model.config)
            self.retriever: Any = None
            if db is not None:
                from ..retrieval import Retriever

                self.retriever = Retriever(
                    db,
                    num_neighbours=num_neighbours or self.model.config.num_neighbours,
                    retrieved_length=self.model.config.retrieved_length,
                    max_overlap=max_overlap,
                    device=device,
                )

        @property
        def eot_token_id(self) -> int:
            return self.tokens.eos_token_id

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
            return self.tokens.encode(string)

        def loglikelihood(self, requests: list, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
            pairs = []
            for context, continuation in (request.args for request in requests):
                if context:
                    before, after = self._encode_pair(context, continuation)
                else:
                    before, after = [], self.tok_encode(continuation)
                pairs.append(((context, continuation), before, after))
            return self._loglikelihood_tokens(pairs, disable_tqdm=disable_tqdm)

        def _loglikelihood_tokens(self, requests: list, disable_tqdm: bool = False, **kwargs: Any) -> list:
            found = []
            for _, before, after in self._shown(requests, disable_tqdm):
                scores, best = log_likelihoods(self.model, [*before, *after], len(before), self.retriever)
                found.append((float(scores.sum()), bool(best.all())))
            return found

        def loglikelihood_rolling(self, requests: list, disable_tqdm: bool = False) -> list[float]:
            texts = [self.tok_encode(request.args[0]) for request in requests]
            return [
                float(log_likelihoods(self.model, text, 0, self.retriever)[0].sum())
                for text in self._shown(texts, disable_tqdm)
            ]

        def generate_until(self, requests: list, disable_tqdm: bool = False) -> list[str]:
            made = []
            for request in self._shown(requests, disable_tqdm):
                context, options = request.args
                until = options.get("until") or []
                stops = [until] if isinstance(until, str) else list(until)
                temperature = options.get("temperature") or 0.0
                out = self.model.generate(
                    [self.tok_encode(context) or [self.eot_token_id]],
                    max_new_tokens=int(options.get("max_gen_toks", 256)),
                    do_sample=bool(options.get("do_sample", False)) and temperature > 0.0,
                    **({"temperature": temperature} if options.get("do_sample") and temperature > 0.0 else {}),
                    stop_strings=stops,
                    tokenizer=self.tokens,
                    **({} if self.retriever is None else {"retriever": self.retriever}),
                )
                text = self.tokens.decode(out.new_tokens(0))
                for stop in stops:
                    text = text.split(stop)[0]
                made.append(text)
            return made

        @staticmethod
        def _shown(items: list, disable_tqdm: bool) -> Any:
            from tqdm import tqdm

            return tqdm(items, disable=disable_tqdm)

    return RetroLM


def main() -> None:
    """The harness's command, with the model "retro-kernels"."""
    try:
        model_class()
        from lm_eval.__main__ import cli_evaluate
    except ImportError as error:
        sys.exit(f"error: lm_eval: {error}; expected pip install 'retro_kernels[lm-eval]'")
    cli_evaluate()


if __name__ == "__main__":
    main()
