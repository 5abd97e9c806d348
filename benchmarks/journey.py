"""The README's way from a folder of text to generated text with its sources, run as written on a real text: the
docstrings of Python's standard library, a file each.

    python -m benchmarks.journey --work journey

runs the commands of the README's section (but the installation) in the folder, with its run.yaml, says what each took,
and exits with 1 where the way does not end as the README says: with held-out bits per byte, retrieval on, off
and with others' neighbours, and with text that stops by itself. Run again, it goes on where it was.

`--documents` and `--steps` make it smaller.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import shlex
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

README = Path(__file__).resolve().parent.parent / "README.md"
SECTION = "## From a folder of text to generated text with its sources"
LEFT_OUT = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "turtledemo"}
SHORTEST = 100
PROMPTS = (
    "Return a list of",
    "Open a file",
    "This module",
    "Raise an exception if",
    "The default value",
    "Create a new",
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("journey"))
    parser.add_argument("--documents", type=int, help="only so many docstrings")
    parser.add_argument("--steps", type=int, help="only so many updates")
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    write_texts(given.work / "texts", given.documents)
    commands, settings = read_journey(README.read_text())
    if given.steps is not None:
        settings = re.sub(r"steps: \d+", f"steps: {given.steps}", settings)
        settings = re.sub(r"save_every: \d+", f"save_every: {given.steps}", settings)
    (given.work / "run.yaml").write_text(settings)
    begun = time.monotonic()
    evaluated = ""
    for command in commands:
        if command[1] == "tokenizer" and (given.work / "tokenizer" / "tokenizer.json").exists():
            continue  # a tokenizer is never overwritten: databases and models depend on it
        print(f"$ {shlex.join(command)}", flush=True)
        at = time.monotonic()
        output = run(command, given.work)
        print(f"  ({time.monotonic() - at:.0f} s)", flush=True)
        evaluated = output if command[1] == "evaluate" else evaluated
    prompts = given.work / "prompts.txt"
    prompts.write_text("".join(f"{one}\n" for one in PROMPTS))
    asked = ["retro-kernels", "generate", "run/best", "--prompts", prompts.name, "--db", "db", "--json"]
    lines = [json.loads(line) for line in run([*asked, "--temperature", "0.7"], given.work, show=False).splitlines()]
    ended = sum(line["ended"] for line in lines)
    print(f"{ended} of {len(lines)} texts stopped by themselves; {time.monotonic() - begun:.0f} s in all")
    missing = [mode for mode in ("on", "off", "random") if not re.search(rf"^\s*{mode}\s", evaluated, re.MULTILINE)]
    if missing:
        print(f"the held-out table lacks {', '.join(missing)}", file=sys.stderr)
    if not ended:
        print("no text stopped by itself", file=sys.stderr)
    return int(bool(missing) or not ended)


def write_texts(folder: Path, documents: int | None) -> None:
    """A file for every docstring of the standard library, of at least SHORTEST characters."""
    if folder.exists():
        return
    root = Path(sysconfig.get_paths()["stdlib"])
    partial = folder.with_name(f"{folder.name}.partial")
    written = 0
    for path in sorted(root.rglob("*.py")):
        module = path.relative_to(root).with_suffix("").as_posix().replace("/", ".")
        if LEFT_OUT & set(module.split(".")):
            continue
        try:
            tree = ast.parse(path.read_text())
        except (SyntaxError, ValueError):
            continue
        for number, node in enumerate(ast.walk(tree)):
            if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            text = ast.get_docstring(node)
            if text is None or len(text) < SHORTEST:
                continue
            name = getattr(node, "name", "module")
            target = partial / module / f"{number}-{name}.txt"
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text + "\n")
            written += 1
            if written == documents:
                partial.rename(folder)
                return
    partial.rename(folder)


def read_journey(readme: str) -> tuple[list[list[str]], str]:
    """-> the commands of the README's section, but pip's, and its run.yaml."""
    section = readme[readme.index(SECTION) :]
    shell, settings = (re.search(rf"```{kind}\n(.*?)```", section, re.DOTALL) for kind in ("bash", "yaml"))
    if shell is None or settings is None:
        raise ValueError(f"README.md: {SECTION!r} has no bash and yaml")
    lines = [shlex.split(line, comments=True) for line in shell[1].splitlines()]
    return [line for line in lines if line and line[0] == "retro-kernels"], settings[1]


def run(command: list[str], folder: Path, *, show: bool = True) -> str:
    """-> what the command prints; it is shown as it comes. Raises CalledProcessError where it fails."""
    process = subprocess.Popen(
        [sys.executable, "-m", "retro_kernels.cli", *command[1:]], cwd=folder, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    found = []
    for line in process.stdout:
        found.append(line)
        if show:
            print(f"  {line}", end="", flush=True)
    if process.wait():
        raise subprocess.CalledProcessError(process.returncode, command)
    return "".join(found)


if __name__ == "__main__":
    sys.exit(main())
