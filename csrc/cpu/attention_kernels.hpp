// Kernels of attention: a panel of queries, one in each lane, meets a block of keys. One table per CPU
// instruction set.
#pragma once

#include <cstdint>

#include "cpu/gemm_kernels.hpp"

namespace flashu::cpu {

// Keys are taken in blocks of so many, from slot 0 on; the running maximum of a query changes between blocks.
inline constexpr int64_t kKeyBlock = 128;

// Numbers of queries that a panel can have; a smaller one wastes less on few queries.
inline constexpr int kPanelShapes = 3;

// What the mask lets a query see.
struct MaskSpan {
  int64_t begin, end;  // of the first and behind the last key that it sees
  // What is added to a key whose mask is the type's lowest number: minus infinity, which hides it, or, where
  // the query sees no other keys, the lowest float, which makes all of them alike.
  float hidden;
};

// Queries of one key head, one in each lane, and what they have come to.
struct QueryPanel {
  float* queries;  // [d][lanes], scaled
  float* sums;     // [d][lanes] of weighted values
  float* most;     // [lanes] largest score
  float* total;    // [lanes] of weights
};

// `count` keys and their values, rows of d floats.
struct KeyRows {
  const float* keys;
  int64_t key_stride;
  const float* values;
  int64_t value_stride;
  int64_t count, d;
};

struct AttentionKernels {
  int32_t lanes[kPanelShapes];  // ascending

  // Adds the keys to the panel's sums. mask: [count][lanes], or null. scores: scratch of [count][lanes]. A
  // lane is computed without the others, and a key whose score is minus infinity changes no bit of it.
  void (*attend[kPanelShapes])(const QueryPanel& panel, const KeyRows& rows, const float* mask,
                               float* scores);

  // out[i] = from[i] * scale
  void (*widen[kStorageTypes])(float* out, const void* from, int64_t count, float scale);
  // out[i] = from[i] / total, and zeros where the total is zero.
  void (*narrow[kStorageTypes])(void* out, const float* from, int64_t count, float total);

  // out[i] = mask[i], the type's lowest number as `hidden`.
  void (*widen_mask[kStorageTypes])(float* out, const void* mask, int64_t count, float hidden);
  MaskSpan (*span[kStorageTypes])(const void* mask, int64_t count);

  // out[c * out_stride + r] = in[r * in_stride + c], r < rows, c < columns.
  void (*transpose)(float* out, int64_t out_stride, const float* in, int64_t in_stride, int64_t rows,
                    int64_t columns);
};
FLASHU_DECLARE_ISA(AttentionKernels, attention_kernels)

}  // namespace flashu::cpu
