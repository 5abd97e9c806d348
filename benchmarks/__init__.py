"""The benchmark suite. From the repository: `benchmarks`; in an installed wheel: `retro_kernels.benchmarks`."""
