"""Training: AdamW with warm-up and cosine decay, on one process or several, resumable to the bit."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import shutil
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor

from ..files import move, write_json
from ..nn import common
from ..ops import checks
from ..tokenizers import FILE
from . import checkpoint
from .config import RetroConfig
from .data import IGNORED, Batch, Order, TokenStream, prefetch
from .retro import Retro

METRICS, STATE, PROGRESS, SETTINGS = "metrics.jsonl", "optimiser", "progress.json", "settings.json"
OF_DECODER = (
    "vocab_size",
    "model_dim",
    "num_layers",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "feed_forward_dim",
    "positions",
    "gated_feed_forward",
    "activation",
    "tied_embeddings",
    "norm_eps",
    "tokenizer",
)
ALONE = "torch.distributed is disabled, unavailable or uninitialized"  # told to every run of one process
FLAT = StateDictOptions(flatten_optimizer_state_dict=True)
_STEP = re.compile(r"step-(\d{8})")


class NonFiniteLoss(ArithmeticError):
    """The loss or the gradient is NaN or infinite. The message says where, and what the last good checkpoint is."""


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """The settings of a run.

    Attributes:
        output: the run's folder: checkpoints (each a model that `from_pretrained` reads, and what resuming needs) and
            `metrics.jsonl`.
        steps: updates of the weights.
        batch_size: rows of `max_length` tokens an update, over all processes and accumulated micro-batches.
        micro_batch_size: rows that a process computes at a time; default `batch_size` over the processes.
        learning_rate, final_learning_rate: the largest, and the last (default a tenth of it, by a cosine).
        warmup_steps: of the linear rise from 1e-7.
        weight_decay: of matrices (not of norms, u, v and gates). betas, epsilon: of AdamW.
        clip: the largest norm of the gradient; None: any.
        retrofit: the folder of a trained decoder, a `Retro` without chunked cross-attention. Its weights are taken and
            stay as they are; only chunked cross-attention and encoder are trained (appendix B.2 of the paper), so that
            with retrieval off the model remains that decoder. None: all weights are fresh, and trained.
        init: with `retrofit`, what chunked cross-attention and encoder begin with: "random", or "self_attention", the
            decoder's own layers (see `begin_with_self_attention`).
        precision: "fp32", or "bf16" (autocast; the weights stay fp32).
        seed: of the initial weights, dropout and the order of rows.
        save_every, keep: steps between checkpoints, and how many are kept.
        log_every: steps between lines of metrics.
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
    warmup_steps: int = 750
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    epsilon: float = 1e-8
    clip: float | None = 1.0
    retrofit: str | None = None
    init: str = "random"
    precision: str = "fp32"
    seed: int = 0
    save_every: int = 1000
    keep: int = 2
    log_every: int = 10
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
            "context_parallel",
            "tensor_parallel",
        ):
            checks.integer(name, getattr(self, name), 1)
        checks.integer("warmup_steps", self.warmup_steps, 0)
        checks.integer("seed", self.seed, 0)
        if self.micro_batch_size is not None:
            checks.integer("micro_batch_size", self.micro_batch_size, 1)
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
        first, final = 1e-7, self.learning_rate / 10 if self.final_learning_rate is None else self.final_learning_rate
        if step < self.warmup_steps:
            return first + (self.learning_rate - first) * (step + 1) / self.warmup_steps
        done = (step - self.warmup_steps) / max(self.steps - self.warmup_steps, 1)
        return final + (self.learning_rate - final) * 0.5 * (1 + math.cos(math.pi * done))


class LossOf(nn.Module):
    """The model's loss as a module's `forward`, which is what DDP, FSDP2 and torch.compile wrap: the sum over a
    batch."""

    def __init__(self, model: Retro) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> torch.Tensor:
        return self.model.loss(*batch, reduction="sum")


def take_decoder(model: Retro, folder: str | os.PathLike[str]) -> None:
    """Gives the model the weights of the decoder in the folder, and freezes them.

    Raises FileNotFoundError for a folder that is not there; ValueError for a decoder that would compute something else
    in this model (OF_DECODER names what has to agree), for one that has chunked cross-attention already, and for a
    model that has none.
    """
    decoder = Retro.from_pretrained(folder)
    if decoder.encoder is not None or model.encoder is None:
        which = "the decoder has" if decoder.encoder is not None else "the model has no"
        raise ValueError(f"retrofit: {which} chunked cross-attention, expected a decoder without and a model with it")
    theirs, mine = decoder.config.to_dict(), model.config.to_dict()
    different = [f"{name} = {theirs[name]!r}, not {mine[name]!r}" for name in OF_DECODER if theirs[name] != mine[name]]
    if different:
        raise ValueError(f"retrofit: the decoder in {folder} has {'; '.join(different)}; expected the model's")
    weights = decoder.state_dict()
    model.load_state_dict(weights, strict=False)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in weights)


@torch.no_grad()
def begin_with_self_attention(model: Retro) -> None:
    """Chunked cross-attention takes the weights of the self-attention of its block, the encoder those of the decoder's
    first layers: a decoder that finds in its own text what it has read before then finds it in neighbours. The
    encoder's cross-attention adds nothing at first, and gates of blocks are opened to 0.3.

    Raises ValueError where the sizes of encoder and decoder differ.
    """
    config = model.config
    encoder: Any = model.encoder
    blocks: list[Any] = list(model.blocks)
    for name, theirs, mine in (
        ("encoder_dim", config.encoder_dim, config.model_dim),
        ("encoder_heads", config.encoder_heads, config.num_heads),
        ("encoder_head_dim", config.encoder_head_dim, config.head_dim),
        ("encoder_feed_forward_dim", config.encoder_feed_forward_dim, config.feed_forward_dim),
        ("num_kv_heads", config.num_kv_heads, config.num_heads),
    ):
        if theirs != mine:
            raise ValueError(f'init: got "self_attention" with {name} = {theirs}, expected {mine}, as in the decoder')
    if config.encoder_layers > config.num_layers:
        raise ValueError(
            f'init: got "self_attention" with encoder_layers = {config.encoder_layers}, expected at most num_layers = '
            f"{config.num_layers}"
        )
    if model.encoder_embedding is not None:
        model.encoder_embedding.weight.copy_(model.embedding.weight)
    for layer, block in zip(encoder.layers, blocks):
        for name in ("self_norm", "self_attention", "feed_forward_norm", "feed_forward"):
            getattr(layer, name).load_state_dict(getattr(block, name).state_dict(), strict=False)
        if layer.cross_attention is not None:
            layer.cross_attention.w_out.weight.zero_()
    retrieving = [block for block in blocks if block.cross_attention is not None]
    for block in retrieving:
        block.cross_attention.load_state_dict(block.self_attention.state_dict(), strict=False)
        block.cross_norm.load_state_dict(block.self_norm.state_dict())
        if block.gate is not None:
            block.gate.fill_(math.atanh(0.3))
    if encoder.final_norm is not None:
        encoder.final_norm.load_state_dict(retrieving[0].self_norm.state_dict())


class Trainer:
    """A run: makes the model or takes up the last checkpoint in `settings.output`, then `run()`.

    In several processes (torchrun) the process group must have been initialised.

    Args:
        config: of the model. stream: the data. settings: of the run.
        device: where to train. say: what to tell the user with.

    Raises ValueError when the folder holds a run of another config or other settings (but for `steps` and how often is
    saved and logged), and for a decoder that the model cannot take (see `take_decoder`).
    """

    def __init__(
        self,
        config: RetroConfig,
        stream: TokenStream,
        settings: TrainingConfig,
        *,
        device: torch.device | str = "cpu",
        say: Callable[[str], None] = print,
    ) -> None:
        self.config, self.stream, self.settings, self.device = config, stream, settings, torch.device(device)
        several = dist.is_available() and dist.is_initialized()
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if several else (0, 1)
        self.say = say if self.rank == 0 else lambda text: None
        parts, together = settings.context_parallel, settings.context_parallel * settings.tensor_parallel
        if self.world % together:
            raise ValueError(
                f"context_parallel, tensor_parallel: got {parts} and {settings.tensor_parallel}, expected that their "
                f"product divides the {self.world} processes"
            )
        if config.max_length % (parts * config.chunk_size):
            raise ValueError(
                f"context_parallel: got {parts}, expected that max_length = {config.max_length} is so many parts of "
                f"whole chunks of {config.chunk_size}"
            )
        if parts > 1 and settings.documents_apart and stream.documents is not None:
            raise ValueError(
                f"documents_apart: got True with context_parallel = {parts}, expected False: the processes that share "
                "a row do not keep its documents apart"
            )
        # Ranks count through tensor parallelism first, then context, then data.
        self.context_rank = self.rank // settings.tensor_parallel % parts
        self.replica, replicas = self.rank // together, self.world // together
        if settings.batch_size % replicas:
            raise ValueError(f"batch_size: got {settings.batch_size}, expected a multiple of the {replicas} replicas")
        self.share = settings.batch_size // replicas
        micro = self.share if settings.micro_batch_size is None else settings.micro_batch_size
        if self.share % micro:
            raise ValueError(f"micro_batch_size: got {micro}, expected a divisor of {self.share}, a process's rows")
        self.micro = micro
        self.folder = Path(settings.output)
        self.tokenizer = self._tokenizer()
        torch.manual_seed(settings.seed)
        self.model = Retro(config, backend=settings.backend).to(self.device)
        self.model.activation_checkpointing = settings.activation_checkpointing
        if settings.retrofit is not None:
            take_decoder(self.model, settings.retrofit)
            if settings.init == "self_attention":
                begin_with_self_attention(self.model)
        self.wrapped = self._wrap()
        groups = []
        for parameters in _by_mesh(self.model.parameters()):
            for kind, decay in ((True, settings.weight_decay), (False, 0.0)):
                chosen = [p for p in parameters if (p.dim() >= 2) is kind and p.requires_grad]
                groups += [{"params": chosen, "weight_decay": decay}] if chosen else []
        self.optimiser = torch.optim.AdamW(
            groups, lr=settings.learning_rate, betas=settings.betas, eps=settings.epsilon
        )
        # Every rank draws its own dropout, but for those that hold the same activations.
        torch.manual_seed(settings.seed + 1 + self.rank // settings.tensor_parallel)
        self.step, self.seen = 0, 0
        self._resume()

    def run(self) -> float:
        """Trains to `settings.steps`; -> the loss of the last update, NaN if there was none.

        Raises NonFiniteLoss, and ValueError for data that do not fit.
        """
        settings = self.settings
        tensorboard = self._tensorboard()
        batches = prefetch(
            self.stream,
            Order(self.stream.rows, settings.seed),
            self._places(),
            self.device,
            (self.context_rank, settings.context_parallel),
            documents_apart=settings.documents_apart,
        )
        flops = 3 * sum(self.config.forward_flops().values()) * settings.batch_size
        self.model.train()
        loss, since, at = math.nan, time.perf_counter(), self.step
        while self.step < settings.steps:
            loss, norm = self._update(batches)
            if self.step % settings.log_every == 0 or self.step == settings.steps:
                seconds = (time.perf_counter() - since) / (self.step - at)
                since, at = time.perf_counter(), self.step
                tokens = settings.batch_size * self.config.max_length
                line = {
                    "step": self.step,
                    "loss": loss,
                    "learning_rate": settings.rate(self.step - 1),
                    "gradient_norm": norm,
                    "rows": self.seen,
                    "tokens": self.seen * self.config.max_length,
                    "seconds_a_step": seconds,
                    "tokens_a_second": tokens / seconds,
                }
                if settings.peak_flops is not None:
                    line["model_flops_utilisation"] = flops / seconds / (settings.peak_flops * self.world)
                self._log(line, tensorboard)
            if self.step % settings.save_every == 0 or self.step == settings.steps:
                self.save()
        if tensorboard is not None:
            tensorboard.close()
        return loss

    def _update(self, batches: Iterator[Batch]) -> tuple[float, float]:
        """One update of the weights; -> the mean loss and the norm of the gradient."""
        settings = self.settings
        for group in self.optimiser.param_groups:
            group["lr"] = settings.rate(self.step)
        parts = [next(batches) for _ in range(self.share // self.micro)]
        count = torch.stack([(part.targets != IGNORED).sum() for part in parts]).sum().to(torch.float64)
        self._sum(count)
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        self.optimiser.zero_grad()
        for i, part in enumerate(parts):
            self._synchronise(last=i == len(parts) - 1)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=settings.precision == "bf16"):
                loss = self.wrapped(part)
            # DDP and FSDP2 take the mean over the replicas' and the rows' parts; `count` has every token as often as
            # processes share its projections.
            (loss * (self.world / count)).backward()
            total += loss.detach()
        self._sum(total)
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        norms = [nn.utils.get_total_norm([p.grad for p in x if p.grad is not None]) for x in _by_mesh(parameters)]
        norm = nn.utils.get_total_norm([x.full_tensor() if isinstance(x, DTensor) else x for x in norms])
        mean, length = (total / count).item(), norm.item()
        if not (math.isfinite(mean) and math.isfinite(length)):
            self._stop(mean, length)
        if settings.clip is not None:
            for some in _by_mesh(parameters):
                nn.utils.clip_grads_with_norm_(some, settings.clip, norm)
        self.optimiser.step()
        self.step += 1
        self.seen += settings.batch_size
        return mean, length

    def _stop(self, loss: float, norm: float) -> None:
        rows = [Order(self.stream.rows, self.settings.seed)[self.seen + i] for i in range(self.settings.batch_size)]
        last = checkpoints(self.folder)
        kept = f"the last good checkpoint is {last[-1]}" if last else "there is no checkpoint yet"
        raise NonFiniteLoss(
            f"update {self.step + 1}: loss {loss}, gradient norm {norm}; the weights were not changed, {kept}. Its "
            f"rows of {self.stream.folder} are {', '.join(map(str, rows[:8]))}{' ...' if len(rows) > 8 else ''}. Try a "
            "smaller learning_rate, a longer warm-up, or other data."
        )

    def _places(self) -> Iterator[list[int]]:
        """Rows seen before each of this process's micro-batches, in order."""
        for step in range(self.step, self.settings.steps):
            start = step * self.settings.batch_size + self.replica * self.share
            for at in range(start, start + self.share, self.micro):
                yield list(range(at, at + self.micro))

    def _wrap(self) -> Any:
        wrapped: Any = LossOf(self.model)
        settings, context, tensor = self.settings, self.settings.context_parallel, self.settings.tensor_parallel
        gradients_meet = self.world > tensor
        if gradients_meet and tensor > 1 and settings.parallel != "fsdp":
            raise ValueError(
                f"parallel: got {settings.parallel!r} with tensor_parallel = {tensor} of {self.world} processes, "
                "expected 'fsdp', which keeps parts of parameters"
            )
        if self.world > 1:
            from torch.distributed.device_mesh import init_device_mesh

            from .parallel import divide_projections, divide_rows

            sizes, names = (self.world // (context * tensor), context, tensor), ("replica", "context", "tensor")
            mesh = init_device_mesh(self.device.type, sizes, mesh_dim_names=names)
            if tensor > 1:
                divide_projections(self.model, mesh["tensor"])
            if context > 1:  # of the heads that are left to this process
                divide_rows(self.model, mesh.get_group("context"))
            if gradients_meet and settings.parallel == "fsdp":
                from torch.distributed.fsdp import fully_shard

                shards = mesh["replica", "context"]._flatten("shard")
                for part in (*self.model.blocks, *([self.model.encoder] if self.model.encoder is not None else [])):
                    fully_shard(part, mesh=shards)
                fully_shard(wrapped, mesh=shards)
        if settings.compile:
            wrapped = torch.compile(wrapped)
        if gradients_meet and settings.parallel == "ddp":
            # Without neighbours the encoder is left out.
            unused = self.model.encoder is not None and self.stream.neighbours is None
            wrapped = nn.parallel.DistributedDataParallel(wrapped, find_unused_parameters=unused)
        return wrapped

    def _synchronise(self, *, last: bool) -> None:
        """Gradients are exchanged once an update, with its last micro-batch."""
        if isinstance(self.wrapped, nn.parallel.DistributedDataParallel):
            self.wrapped.require_backward_grad_sync = last
        elif hasattr(self.wrapped, "set_requires_gradient_sync"):
            self.wrapped.set_requires_gradient_sync(last)

    def _sum(self, x: torch.Tensor) -> None:
        if self.world > 1:
            dist.all_reduce(x)

    def _tokenizer(self) -> Path | None:
        """The tokenizer's file, of which every checkpoint has a copy."""
        if self.rank or self.stream.tokenizer is None:
            return None
        from ..retrieval import DatabaseError, open_tokenizer

        try:
            return getattr(open_tokenizer(self.stream.tokenizer), "path", None)
        except DatabaseError as error:
            self.say(f"Checkpoints will have no {FILE}, which generation needs: {error}")
            return None

    def _tensorboard(self) -> Any:
        if self.rank:
            return None
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            self.say("TensorBoard is not installed: metrics go to metrics.jsonl only")
            return None
        return SummaryWriter(self.folder / "tensorboard", purge_step=self.step)

    def _log(self, line: dict[str, Any], tensorboard: Any) -> None:
        if self.rank:
            return
        with (self.folder / METRICS).open("a") as file:
            file.write(json.dumps(line) + "\n")
        if tensorboard is not None:
            for name, value in line.items():
                tensorboard.add_scalar(name, value, line["step"])
        utilisation = line.get("model_flops_utilisation")
        self.say(
            f"step {line['step']}/{self.settings.steps}  loss {line['loss']:.4f}  "
            f"{line['tokens_a_second']:.0f} tokens/s" + (f"  MFU {utilisation:.1%}" if utilisation else "")
        )

    def save(self) -> Path:
        """A checkpoint of this step, written beside and then renamed; older ones go. Every process writes its part of
        the optimiser's state; the first one writes the weights, a file at a time."""
        target = self.folder / f"step-{self.step:08d}"
        partial = self.folder / f".{target.name}.partial"
        if self.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        self._barrier()
        weights: Any = get_model_state_dict(self.model)
        checkpoint.write(self.config, weights, partial, writes=self.rank == 0)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ALONE)
            dcp.save(self._state(), checkpoint_id=partial / STATE, no_dist=self.world == 1)
        if self.rank == 0:
            if self.tokenizer is not None:
                shutil.copyfile(self.tokenizer, partial / FILE)
            write_json(partial / PROGRESS, {"step": self.step, "rows": self.seen, "processes": self.world})
            shutil.rmtree(target, ignore_errors=True)
            move(partial, target)
            for old in checkpoints(self.folder)[: -self.settings.keep]:
                shutil.rmtree(old)
        self._barrier()
        return target

    def _state(self) -> dict[str, Any]:
        """The optimiser's state, as this process holds it, and the state of its random numbers."""
        random = {f"{self.rank}.cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            random[f"{self.rank}.cuda"] = torch.cuda.get_rng_state(self.device)
        return {"optimiser": get_optimizer_state_dict(self.model, self.optimiser, options=FLAT), "random": random}

    def _load_state(self, folder: Path) -> None:
        """Restores what `_state` gave, divided among as many processes as there are now."""
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder} is not there; expected a checkpoint that this version wrote")
        state = self._state()
        stored = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
        state["random"] = {name: x for name, x in state["random"].items() if f"random.{name}" in stored}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ALONE)
            dcp.load(state, checkpoint_id=folder, no_dist=self.world == 1)
        set_optimizer_state_dict(self.model, self.optimiser, state["optimiser"], options=FLAT)
        if f"{self.rank}.cpu" in state["random"]:
            torch.set_rng_state(state["random"][f"{self.rank}.cpu"])
        if f"{self.rank}.cuda" in state["random"]:
            torch.cuda.set_rng_state(state["random"][f"{self.rank}.cuda"], self.device)

    def _resume(self) -> None:
        settings = {"model": self.config.to_dict(), **dataclasses.asdict(self.settings)}
        for free in ("steps", "save_every", "keep", "log_every", "peak_flops", "output", "micro_batch_size"):
            settings.pop(free)
        settings = json.loads(json.dumps(settings))
        path = self.folder / SETTINGS
        found = checkpoints(self.folder)
        if found and path.exists():
            stored = json.loads(path.read_text())
            different = [name for name in settings if stored.get(name) != settings[name]]
            if different:
                raise ValueError(
                    f"{path}: the run in this folder has another {', '.join(different)}; continue it with the same, or "
                    "give another output"
                )
        self._barrier()  # all have read before one writes
        if self.rank == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(settings, indent=1) + "\n")
        if not found:
            if self.rank == 0:
                (self.folder / METRICS).write_text("")
            self._barrier()
            return
        last = found[-1]
        progress = json.loads((last / PROGRESS).read_text())
        if progress["processes"] != self.world:
            self.say(
                f"{last} was written by {progress['processes']} processes: dropout will not be the same to the bit"
            )
        weights: Any = Retro.from_pretrained(last, config=self.config).state_dict()
        set_model_state_dict(self.model, weights, options=StateDictOptions(full_state_dict=True))
        self._load_state(last / STATE)
        self.step, self.seen = progress["step"], progress["rows"]
        if self.rank == 0 and (self.folder / METRICS).exists():
            lines = (self.folder / METRICS).read_text().splitlines(keepends=True)
            (self.folder / METRICS).write_text("".join(x for x in lines if json.loads(x)["step"] <= self.step))
        self.say(f"continuing from {last}")
        self._barrier()

    def _barrier(self) -> None:
        if self.world > 1:
            dist.barrier()


def _by_mesh(parameters: Iterable[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Parameters that are divided among the same processes, or not at all, together: operations on lists of tensors
    take no others."""
    groups: dict[Any, list[nn.Parameter]] = {}
    for parameter in parameters:
        groups.setdefault(parameter.device_mesh if isinstance(parameter, DTensor) else None, []).append(parameter)
    return list(groups.values())


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted(path for path in found if _STEP.fullmatch(path.name) and (path / PROGRESS).exists())
