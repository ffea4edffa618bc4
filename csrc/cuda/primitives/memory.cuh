// Global and shared memory: 16-byte accesses, shared memory by name, and cp.async.
#pragma once

#include "cuda/primitives/platform.cuh"

// A block's dynamic shared memory as T*, aligned to 1024 bytes (what swizzled tiles need).
#if FLASHU_EMULATED
#define FLASHU_DYNAMIC_SHARED(type, name) type* const name = reinterpret_cast<type*>(::simt::dynamic_shared())
// `count` elements of static shared memory.
#define FLASHU_SHARED(type, name, count) \
  static const char name##_site = 0;     \
  type* const name = static_cast<type*>( \
      ::simt::static_shared(&name##_site, sizeof(type) * (count), ::simt::Place::current()))
#else
#define FLASHU_DYNAMIC_SHARED(type, name)                            \
  extern __shared__ __align__(1024) unsigned char flashu_dynamic_[]; \
  type* const name = reinterpret_cast<type*>(flashu_dynamic_)
#define FLASHU_SHARED(type, name, count) __shared__ __align__(16) type name[count]
#endif

namespace flashu::cuda {

// 16 bytes that are read once: they pass by L1.
FLASHU_DEVICE uint4 load16_streaming(const void* from FLASHU_WHERE) {
#if FLASHU_EMULATED
  if (reinterpret_cast<uintptr_t>(from) % 16 != 0)
    simt::fail(where, "a 16-byte load of a misaligned address");
  return *static_cast<const uint4*>(from);
#else
  uint4 value;
  asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "l"(from));
  return value;
#endif
}

// 16 bytes of global or shared memory.
FLASHU_DEVICE uint4 load16(const void* from FLASHU_WHERE) {
#if FLASHU_EMULATED
  if (reinterpret_cast<uintptr_t>(from) % 16 != 0)
    simt::fail(where, "a 16-byte load of a misaligned address");
#endif
  return *static_cast<const uint4*>(from);
}

// An address of global memory, said to the compiler where it cannot see it because the address was chosen
// among several: it then uses global loads and stores instead of generic ones. Not for null.
template <class T>
FLASHU_DEVICE T* in_global(T* address) {
#if !FLASHU_EMULATED
  __builtin_assume(__isGlobal(address));
#endif
  return address;
}

FLASHU_DEVICE void store16(void* to, uint4 value FLASHU_WHERE) {
#if FLASHU_EMULATED
  if (reinterpret_cast<uintptr_t>(to) % 16 != 0) simt::fail(where, "a 16-byte store to a misaligned address");
#endif
  *static_cast<uint4*>(to) = value;
}

// An address of shared memory as instructions take it.
#if !FLASHU_EMULATED
FLASHU_DEVICE uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}
#endif

// ---- cp.async: 16 bytes from global to shared memory, without registers and late

// Copies the first `bytes` of 16 and writes zeros for the others, which are not read. `from` is a multiple of
// 16 where any are.
FLASHU_DEVICE void cp_async16(void* to, const void* from, int bytes FLASHU_WHERE) {
#if FLASHU_EMULATED
  if (bytes < 0 || bytes > 16) simt::fail(where, "cp.async of more than 16 bytes");
  const uintptr_t bits =
      reinterpret_cast<uintptr_t>(to) | (bytes > 0 ? reinterpret_cast<uintptr_t>(from) : 0);
  if (bits % 16 != 0) simt::fail(where, "cp.async of a misaligned address");
  if (!simt::in_shared(to, 16))
    simt::fail(where, "cp.async to memory that is not shared memory of this block");
  // Undefined until it is waited for; whoever still reads what was there sees it go.
  auto* words = static_cast<uint64_t*>(to);
  words[0] = words[1] = ~uint64_t{0};
  const simt::Unseen unseen;
  const auto copy = simt::defer(simt::Kind::kCopy, [words, from, bytes] {
    words[0] = words[1] = 0;
    auto* const target = reinterpret_cast<uint16_t*>(words);
    for (int i = 0; i < bytes / 2; ++i) target[i] = static_cast<const uint16_t*>(from)[i];
  });
  simt::note_generic_write(to, 16, copy);
  simt::copy_groups().add(copy);
#else
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
               "r"(bytes)
               : "memory");
#endif
}

FLASHU_DEVICE void cp_async_commit() {
#if FLASHU_EMULATED
  simt::copy_groups().commit();
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Returns when at most kPending of this thread's committed groups are under way.
template <int kPending>
FLASHU_DEVICE void cp_async_wait() {
#if FLASHU_EMULATED
  simt::copy_groups().wait(kPending);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#endif
}

// Makes ordinary writes of this thread to shared memory (stores, stmatrix, cp.async that was waited for)
// visible to the asynchronous proxy: wgmma and bulk copies.
FLASHU_DEVICE void fence_proxy_async() {
#if FLASHU_EMULATED
  simt::fence_proxy_async();
#else
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// bar.sync: `threads` threads of the block meet at barrier `id` (1 to 15; 0 is __syncthreads).
FLASHU_DEVICE void named_barrier(int id, int threads FLASHU_WHERE) {
#if FLASHU_EMULATED
  simt::barrier(id, static_cast<unsigned>(threads), where);
#else
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
#endif
}

}  // namespace flashu::cuda
