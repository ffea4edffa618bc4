// GoogleTest's main; without a device every test is skipped, with the reason.
#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

namespace {

class Device : public testing::Environment {
  void SetUp() override {
    int count = 0;
    const cudaError_t status = cudaGetDeviceCount(&count);
    if (status != cudaSuccess || count == 0) GTEST_SKIP() << "no CUDA device: " << cudaGetErrorString(status);
  }
};

}  // namespace

int main(int argc, char** argv) {
  testing::InitGoogleTest(&argc, argv);
  testing::AddGlobalTestEnvironment(new Device);
  return RUN_ALL_TESTS();
}
