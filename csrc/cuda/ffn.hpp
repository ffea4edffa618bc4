// The gathered FFN and the neuron statistics on CUDA devices, after all checks that the host can make
// (csrc/api/ffn.cpp). An index that is out of range is clamped on the device and reported in problem.status.
#pragma once

#include <atomic>
#include <cstdint>

#include "core/ffn_choice.hpp"
#include "core/ffn_problem.hpp"

namespace flashu::cuda {

// What the choice of kernels may not use, in the whole process.
struct FfnLimits {
  // Kernels of newer devices than this are left out: tests run those for sm_80 on any device.
  std::atomic<int> capability;
  // Whether few rows have kernels of their own, in linear layers too. They sum in another order than those of
  // many rows, so without them a row's bits do not depend on the number of rows. FLASHU_FFN_DECODE=0 in the
  // environment turns them off.
  std::atomic<bool> decodes;
  // Whether blocks may take tiles in pairs; the bits are the same. FLASHU_FFN_PAIRS=0 turns it off.
  std::atomic<bool> pairs;
};
FfnLimits& ffn_limits();

// How a problem is run: what the kernels were chosen by, and where it lies in the workspace.
struct FfnPlan {
  core::FfnQuestion question{};
  core::FfnCandidate up{}, down{};  // of the halves that there are
  bool decodes = false;
  int64_t lead = 0;  // neurons in front of a run that begins at no multiple of eight; see ffn_gemm.cuh
  int64_t list_bytes = 0;
  int64_t h_bytes = 0;
  int64_t h_stride = 0;
  core::FfnPartials partials;  // of the down half, or of blocks that decode

  int64_t bytes() const { return list_bytes + h_bytes + partials.bytes; }
};

// Depends on shapes, the kind and alignment of the selection, and the device.
FfnPlan plan_ffn(const core::FfnProblem& problem);

// workspace: of at least plan.bytes().
void ffn(const core::FfnProblem& problem, const FfnPlan& plan, void* workspace);

void neuron_norms(const flashu_neuron_norms_args& args);

}  // namespace flashu::cuda
