# The commands of the project; all of them work in .venv, which the first one makes.
PYTHON ?= python3
TORCH ?= torch==2.13.0
JOBS ?= $(shell nproc 2>/dev/null || echo 2)
BIN := .venv/bin
SOURCES := $(shell find csrc tests/csrc -name '*.cpp' -o -name '*.h' -o -name '*.cuh' -o -name '*.cu')

.PHONY: help demo test test-long test-gpu test-stub test-cuda-torch test-architectures architectures bench bench-gpu gpu-day cuda-report lint format build clean

help: ## what there is to run
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 22

demo: .venv/experiments ## train, score and draw the double descent (minutes)
	$(BIN)/python -m experiments run double-descent --scale demo

test: .venv/test ## the tests, doctests included; without those that need a GPU
	$(BIN)/python -m pytest -m "not long and not gpu" -n $(JOBS) --dist worksteal

test-long: .venv/test ## the slow campaigns
	$(BIN)/python -m pytest -m long

test-gpu: .venv/test ## the CUDA kernels on a GPU, under compute-sanitizer too where that is installed
	$(BIN)/python -m pytest tests/gpu -m gpu -rs
	@if command -v compute-sanitizer >/dev/null && $(BIN)/python -c 'import torch, sys; sys.exit(not torch.cuda.is_available())'; then \
		compute-sanitizer --error-exitcode 1 $(BIN)/python -m pytest tests/gpu -m gpu -k "small" -q; \
	else echo "compute-sanitizer: skipped, it is not installed or there is no CUDA device"; fi

test-stub: .venv/test ## tests/gpu on the stub of a device: no GPU is needed
	$(BIN)/python -m pytest -p tests.support.cuda_stub tests/gpu -rs

test-cuda-torch: .venv-architectures/ready ## that the kernels find a CUDA build of torch, in the environment of 5.5 GB; no GPU is needed
	.venv-architectures/bin/python tests/check_cuda_build.py

test-architectures: .venv-architectures/ready ## torchvision's families; in an environment of its own, 5.5 GB
	.venv-architectures/bin/python -m pytest tests/architectures -rs

architectures: .venv-architectures/ready ## the table in docs/architectures.md
	.venv-architectures/bin/python -W ignore -m bench.architectures

bench: .venv/test ## ratios to plain PyTorch
	$(BIN)/python -m pytest bench --benchmark-only --benchmark-quiet -q --no-header -o python_files="bench_*.py" -o python_functions="bench_*"

bench-gpu: .venv/test ## timings on a GPU beside its memory and arithmetic limits
	$(BIN)/python -m bench.gpu

# On a bare machine: the Python that is there, no environment and no network. OUT names the folder.
gpu-day: ## all that a machine with a GPU can say, in ten minutes and one file; with PYTHON's packages
	$(PYTHON) -m bench.gpu_day

cuda-report: .venv/cuda-report ## registers, spills and occupancy of the CUDA kernels, against the committed table
	@MAX_JOBS=$(JOBS) $(BIN)/python csrc/cuda_report.py

lint: .venv/lint ## formatting, lint and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(SOURCES)

format: .venv/lint ## rewrite to the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(SOURCES)

build: .venv/built ## the extension, in place

clean: ## everything that was built
	rm -rf .venv .venv-architectures build dist *.egg-info lipfast/_C*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis

.venv/torch:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "lipfast needs Python 3.10 or later; set PYTHON=...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade "pip>=24" "setuptools>=77" wheel
	$(BIN)/python -m pip install "$(TORCH)" "numpy>=1.26" "pybind11>=2.13" "ninja>=1.11"
	@touch $@

# The environment's bin comes first on the path: torch's build looks for ninja there.
.venv/built: .venv/torch $(SOURCES) setup.py csrc/nvcc.py pyproject.toml lipfast/_version.py
	@echo "building the extension with $(JOBS) jobs: about a minute, two where nvcc is"
	@PATH="$(abspath $(BIN)):$$PATH" PYTHONWARNINGS=ignore MAX_JOBS=$(JOBS) $(BIN)/python setup.py -q build_ext --inplace > .venv/build.log 2>&1 \
		|| { cat .venv/build.log; exit 1; }
	@LIPFAST_BUILD=0 PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet --no-build-isolation -e .
	@touch $@

# What lists machine code, where the toolkit does not have it.
.venv/cuda-report: .venv/torch
	@$(BIN)/python -m pip install --quiet --no-deps "nvidia-cuda-cuobjdump>=13" "nvidia-cuda-nvdisasm>=13"
	@touch $@

.venv/experiments: .venv/built
	@echo "installing what the experiments need"
	@LIPFAST_BUILD=0 PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet --no-build-isolation -e ".[experiments]"
	@touch $@

.venv/test: .venv/experiments pyproject.toml
	@echo "installing what the tests need"
	@LIPFAST_BUILD=0 PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet --no-build-isolation -e ".[test,experiments]"
	@touch $@

# The extension that is built in place serves this torch too (stable ABI), so nothing is compiled.
.venv-architectures/ready: .venv/built
	$(PYTHON) -m venv .venv-architectures
	.venv-architectures/bin/python -m pip install --quiet --upgrade "pip>=24" "setuptools>=77" wheel
	.venv-architectures/bin/python -m pip install --quiet "torch==2.14.1" "torchvision==0.29.1" "pybind11>=2.13"
	@LIPFAST_BUILD=0 PYTHONWARNINGS=ignore .venv-architectures/bin/python -m pip install --quiet --no-build-isolation -e ".[test]"
	@touch $@

.venv/lint: .venv/test pyproject.toml
	$(BIN)/python -m pip install --quiet "ruff>=0.17,<0.18" "mypy>=2.4,<3" "clang-format>=23,<24"
	@touch $@
