// CUDA C++ as g++ compiles it for the emulator; see csrc/cuda/primitives/platform.cuh. What the primitives of
// this folder do is said there; here is what the emulator checks.
#pragma once

#include <cstdint>

#include "core/half.hpp"
#include "simt/cuda.hpp"

#define FLASHU_DEVICE inline
// The last parameter of a primitive: where it was called.
#define FLASHU_WHERE , const simt::Place& where = simt::Place::current()
#define FLASHU_WHERE_ONLY const simt::Place& where = simt::Place::current()

namespace flashu::cuda {

using Stream = void*;

template <class T>
uint32_t pack2(float low, float high) {
  return static_cast<uint32_t>(from_float<T>(high).bits) << 16 | from_float<T>(low).bits;
}

}  // namespace flashu::cuda
