// The step family on the CPU, after all checks (csrc/api/step.cpp); no tensor is empty, but for those of
// feature_delta.
#pragma once

#include "flashu/step.h"

namespace flashu::cpu {

void guided_euler_step(const flashu_guided_euler_step_args& args);
void feature_delta(const flashu_feature_delta_args& args);
void taylor_update(const flashu_taylor_update_args& args);
void taylor_predict(const flashu_taylor_predict_args& args);

}  // namespace flashu::cpu
