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
PACKAGES := numpy safetensors setuptools wheel pybind11 cmake ninja transformers tokenizers pillow tqdm click matplotlib jinja2 \
            pytest hypothesis expecttest ruff mypy clang-format diffusers

.PHONY: help demo test python-test cpp-test lint format build bench info test-abi clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

demo: build ## draw and answer with the embedded model, dense, exact and paper; writes flashu_demo/report.html
	$(BIN)/flashu-ext demo

test: python-test cpp-test lint ## everything that CI checks

python-test: build ## Python tests
	$(BIN)/python -m pytest python_tests

cpp-test: $(VENV)/.tools ## C++ tests of libflashu, without torch, also with the sanitizers
	$(BIN)/cmake -G Ninja -S . -B build/cpp -DFLASHU_TESTS=ON -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja > build/cpp.log || { cat build/cpp.log; exit 1; }
	$(BIN)/cmake --build build/cpp
	for isa in avx512_bf16 avx512 avx2 baseline; do \
	  FLASHU_ISA=$$isa $(BIN)/ctest --test-dir build/cpp --output-on-failure --no-tests=error || exit 1; done
	$(BIN)/cmake -G Ninja -S . -B build/asan -DFLASHU_TESTS=ON -DFLASHU_SANITIZE=address,undefined -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja > build/asan.log || { cat build/asan.log; exit 1; }
	$(BIN)/cmake --build build/asan
	$(BIN)/ctest --test-dir build/asan --output-on-failure --no-tests=error

lint: $(VENV)/.tools ## ruff, clang-format and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	git ls-files '*.cpp' '*.hpp' '*.h' '*.c' '*.cu' '*.cuh' | xargs $(BIN)/clang-format --dry-run --Werror
	$(BIN)/mypy

format: $(VENV)/.tools ## rewrite the sources as lint wants them
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	git ls-files '*.cpp' '*.hpp' '*.h' '*.c' '*.cu' '*.cuh' | xargs $(BIN)/clang-format -i

bench: build ## the FFN and whole images and answers, beside torch
	$(BIN)/flashu-ext bench ffn
	$(BIN)/flashu-ext bench e2e --model bench

info: build ## what this build and this machine have
	$(BIN)/flashu-ext info

test-abi: build ## the same library in a CUDA build of the newest torch (downloads it into .venv-abi)
	test -x .venv-abi/bin/python || $(PYTHON) -m venv .venv-abi
	.venv-abi/bin/python -m pip install --quiet --disable-pip-version-check torch numpy safetensors pytest hypothesis expecttest
	PYTHONPATH=. .venv-abi/bin/python -m pytest -p no:cacheprovider python_tests/ops

build: $(VENV)/.built ## .venv with the package built in place

$(VENV)/.tools: pyproject.toml Makefile
	@command -v $(PYTHON) > /dev/null || { echo "make: $(PYTHON) was not found; set PYTHON=" >&2; exit 1; }
	@if [ ! -e /usr/include/gtest/gtest.h ] || ! command -v c++ > /dev/null; then \
	  echo "installing Debian packages: $(APT_PACKAGES)"; \
	  if [ "$$(id -u)" = 0 ]; then run=; else run=sudo; fi; \
	  $$run apt-get update -qq && DEBIAN_FRONTEND=noninteractive $$run apt-get install -y -qq $(APT_PACKAGES) > /dev/null \
	    || { echo "make: needs a C++20 compiler and GoogleTest: apt-get install $(APT_PACKAGES)" >&2; exit 1; }; fi
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) '$(TORCH)' $(PACKAGES)
	mkdir -p build
	touch $@

$(VENV)/.built: $(VENV)/.tools $(SOURCES)
	PATH="$(abspath $(BIN)):$$PATH" $(PIP) --no-build-isolation --no-deps -e .
	touch $@

clean: ## remove what was built, not .venv
	rm -rf build *.egg-info flashu_ext/*.so $(VENV)/.built
