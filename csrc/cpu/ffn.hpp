// The gathered FFN on the CPU after all checks: what to compute, the scratch it needs, and the two halves.
#pragma once

#include <cstdint>

#include "core/rows.hpp"
#include "core/tiles.hpp"
#include "cpu/selection.hpp"

namespace flashu::cpu {

// A matrix of `type` storage (flashu_dtype F32, BF16 or F16), rows `stride` elements apart; null when absent.
struct Matrix {
  void* data = nullptr;
  int64_t stride = 0;
};

// One FFN, or one half of it.
struct FfnProblem {
  int32_t type;
  bool has_up;
  bool has_down;
  int64_t rows;
  int64_t hidden;  // width of x
  int64_t width;   // width of the down half's output
  int64_t intermediate;
  const Selection* selection;
  Matrix x, w_gate, w_up, w_down, residual;
  Matrix h;  // up half alone: its output; down half alone: its input
  Matrix out;
  flashu_tensor norms;  // absent unless both halves run
};

// Sizes of the scratch areas, in floats; depends on shapes and the number of threads only.
struct FfnScratch {
  core::GemmTiles up, down;
  int64_t x_floats, h_floats, slot_floats;
  int64_t slots;  // pieces that may run at once

  int64_t bytes() const { return (x_floats + h_floats + slots * slot_floats) * 4; }
};

// `neurons` is the number of selected neurons. `has_up` and `has_down` say which halves run.
FfnScratch plan_scratch(int64_t rows, int64_t hidden, int64_t width, int64_t neurons, int32_t type,
                        bool gathered, bool has_up, bool has_down);

// Throws FLASHU_WORKSPACE for a workspace that is too small or misaligned.
void run_ffn(const FfnProblem& problem, const FfnScratch& scratch, void* workspace, uint64_t workspace_bytes);

}  // namespace flashu::cpu
