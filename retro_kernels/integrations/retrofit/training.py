"""Gates (and what else was added) trained on a folder of data, and what they gain: `retro-kernels retrofit`."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ...files import lock, replaced, write_json
from ...models.data import Order
from ...nn.common import one_of
from ...ops import checks
from ...retrieval.corpus.filters import longest_common_stretch
from ...retrieval.training_data import open_neighbours
from .files import fingerprint

STATE, EVALUATION = "training.safetensors", "evaluation.json"
OVERLAPS = (1.0, 0.5, 0.125)
MOMENTS = ("exp_avg", "exp_avg_sq")
JUDGED = 16
"""Texts by which layers are chosen."""


@dataclass(frozen=True, kw_only=True)
class GateTraining:
    """Settings of a training.

    Attributes:
        steps: updates. batch_size: texts of each.
        length: tokens of a text, which lies in one document and begins at a chunk's border.
        gate_rate, learning_rate: the largest learning rates of gates, and of all else; they rise over the first
            `warmup_steps` and fall to a fifteenth, in a line.
        held_out: texts that are not trained on but measured, the last of the data; or the first of other data.
        precision: "fp32", or "bf16" (autocast).
        save_every: updates between two states that a stopped run goes on from.
        seed: of the order of the texts.
    """

    steps: int = 120
    batch_size: int = 1
    length: int = 512
    gate_rate: float = 0.15
    learning_rate: float = 1e-3
    warmup_steps: int = 5
    held_out: int = 24
    precision: str = "fp32"
    save_every: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "length", "held_out", "save_every"):
            checks.integer(name, getattr(self, name), 1)
        for name in ("warmup_steps", "seed"):
            checks.integer(name, getattr(self, name), 0)
        one_of("precision", self.precision, ("fp32", "bf16"))

    def fraction(self, step: int) -> float:
        """Of the largest learning rates, for the update of this number, from 0."""
        rising = min(1.0, (step + 1) / max(self.warmup_steps, 1))
        return max(rising * (1 - step / self.steps), 1 / 15)


class Texts:
    """Texts of a folder that `retro-kernels db neighbours` wrote, each in one document.

    Indexed by a list of numbers: tokens int64 [t, length], neighbours int64 and mask bool [t, l, k, r].

    Raises DatabaseError for a folder that cannot be used, ValueError where no document is as long as a text.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        length: int,
        retrieved_length: int,
        num_neighbours: int,
        database: str | os.PathLike[str] | None = None,
    ) -> None:
        self.data = open_neighbours(folder, database)
        self.facts = self.data.facts
        self.chunk_size: int = self.facts["chunk_size"]
        self.length, self.retrieved_length, self.num_neighbours = length, retrieved_length, num_neighbours
        if length % self.chunk_size or length < 2 * self.chunk_size:
            raise ValueError(
                f"length: got {length}, expected a multiple of the data's chunk_size = {self.chunk_size}, and two "
                "chunks or more"
            )
        kept = self.data.ids.shape[1]
        if num_neighbours > kept:
            raise ValueError(f"num_neighbours: got {num_neighbours}, but {folder} has {kept} for each chunk")
        starts, ends = (np.asarray(x) for x in (self.data.document_starts, self.data.document_ends))
        self.places = np.concatenate(
            [np.arange(start, end - length + 1, length) for start, end in zip(starts, ends)] or [np.zeros(0, np.int64)]
        ).astype(np.int64)
        if not len(self.places):
            raise ValueError(f"length: no document in {folder} has {length} tokens, expected a smaller length")

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, numbers: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        m = self.chunk_size
        places = self.places[np.asarray(numbers)]
        tokens = np.stack([self.data.tokens[place : place + self.length] for place in places]).astype(np.int64)
        # The last chunk's neighbours would be read by tokens that follow the text.
        ids = np.stack([self.data.ids[place // m : (place + self.length) // m - 1] for place in places])
        neighbours, mask = self.data.database.chunks(ids[..., : self.num_neighbours], self.retrieved_length)
        return torch.from_numpy(tokens), neighbours.long(), mask


def losses(
    model: Any, tokens: torch.Tensor, neighbours: Any = None, mask: Any = None, *, precision: str = "fp32"
) -> torch.Tensor:
    """Nats of every token that may see neighbours: tokens [t, length] -> [t, l, m]."""
    m = model.retro.chunk_size
    device = model.get_input_embeddings().weight.device
    tokens = tokens.to(device)
    given = {} if neighbours is None else {"neighbours": neighbours.to(device), "neighbour_mask": mask.to(device)}
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        logits = model(tokens[:, :-1], use_cache=False, **given).logits[:, m - 1 :]
    targets = tokens[:, m:]
    found = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none")
    return found.view(len(tokens), -1, m)


def train(
    model: Any,
    texts: Texts,
    numbers: Sequence[int],
    folder: Path,
    settings: GateTraining,
    say: Callable[[str], None],
) -> None:
    """Trains what has a gradient on the texts of these numbers. A state is kept in the folder, from which the same call
    goes on to the same weights; at the end what was added is written there (`save_pretrained`).

    Raises ValueError for the state of another training.
    """
    parameters = {name: x for name, x in model.named_parameters() if x.requires_grad}
    of_gates = [x for name, x in parameters.items() if ".gate." in name or ".cross." in name]
    others = [x for x in parameters.values() if all(x is not y for y in of_gates)]
    groups = [{"params": of_gates, "rate": settings.gate_rate}, {"params": others, "rate": settings.learning_rate}]
    optimiser = torch.optim.Adam([x for x in groups if x["params"]], betas=(0.9, 0.98))
    about = {
        "settings": {k: v for k, v in dataclasses.asdict(settings).items() if k not in ("held_out", "save_every")},
        "retro": model.retro.settings,
        "base": fingerprint(model),
        "data": texts.facts["files"],
        "texts": len(numbers),
        "trained": sorted(parameters),
        "beginning": _hash(parameters),
    }
    log = _resume(folder / STATE, about, parameters, optimiser)
    if log:
        say(f"going on after {len(log)} of {settings.steps} updates")
    order = Order(len(numbers), settings.seed)
    size = settings.batch_size
    for step in range(len(log), settings.steps):
        for group in optimiser.param_groups:
            group["lr"] = group["rate"] * settings.fraction(step)
        loss = losses(
            model, *texts[[numbers[order[step * size + i]] for i in range(size)]], precision=settings.precision
        ).mean()
        if not math.isfinite(loss.item()):
            raise ValueError(f"update {step + 1}: the loss is {loss.item()}; the last state is in {folder / STATE}")
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        log.append(round(loss.item(), 5))
        if (step + 1) % settings.save_every == 0 or step + 1 == settings.steps:
            _keep(folder / STATE, about, parameters, optimiser, log)
            last = log[-settings.save_every :]
            say(f"{step + 1} of {settings.steps} updates, loss of the last {len(last)}: {sum(last) / len(last):.4f}")
    model.retro.save_pretrained(folder)


def _hash(parameters: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for _, x in sorted(parameters.items()):
        digest.update(x.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()


def _keep(path: Path, about: dict, parameters: dict, optimiser: torch.optim.Adam, log: list[float]) -> None:
    from safetensors.torch import save_file

    tensors = {}
    for name, x in parameters.items():
        tensors[name] = x.detach().cpu().contiguous()
        for moment in MOMENTS:
            tensors[f"{name} {moment}"] = optimiser.state[x][moment].cpu().contiguous()
    with replaced(path) as partial:
        save_file(tensors, partial, metadata={"about": json.dumps(about), "log": json.dumps(log)})


def _resume(path: Path, about: dict, parameters: dict, optimiser: torch.optim.Adam) -> list[float]:
    """-> the losses of the updates that were made, none where there is no state."""
    from safetensors import SafetensorError, safe_open

    if not path.exists():
        return []
    try:
        with safe_open(path, "pt") as state:
            said = state.metadata() or {}
            kept, log = json.loads(said.get("about", "null")), json.loads(said.get("log", "[]"))
            different = [name for name in about if not isinstance(kept, dict) or kept.get(name) != about[name]]
            if different:
                raise ValueError(
                    f"{path}: is of a training with other {', '.join(different)}; expected the same, or another folder"
                )
            with torch.no_grad():
                for name, x in parameters.items():
                    x.copy_(state.get_tensor(name))
                    moments = {moment: state.get_tensor(f"{name} {moment}").to(x.device) for moment in MOMENTS}
                    optimiser.state[x] = {"step": torch.tensor(float(len(log))), **moments}
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: cannot be read ({error}); delete it to begin again") from error
    return log


@torch.no_grad()
def evaluate(
    model: Any,
    texts: Texts,
    numbers: Sequence[int],
    *,
    precision: str = "fp32",
    say: Callable[[str], None] = lambda text: None,
) -> list[dict[str, Any]]:
    """Nats a token of the texts of these numbers, without neighbours, with those of another of these texts, and with
    their own; for each of OVERLAPS of the chunks that share at most so much, in one piece, with a neighbour (None where
    there is no such chunk, or where the bytes of the text are not known)."""
    found: dict[str, list[torch.Tensor]] = {"none": [], "others": [], "own": []}
    shares = []
    m = model.retro.chunk_size
    was_training = model.training
    model.eval()
    for i, number in enumerate(numbers):
        tokens, neighbours, mask = texts[[number]]
        _, *other = texts[[numbers[(i + 1) % len(numbers)]]]
        for kind, given in (("none", []), ("others", other), ("own", [neighbours, mask])):
            found[kind].append(losses(model, tokens, *given, precision=precision)[0].sum(-1).cpu())
        shown = neighbours[0].masked_fill(~mask[0], -1)
        shares.append(longest_common_stretch(tokens[0, m:].view(-1, m), shown).amax(-1) / m)
        if i % 8 == 7 or i + 1 == len(numbers):
            say(f"measured {i + 1} of {len(numbers)} texts")
    model.train(was_training)
    if torch.equal(torch.cat(found["own"]), torch.cat(found["none"])):
        why = (
            "although gates are open: are its neighbours all missing?"
            if model.retro.active()
            else "all gates are closed"
        )
        say(f"WARNING: retrieval changes nothing here, not one bit; {why}")
    share = torch.cat(shares)
    facts = texts.facts
    per_byte = None if not facts.get("bytes") else facts["bytes"] / _tokens_of(texts)
    results = []
    for kind, sums in found.items():
        for limit in OVERLAPS:
            chosen = torch.cat(sums)[share <= limit]
            nats = float(chosen.double().mean()) / m if len(chosen) else None
            bits = None if per_byte is None or nats is None else nats / math.log(2) / per_byte
            results.append(
                {
                    "neighbours": kind,
                    "max_overlap": limit,
                    "tokens": len(chosen) * m,
                    "nats_per_token": nats,
                    "bits_per_byte": bits,
                }
            )
    return results


def _tokens_of(texts: Texts) -> int:
    return int((np.asarray(texts.data.document_ends) - np.asarray(texts.data.document_starts)).sum())


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Makes the folder, and refuses a second process that works there."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with lock(folder, wait=False):
            yield
    except BlockingIOError:
        raise ValueError(f"{folder}: another process is training there; wait for it, or name another folder") from None


def keep_best_layers(model: Any, texts: Texts, numbers: Sequence[int], count: int, say: Callable[[str], None]) -> None:
    """Keeps what was added to the `count` layers whose neighbours gain most on the texts of these numbers (see
    `model.retro.gains`). Raises ValueError for more layers than there are."""
    retro = model.retro
    there = [part.layer for part in retro.parts()]
    if not 1 <= count <= len(there):
        raise ValueError(f"keep_layers: got {count}, expected 1 to {len(there)}, the layers that see neighbours")
    gains = dict.fromkeys(there, 0.0)
    for number in numbers:
        for layer, found in retro.gains(*texts[[number]]).items():
            gains[layer] += float(found.sum()) / len(numbers)
    best = sorted(gains, key=lambda layer: -gains[layer])[:count]
    say("kept, by what a layer gains (nats a token): " + ", ".join(f"{layer} ({gains[layer]:.4f})" for layer in best))
    retro.keep_layers(best)


def run(
    model: Any,
    data: str | os.PathLike[str],
    folder: Path,
    settings: GateTraining,
    *,
    database: str | os.PathLike[str] | None = None,
    held_out: str | os.PathLike[str] | None = None,
    keep_layers: int | None = None,
    say: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """Trains a retrofitted model on the data and measures it on texts that were held out, which are the last of the
    data, or the first of `held_out`, another such folder. -> what `evaluate` gives, which the folder keeps too.
    keep_layers: only so many layers, the best on the first texts of the data, are kept and trained on.

    Raises ValueError for data that the model cannot read, and for too few texts.
    """
    retro = model.retro
    sizes = (settings.length, retro.retrieved_length, retro.num_neighbours)
    texts = Texts(data, *sizes, database)
    unseen = texts if held_out is None else Texts(held_out, *sizes, database)
    for one in (texts, unseen):
        if one.chunk_size != retro.chunk_size:
            raise ValueError(
                f"{one.data.folder}: has chunks of {one.chunk_size} tokens, expected chunk_size = {retro.chunk_size}"
            )
        size, given = model.get_input_embeddings().num_embeddings, int(np.asarray(one.data.tokens).max())
        if given >= size:
            raise ValueError(
                f"{one.data.folder}: has token {given}, expected 0 to {size - 1}, the model's vocabulary: it was made "
                "with another tokenizer"
            )
    numbers, measured = list(range(len(texts))), list(range(min(len(unseen), settings.held_out)))
    if held_out is None:
        if len(texts) <= settings.held_out:
            raise ValueError(
                f"held_out: got {settings.held_out} of {len(texts)} texts of {settings.length} tokens, expected fewer, "
                "so that some are trained on; give fewer, a smaller length, or other data to hold out"
            )
        numbers, measured = numbers[: -settings.held_out], numbers[-settings.held_out :]
    if len(measured) < 2:
        raise ValueError("held_out: got one text, expected at least two, as each is read with another's neighbours too")
    with alone(folder):
        if keep_layers is not None:
            keep_best_layers(model, texts, numbers[:JUDGED], keep_layers, say)
        train(model, texts, numbers, folder, settings, say)
        results = evaluate(model, unseen, measured, precision=settings.precision, say=say)
        write_json(folder / EVALUATION, results)
    return results
