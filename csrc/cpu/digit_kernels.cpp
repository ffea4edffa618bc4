// Products of digits with int8 weights; compiled once per CPU instruction set, and empty but for AVX512-VNNI.
#include "cpu/digit_kernels.hpp"

#if defined(__AVX512VNNI__)
#include <bit>

#include "cpu/simd.hpp"
#include "cpu/transpose.hpp"

namespace flashu::cpu::FLASHU_ISA {
namespace {

constexpr int kColumns = 2 * kWidth;
constexpr int kTileRows = kDigits * kDigitRows;
static_assert(kWindow == 4 * kWidth, "a window is a vector of bytes");

// Numbers from `from` on, zero behind the first `count`.
template <class T>
FLASHU_INLINE __m512 load_some(const T* from, int64_t count) {
  if (count >= kWidth) return (__m512)load(from);
  T some[kWidth] = {};
  std::memcpy(some, from, static_cast<size_t>(count) * sizeof(T));
  return (__m512)load(some);
}

// Of the numbers whose magnitude is below a limit, given as its bits: the largest one's bits.
template <class T>
uint32_t largest_below(const T* from, int64_t count, uint32_t limit) {
  const __m512i most = _mm512_set1_epi32(static_cast<int>(limit));
  __m512i largest = _mm512_setzero_si512();
  for (int64_t k = 0; k < count; k += kWidth) {
    const __m512i bits = _mm512_castps_si512(load_some(from + k, count - k));
    const __m512i magnitude = _mm512_and_si512(bits, _mm512_set1_epi32(0x7fffffff));
    largest = _mm512_mask_max_epu32(largest, _mm512_cmplt_epu32_mask(magnitude, most), largest, magnitude);
  }
  return _mm512_reduce_max_epu32(largest);
}

// The power of two that the root mean square of these numbers reaches, where others count as zeros.
template <class T>
float root_below(const T* from, int64_t count, uint32_t limit, uint32_t largest) {
  const float top = static_cast<float>(__builtin_ilogbf(std::bit_cast<float>(largest)));
  const __m512 scale = _mm512_set1_ps(-top);
  const __m512 most = _mm512_set1_ps(std::bit_cast<float>(limit));
  __m512 squares = _mm512_setzero_ps();
  for (int64_t k = 0; k < count; k += kWidth) {
    const __m512 value = load_some(from + k, count - k);
    const __mmask16 counts = _mm512_cmp_ps_mask(_mm512_abs_ps(value), most, _CMP_LT_OQ);
    const __m512 scaled = _mm512_maskz_scalef_ps(counts, value, scale);
    squares = _mm512_fmadd_ps(scaled, scaled, squares);
  }
  const float mean = _mm512_reduce_add_ps(squares) / static_cast<float>(count);
  return top + __builtin_floorf(0.5f * static_cast<float>(__builtin_ilogbf(mean)));
}

// The root mean square without the numbers that are at least 2^kFar of it; of those that are left again,
// while it falls by more than 2^kFall: a row is left with what is not a few outliers.
constexpr int kFar = 2;
constexpr float kFall = 2.0f;
template <class T>
float unit(const void* x, int64_t count, int32_t bits) {
  const T* const from = static_cast<const T*>(x);
  uint32_t limit = 0x7f800000u;  // what is not finite does not count
  uint32_t largest = largest_below(from, count, limit);
  if (largest == 0) return 0.0f;
  float root = root_below(from, count, limit, largest);
  for (;;) {
    limit = std::bit_cast<uint32_t>(__builtin_ldexpf(1.0f, static_cast<int>(root) + kFar));
    if (largest < limit) break;
    largest = largest_below(from, count, limit);
    if (largest == 0) break;
    const float rest = root_below(from, count, limit, largest);
    if (rest >= root - kFall) break;
    root = rest;
  }
  return root - static_cast<float>(bits);
}

template <class T>
bool split(int8_t* planes, int64_t pitch, int32_t* corrections, const void* x, int64_t count, float unit) {
  const T* const from = static_cast<const T*>(x);
  const __m512 scale = _mm512_set1_ps(-unit);
  const __m512 most = _mm512_set1_ps(kDigitLimit);
  const __m512i half = _mm512_set1_epi32(128);
  __m512i sums[kDigits] = {};
  __mmask16 all = 0xffff;
  for (int64_t k = 0; k < pitch; k += kWidth) {
    __m512i rest = _mm512_setzero_si512();
    if (k < count) {
      const __m512 units = _mm512_scalef_ps(load_some(from + k, count - k), scale);
      const __mmask16 held = _mm512_cmp_ps_mask(_mm512_abs_ps(units), most, _CMP_LT_OQ);
      rest = _mm512_maskz_cvtps_epi32(held, units);
      all &= held;
    }
    for (int digit = 0; digit < kDigits; ++digit) {
      const __m128i bytes = _mm512_cvtepi32_epi8(rest);  // the low ones: -128 to 127
      store_as(planes + digit * pitch + k, bytes);
      sums[digit] = _mm512_add_epi32(sums[digit], _mm512_cvtepi8_epi32(bytes));
      rest = _mm512_srai_epi32(_mm512_add_epi32(rest, half), 8);
    }
  }
  for (int digit = 0; digit < kDigits; ++digit)
    corrections[digit] = 128 * _mm512_reduce_add_epi32(sums[digit]);
  return all == 0xffff;
}

void pack_rows(float* out, const DigitPlanes& planes, int64_t first_slot, int64_t slots, int64_t rows) {
  for (int64_t row = 0; row < kDigitRows; ++row) {
    for (int digit = 0; digit < kDigits; ++digit) {
      const int8_t* const from =
          planes.data + (row * kDigits + digit) * planes.pitch + kDigitValues * first_slot;
      float* const to = out + digit * kDigitRows + row;
      for (int64_t s = 0; s < slots; ++s)
        to[s * kTileRows] = row < rows ? load_as<float>(from + kDigitValues * s) : 0.0f;
    }
  }
}

// Which bytes of a vector are there where `left` follow.
FLASHU_INLINE __mmask64 there(int64_t left) {
  return left >= kWindow ? ~__mmask64{0} : (__mmask64{1} << left) - 1;
}

FLASHU_INLINE __m512i load_weights(const void* row, int64_t at, __mmask64 some) {
  const __m512i weights = _mm512_maskz_loadu_epi8(some, static_cast<const int8_t*>(row) + at);
  return _mm512_xor_si512(weights, _mm512_set1_epi8(-128));
}

void pack_panel(float* out, const void* const* source, const Windows& windows, const Ahead& ahead) {
  for (int64_t i = 0; i < windows.count; ++i) {
    if (ahead.rows != nullptr && i < ahead.windows.count) {
      for (int c = 0; c < kColumns; ++c)
        __builtin_prefetch(static_cast<const char*>(ahead.rows[c]) + ahead.windows.offsets[i], 0, 2);
    }
    const int64_t at = windows.offsets[i];
    const __mmask64 some = there(windows.width - at);
    for (int side = 0; side < 2; ++side) {
      Floats words[kWidth];
#pragma GCC unroll 16
      for (int c = 0; c < kWidth; ++c) words[c] = (Floats)load_weights(source[side * kWidth + c], at, some);
      transpose(words);
      float* const to = out + i * kWidth * kColumns + side * kWidth;
#pragma GCC unroll 16
      for (int s = 0; s < kWidth; ++s) store(to + s * kColumns, words[s]);
    }
  }
}

// Some bytes that follow one another in a list and lie within 16 of a row.
struct Pick {
  int32_t base, to;    // where they lie from in the row, and go to
  __mmask16 some;      // of the 16 bytes, those that the row has
  uint8_t places[16];  // of the picked ones, from `base` on
};

// Bytes of every row are brought side by side, up to 16 of them at a time, and packed as rows then.
void pack_columns(float* out, const void* const* source, const int32_t* columns, int64_t count,
                  int64_t width) {
  constexpr int64_t kStrip = 256;
  constexpr int32_t kOffsets[kStrip / kWindow] = {0, kWindow, 2 * kWindow, 3 * kWindow};
  Pick picks[kStrip];
  int8_t strip[kColumns][kStrip + 16];
  const void* rows[kColumns];
  for (int c = 0; c < kColumns; ++c) rows[c] = strip[c];
  for (int64_t begin = 0; begin < count; begin += kStrip) {
    const int64_t end = begin + kStrip < count ? begin + kStrip : count;
    int64_t number = 0;
    for (int64_t k = begin; k < end; ++number) {
      Pick& pick = picks[number];
      pick = {
          columns[k], static_cast<int32_t>(k - begin), static_cast<__mmask16>(there(width - columns[k])), {}};
      for (int taken = 0; taken < 16 && k < end; ++taken, ++k) {
        const auto place = static_cast<uint32_t>(columns[k] - pick.base);
        if (place >= 16) break;
        pick.places[taken] = static_cast<uint8_t>(place);
      }
    }
    for (int c = 0; c < kColumns; ++c) {
      for (int64_t i = 0; i < number; ++i) {
        const __m128i bytes =
            _mm_maskz_loadu_epi8(picks[i].some, static_cast<const int8_t*>(source[c]) + picks[i].base);
        store_as(strip[c] + picks[i].to, _mm_shuffle_epi8(bytes, load_as<__m128i>(picks[i].places)));
      }
    }
    const int64_t length = end - begin;
    pack_panel(out + begin / kDigitValues * kColumns, rows,
               {kOffsets, (length + kWindow - 1) / kWindow, length}, {nullptr, {}});
  }
}

template <int kRows>
FLASHU_INLINE void add_slots(__m512i (&left)[kTileRows], __m512i (&right)[kTileRows], const float* a,
                             const float* b, int64_t begin, int64_t end, int digits) {
  for (int64_t s = begin; s < end; ++s) {
    const __m512i b0 = (__m512i)load(b + s * kColumns);
    const __m512i b1 = (__m512i)load(b + s * kColumns + kWidth);
#pragma GCC unroll 3
    for (int digit = 0; digit < digits; ++digit) {
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        const __m512i value = _mm512_set1_epi32(load_as<int32_t>(a + s * kTileRows + digit * kDigitRows + r));
        left[digit * kRows + r] = _mm512_dpbusd_epi32(left[digit * kRows + r], b0, value);
        right[digit * kRows + r] = _mm512_dpbusd_epi32(right[digit * kRows + r], b1, value);
      }
    }
  }
}

// One register tile. Where no row has a large number, the highest digits are zero and left out.
template <int kRows>
void tile(float* c, const float* a, const float* b, int64_t slots, bool first) {
  constexpr int64_t kStep = 16;
  __m512i left[kTileRows] = {};
  __m512i right[kTileRows] = {};
  for (int64_t begin = 0; begin < slots; begin += kStep) {
    const int64_t end = begin + kStep < slots ? begin + kStep : slots;
    __m128i highest = _mm_setzero_si128();
    for (int64_t s = begin; s < end; ++s)
      highest = _mm_or_si128(highest, load_as<__m128i>(a + s * kTileRows + (kDigits - 1) * kDigitRows));
    if (_mm_testz_si128(highest, highest)) {
      add_slots<kRows>(left, right, a, b, begin, end, kDigits - 1);
    } else {
      add_slots<kRows>(left, right, a, b, begin, end, kDigits);
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < kDigits * kRows; ++r) {
    float* const row = c + r * kColumns;
    if (!first) {
      left[r] = _mm512_add_epi32(left[r], load_as<__m512i>(row));
      right[r] = _mm512_add_epi32(right[r], load_as<__m512i>(row + kWidth));
    }
    store_as(row, left[r]);
    store_as(row + kWidth, right[r]);
  }
}

void multiply(float* c, const float* a, const float* b, int64_t slots, int32_t rows, bool first) {
  switch (rows / kDigits) {
    case 1:
      return tile<1>(c, a, b, slots, first);
    case 2:
      return tile<2>(c, a, b, slots, first);
    case 3:
      return tile<3>(c, a, b, slots, first);
    default:
      return tile<4>(c, a, b, slots, first);
  }
}

// The sum of the lanes of each of 16 vectors.
FLASHU_INLINE __m512i sum_lanes(const __m512i* vectors) {
  __m512i eights[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i)
    eights[i] = _mm512_add_epi32(_mm512_unpacklo_epi32(vectors[2 * i], vectors[2 * i + 1]),
                                 _mm512_unpackhi_epi32(vectors[2 * i], vectors[2 * i + 1]));
  __m512i quads[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i)
    quads[i] = _mm512_add_epi32(_mm512_unpacklo_epi64(eights[2 * i], eights[2 * i + 1]),
                                _mm512_unpackhi_epi64(eights[2 * i], eights[2 * i + 1]));
  __m512i pairs[2];
  for (int i = 0; i < 2; ++i)
    pairs[i] = _mm512_add_epi32(_mm512_shuffle_i32x4(quads[2 * i], quads[2 * i + 1], 0x88),
                                _mm512_shuffle_i32x4(quads[2 * i], quads[2 * i + 1], 0xdd));
  return _mm512_add_epi32(_mm512_shuffle_i32x4(pairs[0], pairs[1], 0x88),
                          _mm512_shuffle_i32x4(pairs[0], pairs[1], 0xdd));
}

// kCount columns: sums[(digit * kRows + r) * kWidth + column], a vector each. `next`: rows of weights to
// fetch, or null.
template <int kRows, int kCount>
FLASHU_INLINE void dot_columns(__m512i* sums, const DigitPlanes& planes, const void* const* source,
                               const void* const* next, const Windows& windows) {
  __m512i total[kCount][kDigits * kRows] = {};
  for (int64_t i = 0; i < windows.count; ++i) {
    const int64_t at = windows.offsets[i];
    if (next != nullptr) {
#pragma GCC unroll 8
      for (int c = 0; c < kCount; ++c) __builtin_prefetch(static_cast<const char*>(next[c]) + at, 0, 2);
    }
    const __mmask64 some = there(windows.width - at);
    __m512i weights[kCount];
#pragma GCC unroll 8
    for (int c = 0; c < kCount; ++c) weights[c] = load_weights(source[c], at, some);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 3
      for (int digit = 0; digit < kDigits; ++digit) {
        const __m512i value =
            load_as<__m512i>(planes.data + (r * kDigits + digit) * planes.pitch + i * kWindow);
#pragma GCC unroll 8
        for (int c = 0; c < kCount; ++c)
          total[c][digit * kRows + r] = _mm512_dpbusd_epi32(total[c][digit * kRows + r], weights[c], value);
      }
    }
  }
#pragma GCC unroll 8
  for (int c = 0; c < kCount; ++c) {
#pragma GCC unroll 12
    for (int r = 0; r < kDigits * kRows; ++r) sums[r * kWidth + c] = total[c][r];
  }
}

template <int kRows, int kCount>
void dot_rows(float* c, const DigitPlanes& planes, const void* const* source, const void* const* ahead,
              const Windows& windows) {
  for (int side = 0; side < 2; ++side) {
    __m512i sums[kDigits * kRows * kWidth];
    for (int column = 0; column < kWidth; column += kCount) {
      const int at = side * kWidth + column;
      const void* const* const next = at + kCount < kColumns ? source + at + kCount : ahead;
      dot_columns<kRows, kCount>(sums + column, planes, source + at, next, windows);
    }
    for (int r = 0; r < kDigits * kRows; ++r)
      store_as(c + r * kColumns + side * kWidth, sum_lanes(sums + r * kWidth));
  }
}

void dot(float* c, const DigitPlanes& planes, const void* const* source, const void* const* next,
         const Windows& windows, int32_t rows) {
  switch (rows) {
    case 1:
      return dot_rows<1, 4>(c, planes, source, next, windows);
    case 2:
      return dot_rows<2, 4>(c, planes, source, next, windows);
    case 3:
      return dot_rows<3, 2>(c, planes, source, next, windows);
    default:
      return dot_rows<4, 2>(c, planes, source, next, windows);
  }
}

// Whole numbers of up to 46 bits, in float from the highest digit down. Every step rounds once, by at most
// 2^-24 of what the magnitudes of the row's products come to.
void combine(float* out, const float* c, const int32_t* corrections, const float* units, int32_t rows) {
  for (int32_t r = 0; r < rows; ++r) {
    for (int side = 0; side < 2; ++side) {
      __m512 total = _mm512_setzero_ps();
#pragma GCC unroll 3
      for (int digit = kDigits - 1; digit >= 0; --digit) {
        const __m512i sum = load_as<__m512i>(c + (digit * rows + r) * kColumns + side * kWidth);
        const __m512i exact = _mm512_sub_epi32(sum, _mm512_set1_epi32(corrections[r * kDigits + digit]));
        total = _mm512_fmadd_ps(total, _mm512_set1_ps(256.0f), _mm512_cvtepi32_ps(exact));
      }
      store_as(out + r * kColumns + side * kWidth, _mm512_scalef_ps(total, _mm512_set1_ps(units[r])));
    }
  }
}

}  // namespace

extern const DigitKernels digit_kernels{true,
                                        {unit<float>, unit<bfloat16>, unit<float16>},
                                        {split<float>, split<bfloat16>, split<float16>},
                                        pack_rows,
                                        pack_panel,
                                        pack_columns,
                                        multiply,
                                        dot,
                                        combine};

}  // namespace flashu::cpu::FLASHU_ISA
#else
namespace flashu::cpu::FLASHU_ISA {
extern const DigitKernels digit_kernels{};
}  // namespace flashu::cpu::FLASHU_ISA
#endif
