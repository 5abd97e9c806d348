"""`python -m retro_kernels.cli` is `retro-kernels`."""

from . import main

main()
