// The emulator as the device under test: device memory is host memory, kernels run when they are launched.
#include <cstdlib>
#include <cstring>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

#include "cuda/device.hpp"
#include "cuda/ffn.hpp"
#include "simt/engine.hpp"

namespace flashu::test {

std::string why_no_device() { return ""; }

void* device_allocate(std::size_t bytes) { return std::aligned_alloc(4096, (bytes + 4095) / 4096 * 4096); }
void device_free(void* memory) { std::free(memory); }
void device_forbid([[maybe_unused]] const void* memory, [[maybe_unused]] std::size_t bytes,
                   [[maybe_unused]] bool forbid) {
#if defined(__SANITIZE_ADDRESS__)
  if (forbid) {
    __asan_poison_memory_region(memory, bytes);
  } else {
    __asan_unpoison_memory_region(memory, bytes);
  }
#endif
}
void copy_to_device(void* to, const void* from, std::size_t bytes) { std::memcpy(to, from, bytes); }
void copy_from_device(void* to, const void* from, std::size_t bytes) { std::memcpy(to, from, bytes); }
void device_synchronize() {}

void begin_test() {
  simt::settings() = {};
  cuda::ffn_limits().decodes = cuda::ffn_limits().pairs = true;
}

std::vector<uint64_t> schedules(int times) {
  const char* wish = std::getenv("FLASHU_SIMT_SEEDS");
  const int count = times * (wish != nullptr ? std::atoi(wish) : 3);
  std::vector<uint64_t> seeds;
  for (int i = 0; i < count; ++i) seeds.push_back(static_cast<uint64_t>(i));
  return seeds;
}

// Schedule 0 has no chance in it: threads in order, asynchronous work as late as it may be.
void use_schedule(uint64_t schedule) {
  simt::settings().seed = schedule;
  simt::settings().random = schedule != 0;
}

bool use_capability(int capability) {
  cuda::ffn_limits().capability = capability;
  return true;
}

}  // namespace flashu::test
