"""`swap`: fused kernels under the modules of an existing RETRO, instance by instance."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..ops import backends as backend_choice
from ..ops.backends import ATTENTION as BACKENDS
from ..ops.verification import verdicts
from . import flamingo, known, labml, megatron, nemo, norlund, retro_pytorch
from .base import AS_TRAINED, PAPER, FusedForward, Integration

if TYPE_CHECKING:
    from ..models.generation import Generated

INTEGRATIONS: tuple[Integration, ...] = (retro_pytorch, labml, megatron, norlund, nemo, flamingo)  # type: ignore[assignment]


class SwapReport:
    """The outcome of `swap`.

    Attributes:
        replaced: names of the modules that now run fused, as `named_modules` calls them ("" is the model itself).
        skipped: name -> why a module that was looked at was left alone.
        notes: name -> what to know about a replaced module, where there is something.
        seen: name -> what is known of a module that swap does not replace, and what to use instead.
        backend_note: what the replaced modules' calls take on their device, where that is a GPU, or why nothing gets
            faster, where no fused backend can run at all; otherwise None.

    `print(report)` shows it all, `rich.print(report)` as a table. `undo()` takes the replacements back.
    """

    def __init__(
        self,
        replaced: dict[str, FusedForward],
        skipped: dict[str, str],
        notes: dict[str, str],
        positions: str,
        backend_note: str | None = None,
        model: nn.Module | None = None,
        seen: dict[str, str] | None = None,
    ) -> None:
        self.replaced = list(replaced)
        self.skipped = dict(skipped)
        self.notes = dict(notes)
        self.positions = positions
        self.backend_note = backend_note
        self.seen = {} if seen is None else dict(seen)
        self._forwards = dict(replaced)
        self._model = model

    def undo(self) -> None:
        """Restores every module this call replaced to exactly what it was; a second call does nothing.

        Raises RuntimeError, after restoring the rest, when something else has replaced a module's forward since.
        """
        overlaid = []
        for name, forward in list(self._forwards.items()):
            if _restore(forward.module) or "forward" not in vars(forward.module):
                del self._forwards[name]
            else:
                overlaid.append(name)
        if overlaid:
            raise RuntimeError(
                f"undo: the forward of {_join_names(overlaid)} was replaced by something else after swap; "
                "take that back first, then call undo() again"
            )

    def generate(
        self, input_ids: Any, *, num_neighbours: int | None = None, retrieved_length: int | None = None, **options: Any
    ) -> Generated:
        """New tokens after each prompt, every token computed once: the model as a `Retro` that shares its weights, and
        `Retro.generate` with its arguments. With the best token chosen (the default) these are the tokens that the
        model's own loop finds by computing everything anew for each.

        Args:
            num_neighbours, retrieved_length: the most neighbours of a chunk and their most tokens, which most models do
                not tell; default 2, and two chunks.

        Raises ValueError for a model that is no whole one, see `Retro.from_peer`, and what `Retro.generate` raises.
        """
        from ..models.retro import Retro

        if self._model is None:
            raise ValueError("generate: this report has no model, expected one that swap returned")
        sizes = {"num_neighbours": num_neighbours, "retrieved_length": retrieved_length}
        changes: dict[str, Any] = {name: value for name, value in sizes.items() if value is not None}
        model = Retro.from_peer(self._model, copy=False, **changes)
        return model.generate(input_ids, num_neighbours=num_neighbours, **options)

    def rows(self) -> Iterator[tuple[str, str, str]]:
        """(module, "replaced" or "skipped", remark) of every module that was looked at."""
        for name in self.replaced:
            yield _name_or_model(name), "replaced", self.notes.get(name, "")
        for name, reason in self.skipped.items():
            yield _name_or_model(name), "skipped", reason
        for name, advice in self.seen.items():
            yield _name_or_model(name), "seen", advice

    def __str__(self) -> str:
        lines = [f"swap: {len(self.replaced)} replaced, {len(self.skipped)} skipped (positions={self.positions!r})"]
        lines += [f"  {state} {name}{': ' + remark if remark else ''}" for name, state, remark in self.rows()]
        if len(lines) == 1 and self._model is not None:
            lines.append(f"  looked for {_looked_for()}; found {_classes_of(self._model)}")
        return "\n".join(lines + ([f"  {self.backend_note}"] if self.backend_note else []))

    def __repr__(self) -> str:
        return f"SwapReport(replaced={self.replaced!r}, skipped={self.skipped!r})"

    def __rich__(self) -> Any:
        from rich.table import Table
        from rich.text import Text

        title = f"swap: {len(self.replaced)} replaced, {len(self.skipped)} skipped"
        caption = ". ".join(x for x in (f"positions={self.positions!r}", self.backend_note) if x)
        table = Table("module", "", "remark", title=title, caption=caption)
        for name, state, remark in self.rows():
            table.add_row(Text(name), Text(state, style="green" if state == "replaced" else "yellow"), Text(remark))
        return table


def swap(model: nn.Module, *, strict: bool = True, positions: str = AS_TRAINED, force: bool = False) -> SwapReport:
    """Puts fused attention under a RETRO that already exists, in place and instance by instance.

    Looks for the attentions of retro-pytorch 0.3.9, Megatron-core 0.15.3, labml (retro-transformer 1.0.3) and Norlund
    in `model` (which may be one of them, any part of a model, or a wrapper such as DistributedDataParallel): chunked
    cross-attention, the encoder's self- and cross-attention, and the decoder's causal self-attention; NeMo 1.23's
    chunked cross-attention; and Flamingo's cross-attention to media (open_flamingo 2.0.1, flamingo-pytorch 0.1.2). What
    it knows besides and does not replace is named in the report, with what to use instead. Only `forward` of each
    instance is replaced: parameters, their names, state dicts, classes and submodules stay as they are, and so do deep
    copies, casts, checkpoints and hooks. A patch of a class does not reach its instances that are swapped already. Deep
    copies of a swapped model are swapped, too; `unswap` restores one. A
    model that is compiled already compiles anew at its next call; one that was exported or traced stays what it was.
    `nn.DataParallel` is not supported: its replicas share instance attributes.

    A module is replaced only if its class's source and its parts are those this version was written for; any other
    is skipped and the report says why. Source counts wherever it is: a copy of a peer's file is the peer's. A call that
    the fused operations do not cover (hooks on a part that they bypass, a mask in causal attention) runs the module's
    own code, and a warning says so once. Attention dropout is fused: in training it has the same distribution as the
    module's own, but drops other probabilities.

    On a GPU the fused kernels that a module's calls need are checked there first, once (`retro-kernels verify` does it
    ahead). Where its calls would run as the slow reference, because no fused backend can run or none has passed its
    check, the module is left as it is, the report says why, and so does a warning.

    Args:
        model: the module to search.
        strict: raise when nothing could be replaced. A model that is already swapped with the same `positions` is what
            was asked for: it does not raise, and the report lists its modules as skipped; nor does one that is left as
            it is because it would only get slower.
        force: on a GPU, swap also where calls would run as the reference.
        positions: of chunked cross-attention. "as_trained" computes what the model computed before, including
            retro-pytorch's doubly shifted rotary query positions (2m - 2, 0, ..., 0), because trained weights embody
            them. "paper" gives the positions that were meant, m - 1 ... 2m - 2: for training from scratch.

    Raises:
        TypeError: `model` is not a module. ValueError: an unknown `positions`; with `strict`, nothing to replace.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, expected a torch.nn.Module")
    if positions not in (AS_TRAINED, PAPER):
        raise ValueError(f'positions: got {positions!r}, expected "{AS_TRAINED}" or "{PAPER}"')
    replaced: dict[str, FusedForward] = {}
    skipped: dict[str, str] = {}
    notes: dict[str, str] = {}
    taken: dict[str, str] = {}  # on GPUs: what is taken by default -> why
    already = conflicts = slower = 0
    seen: dict[str, str] = {}
    for name, module in model.named_modules():
        recognised = any(integration.recognises(module) for integration in INTEGRATIONS)
        advice = None if recognised else known.advice(module)
        if advice is not None and not any(name.startswith(f"{other}.") or other == "" for other in seen):
            seen[name] = advice
        for integration in INTEGRATIONS:
            if not integration.recognises(module):
                continue
            present = vars(module).get("forward")
            if isinstance(present, FusedForward):
                already += present.positions in (None, positions)
                conflicts += present.positions not in (None, positions)
                skipped[name] = _already(present.positions, positions)
                continue
            if present is not None:
                skipped[name] = "something else has replaced forward on this instance; take that back first"
                continue
            reason = integration.refusal(module)
            if reason is not None:
                skipped[name] = reason
                continue
            device = next((x.device for x in module.parameters()), torch.device("cpu"))
            if verdicts.needs_proof(device):
                backend, why = backend_choice.default_of(BACKENDS, integration.likely_class(module), device)
                where = verdicts.describe(device)
                if backend == "reference" and not force:
                    skipped[name] = f"left as it is: on {where} its calls would run as the slow reference ({why})"
                    slower += 1
                    continue
                taken[f"on {where} calls take {backend} by default"] = why
            forward = integration.fused_forward(module, positions)
            module.forward = forward  # type: ignore[method-assign]
            replaced[name] = forward
            remark = integration.note(module)
            if remark is not None:
                notes[name] = remark
    note = "; ".join(f"{what}: {why}" for what, why in taken.items()) or _backend_note(bool(slower))
    report = SwapReport(replaced, skipped, notes, positions, note, model, seen)
    if slower:
        why = next(reason for reason in skipped.values() if reason.startswith("left as it is"))
        warnings.warn(
            f"retro_kernels.swap: {slower} modules are {why}. force=True swaps them all the same",
            stacklevel=2,
        )
    if strict and not replaced and (conflicts or not (already or slower)):
        raise ValueError(_nothing_to_replace(model, report))
    return report


def unswap(model: nn.Module) -> list[str]:
    """Restores every swapped module in `model`, whichever call swapped it (a deep copy's, say) -> their names."""
    return [name for name, module in model.named_modules() if _restore(module)]


def _restore(module: nn.Module) -> bool:
    if not isinstance(vars(module).get("forward"), FusedForward):
        return False
    del module.forward
    return True


def _already(present: str | None, asked: str) -> str:
    if present in (None, asked):
        return "already swapped"
    return (
        f'already swapped with positions="{present}", so not changed to "{asked}"; call undo() or unswap(model) first'
    )


def _backend_note(slower: bool) -> str | None:
    if slower or any(state.available for name, state in backend_choice.status(BACKENDS).items() if name != "reference"):
        return None
    return "No fused backend can run here, so calls run as the pure-PyTorch reference: see `retro-kernels doctor`"


def _nothing_to_replace(model: nn.Module, report: SwapReport) -> str:
    if report.seen and not report.skipped:
        found = "; ".join(f"{_name_or_model(name)}: {advice}" for name, advice in report.seen.items())
    elif report.skipped:
        found = "; ".join(f"{_name_or_model(name)}: {reason}" for name, reason in report.skipped.items())
    else:
        found = _classes_of(model)
    return (
        f"model: nothing in this {type(model).__name__} can be replaced; found {found}. Looked for {_looked_for()}. "
        "strict=False returns the report instead of raising"
    )


def _looked_for() -> str:
    return ", ".join(target for integration in INTEGRATIONS for target in integration.LOOKS_FOR)


def _classes_of(model: nn.Module) -> str:
    kinds = sorted({type(x).__qualname__ for x in model.modules()})
    shown = ", ".join(kinds[:12]) + (f" and {len(kinds) - 12} more" if len(kinds) > 12 else "")
    return f"only modules of other classes ({shown})"


def _name_or_model(name: str) -> str:
    return name or "(the model itself)"


def _join_names(names: list[str]) -> str:
    return ", ".join(_name_or_model(name) for name in names)
