"""What a trainer tells: a line on the terminal, TensorBoard, Weights & Biases, and whatever a user's callback does."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from .training import Trainer

LOGGERS = ("tensorboard", "wandb")


class Callback:
    """Does nothing; override what you want to hear of. Only the first process calls it. Its calls may not change the
    weights. `trainer.stop = True` ends the run after this update."""

    def on_begin(self, trainer: Trainer) -> None:
        """Before the first update of this process."""

    def on_part(self, trainer: Trainer, done: int, parts: int) -> None:
        """So many of an update's micro-batches are done."""

    def on_step(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
        """After every update: "step", "loss", "learning_rate", "gradient_norm", "rows", "tokens", "seconds_a_step",
        "tokens_a_second" (of this update) and, where `peak_flops` is given, "model_flops_utilisation". With `oracle`
        also "oracle_share" and, of the tokens that may see neighbours, "loss_oracle" and "loss_retrieved" (where the
        update has such rows) and now and then "loss_without" (its rows without neighbours)."""

    def on_log(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
        """As `on_step`, every `log_every` updates; times are means over these."""

    def on_evaluation(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
        """After an evaluation: "step" and "held_out_on", "held_out_off", "held_out_random", nats a token."""

    def on_save(self, trainer: Trainer, folder: Path) -> None:
        """After a checkpoint was written."""

    def on_end(self, trainer: Trainer) -> None:
        """After the last update, or an error."""


class Console(Callback):
    """Lines on the terminal: what is logged, and, while that takes long, what was done."""

    def __init__(self, say: Callable[[str], None], seconds: float = 30.0) -> None:
        self.say, self.seconds, self.updates = say, seconds, 0
        self.begun = self.said = time.monotonic()

    def on_begin(self, trainer: Trainer) -> None:
        self.begun = self.said = time.monotonic()

    def on_part(self, trainer: Trainer, done: int, parts: int) -> None:
        first = self.updates == 0 and done == 1 and parts > 1
        if done < parts and (first or self._due()):
            seconds = (time.monotonic() - self.begun) / done if self.updates == 0 else None
            left = "" if seconds is None else f": {duration(seconds * parts)} an update"
            if seconds is not None:
                left += f", {duration(seconds * parts * (trainer.settings.steps - trainer.step))} for what is left"
            self._print(f"step {trainer.step + 1}: {done} of {parts} micro-batches{left}")

    def on_step(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
        self.updates += 1
        logged = metrics["step"] % trainer.settings.log_every == 0 or metrics["step"] == trainer.settings.steps
        if not logged and (self.updates == 1 or self._due()):
            self._metrics(trainer, metrics)

    def on_log(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
        self._metrics(trainer, metrics)

    def on_evaluation(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
        losses = "  ".join(
            f"{name} {metrics[key]:.4f}"
            for key, name in (
                ("held_out_on", "on"),
                ("held_out_off", "off"),
                ("held_out_random", "others' neighbours"),
            )
            if key in metrics
        )
        self._print(f"step {metrics['step']}/{trainer.settings.steps}  held-out loss: {losses}")

    def _metrics(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
        steps = trainer.settings.steps
        left = duration((steps - metrics["step"]) * metrics["seconds_a_step"])
        utilisation = metrics.get("model_flops_utilisation")
        self._print(
            f"step {metrics['step']}/{steps}  loss {metrics['loss']:.4f}"
            + "".join(f"  {x} {metrics[f'loss_{x}']:.4f}" for x in ("oracle", "retrieved") if f"loss_{x}" in metrics)
            + f"  {metrics['tokens_a_second']:,.0f} tokens/s"
            + (f"  MFU {utilisation:.1%}" if utilisation else "")
            + (f"  {left} left" if metrics["step"] < steps else "")
        )

    def _due(self) -> bool:
        return time.monotonic() - self.said >= self.seconds

    def _print(self, text: str) -> None:
        self.said = time.monotonic()
        self.say(text)


class TensorBoard(Callback):
    """Metrics in the run's folder `tensorboard`. Raises ValueError where the package is not installed."""

    def __init__(self) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ValueError(_not_installed("tensorboard")) from error
        self._make: Callable[..., Any] = SummaryWriter
        self._writer: Any = None

    def on_begin(self, trainer: Trainer) -> None:
        self._writer = self._make(trainer.folder / "tensorboard", purge_step=trainer.step + 1)

    def on_log(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
        for name, value in metrics.items():
            if name != "step":
                self._writer.add_scalar(name, value, metrics["step"])

    on_evaluation = on_log

    def on_end(self, trainer: Trainer) -> None:
        if self._writer is not None:
            self._writer.close()


class WeightsAndBiases(Callback):
    """Metrics in a run of Weights & Biases, which a resumed training continues; its own environment variables
    (WANDB_PROJECT, WANDB_MODE=offline, ...) say where. Raises ValueError where the package is not installed."""

    def __init__(self) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ValueError(_not_installed("wandb")) from error
        self._wandb: Any = wandb
        self._run: Any = None

    def on_begin(self, trainer: Trainer) -> None:
        path = trainer.folder / "wandb_run_id"
        known = path.read_text().strip() if path.is_file() else None
        self._run = self._wandb.init(
            id=known or None, resume="allow", dir=str(trainer.folder), config=trainer.description()
        )
        path.write_text(f"{self._run.id}\n")

    def on_log(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
        self._run.log({name: value for name, value in metrics.items() if name != "step"}, step=metrics["step"])

    on_evaluation = on_log

    def on_end(self, trainer: Trainer) -> None:
        if self._run is not None:
            self._run.finish()


def loggers(names: tuple[str, ...]) -> list[Callback]:
    """The callbacks of these names of LOGGERS."""
    made = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases}
    return [made[name]() for name in names]


def duration(seconds: float) -> str:
    """In words, of two units at most: "12 s", "3 min 5 s", "4 h 10 min", "68 days"."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    if whole < 48 * 3600:
        return f"{whole // 3600} h {whole % 3600 // 60} min"
    return f"{whole / 86400:,.0f} days"


def _not_installed(name: str) -> str:
    return f"log_to: {name} is not installed: pip install 'retro_kernels[{name}]', or leave it out"
