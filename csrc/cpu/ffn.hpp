// The gathered FFN and the neuron statistics on the CPU, after all checks but that of the index
// (csrc/api/ffn.cpp).
#pragma once

#include <cstdint>

#include "core/ffn_problem.hpp"

namespace flashu::cpu {

// Bytes of workspace; depends on shapes, the index and the number of threads.
uint64_t ffn_workspace(const core::FfnProblem& problem);

// Throws FLASHU_WORKSPACE for a workspace that is too small or misaligned.
void ffn(const core::FfnProblem& problem, void* workspace, uint64_t workspace_bytes);

void neuron_norms(const flashu_neuron_norms_args& args);

}  // namespace flashu::cpu
