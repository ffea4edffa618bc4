// torch adapters of the step family: views in, C API, outputs from torch's allocator.
#include "flashu/step.h"

#include "torch/common.hpp"

namespace flashu::torch_ops {
namespace {

void guided_euler_step_(const Tensor& latents, const Tensor& v, const Tensor& s, const Tensor& dt,
                        const Tensor& step, std::optional<Tensor> velocity) {
  const char* op = "guided_euler_step_";
  auto args = make_args<flashu_guided_euler_step_args>(latents);
  args.latents = view(op, "latents", latents);
  args.v = view(op, "v", v);
  args.s = view(op, "s", s);
  args.dt = view(op, "dt", dt);
  args.step = view(op, "step", step);
  args.velocity = view(op, "velocity", velocity);
  check_status(flashu_guided_euler_step(&args));
}

Tensor feature_delta_out(const Tensor& a, const Tensor& b, const Tensor& out) {
  const char* op = "feature_delta";
  const Tensor first = foldable(a);
  const Tensor second = foldable(b);
  auto args = make_args<flashu_feature_delta_args>(a);
  args.a = view(op, "a", first);
  args.b = view(op, "b", second);
  args.out = view(op, "out", out);
  run_with_workspace(args, a, flashu_feature_delta_workspace, flashu_feature_delta);
  return out;
}

Tensor feature_delta(const Tensor& a, const Tensor& b) {
  return feature_delta_out(a, b, new_empty(a, std::vector<int64_t>{3}, ScalarType::Float));
}

void taylor_update_(const Tensor& state, const Tensor& feature, double interval, int64_t count) {
  const char* op = "taylor_update_";
  auto args = make_args<flashu_taylor_update_args>(state);
  args.state = view(op, "state", state);
  args.feature = view(op, "feature", feature);
  args.interval = interval;
  args.count = count;
  check_status(flashu_taylor_update(&args));
}

Tensor taylor_predict_out(const Tensor& state, double ahead, int64_t count, const Tensor& out) {
  const char* op = "taylor_predict";
  auto args = make_args<flashu_taylor_predict_args>(state);
  args.state = view(op, "state", state);
  args.ahead = ahead;
  args.count = count;
  args.out = view(op, "out", out);
  check_status(flashu_taylor_predict(&args));
  return out;
}

Tensor taylor_predict(const Tensor& state, double ahead, int64_t count) {
  std::vector<int64_t> sizes = sizes_of(state);
  if (!sizes.empty()) sizes.erase(sizes.begin());
  return taylor_predict_out(state, ahead, count, new_empty(state, sizes));
}

}  // namespace

template <class Library>
void register_step(Library& m) {
  m.impl("guided_euler_step_", TORCH_BOX(&guided_euler_step_));
  m.impl("feature_delta", TORCH_BOX(&feature_delta));
  m.impl("feature_delta.out", TORCH_BOX(&feature_delta_out));
  m.impl("taylor_update_", TORCH_BOX(&taylor_update_));
  m.impl("taylor_predict", TORCH_BOX(&taylor_predict));
  m.impl("taylor_predict.out", TORCH_BOX(&taylor_predict_out));
}

}  // namespace flashu::torch_ops

FLASHU_REGISTER(step)
