// Rows as digits and their products with int8 weights, beside whole numbers of 64 bits: what rounding to the
// unit loses, outliers, sums of every form, and the longest rows.
#include "cpu/digits.hpp"

#include <cmath>
#include <numeric>

#include "cpu/gemm.hpp"
#include "guarded.hpp"

namespace flashu::test {
namespace {

using cpu::DigitProblem;
using cpu::Digits;
using cpu::kDigitRows;
using cpu::kDigits;
using cpu::kWindow;

class DigitsTest : public ::testing::Test {
 protected:
  void SetUp() override {
    if (!kernels.present) GTEST_SKIP() << "this instruction set multiplies no bytes";
  }
  const cpu::DigitKernels& kernels = FLASHU_PICK_ISA(digit_kernels);
  const int64_t columns = FLASHU_PICK_ISA(gemm_kernels).panel_columns;
};

// A row of planes as the numbers that it stands for.
std::vector<int64_t> numbers(const std::vector<int8_t>& planes, int64_t pitch) {
  std::vector<int64_t> q(static_cast<size_t>(pitch));
  for (int64_t k = 0; k < pitch; ++k) {
    for (int64_t digit = kDigits; digit-- > 0;)
      q[static_cast<size_t>(k)] =
          256 * q[static_cast<size_t>(k)] + planes[static_cast<size_t>(digit * pitch + k)];
  }
  return q;
}

template <class T>
void expect_rounded_to_the_unit(const cpu::DigitKernels& kernels, int32_t type, const Guarded<T>& x) {
  const int64_t k = x.width(), pitch = (k + kWindow - 1) / kWindow * kWindow;
  double squares = 0, without = 0;
  for (int64_t i = 0; i < k; ++i) {
    const double value = std::fabs(static_cast<double>(x.value(0, i)));
    squares += value * value;
    if (i != k / 2) without += value * value;
  }
  const double rms = std::sqrt(squares / static_cast<double>(k));
  const double rest = std::sqrt(without / static_cast<double>(k));
  for (const int32_t bits : {11, 14}) {
    const float exponent = kernels.unit[type](&x(0, 0), k, bits);
    const double unit = std::exp2(static_cast<double>(exponent));
    // The bound that is promised; a rounding of the rms may cost a power of two at its very edge. One outlier
    // of a row that is long enough moves the unit by three powers of two at most.
    ASSERT_LE(unit, rms * std::exp2(-bits) * (1 + 1e-5));
    if (k >= 64) {
      ASSERT_LE(unit, 8 * rest * std::exp2(-bits) * (1 + 1e-5));
    }
    ASSERT_GT(unit, rest * std::exp2(-bits - 2));
    std::vector<int8_t> planes(static_cast<size_t>(kDigits * pitch), 99);
    int32_t corrections[kDigits];
    const bool all = kernels.split[type](planes.data(), pitch, corrections, &x(0, 0), k, exponent);
    const auto q = numbers(planes, pitch);
    bool held = true;
    for (int64_t i = 0; i < pitch; ++i) {
      const double count = i < k ? static_cast<double>(x.value(0, i)) / unit : 0.0;
      const bool fits = std::fabs(count) < static_cast<double>(cpu::kDigitLimit);
      held = held && fits;
      ASSERT_EQ(static_cast<double>(q[static_cast<size_t>(i)]), fits ? std::nearbyint(count) : 0.0) << i;
    }
    ASSERT_EQ(all, held);
    for (int64_t digit = 0; digit < kDigits; ++digit) {
      const auto plane = planes.begin() + digit * pitch;
      ASSERT_EQ(corrections[digit], 128 * std::accumulate(plane, plane + pitch, 0));
    }
  }
}

TEST_F(DigitsTest, AreTheRowRoundedToItsUnit) {
  for (const int64_t k : {int64_t{1}, int64_t{2}, int64_t{15}, int64_t{16}, int64_t{17}, int64_t{64},
                          int64_t{65}, int64_t{1000}, int64_t{9000}, cpu::kMaxDigitK}) {
    for (const float outlier : {1.0f, 1e3f, 1e6f}) {
      for (const float scale : {1.0f, 0x1p-120f, 0x1p100f, 3e-39f}) {
        Guarded<float> wide({1, k});
        Guarded<bfloat16> bf16({1, k});
        wide.real(static_cast<uint32_t>(k), scale);
        wide(0, k / 2) *= outlier;
        bf16.fill([&](int64_t, int64_t i) { return wide.value(0, i); });
        expect_rounded_to_the_unit(kernels, FLASHU_F32, wide);
        expect_rounded_to_the_unit(kernels, FLASHU_BF16, bf16);
      }
      Guarded<float16> f16({1, k});
      f16.real(static_cast<uint32_t>(k), 0.01f);
      f16(0, k / 2) = from_float<float16>(0.03f * std::min(outlier, 1e5f));
      expect_rounded_to_the_unit(kernels, FLASHU_F16, f16);
    }
  }
}

TEST_F(DigitsTest, OfZerosAndOfNumbersThatAreNotFinite) {
  for (const int64_t k : {1, 16, 17, 70}) {
    Guarded<bfloat16> x({1, k});
    x.fill([](int64_t, int64_t i) { return i % 2 == 0 ? 0.0 : -0.0; });
    EXPECT_EQ(kernels.unit[FLASHU_BF16](&x(0, 0), k, 11), 0.0f);
    for (const float bad : {INFINITY, -INFINITY, NAN}) {
      x(0, k - 1) = from_float<bfloat16>(bad);
      EXPECT_EQ(kernels.unit[FLASHU_BF16](&x(0, 0), k, 11), 0.0f);
      std::vector<int8_t> planes(static_cast<size_t>(kDigits * 2 * kWindow), 99);
      int32_t corrections[kDigits];
      EXPECT_FALSE(kernels.split[FLASHU_BF16](planes.data(), 2 * kWindow, corrections, &x(0, 0), k, 0.0f));
      for (const int64_t q : numbers(planes, 2 * kWindow)) EXPECT_EQ(q, 0);
    }
  }
}

// Planes of any digits, for rows of x and a panel of weights between red zones, and their sums.
struct Products {
  int64_t rows, k, pitch;
  std::vector<int8_t> planes;
  std::vector<int32_t> corrections;
  Guarded<int8_t> weights;
  std::vector<const void*> source;

  Products(int64_t rows, int64_t k, int64_t width, int64_t columns, uint32_t seed)
      : rows(rows),
        k(k),
        pitch((k + kWindow - 1) / kWindow * kWindow),
        planes(static_cast<size_t>(rows * kDigits * pitch)),
        corrections(static_cast<size_t>(rows * kDigits)),
        weights({columns, width}, 5) {
    std::mt19937 random(seed);
    for (int64_t row = 0; row < rows * kDigits; ++row) {
      for (int64_t i = 0; i < k; ++i)
        planes[static_cast<size_t>(row * pitch + i)] = static_cast<int8_t>(random() % 256 - 128);
    }
    weights.integers(seed + 1, -128, 127);
    for (int64_t c = 0; c < columns; ++c) source.push_back(&weights(c, 0));
    correct();
  }

  void correct() {
    for (size_t row = 0; row < corrections.size(); ++row) {
      const auto first = planes.begin() + static_cast<int64_t>(row) * pitch;
      corrections[row] = 128 * std::accumulate(first, first + pitch, 0);
    }
  }

  // c as multiply and dot leave it; K is `list` of the weights' columns.
  void expect_sums(const std::vector<float>& c, const std::vector<int32_t>& list, int64_t columns) const {
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t digit = 0; digit < kDigits; ++digit) {
        for (int64_t j = 0; j < columns; ++j) {
          int64_t sum = 0;
          for (size_t i = 0; i < list.size(); ++i)
            sum +=
                int64_t{planes[static_cast<size_t>((r * kDigits + digit) * pitch) + i]} * weights(j, list[i]);
          const auto got = std::bit_cast<uint32_t>(c[static_cast<size_t>((digit * rows + r) * columns + j)]);
          const auto correction =
              static_cast<uint32_t>(corrections[static_cast<size_t>(r * kDigits + digit)]);
          ASSERT_EQ(static_cast<int32_t>(got - correction), sum)
              << "row " << r << ", digit " << digit << ", column " << j << ", K " << list.size();
        }
      }
    }
  }

  std::vector<int32_t> offsets() const {
    std::vector<int32_t> all;
    for (int64_t at = 0; at < k; at += kWindow) all.push_back(static_cast<int32_t>(at));
    return all;
  }
};

std::vector<int32_t> range(int64_t count) {
  std::vector<int32_t> list(static_cast<size_t>(count));
  std::iota(list.begin(), list.end(), 0);
  return list;
}

// Packed, in blocks of `block` slots.
std::vector<float> multiplied(const cpu::DigitKernels& kernels, const Products& p, int64_t columns,
                              const std::vector<int32_t>* list, int64_t block) {
  std::vector<float> c(static_cast<size_t>(p.rows * kDigits * columns), NAN);
  std::vector<float> a(static_cast<size_t>(block * kDigits * kDigitRows));
  std::vector<float> b(static_cast<size_t>(block * columns));
  const auto offsets = p.offsets();
  const int64_t slots = p.pitch / 4;
  for (int64_t s = 0; s < slots; s += block) {
    const int64_t count = std::min(block, slots - s);
    kernels.pack_rows(a.data(), {p.planes.data(), p.pitch}, s, count, p.rows);
    if (list == nullptr) {
      kernels.pack_panel(b.data(), p.source.data(), {offsets.data() + s / 16, count / 16, p.k},
                         {nullptr, {}});
    } else {
      kernels.pack_columns(b.data(), p.source.data(), list->data() + 4 * s, std::min(4 * count, p.k - 4 * s),
                           p.weights.width());
    }
    kernels.multiply(c.data(), a.data(), b.data(), count, static_cast<int32_t>(p.rows * kDigits), s == 0);
  }
  return c;
}

TEST_F(DigitsTest, SumsAreExact) {
  for (const int64_t k : {1, 3, 4, 63, 64, 65, 100, 128, 257, 700}) {
    for (int64_t rows = 1; rows <= kDigitRows; ++rows) {
      Products p(rows, k, k, columns, static_cast<uint32_t>(k));
      if (k > 200) {  // where highest digits are zero for a while they are passed over
        for (int64_t row = 0; row < rows; ++row)
          std::fill_n(p.planes.begin() + (row * kDigits + kDigits - 1) * p.pitch, 130, 0);
        p.correct();
      }
      std::vector<float> c(static_cast<size_t>(rows * kDigits * columns));
      const auto offsets = p.offsets();
      kernels.dot(c.data(), {p.planes.data(), p.pitch}, p.source.data(), nullptr,
                  {offsets.data(), static_cast<int64_t>(offsets.size()), k}, static_cast<int32_t>(rows));
      p.expect_sums(c, range(k), columns);
      for (const int64_t block : {16, 128}) {
        p.expect_sums(multiplied(kernels, p, columns, nullptr, block), range(k), columns);
      }
    }
  }
}

TEST_F(DigitsTest, SumsOfListedColumnsAreExact) {
  for (const int64_t k : {1, 5, 64, 90, 300, 600}) {
    const int64_t width = k + k / 4 + 1;
    auto list = range(width);
    std::shuffle(list.begin(), list.end(), std::mt19937(3));
    list.resize(static_cast<size_t>(k));
    for (const bool sorted : {true, false}) {
      if (sorted) std::sort(list.begin(), list.end());
      const Products p(3, k, width, columns, static_cast<uint32_t>(k));
      p.expect_sums(multiplied(kernels, p, columns, &list, 128), list, columns);
    }
  }
}

// The largest sums that there are, of the longest rows: 32 bits hold them.
TEST_F(DigitsTest, SumsAtTheBoundAreExact) {
  for (const int sign : {-128, 127}) {
    Products p(1, cpu::kMaxDigitK, cpu::kMaxDigitK, columns, 1);
    for (int64_t digit = 0; digit < kDigits; ++digit)
      std::fill_n(p.planes.begin() + digit * p.pitch, p.k, static_cast<int8_t>(sign));
    p.correct();
    p.weights.fill([](int64_t c, int64_t) { return c % 2 == 0 ? -128 : 127; });
    std::vector<float> c(static_cast<size_t>(kDigits * columns));
    const auto offsets = p.offsets();
    kernels.dot(c.data(), {p.planes.data(), p.pitch}, p.source.data(), nullptr,
                {offsets.data(), static_cast<int64_t>(offsets.size()), p.k}, 1);
    p.expect_sums(c, range(p.k), columns);
  }
  EXPECT_TRUE(cpu::uses_digits(FLASHU_BF16, cpu::kMaxDigitK));
  EXPECT_FALSE(cpu::uses_digits(FLASHU_BF16, cpu::kMaxDigitK + 1));
  EXPECT_FALSE(cpu::uses_digits(FLASHU_F32, 8));
}

// Whether they are float's: an error of 2^-22 of what the magnitudes come to, and nothing of small whole
// numbers.
TEST_F(DigitsTest, SumsOfDigitsBecomeFloats) {
  std::mt19937 random(1);
  const int32_t rows = 3;
  std::vector<float> c(static_cast<size_t>(rows * kDigits * columns)),
      out(static_cast<size_t>(rows * columns));
  std::vector<int32_t> corrections(rows * kDigits);
  for (auto& each : corrections) each = static_cast<int32_t>(random());
  const float units[rows] = {-11, 3, -140};
  for (const int shift : {1, 6, 14, 24}) {
    std::vector<int64_t> sums(c.size());
    for (int32_t r = 0; r < rows; ++r) {
      for (int64_t digit = 0; digit < kDigits; ++digit) {
        for (int64_t j = 0; j < columns; ++j) {
          const auto at = static_cast<size_t>((digit * rows + r) * columns + j);
          sums[at] = static_cast<int32_t>(random()) >> shift;
          c[at] = std::bit_cast<float>(
              static_cast<uint32_t>(sums[at]) +
              static_cast<uint32_t>(corrections[static_cast<size_t>(r * kDigits + digit)]));
        }
      }
    }
    kernels.combine(out.data(), c.data(), corrections.data(), units, rows);
    for (int32_t r = 0; r < rows; ++r) {
      for (int64_t j = 0; j < columns; ++j) {
        double exact = 0, size = 0;
        for (int64_t digit = kDigits; digit-- > 0;) {
          const auto sum = static_cast<double>(sums[static_cast<size_t>((digit * rows + r) * columns + j)]);
          exact = 256 * exact + sum;
          size = 256 * size + std::fabs(sum);
        }
        const double unit = std::exp2(static_cast<double>(units[r]));
        const double allowed = shift == 24 ? 0.0 : size * 0x1p-22 * unit + 0x1p-149;
        ASSERT_NEAR(static_cast<double>(out[static_cast<size_t>(r * columns + j)]), exact * unit, allowed)
            << "row " << r << ", column " << j << ", shift " << shift;
      }
    }
  }
}

}  // namespace
}  // namespace flashu::test
