"""No two modules of the library, and none of the benchmarks, import one another: neither at once nor in a function."""

from __future__ import annotations

import pytest
from import_graph import circles, imported, imports, modules, names


@pytest.mark.parametrize("package", ["retro_kernels", "benchmarks"])
@pytest.mark.parametrize("later", [False, True], ids=["when they are imported", "in functions too"])
def test_no_circle(package, later):
    known = modules(package)
    graph = {name: imports(name, path, known, later=later) for name, path in known.items()}
    assert any(graph.values())
    assert circles(graph) == []


@pytest.mark.parametrize("package", ["retro_kernels", "benchmarks"])
def test_what_a_module_imports_from_another_is_there(package):
    """In functions too, which a test may never call."""
    known, missing = modules("retro_kernels") | modules("benchmarks"), []
    for name, path in modules(package).items():
        for module, wanted in imported(name, path, known, later=True):
            there = names(known[module]) if module in known else None
            if wanted is not None and there is not None and wanted not in there:
                missing.append(f"{name} takes {wanted} from {module}")
    assert missing == []


def test_a_circle_would_be_found(tmp_path):
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == [["b", "c"]]
    known = {f"p.{name}": tmp_path / f"{name}.py" for name in "abc"}
    known["p.a"].write_text(
        "import torch\nfrom typing import TYPE_CHECKING\nfrom . import b\nif TYPE_CHECKING:\n    from .c import x\n"
    )
    known["p.b"].write_text(
        "def f():\n    from .a import y\ntry:\n    from p import c\nexcept ImportError:\n    pass\n"
    )
    assert imports("p.a", known["p.a"], known, later=True) == {"p.b"}
    assert imports("p.b", known["p.b"], known, later=False) == {"p.c"}
    assert imports("p.b", known["p.b"], known, later=True) == {"p.a", "p.c"}


def test_what_is_shipped_imports_nothing_that_is_not():
    known = modules("retro_kernels")
    for name, path in known.items():
        for module, _ in imported(name, path, known, later=True):
            assert module.split(".")[0] not in ("benchmarks", "tests"), f"{name} imports {module}"
