"""What the checks of a call have found, remembered by the call's signature: they take longer than a small call's
arithmetic, and than a GPU takes to begin.

A signature is all that the checks, the choice of a backend and a launch look at: of every tensor its shape and dtype
(for kernels that are launched, its strides and its device too), every option, and RETRO_KERNELS_BACKEND. A call has no
signature, and is checked, whenever something stands between it and the kernel: torch.compile, torch.func, a dispatch
mode (fake tensors among them), tracing, a profiler, autocast, tensors of a subclass or sparse.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.autograd import forward_ad

from .call import Call, Rule, record_call, record_eagerly
from .compiling import without_autocast
from .memory import unit_last_stride

ENVIRONMENT_VARIABLE = "RETRO_KERNELS_BACKEND"
REMEMBERED = ("cpu", "triton")  # the backends whose plans are kept: what they take does not change within a process

_MOST = 4096  # a run whose every call has new sizes starts anew
_PLAIN = (torch.Tensor, torch.nn.Parameter)
_STRIDED = torch.strided

_plans: dict[tuple[Any, ...], Any] = {}


def plain(tensors: Iterable[Any]) -> bool:
    """Whether the tensors (or None) are tensors and nothing else, and nothing watches what is done to them."""
    if (
        torch.compiler.is_compiling()  # first: the rest is not traced
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack()
        or forward_ad._current_level >= 0
        or torch._C._get_tracing_state() is not None
        or torch.autograd._profiler_enabled()
    ):
        return False
    for x in tensors:  # noqa: SIM110 - a loop takes half the time of `all`
        if x is not None and type(x) not in _PLAIN:
            return False
    return True


def signature(backend: str | None, options: tuple[Any, ...], given: Mapping[str, Any]) -> tuple[Any, ...] | None:
    """What identifies a call with the backend that is asked for, `options`, and the tensors `given` by the names of the
    call's fields, the query first; or None where it is to be checked every time."""
    if not plain(given.values()):
        return None
    named, query = os.environ.get(ENVIRONMENT_VARIABLE), given["query"]
    if query.is_cpu:
        launched, index = (backend or named) == "triton", -1
    elif query.is_cuda:
        launched, index = True, query.get_device()
    else:
        return None
    if torch.is_autocast_enabled("cpu" if query.is_cpu else "cuda"):
        return None
    found = [backend, named, index, *options]
    for x in given.values():
        if x is None:
            found.append(None)
            continue
        if x.layout is not _STRIDED or (not x.is_cpu if index < 0 else x.get_device() != index):
            return None
        found.append(x.dtype)
        found += x.shape  # flat: to compare shapes as such takes longer than all the rest
        if launched:
            found += x.stride()
    return tuple(found)


def get(signature: tuple[Any, ...] | None) -> Any:
    try:
        return _plans.get(signature)  # type: ignore[arg-type]
    except TypeError:  # an option that no check would pass, a list, say
        return None


def keep(signature: tuple[Any, ...], plan: Any) -> None:
    if len(_plans) >= _MOST:
        _plans.clear()
    _plans[signature] = plan


class Template:
    """A call of a signature without its tensors, `given` as the user gave them, by the names of the call's fields."""

    def __init__(self, call: Any, given: Mapping[str, Any]) -> None:
        self.type = type(call)
        self.present = tuple(name for name, x in given.items() if x is not None)
        self.memory: dict[Any, Any] = {}
        self.fields = {**vars(call), **dict.fromkeys(given), "memory": self.memory}
        # Axes that the call's form has and the user's tensors have not.
        self.shapes = {
            name: tuple(getattr(call, name).shape)
            for name in self.present
            if getattr(call, name).shape != given[name].shape
        }
        self.given_shapes = {name: tuple(given[name].shape) for name in self.shapes}

    def fill(self, tensors: Sequence[torch.Tensor]) -> Any:
        """The call with the tensors that are present."""
        call = object.__new__(self.type)
        fields = call.__dict__
        fields.update(self.fields)
        for name, x in zip(self.present, tensors):
            fields[name] = x if x.stride(-1) == 1 else unit_last_stride(x)
        for name, shape in self.shapes.items():
            fields[name] = fields[name].view(shape)
        return call


class Plan(Rule):
    """How the calls of one signature are computed and differentiated: by the backend itself and not by its private ops,
    whose dispatcher passes thirty arguments through twice as long as a small kernel takes. Who would be told by the
    dispatcher is not there (`plain`). It saves the same tensors for every call of a signature, the first among them:
    activation checkpointing compares those of a forward with those of its repetition.

    `out_shape`: the user's shape of out, where it is not the call's.
    """

    direct = True

    def __init__(self, module: Any, call: Call, given: Mapping[str, Any], out_shape: tuple[int, ...] | None) -> None:
        super().__init__(module, call)
        self.attend, self.gradients = module.attend, module.gradients
        self.template = Template(call, given)
        assert self.template.present == self.present, (self.template.present, self.present)
        self.out_shape, self.own_shape = out_shape, None
        self.wanted: dict[tuple[bool, ...], tuple[str, ...]] = {}

    def __call__(self, given: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """out in the user's shape, lse as the backend gives it."""
        tensors = [given[name] for name in self.present]
        if torch.is_grad_enabled():
            for x in tensors:
                if x.requires_grad:
                    return record_eagerly(self, tensors)
        out, lse = self.attend(self.template.fill(tensors))
        return out if self.out_shape is None else out.view(self.out_shape), lse

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = self.attend(self.template.fill(tensors))
        if self.out_shape is not None:
            self.own_shape = out.shape
            out = _unsafe_view(out, self.out_shape)  # no view to autograd: the user may change it in place
        return out, lse

    def backward(self, saved: Sequence[torch.Tensor], grads: Sequence[Any], needed: tuple[bool, ...]) -> list[Any]:
        *tensors, out, lse = saved
        call = self.template.fill(tensors)
        watched = torch.is_grad_enabled() or not plain((*grads, *saved))
        if self.own_shape is not None:
            out = out.view(self.own_shape)
            grads = (None if grads[0] is None else grads[0].view(self.own_shape), grads[1])
        if watched:
            own = [getattr(call, name) for name in self.present]
            found = dict(zip(self.present, super().backward((*own, out, lse), grads, needed)))
        else:
            wanted = self.wanted.get(needed)
            if wanted is None:
                asked = [name for name, need in zip(self.present, needed) if need]
                wanted = self.wanted[needed] = self.form.wanted(self.present, asked)
            found = self.gradients(call, *self.output_gradients(grads, out), out, lse, wanted)
        for name, shape in self.template.given_shapes.items():
            if found.get(name) is not None:
                found[name] = found[name].view(shape)
        return [found[name] if need else None for name, need in zip(self.present, needed)]


def run(
    modules: Mapping[str, Any],
    name: str,
    call: Any,
    signature: tuple[Any, ...] | None,
    given: Mapping[str, Any],
    out_shape: tuple[int, ...],
) -> tuple[torch.Tensor, torch.Tensor]:
    """out in the user's shape, lse as the backend gives it. The backend's plan is kept where the call has a signature;
    `given`: the tensors as the user gave them."""
    if signature is not None and name in REMEMBERED:
        plan = Plan(modules[name], call, given, None if given["query"].shape == call.query.shape else out_shape)
        keep(signature, plan)
        return plan(given)
    if name == "reference":
        with without_autocast(call.query):
            out, lse = modules[name].attend(call)
    else:
        out, lse = record_call(modules[name], call)
    return out.view(out_shape), lse


_unsafe_view = torch.ops.aten._unsafe_view.default
