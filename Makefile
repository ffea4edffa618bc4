# Everything from a fresh clone: `make demo` (the main job) and `make test` (Python tests, C++ tests, lint).
# TORCH chooses torch: make test TORCH=torch==2.11.0
.DELETE_ON_ERROR:
SHELL := /bin/bash

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Without an NVIDIA driver a CPU wheel is enough, even to compile the CUDA kernels; with one, the newest CUDA build is used.
TORCH ?= $(if $(wildcard /proc/driver/nvidia/version /usr/bin/nvidia-smi),torch,torch==2.13.0)
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
APT_PACKAGES := g++ make libgtest-dev pkg-config
SOURCES := $(shell find csrc cpp_tests -type f 2>/dev/null) CMakeLists.txt setup.py pyproject.toml
# $(call apt_get,PACKAGES,WHAT THEY ARE) installs Debian packages, or says what to install.
apt_get = echo "installing Debian packages: $(1)"; \
	  if [ "$$(id -u)" = 0 ]; then run=; else run=sudo; fi; \
	  $$run apt-get update -qq && DEBIAN_FRONTEND=noninteractive $$run apt-get install -y -qq $(1) > /dev/null \
	    || { echo "make: needs $(2): apt-get install $(1)" >&2; exit 1; }
# The requirements in pyproject.toml, by extra. Only this file and gpu.sh install them.
requirements = $(shell $(PYTHON) .ci/requirements $(1) | sed "s/.*/'&'/")

# Checkouts of upstream programs, whose unmodified code the tests run.
CHECKOUT_showo2 := $(SHOWO2_UPSTREAM)
CHECKOUT_janus := $(JANUS_UPSTREAM)
CHECKOUT_bagel := $(BAGEL_UPSTREAM)
PROGRAMS := $(foreach name,showo2 janus bagel,$(if $(CHECKOUT_$(name)),$(name)))

.PHONY: help demo test python-test cpp-test ptx-test asan tsan mutants mutants-quick lint format build bench api info release kernels-hub sass gpu-wheels clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

demo: build ## generate and answer with the embedded model, dense, exact and paper; writes flashu_demo/report.html
	$(BIN)/flashu-ext demo

test: ## Python tests, C++ tests, the CUDA kernels' PTX, lint; says how long each took
	for target in build python-test cpp-test ptx-test lint; do began=$$SECONDS; \
	  $(MAKE) --no-print-directory $$target || exit 1; echo "make $$target: $$((SECONDS - began)) s"; done

# Two processes of one thread are faster than one of two: most models in the tests are too small to be shared by threads.
# `make release` runs the operators' tests on all threads. torchao, which transformers and diffusers import where they find it,
# writes to stderr and slows them down, so only the tests that are about it see it.
python-test: build $(if $(PROGRAMS),upstream-env) ## Python tests; SHOWO2_UPSTREAM=, JANUS_UPSTREAM=, BAGEL_UPSTREAM=DIR add those that run upstream's code
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest python_tests -n 2 --dist worksteal
	$(PIP) --upgrade --no-deps --target build/torchao $(filter 'torchao%,$(call requirements,int8-test))
	PYTHONPATH=build/torchao OMP_NUM_THREADS=1 $(BIN)/python -m pytest python_tests/runtime/test_int8_models.py

# What upstream's models and scripts import, at the versions that a checkout pins (of JanusFlow's transformers the oldest).
# Their torch is too old for us.
PINNED := transformers|diffusers|einops|timm|huggingface-hub|accelerate
PINS_showo2 := build_env.sh
PINS_janus := requirements.txt
PINS_bagel := requirements.txt
MORE_showo2 := torchdiffeq omegaconf
MORE_janus := diffusers==0.27.2 'huggingface-hub<0.26' accelerate attrdict einops sentencepiece
MORE_bagel := pyyaml sentencepiece
.PHONY: upstream-env
upstream-env: $(PROGRAMS:%=.venv-%/.ready) ## .venv-showo2, .venv-janus, .venv-bagel with what the checkouts in *_UPSTREAM pin
	@test -n '$(PROGRAMS)' || { echo "make: SHOWO2_UPSTREAM= (a Show-o2 checkout's show-o2 folder), JANUS_UPSTREAM= or BAGEL_UPSTREAM= must name a checkout" >&2; exit 1; }

.venv-%/.ready: Makefile
	test -x .venv-$*/bin/python || $(PYTHON) -m venv .venv-$*
	.venv-$*/bin/python -m pip install --quiet --disable-pip-version-check '$(TORCH)' numpy safetensors pillow click $(MORE_$*) \
	  $$(grep -oE '^[^#]*($(PINNED))[=>]=[0-9.]+' '$(CHECKOUT_$*)/$(PINS_$*)' | grep -oE '($(PINNED))[=>]=[0-9.]+' | sed 's/^transformers>=/transformers==/')
	touch $@

# The build folder of the package, so that nothing is compiled twice.
BUILD = build/$(shell $(BIN)/python -c 'import sys; print(sys.implementation.cache_tag)')
CMAKE := $(BIN)/cmake -G Ninja -S . -DFLASHU_TESTS=ON -DFLASHU_WERROR=ON -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja
CTEST := $(BIN)/ctest --output-on-failure --no-tests=error -j 2 --progress

cpp-test: build ## C++ tests: the library with every instruction set, the CUDA kernels on the emulator
	$(CMAKE) -B $(BUILD) > build/cmake.log || { cat build/cmake.log; exit 1; }
	$(BIN)/cmake --build $(BUILD)
	for isa in avx512_bf16 avx512 avx2 baseline; do \
	  echo "C++ tests, at most $$isa" && FLASHU_ISA=$$isa $(CTEST) --test-dir $(BUILD) -E '^(emulated|ptx|gpu)[.]' || exit 1; done
	$(CTEST) --test-dir $(BUILD) -R '^(emulated|gpu)[.]'

asan: $(VENV)/.tools ## C++ tests and the emulated CUDA kernels with AddressSanitizer and UndefinedBehaviorSanitizer
	$(CMAKE) -B build/asan -DFLASHU_CUDA=OFF -DFLASHU_SANITIZE=address,undefined > build/cmake.log || { cat build/cmake.log; exit 1; }
	$(BIN)/cmake --build build/asan
	FLASHU_SIMT_SEEDS=1 $(CTEST) --test-dir build/asan

# Needs nvcc, as the CUDA kernels do.
ptx-test: build ## the device tests on a machine for the PTX that nvcc makes (cpp_tests/ptx), for sm_90a and sm_80
	$(CMAKE) -B $(BUILD) > build/cmake.log || { cat build/cmake.log; exit 1; }
	if [ -d $(BUILD)/cpp_tests/ptx ]; then $(BIN)/cmake --build $(BUILD) && $(CTEST) --test-dir $(BUILD) -R '^ptx[.]' && \
	  PYTHONPATH=. $(BIN)/python -m flashu_ext.bench counters --check; \
	else echo 'ptx-test: NOT run: nvcc was not found' >&2; fi

# Finds races between emulated threads that change no value. Slow, so it runs a part of the tests, in CI with one seed.
TSAN_SEEDS ?= 2
tsan: $(VENV)/.tools ## the CUDA kernels on the emulator under ThreadSanitizer
	$(CMAKE) -B build/tsan -DFLASHU_CUDA=OFF -DFLASHU_SANITIZE=thread > build/cmake.log || { cat build/cmake.log; exit 1; }
	$(BIN)/cmake --build build/tsan --target flashu_emulated_tests
	FLASHU_SIMT_SEEDS=$(TSAN_SEEDS) TSAN_OPTIONS=halt_on_error=1 build/tsan/cpp_tests/flashu_emulated_tests --gtest_brief=1 \
	  --gtest_filter='DeviceNorm/1.*:DeviceRotary/1.Slots*:DeviceRouting/1.*:DeviceMovesOf/1.*:DeviceStep/1.*:DeviceFfn/1.RowsDo*:DeviceFfn/1.Norms*:DeviceFfn/0.Norms*:DeviceClusters/0.One*:SimtClusters.BlocksFetch*'

# ONLY: part of the name of a list, a mutant or a file.
mutants: build ## plant faults in kernels and Python that the tests must notice; ONLY=cpu/ffn plants a part
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m mutants $(if $(ONLY),--only '$(ONLY)')

mutants-quick: build ## plant the few mutants that CI plants
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m mutants --quick

lint: $(VENV)/.tools ## ruff, clang-format, mypy, and no trace of the emulator in the kernels
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	git ls-files '*.cpp' '*.hpp' '*.h' '*.c' '*.cu' '*.cuh' | xargs $(BIN)/clang-format --dry-run --Werror
	$(BIN)/mypy
	! grep -rnE 'FLASHU_EMULATED|simt::|simt/[a-z]+[.]hpp' csrc  # the kernels are emulated unchanged

format: $(VENV)/.tools ## format the sources
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	git ls-files '*.cpp' '*.hpp' '*.h' '*.c' '*.cu' '*.cuh' | xargs $(BIN)/clang-format -i

bench: build ## the FFN, whole images and answers, compared with torch
	$(BIN)/flashu-ext bench ffn
	$(BIN)/flashu-ext bench e2e --model bench

api: build ## API reference from the docstrings and the C headers, into build/api
	@command -v doxygen > /dev/null || { $(call apt_get,doxygen,Doxygen); }
	$(PIP) $(call requirements,docs)
	PYTHONPATH=. $(BIN)/python .ci/api-reference build/api
	doxygen .ci/Doxyfile
	.ci/dead-links build/api

info: build ## what this build and this machine support
	$(BIN)/flashu-ext info

# Without RELEASE_ENVIRONMENTS='PYTHON=TORCH ...' the wheels are used under this Python with torch 2.13.0, and with 2.11.0 and the newest
# torch under other Pythons where there are some.
release: api ## source archive, wheels, their checks, pages: docs/releasing.md; TRIAL=1: also with changes or a tag; QUICK=1: no CUDA
	$(PIP) $(call requirements,build docs release)
	PYTHONPATH=. $(BIN)/python -m release $(if $(TRIAL),--trial) $(if $(QUICK),--quick) $(RELEASE_ENVIRONMENTS:%=--environment %)

kernels-hub: build ## the ops as a Hugging Face kernel, within manylinux_2_28, into build/kernels-hub (docs/kernels-hub.md)
	$(BIN)/python .ci/kernels-hub

# The sources support ptxas from 12.5 on. Several versions cannot be installed in one place.
OLDEST_PTXAS := nvidia-cuda-nvcc-cu12==12.5.82
NEWEST_PTXAS := nvidia-cuda-nvcc
sass: $(VENV)/.tools build/compilers/.ready ## what the oldest and the newest ptxas make of the kernels (needs nvcc)
	PATH="$$(dirname "$$(find "$$PWD/build/compilers/tools" -name cuobjdump)"):$$PATH" PYTHONPATH=. $(BIN)/python -m flashu_ext.bench.sass --quiet \
	  $$(find build/compilers/oldest build/compilers/newest -name ptxas -printf '--ptxas %p ')

build/compilers/.ready: Makefile
	rm -rf build/compilers
	$(PIP) --no-deps --target build/compilers/oldest '$(OLDEST_PTXAS)'
	$(PIP) --no-deps --target build/compilers/newest '$(NEWEST_PTXAS)'
	$(PIP) --no-deps --target build/compilers/tools nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm
	touch $@

# A GPU machine may be bare and offline: gpu.sh installs the packages that the benchmarks need besides torch from wheels.
GPU_PYTHON ?= 3.12
gpu-wheels: $(VENV)/.tools ## packages for an offline GPU machine, into build/wheels (GPU_PYTHON=3.12)
	rm -rf build/wheels
	$(BIN)/python -m pip download --quiet --disable-pip-version-check --dest build/wheels --python-version $(GPU_PYTHON) \
	  --only-binary=:all: --platform manylinux2014_x86_64 --platform manylinux_2_28_x86_64 $(call requirements,showo2 report test)
	du -sh build/wheels

# As a release is linked, where the compiler has a static C++ library.
MANYLINUX = $(if $(wildcard $(shell c++ -print-file-name=libstdc++.a)),1,0)
build: $(VENV)/.built ## .venv with the package built in place

$(VENV)/.tools: pyproject.toml Makefile .ci/requirements
	@command -v $(PYTHON) > /dev/null || { echo "make: $(PYTHON) was not found; set PYTHON=" >&2; exit 1; }
	@if [ ! -e /usr/include/gtest/gtest.h ] || ! command -v c++ > /dev/null; then \
	  $(call apt_get,$(APT_PACKAGES),a C++20 compiler and GoogleTest); fi
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) '$(TORCH)' $(call requirements,build showo2 vae report serve test lint docs)
	mkdir -p build
	touch $@

$(VENV)/.built: $(VENV)/.tools $(SOURCES)
	FLASHU_WERROR=1 FLASHU_MANYLINUX=$(MANYLINUX) $(PIP) --no-build-isolation --no-deps -e .
	touch $@

clean: ## remove the builds, not .venv
	rm -rf build *.egg-info flashu_ext/*.so flashu_ext/include flashu_ext/lib $(VENV)/.built
