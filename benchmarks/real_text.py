"""The real thing: retro-pytorch's RETRO at its README configuration on real text, with and without `rk.swap`.

Both models have the same weights. Logits, loss and every parameter gradient are compared before any time is printed:
in fp32 the two must agree within FP32_LIMIT of each tensor's largest value; under bf16 autocast the swapped model's
distance to the fp32 model must be at most twice the unswapped one's, plus BF16_FLOOR.
"""

from __future__ import annotations

import copy
import random
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace

import torch
from torch import Tensor, nn

from . import text_database
from .timing import Protocol, Samples, Timed, interleaved, peak_extra_bytes
from .workloads import SEED

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
"""README.md of retro-pytorch 0.3.9 but for its dropout of 0.25: with dropout two models have nothing to compare."""

FP32_LIMIT = 1e-4
BF16_FLOOR = 1e-3
ORIGINAL, SWAPPED = "retro-pytorch", "retro-pytorch + rk.swap"
STAGES = ("forward", "forward+backward", "training step", "cross-attention layer forward",
          "cross-attention layer forward+backward")  # fmt: skip


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
    """What the real-text part found, JSON-ready but for `asdict`."""

    model: str
    parameters: int
    length: int
    device: str
    description: dict[str, str]
    swap: str = ""
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


def swapped_copy(model: nn.Module) -> tuple[nn.Module, str]:
    """A copy with the same weights and fused cross-attention, and what swap said."""
    import retro_kernels as rk

    if not hasattr(rk, "swap"):
        raise Unavailable("this version of retro_kernels has no swap")
    twin = copy.deepcopy(model)
    report = rk.swap(twin)
    return twin, str(report)


def run(
    device: torch.device,
    *,
    length: int,
    dtypes: list[str],
    protocol: Protocol,
    embedding_seconds: float,
    step: Callable[[str], None],
    configuration: dict | None = None,
    memory: bool = True,
    deadline: float = float("inf"),
    report: Callable[[Report], None] = lambda report: None,
) -> Report:
    """`report` is handed the report as soon as it exists; it fills up, so that an interruption keeps what there is.
    After `deadline` (of time.monotonic) nothing more is timed, and what was left out is noted."""
    step("building the model")
    original = load_model(device, configuration)
    chunk_size, vocabulary = original.chunk_size, original.token_emb.num_embeddings
    step("text, embeddings and neighbours")
    corpus = text_database.build(
        vocabulary=vocabulary, chunk_size=chunk_size, length=length, k=2,
        embedding_seconds=embedding_seconds, device=device,
    )  # fmt: skip
    result = Report(MODEL, sum(p.numel() for p in original.parameters()), length, str(device), corpus.description)
    report(result)
    result.notes.append("dropout 0 instead of the README's 0.25: the outputs of the two models are compared")
    swapped, result.swap = swapped_copy(original)
    models = {ORIGINAL: original, SWAPPED: swapped}
    sequence, retrieved = corpus.sequence(length).to(device), corpus.retrieved().to(device)

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
    # After all comparisons, because training steps change the weights; the fastest first, in case the time ends.
    for i, dtype in enumerate(sorted(right, key=costs.__getitem__)):
        left = (deadline - time.monotonic()) / (len(right) - i)
        if left < 2 * costs[dtype]:  # a warm-up and one round
            result.notes.append(
                f"{dtype} was not timed: too little of this run's time was left (`retro-kernels bench` has it)"
            )
            continue
        step(f"{dtype}: timing")
        limited = replace(protocol, seconds=min(protocol.seconds, 0.8 * left - costs[dtype]))
        if 0.8 * left < costs[dtype] * (1 + protocol.min_rounds):
            limited = replace(limited, min_rounds=1)
        result.rows += _time(models, sequence, retrieved, dtype, limited, device, memory)
    result.finished = True
    return result


def _autocast(device: torch.device, dtype: str):
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bf16")


def _results(model: nn.Module, sequence: Tensor, retrieved: Tensor, dtype: str) -> dict[str, Tensor]:
    """Logits, loss and the gradient of every parameter that has one."""
    model.zero_grad(set_to_none=True)
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


def _time(models, sequence, retrieved, dtype, protocol: Protocol, device, memory: bool) -> list[dict]:
    """Rounds over both models in changing order; within a training step the stages are read off one clock."""
    optimizers = {name: torch.optim.AdamW(model.parameters(), lr=1e-5) for name, model in models.items()}
    times: dict[tuple[str, str], list[float]] = {(name, stage): [] for name in models for stage in STAGES[:3]}

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
    optimizers.clear()

    peaks: dict[tuple[str, str], int | None] = {}
    layers = _layer_calls(models, sequence, retrieved, dtype, device)
    for stage, calls in layers.items():
        for name, samples in interleaved(calls, device, _layer_protocol(protocol), seed=SEED).items():
            times[name, stage] = samples.milliseconds
        for name, timed in calls.items() if memory else ():
            peaks[name, stage] = peak_extra_bytes(timed.call, device)
    return [
        {"dtype": dtype, "stage": stage, "variant": name, **Samples(values).summary(),
         "peak_extra_bytes": peaks.get((name, stage))}
        for (name, stage), values in times.items()
    ]  # fmt: skip


def _layer_protocol(protocol: Protocol) -> Protocol:
    return Protocol(seconds=protocol.seconds / 4, min_rounds=5, max_rounds=50, graphs=False)


def _layer_calls(models, sequence, retrieved, dtype, device) -> dict[str, dict[str, Timed]]:
    """One decoder cross-attention layer alone (projections and core), on the inputs it has within the model."""
    calls: dict[str, dict[str, Timed]] = {stage: {} for stage in STAGES[3:]}
    for name, model in models.items():
        layer = next(m for m in model.modules() if type(m).__name__ == "ChunkedCrossAttention")
        seen: dict = {}

        def remember(module, args, kwargs, seen=seen):
            seen["args"], seen["kwargs"] = args, kwargs

        hook = layer.register_forward_pre_hook(remember, with_kwargs=True)
        with torch.no_grad(), _autocast(device, dtype):
            model(sequence[:, :-1], retrieved)
        hook.remove()
        x = seen["args"][0].detach().requires_grad_()
        keywords = dict(seen["kwargs"], context=seen["kwargs"]["context"].detach().requires_grad_())

        def forward(layer=layer, x=x, keywords=keywords):
            with torch.no_grad(), _autocast(device, dtype):
                return layer(x, **keywords)

        def both(layer=layer, x=x, keywords=keywords):
            with _autocast(device, dtype):
                out = layer(x, **keywords)
            return torch.autograd.grad(out.sum(), [x, keywords["context"], *layer.parameters()])

        calls[STAGES[3]][name], calls[STAGES[4]][name] = Timed(forward), Timed(both)
    return calls
