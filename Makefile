# Each target makes what it needs: `make demo` and `make test` work in a fresh clone. A stamp in each environment
# says what it already holds, and the native build is incremental, so a second run starts at once.
PYTHON ?= python3
PYTEST_ARGS ?=
BENCH_ARGS ?=

VENV := .venv
PY := $(VENV)/bin/python
LINT_VENV := .venv-lint
COMPAT_VENV := .venv-torch211
CXX_FILES = $(shell find csrc tests -name '*.h' -o -name '*.inc' -o -name '*.cpp' -o -name '*.cuh' -o -name '*.cu')
SANITIZERS := address,undefined

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow compat bench gpu sanitize emulate-amx lint format native clean

help:
	@echo "make demo         make .venv, install, run MobileNet-v2 and Xception on photographs"
	@echo "make test         make .venv, install, run the tests; then the op tests under the oldest torch (compat)"
	@echo "make test-slow    the tests that take minutes: every CUDA and Triton kernel for every architecture"
	@echo "make bench        the benchmarks on this CPU"
	@echo "make gpu          with a GPU and PyTorch but no network: build, test, benchmark, compute-sanitizer"
	@echo "make sanitize     the op tests against a core built with AddressSanitizer and UBSan"
	@echo "make emulate-amx  the op tests with the AMX kernels' tile instructions emulated"
	@echo "make lint         ruff and clang-format; make format applies them"
	@echo "make native       rebuild the native core in place; make clean removes what was built"

# --- environments ---

$(VENV)/.stamp-build: requirements/build.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -r requirements/build.txt
	@touch $@

$(VENV)/.stamp-install: $(VENV)/.stamp-build pyproject.toml setup.py requirements/demo.txt
	$(PY) -m pip install --no-build-isolation -e ".[demo]"
	@touch $@

$(VENV)/.stamp-%: $(VENV)/.stamp-install requirements/%.txt
	$(PY) -m pip install -r requirements/$*.txt
	@touch $@

$(LINT_VENV)/.stamp: requirements/lint.txt
	$(PYTHON) -m venv $(LINT_VENV)
	$(LINT_VENV)/bin/python -m pip install -r requirements/lint.txt
	@touch $@

$(COMPAT_VENV)/.stamp: requirements/compat.txt
	$(PYTHON) -m venv $(COMPAT_VENV)
	$(COMPAT_VENV)/bin/python -m pip install -r requirements/compat.txt
	@touch $@

native: $(VENV)/.stamp-install
	$(PY) setup.py --quiet build_ext --inplace

# --- what it does ---

demo: native
	$(VENV)/bin/fastcnn demo

test: native $(VENV)/.stamp-test
	$(PY) -m pytest tests -m "not slow" $(PYTEST_ARGS)
	$(MAKE) compat

# Every kernel compiled for every architecture: minutes of nvcc and ptxas for what `make test` samples.
test-slow: native $(VENV)/.stamp-test
	$(PY) -m pytest tests -m slow $(PYTEST_ARGS)

# The module that `native` built, loaded by the oldest torch that the package supports: nothing is rebuilt.
compat: native $(COMPAT_VENV)/.stamp
	$(COMPAT_VENV)/bin/python -m pytest tests/ops tests/test_build.py -m "not gpu and not slow" $(PYTEST_ARGS)

bench: native $(VENV)/.stamp-bench
	$(VENV)/bin/fastcnn bench $(BENCH_ARGS)

# libstdc++ is preloaded beside libasan, or ASan does not find the real __cxa_throw in a Python that lacks it.
sanitize: native $(VENV)/.stamp-test
	FASTCNN_CUDA=off FASTCNN_SANITIZE=$(SANITIZERS) $(PY) setup.py --quiet build_ext --build-lib build/sanitize
	FASTCNN_NATIVE_DIR=$(CURDIR)/build/sanitize/fastcnn \
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so.6)" \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	$(PY) -m pytest tests/ops -m "not gpu and not slow" -p no:cacheprovider $(PYTEST_ARGS)

# The AMX kernels on a machine with AVX-512 but without AMX.
emulate-amx: native $(VENV)/.stamp-test
	FASTCNN_CUDA=off FASTCNN_EMULATE_AMX=on $(PY) setup.py --quiet build_ext --build-lib build/emulated-amx
	FASTCNN_NATIVE_DIR=$(CURDIR)/build/emulated-amx/fastcnn FASTCNN_ISA=amx \
	$(PY) -m pytest tests/ops -m "not gpu and not slow" $(PYTEST_ARGS)

# With the machine's own Python and PyTorch. The caching allocator is off under compute-sanitizer, or an access past
# a tensor's end would land inside the allocator's block and pass.
gpu:
	FASTCNN_CUDA=on $(PYTHON) -m pip install --no-index --no-deps --no-build-isolation -e .
	$(PYTHON) -m pytest tests -m gpu $(PYTEST_ARGS)
	$(PYTHON) -m fastcnn bench --gpu $(BENCH_ARGS)
	for tool in memcheck racecheck; do \
	  PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $$tool --error-exitcode 1 \
	    $(PYTHON) -m pytest tests -m "gpu and small" -p no:cacheprovider $(PYTEST_ARGS) || exit 1; \
	done

# --- style ---

lint: $(LINT_VENV)/.stamp
	$(LINT_VENV)/bin/ruff check .
	$(LINT_VENV)/bin/ruff format --check .
	$(LINT_VENV)/bin/clang-format --dry-run -Werror $(CXX_FILES)

format: $(LINT_VENV)/.stamp
	$(LINT_VENV)/bin/ruff check --fix .
	$(LINT_VENV)/bin/ruff format .
	$(LINT_VENV)/bin/clang-format -i $(CXX_FILES)

clean:
	rm -rf build dist *.egg-info fastcnn/_C.*.so .pytest_cache .ruff_cache .hypothesis .benchmarks
	find fastcnn tests bench -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
