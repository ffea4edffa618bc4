// The linear layer on the device against a reference in double: every kernel and layout, every activation,
// exact integers, parts of K, rows that do not depend on each other, empty sizes; the same of few rows.
#include "flashu/linear.hpp"

#include <algorithm>
#include <limits>
#include <numeric>

#include "core/ffn_choice.hpp"
#include "cuda/ffn.hpp"
#include "cuda/support.hpp"
#include "epilogues.hpp"

namespace flashu::test {
namespace {

template <class T>
struct Operands {
  Guarded<T> x, weight, bias, residual, out;

  // `padding` behind rows and `offset` off alignment put the operands outside what TMA and cp.async take.
  Operands(int64_t m, int64_t n, int64_t k, int64_t padding = 0, int64_t offset = 0)
      : x(normal<T>({m, k}, 1, padding, 1, offset)),
        weight(normal<T>({n, k}, 2, padding, 1 / std::sqrt(static_cast<float>(std::max<int64_t>(k, 1))),
                         offset)),
        bias(normal<T>({n}, 3)),
        residual(normal<T>({m, n}, 4, 1)),
        out({m, n}, padding) {}

  Operands& integers() {
    uint32_t seed = 0;
    for (Guarded<T>* const tensor : {&x, &weight, &bias, &residual}) {
      const auto values = whole<T>({tensor->count()}, ++seed);
      tensor->fill([&](int64_t i) { return values[i]; });
    }
    return *this;
  }

  // The rows from `first` on, which are as many as this has, of x and the residual of others.
  Operands& rows_of(const Operands& others, int64_t first) {
    x.fill([&](int64_t i) { return others.x[first * x.size(1) + i]; });
    residual.fill([&](int64_t i) { return others.residual[first * residual.size(1) + i]; });
    return *this;
  }

  Guarded<T> run(int32_t epilogue, bool biased, bool added) {
    LinearArgs args{};
    args.struct_size = sizeof(args);
    args.epilogue = epilogue;
    args.x = x.upload();
    args.weight = weight.upload();
    if (biased) args.bias = bias.upload();
    if (added) args.residual = residual.upload();
    args.out = out.upload();
    check(flashu_linear_workspace(&args, &args.workspace_bytes));
    const DeviceWorkspace workspace(args.workspace_bytes);
    args.workspace = workspace.get().data;
    linear(args);
    device_synchronize();
    return out.download();
  }
};

// How far a sum may be off besides its rounding to T; a missing term is a hundred times as much.
template <class T>
constexpr double kNoise = std::is_same_v<T, bfloat16>  ? 1e-3
                          : std::is_same_v<T, float16> ? 2e-4
                                                       : 2e-5;

template <class T>
void expect_result(const Operands<T>& o, const Guarded<T>& got, int32_t epilogue, bool biased, bool added,
                   bool exact = false) {
  const int64_t n = o.weight.size(0), k = o.weight.size(1);
  const std::vector<double> x = o.x.values(), w = o.weight.values(), bias = o.bias.values(),
                            residual = o.residual.values(), y = got.values();
  for (int64_t i = 0; i < got.count(); ++i) {
    double sum = biased ? bias[static_cast<size_t>(i % n)] : 0;
    for (int64_t j = 0; j < k; ++j)
      sum += x[static_cast<size_t>(i / n * k + j)] * w[static_cast<size_t>(i % n * k + j)];
    const double value = activation(epilogue, sum) + (added ? residual[static_cast<size_t>(i)] : 0);
    const double is = y[static_cast<size_t>(i)];
    if (exact) {
      ASSERT_EQ(is, static_cast<double>(to_float(from_float<T>(static_cast<float>(value)))))
          << "element " << i;
    } else {
      ASSERT_LE(std::fabs(is - value), spacing<T>(value) + kNoise<T>) << "element " << i;
    }
  }
}

// `alone` are the rows of `together` from `first` on, bit for bit.
template <class T>
void expect_rows(const Guarded<T>& alone, const Guarded<T>& together, int64_t first) {
  for (int64_t i = 0; i < alone.count(); ++i) {
    ASSERT_EQ(to_float(alone[i]), to_float(together[first * together.size(1) + i])) << "element " << i;
  }
}

template <class T>
void check_all(Operands<T> o) {
  for (const flashu_epilogue epilogue : kAll) {
    for (const bool biased : {true, false}) {
      SCOPED_TRACE("epilogue " + std::to_string(epilogue) + (biased ? ", bias" : ""));
      const bool added = biased == (epilogue % 2 == 0);
      expect_result(o, o.run(epilogue, biased, added), epilogue, biased, added);
    }
  }
}

template <class T>
class DeviceLinear : public DeviceTest {};
TYPED_TEST_SUITE(DeviceLinear, Storage3);

TYPED_TEST(DeviceLinear, EveryActivationOnEveryKernel) {
  cuda::ffn_limits().decodes = false;
  for (const int capability : {90, 80}) {
    if (!use_capability(capability)) continue;
    this->under_every_schedule([] { check_all(Operands<TypeParam>(70, 72, 136)); });
    // Rows that are not aligned.
    check_all(Operands<TypeParam>(33, 29, 45, 1));
    check_all(Operands<TypeParam>(5, 29, 45, 0, 1));
  }
}

TYPED_TEST(DeviceLinear, IsExactOnIntegers) {
  for (const int capability : {90, 80}) {
    if (!use_capability(capability)) continue;
    for (const auto& [m, n, k] :
         {std::array<int64_t, 3>{1, 8, 96}, {130, 40, 200}, {64, 264, 72}, {3, 7, 50}}) {
      cuda::ffn_limits().decodes = false;
      auto o = Operands<TypeParam>(m, n, k).integers();
      for (const bool biased : {true, false}) {
        expect_result(o, o.run(FLASHU_EPILOGUE_NONE, biased, true), FLASHU_EPILOGUE_NONE, biased, true, true);
      }
    }
  }
}

// Sums over a long K are made of parts, by one block or by several, whose sum is finished.
TYPED_TEST(DeviceLinear, PartsOfALongK) {
  cuda::ffn_limits().decodes = false;
  for (const int64_t m : {1, 40}) {
    auto o = Operands<TypeParam>(m, 72, 2104).integers();
    expect_result(o, o.run(FLASHU_EPILOGUE_NONE, true, true), FLASHU_EPILOGUE_NONE, true, true, true);
    for (const flashu_epilogue epilogue : kAll) {
      Operands<TypeParam> real(m, 72, 2104);
      expect_result(real, real.run(epilogue, true, true), epilogue, true, true);
    }
  }
}

// The number of rows chooses tiles, and decides whether blocks share one.
TYPED_TEST(DeviceLinear, RowsDoNotDependOnEachOther) {
  cuda::ffn_limits().decodes = false;
  for (const int capability : {90, 80}) {
    if (!use_capability(capability)) continue;
    for (const int64_t k : {72, 2056}) {
      Operands<TypeParam> many(300, 40, k);
      const auto together = many.run(FLASHU_EPILOGUE_GELU, true, true);
      for (const auto& [first, count] : {std::array<int64_t, 2>{0, 1}, {17, 3}, {130, 129}}) {
        auto part = Operands<TypeParam>(count, 40, k).rows_of(many, first);
        expect_rows(part.run(FLASHU_EPILOGUE_GELU, true, true), together, first);
      }
    }
  }
}

// At most 16 rows have a kernel of their own, whatever their layout: odd sizes, rows anywhere, K of less than
// a step, of fewer steps than a block has warps, and of many.
TYPED_TEST(DeviceLinear, FewRowsOfEverySize) {
  for (const auto& [n, k, padding, offset] : {std::array<int64_t, 4>{8, 96, 0, 0},
                                              {40, 264, 8, 0},
                                              {29, 45, 1, 0},
                                              {29, 45, 3, 0},
                                              {16, 80, 0, 1},
                                              {1, 3, 0, 0},
                                              {17, 1032, 0, 0}}) {
    for (int64_t m = 1; m <= core::kFewRows; ++m) {
      SCOPED_TRACE(std::to_string(m) + " x " + std::to_string(n) + " x " + std::to_string(k));
      auto o = Operands<TypeParam>(m, n, k, padding, offset).integers();
      const bool biased = m % 2 == 0;
      expect_result(o, o.run(FLASHU_EPILOGUE_NONE, biased, !biased), FLASHU_EPILOGUE_NONE, biased, !biased,
                    true);
    }
  }
}

TYPED_TEST(DeviceLinear, EveryActivationOfFewRows) {
  this->under_every_schedule([] {
    check_all(Operands<TypeParam>(3, 40, 136));
    check_all(Operands<TypeParam>(11, 40, 136));
    check_all(Operands<TypeParam>(5, 29, 45, 0, 1));
  });
}

// Nor on their place, nor on how rows lie in memory. Seventeen rows are as many.
TYPED_TEST(DeviceLinear, FewRowsDoNotDependOnEachOther) {
  for (const int64_t k : {72, 45, 1032}) {
    Operands<TypeParam> all(core::kFewRows, 24, k);
    const auto together = all.run(FLASHU_EPILOGUE_GELU, true, true);
    for (const int64_t padding : {0, 3}) {
      for (const auto& [first, count] : {std::array<int64_t, 2>{0, 1}, {15, 1}, {3, 8}, {5, 9}}) {
        auto part = Operands<TypeParam>(count, 24, k, padding).rows_of(all, first);
        expect_rows(part.run(FLASHU_EPILOGUE_GELU, true, true), together, first);
      }
    }
  }
  Operands<TypeParam> many(40, 24, 1032);
  auto part = Operands<TypeParam>(core::kFewRows + 1, 24, 1032).rows_of(many, 20);
  expect_rows(part.run(FLASHU_EPILOGUE_GELU, true, true), many.run(FLASHU_EPILOGUE_GELU, true, true), 20);
}

TYPED_TEST(DeviceLinear, BadValuesStayInTheirRow) {
  for (const int64_t m : {7, 16}) {
    Operands<TypeParam> o(m, 24, 100);
    const auto expected = o.run(FLASHU_EPILOGUE_NONE, true, true);
    o.x[3 * 100 + 5] = from_float<TypeParam>(std::numeric_limits<float>::quiet_NaN());
    o.x[6 * 100 + 99] = from_float<TypeParam>(std::numeric_limits<float>::infinity());
    const auto got = o.run(FLASHU_EPILOGUE_NONE, true, true);
    for (int64_t i = 0; i < m * 24; ++i) {
      if (i / 24 == 3 || i / 24 == 6) {
        ASSERT_FALSE(std::isfinite(to_float(got[i]))) << "element " << i;
      } else {
        ASSERT_EQ(to_float(got[i]), to_float(expected[i])) << "element " << i;
      }
    }
  }
}

// One launch where the weights are one matrix, and one for each otherwise.
TYPED_TEST(DeviceLinear, SeveralWeightsGiveTheColumnsOfSeparateCalls) {
  const std::vector<int64_t> widths[] = {{40, 8, 24}, {33, 7, 24}};
  for (const auto& [capability, rows] : {std::array<int, 2>{90, 37}, {90, 3}, {80, 37}}) {
    if (!use_capability(capability)) continue;
    for (const auto& columns : widths) {
      for (const int64_t k : {72, 2104}) {
        for (const bool one : {true, false}) {
          const int64_t n = std::accumulate(columns.begin(), columns.end(), int64_t{0});
          Operands<TypeParam> o(rows, n, k);
          Guarded<TypeParam> separate({rows, n});
          LinearsArgs args{};
          args.struct_size = sizeof(args);
          args.epilogue = FLASHU_EPILOGUE_GELU;
          args.count = static_cast<int32_t>(columns.size());
          args.x = o.x.upload();
          args.residual = o.residual.upload();
          args.out = o.out.upload();
          const flashu_tensor weight = o.weight.upload(), bias = o.bias.upload(), apart = separate.upload();
          int64_t first = 0;
          for (size_t i = 0; i < columns.size(); ++i) {
            const auto rows_from = [&](const flashu_tensor& whole, int64_t dimension, int64_t from) {
              flashu_tensor part = whole;
              part.sizes[dimension] = columns[i];
              part.data = static_cast<TypeParam*>(whole.data) + from * whole.strides[dimension];
              return part;
            };
            // In another order they are not one behind the other.
            const int64_t from = one ? first : n - first - columns[i];
            args.weights[i] = rows_from(weight, 0, from);
            if (one || i != 1) args.biases[i] = rows_from(bias, 0, from);
            LinearArgs alone{};
            alone.struct_size = sizeof(alone);
            alone.epilogue = args.epilogue;
            alone.x = args.x;
            alone.weight = args.weights[i];
            alone.bias = args.biases[i];
            alone.residual = rows_from(args.residual, 1, first);
            alone.out = rows_from(apart, 1, first);
            check(flashu_linear_workspace(&alone, &alone.workspace_bytes));
            const DeviceWorkspace workspace(alone.workspace_bytes);
            alone.workspace = workspace.get().data;
            linear(alone);
            device_synchronize();
            first += columns[i];
          }
          check(flashu_linears_workspace(&args, &args.workspace_bytes));
          const DeviceWorkspace workspace(args.workspace_bytes);
          args.workspace = workspace.get().data;
          linears(args);
          device_synchronize();
          const auto together = o.out.download(), expected = separate.download();
          for (int64_t i = 0; i < together.count(); ++i)
            ASSERT_EQ(to_float(together[i]), to_float(expected[i])) << "element " << i;
        }
      }
    }
  }
}

TYPED_TEST(DeviceLinear, NothingToMultiply) {
  for (const int64_t rows : {5, 20}) {
    for (const int64_t padding : {0, 8}) {
      check_all(Operands<TypeParam>(rows, 24, 0, padding));
      check_all(Operands<TypeParam>(0, 24, 16, padding));
      check_all(Operands<TypeParam>(rows, 0, 16, padding));
    }
  }
}

// Among the kernels for sm_90, or a row's bits would depend on how many rows there are.
TEST(DeviceLinearChoice, AlignedRowsStayOnHopper) {
  core::FfnQuestion q{};
  q.has_down = q.aligned = q.has_sm90 = true;
  q.type = FLASHU_BF16;
  q.block = 1;
  q.capability = 90;
  for (const int multiprocessors : {7, 66, 114, 132}) {
    q.multiprocessors = multiprocessors;
    for (const int64_t n : {8, 64, 256, 1536, 2048, 3584, 8960}) {
      for (const int64_t k : {64, 1536, 2048, 3584, 8960}) {
        for (int64_t m = 1; m < 5000; m += m / 3 + 1) {
          q.rows = m;
          q.width = n;
          q.neurons = k;
          ASSERT_EQ(core::ffn_candidates(q, false).front().tile.kernel, core::FfnKernel::kSm90)
              << m << " x " << n << " x " << k << " on " << multiprocessors;
        }
      }
    }
  }
}

}  // namespace
}  // namespace flashu::test
