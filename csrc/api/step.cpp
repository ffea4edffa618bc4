// C API of the step family: every check, then the kernels of the device.
#include "flashu/step.h"

#include "api/dispatch.hpp"
#include "core/rows.hpp"
#include "cpu/step.hpp"
#include "cuda/step.hpp"

namespace flashu::api {
namespace {

constexpr int kLargestOrder = 8;

void check_table(const char* name, const flashu_tensor& table) {
  core::check_rank(name, table, 1);
  core::check_dtype(name, table, {FLASHU_F32});
  core::check_inner_contiguous(name, table);
}

void guided_euler_step(const flashu_guided_euler_step_args& args) {
  core::check_tensor("latents", args.latents);
  core::check_tensor("v", args.v);
  core::check_tensor("s", args.s);
  core::check_tensor("dt", args.dt);
  core::check_tensor("step", args.step);
  if (core::present(args.velocity)) core::check_tensor("velocity", args.velocity);
  core::check_device({{"latents", &args.latents},
                      {"v", &args.v},
                      {"s", &args.s},
                      {"dt", &args.dt},
                      {"step", &args.step},
                      {"velocity", &args.velocity}});
  core::check_rank("latents", args.latents, 4);
  core::check_floating("latents", args.latents);
  core::check_contiguous("latents", args.latents);
  core::check_rank("v", args.v, 3);
  core::check_floating("v", args.v);
  core::check_contiguous("v", args.v);
  const int64_t images = args.latents.sizes[0];
  FLASHU_CHECK(args.v.sizes[0] == images || args.v.sizes[0] == 2 * images, FLASHU_INVALID_VALUE,
               "v: expected ", images, " rows, or ", 2 * images, " with guidance, got ", args.v.sizes[0],
               " (shape ", core::shape_text(args.v), ")");
  const int64_t numbers = args.latents.sizes[1] * args.latents.sizes[2] * args.latents.sizes[3];
  FLASHU_CHECK(args.v.sizes[1] * args.v.sizes[2] == numbers, FLASHU_INVALID_VALUE, "v: expected ", numbers,
               " numbers a row as latents of shape ", core::shape_text(args.latents), " have, got ",
               args.v.sizes[1] * args.v.sizes[2], " (shape ", core::shape_text(args.v), ")");
  check_table("s", args.s);
  check_table("dt", args.dt);
  core::check_size("dt", args.dt, 0, args.s.sizes[0]);
  core::check_dtype("step", args.step, {FLASHU_I64});
  FLASHU_CHECK(core::numel(args.step) == 1, FLASHU_INVALID_VALUE, "step: expected one element, got shape ",
               core::shape_text(args.step));
  core::check_output("latents", args.latents,
                     {{"v", &args.v}, {"s", &args.s}, {"dt", &args.dt}, {"step", &args.step}});
  if (core::present(args.velocity)) {
    core::check_like("velocity", args.velocity, "latents", args.latents);
    core::check_contiguous("velocity", args.velocity);
    core::check_output(
        "velocity", args.velocity,
        {{"latents", &args.latents}, {"v", &args.v}, {"s", &args.s}, {"dt", &args.dt}, {"step", &args.step}});
  }
  if (core::numel(args.latents) == 0) return;
  run_on(args.latents.device, [&] { cpu::guided_euler_step(args); }, [&] { cuda::guided_euler_step(args); });
}

void check_feature_delta(const flashu_feature_delta_args& args) {
  core::check_tensor("a", args.a);
  core::check_tensor("b", args.b);
  core::check_tensor("out", args.out);
  core::check_device({{"a", &args.a}, {"b", &args.b}, {"out", &args.out}});
  core::check_floating("a", args.a);
  core::check_like("b", args.b, "a", args.a);
  core::as_rows("a", args.a);
  core::as_rows("b", args.b);
  core::check_dtype("out", args.out, {FLASHU_F32});
  core::check_rank("out", args.out, 1);
  core::check_size("out", args.out, 0, 3);
  core::check_contiguous("out", args.out);
  core::check_output("out", args.out, {{"a", &args.a}, {"b", &args.b}});
}

void feature_delta(const flashu_feature_delta_args& args) {
  check_feature_delta(args);
  run_on(args.a.device, [&] { cpu::feature_delta(args); }, [&] { cuda::feature_delta(args); });
}

void feature_delta_workspace(const flashu_feature_delta_args& args, uint64_t* bytes) {
  FLASHU_CHECK(bytes != nullptr, FLASHU_INVALID_VALUE, "bytes: expected a pointer, got NULL");
  check_feature_delta(args);
  run_on(args.a.device, [&] { *bytes = 0; }, [&] { *bytes = cuda::feature_delta_workspace(args); });
}

void check_state(const flashu_tensor& state, const char* name, const flashu_tensor& feature) {
  core::check_tensor("state", state);
  core::check_tensor(name, feature);
  core::check_device({{"state", &state}, {name, &feature}});
  core::check_floating("state", state);
  core::check_rank("state", state, feature.ndim + 1);
  core::check_same_dtype(name, feature, "state", state);
  for (int d = 0; d < feature.ndim; ++d) core::check_size("state", state, d + 1, feature.sizes[d]);
  FLASHU_CHECK(state.sizes[0] >= 1 && state.sizes[0] <= kLargestOrder + 1, FLASHU_INVALID_VALUE,
               "state: expected order + 1 in [1, ", kLargestOrder + 1, "] in dimension 0, got ",
               state.sizes[0]);
  core::check_contiguous("state", state);
  core::check_contiguous(name, feature);
}

void taylor_update(const flashu_taylor_update_args& args) {
  check_state(args.state, "feature", args.feature);
  core::check_finite("interval", args.interval);
  FLASHU_CHECK(args.interval > 0, FLASHU_INVALID_VALUE, "interval: expected a number > 0, got ",
               args.interval);
  FLASHU_CHECK(args.count >= 0, FLASHU_INVALID_VALUE, "count: expected a number >= 0, got ", args.count);
  core::check_output("state", args.state, {{"feature", &args.feature}});
  if (core::numel(args.feature) == 0) return;
  run_on(args.state.device, [&] { cpu::taylor_update(args); }, [&] { cuda::taylor_update(args); });
}

void taylor_predict(const flashu_taylor_predict_args& args) {
  check_state(args.state, "out", args.out);
  core::check_finite("ahead", args.ahead);
  FLASHU_CHECK(args.count >= 1, FLASHU_INVALID_VALUE, "count: expected at least one update, got ",
               args.count);
  core::check_output("out", args.out, {{"state", &args.state}});
  if (core::numel(args.out) == 0) return;
  run_on(args.state.device, [&] { cpu::taylor_predict(args); }, [&] { cuda::taylor_predict(args); });
}

}  // namespace
}  // namespace flashu::api

extern "C" {

int32_t flashu_guided_euler_step(const flashu_guided_euler_step_args* args) {
  using namespace flashu;
  return core::guarded("guided_euler_step_", [&] { api::guided_euler_step(core::read_args(args)); });
}

int32_t flashu_feature_delta(const flashu_feature_delta_args* args) {
  using namespace flashu;
  return core::guarded("feature_delta", [&] { api::feature_delta(core::read_args(args)); });
}

int32_t flashu_feature_delta_workspace(const flashu_feature_delta_args* args, uint64_t* bytes) {
  using namespace flashu;
  return core::guarded("feature_delta", [&] { api::feature_delta_workspace(core::read_args(args), bytes); });
}

int32_t flashu_taylor_update(const flashu_taylor_update_args* args) {
  using namespace flashu;
  return core::guarded("taylor_update_", [&] { api::taylor_update(core::read_args(args)); });
}

int32_t flashu_taylor_predict(const flashu_taylor_predict_args* args) {
  using namespace flashu;
  return core::guarded("taylor_predict", [&] { api::taylor_predict(core::read_args(args)); });
}

}  // extern "C"
