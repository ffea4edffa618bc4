// The base of the C API: statuses, error texts, argument structs and nested threads.
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <string>
#include <vector>

#include "core/parallel.hpp"
#include "flashu/ffn.hpp"
#include "flashu/norm.h"

namespace {

flashu_tensor tensor(float* data, std::vector<int64_t> sizes) {
  flashu_tensor view{};
  view.data = data;
  view.dtype = FLASHU_F32;
  view.device = FLASHU_DEVICE_CPU;
  view.ndim = static_cast<int32_t>(sizes.size());
  int64_t stride = 1;
  for (int d = view.ndim - 1; d >= 0; --d) {
    view.sizes[d] = sizes[d];
    view.strides[d] = stride;
    stride *= sizes[d];
  }
  return view;
}

TEST(Base, VersionsAgree) {
  EXPECT_EQ(flashu_abi_version(), FLASHU_ABI_VERSION);
  EXPECT_STREQ(flashu_version(), FLASHU_VERSION);
  EXPECT_EQ(std::string(FLASHU_VERSION), std::to_string(FLASHU_VERSION_MAJOR) + "." +
                                             std::to_string(FLASHU_VERSION_MINOR) + "." +
                                             std::to_string(FLASHU_VERSION_PATCH));
}

TEST(Base, ADeviceThatWasNotFilledInIsRefused) {
  float acc[2] = {1, 2};
  float h[2] = {3, 4};
  flashu_neuron_norms_args args{};
  args.struct_size = sizeof(args);
  args.acc = tensor(acc, {2});
  args.h = tensor(h, {1, 2});
  const std::string expected =
      "neuron_norms_: h: expected device FLASHU_DEVICE_CPU or FLASHU_DEVICE_CUDA(ordinal), got ";
  for (const int32_t device : {0, 1, 255, -2, INT32_MIN}) {
    args.h.device = device;
    EXPECT_EQ(flashu_neuron_norms(&args), FLASHU_INVALID_VALUE);
    EXPECT_EQ(flashu_last_error(),
              expected + std::to_string(device) + (device == 0 ? ": it was not filled in" : ""));
  }
  args.h.sizes[0] = 0;  // an empty tensor has a device too
  args.h.device = 0;
  EXPECT_EQ(flashu_neuron_norms(&args), FLASHU_INVALID_VALUE);
  EXPECT_EQ(acc[0], 1);
}

TEST(Base, TensorsOfAnyDevice) {
  float data[6] = {};
  const flashu_tensor on_gpu = flashu::tensor(data, FLASHU_F32, {2, 3}, {}, FLASHU_DEVICE_CUDA(1));
  EXPECT_EQ(on_gpu.device, FLASHU_DEVICE_CUDA(1));
  EXPECT_EQ(on_gpu.strides[0], 3);
  EXPECT_EQ(flashu::tensor(data, FLASHU_F32, {6}).device, FLASHU_DEVICE_CPU);
  try {
    flashu::neuron_norms(flashu::tensor(data, FLASHU_F32, {3}), on_gpu);
    FAIL();
  } catch (const flashu::Error& error) {
    EXPECT_STREQ(error.what(), "neuron_norms_: h: expected device cpu as acc has, got cuda:1");
  }
}

TEST(Base, ErrorNamesArgumentAndNextCallIsClean) {
  float acc[3] = {1, 2, 3};
  float h[6] = {1, 2, 3, 4, 5, 6};
  flashu_neuron_norms_args args{};
  args.struct_size = sizeof(args);
  args.acc = tensor(acc, {2});
  args.h = tensor(h, {2, 3});
  EXPECT_EQ(flashu_neuron_norms(&args), FLASHU_INVALID_VALUE);
  EXPECT_STREQ(flashu_last_error(), "neuron_norms_: acc: expected size 3 in dimension 0, got 2 (shape [2])");
  args.acc = tensor(acc, {3});
  EXPECT_EQ(flashu_neuron_norms(&args), FLASHU_OK);
  EXPECT_STREQ(flashu_last_error(), "");
  EXPECT_EQ(acc[0], 1 + 1 + 16);
  EXPECT_EQ(acc[1], 2 + 4 + 25);
  EXPECT_EQ(acc[2], 3 + 9 + 36);
}

TEST(Base, OnlyStructsOfThisVersionAreRead) {
  EXPECT_EQ(flashu_neuron_norms(nullptr), FLASHU_INVALID_VALUE);
  float acc[2] = {1, 2};
  float h[2] = {3, 4};
  flashu_neuron_norms_args args{};
  args.acc = tensor(acc, {2});
  args.h = tensor(h, {1, 2});
  const auto size = static_cast<uint32_t>(sizeof(args));
  for (const uint32_t other : {0u, 4u, size - 8, size + 8, UINT32_MAX}) {
    args.struct_size = other;
    EXPECT_EQ(flashu_neuron_norms(&args), FLASHU_INVALID_VALUE) << other;
    EXPECT_EQ(std::string(flashu_last_error()), "neuron_norms_: args.struct_size: expected " +
                                                    std::to_string(size) + ", got " + std::to_string(other));
    EXPECT_EQ(acc[0], 1);
  }
  args.struct_size = size;
  EXPECT_EQ(flashu_neuron_norms(&args), FLASHU_OK);
  EXPECT_EQ(acc[0], 1 + 9);
}

TEST(Base, ATensorIsAbsentWithoutDataAndDimensions) {
  float residual[2] = {1, 2};
  float y[2] = {3, 4};
  float gates[2] = {2, 2};
  flashu_gate_add_args args{};
  args.struct_size = sizeof(args);
  args.residual = tensor(residual, {1, 1, 2});
  args.y = tensor(y, {1, 1, 2});
  EXPECT_EQ(flashu_gate_add(&args), FLASHU_OK);
  EXPECT_EQ(residual[0], 1 + 3);

  args.gate.device = 7;  // not read
  args.gate.dtype = 99;
  args.gate.sizes[0] = -1;
  args.gate.strides[0] = 5;
  EXPECT_EQ(flashu_gate_add(&args), FLASHU_OK);
  EXPECT_EQ(residual[0], 1 + 3 + 3);

  const auto refused = [&](const flashu_tensor& gate) {
    args.gate = gate;
    EXPECT_EQ(flashu_gate_add(&args), FLASHU_INVALID_VALUE);
    return std::string(flashu_last_error());
  };
  EXPECT_EQ(refused(tensor(nullptr, {0, 2})),
            "gate_add_: gate: expected size 1 in dimension 0, got 0 (shape [0, 2])");
  EXPECT_EQ(refused(tensor(nullptr, {1, 2})), "gate_add_: gate: expected data, got NULL");
  EXPECT_EQ(refused(tensor(gates, {})), "gate_add_: gate: expected 2 dimensions, got 0 (shape [])");
  args.y = {};
  args.y.device = FLASHU_DEVICE_CPU;
  EXPECT_EQ(refused(tensor(gates, {1, 2})), "gate_add_: y: expected data, got NULL");
  EXPECT_EQ(residual[0], 1 + 3 + 3);
}

TEST(Base, ParallelForCoversOnceAndNests) {
  std::vector<std::atomic<int>> seen(1000);
  flashu::core::parallel_for(0, 10, 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      flashu::core::parallel_for(i * 100, (i + 1) * 100, 7, [&](int64_t a, int64_t b) {
        for (int64_t j = a; j < b; ++j) seen[j]++;
      });
    }
  });
  for (const auto& count : seen) EXPECT_EQ(count.load(), 1);
}

// The threads of the first loop do not exist in the forked process, whose own loop must not wait for them.
TEST(Base, ParallelForWorksInAForkedProcess) {
  const auto sum = [] {
    std::atomic<int64_t> total{0};
    flashu::core::parallel_for(0, 1000, 1, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) total += i;
    });
    return total.load();
  };
  ASSERT_EQ(sum(), 499500);
  const pid_t child = fork();
  if (child == 0) {
    alarm(30);
    _exit(sum() == 499500 ? 0 : 1);
  }
  int status = -1;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0) << "status " << status;
  EXPECT_EQ(sum(), 499500);
}

}  // namespace
