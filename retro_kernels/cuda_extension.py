"""The compiled CUDA kernels: loads `_cuda.abi3.so` when first needed, and knows how it was built.

Importing this module loads nothing and never raises; `why_not()` says in one sentence what is wrong, and what to do.
Like the CPU's library it touches no Python and goes through torch's stable ABI: one file serves every Python >= 3.10
and every torch from 2.11 on that is built for the same CUDA major. It is a file of its own because it cannot load
where torch has no CUDA.

`emulate(library)` loads the same sources compiled for the emulator (csrc/cuda/emulator) instead, and from then on the
backend `cuda` takes CPU tensors: slow, and meant for tests.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

import torch

from . import extension

# RETRO_KERNELS_CUDA_LIBRARY names another file, one out of a wheel, say.
LIBRARY = Path(os.environ.get("RETRO_KERNELS_CUDA_LIBRARY") or Path(__file__).with_name("_cuda.abi3.so"))
SKIPPED = "_cuda_skipped.txt"
REBUILD = "run `pip install --no-build-isolation -e .` in the source tree"
OLDEST_CAPABILITY = (8, 0)

_emulator: list[Path] = []


def build_metadata() -> dict[str, Any]:
    """How the library was built: torch, oldest_torch, nvcc, cuda, architectures, flags, git_commit. Empty when there is
    no library or it carries no metadata."""
    return extension.read_metadata(LIBRARY)


@functools.lru_cache(maxsize=1)
def why_not() -> str | None:
    """Loads the library once; why it cannot be used, with the remedy, or None."""
    if not LIBRARY.exists():
        return extension.why_missing("the CUDA extension", LIBRARY, SKIPPED, rebuild())
    built = build_metadata()
    reason = _refused_torch(built) or _refused_devices(built)
    if reason is not None:
        return reason
    try:
        torch.ops.load_library(str(LIBRARY))
    except (OSError, RuntimeError, ImportError) as error:
        return (
            f"the CUDA extension {LIBRARY} does not load ({' '.join(str(error).split())}; built against torch "
            f"{built.get('torch', 'unknown')} and CUDA {built.get('cuda', 'unknown')}, found torch {torch.__version__} "
            f"and CUDA {torch.version.cuda}): {rebuild()}"
        )
    return None


def rebuild() -> str:
    """How to get a library for this torch."""
    if torch.version.cuda is None:
        return f"this torch ({torch.__version__}) has no CUDA: install a CUDA build of PyTorch, then {REBUILD}"
    return f"{REBUILD}, with an nvcc of CUDA {torch.version.cuda.split('.')[0]}"


def _refused_torch(built: dict[str, Any]) -> str | None:
    oldest, cuda = built.get("oldest_torch"), str(built.get("cuda", "unknown"))
    if oldest and extension.version(torch.__version__) < extension.version(oldest):
        return (
            f"the CUDA extension was built for torch {oldest} or newer and this is torch {torch.__version__}: upgrade "
            "torch"
        )
    if torch.version.cuda is None:
        return (
            f"the CUDA extension is there (for CUDA {cuda}), but this torch ({torch.__version__}) has no CUDA: install "
            "a CUDA build of PyTorch on a machine with an NVIDIA GPU"
        )
    if cuda.split(".")[0] != torch.version.cuda.split(".")[0]:
        return (
            f"the CUDA extension was built with CUDA {cuda} and this torch ({torch.__version__}) with CUDA "
            f"{torch.version.cuda}, another major version: {rebuild()}"
        )
    return None


def _refused_devices(built: dict[str, Any]) -> str | None:
    if not torch.cuda.is_available():
        return (
            f"no CUDA device is usable (torch {torch.__version__} with CUDA {torch.version.cuda}): look at the driver "
            "(`nvidia-smi`; torch says `torch.cuda.init()` why), and at CUDA_VISIBLE_DEVICES"
        )
    capabilities = {torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())}
    if max(capabilities) < OLDEST_CAPABILITY:
        best = ".".join(map(str, max(capabilities)))
        return f"the GPU has compute capability {best} and the CUDA kernels need 8.0 (Ampere) or newer"
    architectures = built.get("architectures") or []
    if architectures and not any(covers(architectures, capability) for capability in capabilities):
        found = ", ".join(".".join(map(str, capability)) for capability in sorted(capabilities))
        return (
            f"the CUDA extension was built for {' '.join(architectures)} and the GPU has compute capability {found}: "
            f"set RETRO_KERNELS_CUDA_ARCHS={found.split(', ')[-1]} and {rebuild()}"
        )
    return None


def covers(architectures: list[str], capability: tuple[int, int]) -> bool:
    """Whether code for `architectures` ("8.0", "9.0a", "8.0+PTX") runs on a GPU: machine code on its own major from its
    minor on, with "a" on its very own, PTX on everything newer."""
    for name in architectures:
        version = name.removesuffix("+PTX")
        major, minor = (int(part) for part in version.rstrip("a").split("."))
        if version.endswith("a"):
            runs = capability == (major, minor)
        else:
            runs = capability[0] == major and capability[1] >= minor
            runs = runs or (name.endswith("+PTX") and capability >= (major, minor))
        if runs:
            return True
    return False


def emulate(library: Path | None) -> None:
    """Loads the emulator's library; the backend `cuda` then takes CPU tensors, until `emulate(None)`. RuntimeError when
    it does not load."""
    _emulator.clear()
    if library is not None:
        torch.ops.load_library(str(library))
        _emulator.append(library)


def emulating() -> bool:
    """Whether this process runs the CUDA kernels in the emulator, on CPU tensors."""
    return bool(_emulator)


def ops(tensor: torch.Tensor) -> Any:
    """The raw operations for tensors on this one's device."""
    return torch.ops.retro_kernels_cuda if tensor.device.type == "cuda" else torch.ops.retro_kernels_cuda_emulator


def _namespace() -> Any:
    return torch.ops.retro_kernels_cuda_emulator if emulating() else torch.ops.retro_kernels_cuda


def kernels() -> str:
    """The kernels of the current device, "sm80" or "sm90", which take what they can."""
    return _namespace().kernels()


def set_kernels(name: str) -> None:
    """Which kernels every device gets from now on: "sm80", "sm90" (what these do not take is the work of sm80's),
    "sm90 only" (that raises), or "" for the newest. RuntimeError for another name, or where the device cannot run
    them."""
    _namespace().set_kernels(name)


def launches() -> dict[str, int]:
    """How many kernels of "sm80", of "sm90" and of "decode" this process has launched since the last question, and how
    many of all were "overlapping", allowed to start before their predecessor in the stream has ended. So a check can
    assert which kernels took a call."""
    return dict(zip(("sm80", "sm90", "decode", "overlapping"), _namespace().launches()))


def device_refusal(tensor: torch.Tensor) -> str | None:
    """Why no kernel of the library runs where this query is, or None."""
    if emulating() and tensor.device.type == "cpu":
        return None
    if tensor.device.type != "cuda":
        return f"query is on {tensor.device}; the CUDA kernels need a CUDA tensor"
    capability = torch.cuda.get_device_capability(tensor.device)
    if capability < OLDEST_CAPABILITY or not covers(build_metadata().get("architectures") or ["8.0+PTX"], capability):
        return (
            f"{tensor.device} has compute capability {capability[0]}.{capability[1]}; the CUDA kernels need 8.0 or "
            f"newer and were built for {' '.join(build_metadata().get('architectures') or ['8.0+PTX'])}"
        )
    return None


def rows_aligned(tensor: torch.Tensor, numbers: int = 8) -> bool:
    """Whether every row begins at a multiple of that many numbers (16 bytes of 16-bit ones), as far as its strides and
    (not while torch.compile traces, which cannot tell) its offset say; the binding looks at the address itself."""
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        return False
    moved = (stride for size, stride in zip(tensor.shape[:-1], tensor.stride()[:-1]) if size > 1)
    offset = 0 if torch.compiler.is_compiling() else tensor.storage_offset()
    return offset % numbers == 0 and all(stride % numbers == 0 for stride in moved)
