// The device under test: the emulator's, or a GPU. The same tests are compiled twice, once with
// device_emulated.cpp and once with device_gpu.cpp.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace flashu::test {

// Why there is no device, "" where there is one.
std::string why_no_device();

void* device_allocate(std::size_t bytes);
void device_free(void* memory);
// Whether kernels may use these bytes; only the emulator under AddressSanitizer finds those that do and may
// not.
void device_forbid(const void* memory, std::size_t bytes, bool forbid);
void copy_to_device(void* to, const void* from, std::size_t bytes);
void copy_from_device(void* to, const void* from, std::size_t bytes);
// Waits for all work; throws std::runtime_error where it failed.
void device_synchronize();

// Makes what a test sees independent of the tests before it.
void begin_test();

// Schedules to run every test under: 0, 1, ... on the emulator, 0 alone on a GPU. FLASHU_SIMT_SEEDS says how
// many; `times` as many where a test needs more of them.
std::vector<uint64_t> schedules(int times = 1);
void use_schedule(uint64_t schedule);

// The FFN's kernels are chosen as for a device of this capability (80, 90); false where the device is older,
// or has none of that architecture.
bool use_capability(int capability);

}  // namespace flashu::test
