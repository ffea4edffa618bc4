// The gathered FFN for few rows in one pass over the weights; see ffn_decode.cu.
#pragma once

#include <cstdint>

#include "cuda/ffn_gemm.cuh"

namespace flashu::cuda {

// All strides in values. Rows of x and of the three weights begin at multiples of 16 bytes, `hidden` is a
// multiple of 8, and without a list so is `first`. The first `lead` neurons are not selected; see
// ffn_gemm.cuh.
struct FfnDecode {
  const void* x;
  int64_t x_row_stride, rows, hidden;
  const void* gate;
  const void* up;
  const void* down;
  int64_t gate_stride, up_stride, down_stride;
  int64_t neurons, intermediate, first, lead;
  const int32_t* list;
  int32_t block;  // of the list; see ffn_gemm.cuh
  int64_t width;
  const void* residual;
  int64_t residual_stride;
  void* out;
  int64_t out_stride;
  float* partial;  // [blocks][rows][width]
  int64_t neurons_of_block;
};

int64_t decode_neurons_of_block(int64_t neurons);
int64_t decode_blocks(const FfnDecode& f);

// Whether the rows and a block's share of h fit into shared memory.
bool decode_fits(const FfnDecode& f, int shared_limit);

void ffn_decode(const FfnDecode& f, int32_t type, Stream stream);

}  // namespace flashu::cuda
