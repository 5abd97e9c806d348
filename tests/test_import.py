"""What `import retro_kernels` costs: nothing of it is loaded that a first eager call on a CPU does not need."""

from __future__ import annotations

import subprocess
import sys
import textwrap


def alone(code):
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_nothing_is_imported_beyond_torch_and_ourselves():
    alone("""
        import sys
        import torch
        before = set(sys.modules)

        def foreign():
            new = {name.split(".")[0] for name in set(sys.modules) - before if sys.modules[name] is not None}
            torches = {name for name in set(sys.modules) - before if name.startswith("torch.")}
            return sorted(new - set(sys.stdlib_module_names) - {"retro_kernels", "torch"} | torches)

        import retro_kernels as rk
        assert not foreign(), foreign()
        kv = torch.randn(1, 3, 2, 5, 2, 16)
        query = torch.randn(1, 12, 2, 16, requires_grad=True)
        rk.chunked_cross_attention(query, kv, kv, chunk_size=4).sum().backward()
        rk.nn.ChunkedCrossAttention(16, num_heads=2, chunk_size=4)
        assert not foreign(), foreign()
    """)


def test_the_help_needs_no_torch():
    out = alone("""
        import sys
        from retro_kernels.cli import app
        try:
            app(["--help"])
        except SystemExit as error:
            assert not error.code
        loaded = [name for name in ("torch", "numpy", "retro_kernels.ops") if name in sys.modules]
        assert not loaded, loaded
    """)
    assert "generate" in out
    assert "bench" in out


def test_names_are_there_whether_torch_came_first_or_not():
    for first in ("import torch", "pass"):
        alone(f"""
            {first}
            import retro_kernels as rk
            from retro_kernels import nn, swap
            assert set(rk.__all__) <= set(dir(rk))
            for name in rk.__all__:
                assert getattr(rk, name) is not None, name
            assert rk.nn is nn and rk.swap is swap and callable(rk.chunked_cross_attention)
            try:
                rk.nothing
            except AttributeError as error:
                assert "nothing" in str(error)
            else:
                raise AssertionError("no such name")
        """)


def test_the_first_use_may_be_inside_a_compiled_graph():
    """With torch imported after this package, what compiles is the first to ask for its names."""
    alone("""
        import retro_kernels as rk
        import torch
        q, kv = torch.randn(1, 12, 2, 16), torch.randn(1, 3, 2, 5, 2, 16)
        call = torch.compile(
            lambda q, kv: rk.chunked_cross_attention(q, kv, kv, chunk_size=4), fullgraph=True, backend="aot_eager"
        )
        assert torch.equal(call(q, kv), rk.chunked_cross_attention(q, kv, kv, chunk_size=4))
    """)


def test_a_module_imported_later_is_imported_once_by_many_threads(tmp_path):
    (tmp_path / "slow").mkdir()
    (tmp_path / "slow" / "__init__.py").write_text("")
    (tmp_path / "slow" / "kernels.py").write_text(
        "import time, slow\nslow.count = getattr(slow, 'count', 0) + 1\ntime.sleep(0.2)\n"
        "from slow import kernels\nANSWER = 42\n"
    )
    alone(f"""
        import sys
        sys.path.insert(0, {str(tmp_path)!r})
        import slow
        from concurrent.futures import ThreadPoolExecutor
        from retro_kernels.ops.later import import_later
        kernels = import_later("slow", "kernels")
        assert not hasattr(slow, "count")
        assert slow.kernels is kernels is sys.modules["slow.kernels"] is import_later("slow", "kernels")
        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(lambda _: kernels.ANSWER, range(8))) == [42] * 8
        assert slow.count == 1 and type(kernels) is type(sys)
        kernels.ANSWER = 43
        assert kernels.ANSWER == 43
    """)
