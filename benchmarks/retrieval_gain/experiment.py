"""The arms of the experiment: what is trained, read and measured."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

import retro_kernels as rk
from examples.retrofit import FAST_BF16
from retro_kernels import files, retrieval
from retro_kernels.integrations.retrofit.attention import CALL
from retro_kernels.integrations.retrofit.call import Even
from retro_kernels.integrations.retrofit.request import Request
from retro_kernels.integrations.retrofit.store import encode_database
from retro_kernels.models.data import ABSENT

from .texts import CHUNKS, LENGTH, M, R, Texts

STEPS, COST_K = 20, (2, 4)
TEMPERATURES = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2)
DECODER, IN_CONTEXT, COPYING, NEAREST = ("decoder", "none", 0), "in-context", "copying", "nearest"

# -- training


@dataclass(frozen=True)
class Arm:
    """What is trained: gates that begin at `gate`, and maps of each head if `adapt`; of the arm "gates", the `layers`
    that gain most; with another encoder everything that is added; or nothing, with what was trained as another arm.
    Each neighbour is read alone (`apart`), or all together."""

    adapt: bool = False
    encoder: str = "own"
    positions: str = "text"
    gate: float = 0.0
    layers: int | None = None
    apart: bool = False
    like: str | None = None


GATES, FEW, MAPS = "gates", "gates in six layers", "gates and maps"
BY_CHUNK, NEW = "gates, positions by chunk", "everything new"
APART = ", neighbours read apart"
ARMS = {
    GATES: Arm(),
    GATES + APART: Arm(apart=True, like=GATES),
    FEW: Arm(layers=6),
    FEW + APART: Arm(layers=6, apart=True, like=FEW),
    BY_CHUNK: Arm(positions="chunk", gate=-3.0),
    BY_CHUNK + APART: Arm(positions="chunk", gate=-3.0, apart=True, like=BY_CHUNK),
    MAPS: Arm(adapt=True),
    NEW: Arm(encoder="fresh", apart=True),
}
RATE, MAP_RATE, TRAINED_K = 0.25, 5e-4, 2
JUDGED = 8
"""Texts by which layers are chosen."""


def train(arm: str, reader: Reader, texts: Texts, work: Path, steps: int) -> None:
    """One update a text; what was trained, the optimiser and the log are in `work / "arm.pt"`, always whole."""
    path = work / f"{arm}.pt"
    saved = torch.load(path, weights_only=True) if path.exists() else {"parameters": None, "log": []}
    log: list[dict[str, Any]] = saved["log"]
    if len(log) >= steps:
        return
    if saved["parameters"] is None and ARMS[arm].layers is not None:
        saved["parameters"] = best_layers(ARMS[arm].layers, reader, texts, work)
    parameters = reader.take(arm, saved["parameters"])
    for x in reader.model.parameters():
        x.requires_grad_(any(x is y for y in parameters.values()))
    optimiser = torch.optim.Adam([{"params": [x]} for x in parameters.values()], betas=(0.9, 0.98))
    if log:
        optimiser.load_state_dict(saved["optimiser"])
    for step in range(len(log), steps):
        text, neighbours = torch.from_numpy(texts.tokens[step]), neighbours_of(texts, step, TRAINED_K, ARMS[arm].apart)
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


def best_layers(count: int, reader: Reader, texts: Texts, work: Path) -> dict[str, torch.Tensor]:
    """Of the trained gates, those in the layers that gain most on the first texts."""
    saved = torch.load(work / f"{GATES}.pt", weights_only=True)["parameters"]
    reader.take(GATES, saved)
    gains = dict.fromkeys(reader.retro.gates(), 0.0)
    for i in range(min(JUDGED, len(texts.tokens))):
        neighbours = neighbours_of(texts, i, TRAINED_K, apart=False)[None]
        reader.retro.retrieved_length = neighbours.shape[-1]
        found = reader.retro.gains(
            torch.from_numpy(texts.tokens[i])[None], neighbours.clamp(min=0), neighbours != ABSENT
        )
        gains = {layer: gain + float(found[layer].sum()) for layer, gain in gains.items()}
    best = sorted(gains, key=lambda layer: -gains[layer])[:count]
    print(f"layers that gain most: {best}", flush=True)
    return {name: x for name, x in saved.items() if int(name.split(".")[2]) in best}


# -- the model


class Reader:
    """A retrofitted model, its neighbours' keys and values made once for whatever arm reads them."""

    def __init__(self, model: Any, encoder: str) -> None:
        """With the decoder as it was, and what is added as it is before the training."""
        if hasattr(model, "retro"):
            model.retro.undo()
        torch.manual_seed(0)
        new: dict[str, Any] = {"adapt": True} if encoder == "own" else {"init": "random"}
        rk.retrofit(model, chunk_size=M, retrieved_length=R, encoder=encoder, positions="text", gate=0.0, **new)
        self.model, self.retro, self.encoder = model, model.retro, encoder

    def take(self, arm: str, saved: dict[str, torch.Tensor] | None) -> dict[str, torch.nn.Parameter]:
        """What this arm trains, which gets the values that were saved; the maps of other arms are the identity, and in
        few layers the gates of others are closed."""
        ours = {name: x for name, x in self.model.named_parameters() if ".retro." in f".{name}"}
        self.retro.positions = ARMS[arm].positions
        if self.encoder == "own":
            self.retro.set_gates(ARMS[arm].gate if ARMS[arm].layers is None else float("-inf"))
            with torch.no_grad():
                for part in self.retro.parts():
                    part.query_map.weight.zero_()
                    part.value_map.weight.zero_()
            endings = ("gate.weight", "_map.weight") if ARMS[arm].adapt else ("gate.weight",)
            few = ours if ARMS[arm].layers is None else saved or {}
            ours = {name: x for name, x in ours.items() if name.endswith(endings) and name in few}
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


def neighbours_of(texts: Texts, row: int, k: int, apart: bool) -> torch.Tensor:
    """[CHUNKS, k, R], or together."""
    found = torch.from_numpy(texts.neighbours[row, :, :k])
    return found if apart else together(found)


def autocast() -> Any:
    return torch.autocast("cpu", torch.bfloat16, enabled=FAST_BF16)


# -- evaluation


def wanted(arms: Sequence[str], encoder: str, k: int) -> list[tuple[str, str, int]]:
    """(what, whose neighbours, k) of every figure of a row that is read with this encoder."""
    found = [(arm, "own", k) for arm in arms]
    if k == TRAINED_K:
        found += [(arm, "others", k) for arm in arms if arm in (GATES, MAPS)]
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
            tokens = neighbours_of(texts, of, k, apart)
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
def cost_of(reader: Reader, texts: Texts, work: Path, document: Path) -> dict[str, Any]:
    """What a token costs with neighbours in all layers and in few, each read alone; and seconds to fetch a chunk's
    neighbours from a store of this document's chunks, which the system has in memory."""
    torch.set_num_threads(1)
    retro = reader.retro
    reader.take(GATES, torch.load(trained(work, GATES), weights_only=True)["parameters"])
    for part in retro.parts():
        part.query_map = part.value_map = None
    settings: dict[str, Any] = {"tokenizer": str(work / "tokenizer"), "embedder": None, "chunk_size": M}
    database = retrieval.build_database(str(document), work / "cost-database", **settings)
    few = torch.load(trained(work, FEW), weights_only=True)["parameters"]
    found: dict[str, Any] = {"store": {}}
    for name in ("all layers", "six layers"):
        if name == "six layers":
            retro.keep_layers({int(name.split(".")[2]) for name in few})
        found[name] = _cost(reader, texts)
        found["store"][name] = _fetch(encode_database(reader.model, database, work / f"cost-encoded {name}"))
    return found


def _fetch(store: Any) -> dict[str, float]:
    seconds: dict[str, list[float]] = {f"k = {k}": [] for k in COST_K}
    for i in range(STEPS):
        for k in COST_K:
            ids = torch.tensor([(i * k + j) % len(store.codes) for j in range(k)])
            begin = time.process_time()
            store(ids)
            seconds[f"k = {k}"].append(time.process_time() - begin)
    return {name: sorted(x)[STEPS // 2] for name, x in seconds.items()}


def _cost(reader: Reader, texts: Texts) -> dict[str, Any]:
    """Processor seconds of one thread in fp32, medians of steps taken in turns, so that other work on the machine says
    little; and bytes that are kept while a chunk is written."""
    model, retro = reader.model, reader.retro
    text = torch.from_numpy(texts.tokens[0])[None]
    prompt = LENGTH - M
    neighbours = torch.from_numpy(texts.neighbours[0])[None]
    mask = neighbours != ABSENT
    runs: dict[str, dict[str, Any]] = {"decoder": {}}
    for k in COST_K:
        given = {"neighbours": neighbours[:, :, :k].clamp(min=0), "neighbour_mask": mask[:, :, :k]}
        runs[f"retro, k = {k}"] = {
            "given": given,
            "once": lambda x=given: retro.encode_once(*(y[:, -1:] for y in x.values())),
        }
        before = torch.cat([x[x != ABSENT] for x in neighbours[0, -1, :k].flip(0)])[None]
        whole = torch.cat([before, text[:, :prompt]], 1)
        runs[f"in-context, k = {k}"] = {
            "ids": whole,
            "once": lambda x=whole: model(x, use_cache=True, logits_to_keep=1),
        }
    found: dict[str, Any] = {}
    for name, run in runs.items():
        ids = run.get("ids", text[:, :prompt])
        output = model(ids, use_cache=True, logits_to_keep=1, **run.get("given", {}))
        run["cache"], run["seconds"], run["chunk"] = output.past_key_values, [], []
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
    # Once a chunk: to read its neighbours, or all of what the next tokens follow.
    for _ in range(3):
        for run in runs.values():
            begin = time.process_time()
            run.get("once", int)()
            run["chunk"].append(time.process_time() - begin)
    for name, run in runs.items():
        steps = sorted(run["seconds"][4:])
        found[name] |= {"step": steps[len(steps) // 2], "chunk": sorted(run["chunk"])[1]}
    return found
