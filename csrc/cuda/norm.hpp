// The norm family on CUDA devices, after all checks (csrc/api/norm.cpp); no tensor is empty.
#pragma once

#include "flashu/norm.h"

namespace flashu::cuda {

void rms_norm(const flashu_rms_norm_args& args);
void add_rms_norm(const flashu_add_rms_norm_args& args);
void gate_add(const flashu_gate_add_args& args);
void rotary_cache(const flashu_rotary_cache_args& args);

}  // namespace flashu::cuda
