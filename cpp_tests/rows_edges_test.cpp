// The routing and step families and the rotary cache on the CPU around every edge of their blocking: every
// argument with a stride of its own between red zones, one thread and many, beside fp64 or exact integers.
#include <cmath>
#include <limits>
#include <numeric>

#include "flashu/norm.hpp"
#include "flashu/routing.hpp"
#include "flashu/step.hpp"
#include "guarded.hpp"

namespace flashu::test {
namespace {

template <class T>
class RowsEdges : public ::testing::Test {};
using Storage = ::testing::Types<float, bfloat16, float16>;
TYPED_TEST_SUITE(RowsEdges, Storage);

// Around the 8 lanes of a row's sum, and rows that share 16,384 elements to a chunk
// (csrc/cpu/op_support.hpp).
const std::vector<std::pair<int64_t, int64_t>> kRowsOfWidth = {
    {1, 1}, {3, 7}, {2, 8}, {4, 9}, {5, 15}, {3, 16}, {2, 17}, {40, 1000}, {3, 20000}, {33, 513}};

TYPED_TEST(RowsEdges, CosineImportance) {
  for (const auto& [tokens, width] : kRowsOfWidth) {
    const int64_t sequences = 1 + width % 2;
    Guarded<TypeParam> in({sequences, tokens, width}, 3), out({sequences, tokens, width}, 8);
    in.real(1);
    out.fill([&](int64_t r, int64_t c) { return in.value(r, c) + (c % 3 == 0 ? 0.5f : -0.25f); });
    std::vector<double> expected;
    for (int64_t r = 0; r < sequences * tokens; ++r) {
      double dot = 0, a = 0, b = 0;
      for (int64_t c = 0; c < width; ++c) {
        const double x = in.value(r, c), y = out.value(r, c);
        dot += x * y, a += x * x, b += y * y;
      }
      expected.push_back(1 - dot / (std::sqrt(a) * std::sqrt(b)));
    }
    for (const int32_t threads : kThreadCounts) {
      const Threads pretended(threads);
      Guarded<float> each({sequences, tokens}), last({sequences}), mean(std::vector<int64_t>{});
      cosine_importance(in, out, FLASHU_REDUCE_NONE, each);
      cosine_importance(in, out, FLASHU_REDUCE_LAST, last);
      cosine_importance(in, out, FLASHU_REDUCE_MEAN, mean);
      for (int64_t r = 0; r < sequences * tokens; ++r)
        ASSERT_NEAR(each(r / tokens, r % tokens), expected[static_cast<size_t>(r)], 1e-7) << width;
      for (int64_t s = 0; s < sequences; ++s)
        ASSERT_NEAR(last(0, s), expected[static_cast<size_t>(s * tokens + tokens - 1)], 1e-7) << width;
      const double sum = std::accumulate(expected.begin(), expected.end(), 0.0);
      ASSERT_NEAR(mean(0, 0), sum / static_cast<double>(expected.size()), 1e-7) << width;
      ASSERT_TRUE(each.intact() && last.intact() && mean.intact());
    }
  }
}

TYPED_TEST(RowsEdges, RowsOfZerosTurnNothing) {
  Guarded<TypeParam> zero({2, 5}), other({2, 5}, 2);
  zero.fill([](int64_t, int64_t) { return 0; });
  other.integers(1, 1, 3);
  for (const auto& [a, b] : {std::pair{&zero, &other}, {&other, &zero}, {&zero, &zero}}) {
    Guarded<float> out({2});
    cosine_importance(*a, *b, FLASHU_REDUCE_NONE, out);
    EXPECT_EQ(out(0, 0), 1.0f);
    EXPECT_EQ(out(0, 1), 1.0f);
  }
}

TYPED_TEST(RowsEdges, ValueNorms) {
  for (const int64_t width : {1, 7, 8, 9, 64, 65}) {
    for (const int64_t tokens : {1, 3, 300}) {
      const int64_t batch = 2, heads = 3;
      Guarded<TypeParam> heads_first({batch, heads, tokens, width}, 5);
      Guarded<TypeParam> tokens_first({batch, tokens, heads, width}, 4);  // as a projection leaves them
      heads_first.integers(1, -3, 3);
      const auto row_of = [&](int64_t b, int64_t h, int64_t t) { return (b * heads + h) * tokens + t; };
      tokens_first.fill([&](int64_t r, int64_t c) {
        return heads_first.value(row_of(r / heads / tokens, r % heads, r / heads % tokens), c);
      });
      flashu_tensor transposed = tokens_first.view();
      std::swap(transposed.sizes[1], transposed.sizes[2]);
      std::swap(transposed.strides[1], transposed.strides[2]);
      for (const int32_t threads : kThreadCounts) {
        const Threads pretended(threads);
        Guarded<float> out({batch, tokens}), same({batch, tokens});
        value_norms(heads_first, out);
        value_norms(transposed, same);
        for (int64_t b = 0; b < batch; ++b) {
          for (int64_t t = 0; t < tokens; ++t) {
            double squares = 0;
            for (int64_t h = 0; h < heads; ++h) {
              for (int64_t c = 0; c < width; ++c)
                squares += std::pow(heads_first.value(row_of(b, h, t), c), 2);
            }
            ASSERT_EQ(out(b, t), static_cast<float>(std::sqrt(squares))) << tokens;
          }
        }
        ASSERT_TRUE(out.intact() && out.same(same));
      }
    }
  }
}

TYPED_TEST(RowsEdges, SelectionsKeepOrderAndBreakTiesLow) {
  for (const int64_t tokens : {1, 2, 9, 100, 5000}) {
    const int64_t rows = 7;
    Guarded<TypeParam> scores({rows, tokens}, 6);
    scores.integers(1, -4, 4);  // many ties
    for (const int32_t threads : kThreadCounts) {
      const Threads pretended(threads);
      for (const int64_t k : {int64_t{0}, int64_t{1}, tokens / 2, tokens - 1, tokens}) {
        Guarded<int64_t> index({rows, k});
        index.fill([](int64_t, int64_t) { return 7; });
        Guarded<int32_t> count({rows});
        select_topk(scores, k, index, count);
        for (int64_t r = 0; r < rows; ++r) {
          std::vector<int64_t> order(static_cast<size_t>(tokens));
          std::iota(order.begin(), order.end(), 0);
          std::stable_sort(order.begin(), order.end(),
                           [&](int64_t a, int64_t b) { return scores.value(r, a) > scores.value(r, b); });
          order.resize(static_cast<size_t>(k));
          std::sort(order.begin(), order.end());
          ASSERT_EQ(count(0, r), k);
          for (int64_t i = 0; i < k; ++i) ASSERT_EQ(index(r, i), order[static_cast<size_t>(i)]) << k;
        }
        ASSERT_TRUE(index.intact() && count.intact());
      }
      for (const int64_t capacity : {int64_t{0}, int64_t{1}, tokens / 2, tokens, tokens + 3}) {
        Guarded<int64_t> index({rows, capacity});
        index.fill([](int64_t, int64_t) { return 7; });
        Guarded<int32_t> count({rows});
        select_threshold(scores, 1.0, index, count);
        for (int64_t r = 0; r < rows; ++r) {
          std::vector<int64_t> passed;
          for (int64_t t = 0; t < tokens; ++t) {
            if (scores.value(r, t) >= 1) passed.push_back(t);
          }
          ASSERT_EQ(count(0, r), static_cast<int64_t>(passed.size()));
          passed.resize(static_cast<size_t>(std::max<int64_t>(capacity, count(0, r))), -1);
          for (int64_t i = 0; i < capacity; ++i) ASSERT_EQ(index(r, i), passed[static_cast<size_t>(i)]);
        }
        ASSERT_TRUE(index.intact() && count.intact());
      }
    }
  }
}

// The threshold is what fits in fp32: a score that equals it passes.
TYPED_TEST(RowsEdges, ThresholdIsComparedInFloat) {
  Guarded<float> scores({1, 2});
  scores.fill([](int64_t, int64_t c) { return c == 0 ? 0.1f : std::nextafter(0.1f, 0.0f); });
  Guarded<int64_t> index({1, 2});
  Guarded<int32_t> count({1});
  select_threshold(scores, static_cast<double>(0.1f) + 1e-12, index, count);
  EXPECT_EQ(count(0, 0), 1);
  EXPECT_EQ(index(0, 0), 0);
}

TYPED_TEST(RowsEdges, ScoresThatAreNotNumbersAreNamed) {
  Guarded<TypeParam> scores({2, 300}, 4);
  scores.integers(1, -3, 3);
  scores(1, 299) = from_float<TypeParam>(std::numeric_limits<float>::quiet_NaN());
  Guarded<int64_t> index({2, 3});
  Guarded<int32_t> count({2});
  EXPECT_NE(error_of([&] { select_topk(scores, 3, index, count); }).find("NaN at row 1, token 299"),
            std::string::npos);
  EXPECT_EQ(index(0, 0), -1);  // nothing was written
}

template <class T, class Index>
void expect_moves(int64_t batch, int64_t tokens, int64_t width, int64_t count) {
  Guarded<T> rows({batch, tokens, width}, 3);
  rows.integers(1, -9, 9);
  Guarded<T> from({batch, count, width}, 8);
  from.integers(2, -9, 9);
  Guarded<Index> index({batch, count}, 5, 2);
  index.integers(3, -1, static_cast<int>(tokens) - 1);
  const auto row_of = [&](int64_t b, int64_t i) { return static_cast<int64_t>(index(b, i)); };
  for (const int32_t threads : kThreadCounts) {
    const Threads pretended(threads);
    Guarded<T> moved({batch, count, width}, 7);
    gather_rows(rows, index, moved);
    for (int64_t b = 0; b < batch; ++b) {
      for (int64_t i = 0; i < count; ++i) {
        const int64_t row = row_of(b, i);
        for (int64_t c = 0; c < width; ++c)
          ASSERT_EQ(moved.value(b * count + i, c), row < 0 ? 0.0f : rows.value(b * tokens + row, c));
      }
    }
    Guarded<T> set = rows, sums = rows, expected_set = rows, expected_sums = rows;
    scatter_rows(set, index, from);
    scatter_add_rows(sums, index, from);
    for (int64_t b = 0; b < batch; ++b) {
      for (int64_t i = 0; i < count; ++i) {
        const int64_t to = b * tokens + row_of(b, i);
        if (row_of(b, i) < 0) continue;
        for (int64_t c = 0; c < width; ++c) {
          expected_set(to, c) = from(b * count + i, c);
          expected_sums(to, c) =
              from_float<T>(to_float(expected_sums(to, c)) + to_float(from(b * count + i, c)));
        }
      }
    }
    ASSERT_TRUE(set.same(expected_set) && sums.same(expected_sums) && moved.intact());
  }
}

TYPED_TEST(RowsEdges, MovesOfEverySize) {
  // Threads share columns in grains of 64, more where few rows move (csrc/cpu/routing.cpp).
  for (const int64_t width : {1, 2, 63, 64, 65, 127, 128, 129, 500}) {
    for (const int64_t count : {1, 2, 9}) expect_moves<TypeParam, int64_t>(3, 5, width, count);
    expect_moves<TypeParam, int32_t>(1, 4, width, 300);
  }
  expect_moves<TypeParam, int32_t>(1, 1, 40000, 2);
  expect_moves<TypeParam, int64_t>(2, 1, 3, 1);
}

TYPED_TEST(RowsEdges, EulerStep) {
  for (const bool guided : {false, true}) {
    for (const auto& [channels, side] : {std::pair<int64_t, int64_t>{1, 1}, {3, 4}, {16, 27}, {5, 150}}) {
      const int64_t images = 3, positions = side * side, step = 2;
      Guarded<TypeParam> latents({images, channels, side, side});
      Guarded<float> v({guided ? 2 * images : images, positions, channels}), s({4}), dt({4});
      Guarded<int64_t> at(std::vector<int64_t>{});
      latents.integers(1, -8, 8);
      v.integers(2, -4, 4);
      s.fill([](int64_t, int64_t i) { return i == step ? 3.0 : 7.0; });
      dt.fill([](int64_t, int64_t i) { return i == step ? 0.25 : 0.5; });
      at.fill([](int64_t, int64_t) { return step; });
      for (const int32_t threads : kThreadCounts) {
        const Threads pretended(threads);
        Guarded<TypeParam> moved = latents, velocity({images, channels, side, side});
        EulerStepArgs args{};
        args.latents = moved;
        args.v = v;
        args.s = s;
        args.dt = dt;
        args.step = at;
        args.velocity = velocity;
        guided_euler_step(args);
        for (int64_t i = 0; i < images * channels * positions; ++i) {
          const int64_t image = i / (channels * positions);
          const int64_t channel = i / positions % channels;
          const int64_t row = image * positions + i % positions;
          const float unconditional = guided ? v.value(row + images * positions, channel) : 0;
          const float along =
              guided ? unconditional + 3 * (v.value(row, channel) - unconditional) : v.value(row, channel);
          const int64_t r = i / side, c = i % side;
          ASSERT_EQ(velocity.value(r, c), rounded<TypeParam>(along)) << i;
          ASSERT_EQ(moved.value(r, c), rounded<TypeParam>(latents.value(r, c) + 0.25 * along)) << i;
        }
        ASSERT_TRUE(moved.intact() && velocity.intact());
      }
    }
  }
}

TYPED_TEST(RowsEdges, FeatureDelta) {
  // Partial sums of 4,096 elements of a row (csrc/cpu/step.cpp).
  for (const auto& [rows, width] :
       {std::pair<int64_t, int64_t>{1, 1}, {2, 5}, {3, 4095}, {3, 4096}, {3, 4097}, {2, 8193}, {70, 300}}) {
    Guarded<TypeParam> a({rows, width}, 3), b({rows, width}, 5);
    a.integers(1, -3, 3);
    b.integers(2, -2, 4);
    double distance = 0, size = 0, squares = 0, aa = 0, bb = 0, dot = 0;
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < width; ++c) {
        const double x = a.value(r, c), y = b.value(r, c);
        distance += std::fabs(x - y), size += std::fabs(y), squares += (x - y) * (x - y);
        aa += x * x, bb += y * y, dot += x * y;
      }
    }
    const auto ratio = [](double x, double y) { return x == 0 && y == 0 ? 0.0f : static_cast<float>(x / y); };
    for (const int32_t threads : kThreadCounts) {
      const Threads pretended(threads);
      Guarded<float> out({3});
      feature_delta(a, b, out);
      ASSERT_EQ(out(0, 0), ratio(distance, size)) << width;
      ASSERT_EQ(out(0, 1), ratio(std::sqrt(squares), std::sqrt(bb))) << width;
      ASSERT_EQ(out(0, 2), ratio(dot, std::sqrt(aa) * std::sqrt(bb))) << width;
      ASSERT_TRUE(out.intact());
    }
  }
}

TYPED_TEST(RowsEdges, TaylorTables) {
  for (const int64_t order : {0, 1, 2, 3}) {
    for (const int64_t width : {1, 5, 16383, 16385, 40000}) {
      for (const int32_t threads : kThreadCounts) {
        const Threads pretended(threads);
        Guarded<TypeParam> state({order + 1, width}), feature({width}), out({width});
        state.fill([](int64_t, int64_t) { return 5; });
        // Powers of two apart, so that differences over an interval of 2 are exact.
        std::vector<std::vector<double>> table(static_cast<size_t>(order + 1),
                                               std::vector<double>(static_cast<size_t>(width), 5));
        for (int64_t count = 0; count < 4; ++count) {
          feature.fill([&](int64_t, int64_t j) { return (j % 7 - 3) * 4 * (count + 1) * (count + 1); });
          taylor_update(state, feature, 2.0, count);
          for (int64_t j = 0; j < width; ++j) {
            double fresh = feature.value(0, j);
            for (int64_t i = 0; i <= order; ++i) {
              double& stored = table[static_cast<size_t>(i)][static_cast<size_t>(j)];
              const double old = stored;
              stored = i <= std::min(order, count) ? fresh : 0;
              fresh = (fresh - old) / 2;
              ASSERT_EQ(state.value(i, j), stored) << "order " << i << ", update " << count;
            }
          }
          taylor_predict(state, 4.0, count + 1, out);
          for (int64_t j = 0; j < width; ++j) {
            double sum = table[0][static_cast<size_t>(j)];
            if (order >= 1 && count >= 1) sum += 4 * table[1][static_cast<size_t>(j)];
            if (order >= 2 && count >= 2) sum += 8 * table[2][static_cast<size_t>(j)];
            if (order >= 3 && count >= 3) sum += 64.0f / 6 * table[3][static_cast<size_t>(j)];
            ASSERT_EQ(out.value(0, j), rounded<TypeParam>(sum)) << "order " << order << ", update " << count;
          }
        }
        ASSERT_TRUE(state.intact() && feature.intact() && out.intact());
      }
    }
  }
}

// Differences are of the numbers before they are rounded, and only those that the updates so far made count.
TYPED_TEST(RowsEdges, TaylorTablesRoundOnce) {
  const int64_t width = 500;
  Guarded<TypeParam> state({3, width}), feature({width}), out({width});
  state.real(1), feature.real(2);
  const Guarded<TypeParam> before = state;
  for (const int64_t count : {1, 2, 3, 9}) {
    taylor_predict(state, 3.0, count, out);
    for (int64_t j = 0; j < width; ++j) {
      float sum = state.value(0, j);
      if (count >= 2) sum += 3.0f * state.value(1, j);
      if (count >= 3) sum += 4.5f * state.value(2, j);
      ASSERT_TRUE(near<TypeParam>(out.value(0, j), sum, 1)) << count;
    }
  }
  taylor_update(state, feature, 3.0, 5);
  for (int64_t j = 0; j < width; ++j) {
    const float first = (feature.value(0, j) - before.value(0, j)) / 3.0f;
    ASSERT_EQ(state.value(1, j), rounded<TypeParam>(first));
    ASSERT_EQ(state.value(2, j), rounded<TypeParam>((first - before.value(1, j)) / 3.0f));
  }
}

TEST(RowsDelta, NothingOverNothingIsNothing) {
  Guarded<float> a({2, 5}, 1), b({2, 5}, 2), out({3});
  a.fill([](int64_t, int64_t) { return 0; });
  b.fill([](int64_t, int64_t) { return 0; });
  feature_delta(a, b, out);
  for (int64_t i = 0; i < 3; ++i) EXPECT_EQ(out(0, i), 0.0f);
}

// The sum is rounded as it is stored, and its norm is that of what was stored, rounded once.
TYPED_TEST(RowsEdges, AddRmsNorm) {
  for (const auto& [rows, width] : kRowsOfWidth) {
    Guarded<TypeParam> x({rows, width}, 3), residual({1, rows, width}, 6), weight({width});
    x.real(1), residual.real(2), weight.real(3);
    Guarded<TypeParam> flat({1, rows, width}, 3);
    for (const int32_t threads : kThreadCounts) {
      const Threads pretended(threads);
      flat.fill([&](int64_t r, int64_t c) { return x.value(r, c); });
      Guarded<TypeParam> sum = residual;
      add_rms_norm(flat, sum, weight, 1e-3);
      for (int64_t r = 0; r < rows; ++r) {
        double squares = 0;
        for (int64_t c = 0; c < width; ++c) {
          ASSERT_EQ(sum.value(r, c), rounded<TypeParam>(residual.value(r, c) + x.value(r, c)));
          squares += std::pow(static_cast<double>(sum.value(r, c)), 2);
        }
        const double inverse = 1 / std::sqrt(squares / static_cast<double>(width) + 1e-3);
        for (int64_t c = 0; c < width; ++c)
          ASSERT_TRUE(near<TypeParam>(flat.value(r, c), sum.value(r, c) * inverse * weight.value(0, c), 0.51))
              << width;
      }
      ASSERT_TRUE(flat.intact() && sum.intact() && weight.intact());
    }
  }
}

// Rotations by 0, 90, 180 and 270 degrees are exact, so every head must be in its place.
TYPED_TEST(RowsEdges, RotaryCacheIsExactForQuarterTurns) {
  for (const int64_t half : {1, 3, 4, 8, 9, 32}) {
    for (const int64_t tables : {1, 3}) {
      for (const int64_t tokens : {1, 5, 200}) {
        const int64_t rows = 3, heads = 4, kv = 2, capacity = tokens + 2, d = 2 * half;
        Guarded<TypeParam> query({rows, tokens, heads, d}, 1), key({rows, tokens, kv, d}, 2),
            value({rows, tokens, kv, d}, 3), cos({tables, tokens, d}, 4), sin({tables, tokens, d}, 5);
        Guarded<int64_t> start({rows}, 0, 2);
        query.integers(1, -9, 9), key.integers(2, -9, 9), value.integers(3, -9, 9);
        const auto quarter = [](int64_t r, int64_t c) { return (3 * r + c) % 4; };
        cos.fill([&](int64_t r, int64_t c) { return quarter(r, c) % 2 == 0 ? 1 - quarter(r, c) : 0; });
        sin.fill([&](int64_t r, int64_t c) { return quarter(r, c) % 2 == 1 ? 2 - quarter(r, c) : 0; });
        start.fill([](int64_t, int64_t r) { return r == 0 ? -1 : r == 1 ? 1 : 4; });
        const auto rotated = [&](const Guarded<TypeParam>& x, int64_t row, int64_t token, int64_t at,
                                 int64_t c) {
          const int64_t angle = (tables == 1 ? 0 : row) * tokens + token;
          const float other = c < half ? -x.value(at, c + half) : x.value(at, c - half);
          return x.value(at, c) * cos.value(angle, c) + other * sin.value(angle, c);
        };
        for (const int32_t threads : kThreadCounts) {
          const Threads pretended(threads);
          Guarded<TypeParam> keys({rows, capacity, kv, d}, 6), values({rows, capacity, kv, d}, 7),
              out({rows, heads, tokens, d}, 8);
          keys.fill([](int64_t, int64_t) { return 77; });
          values.fill([](int64_t, int64_t) { return 78; });
          RotaryCacheArgs args{};
          args.query = query, args.key = key, args.value = value, args.cos = cos, args.sin = sin;
          args.keys = keys, args.values = values, args.start = start, args.out = out;
          rotary_cache(args);
          for (int64_t r = 0; r < rows; ++r) {
            for (int64_t t = 0; t < tokens; ++t) {
              for (int64_t h = 0; h < heads; ++h) {
                for (int64_t c = 0; c < d; ++c)
                  ASSERT_EQ(out.value((r * heads + h) * tokens + t, c),
                            rotated(query, r, t, (r * tokens + t) * heads + h, c));
              }
            }
            for (int64_t slot = 0; slot < capacity; ++slot) {
              const int64_t t = slot - start(0, r);
              for (int64_t h = 0; h < kv; ++h) {
                const int64_t at = (r * tokens + t) * kv + h, to = (r * capacity + slot) * kv + h;
                for (int64_t c = 0; c < d; ++c) {
                  const bool given = t >= 0 && t < tokens;
                  ASSERT_EQ(keys.value(to, c), given ? rotated(key, r, t, at, c) : 77.0f) << "slot " << slot;
                  ASSERT_EQ(values.value(to, c), given ? value.value(at, c) : 78.0f) << "slot " << slot;
                }
              }
            }
          }
          ASSERT_TRUE(out.intact() && keys.intact() && values.intact());
        }
      }
    }
  }
}

// Conversions between storage and float, all 65,536 patterns and around every tie.
TYPED_TEST(RowsEdges, StorageRoundsToNearestEven) {
  if constexpr (!std::is_same_v<TypeParam, float>) {
    for (uint32_t bits = 0; bits < 65535; ++bits) {
      const TypeParam low{static_cast<uint16_t>(bits)}, high{static_cast<uint16_t>(bits + 1)};
      const float a = to_float(low), b = to_float(high);
      if (std::isnan(a)) {
        ASSERT_TRUE(std::isnan(to_float(from_float<TypeParam>(a)))) << bits;
        continue;
      }
      ASSERT_EQ(from_float<TypeParam>(a).bits, bits);
      if (std::signbit(a) != std::signbit(b) || !std::isfinite(b)) continue;
      const float middle = static_cast<float>((static_cast<double>(a) + b) / 2);
      ASSERT_EQ(from_float<TypeParam>(middle).bits, bits % 2 == 0 ? bits : bits + 1) << bits;
      ASSERT_EQ(from_float<TypeParam>(std::nextafter(middle, a)).bits, bits) << bits;
      ASSERT_EQ(from_float<TypeParam>(std::nextafter(middle, b)).bits, bits + 1) << bits;
    }
  }
}

}  // namespace
}  // namespace flashu::test
