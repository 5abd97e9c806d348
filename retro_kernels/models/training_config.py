"""The settings of a training run."""

from __future__ import annotations

from dataclasses import dataclass

from ..nn import common
from ..ops import checks
from . import schedules
from .callbacks import LOGGERS

FREE = (
    "output",
    "steps",
    "micro_batch_size",
    "save_every",
    "keep",
    "evaluate_every",
    "patience",
    "log_every",
    "log_to",
    "peak_flops",
)
"""Settings that may differ where a run is continued."""


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """The settings of a run.

    Attributes:
        output: the run's folder: checkpoints (each a model that `from_pretrained` reads, and what resuming needs) and
            `metrics.jsonl`.
        steps: updates of the weights.
        batch_size: rows of `max_length` tokens an update, over all processes and accumulated micro-batches.
        micro_batch_size: rows that a process computes at a time; default `batch_size` over the processes.
        learning_rate, final_learning_rate: the largest, and the last (default a tenth of it).
        schedule: "cosine" (the paper), "linear", "constant" or "wsd" (stable, then a linear decay); see `schedules`.
        warmup_steps: of the linear rise from 1e-7; default 750 (the paper), or a tenth of `steps` if that is less.
        decay_steps: of the decay that ends "wsd"; default a tenth of `steps`.
        weight_decay: of matrices (not of norms, u, v and gates). betas, epsilon: of AdamW.
        clip: the largest norm of the gradient; None: any.
        start_from: the folder of a model with the same config, whose weights the run begins with. None: fresh ones.
        retrofit: the folder of a trained decoder, a `Retro` without chunked cross-attention. Its weights are taken and
            stay as they are; only chunked cross-attention and encoder are trained (appendix B.2 of the paper), so that
            with retrieval off the model remains that decoder. None: all weights are fresh, and trained.
        init: with `retrofit`, what chunked cross-attention and encoder begin with: "random", or "self_attention", the
            decoder's own layers (see `begin_with_self_attention`).
        oracle: begin with neighbours that hold the answer, all rows until the model copies from them, then fewer, a
            tenth to the end (see `curriculum.Curriculum`); the losses of these rows and of the others are logged apart.
            Where chunked cross-attention begins with fresh weights.
        precision: "fp32", or "bf16" (autocast; the weights stay fp32).
        seed: of the initial weights, dropout and the order of rows.
        save_every, keep: steps between checkpoints, and how many are kept.
        evaluate_every: steps between evaluations on held-out text, where there is some; default `save_every`. A better
            loss than all before (with retrieval on) is saved, named by the link `best`, and kept beside the others.
        evaluation_rows: of the held-out text, evenly spread.
        patience: end the run after so many evaluations without a better loss; None: never.
        log_every: steps between lines of metrics.
        log_to: "tensorboard", "wandb", or both, beside metrics.jsonl.
        activation_checkpointing: see `Retro`. compile: run it under torch.compile.
        parallel: with several processes "ddp" or "fsdp" (FSDP2).
        context_parallel: so many processes divide every row of tokens among them, at chunk borders.
        documents_apart: tokens see their own document alone. context_parallel cannot, and wants False.
        tensor_parallel: so many processes divide heads, projections and feed-forwards among them; more processes than
            those need parallel="fsdp".
        peak_flops: of one device, for the model-FLOPs utilisation; None: not given.
        backend: of the attentions; None chooses.

    Raises TypeError or ValueError for what does not fit.
    """

    output: str
    steps: int
    batch_size: int = 256
    micro_batch_size: int | None = None
    learning_rate: float = 2e-4
    final_learning_rate: float | None = None
    schedule: str = "cosine"
    warmup_steps: int | None = None
    decay_steps: int | None = None
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    epsilon: float = 1e-8
    clip: float | None = 1.0
    start_from: str | None = None
    retrofit: str | None = None
    init: str = "random"
    oracle: bool = False
    precision: str = "fp32"
    seed: int = 0
    save_every: int = 1000
    keep: int = 2
    evaluate_every: int | None = None
    evaluation_rows: int = 64
    patience: int | None = None
    log_every: int = 10
    log_to: tuple[str, ...] = ()
    activation_checkpointing: bool = False
    compile: bool = False
    parallel: str = "ddp"
    context_parallel: int = 1
    tensor_parallel: int = 1
    documents_apart: bool = True
    peak_flops: float | None = None
    backend: str | None = None

    def __post_init__(self) -> None:
        for name in (
            "steps",
            "batch_size",
            "save_every",
            "keep",
            "log_every",
            "evaluation_rows",
            "context_parallel",
            "tensor_parallel",
        ):
            checks.integer(name, getattr(self, name), 1)
        checks.integer("seed", self.seed, 0)
        for name, low in (
            ("warmup_steps", 0),
            ("decay_steps", 0),
            ("micro_batch_size", 1),
            ("evaluate_every", 1),
            ("patience", 1),
        ):
            if getattr(self, name) is not None:
                checks.integer(name, getattr(self, name), low)
        common.one_of("schedule", self.schedule, schedules.SCHEDULES)
        names = (self.log_to,) if isinstance(self.log_to, str) else tuple(self.log_to)
        for name in names:
            common.one_of("log_to", name, LOGGERS)
        object.__setattr__(self, "log_to", names)
        if self.start_from is not None and self.retrofit is not None:
            raise ValueError("start_from, retrofit: got both, expected one: both say where weights come from")
        for name in ("learning_rate", "final_learning_rate", "weight_decay", "epsilon"):
            value = getattr(self, name)
            if value is not None and checks.number(name, value) < 0.0:
                raise ValueError(f"{name}: got {value}, expected at least 0")
        for name, none in (("clip", "no limit"), ("peak_flops", "not given")):
            value = getattr(self, name)
            if value is not None and not checks.number(name, value) > 0.0:
                raise ValueError(f"{name}: got {value}, expected more than 0, or None: {none}")
        common.one_of("init", self.init, ("random", "self_attention"))
        if self.init != "random" and self.retrofit is None:
            raise ValueError(
                f"init: got {self.init!r} without retrofit, expected the folder of a trained decoder there"
            )
        common.one_of("precision", self.precision, ("fp32", "bf16"))
        common.one_of("parallel", self.parallel, ("ddp", "fsdp"))
        if self.compile and (self.context_parallel > 1 or self.tensor_parallel > 1):
            raise ValueError(
                "compile: got True with context_parallel or tensor_parallel, expected False: not tried yet"
            )
        object.__setattr__(self, "betas", tuple(self.betas))

    def rate(self, step: int) -> float:
        """The learning rate of the update number `step`, from 0."""
        tenth = max(self.steps // 10, 1)
        return schedules.rate(
            step,
            schedule=self.schedule,
            steps=self.steps,
            warmup=min(750, tenth) if self.warmup_steps is None else self.warmup_steps,
            decay=tenth if self.decay_steps is None else self.decay_steps,
            largest=self.learning_rate,
            final=self.learning_rate / 10 if self.final_learning_rate is None else self.final_learning_rate,
        )
