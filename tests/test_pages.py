"""What the pages and the workflows point at exists: links, make targets, modules."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("csrc/**/*.md")]
WORKFLOW, HOOKS = ROOT / ".github" / "workflows" / "ci.yml", ROOT / ".pre-commit-config.yaml"


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text())
    missing = [x for x in links if not re.match(r"\w+:", x) and not (page.parent / x).exists()]
    assert missing == []


@pytest.mark.parametrize("page", [*PAGES, WORKFLOW, HOOKS], ids=lambda path: path.name)
def test_commands_that_are_named_exist(page):
    text, targets = page.read_text(), (ROOT / "Makefile").read_text()
    for target in re.findall(r"(?:`|run: |^)make (\w[\w-]*)", text, re.MULTILINE):
        assert re.search(rf"^{target}:", targets, re.MULTILINE), target
    for module in re.findall(r"python -m (benchmarks(?:\.\w+)*)", text):
        path = ROOT.joinpath(*module.split("."))
        assert path.with_suffix(".py").exists() or path.is_dir(), module


def test_workflow_and_hooks_are_complete():
    workflow, hooks = (yaml.safe_load(path.read_text()) for path in (WORKFLOW, HOOKS))
    assert set(workflow["jobs"]) == {"lint", "test", "more", "benchmarks"}
    for job in workflow["jobs"].values():
        assert job["timeout-minutes"] <= 120
        assert any("run" in step for step in job["steps"])
    ids = {hook["id"] for repository in hooks["repos"] for hook in repository["hooks"]}
    assert {"ruff-check", "ruff-format", "results"} <= ids


def test_an_install_holds_every_package():
    """pyproject.toml finds packages by their __init__.py."""
    folders = {path.parent for path in (ROOT / "retro_kernels").rglob("*.py")}
    assert [folder for folder in folders if not (folder / "__init__.py").exists()] == []


def test_no_two_test_files_have_one_name():
    """pytest could not collect them together."""
    names = [path.name for path in ROOT.glob("tests/**/*.py") if path.name != "conftest.py"]
    assert sorted(names) == sorted(set(names))
