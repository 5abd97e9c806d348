"""From a checked call to its result, once for all operations.

A kernel folder declares its calls as a dataclass derived from `Call`. Its fields are the only list of what a kernel
takes: `Form` makes from them the schema of a private torch op in each direction, the rule under torch.func.vmap and the
autograd function. A backend is a module with

    unavailable() -> str | None              why it cannot run in this process
    refusal(call) -> str | None              why it cannot run this call
    attend(call) -> (out, lse)               the kernel itself
    gradients(call, grad_out, grad_lse, out, lse, wanted) -> {name: gradient}     its derivative, of the fields in
                                             `wanted`; grad_lse is of the natural log-sum-exp, in one plane, or None
    forward, backward                        both as private ops, which `register` makes of them

so everything outside this file goes by the fields' names.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar

import torch
from torch.autograd import forward_ad

from . import memory
from .memory import unit_last_stride

LIBRARY = torch.library.Library("retro_kernels", "FRAGMENT")

# Arguments and results of the private ops whose first axis is the batch. The others are the same for all sequences.
PER_SEQUENCE = frozenset(
    (
        "query",
        "key",
        "value",
        "encoded",
        "mask",
        "chunk_spans",
        "first_visible",
        "grad_out",
        "grad_lse",
        "out",
        "lse",
        "x",
        "logit_bias",
        "null_logit",
        "key_scale",
        "value_scale",
        "position",
        "valid",
        "chunk",
    )
)
# Arguments under which a call is not that of its sequences one by one: dropout draws by the sequence's number, and a
# parameter's gradient is the sum over all.
JOINT = frozenset(("dropout_seed", "weight_gradient", "bias_gradient", "relative_gradient", "null_gradient"))

Length = int  # an int that torch.compile may leave open
_SCHEMA_TYPES = {
    "torch.Tensor": "Tensor",
    "torch.Tensor | None": "Tensor?",
    "bool": "bool",
    "int": "int",
    "float": "float",
    "Length": "SymInt",
}


def differentiable(group: str = "") -> Any:
    """The field of a tensor that has a gradient. A backend makes the gradients of a `group` together, when any of them
    is wanted, and those without a group always."""
    return dataclasses.field(metadata={"group": group})


def optional(group: str) -> Any:
    """`differentiable`, of a tensor that may be absent."""
    return dataclasses.field(default=None, metadata={"group": group})


def outside() -> Any:
    """The field of what the kernel does not take: checks, choice and reference use it."""
    return dataclasses.field(default=None, metadata={"outside": True})


class Call:
    """What every dataclass of calls derives from. `form` is set by `described`."""

    form: ClassVar[Form]
    return_lse: Any = None
    # What a backend keeps between calls of one signature (`plans.py`), and None in a call that is not remembered.
    memory: ClassVar[dict[Any, Any] | None] = None

    def mapped(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Any:
        """The call with `function` of every tensor."""
        tensors = {name: getattr(self, name) for name in self.form.tensors}
        return dataclasses.replace(self, **{name: function(x) for name, x in tensors.items() if x is not None})  # type: ignore[type-var]


class Form:
    """The flat form of a dataclass of calls, by its fields: first the tensors, then the settings, each in the order of
    the fields; and which tensors have gradients, in which groups."""

    def __init__(self, call_type: type) -> None:
        fields = [field for field in dataclasses.fields(call_type) if not field.metadata.get("outside")]
        types = {field.name: _SCHEMA_TYPES[str(field.type)] for field in fields}
        self.types = types
        self.tensors = tuple(name for name in types if types[name].startswith("Tensor"))
        self.settings = tuple(name for name in types if not types[name].startswith("Tensor"))
        self.groups = {field.name: field.metadata["group"] for field in fields if "group" in field.metadata}
        self.flags = tuple(dict.fromkeys(group for group in self.groups.values() if group))

    def arguments(self) -> tuple[str, str]:
        """The schema of the tensors, and that of the settings."""
        tensors, settings = (
            ", ".join(f"{self.types[name]} {name}" for name in names) for names in (self.tensors, self.settings)
        )
        return tensors, settings

    def wanted(self, present: Iterable[str], asked: Iterable[str]) -> tuple[str, ...]:
        """Those of the `present` fields whose gradients are made where those of `asked` are needed."""
        groups = {"", *(self.groups[name] for name in asked)}
        return tuple(name for name in present if self.groups.get(name) in groups)


def allocate_gradients(call: Call, wanted: Iterable[str]) -> dict[str, torch.Tensor]:
    """The gradients of the fields in `wanted`, contiguous and uninitialised."""
    found = {}
    for name in wanted:
        x = getattr(call, name)
        found[name] = memory.allocate(tuple(x.shape), x.dtype, x.device)
    return found


def described(call_type: type) -> type:
    """A decorator above @dataclass: gives the class its `form`."""
    call_type.form = Form(call_type)  # type: ignore[attr-defined]
    return call_type


# The private ops.


def define(
    schema: str, *, implementation: Callable, fake: Callable, devices: Sequence[str], returns: Sequence[str]
) -> Callable:
    """Defines a private `retro_kernels::` op with its kernels, its fake and its rule under vmap; returns the callable
    overload. `returns` names the results, a gradient by what it is of.

    Plain `define`/`impl` costs half of `custom_op` per call. Autograd is not registered here: the autograd functions
    below call these ops with grad mode off.
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


def register(
    operation: str,
    backend: str,
    call_type: type[Call],
    attend: Callable,
    gradients: Callable | None = None,
    *,
    devices: Sequence[str],
    outputs: Callable[[Any], tuple[torch.Tensor, torch.Tensor]],
) -> tuple[Callable, Callable | None]:
    """`<operation>_forward_<backend>` and `<operation>_backward_<backend>` of `attend` and `gradients`, as private ops;
    without `gradients` one op, `<operation>_<backend>`.
    `outputs` allocates a call's out and lse, as `attend` does.

    The forward takes the tensors and the settings of the form; the backward grad_out, grad_lse, the tensors, out,
    lse, the settings and a flag for each group. It returns the gradients of all differentiable fields in their order,
    contiguous, shaped and typed as the fields; those absent or not wanted have no elements.
    """
    form = call_type.form
    tensors, settings = form.arguments()
    names, count = (*form.tensors, *form.settings), len(form.tensors)

    def made(flat: Sequence[Any]) -> Any:
        return call_type(**dict(zip(names, flat)))

    def run_forward(*flat):
        return attend(made(flat))

    name = f"{operation}_{backend}" if gradients is None else f"{operation}_forward_{backend}"
    forward = define(
        f"{name}({tensors}, {settings}) -> (Tensor out, Tensor lse)",
        implementation=run_forward,
        fake=lambda *flat: outputs(made(flat)),
        devices=devices,
        returns=("out", "lse"),
    )
    if gradients is None:
        return forward, None

    def asked(flat: Sequence[Any]) -> tuple[Any, tuple[str, ...]]:
        """-> the call, and which gradients the flags want."""
        end = len(flat) - len(form.flags)
        on = {"", *(flag for flag, wanted in zip(form.flags, flat[end:]) if wanted)}
        call = made((*flat[:count], *flat[count + 2 : end]))
        return call, tuple(x for x in form.groups if form.groups[x] in on and getattr(call, x) is not None)

    def by_place(found: dict[str, torch.Tensor], query: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(found[name] if name in found else query.new_empty((0,)) for name in form.groups)

    def run_backward(grad_out, grad_lse, *flat):
        call, wanted = asked(flat)
        return by_place(gradients(call, grad_out, grad_lse, *flat[count : count + 2], wanted), call.query)

    def fake_backward(grad_out, grad_lse, *flat):
        call, wanted = asked(flat)
        return by_place(
            {name: torch.empty_like(getattr(call, name), memory_format=torch.contiguous_format) for name in wanted},
            call.query,
        )

    flags = ", ".join(f"bool {group}_gradient" for group in form.flags)
    results = ", ".join(["Tensor"] * len(form.groups))
    backward = define(
        f"{operation}_backward_{backend}(Tensor grad_out, Tensor? grad_lse, {tensors}, Tensor out, Tensor lse, "
        f"{settings}, {flags}) -> ({results})",
        implementation=run_backward,
        fake=fake_backward,
        devices=devices,
        returns=tuple(form.groups),
    )
    return forward, backward


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


# Autograd.


class Rule:
    """How one call of a backend is computed and differentiated, by its private ops. What PyTorch traces or transforms
    goes this way, and every call that has no plan."""

    keeps_results = True  # for the backward, beside the tensors
    direct = False

    def __init__(self, module: Any, call: Call) -> None:
        form = call.form
        self.form = form
        self.forward_op, self.backward_op = module.forward, module.backward
        self.present = tuple(name for name in form.tensors if getattr(call, name) is not None)
        self.settings = tuple(getattr(call, name) for name in form.settings)
        self.lse_gradient = bool(call.return_lse)

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """out and lse for the tensors that are present."""
        return self.forward_op(*self.flat(tensors), *self.settings)

    def backward(self, saved: Sequence[torch.Tensor], grads: Sequence[Any], needed: tuple[bool, ...]) -> list[Any]:
        """The gradients of the tensors that are present, None where not needed."""
        *tensors, out, lse = saved
        asked = [name for name, need in zip(self.present, needed) if need]
        on = {self.form.groups[name] for name in asked}
        flags = [group in on for group in self.form.flags]
        arguments = (*self.output_gradients(grads, out), *self.flat(tensors), out, lse, *self.settings, *flags)
        found = dict(zip(self.form.groups, differentiated(self.backward_op, arguments)))
        return [found[name] if name in asked else None for name in self.present]

    def output_gradients(self, grads: Sequence[Any], out: torch.Tensor) -> tuple[Any, Any]:
        """The gradients of `out` and of the natural log-sum-exp as a backend takes them. An lse of two planes in base 2
        has one gradient, the same in both, since `plain_lse` adds them."""
        grad_out = torch.zeros_like(out) if grads[0] is None else grads[0]
        grad_lse = grads[1] if self.lse_gradient else None
        if grad_lse is not None:
            planes = grad_lse.dim() == out.dim()
            grad_lse = (grad_lse[0] * (1 / math.log(2)) if planes else grad_lse).contiguous()
        return unit_last_stride(grad_out), grad_lse

    def flat(self, tensors: Sequence[torch.Tensor]) -> list[Any]:
        given = dict(zip(self.present, tensors))
        return [unit_last_stride(given[name]) if name in given else None for name in self.form.tensors]


def record_call(module: Any, call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    """out and lse of the call on a fused backend, with a derivative where it has one."""
    rule = Rule(module, call)
    return record(rule, [getattr(call, name) for name in rule.present])


def dispatch(module: Any, call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    """out and lse of the call by the private op of a backend without a derivative."""
    form = call.form
    return module.forward(*(getattr(call, name) for name in (*form.tensors, *form.settings)))


def record(rule: Any, tensors: Sequence[Any]) -> Any:
    """`rule.forward(*tensors)`, with `rule.backward` as its derivative."""
    if torch._C._are_functorch_transforms_active():
        return _RecordedInTransform.apply(rule, *tensors)
    refuse_forward_mode(tensors)
    if not recorded(tensors):
        return rule.forward(*tensors)
    return _Recorded.apply(rule, *apart(tensors))


def record_eagerly(rule: Any, tensors: Sequence[torch.Tensor]) -> Any:
    """`record`, for a caller that knows that nothing is traced or transformed and that something needs a gradient."""
    return _Recorded.apply(rule, *tensors)


class _Recorded(torch.autograd.Function):
    """See `record`. Keeps the tensors, and the results if the rule wants them."""

    @staticmethod
    def forward(ctx, rule, *tensors):
        results = rule.forward(*tensors)
        ctx.rule = rule
        if rule.keeps_results:
            ctx.save_for_backward(*tensors, *results)
            _differentiate_lse(ctx, rule, results[1])
        else:
            ctx.save_for_backward(*tensors)
        return results

    @staticmethod
    def backward(ctx, *grads):
        return None, *ctx.rule.backward(ctx.saved_tensors, grads, ctx.needs_input_grad[1:])


class _RecordedInTransform(torch.autograd.Function):
    """`_Recorded` as torch.func's transforms need it. PyTorch looks at the signature of such a function at every call,
    for longer than a kernel takes, and torch.compile mistakes its arguments where nothing needs a gradient."""

    generate_vmap_rule = True

    @staticmethod
    def forward(rule, *tensors):
        return rule.forward(*tensors)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.rule, *tensors = inputs
        results = output if ctx.rule.keeps_results else ()
        ctx.save_for_backward(*tensors, *results)
        ctx.save_for_forward(*tensors, *results)  # which jvp under a vmap looks for before it asks for the tangents
        if ctx.rule.keeps_results:
            _differentiate_lse(ctx, ctx.rule, output[1])

    backward = staticmethod(_Recorded.backward)

    @staticmethod
    def jvp(ctx, *tangents):
        raise_for_tangents()


def _differentiate_lse(ctx: Any, rule: Rule, lse: torch.Tensor) -> None:
    """Makes lse an output with a gradient, or one without. Nothing is computed for an lse whose gradient nobody takes:
    its gradient is None then (torch.compile gives zeros)."""
    if not rule.lse_gradient:
        ctx.mark_non_differentiable(lse)
    if (rule.lse_gradient or rule.direct) and not torch.compiler.is_compiling():
        ctx.set_materialize_grads(False)


def differentiated(backward_op: Callable, arguments: Sequence[Any]) -> Any:
    """What a private op gives in the backward of autograd, as something whose own derivative raises."""
    if torch._C._are_functorch_transforms_active():
        return _GradientsInTransform.apply(backward_op, *arguments)
    refuse_forward_mode(arguments)
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph=True
        return _Gradients.apply(backward_op, *arguments)
    return backward_op(*arguments)


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
    """`_Gradients` as torch.func's transforms need it (see `_RecordedInTransform`)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(op, *arguments):
        return op(*(unit_last_stride(x) if isinstance(x, torch.Tensor) else x for x in arguments))

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    backward = staticmethod(_Gradients.backward)

    @staticmethod
    def jvp(ctx, *tangents):
        raise_for_tangents()


def raise_for_tangents() -> Any:
    """The `jvp` of every function here. (torch.compile traces no function that has one: only those for torch.func.)"""
    raise RuntimeError(
        "retro_kernels' fused kernels have no forward-mode derivative (torch.func.jvp, jacfwd and hessian, and "
        'torch.autograd.forward_ad): use backend="reference", which PyTorch differentiates in both directions, or '
        "reverse mode (grad, vjp, jacrev)."
    )


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
