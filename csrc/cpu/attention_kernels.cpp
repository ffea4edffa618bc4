// Scores, weights and sums of a panel of queries; compiled once per CPU instruction set.
//
// Scores lie as [key][lane] and sums as [column][lane], so a query is a lane from beginning to end: no sum or
// maximum goes across lanes, weights need no transposing before they meet the values, and keys and values are
// read where they lie, an element at a time for all lanes.
#include "cpu/attention_kernels.hpp"

#include <limits>
#include <type_traits>

#include "cpu/simd.hpp"
#include "cpu/transpose.hpp"

namespace flashu::cpu::FLASHU_ISA {
namespace {

#if defined(__AVX512F__)
// Half a vector, for few queries: two of its multiplications run at once.
struct Few {
  static constexpr int kLanes = 8;
  typedef float F __attribute__((vector_size(32)));
  typedef int32_t I __attribute__((vector_size(32)));
};
#endif
struct Full {
  static constexpr int kLanes = kWidth;
  using F = Floats;
  using I = Ints;
};
#if !defined(__AVX512F__)
using Few = Full;
#endif

constexpr float kLog2E = 1.44269504088896341f;
constexpr float kLeast = -87.0f;  // e^x of less is taken as zero: no weight is subnormal

// e^x of x <= 0, exactly 0 below kLeast and exactly 1 at 0; the polynomial is exponential()'s.
template <class Vector>
FLASHU_INLINE typename Vector::F weight(typename Vector::F x) {
  using F = typename Vector::F;
  using I = typename Vector::I;
  const F bounded = x < kLeast ? F{} + kLeast : x;
  const F magic = F{} + 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const F shifted = bounded * kLog2E + magic;
  const F n = shifted - magic;
  F r = bounded - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  F p = F{} + 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const F power = (F)(((I)shifted - (I)magic + 127) << 23);  // n >= -126
  return x < kLeast ? F{} : p * power;
}

// c[r * lanes + j] (+)= sum over s of a(r, s) * b[s * lanes + j], r < kRows, s < slots. kAcross: a(r, s) is
// a[s * stride + r] and c is added to, else a[r * stride + s] and c is overwritten. Summed in blocks of
// kSumBlock, each from zero.
template <class Vector, int kVectors, int kRows, bool kAcross>
void tile(float* c, const float* a, int64_t stride, const float* b, int64_t slots) {
  using F = typename Vector::F;
  constexpr int kLanes = kVectors * Vector::kLanes;
  // Rows in threes, so that two registers name three of them.
  constexpr int kThrees = (kRows + 2) / 3;
  const float* row[kThrees];
  for (int i = 0; i < kThrees; ++i) row[i] = a + 3 * i * stride;
  int64_t s = 0;
  do {
    const int64_t end = s + kSumBlock < slots ? s + kSumBlock : slots;
    const bool overwrite = !kAcross && s == 0;
    F sums[kRows][kVectors] = {};
    for (; s < end; ++s) {
      F right[kVectors];
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) right[v] = load_as<F>(b + s * kLanes + v * Vector::kLanes);
#pragma GCC unroll 12
      for (int r = 0; r < kRows; ++r) {
        const float left = kAcross ? a[r] : row[r / 3][r % 3 * stride];
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) sums[r][v] = sums[r][v] + right[v] * left;
      }
      if constexpr (kAcross) {
        a += stride;
      } else {
#pragma GCC unroll 4
        for (int i = 0; i < kThrees; ++i) ++row[i];
      }
    }
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) {
        float* const to = c + r * kLanes + v * Vector::kLanes;
        store_as(to, overwrite ? sums[r][v] : load_as<F>(to) + sums[r][v]);
      }
    }
  } while (s < slots);
}

// `rows` rows of c in register tiles.
template <class Vector, int kVectors, bool kAcross>
void multiply(float* c, const float* a, int64_t stride, const float* b, int64_t slots, int64_t rows) {
  const int64_t step = kAcross ? 1 : stride;
  int64_t r = 0;
  const auto tiles = [&]<int kRows>(std::integral_constant<int, kRows>) {
    for (; r + kRows <= rows; r += kRows)
      tile<Vector, kVectors, kRows, kAcross>(c + r * kVectors * Vector::kLanes, a + r * step, stride, b,
                                             slots);
  };
#if defined(__AVX512F__)
  tiles(std::integral_constant<int, 12>{});
  tiles(std::integral_constant<int, 8>{});
#else
  tiles(std::integral_constant<int, 6>{});
#endif
  tiles(std::integral_constant<int, 4>{});
  tiles(std::integral_constant<int, 1>{});
}

template <class Vector, int kVectors>
void attend(const QueryPanel& panel, const KeyRows& rows, const float* mask, float* scores) {
  using F = typename Vector::F;
  constexpr int kStep = Vector::kLanes;
  constexpr int kLanes = kVectors * kStep;
  multiply<Vector, kVectors, false>(scores, rows.keys, rows.key_stride, panel.queries, rows.d, rows.count);

  F before[kVectors], most[kVectors];
  for (int v = 0; v < kVectors; ++v) most[v] = before[v] = load_as<F>(panel.most + v * kStep);
  for (int64_t i = 0; i < rows.count; ++i) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      float* const at = scores + i * kLanes + v * kStep;
      F score = load_as<F>(at);
      if (mask != nullptr) {
        score = score + load_as<F>(mask + i * kLanes + v * kStep);
        store_as(at, score);
      }
      most[v] = most[v] < score ? score : most[v];
    }
  }

  bool rescaled = false;
  F total[kVectors], factor[kVectors];
  for (int v = 0; v < kVectors; ++v) {
    factor[v] = weight<Vector>(before[v] - most[v]);
    total[v] = load_as<F>(panel.total + v * kStep) * factor[v];
    store_as(panel.most + v * kStep, most[v]);
    for (int j = 0; j < kStep; ++j) rescaled |= factor[v][j] != 1.0f;
  }
  // Every fourth key into one sum, which is more accurate than one after another.
  F added[4][kVectors] = {};
  const auto weigh = [&](int64_t i, F(&sums)[kVectors]) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      float* const at = scores + i * kLanes + v * kStep;
      const F p = weight<Vector>(load_as<F>(at) - most[v]);
      store_as(at, p);
      sums[v] = sums[v] + p;
    }
  };
  int64_t key = 0;
  for (; key + 4 <= rows.count; key += 4) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) weigh(key + i, added[i]);
  }
  for (int i = 0; key < rows.count; ++key, ++i) weigh(key, added[i]);
  for (int v = 0; v < kVectors; ++v) {
    const F sum = (added[0][v] + added[1][v]) + (added[2][v] + added[3][v]);
    store_as(panel.total + v * kStep, total[v] + sum);
  }
  if (rescaled) {
    for (int64_t i = 0; i < rows.d; ++i) {
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) {
        float* const at = panel.sums + i * kLanes + v * kStep;
        store_as(at, load_as<F>(at) * factor[v]);
      }
    }
  }
  multiply<Vector, kVectors, true>(panel.sums, rows.values, rows.value_stride, scores, rows.count, rows.d);
}

template <class T>
void widen(float* out, const void* from, int64_t count, float scale) {
  const T* source = static_cast<const T*>(from);
  int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) store(out + i, load(source + i) * scale);
  for (; i < count; ++i) out[i] = to_float(source[i]) * scale;
}

template <class T>
void narrow(void* out, const float* from, int64_t count, float total) {
  T* to = static_cast<T*>(out);
  const bool nothing = total == 0.0f;
  int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) store(to + i, nothing ? Floats{} : load(from + i) / total);
  for (; i < count; ++i) to[i] = from_float<T>(nothing ? 0.0f : from[i] / total);
}

// The lowest number of a storage type.
template <class T>
constexpr float kLowest = -std::numeric_limits<float>::max();
template <>
constexpr float kLowest<bfloat16> = -0x1.fep127f;
template <>
constexpr float kLowest<float16> = -65504.0f;

template <class T>
void widen_mask(float* out, const void* mask, int64_t count, float hidden) {
  const T* source = static_cast<const T*>(mask);
  int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) {
    const Floats value = load(source + i);
    store(out + i, value == kLowest<T> ? Floats{} + hidden : value);
  }
  for (; i < count; ++i) {
    const float value = to_float(source[i]);
    out[i] = value == kLowest<T> ? hidden : value;
  }
}

// From both ends: what lies between is not looked at.
template <class T>
MaskSpan span(const void* mask, int64_t count) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  const T* source = static_cast<const T*>(mask);
  const auto seen = [&](int64_t i) { return !(to_float(source[i]) <= kLowest<T>); };
  int64_t begin = 0;
  while (begin < count && !seen(begin)) ++begin;
  if (begin < count) {
    int64_t end = count;
    while (!seen(end - 1)) --end;
    return {begin, end, -kInfinity};
  }
  for (int64_t i = 0; i < count; ++i) {
    if (to_float(source[i]) == kLowest<T>) return {0, count, -std::numeric_limits<float>::max()};
  }
  return {0, 0, -kInfinity};
}

void transpose_floats(float* out, int64_t out_stride, const float* in, int64_t in_stride, int64_t rows,
                      int64_t columns) {
  int64_t r = 0;
  for (; r + kWidth <= rows; r += kWidth) {
    int64_t c = 0;
    for (; c + kWidth <= columns; c += kWidth) {
      Floats block[kWidth];
      for (int i = 0; i < kWidth; ++i) block[i] = load(in + (r + i) * in_stride + c);
      transpose(block);
      for (int i = 0; i < kWidth; ++i) store(out + (c + i) * out_stride + r, block[i]);
    }
    for (; c < columns; ++c) {
      for (int i = 0; i < kWidth; ++i) out[c * out_stride + r + i] = in[(r + i) * in_stride + c];
    }
  }
  for (; r < rows; ++r) {
    for (int64_t c = 0; c < columns; ++c) out[c * out_stride + r] = in[r * in_stride + c];
  }
}

}  // namespace

extern const AttentionKernels attention_kernels{
    {Few::kLanes, Full::kLanes, 2 * Full::kLanes},
    {attend<Few, 1>, attend<Full, 1>, attend<Full, 2>},
    {widen<float>, widen<bfloat16>, widen<float16>},
    {narrow<float>, narrow<bfloat16>, narrow<float16>},
    {widen_mask<float>, widen_mask<bfloat16>, widen_mask<float16>},
    {span<float>, span<bfloat16>, span<float16>},
    transpose_floats};

}  // namespace flashu::cpu::FLASHU_ISA
