// Packing and the register tile of the packed GEMM; compiled once per CPU instruction set.
#include "cpu/gemm_kernels.hpp"

#include "cpu/simd.hpp"

namespace flashu::cpu::FLASHU_ISA {
namespace {

// Accumulators take tile_rows x 2 of the 16 (AVX-512: 32) vector registers.
#if defined(__AVX512F__)
constexpr int kTileRows = 12;
#else
constexpr int kTileRows = 6;
#endif
constexpr int kColumns = 2 * kWidth;

// Transposes a kWidth x kWidth block in registers: rows[i][j] -> rows[j][i].
#if defined(__AVX2__) && !defined(__AVX512F__)
FLASHU_INLINE void transpose(Floats (&rows)[kWidth]) {
  __m256 pairs[8];
  for (int i = 0; i < 8; i += 2) {
    pairs[i] = _mm256_unpacklo_ps((__m256)rows[i], (__m256)rows[i + 1]);
    pairs[i + 1] = _mm256_unpackhi_ps((__m256)rows[i], (__m256)rows[i + 1]);
  }
  __m256 quads[8];
  for (int i = 0; i < 8; i += 4) {
    quads[i] = _mm256_shuffle_ps(pairs[i], pairs[i + 2], 0x44);
    quads[i + 1] = _mm256_shuffle_ps(pairs[i], pairs[i + 2], 0xee);
    quads[i + 2] = _mm256_shuffle_ps(pairs[i + 1], pairs[i + 3], 0x44);
    quads[i + 3] = _mm256_shuffle_ps(pairs[i + 1], pairs[i + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    rows[i] = (Floats)_mm256_permute2f128_ps(quads[i], quads[i + 4], 0x20);
    rows[i + 4] = (Floats)_mm256_permute2f128_ps(quads[i], quads[i + 4], 0x31);
  }
}
#else
// Swaps the off-diagonal halves of ever smaller blocks.
FLASHU_INLINE void transpose(Floats (&rows)[kWidth]) {
#pragma GCC unroll 4
  for (int step = kWidth / 2; step >= 1; step /= 2) {
    Ints low{};
    Ints high{};
    for (int lane = 0; lane < kWidth; ++lane) {
      low[lane] = (lane & step) ? kWidth + lane - step : lane;
      high[lane] = (lane & step) ? kWidth + lane : lane + step;
    }
    for (int i = 0; i < kWidth; ++i) {
      if (i & step) continue;
      const Floats a = rows[i];
      const Floats b = rows[i + step];
      rows[i] = __builtin_shuffle(a, b, low);
      rows[i + step] = __builtin_shuffle(a, b, high);
    }
  }
}
#endif

template <class T>
void pack_rows(float* out, const void* x, int64_t stride, int64_t rows, int64_t count) {
  const T* source = static_cast<const T*>(x);
  for (int64_t r = 0; r < kTileRows; ++r) {
    for (int64_t k = 0; k < count; ++k)
      out[k * kTileRows + r] = r < rows ? to_float(source[r * stride + k]) : 0.0f;
  }
}

// 2 * kWidth columns from `column` on of kWidth rows: columns[k][row].
template <class T>
FLASHU_INLINE void load_columns(Floats (&columns)[2 * kWidth], const void* const* rows, int64_t column) {
#pragma GCC unroll 2
  for (int half = 0; half < 2; ++half) {
    Floats block[kWidth];
    for (int i = 0; i < kWidth; ++i) block[i] = load(static_cast<const T*>(rows[i]) + column + half * kWidth);
    transpose(block);
    for (int i = 0; i < kWidth; ++i) columns[half * kWidth + i] = block[i];
  }
}
// bf16: neighbours travel through one transpose as a 32-bit word, whose halves are then widened in place.
template <>
FLASHU_INLINE void load_columns<bfloat16>(Floats (&columns)[2 * kWidth], const void* const* rows,
                                          int64_t column) {
  Floats pairs[kWidth];
  for (int i = 0; i < kWidth; ++i) pairs[i] = load_as<Floats>(static_cast<const bfloat16*>(rows[i]) + column);
  transpose(pairs);
  for (int i = 0; i < kWidth; ++i) {
    columns[2 * i] = (Floats)((Words)pairs[i] << 16);
    columns[2 * i + 1] = (Floats)((Words)pairs[i] & 0xffff0000u);
  }
}

// kWidth columns from `column` on of all panel rows: out[k][c], only the first `count` k are written.
template <class T>
FLASHU_INLINE void pack_block(float* out, const void* const* source, int64_t column, int count) {
#pragma GCC unroll 2
  for (int side = 0; side < 2; ++side) {
    Floats rows[kWidth];
    for (int i = 0; i < kWidth; ++i)
      rows[i] = load(static_cast<const T*>(source[side * kWidth + i]) + column);
    transpose(rows);
    if (count == kWidth) {
      for (int k = 0; k < kWidth; ++k) store(out + k * kColumns + side * kWidth, rows[k]);
    } else {
      for (int k = 0; k < count; ++k) store(out + k * kColumns + side * kWidth, rows[k]);
    }
  }
}

template <class T>
FLASHU_INLINE void pack_column(float* out, const void* const* source, int64_t column) {
  for (int c = 0; c < kColumns; ++c) out[c] = to_float(static_cast<const T*>(source[c])[column]);
}

template <class T>
void pack_panel(float* out, const void* const* source, int64_t count) {
  int64_t k = 0;
  for (; k + 2 * kWidth <= count; k += 2 * kWidth) {
#pragma GCC unroll 2
    for (int side = 0; side < 2; ++side) {
      Floats columns[2 * kWidth];
      load_columns<T>(columns, source + side * kWidth, k);
      for (int i = 0; i < 2 * kWidth; ++i) store(out + (k + i) * kColumns + side * kWidth, columns[i]);
    }
  }
  for (; k + kWidth <= count; k += kWidth) pack_block<T>(out + k * kColumns, source, k, kWidth);
  for (; k < count; ++k) pack_column<T>(out + k * kColumns, source, k);
}

// Loads windows of kWidth neighbouring columns and keeps those that the list names next, in its order: at 80
// % of the columns that reads little more than a contiguous range.
template <class T>
void pack_columns(float* out, const void* const* source, const int32_t* columns, int64_t count,
                  int64_t width) {
  alignas(64) float window[kWidth * kColumns];
  int64_t k = 0;
  while (k < count) {
    const int32_t base = columns[k];
    if (base + kWidth > width) {  // a full window would run past the row
      pack_column<T>(out + k * kColumns, source, base);
      ++k;
      continue;
    }
    int taken = 0;
    int contiguous = 0;
    while (k + taken < count && static_cast<uint32_t>(columns[k + taken] - base) < kWidth) {
      contiguous += columns[k + taken] == base + taken;
      ++taken;
      if (taken == kWidth) break;
    }
    float* panel = out + k * kColumns;
    if (contiguous == taken) {
      pack_block<T>(panel, source, base, taken);
    } else {
      pack_block<T>(window, source, base, kWidth);
      for (int i = 0; i < taken; ++i) {
        const float* column = window + (columns[k + i] - base) * kColumns;
        store(panel + i * kColumns, load(column));
        store(panel + i * kColumns + kWidth, load(column + kWidth));
      }
    }
    k += taken;
  }
}

// Columns [begin, end) of one block of sums. Each column's products are added one by one, as tile() does it.
template <class T>
FLASHU_INLINE void add_row_block(Floats (&sums)[2], const float* a, const void* const* source, int64_t begin,
                                 int64_t end) {
  int64_t k = begin;
  for (; k + 2 * kWidth <= end; k += 2 * kWidth) {
#pragma GCC unroll 2
    for (int side = 0; side < 2; ++side) {
      Floats columns[2 * kWidth];
      load_columns<T>(columns, source + side * kWidth, k);
#pragma GCC unroll 32
      for (int i = 0; i < 2 * kWidth; ++i) sums[side] += columns[i] * a[(k + i) * kTileRows];
    }
  }
  for (; k < end; ++k) {
    float column[kColumns];
    pack_column<T>(column, source, k);
    sums[0] += load(column) * a[k * kTileRows];
    sums[1] += load(column + kWidth) * a[k * kTileRows];
  }
}

template <class T>
void multiply_row(float* c, const float* a, const void* const* source, int64_t count) {
  Floats total[2] = {};
  for (int64_t begin = 0; begin < count; begin += kSumBlock) {
    Floats sums[2] = {};
    add_row_block<T>(sums, a, source, begin, begin + kSumBlock < count ? begin + kSumBlock : count);
    total[0] = begin == 0 ? sums[0] : total[0] + sums[0];
    total[1] = begin == 0 ? sums[1] : total[1] + sums[1];
  }
  store(c, total[0]);
  store(c + kWidth, total[1]);
}

// One register tile; kRows is a template argument so that the accumulators stay in registers.
template <int kRows>
void tile(float* c, const float* a, const float* b, int64_t count, bool first) {
  for (int64_t begin = 0; begin < count; begin += kSumBlock) {
    const int64_t end = begin + kSumBlock < count ? begin + kSumBlock : count;
    Floats left[kRows] = {};
    Floats right[kRows] = {};
    for (int64_t k = begin; k < end; ++k) {
      const Floats b0 = load(b + k * kColumns);
      const Floats b1 = load(b + k * kColumns + kWidth);
#pragma GCC unroll 12
      for (int r = 0; r < kRows; ++r) {
        left[r] += b0 * a[k * kTileRows + r];
        right[r] += b1 * a[k * kTileRows + r];
      }
    }
    const bool overwrite = first && begin == 0;
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r) {
      float* row = c + r * kColumns;
      store(row, overwrite ? left[r] : load(row) + left[r]);
      store(row + kWidth, overwrite ? right[r] : load(row + kWidth) + right[r]);
    }
  }
}

void multiply(float* c, const float* a, const float* b, int64_t count, int32_t rows, bool first) {
  switch (rows) {
    case 1:
      return tile<1>(c, a, b, count, first);
    case 2:
      return tile<2>(c, a, b, count, first);
    case 3:
      return tile<3>(c, a, b, count, first);
    case 4:
      return tile<4>(c, a, b, count, first);
    case 5:
      return tile<5>(c, a, b, count, first);
    case 6:
      return tile<6>(c, a, b, count, first);
#if defined(__AVX512F__)
    case 7:
      return tile<7>(c, a, b, count, first);
    case 8:
      return tile<8>(c, a, b, count, first);
    case 9:
      return tile<9>(c, a, b, count, first);
    case 10:
      return tile<10>(c, a, b, count, first);
    case 11:
      return tile<11>(c, a, b, count, first);
    case 12:
      return tile<12>(c, a, b, count, first);
#endif
    default:
      return;
  }
}

}  // namespace

extern const GemmKernels gemm_kernels{
    kTileRows,
    kColumns,
    {pack_rows<float>, pack_rows<bfloat16>, pack_rows<float16>},
    {pack_panel<float>, pack_panel<bfloat16>, pack_panel<float16>},
    {pack_columns<float>, pack_columns<bfloat16>, pack_columns<float16>},
    {multiply_row<float>, multiply_row<bfloat16>, multiply_row<float16>},
    multiply,
};

}  // namespace flashu::cpu::FLASHU_ISA
