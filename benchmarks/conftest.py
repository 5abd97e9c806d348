"""`pytest benchmarks` times with pytest-benchmark; `--benchmark-json` keeps the raw numbers."""

import pytest


def pytest_collection_modifyitems(items):
    """A benchmark without pytest-benchmark would only be a slow test."""
    try:
        import pytest_benchmark  # noqa: F401
    except ImportError:
        for item in items:
            item.add_marker(pytest.mark.skip(reason="pytest-benchmark is not installed: pip install pytest-benchmark"))
