"""The real thing: retro-pytorch's RETRO at its README configuration on real text, with and without `rk.swap`.

Both models have the same weights. Logits, loss and every parameter gradient are compared before any time is printed:
in fp32 the two must agree within FP32_LIMIT of each tensor's largest value; under bf16 autocast the swapped model's
distance to the fp32 model must be at most twice the unswapped one's, plus BF16_FLOOR.

With dropout the two draw different masks, so the swapped model is compared, by the same rules and on the first tokens,
with itself on backend="reference", which drops what the fused backend drops.
"""

from __future__ import annotations

import collections
import contextlib
import copy
import functools
import os
import random
import re
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from . import text_database
from .operations import SEED
from .timing import Protocol, Samples, Timed, interleaved, peak_extra_bytes

MODEL = "retro-pytorch 0.3.9, README configuration"
README = {
    "max_seq_len": 2048,
    "enc_dim": 896,
    "enc_depth": 3,
    "dec_dim": 768,
    "dec_depth": 12,
    "dec_cross_attn_layers": (1, 3, 6, 9),
    "heads": 8,
    "dim_head": 64,
}
"""README.md of retro-pytorch 0.3.9 but for its dropout, which comes afterwards."""
DROPOUT = 0.25
"""The README's, in the decoder's attentions and feed-forwards."""
COMPARED_WITH_DROPOUT = 256  # tokens: the reference keeps every probability of every layer

FP32_LIMIT = 1e-4
BF16_FLOOR = 1e-3
ORIGINAL, SWAPPED = "retro-pytorch", "retro-pytorch + rk.swap"
STAGES = ("forward", "forward+backward", "training step")
LAYERS = {"one CCA layer": "ChunkedCrossAttention", "encoder": "Encoder"}
"""Parts of the model timed alone, by the name of their class."""


class Unavailable(Exception):
    """This part cannot run here; the message is the reason."""


@dataclass
class Comparison:
    """The two models' results against each other."""

    dtype: str
    rule: str
    passed: bool
    worst: str
    loss_original: float
    loss_swapped: float
    tensors: int


@dataclass
class Report:
    """The result of the real-text part; `asdict` makes it JSON."""

    model: str
    parameters: int
    length: int
    device: str
    description: dict[str, str]
    retrieval: list[dict] = field(default_factory=list)
    """Rates of building, searching and reading the database: "what", "rate", "unit"."""
    swap: str = ""
    swapped: str = ""
    """Counts of the modules that swap replaced."""
    comparisons: list[Comparison] = field(default_factory=list)
    rows: list[dict] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    finished: bool = False

    def to_json(self) -> dict:
        return asdict(self)


def load_model(device: torch.device, configuration: dict | None = None) -> nn.Module:
    """A seeded RETRO, in training mode. Raises Unavailable with the reason when retro-pytorch cannot be imported."""
    try:
        from retro_pytorch.retro_pytorch import RETRO
    except Exception as error:
        raise Unavailable(
            f"retro-pytorch cannot be imported ({type(error).__name__}: {error}): pip install 'retro_kernels[peers]'"
        ) from error
    torch.manual_seed(SEED)
    return RETRO(**(configuration or README)).to(device).train()


def swapped_copy(model: nn.Module) -> tuple[nn.Module, str, str]:
    """A copy with the same weights and fused attentions, what swap said, and what it replaced, counted."""
    import retro_kernels as rk

    twin = copy.deepcopy(model)
    report = rk.swap(twin)
    if not report.replaced:  # on a GPU where no fused kernel can run: what would be timed is the model as it was
        raise Unavailable(f"rk.swap left the model as it is: {report}")
    return twin, str(report), replaced_parts(report.replaced)


def replaced_parts(names: list[str]) -> str:
    """'3 encoder self-attentions, 4 decoder cross-attentions': what modules of these names in a RETRO are."""
    kinds = {"0": "self-attention", "1": "cross-attention", "2": "feed-forward"}
    counted: collections.Counter[str] = collections.Counter()
    for name in names:
        place = re.search(r"(encoder|decoder)\.layers\.\d+\.(\d)", name)
        counted[f"{place[1]} {kinds.get(place[2], 'part')}" if place else "other module"] += 1
    return ", ".join(f"{n} {kind}{'s' if n > 1 else ''}" for kind, n in sorted(counted.items())) or "nothing"


def set_dropout(model: nn.Module, p: float) -> None:
    """In every nn.Dropout of the decoder, where the README has it."""
    for module in model.decoder.modules():  # type: ignore[union-attr, operator]
        if isinstance(module, nn.Dropout):
            module.p = p


@contextlib.contextmanager
def backend_variable(name: str):
    """RETRO_KERNELS_BACKEND, which is read at every call, within the block."""
    old = os.environ.get("RETRO_KERNELS_BACKEND")
    os.environ["RETRO_KERNELS_BACKEND"] = name
    try:
        yield
    finally:
        if old is None:
            del os.environ["RETRO_KERNELS_BACKEND"]
        else:
            os.environ["RETRO_KERNELS_BACKEND"] = old


def run(
    device: torch.device,
    *,
    length: int,
    dtypes: list[str],
    protocol: Protocol,
    characters: int | None,
    step: Callable[[str], None],
    configuration: dict | None = None,
    memory: bool = True,
    deadline: float = float("inf"),
    report: Callable[[Report], None] = lambda report: None,
) -> Report:
    """`report` is handed the report as soon as it exists; it fills up, so that an interruption keeps what there is.
    `characters`: of each play, see `text_database.build`.
    After `deadline` (of time.monotonic) nothing more is timed, and what was left out is noted."""
    step("building the model")
    original: Any = load_model(device, configuration)
    chunk_size, vocabulary = original.chunk_size, original.token_emb.num_embeddings
    step("text, embeddings and neighbours")
    corpus = text_database.build(
        vocabulary=vocabulary,
        chunk_size=chunk_size,
        length=length,
        k=2,
        characters=characters,
        device=device,
    )
    parameters = sum(p.numel() for p in original.parameters())
    result = Report(MODEL, parameters, length, str(device), corpus.description, corpus.measured)
    report(result)
    result.notes.append("dropout 0 where none is named: the outputs of the two models are compared")
    swapped, result.swap, result.swapped = swapped_copy(original)
    models = {ORIGINAL: original, SWAPPED: swapped}
    sequence, retrieved = corpus.sequence.to(device), corpus.retrieved.to(device)

    truth, right, costs = None, [], {}
    for dtype in ["fp32", *(name for name in dtypes if name != "fp32")]:
        step(f"{dtype}: comparing logits, loss and gradients")
        began = time.monotonic()
        results = {name: _results(model, sequence, retrieved, dtype) for name, model in models.items()}
        costs[dtype] = 1.3 * (time.monotonic() - began)  # a round has the optimiser's step, too
        truth = truth if truth is not None else results[ORIGINAL]
        comparison = compare(results[ORIGINAL], results[SWAPPED], truth, dtype)
        result.comparisons.append(comparison)
        if not comparison.passed:
            result.notes.append(f"{dtype}: no time is printed, the models differ: {comparison.worst}")
        elif dtype in dtypes:
            right.append(dtype)
    del results, truth
    step("comparing with dropout")
    with_dropout = [dtype for dtype in right if _check_dropout(swapped, sequence, retrieved, dtype, result)]
    # After all comparisons, because training steps change the weights; the fastest first, in case the time ends.
    jobs = [
        (p, dtype) for p in (0.0, DROPOUT) for dtype in sorted(right if p == 0 else with_dropout, key=costs.__getitem__)
    ]
    for i, (p, dtype) in enumerate(jobs):
        what = f"{dtype} with dropout" if p > 0 else dtype
        left = (deadline - time.monotonic()) / sum(1.0 if later == 0 else 0.5 for later, _ in jobs[i:])
        if left < 2 * costs[dtype]:  # a warm-up and one round
            result.notes.append(
                f"{what} was not timed: too little of this run's time was left (`retro-kernels bench` has it)"
            )
            continue
        step(f"{what}: timing")
        limited = replace(protocol, seconds=min(protocol.seconds, 0.8 * left - costs[dtype]))
        if 0.8 * left < costs[dtype] * (1 + protocol.min_rounds):
            limited = replace(limited, min_rounds=1)
        for model in models.values():
            set_dropout(model, p)
        result.rows += _time(models, sequence, retrieved, dtype, limited, device, memory, p)
    result.finished = True
    return result


def _check_dropout(swapped, sequence, retrieved, dtype, result: Report) -> bool:
    """Adds a comparison of the swapped model with itself on the reference backend."""
    length = min(COMPARED_WITH_DROPOUT, sequence.shape[1] - 1)
    data = sequence[:, : length + 1], retrieved[:, : length // swapped.chunk_size]
    set_dropout(swapped, DROPOUT)
    try:
        found = {}
        with backend_variable("reference"):
            for name in dict.fromkeys(("fp32", dtype)):
                found[name] = _results(swapped, *data, name)
        fused = _results(swapped, *data, dtype)
    finally:
        set_dropout(swapped, 0.0)
    comparison = compare(found[dtype], fused, found["fp32"], dtype)
    comparison.dtype = f"{dtype}, dropout {DROPOUT:g}"
    comparison.rule = f"fused against backend='reference', {length} tokens: {comparison.rule}"
    result.comparisons.append(comparison)
    if not comparison.passed:
        result.notes.append(f"{dtype} with dropout: no time is printed, the models differ: {comparison.worst}")
    return comparison.passed


def _autocast(device: torch.device, dtype: str):
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bf16")


def _results(model: nn.Module, sequence: Tensor, retrieved: Tensor, dtype: str) -> dict[str, Tensor]:
    """Logits, loss and the gradient of every parameter that has one."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(SEED)
    with _autocast(sequence.device, dtype):
        with torch.no_grad():
            logits = model(sequence[:, :-1], retrieved)
        loss = model(sequence, retrieved, return_loss=True)
    loss.backward()
    results = {"logits": logits.float(), "loss": loss.detach().float()}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            results[f"gradient of {name}"] = parameter.grad
    model.zero_grad(set_to_none=True)
    return results


def compare(original: dict, swapped: dict, truth: dict, dtype: str) -> Comparison:
    """By the rule of this precision (see the module's text)."""
    worst, excess, passed = "no tensor differs", -1.0, set(original) == set(swapped)
    if not passed:
        worst = f"gradients exist for different parameters: {sorted(set(original) ^ set(swapped))[:3]}"
    for name in original if passed else ():
        scale = float(truth[name].abs().max()) or 1.0
        if dtype == "fp32":
            error, allowed = _distance(swapped[name], original[name]) / scale, FP32_LIMIT
        else:
            error = _distance(swapped[name], truth[name]) / scale
            allowed = 2 * _distance(original[name], truth[name]) / scale + BF16_FLOOR
        if not error <= allowed:
            passed = False
        if not error / allowed <= excess:
            excess, worst = error / allowed, f"{name}: {error:.1e} of its largest value, allowed {allowed:.1e}"
    rule = (
        f"swapped and unswapped differ by at most {FP32_LIMIT:g} of each tensor's largest value"
        if dtype == "fp32"
        else f"distance to the fp32 model at most twice the unswapped model's, plus {BF16_FLOOR:g}"
    )
    losses = float(original["loss"]), float(swapped["loss"])
    return Comparison(dtype, rule, passed, worst, *losses, tensors=len(original))


def _distance(x: Tensor, y: Tensor) -> float:
    return float((x.double() - y.double()).abs().max().nan_to_num(nan=float("inf"), posinf=float("inf")))


def _time(models, sequence, retrieved, dtype, protocol: Protocol, device, memory: bool, dropout: float) -> list[dict]:
    """Rounds over both models in changing order; within a training step the stages are read off one clock."""
    optimizers = {name: torch.optim.AdamW(model.parameters(), lr=1e-5) for name, model in models.items()}
    times: dict[tuple[str, str], list[float]] = {(name, stage): [] for name in models for stage in STAGES}

    def clock() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() * 1e3

    def training_step(name: str) -> tuple[float, float, float]:
        start = clock()
        with _autocast(device, dtype):
            loss = models[name](sequence, retrieved, return_loss=True)
        loss.backward()
        backward = clock()
        optimizers[name].step()
        optimizers[name].zero_grad(set_to_none=True)
        return start, backward, clock()

    def forward(name: str) -> None:
        with torch.no_grad(), _autocast(device, dtype):
            models[name](sequence[:, :-1], retrieved)

    order, began = random.Random(SEED), time.monotonic()
    for name in models:  # warm-up: it also creates the optimiser's state
        training_step(name)
    for number in range(protocol.max_rounds):
        if number >= protocol.min_rounds and time.monotonic() - began > protocol.seconds:
            break
        for name in order.sample(list(models), len(models)):
            start = clock()
            forward(name)
            times[name, "forward"].append(clock() - start)
            start, backward, end = training_step(name)
            times[name, "forward+backward"].append(backward - start)
            times[name, "training step"].append(end - start)
    peaks: dict[tuple[str, str], int | None] = {}
    for name in models if memory else ():
        peaks[name, "training step"] = peak_extra_bytes(functools.partial(training_step, name), device)
    optimizers.clear()
    layers = {} if dropout else _layer_calls(models, sequence, retrieved, dtype, device)
    for stage, calls in layers.items():
        for name, samples in interleaved(calls, device, _layer_protocol(protocol), seed=SEED).items():
            times[name, stage] = samples.milliseconds
        for name, timed in calls.items() if memory else ():
            peaks[name, stage] = peak_extra_bytes(timed.call, device)
    suffix = f", dropout {dropout:g}" if dropout else ""
    return [
        {
            "dtype": dtype,
            "stage": stage + suffix,
            "variant": name,
            **Samples(values).summary(),
            "peak_extra_bytes": peaks.get((name, stage)),
        }
        for (name, stage), values in times.items()
    ]


def _layer_protocol(protocol: Protocol) -> Protocol:
    return Protocol(seconds=protocol.seconds / 4, min_rounds=5, max_rounds=50, graphs=False)


def _layer_calls(models, sequence, retrieved, dtype, device) -> dict[str, dict[str, Timed]]:
    """The first part of each kind alone (with its projections), on the inputs it has within the model."""
    modes = ("forward", "forward+backward")
    calls: dict[str, dict[str, Timed]] = {f"{part} {mode}": {} for part in LAYERS for mode in modes}
    for name, model in models.items():
        for part, kind in LAYERS.items():
            layer = next(m for m in model.modules() if type(m).__name__ == kind)
            seen: dict = {}

            def remember(module, args, kwargs, seen=seen):
                seen["args"], seen["kwargs"] = args, kwargs

            hook = layer.register_forward_pre_hook(remember, with_kwargs=True)
            with torch.no_grad(), _autocast(device, dtype):
                model(sequence[:, :-1], retrieved)
            hook.remove()
            x = seen["args"][0].detach().requires_grad_()
            keywords = {
                key: value.detach().requires_grad_() if key in ("context", "chunked_seq") else value
                for key, value in seen["kwargs"].items()
            }
            wanted = [x, *(value for key, value in keywords.items() if key in ("context", "chunked_seq"))]

            def forward(layer=layer, x=x, keywords=keywords):
                with torch.no_grad(), _autocast(device, dtype):
                    return layer(x, **keywords)

            def both(layer=layer, x=x, keywords=keywords, wanted=wanted):
                with _autocast(device, dtype):
                    out = layer(x, **keywords)
                return torch.autograd.grad(out.sum(), [*wanted, *layer.parameters()])

            calls[f"{part} forward"][name], calls[f"{part} forward+backward"][name] = Timed(forward), Timed(both)
    return calls
