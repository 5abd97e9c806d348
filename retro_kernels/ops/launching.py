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
from collections.abc import Mapping
from typing import Any

import torch


@dataclasses.dataclass(frozen=True)
class Launch:
    """One kernel launch: `kernel[(programs,)](**arguments)` under `settings`, an operation's own LaunchSettings, which
    were chosen for `kind`. A tensor among the arguments is named as the field of the call that it is, or as what the
    backend makes."""

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

        names = [parameter.name for parameter in launch.kernel.params]
        self.kernel, self.compiled, self.programs = launch.kernel, compiled, launch.programs
        self.runtime, self.drivers, self.driver = knobs.runtime, driver, driver.active
        self.device = self.driver.get_current_device()
        self.values = [launch.arguments[name] for name in names]
        self.pointers = [(i, name) for i, name in enumerate(names) if isinstance(self.values[i], torch.Tensor)]
        # The machine code may take these to be multiples of 16 bytes.
        self.aligned = [(i, name) for i, name in self.pointers if self.values[i].data_ptr() % 16 == 0]
        self.unaligned = [(i, name) for i, name in self.pointers if self.values[i].data_ptr() % 16 != 0]
        for i, _ in self.pointers:
            self.values[i] = 0  # keeps no tensor alive

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
        values, bits = self.values.copy(), 0
        for i, name in self.aligned:
            values[i] = pointer = tensors[name].data_ptr()
            bits |= pointer
        if bits & 15:
            return False
        for i, name in self.unaligned:
            values[i] = tensors[name].data_ptr()
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
