// The gathered FFN and the neuron statistics on the CPU, after all checks but that of the index
// (csrc/api/ffn.cpp).
#pragma once

#include <cstdint>

#include "core/ffn_problem.hpp"
#include "core/tiles.hpp"
#include "cpu/digits.hpp"
#include "cpu/selection.hpp"

namespace flashu::cpu {

// How a problem is run, and its scratch: sizes in floats.
struct FfnPlan {
  Selection selected;
  core::GemmTiles up{}, down{};
  bool digits = false;      // x and h are multiplied as such
  SelectedWindows windows;  // of a list, if digits are multiplied straight from the weights
  int64_t chunk = 0;        // rows that share one packing of the weights
  int64_t x_floats = 0, h_floats = 0, slot_floats = 0;
  int64_t slots = 0;  // tasks that may run at once

  bool windowed() const { return !windows.place.empty(); }
  int64_t bytes() const { return (x_floats + h_floats + slots * slot_floats) * 4; }
};

// Depends on shapes, the selection and the number of threads. Throws Failure for a wrong index.
FfnPlan plan_ffn(const core::FfnProblem& problem);

// workspace: of at least plan.bytes().
void ffn(const core::FfnProblem& problem, const FfnPlan& plan, void* workspace);

// Writes the selected neurons in order, and says how many neighbours they are at a time. Throws Failure.
int32_t list_neurons(const core::FfnProblem& problem, int32_t* list);

void neuron_norms(const flashu_neuron_norms_args& args);

}  // namespace flashu::cpu
