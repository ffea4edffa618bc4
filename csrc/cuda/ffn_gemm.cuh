// One half of a gathered FFN as a matrix product, the way its kernels see it:
//   up:   out[r, j] = silu(a[r] . gate[n(j)]) * (a[r] . up[n(j)])         N = neurons, K = hidden
//   down: out[r, c] = sum over j of a[r, j] * down[c, n(j)] (+ residual)   N = width, K = neurons
// The linear layer is the down half of all neurons, with an epilogue where it has bias or activation. Here
//  n(j) = list[j], or first + j without a list. M = rows.
//
// TMA and 16-byte loads begin at neurons that are multiples of eight. A run that begins elsewhere is extended
// to the one before, by `lead` neurons that are not selected and may hold anything: up stores zeros for them,
// and down takes their columns for zeros.
#pragma once

#include <cstdint>

#include "core/ffn_tiles.hpp"
#include "cuda/epilogue.hpp"
#include "cuda/primitives/launch.cuh"

namespace flashu::cuda {

struct FfnGemm {
  const void* a;
  int64_t a_stride, m;
  const void* b;   // gate, or down
  const void* b2;  // up
  int64_t b_stride, b2_stride;
  int64_t n, k;
  bool gated;  // the up half. Not told by b2, which is null where hidden is zero
  int64_t intermediate;
  const int32_t* list;
  int64_t first;
  int64_t lead;   // 0 to 7, and 0 with a list
  int32_t block;  // the list names 64, 8 or 1 neighbours at a time, from multiples of eight on
  const void* residual;
  int64_t residual_stride;
  void* out;
  int64_t out_stride;
  // Down on sm_90: sums over K are made of so many parts, each begun at zero, which are added in order. With
  // `partial` every part is a block's own and goes to [parts][m][partial_stride] there, instead of the
  // result.
  int parts = 1;
  float* partial = nullptr;
  int64_t partial_stride = 0;
  Epilogue epilogue;  // of down without a list: the linear layer
};

// The neuron at a place of a list. Clamped: whatever a list holds, it leads to no row outside the weights.
FLASHU_DEVICE int64_t neuron_at(const int32_t* list, int64_t place, int64_t intermediate) {
  return min(static_cast<uint32_t>(list[place]), static_cast<uint32_t>(intermediate - 1));
}

// The first neuron of a block that begins at a place of a list. A multiple of eight, as TMA and 16-byte loads
// need it, whatever the list holds.
FLASHU_DEVICE int64_t block_at(const int32_t* list, int64_t place, int64_t intermediate) {
  return neuron_at(list, place, intermediate) / 8 * 8;
}

// Eight 16-bit values, the first `count` of them zero.
FLASHU_DEVICE uint4 without_first(uint4 bits, int64_t count) {
  const auto kept = [count](int i) {
    return count >= 2 * i + 2 ? 0u : count == 2 * i + 1 ? 0xffff0000u : ~0u;
  };
  return {bits.x & kept(0), bits.y & kept(1), bits.z & kept(2), bits.w & kept(3)};
}

// x sigmoid(z) = x / (1 + e^-z), within 4 units in the last place of fp32; a divisor that is too large for
// __fdividef stands for a result below 1e-35.
FLASHU_DEVICE float times_sigmoid(float x, float z) { return __fdividef(x, 1.0f + __expf(-z)); }
FLASHU_DEVICE float silu(float x) { return times_sigmoid(x, x); }

// Host entry points of the kernels, one file each. `type` is a flashu_dtype.
void ffn_gemm_f32(const FfnGemm& gemm, Stream stream);
// `tile`: one of core::kFfnTiles with the kernel kSm80; FLASHU_INTERNAL for any other, and for one by
// kVectors where rows are not aligned.
void ffn_gemm_sm80(const core::FfnTile& tile, const FfnGemm& gemm, int32_t type, Stream stream);

}  // namespace flashu::cuda
