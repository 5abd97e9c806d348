"""What was measured, as one document, a page and a picture."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.language_model import copy_rule, matches
from retro_kernels import files
from retro_kernels.bench import environment, report, results
from retro_kernels.retrieval.corpus.filters import longest_common_stretch

from .experiment import (
    APART,
    ARMS,
    BY_CHUNK,
    COPYING,
    DECODER,
    FEW,
    GATES,
    IN_CONTEXT,
    MAP_RATE,
    MAPS,
    NEAREST,
    NEW,
    RATE,
    TRAINED_K,
    read_lines,
)
from .texts import CHUNKS, LENGTH, M, Texts

HERE = Path(__file__).resolve().parents[1]
FILE, PICTURE = "retrieval-gain.json", "retrieval-gain.png"
DOCUMENT = HERE.parent / "docs" / "retrofit.md"
"""Other numbers of neighbours than two are measured on so many texts."""
LEAST = 4
"""Fewer texts, of a corpus that was not measured to the end, are only in the table of all corpora."""
BASES = (DECODER, *((arm, whose, 2) for arm in (GATES, MAPS, IN_CONTEXT) for whose in ("own", "others")))
COMPARED = (
    (GATES, BY_CHUNK),
    (GATES + APART, BY_CHUNK + APART),
    (GATES, FEW),
    (GATES + APART, FEW + APART),
    (MAPS, GATES),
    (MAPS, IN_CONTEXT),
)
"""Arms whose difference is shown, by the paired error."""
PRICED = {
    "in-context": (IN_CONTEXT, "all layers", "in-context"),
    "RETRO, all layers": (GATES + APART, "all layers", "retro"),
    "RETRO, all layers, neighbours from a store": (GATES + APART, "all layers", "store"),
    "RETRO, six layers": (FEW + APART, "six layers", "retro"),
    "RETRO, six layers, neighbours from a store": (FEW + APART, "six layers", "store"),
}
"""Row of the table of costs -> what it gains, and where its costs are."""


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
    read = sum(x["read"] for x in next(iter(logs.values()))) / 60
    lines = [
        f"On `{device}`, commit {document['environment']['commit']}. Texts of {settings['length']} tokens; trained on "
        f"{settings['first']} with k = {settings['k']}, one text an update, in minutes of one core, beside "
        f"{read:.0f} minutes in which neighbours were read, once for all: "
        + "; ".join(
            f"{arm}: {document['parameters'][arm]:,} numbers, {len(log)} texts, "
            f"{sum(x['update'] for x in log) / 60:.0f} minutes"
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
    pooled: list[Figures] = []
    for parts in zip(*(groups(document, corpus) for corpus in document["corpora"])):
        keys = [key for key in parts[0][1] if all(key in figures for _, figures in parts)]
        texts = [
            document["texts"][corpus][row] for corpus, (rows, _) in zip(document["corpora"], parts) for row in rows
        ]
        pooled.append({key: np.concatenate([figures[key] for _, figures in parts]) for key in keys})
        if len(parts) > 1:
            lines += ["", f"**All of them**, {len(texts)} texts:", "", *_table(pooled[-1], texts)]
    first = {corpus: groups(document, corpus)[0][1] for corpus in document["corpora"]} | {"all of them": pooled[0]}
    lines += _differences(first)
    if document["cost"]:
        lines += ["", *_costs(document["cost"], pooled[0])]
    lines += ["", f"![Gain by overlap, and which heads opened](../benchmarks/results/{device}/{PICTURE})"]
    return "\n".join(lines)


def _differences(figures: dict[str, Figures]) -> list[str]:
    """By how much an arm gains more than another: figures of each corpus."""
    lines: list[str] = []
    heads = [
        "",
        "What the one gains more than the other, nats a token, paired over texts:",
        "",
        f"| | {' | '.join(figures)} |",
        "|---|" + "---:|" * len(figures),
    ]
    for pair in COMPARED:
        one, other = ((arm, "own", TRAINED_K) for arm in pair)
        if all(one in x and other in x for x in figures.values()):
            more = [ratio((x[other] - x[one]).sum(1), np.full(len(x[one]), CHUNKS * M)) for x in figures.values()]
            cells = " | ".join("{:+.4f} ± {:.4f}".format(*x) for x in more)
            lines.append(f"| {pair[0]}, over {pair[1]} | {cells} |")
    return [*heads, *lines] if lines else []


def _costs(cost: dict[str, Any], figures: Figures) -> list[str]:
    lines = [
        f"A token at {LENGTH - M} to {LENGTH} tokens of text, milliseconds of one core in fp32, neighbours read apart; "
        "what is kept while a chunk is written; and the gain for it, of all texts:",
        "",
        "| | a step | its share of what a chunk costs once | together, x the decoder | more than the decoder, of "
        "in-context's | MB kept | gain, nats a token |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    base = cost["all layers"]["decoder"]
    lines.append(f"| the decoder alone | {1e3 * base['step']:.1f} | | 1.00 | | {base['bytes'] / 1e6:.1f} | |")
    for k in (int(name.split()[-1]) for name in cost["store"]["all layers"]):
        dearest = None
        for name, (arm, layers, what) in PRICED.items():
            block = cost[layers]
            one = block[f"{'retro' if what == 'store' else what}, k = {k}"]
            once = (cost["store"][layers][f"k = {k}"] if what == "store" else one["chunk"]) / M
            times = (one["step"] + once) / block["decoder"]["step"]
            dearest = dearest or times
            key = (arm, "own", k)
            lines.append(
                f"| {name}, k = {k} | {1e3 * one['step']:.1f} | {1e3 * once:.1f} | {times:.2f} | "
                f"{(times - 1) / (dearest - 1):.0%} | {one['bytes'] / 1e6:.1f} | "
                + ("{:.4f} ± {:.4f} |".format(*gain(figures, key)) if key in figures else " |")
            )
    return lines


def draw(document: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    corpora = list(document["corpora"])
    figure, axes = plt.subplots(
        1, len(corpora) + 1, figsize=(4.6 * (len(corpora) + 1), 4.2), layout="constrained", squeeze=False
    )
    colours = ("#e4572e", "#8e44ad", "#f0a202", "#c2185b", "#3d85c6", "#2a9d8f", "#777777")
    for axis, corpus in zip(axes[0], corpora):
        rows, whole = groups(document, corpus)[0]
        shared = np.array([document["texts"][corpus][row]["shared"] for row in rows])
        keys = [
            key
            for key in whole
            if key[1] == "own" and not key[0].startswith((BY_CHUNK, NEW)) and APART not in key[0]  # NEW loses nats
        ]
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
