// The gathered FFN and the neuron statistics on CUDA devices, after all checks that the host can make
// (csrc/api/ffn.cpp). An index that is out of range is clamped on the device and reported in problem.status.
#pragma once

#include <cstdint>
#include <string>

#include "core/ffn_problem.hpp"

namespace flashu::cuda {

// Bytes of workspace; depends on shapes and the device only.
uint64_t ffn_workspace(const core::FfnProblem& problem);

// Throws FLASHU_WORKSPACE for a workspace that is too small or misaligned.
void ffn(const core::FfnProblem& problem, void* workspace, uint64_t workspace_bytes);

void neuron_norms(const flashu_neuron_norms_args& args);

}  // namespace flashu::cuda
