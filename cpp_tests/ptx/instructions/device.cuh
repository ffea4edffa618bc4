// Runs small device functions, most of them one instruction. The literals that the tests compare with are
// from the PTX ISA's tables, so the same files hold a GPU and the machine for PTX against the documentation.
#pragma once

#include <cuda_runtime.h>
#include <gtest/gtest.h>

#include <bit>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

namespace flashu::test {

inline void check(cudaError_t status) {
  if (status != cudaSuccess) throw std::runtime_error(cudaGetErrorString(status));
}

// Memory of the device that starts as `values`.
template <class T>
class OnDevice {
 public:
  explicit OnDevice(const std::vector<T>& values) : count_(values.size()) {
    check(cudaMalloc(reinterpret_cast<void**>(&data_), count_ * sizeof(T)));
    check(cudaMemcpy(data_, values.data(), count_ * sizeof(T), cudaMemcpyHostToDevice));
  }
  ~OnDevice() { static_cast<void>(cudaFree(data_)); }
  OnDevice(const OnDevice&) = delete;
  T* get() const { return data_; }
  std::vector<T> values() const {
    std::vector<T> out(count_);
    check(cudaDeviceSynchronize());
    check(cudaMemcpy(out.data(), data_, count_ * sizeof(T), cudaMemcpyDeviceToHost));
    return out;
  }

 private:
  T* data_ = nullptr;
  std::size_t count_;
};

template <class F, class R>
__global__ void call(F f, R* out) {
  out[threadIdx.x] = f(static_cast<int>(threadIdx.x));
}

// f(thread) of every thread of one block.
template <class F>
auto on_threads(F f, int threads = 32) {
  using R = std::invoke_result_t<F, int>;
  const OnDevice<R> out(std::vector<R>(static_cast<std::size_t>(threads)));
  call<<<1, threads>>>(f, out.get());
  check(cudaGetLastError());
  return out.values();
}

// f of each of the arguments, on a thread each; at most 32.
template <class F, class Argument>
struct Applied {
  F f;
  Argument arguments[32];
  int count;
  __device__ std::invoke_result_t<F, Argument> operator()(int thread) const {
    return f(arguments[thread < count ? thread : 0]);
  }
};
template <class Argument, class F>
auto each(F f, const std::vector<Argument>& arguments) {
  Applied<F, Argument> applied{f, {}, static_cast<int>(arguments.size())};
  for (std::size_t n = 0; n < arguments.size(); ++n) applied.arguments[n] = arguments[n];
  auto results = on_threads(applied);
  results.resize(arguments.size());
  return results;
}

// Up to three 32-bit operands.
struct Three {
  uint32_t a = 0, b = 0, c = 0;
};
constexpr uint32_t bits(float f) { return std::bit_cast<uint32_t>(f); }
constexpr uint32_t kNan = 0x7fffffffu;  // the one that instructions return
constexpr float kInfinity = std::numeric_limits<float>::infinity();
inline const float kQuiet = std::numeric_limits<float>::quiet_NaN();

// A device function of three 32-bit values that is one instruction.
#define FLASHU_OP(name, text)                                                \
  struct name {                                                              \
    __device__ uint32_t operator()(Three o) const {                          \
      uint32_t d;                                                            \
      asm volatile("{ " text " }" : "=r"(d) : "r"(o.a), "r"(o.b), "r"(o.c)); \
      return d;                                                              \
    }                                                                        \
  }
using Words = std::vector<uint32_t>;

}  // namespace flashu::test
