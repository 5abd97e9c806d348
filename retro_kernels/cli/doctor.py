"""`retro-kernels doctor`: what is installed, what was built, and what can run. Every probe may fail alone."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from .. import machine

PACKAGES = (
    "retro_kernels",
    "torch",
    "triton",
    "numpy",
    "faiss-cpu",
    "faiss-gpu",
    "retro-pytorch",
    "transformers",
    "matplotlib",
)
IMPORTED = {"torch": "torch", "triton": "triton", "numpy": "numpy", "faiss-cpu": "faiss", "faiss-gpu": "faiss"}
PROGRAMS = ("g++", "clang++", "nvcc")
VARIABLES = {
    "RETRO_KERNELS_BACKEND": "the backend of every call that names none",
    "RETRO_KERNELS_BUILD_CPU": "auto, 1 or 0: whether an install builds the C++ extension",
    "RETRO_KERNELS_BUILD_CUDA": "auto, 1 or 0: whether an install builds the CUDA extension",
    "RETRO_KERNELS_CUDA_ARCHS": "the compute capabilities that such an install builds for",
    "TORCH_CUDA_ARCH_LIST": "the same, where RETRO_KERNELS_CUDA_ARCHS is not set",
    "RETRO_KERNELS_CUDA_LIBRARY": "the file of the CUDA extension, in place of the installed one",
    "TRITON_INTERPRET": "1 runs Triton kernels, very slowly, on the CPU",
    "CUDA_HOME": "the CUDA toolkit that a build takes",
    "CUDA_VISIBLE_DEVICES": "which GPUs this process sees",
    "OMP_NUM_THREADS": "threads of the CPU kernels",
    "LD_LIBRARY_PATH": "may put other libraries before torch's own",
}
OK, PROBLEM, NOTE = "ok", "problem", "note"


@dataclasses.dataclass
class Entry:
    """One line of the report."""

    name: str
    value: str
    status: str = NOTE
    remedy: str = ""


def guard(name: str, probe: Callable[[], Any]) -> list[Entry]:
    """The probe's entries; an exception becomes the entry's content instead of a traceback."""
    try:
        found = probe()
    except Exception as error:
        return [Entry(name, _describe(error), PROBLEM)]
    return found if isinstance(found, list) else [found]


def _describe(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"


def versions() -> list[Entry]:
    """Installed (by the package's metadata) and loaded (by importing it) are told apart."""
    entries = [Entry("python", f"{platform.python_version()} at {sys.executable}", OK)]
    for name in PACKAGES:
        entries += guard(name, functools.partial(_version, name))
    return entries


def _version(name: str) -> Entry | list[Entry]:
    installed = machine.package_version(name)
    if name == "retro_kernels":
        folder = Path(__file__).resolve().parents[1]
        return Entry(name, f"{installed or 'not installed, run from its source tree'}, at {folder}", OK)
    if installed is None:
        return [] if name == "faiss-gpu" else Entry(name, "not installed")
    if name not in IMPORTED:
        return Entry(name, installed, OK)
    try:
        module = importlib.import_module(IMPORTED[name])
    except Exception as error:
        return Entry(
            name,
            f"{installed} installed, but importing it fails: {_describe(error)}",
            PROBLEM,
            f"reinstall it: pip install --force-reinstall {name}",
        )
    loaded = str(getattr(module, "__version__", installed))
    if loaded.split("+")[0] != installed.split("+")[0]:
        return Entry(
            name,
            f"{installed} installed, but {loaded} is loaded from {module.__file__}",
            PROBLEM,
            "two installations: remove one, or look at PYTHONPATH",
        )
    return Entry(name, loaded, OK)


def devices() -> list[Entry]:
    """The processor, its instruction sets, and every GPU that torch sees."""
    return guard("CPU", _cpu) + guard("GPU", _gpus) + guard("driver", _driver)


def _cpu() -> list[Entry]:
    shown = ", ".join(machine.cpu_features()) or "no vector extension that is looked for"
    return [
        Entry("CPU", f"{machine.cpu_model()}, {os.cpu_count()} cores, {platform.machine()}", OK),
        Entry("CPU instructions", shown),
    ]


def _gpus() -> list[Entry]:
    import torch

    if torch.version.cuda is None and getattr(torch.version, "hip", None) is None:
        return [Entry("GPU", f"torch {torch.__version__} is a build without CUDA", NOTE)]
    if not torch.cuda.is_available():
        return [
            Entry(
                "GPU",
                f"torch is built for CUDA {torch.version.cuda}, but no GPU is usable",
                NOTE,
                "look at the driver, and at CUDA_VISIBLE_DEVICES",
            )
        ]
    entries = []
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        size = f"{p.total_memory / 2**30:.0f} GiB"
        entries.append(Entry(f"GPU {i}", f"{p.name}, compute capability {p.major}.{p.minor}, {size}", OK))
    return [*entries, Entry("CUDA of torch", str(torch.version.cuda), OK)]


def _driver() -> list[Entry]:
    try:
        version = machine.driver_version()
    except OSError as error:
        return [Entry("driver", str(error), PROBLEM)]
    return [] if version is None else [Entry("driver", version, OK)]


def compilers() -> list[Entry]:
    """The compilers that an install from source can use."""
    return [entry for name in PROGRAMS for entry in guard(name, functools.partial(_program, name))]


def _program(name: str) -> Entry:
    folders = [os.environ.get("PATH", os.defpath), str(Path(sys.executable).parent)]
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if name == "nvcc":  # as setup.py looks for it
        of_pip = sorted(map(str, Path(sysconfig.get_path("purelib")).glob("nvidia/cu*/bin")))
        folders = [f"{home}/bin"] if home else [*folders, *of_pip, "/usr/local/cuda/bin"]
    path = shutil.which(name, path=os.pathsep.join(folders))
    if path is None:
        return Entry(name, "not found")
    done = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=20)
    lines = [line for line in (done.stdout or done.stderr).splitlines() if line.strip()]
    line = next((line for line in lines if "release" in line), lines[0] if lines else "no version")
    return Entry(name, f"{line.strip()} ({path})", OK)


def backends() -> tuple[list[Entry], bool]:
    """Every backend of the attentions, what is the default on each device, and whether that is a fused one on the GPU,
    or without a GPU on the CPU."""
    try:
        import retro_kernels as rk
        from retro_kernels.ops import backends as choice
        from retro_kernels.ops.backends import ATTENTION as BACKENDS
        from retro_kernels.ops.verification import verdicts

        states = rk.backends()
        defaults = {verdicts.describe(device): choice.outlook(BACKENDS, device) for device in choice.devices()}
    except Exception as error:
        entry = Entry("retro_kernels", f"importing it fails: {_describe(error)}", PROBLEM, "see the versions above")
        return [entry], False
    entries = []
    for name, state in states.items():
        if state.available:
            entries.append(Entry(name, "can run", OK, state.default))
        else:
            entries.append(Entry(name, "cannot run", NOTE, str(state.reason)))
    for device, (name, why) in defaults.items():
        entries.append(Entry(f"default on {device}", name, PROBLEM if name == "reference" else OK, why))
    return entries, [name for name, _ in defaults.values()][-1] != "reference"


def extension() -> list[Entry]:
    """The compiled extensions: what the install built, whether each loads, what it was built for and what is here."""
    return guard("install", built) + guard("extension", _extension) + guard("CUDA extension", _cuda_extension)


def built() -> Entry:
    """The sentence that setup.py ends with: what it built and what it left out."""
    from retro_kernels import cuda_extension, extension

    parts = []
    for kind, module in (("CPU", extension), ("CUDA", cuda_extension)):
        if module.LIBRARY.exists():
            parts.append(f"built the {kind} kernels")
        else:
            reason, _ = extension.read_skipped(module.LIBRARY.with_name(module.SKIPPED)) or ("nothing says why", "")
            parts.append(f"left out the {kind} kernels ({reason})")
    return Entry("install", "; ".join(parts))


def _extension() -> list[Entry]:
    module = importlib.import_module("retro_kernels.extension")
    why_not = module.why_not()
    entries = [
        Entry(
            "extension", "loaded" if why_not is None else "not loaded", OK if why_not is None else NOTE, why_not or ""
        )
    ]
    entries += guard("instruction set in use", lambda: _instruction_set(module, why_not))
    return entries + guard("built for", lambda: _built_for(module))


def _cuda_extension() -> list[Entry]:
    module = importlib.import_module("retro_kernels.cuda_extension")
    why_not = module.why_not()
    entries = [
        Entry(
            "CUDA extension",
            "loaded" if why_not is None else "not loaded",
            OK if why_not is None else NOTE,
            why_not or "",
        )
    ]
    import torch

    metadata, here = module.build_metadata(), {"torch": torch.__version__, "cuda": str(torch.version.cuda)}
    return entries + [
        Entry(f"CUDA built: {name}", _join(value) + (f" (found here: {here[name]})" if name in here else ""))
        for name, value in metadata.items()
    ]


def _join(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _instruction_set(module: Any, why_not: str | None) -> list[Entry]:
    return [Entry("instruction set in use", str(module.isa()), OK)] if why_not is None else []


def _built_for(module: Any) -> list[Entry]:
    metadata = module.build_metadata()
    if not metadata:
        return [Entry("built for", "nothing was built at install")]
    import torch

    here = {"torch": torch.__version__, "python": platform.python_version(), "platform": platform.machine()}
    entries = []
    for name, value in dict(metadata).items():
        found = here.get(str(name))
        entries.append(Entry(f"built: {name}", _join(value) + (f" (found here: {found})" if found else "")))
    return entries


def variables() -> list[Entry]:
    """The environment variables that matter, where they are set."""
    entries = [Entry(name, os.environ[name], NOTE, why) for name, why in VARIABLES.items() if name in os.environ]
    return entries or [Entry("none", "no variable that matters is set")]


def collect() -> tuple[dict[str, list[Entry]], bool]:
    """All sections, and whether fused kernels are the default on the GPU (without one, on the CPU)."""
    states, fused = backends()
    sections = {
        "versions": guard("versions", versions),
        "devices": devices(),
        "compilers": compilers(),
        "backends": states,
        "extension": extension(),
        "environment variables": variables(),
    }
    return sections, fused


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON, for machines.")] = False,
) -> None:
    """Says what is installed and built, which backends can run, and why the others cannot.

    Works when the package is half broken: each probe that fails says so in its own line. Exit code 0 when fused kernels
    are the default on the GPU (without one, on the CPU), otherwise 1.
    """
    sections, fused = collect()
    if as_json:
        document = {
            "fused_backend_can_run": fused,
            **{name: [dataclasses.asdict(entry) for entry in entries] for name, entries in sections.items()},
        }
        typer.echo(json.dumps(document, indent=1))
    else:
        show(sections, fused)
    raise typer.Exit(0 if fused else 1)


def show(sections: dict[str, list[Entry]], fused: bool) -> None:
    """The sections as tables, and the verdict last."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    styles = {OK: "green", PROBLEM: "bold red", NOTE: ""}
    for title, entries in sections.items():
        table = Table(
            title=title, title_justify="left", title_style="bold", show_header=False, box=None, padding=(0, 2, 0, 0)
        )
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for entry in entries:
            value = Text(entry.value, style=styles[entry.status])
            if entry.remedy:
                value.append(f"\n{entry.remedy}", style="dim")
            table.add_row(Text(entry.name), value)
        console.print(table, "")
    if fused:
        console.print(Text("Fused attention can run here and is the default.", style="bold green"))
        return
    slow = [
        entry.name.removeprefix("default on ")
        for entry in sections.get("backends", [])
        if entry.name.startswith("default on ") and entry.value == "reference"
    ]
    if slow:
        text = f"On {' and '.join(slow)} calls go to the slow pure-PyTorch reference by default."
    else:
        text = "No fused backend can run here: calls go to the slow pure-PyTorch reference."
    console.print(Text(text, style="bold yellow"), Text("The reasons are under 'backends'.", style="dim"))
