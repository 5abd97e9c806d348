"""What all operations and backends share: private ops with their rules under torch.func.vmap, output allocation, and
the autograd function round the ops."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.autograd import forward_ad

LIBRARY = torch.library.Library("retro_kernels", "FRAGMENT")


def allocate(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """An uninitialised contiguous tensor. Every output and scratch buffer of a fused backend is made here,
    so that a test can replace it by one that fills with NaN and puts guard bands round the memory."""
    return torch.empty(shape, dtype=dtype, device=device)


# Arguments and results of the private ops whose first axis is the batch. The others are the same for all sequences.
PER_SEQUENCE = frozenset((
    "query", "key", "value", "encoded", "mask", "chunk_spans", "first_visible", "grad_out", "grad_lse", "out", "lse",
    "x", "logit_bias", "null_logit", "key_scale", "value_scale", "position", "valid", "chunk",
))  # fmt: skip
# Arguments under which a call is not that of its sequences one by one: dropout draws by the sequence's number, and a
# parameter's gradient is the sum over all.
JOINT = frozenset(("dropout_seed", "weight_gradient", "bias_gradient", "relative_gradient", "null_gradient"))


def register(
    schema: str, *, implementation: Callable, fake: Callable, devices: tuple[str, ...], returns: Sequence[str]
) -> Callable:
    """Defines a private `retro_kernels::` op with its kernels, its fake and its rule under vmap; returns the callable
    overload. `returns` names the results, a gradient by what it is of.

    Plain `define`/`impl` costs half of `custom_op` per call. Autograd is not registered here: an
    `autograd.Function` in `api.py` calls these ops with grad mode off.
    """
    name, arguments = schema.split(" -> ")[0].rstrip(")").split("(", 1)
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    for device in devices:
        LIBRARY.impl(name, implementation, {"cpu": "CPU", "cuda": "CUDA"}[device])
    torch.library.register_fake(f"retro_kernels::{name}", fake, lib=LIBRARY)
    op = getattr(torch.ops.retro_kernels, name).default
    names = tuple(argument.split()[-1] for argument in arguments.split(","))

    def rule(info, in_dims, *given):
        return _vmapped(op, names, tuple(returns), info.batch_size, in_dims, given)

    torch.library.register_vmap(f"retro_kernels::{name}", rule, lib=LIBRARY)
    return op


def _vmapped(
    op: Callable, names: tuple[str, ...], returns: tuple[str, ...], size: int, in_dims: Sequence[int | None], given: Any
) -> tuple[Any, Any]:
    """`op` under a vmap of `size` samples, `in_dims` their axes in the arguments -> the results and their axes.

    Samples become sequences of one batch where they can: where only arguments per sequence are vmapped over, and
    nothing joins the sequences. Else the op runs once a sample.
    """
    apart = any(
        (dim is not None and name not in PER_SEQUENCE) or (name in JOINT and x is not None and x is not False)
        for name, dim, x in zip(names, in_dims, given)
    )
    if apart:
        samples = [
            op(*(x if dim is None else unit_last_stride(x.select(dim, i)) for x, dim in zip(given, in_dims)))
            for i in range(size)
        ]
        if isinstance(samples[0], torch.Tensor):
            return torch.stack(samples), 0
        return tuple(torch.stack(parts) for parts in zip(*samples)), (0,) * len(returns)
    out_rank = next((_rank(x, dim) for name, dim, x in zip(names, in_dims, given) if name == "out"), None)
    folded = []
    for name, dim, x in zip(names, in_dims, given):
        if isinstance(x, torch.Tensor) and name in PER_SEQUENCE:
            axis = _batch_axis(name, _rank(x, dim), out_rank)
            x = (
                x.unsqueeze(axis).expand(*x.shape[:axis], size, *x.shape[axis:])
                if dim is None
                else x.movedim(dim, axis)
            )
            x = unit_last_stride(x.flatten(axis, axis + 1))
        folded.append(x)
    results = op(*folded)
    if isinstance(results, torch.Tensor):
        return results.unflatten(0, (size, results.shape[0] // size)), 0
    places = [
        _batch_axis(name, x.dim(), results[0].dim()) if name in PER_SEQUENCE else None
        for name, x in zip(returns, results)
    ]
    unfolded = (
        x if axis is None else x.unflatten(axis, (size, x.shape[axis] // size)) for x, axis in zip(results, places)
    )
    return tuple(unfolded), tuple(places)


def _rank(x: torch.Tensor, dim: int | None) -> int:
    """The number of axes of one sample."""
    return x.dim() if dim is None else x.dim() - 1


def _batch_axis(name: str, rank: int, out_rank: int | None) -> int:
    """The first, but the second of an lse that has a plane more (`ops/attention/common.py`, log-sum-exp)."""
    return 1 if name == "lse" and rank == out_rank else 0


def register_pair(
    operation: str,
    backend: str,
    *,
    schemas: tuple[str, str],
    implementations: tuple[Callable, Callable],
    fakes: tuple[Callable, Callable],
    devices: tuple[str, ...],
    differentiable: Sequence[int],
) -> tuple[Callable, Callable]:
    """`<operation>_forward_<backend>` and `<operation>_backward_<backend>`. `differentiable`: the places among the
    forward's arguments whose gradients the backward returns."""
    arguments = [argument.split()[-1] for argument in schemas[0].split("(", 1)[1].split(",")]
    returns = (("out", "lse"), tuple(arguments[place] for place in differentiable))
    forward, backward = (
        register(schema, implementation=implementation, fake=fake, devices=devices, returns=names)
        for schema, implementation, fake, names in zip(schemas, implementations, fakes, returns)
    )
    return forward, backward


def unit_last_stride(x: torch.Tensor | None) -> torch.Tensor | None:
    """The kernels read vectors along the last dimension of floating tensors; any other stride is read in place."""
    if x is None or not x.is_floating_point() or x.stride(-1) == 1 or x.shape[-1] <= 1:
        return x
    return x.contiguous()


def raise_for_tangents(ctx: Any = None, *grad_inputs: Any) -> Any:
    """The `jvp` of every function here. (torch.compile traces no function that has one: only those for torch.func.)"""
    raise RuntimeError(
        "retro_kernels' fused kernels have no forward-mode derivative (torch.func.jvp, jacfwd and hessian, and "
        'torch.autograd.forward_ad): use backend="reference", which PyTorch differentiates in both directions, or '
        "reverse mode (grad, vjp, jacrev)."
    )


class _Gradients(torch.autograd.Function):
    """`op(*arguments)`, whose own derivative raises and is not silently zero."""

    @staticmethod
    def forward(ctx, op, *arguments):
        return op(*arguments)

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(
            "retro_kernels' fused kernels have no second derivative: the gradient of a gradient was asked for "
            '(create_graph=True and another backward). Use backend="reference", which PyTorch differentiates twice.'
        )


class _GradientsInTransform(torch.autograd.Function):
    """`_Gradients` as torch.func's transforms need it (see `_FusedInTransform`)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(op, *arguments):
        return op(*(unit_last_stride(x) if isinstance(x, torch.Tensor) else x for x in arguments))

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    backward = staticmethod(_Gradients.backward)
    jvp = staticmethod(raise_for_tangents)


def gradients(backward_op: Callable, arguments: Sequence[Any]) -> Any:
    """What `backward_op` gives, in plain autograd's backward."""
    refuse_forward_mode(arguments)
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph=True
        return _Gradients.apply(backward_op, *arguments)
    return backward_op(*arguments)


class _Fused(torch.autograd.Function):
    """See `fused`. Keeps the inputs, the output and the lse."""

    @staticmethod
    def forward(ctx, forward_op, backward_op, differentiable, flags, settings, lse_gradient, *tensors):
        tensors = tuple(unit_last_stride(x) for x in tensors)
        out, lse = forward_op(*tensors, *settings)
        ctx.backward_op, ctx.differentiable, ctx.flags, ctx.settings = backward_op, differentiable, flags, settings
        ctx.lse_gradient = lse_gradient
        ctx.save_for_backward(*tensors, out, lse)
        differentiate_lse(ctx, lse, lse_gradient)
        return out, lse

    @staticmethod
    def backward(ctx, grad_out, grad_lse):
        wanted, saved = ctx.needs_input_grad[6:], ctx.saved_tensors  # activation checkpointing gives them only once
        grads = output_gradients(grad_out, grad_lse if ctx.lse_gradient else None, saved[-2])
        arguments = (*grads, *saved, *ctx.settings, *_wanted_flags(ctx.flags, wanted))
        results = gradients(ctx.backward_op, arguments)
        return None, None, None, None, None, None, *_by_place(ctx.differentiable, wanted, results)


class _FusedInTransform(torch.autograd.Function):
    """`_Fused` as torch.func's transforms need it. PyTorch looks at the signature of such a function at every call, for
    longer than a kernel takes, and torch.compile mistakes its arguments where nothing needs a gradient."""

    generate_vmap_rule = True

    @staticmethod
    def forward(forward_op, backward_op, differentiable, flags, settings, lse_gradient, *tensors):
        return forward_op(*(unit_last_stride(x) for x in tensors), *settings.value)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, ctx.backward_op, ctx.differentiable, ctx.flags, ctx.settings, ctx.lse_gradient, *tensors = inputs
        ctx.save_for_backward(*tensors, *output)
        ctx.save_for_forward(*tensors, *output)  # which jvp under a vmap looks for before it asks for the tangents
        differentiate_lse(ctx, output[1], ctx.lse_gradient)

    @staticmethod
    def backward(ctx, grad_out, grad_lse):
        wanted, saved = ctx.needs_input_grad[6:], ctx.saved_tensors
        flags = _wanted_flags(ctx.flags.value, wanted)
        grads = output_gradients(grad_out, grad_lse if ctx.lse_gradient else None, saved[-2])
        arguments = (*grads, *saved, *ctx.settings.value, *flags)
        results = _GradientsInTransform.apply(ctx.backward_op, *arguments)
        return None, None, None, None, None, None, *_by_place(ctx.differentiable.value, wanted, results)

    jvp = staticmethod(raise_for_tangents)


class _Opaque:
    """What torch.func must not take for a structure of arguments."""

    def __init__(self, value: Any) -> None:
        self.value = value


def differentiate_lse(ctx: Any, lse: torch.Tensor, lse_gradient: bool) -> None:
    """Makes lse an output with a gradient, or one without. Nothing is computed for an lse whose gradient nobody takes:
    its gradient is None then (torch.compile gives zeros)."""
    if not lse_gradient:
        ctx.mark_non_differentiable(lse)
    elif not torch.compiler.is_compiling():
        ctx.set_materialize_grads(False)


def output_gradients(
    grad_out: torch.Tensor | None, grad_lse: torch.Tensor | None, out: torch.Tensor
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The gradients of `out` and of the natural log-sum-exp as a backward op takes them. An lse of two planes in base 2
    has one gradient, the same in both, since `plain_lse` adds them."""
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    if grad_lse is not None:
        grad_lse = (grad_lse[0] * (1 / math.log(2)) if grad_lse.dim() == out.dim() else grad_lse).contiguous()
    return unit_last_stride(grad_out), grad_lse


def refuse_lse_gradient(grad_lse: torch.Tensor | None, kernels: str) -> None:
    if grad_lse is not None:
        raise RuntimeError(
            f"the {kernels} kernels have no gradient of the log-sum-exp (return_lse=True) yet: use "
            'backend="reference", or "cpu" on a CPU, or detach the lse'
        )


def _wanted_flags(flags: Sequence[Sequence[int]], wanted: Sequence[bool]) -> list[bool]:
    return [any(wanted[place] for place in places) for places in flags]


def _by_place(differentiable: Sequence[int], wanted: Sequence[bool], results: Sequence[torch.Tensor]) -> list[Any]:
    found: list[Any] = [None] * len(wanted)
    for place, gradient in zip(differentiable, results):
        if wanted[place]:
            found[place] = gradient
    return found


def fused(
    forward_op: Callable,
    backward_op: Callable,
    differentiable: Sequence[int],
    flags: Sequence[Sequence[int]],
    settings: tuple[Any, ...],
    tensors: tuple[Any, ...],
    lse_gradient: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The output and the lse of `forward_op(*tensors, *settings)`, with `backward_op` as its derivative.

    `differentiable`: which of the tensors have a gradient, in the order in which the backward op returns them. `flags`:
    for each flag that ends the backward op's arguments, the tensors any of whose gradients it asks for.
    `lse_gradient`: whether the lse has a gradient, too; without, nothing is computed for it.
    """
    if torch._C._are_functorch_transforms_active():
        opaque = (_Opaque(x) for x in (differentiable, flags, settings))
        return _FusedInTransform.apply(forward_op, backward_op, *opaque, lse_gradient, *tensors)
    refuse_forward_mode(tensors)
    if not recorded(tensors):
        return forward_op(*[unit_last_stride(x) for x in tensors], *settings)
    return _Fused.apply(forward_op, backward_op, differentiable, flags, settings, lse_gradient, *apart(tensors))


def recorded(tensors: Sequence[Any]) -> bool:
    """Whether autograd would record an operation on these tensors."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def requires_grad(x: torch.Tensor) -> bool:
    """Whether a gradient of x is wanted; under torch.func's transforms at any level, which vmap hides."""
    if x.requires_grad or not torch._C._are_functorch_transforms_active():
        return x.requires_grad
    functorch = torch._C._functorch
    while not x.requires_grad and (functorch.is_batchedtensor(x) or functorch.is_gradtrackingtensor(x)):
        x = functorch.get_unwrapped(x)
    return x.requires_grad


def apart(tensors: Sequence[Any]) -> Sequence[Any]:
    """The tensors; while torch.compile traces, every repetition as a view of its own: it does not trace an
    autograd.Function that is given one tensor twice, and self-attention's query is often its key too."""
    if not torch.compiler.is_compiling():
        return tensors
    found: list[Any] = []
    for x in tensors:
        found.append(x.view_as(x) if x is not None and any(x is other for other in found) else x)
    return found


def refuse_forward_mode(tensors: Sequence[Any]) -> None:
    """Raises for tensors with a tangent, which a kernel would silently ignore; under torch.func's transforms for all
    that jvp has seen."""
    if forward_ad._current_level < 0 or torch.compiler.is_compiling():
        return
    if any(isinstance(x, torch.Tensor) and x.is_floating_point() and _may_have_tangent(x) for x in tensors):
        raise_for_tangents()


def _may_have_tangent(x: torch.Tensor) -> bool:
    if not torch._C._are_functorch_transforms_active():
        return forward_ad.unpack_dual(x).tangent is not None
    functorch = torch._C._functorch
    forward = {
        interpreter.level()
        for interpreter in functorch.get_interpreter_stack() or ()
        if interpreter.key() == functorch.TransformType.Jvp
    }
    while functorch.is_batchedtensor(x) or functorch.is_gradtrackingtensor(x):
        if functorch.maybe_get_level(x) in forward:
            return True
        x = functorch.get_unwrapped(x)
    return False
