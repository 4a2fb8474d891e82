# One environment for everything; the first target that needs it makes it. PYTHON picks the interpreter.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
WORKERS ?= 2
# `make gpu` uses the Python at hand, with its CUDA build of torch, and installs nothing from a network.
GPU_PYTHON ?= python3

.PHONY: install test demo bench gpu lint clean

install: $(VENV)/installed

$(VENV)/packages: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet "torch==2.13.0" "triton==3.6.0" "numpy<2.4" \
	    "setuptools>=77" wheel "pybind11>=2.13,<4" "ninja>=1.11" "pytest>=8,<10" "pytest-xdist>=3.5,<4" "scipy>=1.11,<2" \
	    "scikit-learn>=1.5,<2" "matplotlib>=3.8,<4" "tqdm>=4.66,<5"
	touch $@

$(VENV)/installed: $(VENV)/packages setup.py $(wildcard mtkd_fast/schemas/*.py) $(wildcard csrc/*)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/pip install --quiet --no-build-isolation --no-deps --editable .
	touch $@

test: install
	$(BIN)/python -P -m pytest -n $(WORKERS)

demo: install
	$(BIN)/python -P -m mtkd_fast.bench.demo $(DEMO)

bench: install
	$(BIN)/python -P -m mtkd_fast.bench bench --out bench/results $(BENCH)

gpu:
	TORCH_CUDA_ARCH_LIST="$$($(GPU_PYTHON) -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())')" \
	    MTKD_FAST_BUILD=cuda $(GPU_PYTHON) -m pip install --quiet --no-build-isolation --no-deps --no-index --editable .
	$(GPU_PYTHON) -P -m mtkd_fast.bench.gpu

lint: install
	$(BIN)/pip install --quiet "ruff==0.14.*" "clang-format==21.*"
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror csrc/*

clean:
	rm -rf build *.egg-info mtkd_fast/*.so $(VENV)
