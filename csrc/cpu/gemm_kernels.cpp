// Packing and the register tile of the packed GEMM; compiled once per CPU instruction set.
#include "cpu/gemm_kernels.hpp"

#include <bit>
#include <cstring>

#include "cpu/simd.hpp"
#include "cpu/transpose.hpp"

namespace flashu::cpu::FLASHU_ISA {
namespace {

// Accumulators take tile_rows x 2 of the 16 (AVX-512: 32) vector registers.
#if defined(__AVX512F__)
constexpr int kTileRows = 12;
#else
constexpr int kTileRows = 6;
#endif
constexpr int kColumns = 2 * kWidth;

// What a slot of a storage type holds and how two slots are multiplied into a sum.
struct FloatSlot {
  static constexpr int kValues = 1;
  FLASHU_INLINE static Floats multiply_add(Floats sum, Floats b, float a) { return sum + b * a; }
};
#if defined(__AVX512BF16__)
struct PairSlot {
  static constexpr int kValues = 2;
  FLASHU_INLINE static Floats multiply_add(Floats sum, Floats b, float a) {
    const __m512bh pairs = (__m512bh)_mm512_set1_epi32(std::bit_cast<int32_t>(a));
    return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)b, pairs);
  }
};
#endif
template <class T>
struct SlotOf {
  using Type = FloatSlot;
};
#if defined(__AVX512BF16__)
template <>
struct SlotOf<bfloat16> {
  using Type = PairSlot;
};
#endif
using Bf16Slot = SlotOf<bfloat16>::Type;
template <class T>
inline constexpr int kValues = SlotOf<T>::Type::kValues;

// Two neighbouring bf16 as the slot that holds them; zero in place of the second where there is none.
FLASHU_INLINE float pair_slot(const bfloat16* values, bool both) {
  const uint32_t high = both ? static_cast<uint32_t>(values[1].bits) << 16 : 0;
  return std::bit_cast<float>(high | values[0].bits);
}

// kWidth slots from `source` on, as one row of a transpose.
template <class T>
FLASHU_INLINE Floats load_slots(const T* source) {
  if constexpr (kValues<T> == 2) {
    return load_as<Floats>(source);
  } else {
    return load(source);
  }
}

// kWidth slots of all rows of a tile. A store writes a whole vector, of which the next slots overwrite what
// is not theirs; only the last one must not reach into memory of another tile.
template <class T>
FLASHU_INLINE void pack_row_block(float* out, const T* source, int64_t stride, int64_t rows) {
  constexpr int kGroups = (kTileRows + kWidth - 1) / kWidth;
  constexpr int kLastGroup = kTileRows - (kGroups - 1) * kWidth;
  Floats slots[kGroups][kWidth];
#pragma GCC unroll 2
  for (int group = 0; group < kGroups; ++group) {
    for (int i = 0; i < kWidth; ++i) {
      const int r = group * kWidth + i;
      slots[group][i] = r < rows ? load_slots(source + r * stride) : Floats{};
    }
    transpose(slots[group]);
  }
  for (int s = 0; s < kWidth; ++s) {
    float* const to = out + s * kTileRows;
    for (int group = 0; group + 1 < kGroups; ++group) store(to + group * kWidth, slots[group][s]);
    float* const last = to + (kGroups - 1) * kWidth;
    if (s + 1 < kWidth) {
      store(last, slots[kGroups - 1][s]);
    } else {
      std::memcpy(last, &slots[kGroups - 1][s], kLastGroup * sizeof(float));
    }
  }
}

template <class T>
void pack_rows(float* out, const void* x, int64_t stride, int64_t rows, int64_t count) {
  const T* source = static_cast<const T*>(x);
  constexpr int64_t kBlock = kWidth * kValues<T>;
  int64_t k = 0;
  for (; k + kBlock <= count; k += kBlock)
    pack_row_block(out + k / kValues<T> * kTileRows, source + k, stride, rows);
  for (; k < count; k += kValues<T>) {
    for (int64_t r = 0; r < kTileRows; ++r) {
      float& slot = out[k / kValues<T> * kTileRows + r];
      if (r >= rows) {
        slot = 0.0f;
      } else if constexpr (kValues<T> == 2) {
        slot = pair_slot(source + r * stride + k, k + 1 < count);
      } else {
        slot = to_float(source[r * stride + k]);
      }
    }
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

// Far enough for memory to answer, near enough for all rows to stay in the caches: with 32 rows of AVX-512
// half the distance was 5 % faster, with 16 of AVX2 14 % slower.
#if defined(__AVX512F__)
constexpr int64_t kPrefetchBytes = 512;
#else
constexpr int64_t kPrefetchBytes = 1024;
#endif
constexpr int64_t kLine = 64;

// Asks for what lies at element `at` of every panel row, 2 * kWidth elements of it.
template <class T>
FLASHU_INLINE void prefetch(const void* const* rows, int64_t at) {
  for (int c = 0; c < kColumns; ++c) {
    const char* line = reinterpret_cast<const char*>(static_cast<const T*>(rows[c]) + at);
#pragma GCC unroll 2
    for (int64_t byte = 0; byte < static_cast<int64_t>(2 * kWidth * sizeof(T)); byte += kLine)
      __builtin_prefetch(line + byte, 0, 2);
  }
}

template <class T>
void pack_floats(float* out, const void* const* source, const void* const* ahead, int64_t count) {
  int64_t k = 0;
  for (; k + 2 * kWidth <= count; k += 2 * kWidth) {
    if (ahead != nullptr) prefetch<T>(ahead, k);
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

#if defined(__AVX512BF16__)
// kWidth slots from k on of kWidth rows: slots[i][row].
FLASHU_INLINE void load_pairs(Floats (&slots)[kWidth], const void* const* rows, int64_t k) {
  for (int i = 0; i < kWidth; ++i) slots[i] = load_as<Floats>(static_cast<const bfloat16*>(rows[i]) + k);
  transpose(slots);
}

FLASHU_INLINE void pack_pair(float* out, const void* const* source, int64_t k, bool both) {
  for (int c = 0; c < kColumns; ++c) out[c] = pair_slot(static_cast<const bfloat16*>(source[c]) + k, both);
}

void pack_pairs(float* out, const void* const* source, const void* const* ahead, int64_t count) {
  int64_t k = 0;
  for (; k + 2 * kWidth <= count; k += 2 * kWidth) {
    if (ahead != nullptr) prefetch<bfloat16>(ahead, k);
#pragma GCC unroll 2
    for (int side = 0; side < 2; ++side) {
      Floats slots[kWidth];
      load_pairs(slots, source + side * kWidth, k);
      for (int i = 0; i < kWidth; ++i) store(out + (k / 2 + i) * kColumns + side * kWidth, slots[i]);
    }
  }
  for (; k < count; k += 2) pack_pair(out + k / 2 * kColumns, source, k, k + 1 < count);
}
#endif

template <class T>
void pack_panel(float* out, const void* const* source, const void* const* ahead, int64_t count) {
#if defined(__AVX512BF16__)
  if constexpr (kValues<T> == 2) return pack_pairs(out, source, ahead, count);
#endif
  pack_floats<T>(out, source, ahead, count);
}

// Loads windows of kWidth neighbouring columns and keeps those that the list names next, in its order: at 80
// % of the columns that reads little more than a contiguous range.
template <class T>
void pack_float_columns(float* out, const void* const* source, const int32_t* columns, int64_t count,
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

// T: of the weights. Slot: of x.
template <class T, class Slot>
void pack_columns(float* out, const void* const* source, const int32_t* columns, int64_t count,
                  int64_t width) {
  if constexpr (Slot::kValues == 1) {
    pack_float_columns<T>(out, source, columns, count, width);
  } else {
    // As floats first, then two columns to a slot: a bf16 is the high half of its float, an int8 fits it too.
    constexpr int64_t kStrip = 32;
    alignas(64) float strip[kStrip * kColumns];
    for (int64_t k = 0; k < count; k += kStrip) {
      const int64_t taken = k + kStrip < count ? kStrip : count - k;
      pack_float_columns<T>(strip, source, columns + k, taken, width);
      for (int64_t i = 0; i < taken; i += 2) {
        for (int c = 0; c < kColumns; c += kWidth) {
          const Words low = (Words)load(strip + i * kColumns + c) >> 16;
          const Words high = i + 1 < taken ? (Words)load(strip + (i + 1) * kColumns + c) : Words{};
          store(out + (k + i) / 2 * kColumns + c, (Floats)(low | high));
        }
      }
    }
  }
}

// `slots` slots from k on of one block of sums, whole vectors of them first. Each column's products are added
// one by one, as tile() does it.
template <class T>
FLASHU_INLINE void add_row_block(Floats (&sums)[2], const float* a, const void* const* source,
                                 const void* const* ahead, int64_t begin, int64_t end, int64_t count) {
  using Slot = typename SlotOf<T>::Type;
  constexpr int64_t kAhead = kPrefetchBytes / static_cast<int64_t>(sizeof(T));
  int64_t k = begin;
  for (; k + 2 * kWidth <= end; k += 2 * kWidth) {
    if (k + kAhead < count) {
      prefetch<T>(source, k + kAhead);
    } else if (ahead != nullptr) {
      prefetch<T>(ahead, k + kAhead - count);
    }
#pragma GCC unroll 2
    for (int side = 0; side < 2; ++side) {
      constexpr int kSlots = 2 * kWidth / Slot::kValues;
      Floats columns[kSlots];
#if defined(__AVX512BF16__)
      if constexpr (Slot::kValues == 2) {
        load_pairs(columns, source + side * kWidth, k);
      } else
#endif
      {
        load_columns<T>(columns, source + side * kWidth, k);
      }
#pragma GCC unroll 32
      for (int i = 0; i < kSlots; ++i)
        sums[side] = Slot::multiply_add(sums[side], columns[i], a[(k / Slot::kValues + i) * kTileRows]);
    }
  }
  for (; k < end; k += Slot::kValues) {
    float column[kColumns];
#if defined(__AVX512BF16__)
    if constexpr (Slot::kValues == 2) {
      pack_pair(column, source, k, k + 1 < count);
    } else
#endif
    {
      pack_column<T>(column, source, k);
    }
    const float value = a[k / Slot::kValues * kTileRows];
    sums[0] = Slot::multiply_add(sums[0], load(column), value);
    sums[1] = Slot::multiply_add(sums[1], load(column + kWidth), value);
  }
}

template <class T>
void multiply_row(float* c, const float* a, const void* const* source, const void* const* ahead,
                  int64_t count) {
  constexpr int64_t kBlock = kSumBlock * kValues<T>;
  Floats total[2] = {};
  for (int64_t begin = 0; begin < count; begin += kBlock) {
    Floats sums[2] = {};
    add_row_block<T>(sums, a, source, ahead, begin, begin + kBlock < count ? begin + kBlock : count, count);
    total[0] = begin == 0 ? sums[0] : total[0] + sums[0];
    total[1] = begin == 0 ? sums[1] : total[1] + sums[1];
  }
  store(c, total[0]);
  store(c + kWidth, total[1]);
}

// Int8 weights: four neighbours of a row travel through one transpose as a 32-bit word, and are widened to
// the slots of x behind it. Integers of eight bits are exact in bf16 as well.
constexpr int64_t kWordBlock = 4 * kWidth;  // k that one transpose brings

FLASHU_INLINE void load_words(Floats (&words)[kWidth], const void* const* rows, int64_t k) {
  Floats block[kWidth];  // in registers
#pragma GCC unroll 16
  for (int i = 0; i < kWidth; ++i) block[i] = load_as<Floats>(static_cast<const int8_t*>(rows[i]) + k);
  transpose(block);
#pragma GCC unroll 16
  for (int i = 0; i < kWidth; ++i) words[i] = block[i];
}

// A byte of every word as a float: its bits, with the sign's turned, behind the exponent of 2^23 or 2^15 are
// 128 more than it. That takes fewer instructions than to shift and convert.
FLASHU_INLINE Floats byte_of(Floats words, int byte) {
  const Words half = byte < 2 ? (Words)words : (Words)words >> 16;
  return byte % 2 == 0 ? (Floats)((half & 0xffu) ^ 0x4b000080u) - 8388736.0f
                       : (Floats)((half & 0xff00u) ^ 0x47008000u) - 32896.0f;
}

// Slot `part` of those that a word holds.
template <class Slot>
FLASHU_INLINE Floats slot_of(Floats words, int part) {
  if constexpr (Slot::kValues == 1) {
    return byte_of(words, part);
  } else {
    const Words low = (Words)byte_of(words, 2 * part) >> 16;
    return (Floats)(low | (Words)byte_of(words, 2 * part + 1));
  }
}

// The slot at k of all panel rows, one by one.
template <class Slot>
FLASHU_INLINE void pack_int8_slot(float* out, const void* const* source, int64_t k, bool both) {
  for (int c = 0; c < kColumns; ++c) {
    const int8_t* const row = static_cast<const int8_t*>(source[c]) + k;
    if constexpr (Slot::kValues == 1) {
      out[c] = to_float(row[0]);
    } else {
      const bfloat16 pair[2] = {from_float<bfloat16>(to_float(row[0])),
                                from_float<bfloat16>(both ? to_float(row[1]) : 0)};
      out[c] = pair_slot(pair, true);
    }
  }
}

template <class Slot>
void pack_int8_panel(float* out, const void* const* source, const void* const* ahead, int64_t count) {
  constexpr int kParts = 4 / Slot::kValues;
  int64_t k = 0;
  for (; k + kWordBlock <= count; k += kWordBlock) {
    if (ahead != nullptr) prefetch<int8_t>(ahead, k);
    for (int side = 0; side < 2; ++side) {
      Floats words[kWidth];
      load_words(words, source + side * kWidth, k);
      for (int i = 0; i < kWidth; ++i) {
        float* const to = out + (k / Slot::kValues + i * kParts) * kColumns + side * kWidth;
#pragma GCC unroll 4
        for (int part = 0; part < kParts; ++part) store(to + part * kColumns, slot_of<Slot>(words[i], part));
      }
    }
  }
  for (; k < count; k += Slot::kValues)
    pack_int8_slot<Slot>(out + k / Slot::kValues * kColumns, source, k, k + 1 < count);
}

// As multiply_row: the same sums in the same order. The next words are transposed between the halves of the
// products with the present ones, which are a long chain of sums that the CPU fills with that.
template <class Slot>
void multiply_int8_row(float* c, const float* a, const void* const* source, const void* const* ahead,
                       int64_t count) {
  constexpr int kParts = 4 / Slot::kValues;
  Floats total[2] = {};
  Floats sums[2] = {};
  // Ends a block of sums before slot `slot`, or behind the last one.
  const auto end_block = [&](int64_t slot) {
#pragma GCC unroll 2
    for (int side = 0; side < 2; ++side) {
      total[side] = slot <= kSumBlock ? sums[side] : total[side] + sums[side];
      sums[side] = Floats{};
    }
  };
  const int64_t whole = count / kWordBlock * kWordBlock;
  Floats words[2][2][kWidth];
  if (whole > 0) {
    load_words(words[0][0], source, 0);
    load_words(words[0][1], source + kWidth, 0);
  }
  int64_t k = 0;
  for (; k < whole; k += kWordBlock) {
    if (k + kPrefetchBytes < count) {
      prefetch<int8_t>(source, k + kPrefetchBytes);
    } else if (ahead != nullptr) {
      prefetch<int8_t>(ahead, k + kPrefetchBytes - count);
    }
    const Floats(&here)[2][kWidth] = words[k / kWordBlock % 2];
    Floats(&next)[2][kWidth] = words[(k / kWordBlock + 1) % 2];
    constexpr int kHalf = kWidth / 2;
#pragma GCC unroll 2
    for (int side = 0; side < 2; ++side) {
      if (k + kWordBlock < whole) load_words(next[side], source + side * kWidth, k + kWordBlock);
      for (int i = side * kHalf; i < (side + 1) * kHalf; ++i) {
        const int64_t first = k / Slot::kValues + i * kParts;
        if (first % kSumBlock == 0 && first > 0) end_block(first);
#pragma GCC unroll 4
        for (int part = 0; part < kParts; ++part) {
          const float value = a[(first + part) * kTileRows];
          sums[0] = Slot::multiply_add(sums[0], slot_of<Slot>(here[0][i], part), value);
          sums[1] = Slot::multiply_add(sums[1], slot_of<Slot>(here[1][i], part), value);
        }
      }
    }
  }
  for (; k < count; k += Slot::kValues) {
    const int64_t slot = k / Slot::kValues;
    if (slot % kSumBlock == 0 && slot > 0) end_block(slot);
    float column[kColumns];
    pack_int8_slot<Slot>(column, source, k, k + 1 < count);
    sums[0] = Slot::multiply_add(sums[0], load(column), a[slot * kTileRows]);
    sums[1] = Slot::multiply_add(sums[1], load(column + kWidth), a[slot * kTileRows]);
  }
  end_block((count + Slot::kValues - 1) / Slot::kValues);
  store(c, total[0]);
  store(c + kWidth, total[1]);
}

// One register tile; kRows is a template argument so that the accumulators stay in registers.
template <class Slot, int kRows>
void tile(float* c, const float* a, const float* b, int64_t slots, bool first) {
  for (int64_t begin = 0; begin < slots; begin += kSumBlock) {
    const int64_t end = begin + kSumBlock < slots ? begin + kSumBlock : slots;
    Floats left[kRows] = {};
    Floats right[kRows] = {};
    for (int64_t s = begin; s < end; ++s) {
      const Floats b0 = load(b + s * kColumns);
      const Floats b1 = load(b + s * kColumns + kWidth);
#pragma GCC unroll 12
      for (int r = 0; r < kRows; ++r) {
        left[r] = Slot::multiply_add(left[r], b0, a[s * kTileRows + r]);
        right[r] = Slot::multiply_add(right[r], b1, a[s * kTileRows + r]);
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

template <class Slot>
void multiply(float* c, const float* a, const float* b, int64_t slots, int32_t rows, bool first) {
  switch (rows) {
    case 1:
      return tile<Slot, 1>(c, a, b, slots, first);
    case 2:
      return tile<Slot, 2>(c, a, b, slots, first);
    case 3:
      return tile<Slot, 3>(c, a, b, slots, first);
    case 4:
      return tile<Slot, 4>(c, a, b, slots, first);
    case 5:
      return tile<Slot, 5>(c, a, b, slots, first);
    case 6:
      return tile<Slot, 6>(c, a, b, slots, first);
#if defined(__AVX512F__)
    case 7:
      return tile<Slot, 7>(c, a, b, slots, first);
    case 8:
      return tile<Slot, 8>(c, a, b, slots, first);
    case 9:
      return tile<Slot, 9>(c, a, b, slots, first);
    case 10:
      return tile<Slot, 10>(c, a, b, slots, first);
    case 11:
      return tile<Slot, 11>(c, a, b, slots, first);
    case 12:
      return tile<Slot, 12>(c, a, b, slots, first);
#endif
    default:
      return;
  }
}

}  // namespace

extern const GemmKernels gemm_kernels{
    kTileRows,
    kColumns,
    {kValues<float>, kValues<bfloat16>, kValues<float16>},
    {pack_rows<float>, pack_rows<bfloat16>, pack_rows<float16>},
    {pack_panel<float>, pack_panel<bfloat16>, pack_panel<float16>, pack_int8_panel<FloatSlot>,
     pack_int8_panel<Bf16Slot>, pack_int8_panel<FloatSlot>},
    {pack_columns<float, FloatSlot>, pack_columns<bfloat16, Bf16Slot>, pack_columns<float16, FloatSlot>,
     pack_columns<int8_t, FloatSlot>, pack_columns<int8_t, Bf16Slot>, pack_columns<int8_t, FloatSlot>},
    {multiply_row<float>, multiply_row<bfloat16>, multiply_row<float16>, multiply_int8_row<FloatSlot>,
     multiply_int8_row<Bf16Slot>, multiply_int8_row<FloatSlot>},
    {multiply<FloatSlot>, multiply<Bf16Slot>, multiply<FloatSlot>},
};

}  // namespace flashu::cpu::FLASHU_ISA
