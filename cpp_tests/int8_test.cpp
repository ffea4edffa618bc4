// FFNs and linear layers with int8 weights through the C++ API: whole numbers in every size and stride, rows
// that know no company, and rows of zeros, of tiny and of huge numbers, and of numbers that are not finite.
#include <cmath>
#include <numeric>

#include "flashu/ffn.hpp"
#include "flashu/linear.hpp"
#include "guarded.hpp"

namespace flashu::test {
namespace {

template <class T>
class Int8 : public ::testing::Test {};
using Storage = ::testing::Types<float, bfloat16, float16>;
TYPED_TEST_SUITE(Int8, Storage);

// Every tensor with a stride of its own, scales of one.
template <class T>
struct Layer {
  Guarded<T> x, out;
  Guarded<int8_t> weight;
  Guarded<float> scale;

  Layer(int64_t m, int64_t n, int64_t k) : x({m, k}, 3), out({m, n}, 9), weight({n, k}, 5), scale({n}) {
    x.integers(1, -2, 2);
    weight.integers(2, -3, 3);
    scale.fill([](int64_t, int64_t) { return 1; });
  }
  void run() {
    LinearArgs args{};
    args.x = x;
    args.weight = weight;
    args.scale = scale;
    args.out = out;
    linear(args);
  }
  double exact(int64_t row, int64_t column) const {
    double sum = 0;
    for (int64_t k = 0; k < x.width(); ++k) sum += static_cast<double>(x.value(row, k)) * weight(column, k);
    return sum;
  }
};

TYPED_TEST(Int8, LinearIsExactOnIntegersAtEveryEdge) {
  const auto exact = [](int64_t m, int64_t n, int64_t k) {
    for (const int32_t count : kThreadCounts) {
      const Threads threads(count);
      Layer<TypeParam> layer(m, n, k);
      layer.run();
      for (int64_t r = 0; r < m; ++r) {
        for (int64_t c = 0; c < n; ++c)
          ASSERT_EQ(layer.out.value(r, c), rounded<TypeParam>(layer.exact(r, c)))
              << m << " x " << n << " x " << k << ", row " << r << ", column " << c;
      }
      ASSERT_TRUE(layer.out.intact());
    }
  };
  for (const int64_t m : {1, 2, 3, 4, 5, 7, 8, 9, 13, 33, 341, 1021}) exact(m, 35, 21);
  for (const int64_t n : {1, 15, 16, 17, 31, 32, 33, 129, 257}) exact(5, n, 20);
  for (const int64_t k : {0, 1, 2, 31, 63, 64, 65, 127, 129, 257, 511, 513, 1025}) {
    for (const int64_t m : {1, 3, 13}) exact(m, 9, k);
  }
  exact(200, 260, 700);
}

// Numbers that any power of two makes too small or too large for intermediate steps in float.
TYPED_TEST(Int8, LinearKeepsPowersOfTwo) {
  const bool narrow = std::is_same_v<TypeParam, float16>;
  for (const int power : {narrow ? -24 : -133, narrow ? -10 : -100, 0, narrow ? 5 : 110}) {
    for (const int64_t m : {1, 6}) {
      Layer<TypeParam> layer(m, 9, 70);
      layer.x.fill(
          [&](int64_t r, int64_t k) { return std::ldexp(static_cast<double>((3 * r + k) % 5 - 2), power); });
      layer.run();
      for (int64_t r = 0; r < m; ++r) {
        for (int64_t c = 0; c < 9; ++c)
          ASSERT_EQ(layer.out.value(r, c), rounded<TypeParam>(layer.exact(r, c))) << "2^" << power;
      }
    }
  }
}

// A row that is not finite gives what float gives, and its neighbours what they give without it.
TYPED_TEST(Int8, LinearOfRowsThatAreNotFinite) {
  const std::vector<std::vector<float>> bad = {
      {NAN}, {INFINITY}, {-INFINITY}, {INFINITY, INFINITY}, {INFINITY, -INFINITY}, {INFINITY, NAN}};
  for (const int64_t m : {1, 4, 13}) {
    for (const auto& values : bad) {
      Layer<TypeParam> layer(m, 40, 70);
      for (size_t i = 0; i < values.size(); ++i)
        layer.x(m / 2, 7 + 50 * static_cast<int64_t>(i)) = from_float<TypeParam>(values[i]);
      layer.run();
      for (int64_t r = 0; r < m; ++r) {
        for (int64_t c = 0; c < 40; ++c) {
          const double exact = layer.exact(r, c);
          const float got = layer.out.value(r, c);
          if (std::isnan(exact)) {
            ASSERT_TRUE(std::isnan(got)) << "row " << r << ", column " << c;
          } else {
            ASSERT_EQ(got, rounded<TypeParam>(exact)) << "row " << r << ", column " << c;
          }
        }
      }
    }
  }
}

TYPED_TEST(Int8, LinearOfZerosIsZero) {
  Layer<TypeParam> layer(3, 9, 70);
  layer.x.fill([](int64_t r, int64_t k) { return r == 1 ? 1.0 : k % 2 == 0 ? 0.0 : -0.0; });
  layer.run();
  for (int64_t c = 0; c < 9; ++c) ASSERT_TRUE(layer.out.value(0, c) == 0 && layer.out.value(2, c) == 0);
}

// A list that is read in windows and one that is brought together, a range, and all; numbers of no special
// kind, so that any other rounding or order would show.
TYPED_TEST(Int8, FfnRowsAloneAreRowsTogether) {
  const int64_t rows = 400, hidden = 35, neurons = 2100, width = 13;
  Guarded<TypeParam> x({rows, hidden}, 1), residual({rows, width}, 4);
  Guarded<int8_t> gate({neurons, hidden}, 2), up({neurons, hidden}, 3), down({width, neurons}, 5);
  Guarded<float> gate_scale({neurons}), up_scale({neurons}), down_scale({width});
  x.real(1), residual.real(2);
  for (int64_t r = 0; r < rows; r += 3) x(r, r % hidden) = from_float<TypeParam>(900.0f);
  gate.integers(3, -128, 127), up.integers(4, -128, 127), down.integers(5, -128, 127);
  for (auto* scale : {&gate_scale, &up_scale, &down_scale})
    scale->fill([](int64_t, int64_t j) { return 0.0003 + 0.00002 * static_cast<double>(j % 7); });
  std::vector<int32_t> dense, apart, sparse;
  for (int32_t j = static_cast<int32_t>(neurons); j-- > 0;) {
    if (j % 5 != 3) dense.push_back(j);                      // backwards
    if (j % 700 >= 10 && j % 700 < 200) apart.push_back(j);  // with windows between that hold none
    if (j % 50 == 7) sparse.push_back(j);
  }
  Guarded<int32_t> many({static_cast<int64_t>(dense.size())}), two({static_cast<int64_t>(apart.size())}),
      few({static_cast<int64_t>(sparse.size())});
  two.fill([&](int64_t, int64_t i) { return apart[static_cast<size_t>(i)]; });
  many.fill([&](int64_t, int64_t i) { return dense[static_cast<size_t>(i)]; });
  few.fill([&](int64_t, int64_t i) { return sparse[static_cast<size_t>(i)]; });
  const std::vector<int64_t> one = {65, 100};
  const std::vector<int64_t> none = {};
  for (const flashu_selection& selection : {select_all(), select_runs(one), select_runs(none),
                                            select_index(many), select_index(two), select_index(few)}) {
    const auto run = [&](int64_t first, int64_t count) {
      Guarded<TypeParam> out({count, width}, 7);
      FfnArgs args{};
      args.x = tensor(&x(first, 0), dtype_of<TypeParam>(), {count, hidden}, {hidden + 1, 1});
      args.residual = tensor(&residual(first, 0), dtype_of<TypeParam>(), {count, width}, {width + 4, 1});
      args.w_gate = gate, args.w_up = up, args.w_down = down;
      args.gate_scale = gate_scale, args.up_scale = up_scale, args.down_scale = down_scale;
      args.selection = selection;
      args.out = out;
      gathered_ffn(args);
      EXPECT_TRUE(out.intact());
      return out;
    };
    const Guarded<TypeParam> together = run(0, rows);
    for (const int32_t threads : {1, 2, 3}) {
      const Threads pretended(threads);
      for (const int64_t count : {1, 2, 3, 4, 5, 30}) {
        const int64_t first = rows - count;
        const Guarded<TypeParam> part = run(first, count);
        for (int64_t r = 0; r < count; ++r) {
          for (int64_t c = 0; c < width; ++c) {
            ASSERT_TRUE(std::isfinite(part.value(r, c)));
            ASSERT_EQ(part.value(r, c), together.value(first + r, c)) << count << " rows, row " << r;
          }
        }
      }
    }
  }
}

}  // namespace
}  // namespace flashu::test
