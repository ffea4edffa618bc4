// C API of the step family: checks, then elementwise passes over memory. These move a few hundred kilobytes a
// step, so plain loops that the compiler vectorises are all they need.
#include "flashu/step.h"

#include <vector>

#include "core/lanes.hpp"
#include "core/parallel.hpp"
#include "core/rows.hpp"
#include "cpu/op_support.hpp"

namespace flashu::cpu {
namespace {

constexpr int kLargestOrder = 2;

// ---- one Euler step

void check_table(const char* name, const flashu_tensor& table) {
  core::check_rank(name, table, 1);
  core::check_dtype(name, table, {FLASHU_F32});
  core::check_inner_contiguous(name, table);
}

// Images of [channels, positions] and velocities of [positions, channels].
template <class L, class V>
void euler(const flashu_guided_euler_step_args& args, bool guided, float s, float dt) {
  const int64_t channels = args.latents.sizes[1];
  const int64_t positions = args.latents.sizes[2] * args.latents.sizes[3];
  const int64_t images = args.latents.sizes[0];
  L* latents = pointer<L>(args.latents);
  L* velocity = core::present(args.velocity) ? pointer<L>(args.velocity) : nullptr;
  const V* conditional = pointer<const V>(args.v);
  const V* unconditional = conditional + images * channels * positions;
  core::parallel_for(0, images * channels, row_grain(positions), [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      const int64_t from = (row / channels) * channels * positions + row % channels;
      for (int64_t p = 0; p < positions; ++p) {
        float v = to_float(conditional[from + p * channels]);
        if (guided) {
          const float base = to_float(unconditional[from + p * channels]);
          v = base + s * (v - base);
        }
        L& latent = latents[row * positions + p];
        latent = from_float<L>(to_float(latent) + dt * v);
        if (velocity) velocity[row * positions + p] = from_float<L>(v);
      }
    }
  });
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
  check_floating("latents", args.latents);
  check_contiguous("latents", args.latents);
  core::check_rank("v", args.v, 3);
  check_floating("v", args.v);
  check_contiguous("v", args.v);
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
  check_output("latents", args.latents,
               {{"v", &args.v}, {"s", &args.s}, {"dt", &args.dt}, {"step", &args.step}});
  if (core::present(args.velocity)) {
    check_like("velocity", args.velocity, "latents", args.latents);
    check_contiguous("velocity", args.velocity);
    check_output(
        "velocity", args.velocity,
        {{"latents", &args.latents}, {"v", &args.v}, {"s", &args.s}, {"dt", &args.dt}, {"step", &args.step}});
  }
  const int64_t step = *pointer<int64_t>(args.step);
  FLASHU_CHECK(step >= 0 && step < args.s.sizes[0], FLASHU_INVALID_INDEX, "step: expected a number in [0, ",
               args.s.sizes[0], "), got ", step);
  if (core::numel(args.latents) == 0) return;
  const bool guided = args.v.sizes[0] != images;
  const float s = pointer<float>(args.s)[step];
  const float dt = pointer<float>(args.dt)[step];
  with_type(args.latents.dtype, [&](auto latent) {
    with_type(args.v.dtype, [&](auto v) { euler<decltype(latent), decltype(v)>(args, guided, s, dt); });
  });
}

// ---- how far features moved

constexpr int64_t kChunk = 4096;  // elements per partial sum: fixed, so that the order of summing is

struct DeltaSums {
  double distance = 0;  // |a - b|
  double size = 0;      // |b|
  double distance_squares = 0;
  double a_squares = 0;
  double b_squares = 0;
  double dot = 0;
};

template <class T>
DeltaSums delta_sums(const T* a, const T* b, int64_t n) {
  constexpr int kLanes = 4;
  core::Lanes<double, kLanes> distance{}, size{}, distance_squares{}, a_squares{}, b_squares{}, dot{};
  core::for_lanes<kLanes>(n, [&](int64_t j, int i) __attribute__((always_inline)) {
    const double x = to_float(a[j]);
    const double y = to_float(b[j]);
    distance.lane[i] += std::fabs(x - y);
    size.lane[i] += std::fabs(y);
    distance_squares.lane[i] += (x - y) * (x - y);
    a_squares.lane[i] += x * x;
    b_squares.lane[i] += y * y;
    dot.lane[i] += x * y;
  });
  return {distance.total(),  size.total(),      distance_squares.total(),
          a_squares.total(), b_squares.total(), dot.total()};
}

// 0 where both are 0: nothing moved from nothing.
float ratio(double numerator, double denominator) {
  return numerator == 0 && denominator == 0 ? 0.0f : static_cast<float>(numerator / denominator);
}

void feature_delta(const flashu_feature_delta_args& args) {
  core::check_tensor("a", args.a);
  core::check_tensor("b", args.b);
  core::check_tensor("out", args.out);
  core::check_device({{"a", &args.a}, {"b", &args.b}, {"out", &args.out}});
  check_floating("a", args.a);
  check_like("b", args.b, "a", args.a);
  const core::Rows a = core::as_rows("a", args.a);
  const core::Rows b = core::as_rows("b", args.b);
  core::check_dtype("out", args.out, {FLASHU_F32});
  core::check_rank("out", args.out, 1);
  core::check_size("out", args.out, 0, 3);
  check_contiguous("out", args.out);
  check_output("out", args.out, {{"a", &args.a}, {"b", &args.b}});
  const int64_t chunks = (a.width + kChunk - 1) / kChunk;  // of one row
  std::vector<DeltaSums> partial(static_cast<size_t>(a.count * chunks));
  with_type(args.a.dtype, [&](auto tag) {
    using T = decltype(tag);
    core::parallel_for(
        0, a.count * chunks, row_grain(std::min(a.width, kChunk)), [&](int64_t first, int64_t last) {
          for (int64_t i = first; i < last; ++i) {
            const int64_t begin = (i % chunks) * kChunk;
            partial[static_cast<size_t>(i)] = delta_sums(pointer<T>(args.a) + (i / chunks) * a.stride + begin,
                                                         pointer<T>(args.b) + (i / chunks) * b.stride + begin,
                                                         std::min(kChunk, a.width - begin));
          }
        });
  });
  DeltaSums sum;
  for (const DeltaSums& part : partial) {
    sum.distance += part.distance;
    sum.size += part.size;
    sum.distance_squares += part.distance_squares;
    sum.a_squares += part.a_squares;
    sum.b_squares += part.b_squares;
    sum.dot += part.dot;
  }
  float* out = pointer<float>(args.out);
  out[0] = ratio(sum.distance, sum.size);
  out[1] = ratio(std::sqrt(sum.distance_squares), std::sqrt(sum.b_squares));
  out[2] = ratio(sum.dot, std::sqrt(sum.a_squares) * std::sqrt(sum.b_squares));
}

// ---- carrying features forward

int check_state(const flashu_tensor& state, const char* name, const flashu_tensor& feature) {
  core::check_tensor("state", state);
  core::check_tensor(name, feature);
  core::check_device({{"state", &state}, {name, &feature}});
  check_floating("state", state);
  core::check_rank("state", state, feature.ndim + 1);
  core::check_same_dtype(name, feature, "state", state);
  for (int d = 0; d < feature.ndim; ++d) core::check_size("state", state, d + 1, feature.sizes[d]);
  FLASHU_CHECK(state.sizes[0] >= 1 && state.sizes[0] <= kLargestOrder + 1, FLASHU_INVALID_VALUE,
               "state: expected order + 1 in [1, ", kLargestOrder + 1, "] in dimension 0, got ",
               state.sizes[0]);
  check_contiguous("state", state);
  check_contiguous(name, feature);
  return static_cast<int>(state.sizes[0]) - 1;
}

void taylor_update(const flashu_taylor_update_args& args) {
  const int order = check_state(args.state, "feature", args.feature);
  check_finite("interval", args.interval);
  FLASHU_CHECK(args.interval > 0, FLASHU_INVALID_VALUE, "interval: expected a number > 0, got ",
               args.interval);
  FLASHU_CHECK(args.count >= 0, FLASHU_INVALID_VALUE, "count: expected a number >= 0, got ", args.count);
  check_output("state", args.state, {{"feature", &args.feature}});
  const int differences = static_cast<int>(std::min<int64_t>(order, args.count));
  const int64_t n = core::numel(args.feature);
  const float interval = static_cast<float>(args.interval);
  with_type(args.state.dtype, [&](auto tag) {
    using T = decltype(tag);
    core::parallel_for(0, n, kGrainElements, [&](int64_t first, int64_t last) {
      for (int64_t j = first; j < last; ++j) {
        T* state = pointer<T>(args.state) + j;
        float fresh = to_float(pointer<T>(args.feature)[j]);
        for (int i = 0; i <= order; ++i) {
          const float old = to_float(state[i * n]);
          state[i * n] = from_float<T>(i <= differences ? fresh : 0.0f);
          fresh = (fresh - old) / interval;  // of the numbers before rounding: one rounding per stored number
        }
      }
    });
  });
}

void taylor_predict(const flashu_taylor_predict_args& args) {
  const int order = check_state(args.state, "out", args.out);
  check_finite("ahead", args.ahead);
  FLASHU_CHECK(args.count >= 1, FLASHU_INVALID_VALUE, "count: expected at least one update, got ",
               args.count);
  check_output("out", args.out, {{"state", &args.state}});
  const int terms = static_cast<int>(std::min<int64_t>(order, args.count - 1));
  const int64_t n = core::numel(args.out);
  const float ahead = static_cast<float>(args.ahead);
  const float weight[kLargestOrder + 1] = {1.0f, ahead, ahead * ahead / 2.0f};
  with_type(args.state.dtype, [&](auto tag) {
    using T = decltype(tag);
    core::parallel_for(0, n, kGrainElements, [&](int64_t first, int64_t last) {
      for (int64_t j = first; j < last; ++j) {
        const T* state = pointer<T>(args.state) + j;
        float sum = to_float(state[0]);
        for (int i = 1; i <= terms; ++i) sum += weight[i] * to_float(state[i * n]);
        pointer<T>(args.out)[j] = from_float<T>(sum);
      }
    });
  });
}

}  // namespace
}  // namespace flashu::cpu

extern "C" {

int32_t flashu_guided_euler_step(const flashu_guided_euler_step_args* args) {
  using namespace flashu;
  return core::guarded("guided_euler_step_", [&] { cpu::guided_euler_step(core::read_args(args)); });
}

int32_t flashu_feature_delta(const flashu_feature_delta_args* args) {
  using namespace flashu;
  return core::guarded("feature_delta", [&] { cpu::feature_delta(core::read_args(args)); });
}

int32_t flashu_taylor_update(const flashu_taylor_update_args* args) {
  using namespace flashu;
  return core::guarded("taylor_update_", [&] { cpu::taylor_update(core::read_args(args)); });
}

int32_t flashu_taylor_predict(const flashu_taylor_predict_args* args) {
  using namespace flashu;
  return core::guarded("taylor_predict", [&] { cpu::taylor_predict(core::read_args(args)); });
}

}  // extern "C"
