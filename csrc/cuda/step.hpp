// The step family on CUDA devices, after all checks (csrc/api/step.cpp); no tensor is empty, but for those of
// feature_delta.
#pragma once

#include <cstdint>

#include "flashu/step.h"

namespace flashu::cuda {

void guided_euler_step(const flashu_guided_euler_step_args& args);
uint64_t feature_delta_workspace(const flashu_feature_delta_args& args);
void feature_delta(const flashu_feature_delta_args& args);
void taylor_update(const flashu_taylor_update_args& args);
void taylor_predict(const flashu_taylor_predict_args& args);

}  // namespace flashu::cuda
