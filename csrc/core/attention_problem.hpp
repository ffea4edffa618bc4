// One call of attention after all checks: what the kernels are asked for.
#pragma once

#include <cstdint>

namespace flashu::core {

// [rows, heads, tokens, d] with contiguous heads: strides in elements.
struct Heads {
  void* data = nullptr;
  int64_t row = 0, head = 0, token = 0;
};

struct AttentionProblem {
  int32_t type;  // flashu_dtype F32, BF16 or F16
  int64_t rows, heads, kv_heads, n, tokens, d;
  Heads query, key, value, out;
  const int64_t* lengths;  // of each row, lengths_stride apart, or null: all tokens
  int64_t lengths_stride;
  const void* mask;              // of the storage type, or null
  int64_t mask_row, mask_query;  // strides; 0 where one serves all
  int64_t mask_queries;          // how many there are, 1 or n
};

}  // namespace flashu::core
