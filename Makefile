# install: an environment with everything     serve: the demo model behind http://127.0.0.1:8000
# native:  compile the kernels in kernels/native into the tree (the install does it too)
# reproduce: every published figure anew (benchmarks/README.md)
# test:    everything but the slow tests      test-slow: the rest      check: lint, types, import contracts
#
# VENV names the environment (default: the active one, else .venv), TORCH=cpu|cuda|keep the build of torch,
# ARGS what follows `baton serve`: make serve ARGS="/models/llama --policy prefix_cost --port 9000"

PYTHON ?= python3
TORCH ?= auto
EXTRAS ?= dev
ACTIVE := $(or $(VIRTUAL_ENV),$(if $(filter-out base,$(CONDA_DEFAULT_ENV)),$(CONDA_PREFIX)))
VENV ?= $(or $(ACTIVE),.venv)
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.baton-installed

# A missing file here means a missing suite: cheap promises first, real processes last.
SUITES := $(wildcard tests/unit tests/property tests/golden tests/conformance tests/kernels tests/simulation tests/cluster)
SINGLE_TESTS := $(wildcard tests/test_*.py)

.PHONY: install native native-sanitized serve test test-slow check reproduce clean

install:
	$(PYTHON) deploy/install.py --venv $(VENV) --torch $(TORCH) --extras "$(EXTRAS)"
	@touch $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	$(MAKE) install

native:
	$(BIN)/python -m kernels.native.build

# The kernels' own tests under AddressSanitizer and UndefinedBehaviorSanitizer; the library in the tree is built anew afterwards.
native-sanitized:
	$(BIN)/python -m kernels.native.build --sanitize
	LD_PRELOAD="$$($${CXX:-c++} -print-file-name=libasan.so) $$($${CXX:-c++} -print-file-name=libstdc++.so)" ASAN_OPTIONS=detect_leaks=0 \
		$(BIN)/python -m pytest $(wildcard tests/kernels/test_native_*.py) $(ARGS)
	$(BIN)/python -m kernels.native.build

serve: $(INSTALLED)
	$(BIN)/baton serve $(ARGS)

test: $(INSTALLED)
	$(BIN)/python -m pytest $(SUITES) $(SINGLE_TESTS) -m "not slow and not gpu" $(ARGS)

test-slow: $(INSTALLED)
	$(BIN)/python -m pytest $(SUITES) $(SINGLE_TESTS) -m "slow and not gpu" $(ARGS)

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

reproduce: $(INSTALLED)
	$(BIN)/python -m benchmarks.reproduce $(ARGS)

clean:
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .import_linter_cache .hypothesis
