"""Triton's real path to a launch, for a GPU that is not there: `python -m benchmarks.rehearsal.fake_driver`.

Shown of every case of the GPU suite and of what it times: plans, arguments, compilation for sm_90 by the bundled ptxas,
shared memory and threads that this GPU has, forward and backward; and that a second call compiles nothing. The control
is a GPU with less shared memory than a launch asks for.

The environment: Triton of the GPU machine (3.6), PyTorch of any build, no GPU.
"""

from __future__ import annotations

import functools
from unittest import mock

import torch

from benchmarks import fake_gpu, gpu_kit, rehearsal
from retro_kernels import testing

SHORTER = "shorter than a chunk, bfloat16"  # no token of it attends, and its result is zero without a launch
SHOWN = "planned, compiled and launched for sm_90 within its limits; a second call compiles nothing"


class Compilations:
    """Counts what Triton compiles (or finds in its cache on disk) in place of taking it from a kernel's own memory."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, *arguments, **options) -> None:
        self.count += 1


def walk(run, driver, compiled: Compilations, launches: bool) -> str:
    before, counted = len(driver.launches), compiled.count
    run()
    first, new = driver.launches[before:], compiled.count - counted
    run()
    if compiled.count - counted > new:
        raise testing.Wrong(f"the second call compiled {compiled.count - counted - new} kernels")
    if bool(first) != launches:
        raise testing.Wrong(f"{len(first)} launches, expected {'some' if launches else 'none'}")
    if not launches:
        return "nothing to launch"
    most = fake_gpu.SHARED_MEMORY[driver.capability]
    too_large = [x for x in first if x.shared_memory > most or x.programs <= 0 or x.num_warps * 32 > 1024]
    if too_large:
        raise testing.Wrong(f"beyond what the GPU has: {too_large}")
    kernels = sorted({x.kernel for x in first})
    return f"{len(first)} launches of {', '.join(kernels)}; at most {max(x.shared_memory for x in first):,} B shared"


def less_shared_memory() -> str:
    """The same launch on a GPU with 8 KiB of it raises, as Triton does where there is too little."""
    with mock.patch.dict(fake_gpu.SHARED_MEMORY, {90: 8192}), fake_gpu.fake_driver(90):
        arguments = testing.make(testing.Case("", b=1, n=130, m=64, r=128, h=1, d=64), torch.bfloat16)
        try:
            testing.run(arguments, "triton")
        except Exception as error:
            if "shared memory" in str(error):
                return f"refused: {error}"
            raise
    raise testing.Wrong("a launch with more shared memory than the GPU has was not refused")


def main() -> None:
    from triton import knobs

    compiled = Compilations()
    with rehearsal.main("fake driver", (__doc__ or "").split("\n")[0]) as part:
        # First: a launch that is known is not looked at again.
        part.check("control", "8 KiB of shared memory", "refused", less_shared_memory)
        with fake_gpu.fake_driver(90) as driver, mock.patch.object(knobs.compilation, "listener", compiled):
            for call in gpu_kit.suite_calls(("bf16", "beyond 2^31", "timed", "timed besides")):
                work = functools.partial(walk, call.run, driver, compiled, call.name != SHORTER)
                part.check(call.operation, call.name, SHOWN, work)


if __name__ == "__main__":
    main()
