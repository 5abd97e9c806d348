"""Two stand-ins for a GPU on a machine without one. Neither computes anything.

`fake_driver` is a Triton driver: kernels are compiled for a GPU that is named, and launched nowhere. What runs under it
is what runs on that GPU up to the launch: the plan, the choice of settings, Triton's own binder and cache, its compiler
and its ptxas, and Triton's refusal of more shared memory or threads than the GPU has. The tensors are a CPU's, and
outputs keep what they were filled with. TRITON_INTERPRET must not be set when retro_kernels is imported.

`fake_tensors` is PyTorch's FakeTensorMode with a CUDA device that torch believes in: the dispatcher, the choice of a
backend and torch.compile take their GPU branches on tensors without data. Nothing may need a gradient: autograd asks
the CUDA runtime for a stream.
"""

from __future__ import annotations

import contextlib
import dataclasses
import types
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch._subclasses import fake_tensor
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.compiler import compiler
from triton.runtime import driver

# Compute capability -> bytes of shared memory that a block may have (CUDA programming guide, compute capabilities).
SHARED_MEMORY = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}


@dataclasses.dataclass
class Launch:
    """A kernel that would have been launched."""

    kernel: str
    programs: int
    num_warps: int
    shared_memory: int


class _Utils:
    """What Triton asks of the CUDA driver."""

    def __init__(self, capability: int) -> None:
        self.properties = {
            "max_shared_mem": SHARED_MEMORY[capability],
            "max_num_regs": 65_536,
            "multiprocessor_count": 132,
            "warpSize": 32,
            "sm_clock_rate": 1_000_000,
            "mem_clock_rate": 1_000_000,
            "mem_bus_width": 5120,
        }

    def get_device_properties(self, device: int) -> dict[str, int]:
        return self.properties

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[int, int, int, int, int]:
        """-> module, function, registers, spills, the most threads of a block."""
        return 1, 1, 0, 0, 1024

    def unload_module(self, module: int) -> None:
        pass


class FakeDriver(DriverBase):
    """Answers for one GPU of that compute capability (90 for sm_90) and records launches."""

    def __init__(self, capability: int) -> None:
        self.capability, self.launches = capability, list[Launch]()
        self.utils = _Utils(capability)

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return 0

    def set_current_device(self, device: int) -> None:
        pass

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> Any:
        raise NotImplementedError

    def get_benchmarker(self) -> Any:
        raise NotImplementedError

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        """What launches a compiled kernel: here it is written down."""

        def launch(grid_x: int, grid_y: int, grid_z: int, *_: Any) -> None:
            programs = grid_x * grid_y * grid_z
            self.launches.append(Launch(metadata.name, programs, metadata.num_warps, metadata.shared))

        return launch


def _always(answer: Any) -> Any:
    """A function of anything. (torch.compile traces it, as it would not a mock.)"""
    return lambda *_, **__: answer


@contextlib.contextmanager
def kernels_on_cpu(capability: int) -> Iterator[None]:
    """Within it backend="triton" takes CPU tensors and plans for a GPU of that compute capability."""
    from retro_kernels.ops.absorbed.triton import launch as absorbed
    from retro_kernels.ops.attention.triton import launch as attention
    from retro_kernels.ops.decoding.triton import launch as decode

    if attention.interpreting():
        raise RuntimeError("TRITON_INTERPRET was set when retro_kernels was imported: nothing would be compiled")
    with contextlib.ExitStack() as stack:
        for module in (attention, decode, absorbed):
            for name in ("unavailable", "refusal"):
                if hasattr(module, name):
                    stack.enter_context(mock.patch.object(module, name, _always(None)))
            if hasattr(module, "_compute_capability"):
                stack.enter_context(mock.patch.object(module, "_compute_capability", _always(capability)))
        yield


@contextlib.contextmanager
def fake_driver(capability: int) -> Iterator[FakeDriver]:
    """Within it backend="triton" takes CPU tensors and compiles for a GPU of that compute capability."""
    made = FakeDriver(capability)
    # Triton's own way back, `reset_active`, looks for a real driver. It remembers how much shared memory a device has.
    compiler.max_shared_mem.cache_clear()
    try:
        with kernels_on_cpu(capability), mock.patch.object(driver, "_active", made):
            yield made
    finally:
        compiler.max_shared_mem.cache_clear()


@contextlib.contextmanager
def fake_tensors(capability: int, name: str = "a GPU that is not there") -> Iterator[None]:
    """Within it torch sees one CUDA device of that name and compute capability, and every new tensor has no data."""
    major, minor = divmod(capability, 10)
    properties = types.SimpleNamespace(
        name=name, major=major, minor=minor, multi_processor_count=132, total_memory=1 << 37, warp_size=32
    )
    answers = {
        "is_available": True,
        "device_count": 1,
        "current_device": 0,
        "get_device_capability": (major, minor),
        "get_device_name": name,
        "get_device_properties": properties,
        "is_current_stream_capturing": False,
        "get_rng_state": None,
        "set_rng_state": None,
        "synchronize": None,
        "_lazy_init": None,
    }
    with contextlib.ExitStack() as stack:
        for function, answer in answers.items():
            stack.enter_context(mock.patch.object(torch.cuda, function, _always(answer)))
        stack.enter_context(mock.patch.object(torch.accelerator, "is_available", _always(False)))
        if hasattr(fake_tensor, "init_gpu_context"):
            stack.enter_context(mock.patch.object(fake_tensor, "init_gpu_context", _always(None)))
        stack.enter_context(torch.no_grad())
        stack.enter_context(fake_tensor.FakeTensorMode())
        yield
