// A GPU as the device under test.
#include <cuda_runtime_api.h>

#include <stdexcept>

#include "cuda/device.hpp"
#include "cuda/ffn.hpp"

namespace flashu::test {
namespace {

void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

}  // namespace

std::string why_no_device() {
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status != cudaSuccess) return std::string("no CUDA device: ") + cudaGetErrorString(status);
  return count == 0 ? "no CUDA device" : "";
}

void* device_allocate(std::size_t bytes) {
  void* memory = nullptr;
  check(cudaMalloc(&memory, bytes), "cudaMalloc");
  return memory;
}
void device_free(void* memory) { static_cast<void>(cudaFree(memory)); }
void device_forbid(const void*, std::size_t, bool) {}
void copy_to_device(void* to, const void* from, std::size_t bytes) {
  check(cudaMemcpy(to, from, bytes, cudaMemcpyHostToDevice), "cudaMemcpy");
}
void copy_from_device(void* to, const void* from, std::size_t bytes) {
  check(cudaMemcpy(to, from, bytes, cudaMemcpyDeviceToHost), "cudaMemcpy");
}
void device_synchronize() { check(cudaDeviceSynchronize(), "cudaDeviceSynchronize"); }

void begin_test() { cuda::ffn_limits().decodes = cuda::ffn_limits().pairs = true; }
std::vector<uint64_t> schedules(int) { return {0}; }
void use_schedule(uint64_t) {}

bool use_capability(int capability) {
  int major = 0;
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0), "cudaDeviceGetAttribute");
  cuda::ffn_limits().capability = capability;
  return 10 * major >= capability && (capability != 90 || major == 9);
}

}  // namespace flashu::test
