# The project's habits. Everything runs in a virtual environment of its own, made on first use; `make clean` removes it.

PYTHON ?= python3
VENV ?= .venv

# What pip installs for PyTorch, before the package itself. Override it to get another build, for example
#   make demo TORCH="torch --index-url https://download.pytorch.org/whl/cpu"     CPU only, from PyTorch's own index
#   make test TORCH="torch>=2.6"                                                 whatever the index has newest
TORCH ?= torch==2.13.0

# Further arguments: make demo DEMO_ARGS=--quick; make examples EXAMPLE_ARGS=--quick; make study STUDY_ARGS=--quick; make test TEST_ARGS="tests/report/test_report.py -k table"; make test-matrix NOX_ARGS="-s machines"
DEMO_ARGS ?=
EXAMPLE_ARGS ?=
STUDY_ARGS ?=
TEST_ARGS ?=
NOX_ARGS ?=

# Threads that wait must sleep: where others use the cores too, spinning makes a training step ten times slower
# (16 s against 1.6 s on two cores).
export OMP_WAIT_POLICY ?= PASSIVE
export GOMP_SPINCOUNT ?= 0

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# What the installed package is built from: a change here installs it anew.
BUILD_FILES := pyproject.toml setup.py $(shell find csrc -type f -not -path '*/__pycache__/*' 2>/dev/null)
SOURCES = $(shell git ls-files 'csrc/*.h' 'csrc/*.hpp' 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.cuh')

.PHONY: help demo examples study test test-matrix sanitize lint format docs bench clean

help:
	@echo "make demo     prune a real model, compare it, write demo/report.html (about 8 minutes)"
	@echo "make examples prune a GAN's generator and a VAE in plain PyTorch (about two minutes)"
	@echo "make study    ways of pruning compared on four small models (many hours; goes on where it was stopped)"
	@echo "make test     all tests"
	@echo "make test-matrix  the tests that depend on it with other instruction sets, threads, Pythons and versions (hours)"
	@echo "make sanitize the C++ kernels, tested under ASan and UBSan"
	@echo "make lint     ruff, mypy, clang-format: what a change has to pass"
	@echo "make format   let ruff and clang-format rewrite the files"
	@echo "make docs     the documentation site, into site/"
	@echo "make bench    kernels against their references, timed on this machine"
	@echo "make clean    remove the virtual environment and everything built"

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.torch: | $(BIN)/python
	$(PIP) install --quiet $(TORCH)
	@touch $@

$(VENV)/.demo: $(BUILD_FILES) $(VENV)/.torch
	$(PIP) install --quiet --editable ".[demo]"
	@touch $@

$(VENV)/.study: $(VENV)/.demo
	$(PIP) install --quiet --editable ".[study]"
	@touch $@

# With the CUDA extension where there is nvcc: tests look at what was compiled.
$(VENV)/.dev: $(BUILD_FILES) $(VENV)/.torch
	DIFFPRUNE_CUDA=$${DIFFPRUNE_CUDA:-auto} $(PIP) install --quiet --editable ".[demo,study,test,dev]"
	@touch $@ $(VENV)/.demo $(VENV)/.study

$(VENV)/.docs: $(BUILD_FILES) $(VENV)/.torch
	$(PIP) install --quiet --editable ".[docs]"
	@touch $@

demo: $(VENV)/.demo
	$(BIN)/python examples/digits/demo.py --out demo $(DEMO_ARGS)

examples: $(VENV)/.demo
	$(BIN)/python examples/gan/gan.py --out demo/gan $(EXAMPLE_ARGS)
	$(BIN)/python examples/vae/vae.py --out demo/vae $(EXAMPLE_ARGS)

study: $(VENV)/.study
	$(BIN)/python examples/study/study.py --out study $(STUDY_ARGS)

test: $(VENV)/.dev
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist worksteal $(TEST_ARGS)

test-matrix: $(VENV)/.dev
	$(BIN)/python -m nox $(NOX_ARGS)

sanitize: $(VENV)/.dev
	PYTHON=$(abspath $(BIN))/python csrc/sanitize.sh

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy diffprune_fast
	$(if $(SOURCES),$(BIN)/clang-format --dry-run --Werror $(SOURCES))

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(if $(SOURCES),$(BIN)/clang-format -i $(SOURCES))

docs: $(VENV)/.docs
	$(BIN)/python docs/site/build.py site

bench: $(VENV)/.dev
	$(BIN)/python -m pytest benchmarks --benchmark-only -k "not sdxl"

clean:
	rm -rf $(VENV) build dist demo site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find diffprune_fast -name '*.so' -delete
