"""Launches of Triton kernels: by name through Triton's own path, and by place once the machine code is known.

Triton's `kernel[grid](**arguments)` looks at every argument anew to find the compiled kernel, for longer than a small
kernel runs. A launch is therefore bound after its first time: to the compiled kernel and to the values of all arguments
but the pointers, which are those of the tensors of each call. That is right for calls of one signature (`plans.py`:
shapes, strides, dtypes, options and device), which is where bound launches are kept (`Call.memory`), as long as the
pointers are aligned as the machine code takes them to be. `Bound.__call__` says no, and the launch goes Triton's way,
wherever something could want to see it or could have changed: hooks, debugging, another driver or device.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch


@dataclasses.dataclass(frozen=True)
class Launch:
    """One kernel launch: `kernel[(programs,)](**arguments)` under `settings`, an operation's own LaunchSettings, which
    were chosen for `kind`. Arguments may be NamedTuples. A tensor goes by the name of its argument, or of its field in
    a NamedTuple unless that is `data`: the field of the call that it is, or what the backend makes."""

    kind: str
    kernel: Any
    programs: int
    arguments: dict[str, Any]
    settings: Any

    def __call__(self) -> Any:
        """Launches; returns the compiled kernel, where there is one."""
        if self.programs > 0:
            return self.kernel[(self.programs,)](**self.arguments, **self.options())
        return None

    def options(self) -> dict[str, Any]:
        """What the compiler is told. Triton 3.10 ends the fusion of multiplications with additions by default, and the
        registers of the settings were counted with it."""
        return {
            "num_warps": self.settings.num_warps,
            "num_stages": self.settings.num_stages,
            "enable_fp_fusion": True,
        }


class Bound:
    """A launch of which only the pointers change."""

    def __init__(self, launch: Launch, compiled: Any) -> None:
        from triton import knobs
        from triton.runtime import driver

        self.kernel, self.compiled, self.programs = launch.kernel, compiled, launch.programs
        self.runtime, self.drivers, self.driver = knobs.runtime, driver, driver.active
        self.device = self.driver.get_current_device()
        self.arrange = _arranger(
            {parameter.name: launch.arguments[parameter.name] for parameter in launch.kernel.params}
        )

    def __call__(self, tensors: Mapping[str, torch.Tensor]) -> bool:
        """Launches with these tensors, by the arguments' names; whether it did."""
        driver, runtime = self.driver, self.runtime
        if (
            self.drivers.active is not driver
            or self.kernel.pre_run_hooks
            or runtime.debug
            or _calls(runtime.launch_enter_hook)
            or _calls(runtime.launch_exit_hook)
        ):
            return False
        device = driver.get_current_device()
        if device != self.device:
            return False
        values = self.arrange(tensors)
        if values is None:
            return False
        compiled = self.compiled
        compiled.run(
            self.programs,
            1,
            1,
            driver.get_current_stream(device),
            compiled.function,
            compiled.packed_metadata,
            None,
            None,
            None,
            *values,
        )
        return True


def _arranger(arguments: Mapping[str, Any]) -> Callable[[Mapping[str, torch.Tensor]], tuple[Any, ...] | None]:
    """A function of tensors by name that gives all arguments in their order, with pointers for tensors; or None where
    a pointer is no multiple of 16 bytes that was one before, as the machine code may take it to be.

    It is made of source text, as `dataclasses` makes its methods: a loop over the arguments would take as long as a
    small kernel runs."""
    constants: dict[str, Any] = {}
    pointers: dict[str, int] = {}  # by name, the bits that must be 0

    def source(name: str, value: Any) -> str:
        if isinstance(value, torch.Tensor):
            pointers[name] = 0 if value.data_ptr() % 16 else 15
            return name
        if isinstance(value, tuple) and any(isinstance(x, torch.Tensor) for x in value):
            fields = zip(value._fields, value)  # type: ignore[attr-defined]
            return f"({' '.join(source(name if field == 'data' else field, x) + ',' for field, x in fields)})"
        constants[f"_{len(constants)}"] = value
        return f"_{len(constants) - 1}"

    values = " ".join(source(name, value) + "," for name, value in arguments.items())
    lines = [f"{name} = tensors[{name!r}].data_ptr()" for name in pointers]
    aligned = " | ".join(name for name, low_bits in pointers.items() if low_bits) or "0"
    body = "\n    ".join([*lines, f"if ({aligned}) & 15: return None", f"return ({values})"])
    exec(f"def arrange(tensors):\n    {body}", constants)
    return constants["arrange"]


def _calls(hook: Any) -> bool:
    """Whether the hook, a chain of them in Triton since 3.5, calls anything."""
    return hook is not None and bool(getattr(hook, "calls", True))


def bind(launch: Launch, compiled: Any) -> Bound | None:
    """The launch that has just been made, bound; None where it cannot be (the interpreter, no program)."""
    return Bound(launch, compiled) if hasattr(compiled, "packed_metadata") else None


def launched(call: Any, key: Any, made: Mapping[str, torch.Tensor | None]) -> bool:
    """Whether all launches under `key` of a remembered call have been made, with the tensors of the call and those that
    the backend `made`, by the names of the kernels' arguments."""
    bound: list[Bound] | None = None if call.memory is None else call.memory.get(key)
    if not bound:
        return False
    tensors = {**call.__dict__, **made}
    return all(launch(tensors) for launch in bound)


def launch_all(call: Any, key: Any, launches: list[Launch], *, keep: bool = True) -> None:
    """Makes the launches, and keeps them bound under `key` where the call is remembered."""
    bound = [bind(launch, launch()) for launch in launches]
    if keep and call.memory is not None and None not in bound:
        call.memory[key] = bound
