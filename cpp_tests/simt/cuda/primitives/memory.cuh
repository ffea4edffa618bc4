// Global and shared memory: alignment is checked, copies come late, shared memory begins as NaN.
#pragma once

#include "cuda/hardware.cuh"

#define FLASHU_DYNAMIC_SHARED(type, name) type* const name = reinterpret_cast<type*>(::simt::dynamic_shared())
#define FLASHU_SHARED(type, name, count) \
  static const char name##_site = 0;     \
  type* const name = static_cast<type*>( \
      ::simt::static_shared(&name##_site, sizeof(type) * (count), ::simt::Place::current()))

namespace flashu::cuda {

FLASHU_DEVICE uint4 load16_streaming(const void* from FLASHU_WHERE) {
  if (reinterpret_cast<uintptr_t>(from) % 16 != 0)
    simt::fail(where, "a 16-byte load of a misaligned address");
  return *static_cast<const uint4*>(from);
}

FLASHU_DEVICE uint4 load16(const void* from FLASHU_WHERE) {
  if (reinterpret_cast<uintptr_t>(from) % 16 != 0)
    simt::fail(where, "a 16-byte load of a misaligned address");
  return *static_cast<const uint4*>(from);
}

template <class T>
FLASHU_DEVICE T* in_global(T* address) {
  return address;
}

FLASHU_DEVICE void store16(void* to, uint4 value FLASHU_WHERE) {
  if (reinterpret_cast<uintptr_t>(to) % 16 != 0) simt::fail(where, "a 16-byte store to a misaligned address");
  *static_cast<uint4*>(to) = value;
  if (simt::in_shared(to, 16)) simt::note_generic_write(to, 16);
}

FLASHU_DEVICE void cp_async16(void* to, const void* from, int bytes FLASHU_WHERE) {
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
}

FLASHU_DEVICE void cp_async_commit() { simt::copy_groups().commit(); }

template <int kPending>
FLASHU_DEVICE void cp_async_wait() {
  simt::copy_groups().wait(kPending);
}

FLASHU_DEVICE void fence_proxy_async() { simt::fence_proxy_async(); }
FLASHU_DEVICE void fence_proxy_async_global() { simt::note_fenced_global(); }

FLASHU_DEVICE void named_barrier(int id, int threads FLASHU_WHERE) {
  simt::barrier(id, static_cast<unsigned>(threads), where);
}

}  // namespace flashu::cuda
