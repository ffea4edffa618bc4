# Everything from a fresh clone: `make demo` (the main job) and `make test` (Python tests, C++ tests, lint).
# TORCH chooses torch: make test TORCH=torch==2.11.0
.DELETE_ON_ERROR:
SHELL := /bin/bash

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Without an NVIDIA driver a CPU wheel is enough, CUDA kernels included; with one, the newest CUDA build is wanted.
TORCH ?= $(if $(wildcard /proc/driver/nvidia/version /usr/bin/nvidia-smi),torch,torch==2.13.0)
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
APT_PACKAGES := g++ make libgtest-dev
SOURCES := $(shell find csrc cpp_tests -type f 2>/dev/null) CMakeLists.txt setup.py pyproject.toml
# What pyproject.toml asks for, by extra; here, in gpu.sh and nowhere else.
requirements = $(shell $(PYTHON) .ci/requirements $(1) | sed "s/.*/'&'/")

.PHONY: help demo test python-test cpp-test tsan mutants mutants-quick lint format build bench info test-abi gpu-wheels clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

demo: build ## draw and answer with the embedded model, dense, exact and paper; writes flashu_demo/report.html
	$(BIN)/flashu-ext demo

test: python-test cpp-test lint ## everything that CI checks

python-test: build $(if $(SHOWO2_UPSTREAM),upstream-env) ## Python tests; SHOWO2_UPSTREAM=DIR adds those against a Show-o2 checkout
	$(BIN)/python -m pytest python_tests

# What upstream's models and scripts import, at the versions that its build_env.sh pins. Its torch (2.5.1) is too old for us.
PINNED := transformers|diffusers|einops|timm|huggingface-hub|accelerate
.PHONY: upstream-env
upstream-env: .venv-upstream/.ready ## .venv-upstream with the versions that the checkout in SHOWO2_UPSTREAM pins

.venv-upstream/.ready: $(if $(SHOWO2_UPSTREAM),$(SHOWO2_UPSTREAM)/build_env.sh)
	@test -n '$(SHOWO2_UPSTREAM)' || { echo "make: SHOWO2_UPSTREAM= must name a Show-o2 checkout's show-o2 folder" >&2; exit 1; }
	test -x .venv-upstream/bin/python || $(PYTHON) -m venv .venv-upstream
	.venv-upstream/bin/python -m pip install --quiet --disable-pip-version-check '$(TORCH)' numpy safetensors torchdiffeq omegaconf pillow \
	  $$(grep -oE '($(PINNED))==[0-9.]+' '$(SHOWO2_UPSTREAM)/build_env.sh')
	touch $@

# The package's own build folder, so that nothing is compiled twice.
BUILD = build/$(shell $(BIN)/python -c 'import sys; print(sys.implementation.cache_tag)')
CMAKE := $(BIN)/cmake -G Ninja -S . -DFLASHU_TESTS=ON -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja
CTEST := $(BIN)/ctest --output-on-failure --no-tests=error -j 2 --progress

cpp-test: build ## C++ tests: the library by every instruction set, the CUDA kernels on the emulator, all with sanitizers
	$(CMAKE) -B $(BUILD) > build/cmake.log || { cat build/cmake.log; exit 1; }
	$(BIN)/cmake --build $(BUILD)
	for isa in avx512_bf16 avx512 avx2 baseline; do \
	  echo "C++ tests, at most $$isa" && FLASHU_ISA=$$isa $(CTEST) --test-dir $(BUILD) -E '^(emulated|gpu)[.]' || exit 1; done
	$(CTEST) --test-dir $(BUILD) -R '^(emulated|gpu)[.]'
	$(CMAKE) -B build/asan -DFLASHU_CUDA=OFF -DFLASHU_SANITIZE=address,undefined > build/cmake.log || { cat build/cmake.log; exit 1; }
	$(BIN)/cmake --build build/asan
	FLASHU_SIMT_SEEDS=2 $(CTEST) --test-dir build/asan

# Races between emulated threads that no value shows. Slow, so on a part of the tests, in CI under one seed.
TSAN_SEEDS ?= 2
tsan: $(VENV)/.tools ## the CUDA kernels on the emulator under ThreadSanitizer
	$(CMAKE) -B build/tsan -DFLASHU_CUDA=OFF -DFLASHU_SANITIZE=thread > build/cmake.log || { cat build/cmake.log; exit 1; }
	$(BIN)/cmake --build build/tsan --target flashu_emulated_tests
	FLASHU_SIMT_SEEDS=$(TSAN_SEEDS) TSAN_OPTIONS=halt_on_error=1 build/tsan/cpp_tests/flashu_emulated_tests --gtest_brief=1 \
	  --gtest_filter='DeviceNorm/1.*:DeviceRotary/1.Slots*:DeviceRouting/1.*:DeviceMoves.*:DeviceStep/1.*:DeviceFfn/1.RowsDo*:DeviceFfn/1.Norms*:DeviceFfn/0.Norms*'

# ONLY: part of a list's, a mutant's or a file's name.
mutants: build ## plants faults in kernels and Python, which the tests must notice; ONLY=cpu/ffn those of a part
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m mutants $(if $(ONLY),--only '$(ONLY)')

mutants-quick: build ## the small part of the mutants that CI plants
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m mutants --quick

lint: $(VENV)/.tools ## ruff, clang-format, mypy, and what tests of the CUDA sources rely on
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	git ls-files '*.cpp' '*.hpp' '*.h' '*.c' '*.cu' '*.cuh' | xargs $(BIN)/clang-format --dry-run --Werror
	$(BIN)/mypy
	! grep -rnE 'FLASHU_EMULATED|simt::|simt/[a-z]+[.]hpp' csrc  # the kernels do not know that they are emulated

format: $(VENV)/.tools ## rewrite the sources as lint wants them
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	git ls-files '*.cpp' '*.hpp' '*.h' '*.c' '*.cu' '*.cuh' | xargs $(BIN)/clang-format -i

bench: build ## the FFN and whole images and answers, beside torch
	$(BIN)/flashu-ext bench ffn
	$(BIN)/flashu-ext bench e2e --model bench

info: build ## what this build and this machine have
	$(BIN)/flashu-ext info

# The CUDA wheel of torch brings cuobjdump along (in triton), which sass needs.
test-abi: build ## the same library in a CUDA build of the newest torch (downloads it into .venv-abi), and its SASS
	test -x .venv-abi/bin/python || $(PYTHON) -m venv .venv-abi
	.venv-abi/bin/python -m pip install --quiet --disable-pip-version-check torch $(call requirements,test)
	PYTHONPATH=. .venv-abi/bin/python -m pytest -p no:cacheprovider python_tests/ops
	PYTHONPATH=. .venv-abi/bin/python -m flashu_ext.bench.sass --quiet

# A GPU machine may be bare and offline: what the benchmarks import beside torch travels as wheels, which gpu.sh installs.
GPU_PYTHON ?= 3.12
gpu-wheels: $(VENV)/.tools ## packages for an offline GPU machine, into build/wheels (GPU_PYTHON=3.12)
	rm -rf build/wheels
	$(BIN)/python -m pip download --quiet --disable-pip-version-check --dest build/wheels --python-version $(GPU_PYTHON) \
	  --only-binary=:all: --platform manylinux2014_x86_64 --platform manylinux_2_28_x86_64 $(call requirements,showo2 report test)
	du -sh build/wheels

build: $(VENV)/.built ## .venv with the package built in place

$(VENV)/.tools: pyproject.toml Makefile .ci/requirements
	@command -v $(PYTHON) > /dev/null || { echo "make: $(PYTHON) was not found; set PYTHON=" >&2; exit 1; }
	@if [ ! -e /usr/include/gtest/gtest.h ] || ! command -v c++ > /dev/null; then \
	  echo "installing Debian packages: $(APT_PACKAGES)"; \
	  if [ "$$(id -u)" = 0 ]; then run=; else run=sudo; fi; \
	  $$run apt-get update -qq && DEBIAN_FRONTEND=noninteractive $$run apt-get install -y -qq $(APT_PACKAGES) > /dev/null \
	    || { echo "make: needs a C++20 compiler and GoogleTest: apt-get install $(APT_PACKAGES)" >&2; exit 1; }; fi
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) '$(TORCH)' $(call requirements,build showo2 vae report test lint)
	mkdir -p build
	touch $@

$(VENV)/.built: $(VENV)/.tools $(SOURCES)
	PATH="$(abspath $(BIN)):$$PATH" $(PIP) --no-build-isolation --no-deps -e .
	touch $@

clean: ## remove what was built, not .venv
	rm -rf build *.egg-info flashu_ext/*.so $(VENV)/.built
