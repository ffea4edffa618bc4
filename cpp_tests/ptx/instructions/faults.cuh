// Kernels with a planted fault: instructions, and what the machine says of a launch.
#pragma once

#include <cstdlib>

#include "device.cuh"

#define FLASHU_AT(p) static_cast<uint32_t>(__cvta_generic_to_shared(p))
#define FLASHU_INIT(bar, n) \
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(FLASHU_AT(bar)), "r"(n) : "memory")
#define FLASHU_ARRIVE(bar) \
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(FLASHU_AT(bar)) : "memory")
#define FLASHU_EXPECT(bar, bytes)                                                                         \
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(FLASHU_AT(bar)), "r"(bytes) \
               : "memory")
#define FLASHU_WAIT(bar, parity)                                                                             \
  asm volatile(                                                                                              \
      "{ .reg .pred p; WAIT_%=: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1; @!p bra WAIT_%=; }" :: \
          "r"(FLASHU_AT(bar)),                                                                               \
      "r"(parity)                                                                                            \
      : "memory")
#define FLASHU_BULK_LOAD(to, from, bytes, bar)                                                         \
  asm volatile(                                                                                        \
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"( \
          FLASHU_AT(to)),                                                                              \
      "l"(from), "r"(bytes), "r"(FLASHU_AT(bar))                                                       \
      : "memory")
#define FLASHU_BULK_STORE(to, from, bytes)                                                                 \
  asm volatile(                                                                                            \
      "cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2; cp.async.bulk.commit_group;" ::"l"(to), \
      "r"(FLASHU_AT(from)), "r"(bytes)                                                                     \
      : "memory")
#define FLASHU_COPY(to, from)                                                                           \
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16; cp.async.commit_group;" ::"r"(FLASHU_AT(to)), \
               "l"(from)                                                                                \
               : "memory")
#define FLASHU_COPY_WAIT() asm volatile("cp.async.wait_group 0;" ::: "memory")
#define FLASHU_FENCE() asm volatile("fence.proxy.async.shared::cta;" ::: "memory")

namespace flashu::test {

// Runs a kernel and returns what the machine says of it, "" if nothing; the device is as new then.
template <class... Arguments>
std::string said_by(unsigned blocks, void (*kernel)(Arguments...), Arguments... arguments) {
  kernel<<<blocks, 64>>>(arguments...);
  const cudaError_t status = cudaDeviceSynchronize();
  const std::string message = status == cudaSuccess ? "" : cudaGetErrorString(status);
  check(cudaDeviceReset());
  return message;
}

template <class... Arguments>
std::string said(void (*kernel)(Arguments...), Arguments... arguments) {
  return said_by(1, kernel, arguments...);
}

class Faults : public testing::TestWithParam<const char*> {
 protected:
  void SetUp() override {
    setenv("FLASHU_PTX_WHEN", GetParam(), 1);
    setenv("FLASHU_PTX_RACES", "1", 1);
    setenv("FLASHU_PTX_TMA", "1", 1);
  }
  std::string said_of(void (*kernel)(uint32_t*)) { return said(kernel, memory_.get()); }
  void expect(void (*kernel)(uint32_t*), const char* fault, unsigned blocks = 1) {
    const std::string message = said_by(blocks, kernel, memory_.get());
    if (*fault == 0) {
      EXPECT_EQ(message, "");
    } else {
      EXPECT_NE(message.find(fault), std::string::npos) << "expected: " << fault << "\ngot: " << message;
    }
  }
  OnDevice<uint32_t> memory_{Words(256, 1)};
};
#define FLASHU_FAULT(name) __global__ void name([[maybe_unused]] uint32_t* memory)

}  // namespace flashu::test
