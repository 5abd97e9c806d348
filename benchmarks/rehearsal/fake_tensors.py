"""The choice of a backend, autograd and torch.compile on CUDA tensors without data:
`python -m benchmarks.rehearsal.fake_tensors`.

Shown of every case of the GPU suite (tests/gpu): the eager call's result and gradients have their shapes, dtypes and
device by the fused op named; torch.compile(fullgraph=True) leaves that op in one graph; and with no backend named, once
the class of call has passed its check on that device, the op is the same. The controls are calls that must not get it:
of a class that was not checked, and of one that failed.

The environment: a CUDA build of PyTorch (2.11 on), its Triton, a C compiler, no GPU. Where fake tensors ask the CUDA
runtime for the current device, `RUNTIME` answers.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from unittest import mock

import torch

from benchmarks import rehearsal
from benchmarks.fake_gpu import fake_tensors
from retro_kernels import testing
from retro_kernels.ops import backends
from retro_kernels.ops.verification import self_check, verdicts

SHOWN = "eager with gradients, compiled whole, and chosen by default, on CUDA tensors"
RUNTIME = """
int cudaGetDevice(int *device) { *device = 0; return 0; }
int cudaSetDevice(int device) { return 0; }
int cudaGetDeviceCount(int *count) { *count = 1; return 0; }
int cudaGetLastError(void) { return 0; }
int cudaPeekAtLastError(void) { return 0; }
int cudaStreamIsCapturing(void *stream, int *status) { *status = 0; return 0; }
int cudaDeviceGetStreamPriorityRange(int *least, int *greatest) { *least = 0; *greatest = -1; return 0; }
int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) { *flags = 0; *active = 1; return 0; }
int cuCtxGetCurrent(void **context) { *context = (void *)1; return 0; }
"""


def with_stand_in_runtime() -> None:
    """Starts this process anew with a CUDA runtime and driver that know one device and can do nothing with it."""
    if "RETRO_KERNELS_STAND_IN" in os.environ:
        return
    folder = tempfile.mkdtemp(prefix="retro-kernels-cuda-")
    library = f"{folder}/libcuda.so.1"
    command = ["cc", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", library, "-x", "c", "-"]
    subprocess.run(command, input=RUNTIME, text=True, check=True)
    paths = os.pathsep.join(filter(None, (folder, os.environ.get("LD_LIBRARY_PATH"))))
    variables = {"RETRO_KERNELS_STAND_IN": folder, "LD_PRELOAD": library, "LD_LIBRARY_PATH": paths}
    os.execve(sys.executable, sys.orig_argv, {**os.environ, **variables})


def made(case: testing.Case) -> dict:
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    with unset_fake_temporarily():
        return testing.make(case, torch.bfloat16)


def on_cuda(case: testing.Case) -> dict:
    """The case's arguments as tensors without data."""

    def empty(x):
        if isinstance(x, tuple):
            return tuple(map(empty, x))
        if not isinstance(x, torch.Tensor):
            return x
        return torch.empty(x.shape, dtype=x.dtype, device="cuda").requires_grad_(x.requires_grad)

    return {name: empty(x) for name, x in made(case).items()}


def traced(call, arguments: dict) -> list[str]:
    """The private ops in the one graph of a compiled call."""
    torch._dynamo.reset()
    ops: list[str] = []

    def keep(graph, _):
        ops.extend(str(node.target) for node in graph.graph.nodes if "retro_kernels" in str(node.target))
        return graph.forward

    with torch.no_grad():
        torch.compile(call, fullgraph=True, backend=keep)(arguments)
    return ops


def expect_like(name: str, given: torch.Tensor, shape: tuple[int, ...], like: torch.Tensor) -> None:
    found = (tuple(given.shape), given.dtype, given.device)
    if found != (tuple(shape), like.dtype, like.device):
        raise testing.Wrong(f"{name}: got {found}, expected {(tuple(shape), like.dtype, like.device)}")


def walk(case: testing.Case) -> str:
    passed = self_check.Verdict(self_check.PASSED, "", 0.0, "here")
    found: dict[str | None, list[str]] = {}
    with fake_tensors(90), mock.patch.object(verdicts, "_decided", return_value=passed):
        arguments = on_cuda(case)
        call = testing.operation(arguments)
        for backend in ("triton", None):
            gradients = testing.has_gradients(arguments, "triton")
            with torch.enable_grad() if gradients else torch.no_grad():
                out = call(**arguments, backend=backend)
                expect_like("output", out, case.out_shape, arguments["query"])
                if gradients:
                    inputs = testing.differentiable(arguments)
                    made = torch.autograd.grad(out.sum(), list(inputs.values()), allow_unused=True)
                    for (name, x), gradient in zip(inputs.items(), made):
                        if gradient is not None:  # of a table that is not attended by, there is none
                            expect_like(f"gradient of {name}", gradient, x.shape, x)
            found[backend] = traced(lambda x, backend=backend: call(**x, backend=backend), arguments)
    for backend, ops in found.items():
        if not any(op.endswith("_triton.default") for op in ops):
            raise testing.Wrong(f"backend={backend}: the graph has {ops or 'no op of this library'}")
    return ", ".join(sorted({op.removeprefix("retro_kernels.").removesuffix(".default") for op in found[None]}))


def refused(status: str) -> str:
    """With this verdict the default is not the fused kernel, and a warning says so."""
    verdict = self_check.Verdict(status, "the reason", 0.0, "here")
    backends._warned.clear()
    with fake_tensors(90), mock.patch.object(verdicts, "_decided", return_value=verdict):
        arguments = on_cuda(testing.Case("", d=64))
        call = testing.operation(arguments)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            ops = traced(lambda x: call(**x), arguments)
    if ops:
        raise testing.Wrong(f"the graph has {ops}")
    if not any("the reason" in str(one.message) for one in caught):
        raise testing.Wrong("nothing was warned of")
    return "the reference, with a warning"


def main() -> None:
    with_stand_in_runtime()
    sys.path[:0] = [str(Path(__file__).resolve().parents[2] / "tests" / "gpu")]
    import gpu_problems as problems

    with rehearsal.main("fake tensors", (__doc__ or "").split("\n\n")[0]) as part:
        for case in problems.CASES:
            part.check(testing.name_of(made(case)), case.name, SHOWN, lambda case=case: walk(case))
        for status in (self_check.FAILED, self_check.UNKNOWN):
            part.check("control", f"a class that is {status}", "not chosen by default", lambda s=status: refused(s))


if __name__ == "__main__":
    main()
