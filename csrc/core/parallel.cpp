// Holds the installed thread backend.
#include "core/parallel.hpp"

#include <atomic>

namespace flashu::core {
namespace {
std::atomic<const flashu_parallel_backend*> installed{nullptr};
flashu_parallel_backend custom{};
}  // namespace

const flashu_parallel_backend& parallel_backend() {
  const flashu_parallel_backend* backend = installed.load(std::memory_order_acquire);
  return backend != nullptr ? *backend : default_parallel_backend();
}

}  // namespace flashu::core

extern "C" void flashu_set_parallel_backend(const flashu_parallel_backend* backend) {
  using flashu::core::custom;
  using flashu::core::installed;
  installed.store(nullptr, std::memory_order_release);
  if (backend == nullptr) return;
  custom = *backend;
  installed.store(&custom, std::memory_order_release);
}
