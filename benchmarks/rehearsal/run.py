"""What can be shown of the GPU code without a GPU, in one command: `make gpu-rehearsal`.

    python -m benchmarks.rehearsal.run [PART ...]     runs the parts, each in its environment, and writes the page
    python -m benchmarks.rehearsal.run --page         writes docs/rehearsal.md of the committed results alone

Environments (.venv-NAME) are made where they are missing, which downloads several GB. A part's rows are written to
docs/rehearsal/NAME.json; one that was stopped goes on with --resume.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RESULTS, PAGE = ROOT / "docs" / "rehearsal", ROOT / "docs" / "rehearsal.md"
COMMON = ("setuptools", "typer>=0.12", "rich", "safetensors", "pyyaml", "pytest")


@dataclass(frozen=True)
class Part:
    """A module beside this one, its environment, and what that must have."""

    module: str
    environment: str
    packages: tuple[str, ...]
    about: str


GPU = ("torch==2.11.0", "triton==3.6.0", "numpy")
TTSEM = ("ttsem==0.1.0", "triton==3.8.0", "torch==2.14.0", "numpy")
PARTS = (
    Part(
        "fake_tensors",
        "gpu",
        GPU,
        "PyTorch's fake tensors on a faked CUDA device: which backend a call gets, eager, with "
        "gradients and under `torch.compile(fullgraph=True)`.",
    ),
    Part(
        "fake_driver",
        "gpu",
        GPU,
        "A Triton driver that compiles and launches nothing: the real path to a launch on "
        "compute capability 9.0, with its shared-memory limit.",
    ),
    Part(
        "ttsem_triton",
        "ttsem",
        TTSEM,
        "ttsem executes what Triton's front end makes for compute capability 9.0: bf16 "
        "values, accesses out of bounds, races between programs.",
    ),
    Part(
        "sentryward_cuda",
        "sentryward",
        ("sentryward==0.1.1",),
        "sentryward proves that no schedule of the threads races, on the PTX that nvcc makes of the sm_80 kernels.",
    ),
)


def known() -> list[Part]:
    """Of the parts those that are there."""
    return [part for part in PARTS if Path(__file__).with_name(f"{part.module}.py").exists()]


def python_of(part: Part) -> Path:
    """Its environment's interpreter, made where it is missing. RuntimeError without a Python 3.12."""
    folder = ROOT / f".venv-{part.environment}"
    python = folder / "bin" / "python"
    if python.exists():
        return python
    base = shutil.which("python3.12") or (sys.executable if sys.version_info[:2] == (3, 12) else None)
    if base is None:
        raise RuntimeError(f"{part.module} needs Python 3.12 (python3.12 on the path), which was not found")
    print(f"making {folder.name}", flush=True)
    subprocess.run([base, "-m", "venv", str(folder)], check=True)
    subprocess.run([str(python), "-m", "pip", "install", "--quiet", *part.packages, *COMMON], check=True)
    return python


def run(part: Part, python: Path, only: str | None = None, resume: bool = False) -> int:
    """-> its exit code. Its rows, versions and seconds are written."""
    file = RESULTS / f"{part.module}.json"
    rows = file.with_suffix(".rows")
    if not resume:
        rows.unlink(missing_ok=True)
    environment = {name: x for name, x in os.environ.items() if name not in ("TRITON_INTERPRET", "PYTHONPATH")}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [str(python), "-W", "ignore", "-m", f"benchmarks.rehearsal.{part.module}", "--out", str(rows)]
    command += [] if only is None else ["--only", only]
    code = subprocess.run(command, cwd=ROOT, env=environment).returncode
    versions = subprocess.run(
        [
            str(python),
            "-c",
            "import json, sys, importlib.metadata as m; print(json.dumps({d.name: d.version for d in "
            "m.distributions() if d.name in sys.argv[1:]} | {'python': sys.version.split()[0]}))",
            *(package.split("=")[0] for package in part.packages),
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    from retro_kernels.bench import environment as versioned
    from retro_kernels.bench import results

    found = json.loads(rows.read_text()) if rows.exists() else []
    document = {
        "part": part.module,
        "commit": versioned.commit(),
        "versions": json.loads(versions.stdout),
        "seconds": round(sum(row["seconds"] for row in found)),
        "rows": found,
    }
    rows.unlink(missing_ok=True)
    file.write_bytes(results.compact_json(document))
    return code


def committed() -> dict[str, dict]:
    """A part's module -> its results, of the parts that have some."""
    files = {part.module: RESULTS / f"{part.module}.json" for part in known()}
    return {name: json.loads(file.read_text()) for name, file in files.items() if file.exists()}


def page() -> str:
    """docs/rehearsal.md, of the committed results."""
    found = committed()
    lines = [
        "# What was shown of the GPU kernels without a GPU",
        "",
        "Generated by `make gpu-rehearsal` from [rehearsal/](rehearsal/). None of it ran on a GPU, and what is not in",
        "these tables was not shown.",
        "",
        "| part | shown | of | seconds | commit | with |",
        "| --- | ---: | ---: | ---: | --- | --- |",
    ]
    for part in known():
        link = f"[{part.module}](../benchmarks/rehearsal/{part.module}.py)"
        if part.module not in found:
            lines.append(f"| {link} | - | - | - | - | no results are committed |")
            continue
        document = found[part.module]
        shown = sum(row["ok"] for row in document["rows"])
        versions = ", ".join(f"{name} {version}" for name, version in sorted(document["versions"].items()))
        lines.append(
            f"| {link} | {shown} | {len(document['rows'])} | {document['seconds']} | "
            f"{document.get('commit', '-')} | {versions} |"
        )
    for part in (part for part in known() if part.module in found):
        lines += ["", f"## {part.module}", "", part.about]
        for shown in dict.fromkeys(row["shown"] for row in found[part.module]["rows"]):
            rows = [row for row in found[part.module]["rows"] if row["shown"] == shown]
            lines += ["", f"**{shown}**: {sum(row['ok'] for row in rows)} of {len(rows)}.", ""]
            for operation in dict.fromkeys(row["operation"] for row in rows if row["ok"]):
                cases = [row["case"] for row in rows if row["ok"] and row["operation"] == operation]
                lines.append(f"- {operation}: {'; '.join(dict.fromkeys(cases))}")
            failed = [row for row in rows if not row["ok"]]
            lines += [f"- NOT SHOWN: {row['operation']}, {row['case']}: {_line(row['detail'])}" for row in failed]
    return "\n".join(lines) + "\n"


def _line(text: str) -> str:
    return " ".join(text.split())[:300]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.rehearsal.run", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(part.module for part in PARTS))
    parser.add_argument("--only", metavar="REGEX", help='of the rows only those whose "operation: case" matches')
    parser.add_argument("--resume", action="store_true", help="leave out what a run that was stopped has shown")
    parser.add_argument("--page", action="store_true", help="write docs/rehearsal.md and run nothing")
    options = parser.parse_args(arguments)
    names = [part.module for part in known()]
    unknown = [name for name in options.parts if name not in names]
    if unknown:
        parser.error(f"got the part {unknown[0]!r}, expected one of: {', '.join(names)}")
    RESULTS.mkdir(parents=True, exist_ok=True)
    codes = {}
    for part in [] if options.page else known():
        if not options.parts or part.module in options.parts:
            codes[part.module] = run(part, python_of(part), options.only, options.resume)
    PAGE.write_text(page())
    failed = [name for name, code in codes.items() if code]
    print(f"{PAGE.relative_to(ROOT)}: " + (f"not all shown by {', '.join(failed)}" if failed else "all shown"))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
