// Linear layers on the CPU: exact integers around every edge of its blocking, activations against double,
// rows that do not depend on anything else, empty sizes, errors.
#include "flashu/linear.hpp"

#include <cmath>
#include <limits>
#include <numeric>

#include "epilogues.hpp"
#include "guarded.hpp"

namespace flashu::test {
namespace {

template <class T>
class Linear : public ::testing::Test {};
using Storage = ::testing::Types<float, bfloat16, float16>;
TYPED_TEST_SUITE(Linear, Storage);

// Every tensor with a stride of its own.
template <class T>
struct Operands {
  Guarded<T> x, weight, bias, residual, out;
  int64_t m, n, k;

  Operands(int64_t rows, int64_t columns, int64_t depth)
      : x({rows, depth}, 3),
        weight({columns, depth}, 5),
        bias({columns}),
        residual({rows, columns}, 7),
        out({rows, columns}, 9),
        m(rows),
        n(columns),
        k(depth) {}

  Operands& integers() {
    x.integers(1, -2, 2);
    weight.integers(2, -2, 2);
    bias.integers(3, -4, 4);
    residual.integers(4, -4, 4);
    return *this;
  }
  Operands& real() {
    x.real(1);
    weight.real(2, 1 / std::sqrt(static_cast<float>(std::max<int64_t>(k, 1))));
    bias.real(3);
    residual.real(4);
    return *this;
  }
  LinearArgs args() const {
    LinearArgs args{};
    args.x = x;
    args.weight = weight;
    args.bias = bias;
    args.residual = residual;
    args.out = out;
    return args;
  }
};

TYPED_TEST(Linear, IsExactOnIntegersAtEveryEdge) {
  const auto exact = [](int64_t m, int64_t n, int64_t k) {
    SCOPED_TRACE(std::to_string(m) + " x " + std::to_string(n) + " x " + std::to_string(k));
    for (const int32_t count : kThreadCounts) {
      const Threads threads(count);
      for (const bool added : {true, false}) {
        auto o = Operands<TypeParam>(m, n, k).integers();
        LinearArgs args = o.args();
        if (!added) args.bias = args.residual = flashu_tensor{};
        linear(args);
        for (int64_t r = 0; r < m; ++r) {
          for (int64_t c = 0; c < n; ++c) {
            float sum = added ? o.bias.value(0, c) + o.residual.value(r, c) : 0;
            for (int64_t i = 0; i < k; ++i) sum += o.x.value(r, i) * o.weight.value(c, i);
            ASSERT_EQ(o.out.value(r, c), rounded<TypeParam>(static_cast<double>(sum)))
                << "row " << r << ", column " << c;
          }
        }
        ASSERT_TRUE(o.out.intact());
      }
    }
  };
  for (const int64_t m : {1, 2, 5, 6, 7, 12, 13, 97, 193, 1021}) exact(m, 35, 21);
  for (const int64_t n : {1, 4, 7, 8, 9, 15, 16, 17, 31, 32, 33, 129, 257}) exact(5, n, 20);
  for (const int64_t k : {0, 1, 2, 15, 17, 31, 33, 63, 65, 127, 129, 257, 385, 769}) {
    for (const int64_t m : {1, 3, 13}) exact(m, 9, k);
  }
  exact(200, 260, 400);
  exact(300, 35, 521);
  exact(0, 3, 4);
  exact(3, 0, 4);
}

TYPED_TEST(Linear, AddsTheBiasBeforeTheActivationAndTheResidualAfterIt) {
  for (const flashu_epilogue epilogue : kAll) {
    for (const int64_t k : {0, 40}) {
      auto o = Operands<TypeParam>(4, 37, k).real();
      LinearArgs args = o.args();
      args.epilogue = epilogue;
      linear(args);
      for (int64_t r = 0; r < o.m; ++r) {
        for (int64_t c = 0; c < o.n; ++c) {
          double sum = static_cast<double>(o.bias.value(0, c));
          for (int64_t i = 0; i < k; ++i)
            sum += static_cast<double>(o.x.value(r, i)) * static_cast<double>(o.weight.value(c, i));
          const double y = activation(epilogue, sum) + static_cast<double>(o.residual.value(r, c));
          const double value = static_cast<double>(o.out.value(r, c));
          const double spacing = std::is_same_v<TypeParam, bfloat16>  ? 0x1p-8
                                 : std::is_same_v<TypeParam, float16> ? 0x1p-11
                                                                      : 0x1p-22;
          ASSERT_NEAR(value, y, 1.01 * spacing * std::fabs(y) + 2e-6)
              << "epilogue " << epilogue << ", row " << r << ", column " << c;
        }
      }
      ASSERT_TRUE(o.out.intact());
    }
  }
}

// One input and a weight of one: the activation alone.
TEST(LinearActivation, IsThatOfDoubleEverywhere) {
  constexpr int64_t kCount = 40001;
  Owned<float> x({kCount, 1});
  for (int64_t i = 0; i < kCount; ++i) x.data[static_cast<size_t>(i)] = static_cast<float>(i - 20000) * 1e-3f;
  const Owned<float> one({1, 1}, {1.0f});
  Owned<float> out({kCount, 1});
  for (const flashu_epilogue epilogue : kAll) {
    LinearArgs args{};
    args.x = x;
    args.weight = one;
    args.out = out;
    args.epilogue = epilogue;
    linear(args);
    for (size_t i = 0; i < out.data.size(); ++i) {
      const double v = static_cast<double>(x.data[i]);
      ASSERT_NEAR(static_cast<double>(out.data[i]), activation(epilogue, v),
                  1.6e-7 * std::max(1.0, std::fabs(v)))
          << "epilogue " << epilogue << " of " << v;
    }
  }
}

TEST(LinearActivation, OfWhatIsNotFinite) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  const Owned<float> x({5, 1}, {kInfinity, std::nanf(""), 1e30f, -1e30f, 0.0f});
  const Owned<float> one({1, 1}, {1.0f});
  for (const flashu_epilogue epilogue : kAll) {
    Owned<float> out({5, 1});
    LinearArgs args{};
    args.x = x;
    args.weight = one;
    args.out = out;
    args.epilogue = epilogue;
    linear(args);
    EXPECT_EQ(out.data[0], kInfinity);
    EXPECT_TRUE(std::isnan(out.data[1]));
    EXPECT_EQ(out.data[2], 1e30f);
    EXPECT_EQ(out.data[3], epilogue == FLASHU_EPILOGUE_NONE ? -1e30f : 0.0f);
    EXPECT_EQ(out.data[4], 0.0f);
  }
}

// The same row in every place, with every number of rows and threads, and a column in every place too.
TYPED_TEST(Linear, AValueHasTheSameBitsInAnyCompany) {
  constexpr int64_t kColumns = 67;
  constexpr int64_t kDepth = 203;
  for (const flashu_epilogue epilogue : kAll) {
    auto alone = Operands<TypeParam>(1, kColumns, kDepth).real();
    for (int64_t c = 0; c < kColumns; ++c) {
      // Equal columns: what differs is only where they stand.
      for (int64_t i = 0; i < kDepth; ++i) alone.weight(c, i) = alone.weight(0, i);
      alone.bias(0, c) = alone.bias(0, 0);
      alone.residual(0, c) = alone.residual(0, 0);
    }
    LinearArgs args = alone.args();
    args.epilogue = epilogue;
    linear(args);
    for (int64_t c = 1; c < kColumns; ++c) ASSERT_EQ(alone.out.value(0, c), alone.out.value(0, 0));
    for (const int64_t m : {1, 2, 3, 4, 5, 13, 200}) {
      for (const int32_t count : {1, 2, 4}) {
        const Threads threads(count);
        for (const int64_t place : {int64_t{0}, m / 2, m - 1}) {
          auto o = Operands<TypeParam>(m, kColumns, kDepth).real();
          for (int64_t i = 0; i < kDepth; ++i) o.x(place, i) = alone.x(0, i);
          for (int64_t c = 0; c < kColumns; ++c) o.residual(place, c) = alone.residual(0, c);
          LinearArgs together = o.args();
          together.weight = alone.weight;
          together.bias = alone.bias;
          together.epilogue = epilogue;
          linear(together);
          for (int64_t c = 0; c < kColumns; ++c) {
            ASSERT_EQ(o.out.value(place, c), alone.out.value(0, c))
                << "row " << place << " of " << m << ", column " << c << ", " << count << " threads";
          }
        }
      }
    }
  }
}

// Weights side by side against a call for each. `one`: all are slices of one matrix, and the biases of one
// vector.
template <class T>
void expect_columns_of_separate_calls(int64_t m, const std::vector<int64_t>& columns, bool one, bool biased,
                                      int32_t epilogue) {
  const int64_t n = std::accumulate(columns.begin(), columns.end(), int64_t{0});
  constexpr int64_t kDepth = 83;
  auto o = Operands<T>(m, n, kDepth).real();
  Operands<T> separate(m, n, kDepth);
  std::vector<Guarded<T>> weights, biases;  // of their own memory
  weights.reserve(columns.size());
  biases.reserve(columns.size());
  LinearsArgs args{};
  args.epilogue = epilogue;
  args.count = static_cast<int32_t>(columns.size());
  args.x = o.x;
  args.residual = o.residual;
  args.out = o.out;
  int64_t first = 0;
  for (size_t i = 0; i < columns.size(); ++i) {
    const auto rows_from = [&](const flashu_tensor& whole, int64_t dimension) {
      flashu_tensor part = whole;
      part.sizes[dimension] = columns[i];
      part.data = static_cast<T*>(whole.data) + first * whole.strides[dimension];
      return part;
    };
    args.weights[i] = rows_from(o.weight, 0);
    args.biases[i] = rows_from(o.bias, 0);
    if (!one) {
      Guarded<T>& weight = weights.emplace_back(std::vector<int64_t>{columns[i], kDepth}, 2);
      Guarded<T>& bias = biases.emplace_back(std::vector<int64_t>{columns[i]});
      for (int64_t c = 0; c < columns[i]; ++c) {
        bias(0, c) = o.bias(0, first + c);
        for (int64_t k = 0; k < kDepth; ++k) weight(c, k) = o.weight(first + c, k);
      }
      args.weights[i] = weight;
      args.biases[i] = bias;
    }
    if (!biased || (!one && i % 2 == 1)) args.biases[i] = flashu_tensor{};
    LinearArgs alone{};
    alone.epilogue = epilogue;
    alone.x = o.x;
    alone.weight = args.weights[i];
    alone.bias = args.biases[i];
    alone.residual = rows_from(o.residual, 1);
    alone.out = rows_from(separate.out, 1);
    linear(alone);
    first += columns[i];
  }
  for (const int32_t count : kThreadCounts) {
    const Threads threads(count);
    o.out.fill([](int64_t, int64_t) { return 7; });
    linears(args);
    for (int64_t r = 0; r < m; ++r) {
      for (int64_t c = 0; c < n; ++c) {
        ASSERT_EQ(o.out.value(r, c), separate.out.value(r, c))
            << "row " << r << ", column " << c << ", " << count << " threads";
      }
    }
    ASSERT_TRUE(o.out.intact());
  }
}

TYPED_TEST(Linear, SeveralWeightsGiveTheColumnsOfSeparateCalls) {
  const std::vector<int64_t> widths[] = {{5},           {32, 64},       {40, 7, 33}, {64, 32, 32},
                                         {16, 0, 3, 8}, {1, 1, 1, 130}, {0, 9}};
  for (const auto& columns : widths) {
    for (const int64_t m : {1, 3, 13, 130}) {
      for (const bool one : {true, false}) {
        for (const bool biased : {true, false}) {
          const std::string place = std::to_string(m) + " rows, " + std::to_string(columns.size()) +
                                    " weights of " + std::to_string(columns[0]) + " columns and on";
          SCOPED_TRACE(place + (one ? ", one matrix" : "") + (biased ? ", biases" : ""));
          expect_columns_of_separate_calls<TypeParam>(m, columns, one, biased,
                                                      biased ? FLASHU_EPILOGUE_SILU : FLASHU_EPILOGUE_NONE);
        }
      }
    }
  }
  expect_columns_of_separate_calls<TypeParam>(1500, {33, 20}, false, true, FLASHU_EPILOGUE_GELU);
}

TEST(LinearErrors, OfSeveralWeightsNameTheirPlaces) {
  auto o = Operands<float>(3, 10, 7).integers();
  LinearsArgs valid{};
  valid.count = 2;
  valid.x = o.x;
  for (int i = 0; i < 2; ++i) {
    valid.weights[i] = o.weight;
    valid.biases[i] = o.bias;
    valid.weights[i].sizes[0] = valid.biases[i].sizes[0] = 5;
  }
  valid.out = o.out;
  const auto expect = [&](const char* part, auto change) {
    LinearsArgs args = valid;
    change(args);
    const std::string said = error_of([&] { linears(args); });
    EXPECT_NE(said.find(std::string("linears: ") + part), std::string::npos)
        << part << " is not in: " << said;
  };
  expect("count: expected 1 to 4 weights, got 0", [](LinearsArgs& a) { a.count = 0; });
  expect("count: expected 1 to 4 weights, got 5", [](LinearsArgs& a) { a.count = 5; });
  expect("weights[2]: expected 2 dimensions", [](LinearsArgs& a) { a.count = 3; });
  expect("weights[1]: expected size 7", [](LinearsArgs& a) { a.weights[1].sizes[1] = 6; });
  expect("weights[1]: expected float32", [](LinearsArgs& a) { a.weights[1].dtype = FLASHU_F16; });
  expect("biases[1]: expected size 5", [](LinearsArgs& a) { a.biases[1].sizes[0] = 4; });
  expect("biases[0]: expected float32", [](LinearsArgs& a) { a.biases[0].dtype = FLASHU_F16; });
  expect("out: expected size 10", [](LinearsArgs& a) { a.out.sizes[1] = 9; });
  expect("residual: expected size 10", [&](LinearsArgs& a) {
    a.residual = o.residual;
    a.residual.sizes[1] = 9;
  });
  expect("out: expected memory of its own, got one that overlaps weights[1]",
         [](LinearsArgs& a) { a.weights[1].data = a.out.data; });
  expect("out: expected memory of its own, got one that overlaps biases[1]",
         [](LinearsArgs& a) { a.biases[1].data = a.out.data; });
  LinearsArgs args = valid;
  args.weights[2].ndim = 99;  // behind `count`, so it is not looked at
  EXPECT_EQ(error_of([&] { linears(args); }), "");
}

TEST(LinearErrors, AreNamedAndWriteNothing) {
  auto o = Operands<float>(3, 5, 7).integers();
  o.out.fill([](int64_t, int64_t) { return 7; });
  const auto text = [&](auto change) {
    LinearArgs args = o.args();
    change(args);
    return error_of([&] { linear(args); });
  };
  const auto expect = [&](const char* part, auto change) {
    const std::string said = text(change);
    EXPECT_NE(said.find(std::string("linear: ") + part), std::string::npos) << part << " is not in: " << said;
  };
  expect("x: expected float32", [](LinearArgs& a) { a.x.dtype = FLASHU_I32; });
  expect("weight: expected", [](LinearArgs& a) { a.weight.dtype = FLASHU_F16; });
  expect("weight: expected", [](LinearArgs& a) { a.weight.sizes[1] -= 1; });
  expect("weight: expected", [](LinearArgs& a) { a.weight.ndim = 1; });
  expect("weight: expected", [](LinearArgs& a) { a.weight.strides[1] = 2; });
  expect("bias: expected", [](LinearArgs& a) { a.bias.sizes[0] -= 1; });
  expect("bias: expected", [](LinearArgs& a) { a.bias.dtype = FLASHU_BF16; });
  expect("bias: expected", [](LinearArgs& a) { a.bias.strides[0] = 2; });
  expect("bias: expected", [](LinearArgs& a) {
    a.bias.ndim = 2;
    a.bias.sizes[1] = a.bias.strides[1] = 1;
  });
  expect("residual: expected", [](LinearArgs& a) { a.residual.sizes[1] -= 1; });
  expect("residual: expected", [](LinearArgs& a) { a.residual.sizes[0] -= 1; });
  expect("out: expected", [](LinearArgs& a) { a.out.sizes[1] -= 1; });
  expect("out: expected", [](LinearArgs& a) { a.out.dtype = FLASHU_BF16; });
  expect("out: expected", [](LinearArgs& a) { a.out.data = a.x.data; });
  expect("out: expected", [](LinearArgs& a) { a.out.data = a.weight.data; });
  expect("out: expected", [](LinearArgs& a) { a.out.data = a.bias.data; });
  expect("out: expected", [](LinearArgs& a) { a.out = a.residual; });
  expect("epilogue: expected none, gelu, gelu_tanh or silu (0 to 3), got 4",
         [](LinearArgs& a) { a.epilogue = 4; });
  expect("epilogue: expected", [](LinearArgs& a) { a.epilogue = -1; });
  alignas(64) static char small[64];
  expect("workspace: expected", [](LinearArgs& a) {
    a.workspace = small;
    a.workspace_bytes = 64;
  });
  for (int64_t r = 0; r < o.m; ++r) {
    for (int64_t c = 0; c < o.n; ++c) ASSERT_EQ(o.out.value(r, c), 7.0f);
  }
  EXPECT_EQ(text([](LinearArgs&) {}), "");
}

}  // namespace
}  // namespace flashu::test
