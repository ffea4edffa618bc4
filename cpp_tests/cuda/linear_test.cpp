// The linear layer on the device against a reference in double: every kernel and layout, every activation,
// exact integers, parts of K, rows that do not depend on each other, empty sizes.
#include "flashu/linear.hpp"

#include <algorithm>
#include <numeric>

#include "core/ffn_choice.hpp"
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
    x = whole<T>({x.size(0), x.size(1)}, 1);
    weight = whole<T>({weight.size(0), weight.size(1)}, 2);
    bias = whole<T>({bias.size(0)}, 3);
    residual = whole<T>({residual.size(0), residual.size(1)}, 4);
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
      auto o = Operands<TypeParam>(m, n, k).integers();
      for (const bool biased : {true, false}) {
        expect_result(o, o.run(FLASHU_EPILOGUE_NONE, biased, true), FLASHU_EPILOGUE_NONE, biased, true, true);
      }
    }
  }
}

// Sums over a long K are made of parts, by one block or by several, whose sum is finished.
TYPED_TEST(DeviceLinear, PartsOfALongK) {
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
  for (const int capability : {90, 80}) {
    if (!use_capability(capability)) continue;
    for (const int64_t k : {72, 2056}) {
      Operands<TypeParam> many(300, 40, k);
      const auto together = many.run(FLASHU_EPILOGUE_GELU, true, true);
      for (const auto& [first, count] : {std::array<int64_t, 2>{0, 1}, {17, 3}, {130, 129}}) {
        Operands<TypeParam> part(count, 40, k);
        part.x.fill([&, begin = first](int64_t i) { return many.x[begin * k + i]; });
        part.residual.fill([&, begin = first](int64_t i) { return many.residual[begin * 40 + i]; });
        const auto alone = part.run(FLASHU_EPILOGUE_GELU, true, true);
        for (int64_t i = 0; i < count * 40; ++i)
          ASSERT_EQ(to_float(alone[i]), to_float(together[first * 40 + i])) << "element " << i;
      }
    }
  }
}

// One launch where the weights are one matrix, and one for each otherwise.
TYPED_TEST(DeviceLinear, SeveralWeightsGiveTheColumnsOfSeparateCalls) {
  constexpr int64_t kRows = 37;
  const std::vector<int64_t> widths[] = {{40, 8, 24}, {33, 7, 24}};
  for (const int capability : {90, 80}) {
    if (!use_capability(capability)) continue;
    for (const auto& columns : widths) {
      for (const int64_t k : {72, 2104}) {
        for (const bool one : {true, false}) {
          const int64_t n = std::accumulate(columns.begin(), columns.end(), int64_t{0});
          Operands<TypeParam> o(kRows, n, k);
          Guarded<TypeParam> separate({kRows, n});
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
  for (const int64_t padding : {0, 8}) {
    check_all(Operands<TypeParam>(5, 24, 0, padding));
    check_all(Operands<TypeParam>(0, 24, 16, padding));
    check_all(Operands<TypeParam>(5, 0, 16, padding));
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
