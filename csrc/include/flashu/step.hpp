/// @file
/// C++ API of the step family: typed wrappers over flashu/step.h that throw flashu::Error.
#pragma once

#include "flashu/flashu.hpp"
#include "flashu/step.h"

namespace flashu {

/// Arguments of guided_euler_step(); struct_size is filled in.
using EulerStepArgs = flashu_guided_euler_step_args;

/// latents += dt[step] * guided velocity; fill in `velocity` to receive it
inline void guided_euler_step(EulerStepArgs args) {
  args.struct_size = sizeof(args);
  check(flashu_guided_euler_step(&args));
}

/// out = relative L1, relative L2 and cosine of a and b
inline void feature_delta(const flashu_tensor& a, const flashu_tensor& b, const flashu_tensor& out,
                          Workspace workspace = {}, void* stream = nullptr) {
  auto args = make_args<flashu_feature_delta_args>();
  args.a = a;
  args.b = b;
  args.out = out;
  args.workspace = workspace.data;
  args.workspace_bytes = workspace.bytes;
  args.stream = stream;
  detail::run_with_workspace(args, a.device, flashu_feature_delta_workspace, flashu_feature_delta);
}

/// Takes a feature into a table of finite differences; `count` updates came before
inline void taylor_update(const flashu_tensor& state, const flashu_tensor& feature, double interval,
                          int64_t count, void* stream = nullptr) {
  auto args = make_args<flashu_taylor_update_args>();
  args.state = state;
  args.feature = feature;
  args.interval = interval;
  args.count = count;
  args.stream = stream;
  check(flashu_taylor_update(&args));
}

/// out = the feature `ahead` steps after the latest of `count` updates
inline void taylor_predict(const flashu_tensor& state, double ahead, int64_t count, const flashu_tensor& out,
                           void* stream = nullptr) {
  auto args = make_args<flashu_taylor_predict_args>();
  args.state = state;
  args.ahead = ahead;
  args.count = count;
  args.out = out;
  args.stream = stream;
  check(flashu_taylor_predict(&args));
}

}  // namespace flashu
