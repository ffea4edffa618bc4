// The CUDA language for the SIMT emulator: keywords, built-in variables and functions with their names and
// meanings, so that a .cu file compiles as C++. Standard headers come first, because some of them use names
// that are keywords here.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "simt/engine.hpp"

#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

#define threadIdx (::simt::thread_index())
#define blockIdx (::simt::block_index())
#define blockDim (::simt::block_size())
#define gridDim (::simt::grid_size())

// ---- meetings

inline void __syncthreads(const simt::Place& where = simt::Place::current()) {
  simt::barrier(0, simt::threads_in_block(), where);
}
inline void __syncwarp(uint32_t mask = ~0u, const simt::Place& where = simt::Place::current()) {
  simt::collective(mask, "__syncwarp", nullptr, [](void* const*) {}, true, where);
}
inline void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }

namespace simt {

// Every lane hands in a value and takes the one of lane source(own lane).
template <class T, class Source>
T shuffle(uint32_t mask, T value, const char* kind, const Place& where, const Source& source) {
  struct Slot {
    T in, out;
    int from;
  };
  const int own = static_cast<int>(lane());
  Slot slot{value, value, source(own)};
  if ((mask >> slot.from & 1) == 0)
    fail(where, std::string(kind) + ": lane " + std::to_string(own) + " reads lane " +
                    std::to_string(slot.from) + ", which is not in the mask");
  collective(
      mask, kind, &slot,
      [](void* const* slots) {
        for (int i = 0; i < 32; ++i) {
          if (slots[i] == nullptr) continue;
          auto& own_slot = *static_cast<Slot*>(slots[i]);
          own_slot.out = static_cast<Slot*>(slots[own_slot.from])->in;
        }
      },
      false, where);
  return slot.out;
}

}  // namespace simt

template <class T>
T __shfl_sync(uint32_t mask, T value, int from, int width = 32,
              const simt::Place& where = simt::Place::current()) {
  return simt::shuffle(mask, value, "__shfl_sync", where,
                       [=](int own) { return (own & ~(width - 1)) | (from & (width - 1)); });
}
template <class T>
T __shfl_xor_sync(uint32_t mask, T value, int by, int width = 32,
                  const simt::Place& where = simt::Place::current()) {
  return simt::shuffle(mask, value, "__shfl_xor_sync", where, [=](int own) {
    const int from = own ^ by;
    return from / width > own / width ? own : from;
  });
}
template <class T>
T __shfl_up_sync(uint32_t mask, T value, unsigned by, int width = 32,
                 const simt::Place& where = simt::Place::current()) {
  return simt::shuffle(mask, value, "__shfl_up_sync", where, [=](int own) {
    return (own & (width - 1)) < static_cast<int>(by) ? own : own - static_cast<int>(by);
  });
}
template <class T>
T __shfl_down_sync(uint32_t mask, T value, unsigned by, int width = 32,
                   const simt::Place& where = simt::Place::current()) {
  return simt::shuffle(mask, value, "__shfl_down_sync", where, [=](int own) {
    return (own & (width - 1)) + static_cast<int>(by) >= width ? own : own + static_cast<int>(by);
  });
}
inline uint32_t __ballot_sync(uint32_t mask, int predicate,
                              const simt::Place& where = simt::Place::current()) {
  struct Slot {
    int in;
    uint32_t out;
  } slot{predicate, 0};
  simt::collective(
      mask, "__ballot_sync", &slot,
      [](void* const* slots) {
        uint32_t votes = 0;
        for (int i = 0; i < 32; ++i) {
          if (slots[i] != nullptr && static_cast<Slot*>(slots[i])->in != 0) votes |= 1u << i;
        }
        for (int i = 0; i < 32; ++i) {
          if (slots[i] != nullptr) static_cast<Slot*>(slots[i])->out = votes;
        }
      },
      false, where);
  return slot.out;
}

// ---- atomics on integers (floating-point sums of unordered threads are not deterministic and not used)

namespace simt {
template <class T, class Change>
T read_modify_write(T* address, const Change& change) {
  static_assert(std::is_integral_v<T>);
  maybe_yield();
  T old = __atomic_load_n(address, __ATOMIC_RELAXED);
  while (
      !__atomic_compare_exchange_n(address, &old, change(old), false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
  return old;
}
}  // namespace simt
template <class T>
T atomicAdd(T* address, std::type_identity_t<T> value) {
  return simt::read_modify_write(address, [=](T old) { return static_cast<T>(old + value); });
}
template <class T>
T atomicOr(T* address, std::type_identity_t<T> value) {
  return simt::read_modify_write(address, [=](T old) { return static_cast<T>(old | value); });
}
template <class T>
T atomicMax(T* address, std::type_identity_t<T> value) {
  return simt::read_modify_write(address, [=](T old) { return std::max<T>(old, value); });
}

// ---- arithmetic

using std::max;
using std::min;
inline int __popc(uint32_t value) { return std::popcount(value); }
inline int __clz(uint32_t value) { return std::countl_zero(value); }
inline int __ffs(uint32_t value) { return value == 0 ? 0 : std::countr_zero(value) + 1; }
inline float __expf(float x) { return std::exp(x); }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fdividef(float x, float y) { return x / y; }
inline float __uint_as_float(uint32_t bits) { return std::bit_cast<float>(bits); }
inline uint32_t __float_as_uint(float value) { return std::bit_cast<uint32_t>(value); }
