"""Training: AdamW with warm-up and decay, on one process or several, resumable to the bit."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from ..files import write_json
from ..tokenizers import FILE, hash_of_file
from . import checkpoint, parallel
from .callbacks import Callback, Console, loggers
from .config import RetroConfig
from .curriculum import Curriculum, may_see
from .data import IGNORED, Batch, Order, TokenStream, other_rows, prefetch
from .initialisation import begin_with_self_attention, take_decoder
from .retro import Retro
from .run_folder import (
    METRICS,
    PROGRESS,
    SETTINGS,
    STATE,
    checkpoints,
    complete,
    hold,
    mend_metrics,
    newest_whole,
    point_to_best,
    read_json,
)
from .training_config import FREE, TrainingConfig

ALONE = "torch.distributed is disabled, unavailable or uninitialized"  # told to every run of one process
FLAT = StateDictOptions(flatten_optimizer_state_dict=True)
MANY_EPOCHS = 50


class NonFiniteLoss(ArithmeticError):
    """The loss or the gradient is NaN or infinite. The message says where, and what the last good checkpoint is."""


class LossOf(nn.Module):
    """The model's loss as a module's `forward`, which is what DDP, FSDP2 and torch.compile wrap: of every token of a
    batch [b, n], 0 where there is no target."""

    def __init__(self, model: Retro) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> torch.Tensor:
        return self.model.loss(*batch, reduction="none")


class LossSums:
    """Sums of losses of an update, by name."""

    def __init__(self) -> None:
        self.sums: dict[str, torch.Tensor] = {}

    def add(self, name: str, losses: torch.Tensor, which: torch.Tensor) -> None:
        both = torch.stack([losses.detach().masked_fill(~which, 0).double().sum(), which.sum().double()])
        self.sums[name] = self.sums.get(name, 0) + both

    def means(self, sum_up: Callable[[torch.Tensor], None]) -> dict[str, float]:
        """Nats a token, over all processes, of those kinds that had some."""
        for both in self.sums.values():
            sum_up(both)
        return {name: float(both[0] / both[1]) for name, both in self.sums.items() if both[1]}


class Trainer:
    """A run: makes the model or takes up the newest whole checkpoint in `settings.output`, then `run()`.

    In several processes (torchrun) the process group must have been initialised. The folder is held from the first to
    the end of `run()`, or until the trainer is gone.

    Args:
        config: of the model. stream: the data. settings: of the run.
        held_out: text that is evaluated on while training; None: none.
        device: where to train. say: what to tell the user with. callbacks: told what happens, see `Callback`.

    Raises ValueError when the folder holds a run of another config, other data or other settings (but for FREE), where
    none of its checkpoints is whole, and for weights that the model cannot take (see `take_decoder`); BlockingIOError
    where another trainer holds the folder.
    """

    def __init__(
        self,
        config: RetroConfig,
        stream: TokenStream,
        settings: TrainingConfig,
        *,
        held_out: TokenStream | None = None,
        device: torch.device | str = "cpu",
        say: Callable[[str], None] = print,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        self.config, self.stream, self.settings, self.device = config, stream, settings, torch.device(device)
        self.held_out, self.stop = held_out, False
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
        if settings.oracle and (stream.neighbours is None or not config.cross_attention_layers):
            raise ValueError("oracle: got True without neighbours that are read, expected data and a model with them")
        if settings.oracle and parts > 1:
            raise ValueError(
                f"oracle: got True with context_parallel = {parts}, expected False: a process has not the text that "
                "comes after its part of a row"
            )
        self.curriculum = Curriculum(config.chunk_size, settings.seed) if settings.oracle else None
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
        self._held: ExitStack | None = None
        self._hold()
        try:
            self._prepare(callbacks)
        except BaseException:
            self._release()
            raise

    def _prepare(self, callbacks: Sequence[Callback]) -> None:
        config, settings = self.config, self.settings
        self.callbacks: list[Callback] = []
        if self.rank == 0:
            self.callbacks = [Console(self.say), *loggers(settings.log_to), *callbacks]
        self.tokenizer = self._tokenizer()
        torch.manual_seed(settings.seed)
        self.model = Retro(config, backend=settings.backend).to(self.device)
        self.model.activation_checkpointing = settings.activation_checkpointing
        if settings.retrofit is not None:
            take_decoder(self.model, settings.retrofit)
            if settings.init == "self_attention":
                begin_with_self_attention(self.model)
        if settings.start_from is not None:
            start = Retro.from_pretrained(settings.start_from, config=config, device=self.device)
            self.model.load_state_dict(start.state_dict())
        reads = self.stream.neighbours is not None
        self.wrapped = parallel.divide(LossOf(self.model), self.model, settings, self.device, reads_neighbours=reads)
        groups = []
        for parameters in parallel.by_mesh(self.model.parameters()):
            for kind, decay in ((True, settings.weight_decay), (False, 0.0)):
                chosen = [p for p in parameters if (p.dim() >= 2) is kind and p.requires_grad]
                groups += [{"params": chosen, "weight_decay": decay}] if chosen else []
        self.optimiser = torch.optim.AdamW(
            groups, lr=settings.learning_rate, betas=settings.betas, eps=settings.epsilon
        )
        # Every rank draws its own dropout, but for those that hold the same activations.
        torch.manual_seed(settings.seed + 1 + self.rank // settings.tensor_parallel)
        self.step, self.seen = 0, 0
        self.best: dict[str, Any] | None = None
        self.evaluations_without_better = 0
        self._resume()
        if self.step < settings.steps:
            self._say_plan()

    def run(self) -> float:
        """Trains to `settings.steps`; -> the loss of the last update, NaN if there was none.

        Raises NonFiniteLoss, and ValueError for data that do not fit.
        """
        self._hold()
        try:
            return self._run()
        finally:
            self._tell("on_end")
            self._release()

    def _run(self) -> float:
        settings = self.settings
        batches = prefetch(
            self.stream,
            Order(self.stream.rows, settings.seed),
            self._places(),
            self.device,
            (self.context_rank, settings.context_parallel),
            documents_apart=settings.documents_apart,
        )
        flops = 3 * sum(self.config.forward_flops().values()) * settings.batch_size
        tokens = settings.batch_size * self.config.max_length
        every = settings.save_every if settings.evaluate_every is None else settings.evaluate_every
        self.model.train()
        self._tell("on_begin")
        loss, since, before, at = math.nan, time.perf_counter(), time.perf_counter(), self.step
        self.stop = settings.patience is not None and self.evaluations_without_better >= settings.patience
        while self.step < settings.steps and not self.stop:
            loss, norm, losses = self._update(batches)
            last = self.step == settings.steps
            line = {
                "step": self.step,
                "loss": loss,
                "learning_rate": settings.rate(self.step - 1),
                "gradient_norm": norm,
                **losses,
                "rows": self.seen,
                "tokens": self.seen * self.config.max_length,
            }

            def timed(seconds: float, line: dict[str, Any] = line) -> dict[str, Any]:
                line = {**line, "seconds_a_step": seconds, "tokens_a_second": tokens / seconds}
                if settings.peak_flops is not None:
                    line["model_flops_utilisation"] = flops / seconds / (settings.peak_flops * self.world)
                return line

            now = time.perf_counter()
            self._tell("on_step", timed(now - before))
            if self.step % settings.log_every == 0 or last:
                self._log("on_log", timed((now - since) / (self.step - at)))
                since, at = now, self.step
            paused = time.perf_counter()
            better = self.held_out is not None and (self.step % every == 0 or last) and self._evaluate()
            if self.step % settings.save_every == 0 or last or better or self.stop:
                self.save()
            before = time.perf_counter()
            since += before - paused
        return loss

    def _evaluate(self) -> bool:
        """Measures the held-out loss. -> is it better than all before?"""
        losses = self.evaluate()
        measured = losses.get("held_out_on", losses["held_out_off"])
        better = self.best is None or measured < self.best["loss"]
        if better:
            self.best, self.evaluations_without_better = {"step": self.step, "loss": measured}, 0
        else:
            self.evaluations_without_better += 1
        self._log("on_evaluation", {"step": self.step, **losses})
        patience = self.settings.patience
        if patience is not None and self.evaluations_without_better >= patience and self.best is not None:
            self.stop = True
            self.say(
                f"Stopped early: {patience} evaluations without a better held-out loss than {self.best['loss']:.4f} at "
                f"step {self.best['step']}"
            )
        return better

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """The loss on `evaluation_rows` rows of the held-out text, in nats a token: "held_out_off", and where there are
        neighbours "held_out_on" and "held_out_random" (those of another row). Draws no random number. Every process
        computes all rows, but its own part of each where it shares rows.

        Raises ValueError where there is no held-out text.
        """
        stream, settings = self.held_out, self.settings
        if stream is None:
            raise ValueError("held_out: got none, expected some text to evaluate on")
        count = min(settings.evaluation_rows, stream.rows)
        rows = [i * stream.rows // count for i in range(count)]
        modes = ["held_out_on", "held_out_off", "held_out_random"]
        if stream.neighbours is None or not self.config.cross_attention_layers:
            modes = ["held_out_off"]
        elif stream.rows == 1:
            modes.remove("held_out_random")
        other = other_rows(stream.rows, 0) if len(modes) == 3 else []
        part = (self.context_rank, settings.context_parallel)
        sums = {}
        self.model.eval()
        for mode in modes:
            total = torch.zeros(2, dtype=torch.float64, device=self.device)
            for at in range(0, count, self.micro):
                some = rows[at : at + self.micro]
                batch = stream.batch(
                    some,
                    0 if mode == "held_out_off" else None,
                    [other[row] for row in some] if mode == "held_out_random" else None,
                )
                batch = (batch if settings.documents_apart else batch._replace(sequence_starts=None)).part(*part)
                with torch.autocast(self.device.type, torch.bfloat16, enabled=settings.precision == "bf16"):
                    loss = self.wrapped(batch.to(self.device)).sum()
                total += torch.stack([loss.double(), (batch.targets != IGNORED).sum().to(loss.device).double()])
            self._sum(total)
            sums[mode] = float(total[0] / total[1])
        self.model.train()
        return sums

    def _update(self, batches: Iterator[Batch]) -> tuple[float, float, dict[str, float]]:
        """One update of the weights; -> the mean loss, the norm of the gradient, and what the curriculum logs."""
        settings = self.settings
        for group in self.optimiser.param_groups:
            group["lr"] = settings.rate(self.step)
        parts = [next(batches) for _ in range(self.share // self.micro)]
        count = torch.stack([(part.targets != IGNORED).sum() for part in parts]).sum().to(torch.float64)
        self._sum(count)
        count.clamp_(min=1)  # rows may hold nothing to predict
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        self.optimiser.zero_grad()
        sums = LossSums()
        for i, part in enumerate(parts):
            parallel.exchange_gradients(self.wrapped, i == len(parts) - 1)
            oracle = None
            if self.curriculum is not None:
                place = self.seen + self.replica * self.share + i * self.micro
                part, oracle = self.curriculum.put(part, place, self.step)
                if self.curriculum.due(self.step):
                    sums.add("loss_without", self._losses_without(part), may_see(part, self.config.chunk_size))
            with torch.autocast(self.device.type, torch.bfloat16, enabled=settings.precision == "bf16"):
                losses = self.wrapped(part)
            loss = losses.sum()
            if oracle is not None:
                seen = may_see(part, self.config.chunk_size)
                sums.add("loss_oracle", losses, seen & oracle[:, None])
                sums.add("loss_retrieved", losses, seen & ~oracle[:, None])
            # DDP and FSDP2 take the mean over the replicas' and the rows' parts; `count` has every token as often as
            # processes share its projections.
            (loss * (self.world / count)).backward()
            total += loss.detach()
            self._tell("on_part", i + 1, len(parts))
        self._sum(total)
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        norm = parallel.gradient_norm(parameters)
        mean, length = (total / count).item(), norm.item()
        if not (math.isfinite(mean) and math.isfinite(length)):
            self._stop(mean, length)
        if settings.clip is not None:
            for some in parallel.by_mesh(parameters):
                nn.utils.clip_grads_with_norm_(some, settings.clip, norm)
        self.optimiser.step()
        found = {}
        if self.curriculum is not None:
            found = {**sums.means(self._sum), "oracle_share": self.curriculum.share(self.step)}
            if "loss_without" in found:
                self.curriculum.judge(self.step, found["loss_oracle"], found["loss_without"])
        self.step += 1
        self.seen += settings.batch_size
        return mean, length, found

    @torch.no_grad()
    def _losses_without(self, batch: Batch) -> torch.Tensor:
        self.model.eval()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.precision == "bf16"):
            found = self.wrapped(batch._replace(neighbours=None, neighbour_mask=None))
        self.model.train()
        return found

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

    def _sum(self, x: torch.Tensor) -> None:
        if self.world > 1:
            dist.all_reduce(x)

    def _tokenizer(self) -> Path | None:
        """The tokenizer's file, of which every checkpoint has a copy."""
        if self.rank or self.stream.tokenizer is None:
            return None
        from ..retrieval import DatabaseError, open_tokenizer

        beside = self.stream.folder / FILE
        if beside.is_file() and hash_of_file(beside) == self.stream.tokenizer.get("sha256"):
            return beside
        try:
            return getattr(open_tokenizer(self.stream.tokenizer), "path", None)
        except DatabaseError as error:
            self.say(f"Checkpoints will have no {FILE}, which generation needs: {error}")
            return None

    def _tell(self, what: str, *given: Any) -> None:
        for callback in self.callbacks:
            getattr(callback, what)(self, *given)

    def _log(self, what: str, line: dict[str, Any]) -> None:
        if self.rank == 0:
            with (self.folder / METRICS).open("a") as file:
                file.write(json.dumps(line) + "\n")
        self._tell(what, line)

    def description(self) -> dict[str, Any]:
        """What makes the run what it is: the model's config, the settings, and what identifies the data."""
        settings = {"model": self.config.to_dict(), **dataclasses.asdict(self.settings), "data": self.stream.identity()}
        if self.held_out is not None:
            settings["held_out"] = self.held_out.identity()
        return json.loads(json.dumps(settings))

    def _say_plan(self) -> None:
        """Says what is to come, and what of it makes no sense."""
        settings, rows, n = self.settings, self.stream.rows, self.config.max_length
        parts = {name: count for name, count in self.model.count_parameters().items() if count}
        counts = ", ".join(f"{name} {count / 1e6:,.1f}" for name, count in parts.items())
        left = settings.steps - self.step
        epochs = settings.steps * settings.batch_size / rows
        self.say(f"{sum(parts.values()) / 1e6:,.1f} million parameters ({counts}) on {self.device}")
        self.say(
            f"{rows:,} rows of {n:,} tokens ({self.stream.num_targets:,} to predict); {left:,} updates of "
            f"{settings.batch_size:,} rows, {epochs:,.2f} epochs in all"
        )
        if settings.batch_size > rows:
            self.say(
                f"Warning: batch_size {settings.batch_size} is more than the {rows} rows there are: every update sees "
                f"all of them, about {settings.batch_size / rows:.1f} times"
            )
        elif epochs > MANY_EPOCHS:
            self.say(f"Warning: every row is seen {epochs:,.0f} times, which is learned by heart")
        warmup = settings.warmup_steps
        if warmup is not None and warmup >= settings.steps:
            self.say(f"Warning: warmup_steps {warmup} is not less than steps {settings.steps}: the rate only rises")
        if self.config.cross_attention_layers and self.stream.neighbours is None:
            self.say(f"Warning: {self.stream.folder} has no neighbours: what reads them is not trained")
        lost = self.stream.facts.get("lost_by_tokenizer")
        if lost:
            self.say(f"Warning: the data's tokenizer loses {', '.join(lost)}: the model cannot write them")
        lacking = self.stream.share_without_neighbours()
        if lacking:
            self.say(f"{lacking:.1%} of the neighbours are missing")

    def _hold(self) -> None:
        if self.rank == 0 and self._held is None:
            stack = ExitStack()
            stack.enter_context(hold(self.folder))
            self._held = stack

    def _release(self) -> None:
        if self._held is not None:
            self._held.close()
            self._held = None

    def save(self) -> Path:
        """A checkpoint of this step, written beside and then renamed, once it is on the disk with a checksum of every
        file; older ones go, but not the one with the best held-out loss. Every process writes its part of the
        optimiser's state; the first one writes the weights, a file at a time."""
        target = self.folder / f"step-{self.step:08d}"
        partial = self.folder / f".{target.name}.partial"
        if self.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        self._barrier()
        weights: Any = get_model_state_dict(self.model)
        checkpoint.write(self.config, weights, partial, writes=self.rank == 0)
        with _plain_errors(partial / STATE):
            dcp.save(self._state(), checkpoint_id=partial / STATE, no_dist=self.world == 1)
        if self.rank == 0:
            if self.tokenizer is not None:
                shutil.copyfile(self.tokenizer, partial / FILE)
            progress = {
                "step": self.step,
                "rows": self.seen,
                "processes": self.world,
                "best": self.best,
                "evaluations_without_better": self.evaluations_without_better,
                "copied_at": None if self.curriculum is None else self.curriculum.copied_at,
                "settings": {name: x for name, x in self.description().items() if name not in FREE},
            }
            write_json(partial / PROGRESS, progress)
            complete(partial, target)
            kept = None if self.best is None else f"step-{self.best['step']:08d}"
            if kept == target.name:
                point_to_best(self.folder, target)
            for old in checkpoints(self.folder)[: -self.settings.keep]:
                if old.name != kept:
                    shutil.rmtree(old)
            self._tell("on_save", target)
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
        with _plain_errors(folder):
            dcp.load(state, checkpoint_id=folder, no_dist=self.world == 1)
        set_optimizer_state_dict(self.model, self.optimiser, state["optimiser"], options=FLAT)
        if f"{self.rank}.cpu" in state["random"]:
            torch.set_rng_state(state["random"][f"{self.rank}.cpu"])
        if f"{self.rank}.cuda" in state["random"]:
            torch.cuda.set_rng_state(state["random"][f"{self.rank}.cuda"], self.device)

    def _resume(self) -> None:
        last = newest_whole(self.folder, self.say) if self.rank == 0 else None
        if self.world > 1:
            chosen = [last]
            dist.broadcast_object_list(chosen, src=0)
            last = chosen[0]
        progress = None if last is None else read_json(last / PROGRESS)
        if isinstance(progress, str):
            raise ValueError(f"{last}: {progress}")
        if progress is not None:
            self._refuse_other(progress.get("settings"))
        self._barrier()  # all have read before one writes
        if self.rank == 0:
            for left in self.folder.glob(".step-*.partial"):  # of a run that was killed while it saved
                shutil.rmtree(left)
            write_json(self.folder / SETTINGS, self.description())
            mend_metrics(self.folder, 0 if progress is None else progress["step"], self.say)
        if last is None or progress is None:
            self._barrier()
            return
        if progress["processes"] != self.world:
            self.say(
                f"{last} was written by {progress['processes']} processes: dropout will not be the same to the bit"
            )
        weights: Any = Retro.from_pretrained(last, config=self.config).state_dict()
        set_model_state_dict(self.model, weights, options=StateDictOptions(full_state_dict=True))
        self._load_state(last / STATE)
        self.step, self.seen = progress["step"], progress["rows"]
        self.best, self.evaluations_without_better = progress["best"], progress["evaluations_without_better"]
        if self.curriculum is not None:
            self.curriculum.copied_at = progress["copied_at"]
        if self.rank == 0 and self.best is not None:
            best = self.folder / f"step-{self.best['step']:08d}"
            if best.is_dir():
                point_to_best(self.folder, best)
        self.say(f"continuing from {last}")
        self._barrier()

    def _refuse_other(self, stored: Any) -> None:
        """Raises ValueError, naming what differs, where the run in the folder is another one than this."""
        mine = self.description()
        stored = stored if isinstance(stored, dict) else {}
        different = [name for name in mine if name not in FREE and stored.get(name) != mine[name]]
        for i, name in enumerate(different):
            if isinstance(mine[name], dict):
                theirs = stored.get(name) or {}
                inner = [key for key in {**theirs, **mine[name]} if theirs.get(key) != mine[name].get(key)]
                different[i] = f"{name} ({', '.join(inner)})"
        if different:
            raise ValueError(
                f"{self.folder}: the run in this folder has another {', '.join(different)}; continue it with the same, "
                "or give another output"
            )

    def _barrier(self) -> None:
        if self.world > 1:
            dist.barrier()


@contextmanager
def _plain_errors(path: Path) -> Iterator[None]:
    """Raises what went wrong in a process, where torch's checkpoints raise a report of all, which is no Exception."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ALONE)
        try:
            yield
        except CheckpointException as report:
            error = next(iter(report.failures.values()))[0]
            if isinstance(error, OSError):
                raise OSError(error.errno, error.strerror, error.filename or str(path)) from report
            raise ValueError(f"{path}: {error}") from report
