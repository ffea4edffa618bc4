// Global and shared memory: 16-byte accesses, shared memory by name, and cp.async.
#pragma once

#include "cuda/hardware.cuh"

// A block's dynamic shared memory as T*, aligned to 1024 bytes (what swizzled tiles need).
#define FLASHU_DYNAMIC_SHARED(type, name)                            \
  extern __shared__ __align__(1024) unsigned char flashu_dynamic_[]; \
  type* const name = reinterpret_cast<type*>(flashu_dynamic_)
// `count` elements of static shared memory.
#define FLASHU_SHARED(type, name, count) __shared__ __align__(16) type name[count]

namespace flashu::cuda {

// 16 bytes that are read once: they pass by L1.
FLASHU_DEVICE uint4 load16_streaming(const void* from) {
  uint4 value;
  asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "l"(from));
  return value;
}

// 16 bytes of global or shared memory.
FLASHU_DEVICE uint4 load16(const void* from) { return *static_cast<const uint4*>(from); }

// An address of global memory, said to the compiler where it cannot see it because the address was chosen
// among several: it then uses global loads and stores instead of generic ones. Not for null.
template <class T>
FLASHU_DEVICE T* in_global(T* address) {
  __builtin_assume(__isGlobal(address));
  return address;
}

FLASHU_DEVICE void store16(void* to, uint4 value) { *static_cast<uint4*>(to) = value; }

// An address of shared memory as instructions take it.
FLASHU_DEVICE uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// ---- cp.async: 16 bytes from global to shared memory, without registers and late

// Copies the first `bytes` of 16 and writes zeros for the others, which are not read. `from` is a multiple of
// 16 where any are.
FLASHU_DEVICE void cp_async16(void* to, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
               "r"(bytes)
               : "memory");
}

FLASHU_DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Returns when at most kPending of this thread's committed groups are under way.
template <int kPending>
FLASHU_DEVICE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Makes ordinary writes of this thread to shared memory (stores, stmatrix, cp.async that was waited for)
// visible to the asynchronous proxy: wgmma and bulk copies.
FLASHU_DEVICE void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// The same for global memory, and for what other threads wrote: after griddepcontrol_wait(), before TMA reads
// what the kernel before stored. The documentation of the wait names no proxy.
FLASHU_DEVICE void fence_proxy_async_global() { asm volatile("fence.proxy.async.global;" ::: "memory"); }

// bar.sync: `threads` threads of the block meet at barrier `id` (1 to 15; 0 is __syncthreads).
FLASHU_DEVICE void named_barrier(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

}  // namespace flashu::cuda
