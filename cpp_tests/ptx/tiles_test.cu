// Every compiled tile of the FFN's tensor core kernels by its host entry point, also where the choice would
// take another one, at sizes whose last tiles are not whole.
#include "core/ffn_tiles.hpp"
#include "cuda/ffn_sm90.hpp"
#include "cuda/ffn_sum.hpp"
#include "cuda/support.hpp"

namespace flashu::test {
namespace {

using core::FfnFetch;
using core::FfnKernel;
using core::FfnTile;

constexpr int64_t kRows = 136, kDepth = 232, kIntermediate = 400;
constexpr int64_t kFirst = 8;  // of a range, whose first neurons are not selected
constexpr int64_t kLead = 3;

// Neurons in front of the selection may hold anything.
template <class T>
T unselected() {
  return from_float<T>(std::numeric_limits<float>::quiet_NaN());
}

template <class T>
class DeviceTiles : public DeviceOf<T> {};
using Storage2 = ::testing::Types<bfloat16, float16>;
TYPED_TEST_SUITE(DeviceTiles, Storage2);

double dot(const double* a, const double* b, int64_t n) {
  double sum = 0;
  for (int64_t k = 0; k < n; ++k) sum += a[k] * b[k];
  return sum;
}

template <class T>
void launch(const FfnTile& tile, const cuda::FfnGemm& gemm) {
  if (tile.kernel == FfnKernel::kSm90) {
    cuda::ffn_gemm_sm90(tile, gemm, dtype_of<T>(), nullptr, 3);
  } else {
    cuda::ffn_gemm_sm80(tile, gemm, dtype_of<T>(), nullptr);
  }
  device_synchronize();
}

template <class T>
void expect_close(const Guarded<T>& got, const std::vector<double>& want) {
  constexpr double kError = std::is_same_v<T, bfloat16> ? 1.0 / 128 : 1.0 / 1024;
  for (int64_t i = 0; i < got.count(); ++i) {
    const double value = want[static_cast<size_t>(i)], is = static_cast<double>(to_float(got[i]));
    ASSERT_LE(std::fabs(is - value), kError * std::fabs(value) + 2e-3)
        << "element " << i << ": expected " << value;
  }
}

// Neurons 0 to `columns`, as the tile's fetch takes them; empty for a range.
std::vector<int32_t> list_for(FfnFetch fetch, int64_t columns) {
  std::vector<int32_t> list;
  for (int64_t j = 0; j < columns && fetch == FfnFetch::kRuns; ++j)
    list.push_back(static_cast<int32_t>((j / 64 * 2 + 1) % 3 * 128 + 8 + j % 64));
  for (int64_t j = 0; j < columns && fetch == FfnFetch::kBlocks; ++j)
    list.push_back(static_cast<int32_t>(j / 8 * 5 % (kIntermediate / 8) * 8 + j % 8));
  const bool any = fetch == FfnFetch::kRows || fetch == FfnFetch::kThreads || fetch == FfnFetch::kVectors;
  for (int64_t j = 0; j < columns && any; ++j)
    list.push_back(static_cast<int32_t>((j * 7 + 3) % kIntermediate));
  return list;
}

template <class T>
void up_half(const FfnTile& tile, FfnFetch fetch) {
  const int64_t columns = fetch == FfnFetch::kRows ? 229 : fetch == FfnFetch::kRuns ? 192 : 232;
  auto a = normal<T>({kRows, kDepth}, 1, 8);
  auto gate = normal<T>({kIntermediate, kDepth}, 2, 8, 0.2f);
  auto up = normal<T>({kIntermediate, kDepth}, 3, 8, 0.2f);
  Guarded<T> out({kRows, columns}, fetch == FfnFetch::kRows ? 11 : 8);
  const std::vector<int32_t> list = list_for(fetch, columns);
  for (int64_t n = kFirst; n < kFirst + kLead && list.empty(); ++n) {
    for (int64_t k = 0; k < kDepth; ++k) gate[n * kDepth + k] = up[n * kDepth + k] = unselected<T>();
  }
  Guarded<int32_t> listed({std::max<int64_t>(1, static_cast<int64_t>(list.size()))});
  for (size_t j = 0; j < list.size(); ++j) listed[static_cast<int64_t>(j)] = list[j];
  const flashu_tensor a_d = a.upload(), gate_d = gate.upload(), up_d = up.upload(), out_d = out.upload();
  cuda::FfnGemm g{};
  g.a = a_d.data;
  g.a_stride = g.b_stride = g.b2_stride = kDepth + 8;
  g.m = kRows;
  g.b = gate_d.data;
  g.b2 = up_d.data;
  g.gated = true;
  g.n = columns;
  g.k = kDepth;
  g.intermediate = kIntermediate;
  g.list = list.empty() ? nullptr : static_cast<const int32_t*>(listed.upload().data);
  g.first = list.empty() ? kFirst : 0;
  g.lead = list.empty() ? kLead : 0;
  g.block = fetch == FfnFetch::kRuns ? 64 : fetch == FfnFetch::kBlocks ? 8 : 1;
  g.out = out_d.data;
  g.out_stride = columns + (fetch == FfnFetch::kRows ? 11 : 8);
  launch<T>(tile, g);
  const auto x = a.values(), gates = gate.values(), ups = up.values();
  std::vector<double> want;
  for (int64_t r = 0; r < kRows; ++r) {
    for (int64_t j = 0; j < columns; ++j) {
      if (list.empty() && j < kLead) {
        want.push_back(0);
        continue;
      }
      const int64_t n = list.empty() ? kFirst + j : list[static_cast<size_t>(j)];
      const double z =
          dot(&x[static_cast<size_t>(r * kDepth)], &gates[static_cast<size_t>(n * kDepth)], kDepth);
      want.push_back(z / (1 + std::exp(-z)) *
                     dot(&x[static_cast<size_t>(r * kDepth)], &ups[static_cast<size_t>(n * kDepth)], kDepth));
    }
  }
  expect_close(out.download(), want);
}

template <class T>
struct DownHalf {
  static constexpr int64_t kColumns = 294;
  Guarded<T> a = normal<T>({kRows, kDepth}, 1, 8);
  Guarded<T> down = normal<T>({kColumns, kIntermediate}, 2, 8, 0.2f);
  Guarded<T> residual = normal<T>({kRows, kColumns}, 3, 8);
  Guarded<T> out{{kRows, kColumns}, 10};
  Guarded<T> bias = normal<T>({kColumns}, 4);
  Guarded<float> partial{{kMostParts, kRows, kColumns}};

  static constexpr int64_t kMostParts = 3;

  DownHalf() {
    for (int64_t j = 0; j < kLead; ++j) {
      for (int64_t r = 0; r < kRows; ++r) a[r * kDepth + j] = T{};
      for (int64_t c = 0; c < kColumns; ++c) down[c * kIntermediate + kFirst + j] = unselected<T>();
    }
  }

  // finished: with a bias and SiLU.
  Guarded<T> run(const FfnTile& tile, int parts, bool spread, bool finished = false) {
    const flashu_tensor a_d = a.upload(), down_d = down.upload(), residual_d = residual.upload(),
                        out_d = out.upload(), partial_d = partial.upload();
    cuda::FfnGemm g{};
    g.a = a_d.data;
    g.a_stride = kDepth + 8;
    g.m = kRows;
    g.b = down_d.data;
    g.b_stride = kIntermediate + 8;
    g.n = kColumns;
    g.k = kDepth;
    g.intermediate = kIntermediate;
    g.first = kFirst;
    g.lead = kLead;
    g.residual = residual_d.data;
    g.residual_stride = kColumns + 8;
    g.out_stride = kColumns + 10;
    g.out = out_d.data;
    g.parts = parts;
    if (spread) g.partial = static_cast<float*>(partial_d.data);
    g.partial_stride = kColumns;
    if (finished) g.epilogue = {bias.upload().data, FLASHU_EPILOGUE_SILU};
    launch<T>(tile, g);
    if (spread) {
      cuda::ffn_sum({g.partial, parts, g.m, g.n, g.partial_stride, g.residual, g.residual_stride, g.out,
                     g.out_stride, g.epilogue},
                    dtype_of<T>(), nullptr);
      device_synchronize();
      partial.download();
    }
    return out.download();
  }

  std::vector<double> reference(bool finished = false) const {
    const auto x = a.values(), weights = down.values(), added = bias.values();
    std::vector<double> want = residual.values();
    for (int64_t r = 0; r < kRows; ++r) {
      for (int64_t c = 0; c < kColumns; ++c) {
        const double sum =
            dot(&x[static_cast<size_t>(r * kDepth + kLead)],
                &weights[static_cast<size_t>(c * kIntermediate + kFirst + kLead)], kDepth - kLead);
        const double z = sum + added[static_cast<size_t>(c)];
        want[static_cast<size_t>(r * kColumns + c)] += finished ? z / (1 + std::exp(-z)) : sum;
      }
    }
    return want;
  }
};

// A part to each block, or all of them in one: the same bits.
template <class T>
void down_half(const FfnTile& tile, bool finished) {
  DownHalf<T> half;
  const std::vector<double> want = half.reference(finished);
  expect_close(half.run(tile, 1, false, finished), want);
  if (tile.kernel != FfnKernel::kSm90) return;
  const auto together = half.run(tile, half.kMostParts, false, finished);
  expect_close(together, want);
  expect_equal(half.run(tile, half.kMostParts, true, finished), together);
}

template <class T>
void every_tile(FfnKernel kernel) {
  for (const FfnTile& tile : core::kFfnTiles) {
    if (tile.kernel != kernel) continue;
    SCOPED_TRACE(std::string(tile.up ? "up, " : "down, ") + std::to_string(tile.block_n) +
                 " columns, fetch " + std::to_string(static_cast<int>(tile.fetch)));
    if (!tile.up) {
      for (const bool finished : {false, true}) down_half<T>(tile, finished);
    } else {
      up_half<T>(tile, tile.fetch);
      // Threads fetch ranges and lists alike.
      if (tile.kernel == FfnKernel::kSm80) up_half<T>(tile, FfnFetch::kRange);
    }
  }
}

// Parts in order, whoever adds them, where a thread takes one column or four.
TYPED_TEST(DeviceTiles, SumsOfParts) {
  for (const auto& [count, rows, width] :
       {std::array<int64_t, 3>{3, 7, 37}, {2, 132, 1025}, {128, 3, 37}, {7, 33, 260}}) {
    SCOPED_TRACE(std::to_string(count) + " parts of " + std::to_string(rows) + " x " + std::to_string(width));
    const int64_t stride = (width + 3) / 4 * 4;
    auto parts = normal<float>({count, rows, stride}, 1);
    // Each part takes most of the one before away: what is left tells the order in which they were added.
    for (int64_t i = 0; i < parts.count(); ++i) {
      const int64_t of_part = rows * stride;
      parts[i] = i / of_part % 2 == 1 ? parts[i] - parts[i - of_part] : 1e6f * parts[i];
    }
    auto residual = normal<TypeParam>({rows, width}, 2, 1);
    Guarded<TypeParam> out({rows, width}, 3);
    const flashu_tensor parts_d = parts.upload(), residual_d = residual.upload(), out_d = out.upload();
    cuda::ffn_sum({static_cast<const float*>(parts_d.data), static_cast<int>(count), rows, width, stride,
                   residual_d.data, width + 1, out_d.data, width + 3},
                  dtype_of<TypeParam>(), nullptr);
    device_synchronize();
    const auto got = out.download();
    for (int64_t i = 0; i < rows * width; ++i) {
      const int64_t at = i / width * stride + i % width;
      // Up to four parts one after another; more by sixteen shares of some that follow each other.
      const int64_t shares = count <= 4 ? 1 : 16;
      float total = 0;
      for (int64_t share = 0; share < shares; ++share) {
        float sum = 0;
        for (int64_t p = count * share / shares; p < count * (share + 1) / shares; ++p)
          sum += parts[p * rows * stride + at];
        total += sum;
      }
      ASSERT_EQ(to_float(got[i]), to_float(from_float<TypeParam>(total + to_float(residual[i]))))
          << "element " << i;
    }
  }
}

// The sum of parts with a bias and an activation is what ends it; SiLU of large numbers is the number itself.
TYPED_TEST(DeviceTiles, SumsOfPartsAreFinished) {
  for (const auto& [count, rows, width] : {std::array<int64_t, 3>{3, 7, 37}, {2, 132, 1025}}) {
    const int64_t stride = (width + 3) / 4 * 4;
    auto parts = whole<float>({count, rows, stride}, 1);
    auto bias = whole<TypeParam>({width}, 2);
    bias.fill([&](int64_t c) { return from_float<TypeParam>(static_cast<float>(40 + c % 5)); });
    auto residual = whole<TypeParam>({rows, width}, 3, 1);
    Guarded<TypeParam> out({rows, width}, 3);
    const flashu_tensor parts_d = parts.upload(), bias_d = bias.upload(), residual_d = residual.upload(),
                        out_d = out.upload();
    cuda::ffn_sum({static_cast<const float*>(parts_d.data),
                   static_cast<int>(count),
                   rows,
                   width,
                   stride,
                   residual_d.data,
                   width + 1,
                   out_d.data,
                   width + 3,
                   {bias_d.data, FLASHU_EPILOGUE_SILU}},
                  dtype_of<TypeParam>(), nullptr);
    device_synchronize();
    const auto got = out.download();
    for (int64_t i = 0; i < rows * width; ++i) {
      double sum =
          static_cast<double>(to_float(residual[i])) + static_cast<double>(to_float(bias[i % width]));
      for (int64_t p = 0; p < count; ++p)
        sum += static_cast<double>(parts[p * rows * stride + i / width * stride + i % width]);
      ASSERT_NEAR(static_cast<double>(to_float(got[i])), sum, spacing<TypeParam>(sum)) << "element " << i;
    }
  }
}

TYPED_TEST(DeviceTiles, OfHopper) {
  if (!use_capability(90)) GTEST_SKIP() << "this device is no sm_90";
  this->under_every_schedule([] { every_tile<TypeParam>(FfnKernel::kSm90); });
}

TYPED_TEST(DeviceTiles, OfAmpere) {
  if (!use_capability(80)) GTEST_SKIP() << "this device is no sm_80";
  this->under_every_schedule([] { every_tile<TypeParam>(FfnKernel::kSm80); });
}

}  // namespace
}  // namespace flashu::test
