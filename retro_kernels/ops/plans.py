"""What the checks of a call have found, remembered by the call's signature: on a CPU they take longer than a small
call's arithmetic.

A signature is all that the checks and the choice of a backend look at: of every tensor its shape and dtype, every
option, and RETRO_KERNELS_BACKEND. Only the CPU backend's plans are kept: what it takes does not change within a
process. A call has no signature, and is checked, whenever something stands between it and the kernel: torch.compile,
torch.func, a dispatch mode (fake tensors among them), tracing, autocast, tensors of a subclass, of another device or
sparse.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch.autograd import forward_ad

from . import common
from .backends import ENVIRONMENT_VARIABLE

_MOST = 4096  # of each kind; a run whose every call has new sizes starts anew
_PLAIN = (torch.Tensor, torch.nn.Parameter)

_plans: dict[tuple[Any, ...], Any] = {}


def plain(tensors: Sequence[Any]) -> bool:
    """Whether the tensors (or None) are tensors and nothing else, and nothing watches what is done to them."""
    if (
        torch.compiler.is_compiling()  # first: the rest is not traced
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack()
        or forward_ad._current_level >= 0
        or torch._C._get_tracing_state() is not None
    ):
        return False
    for x in tensors:  # noqa: SIM110 - a loop takes half the time of `all`
        if x is not None and type(x) not in _PLAIN:
            return False
    return True


def signature(options: tuple[Any, ...], tensors: Sequence[Any]) -> tuple[Any, ...] | None:
    """What identifies a call, `options` hashable, or None where it is to be checked every time."""
    if not plain(tensors) or torch.is_autocast_enabled("cpu"):
        return None
    found = [os.environ.get(ENVIRONMENT_VARIABLE), *options]
    for x in tensors:
        if x is None:
            found.append(None)
        elif x.is_cpu and x.layout is torch.strided:
            found += (x.dtype, *x.shape)  # flat: to compare shapes as such takes longer than all the rest
        else:
            return None
    return tuple(found)


def get(signature: tuple[Any, ...] | None) -> Any:
    try:
        return _plans.get(signature)  # type: ignore[arg-type]
    except TypeError:  # an option that no check would pass, a list, say
        return None


def keep(signature: tuple[Any, ...] | None, plan: Any) -> None:
    if signature is not None:
        if len(_plans) >= _MOST:
            _plans.clear()
        _plans[signature] = plan


class Plan:
    """How one call of a backend runs: its implementation, the settings of its op, and which of the op's tensors are
    there, `present`. `arrange` brings a call's tensors, the absent ones None, into the op's form.

    The implementation is called without the dispatcher, which passes thirty arguments through twice as long as a small
    kernel takes; who would be told by the dispatcher is not there (`plain`).
    """

    __slots__ = (
        "arrange",
        "backward",
        "backward_op",
        "differentiable",
        "flags",
        "forward",
        "lse_gradient",
        "present",
        "settings",
        "size",
    )

    def __init__(
        self,
        module: ModuleType,
        differentiable: Sequence[int],
        flags: Sequence[Sequence[int]],
        settings: tuple[Any, ...],
        tensors: Sequence[Any],
        arrange: Callable[[list[Any]], None] | None,
        lse_gradient: bool,
    ) -> None:
        self.lse_gradient = lse_gradient
        self.forward, self.backward, self.backward_op = module._forward, module._backward, module.backward
        self.settings, self.arrange, self.size = settings, arrange, len(tensors)
        self.present = tuple(place for place, x in enumerate(tensors) if x is not None)
        self.differentiable = tuple(
            (at, self.present.index(place)) for at, place in enumerate(differentiable) if place in self.present
        )
        self.flags = tuple(tuple(self.present.index(p) for p in places if p in self.present) for places in flags)

    def __call__(self, tensors: Sequence[Any]) -> tuple[torch.Tensor, torch.Tensor]:
        slots = list(tensors)
        for place in self.present:
            if slots[place].stride(-1) != 1:
                slots[place] = common.unit_last_stride(slots[place])
        if self.arrange is not None:
            self.arrange(slots)
        if torch.is_grad_enabled():
            for place in self.present:
                if slots[place].requires_grad:
                    return _Planned.apply(self, *(slots[place] for place in self.present))
        return self.forward(*slots, *self.settings)

    def slots(self, present: Sequence[torch.Tensor]) -> list[Any]:
        found: list[Any] = [None] * self.size
        for place, x in zip(self.present, present):
            found[place] = x
        return found


class _Planned(torch.autograd.Function):
    """`common._Fused` for a plan. It saves the same tensors: activation checkpointing compares those of a forward,
    which may be the first of its signature, with those of its repetition, which has the plan."""

    @staticmethod
    def forward(ctx, plan, *present):
        out, lse = plan.forward(*plan.slots(present), *plan.settings)
        ctx.plan = plan
        ctx.save_for_backward(*present, out, lse)
        common.differentiate_lse(ctx, lse, plan.lse_gradient)
        return out, lse

    @staticmethod
    def backward(ctx, grad_out, grad_lse):
        plan, wanted, saved = ctx.plan, ctx.needs_input_grad, ctx.saved_tensors
        grads = common.output_gradients(grad_out, grad_lse if plan.lse_gradient else None, saved[-2])
        flags = [any(wanted[1 + at] for at in places) for places in plan.flags]
        slots = plan.slots(saved[:-2])
        arguments = (*grads, *slots, *saved[-2:], *plan.settings, *flags)
        if torch.is_grad_enabled() or not plain((*grads, *saved)):
            results = common.gradients(plan.backward_op, arguments)
        else:
            results = plan.backward(*arguments)
        found: list[Any] = [None] * len(wanted)
        for at, place in plan.differentiable:
            if wanted[1 + place]:
                found[1 + place] = results[at]
        return tuple(found)
