"""What retrieval gains on real text: `python -m benchmarks.retrieval_gain --help`."""
