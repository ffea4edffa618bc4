#!/usr/bin/env bash
# On a bare, offline GPU machine (torch, nvcc, cmake and ninja installed, nothing installable): build, test and
# measure. Usage, from the repository's root: flashu_ext/bench/gpu.sh OUT [arguments of `python -m flashu_ext.bench gpu`]
# or, for whole images and answers (10 minutes of their own): flashu_ext/bench/gpu.sh OUT --e2e [arguments of `bench e2e`]
set -euo pipefail
out=${1:?usage: flashu_ext/bench/gpu.sh OUT [arguments]}
shift
cd "$(dirname "$0")/../.."
mkdir -p "$out"
began=$SECONDS
# Wheels that `make gpu-wheels` fetched, for what is missing here.
if [ -d build/wheels ] && ! python3 -c 'import click, hypothesis, pytest, safetensors, tqdm, transformers' 2> /dev/null; then
  .ci/requirements showo2 report test > build/requirements.txt
  python3 -m pip install --quiet --no-index --find-links build/wheels --target build/gpu_site --upgrade -r build/requirements.txt
fi
export PYTHONPATH="$PWD:$PWD/build/gpu_site"
export FLASHU_CUDA=1 FLASHU_CUDA_ARCHS="${FLASHU_CUDA_ARCHS:-90a}" FLASHU_BUILD_DIR="$PWD/build/gpu"
# GoogleTest may be missing there; its sources are taken from GTEST_ROOT where that is set.
tests=0
if [ -e /usr/include/gtest/gtest.h ] || [ -n "${GTEST_ROOT:-}" ]; then tests=1; fi
FLASHU_TESTS=$tests python3 setup.py build_ext --inplace > "$out/build.log" 2>&1 || { tail -40 "$out/build.log"; exit 1; }
echo "built in $((SECONDS - began)) s (C++ tests: $tests)"
if [ "${1:-}" = --e2e ]; then
  shift
  exec python3 -m flashu_ext.bench e2e --gpu --json "$out/e2e_gpu.json" --plot "$out/e2e_gpu.png" "$@"
fi
exec python3 -m flashu_ext.bench gpu --out "$out" --build "$FLASHU_BUILD_DIR" "$@"
