// One gathered FFN, or one half of it, after all checks that do not read device memory: what both the CPU and
// the CUDA kernels are asked for.
#pragma once

#include <cstdint>

#include "core/matrix.hpp"
#include "core/run_list.hpp"
#include "flashu/ffn.h"

namespace flashu::core {

struct FfnProblem {
  int32_t type;  // flashu_dtype F32, BF16 or F16
  int32_t device;
  bool has_up;
  bool has_down;
  int64_t rows;
  int64_t hidden;  // width of x
  int64_t width;   // width of the down half's output
  int64_t intermediate;
  int64_t neurons;  // selected ones
  // How neurons are given: `runs`; `index`, unchecked; or `index` as a checked list.
  int32_t selected_by;  // flashu_selection_kind
  flashu_tensor index;  // or the list
  int32_t block;        // of runs or a list: 64, 8 or 1 neighbours at a time, from multiples of eight on
  RunList runs;
  Matrix x, w_gate, w_up, w_down, residual;
  bool int8;  // weights are int8, row r of each to be multiplied by its scale[r]
  const float *gate_scale, *up_scale, *down_scale;
  Matrix gate_add, up_add;  // absent, or added to the up half's products
  Matrix h;                 // up half alone: its output; down half alone: its input
  Matrix out;
  flashu_tensor norms;   // absent unless both halves run
  flashu_tensor status;  // absent, or where CUDA kernels report a clamped index
  void* stream;

  bool by_runs() const { return selected_by == FLASHU_SELECT_ALL || selected_by == FLASHU_SELECT_RUNS; }
  bool one_run() const { return by_runs() && runs.size() <= 1; }
  int64_t first() const { return runs.empty() ? 0 : runs.front().start; }  // of one run
};

}  // namespace flashu::core
