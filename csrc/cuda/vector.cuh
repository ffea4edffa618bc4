// What the memory-bound kernels share: rows in 16-byte chunks, sums over warps and blocks in one fixed order.
#pragma once

#include "core/divide_up.hpp"
#include "cuda/primitives/memory.cuh"

namespace flashu::cuda {

// Values of T in 16 bytes.
template <class T>
inline constexpr int kPerVector = 16 / static_cast<int>(sizeof(T));

// 16 bytes of T as floats, and back.
template <class T>
struct Vector {
  float value[kPerVector<T>];
};

template <class T>
FLASHU_DEVICE Vector<T> widen(uint4 bits) {
  Vector<T> out;
  const uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 4) {
      out.value[i] = __uint_as_float(words[i]);
    } else {
      const float2 pair = unpack2<T>(words[i]);
      out.value[2 * i] = pair.x;
      out.value[2 * i + 1] = pair.y;
    }
  }
  return out;
}

template <class T>
FLASHU_DEVICE uint4 narrow(const Vector<T>& in) {
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 4) {
      words[i] = __float_as_uint(in.value[i]);
    } else {
      words[i] = pack2<T>(in.value[2 * i], in.value[2 * i + 1]);
    }
  }
  return {words[0], words[1], words[2], words[3]};
}

template <class T>
FLASHU_DEVICE Vector<T> load_vector(const T* from) {
  return widen<T>(load16(from));
}

template <class T>
FLASHU_DEVICE void store_vector(T* to, const Vector<T>& value) {
  store16(to, narrow<T>(value));
}

// A place in memory whose address and every stride (in values) allow 16-byte chunks. Host.
template <class T>
bool takes_vectors(const T* base, std::initializer_list<int64_t> strides) {
  bool aligned = reinterpret_cast<uintptr_t>(base) % 16 == 0;
  for (const int64_t stride : strides) aligned &= stride % kPerVector<T> == 0;
  return aligned;
}

// The sum over the kGroup neighbouring lanes of a warp, the same bits in every lane; all lanes of the warp
// call it.
template <int kGroup>
FLASHU_DEVICE float sum_group(float value) {
#pragma unroll
  for (int step = kGroup / 2; step > 0; step /= 2) value += __shfl_xor_sync(kAllLanes, value, step);
  return value;
}

// The sum over a block of kThreads threads, the same bits in every thread. `scratch`: kThreads / 32 floats of
// shared memory, which may be used again after the next barrier.
template <int kThreads>
FLASHU_DEVICE float sum_block(float value, float* scratch) {
  value = sum_group<kWarp>(value);
  if constexpr (kThreads > kWarp) {
    if (threadIdx.x % kWarp == 0) scratch[threadIdx.x / kWarp] = value;
    __syncthreads();
    value = 0;
#pragma unroll
    for (int w = 0; w < kThreads / kWarp; ++w) value += scratch[w];
    __syncthreads();
  }
  return value;
}

}  // namespace flashu::cuda
