# `make demo` and `make test` set up everything they need in $(VENV) first.
# Overrides: PYTHON=python3.12, VENV=/some/venv, TORCH="torch==2.14.1 torchvision", ARGS="..." for the command that runs.
# VENV=system uses $(PYTHON) as it is: nothing is installed, the libraries are built into the source tree.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch torchvision
ARGS ?=
FUZZ ?= 10000
# Of the examples drawn; the command shown holds it, so that a failure can be repeated.
SEED := $(shell date +%s)

SOURCES := CMakeLists.txt setup.py pyproject.toml $(shell find cmake csrc -type f)
CPP_FILES := find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh'

ifeq ($(VENV),system)
RUN := PYTHONPATH=python$${PYTHONPATH:+:$$PYTHONPATH} $(PYTHON)
BIN :=
BUILT := build/.built
else
RUN := $(VENV)/bin/python
BIN := $(VENV)/bin/
BUILT := $(VENV)/.built
endif

.PHONY: help demo test fuzz scale lint format compat sanitize mutation gpu-check benchmark build develop clean force

help:
	@echo "make demo       set up, then train the attention-pooling classifier on bags of digits"
	@echo "make test       set up, then run all tests that need no GPU"
	@echo "make fuzz       10,000 drawn problems against the reference (FUZZ=1000, SEED=N)"
	@echo "make scale      tensors of more than 2^31 elements, 1,000,000 bags (needs 20 GiB)"
	@echo "make benchmark  set up, then time the operators (ARGS='attention_pool --csv FILE')"
	@echo "make build      set up only: virtual environment, torch, compiled libraries"
	@echo "make lint       check formatting, style and types;  make format  repairs the formatting"
	@echo "make compat     one wheel, run under every supported torch"
	@echo "make sanitize   compiled kernels under the address, undefined-behaviour and thread sanitizers (ARGS='thread')"
	@echo "make mutation   plant faults one at a time and show that the tests catch each (ARGS='triton')"
	@echo "make gpu-check  build, GPU tests, GPU benchmarks and compute-sanitizer, with the current Python, offline (ARGS='--budget 3600')"
	@echo "make clean      remove what was built (the virtual environment stays)"

demo: build
	$(RUN) examples/bags.py $(ARGS)

test: build
	$(RUN) -m pytest -n auto --dist loadfile $(ARGS)

fuzz: build
	FUSEFEAT_FUZZ=$(FUZZ) $(RUN) -m pytest tests/test_fuzz.py tests/test_fuzz_gpu_kernels.py --hypothesis-seed=$(SEED) $(ARGS)

scale: build
	$(RUN) -m pytest -m scale tests/test_scale.py $(ARGS)

benchmark: build
	$(RUN) -m benchmarks $(ARGS)

compat: build
	$(RUN) tests/compat/run.py $(ARGS)

sanitize: build
	$(RUN) tests/sanitize/run.py $(ARGS)

mutation: build
	$(RUN) tests/mutation $(ARGS)

gpu-check:
	$(PYTHON) tests/gpu/check.py $(ARGS)

lint: build
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(CPP_FILES) | xargs $(BIN)clang-format --dry-run -Werror

format: build
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .
	$(CPP_FILES) | xargs $(BIN)clang-format -i

build develop: $(BUILT)

# The stamp of a build whose libraries have gone means nothing.
ifeq ($(wildcard python/fusefeat/build_info.json),)
$(BUILT): force
endif

ifeq ($(VENV),system)
$(BUILT): $(SOURCES)
	$(PYTHON) setup.py build_ext --inplace
	@mkdir -p $(@D) && touch $@
else
$(BUILT): $(VENV)/.installed $(SOURCES)
	$(RUN) -m pip install --quiet --no-build-isolation --editable '.[dev,test,examples]'
	@touch $@

# What building the package without isolation needs to be there before.
$(VENV)/.installed:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: PYTHON=python3.11")'
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install $(TORCH) 'setuptools>=77' wheel 'cmake>=3.26' ninja 'pybind11>=2.13'
	@touch $@
endif

clean:
	rm -rf build dist python/*.egg-info python/fusefeat/*.so python/fusefeat/build_info.json
	rm -f $(VENV)/.built
