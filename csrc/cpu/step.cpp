// The step family on the CPU: elementwise passes over memory. These move a few hundred kilobytes a step, so
// plain loops that the compiler vectorises are all they need.
#include "cpu/step.hpp"

#include <cmath>
#include <vector>

#include "core/lanes.hpp"
#include "core/parallel.hpp"
#include "core/rows.hpp"
#include "cpu/op_support.hpp"

namespace flashu::cpu {
namespace {

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

}  // namespace

void guided_euler_step(const flashu_guided_euler_step_args& args) {
  const int64_t step = *pointer<int64_t>(args.step);
  FLASHU_CHECK(step >= 0 && step < args.s.sizes[0], FLASHU_INVALID_INDEX, "step: expected a number in [0, ",
               args.s.sizes[0], "), got ", step);
  const bool guided = args.v.sizes[0] != args.latents.sizes[0];
  const float s = pointer<float>(args.s)[step];
  const float dt = pointer<float>(args.dt)[step];
  with_type(args.latents.dtype, [&](auto latent) {
    with_type(args.v.dtype, [&](auto v) { euler<decltype(latent), decltype(v)>(args, guided, s, dt); });
  });
}

void feature_delta(const flashu_feature_delta_args& args) {
  const core::Rows a = core::as_rows("a", args.a);
  const core::Rows b = core::as_rows("b", args.b);
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

void taylor_update(const flashu_taylor_update_args& args) {
  const int order = static_cast<int>(args.state.sizes[0]) - 1;
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
  const int order = static_cast<int>(args.state.sizes[0]) - 1;
  const int terms = static_cast<int>(std::min<int64_t>(order, args.count - 1));
  const int64_t n = core::numel(args.out);
  const float ahead = static_cast<float>(args.ahead);
  with_type(args.state.dtype, [&](auto tag) {
    using T = decltype(tag);
    core::parallel_for(0, n, kGrainElements, [&](int64_t first, int64_t last) {
      for (int64_t j = first; j < last; ++j) {
        const T* state = pointer<T>(args.state) + j;
        float sum = to_float(state[0]);
        float weight = ahead;
        for (int i = 1; i <= terms; ++i) {
          sum += weight * to_float(state[i * n]);
          weight = weight * ahead / static_cast<float>(i + 1);
        }
        pointer<T>(args.out)[j] = from_float<T>(sum);
      }
    });
  });
}

}  // namespace flashu::cpu
