// What the host code makes of a device: an old driver, another number of multiprocessors.
#include "core/ffn_choice.hpp"
#include "cuda/ffn.hpp"
#include "cuda/support.hpp"
#include "flashu/ffn.hpp"
#include "flashu/norm.hpp"
#include "simt/engine.hpp"

namespace flashu::test {
namespace {

// Devices of one name differ in it (MIG, PCIe and SXM).
void compare_multiprocessors(int64_t rows, int64_t hidden, int64_t neurons) {
  SCOPED_TRACE(std::to_string(rows) + " rows");
  auto x = normal<bfloat16>({rows, hidden}, 1);
  auto gate = normal<bfloat16>({neurons, hidden}, 2);
  auto up = normal<bfloat16>({neurons, hidden}, 3);
  auto down = normal<bfloat16>({40, neurons}, 4);
  std::vector<Guarded<bfloat16>> outs;
  for (const int multiprocessors : {1, 2, 3, 78, 132}) {
    simt::settings().multiprocessors = multiprocessors;
    Guarded<bfloat16> out({rows, 40});
    FfnArgs args{};
    args.struct_size = sizeof args;
    args.x = x.upload();
    args.w_gate = gate.upload();
    args.w_up = up.upload();
    args.w_down = down.upload();
    args.out = out.upload();
    uint64_t bytes = 0;
    check(flashu_gathered_ffn_workspace(&args, &bytes));
    const DeviceWorkspace workspace(bytes);
    args.workspace = workspace.get().data;
    args.workspace_bytes = workspace.get().bytes;
    gathered_ffn(args);
    outs.push_back(out.download());
    expect_equal(outs.back(), outs.front());
  }
}

TEST(DeviceFacts, BitsDoNotFollowTheNumberOfMultiprocessors) {
  begin_test();
  compare_multiprocessors(3, 72, 400);
  compare_multiprocessors(40, 16, 3080);
  compare_multiprocessors(130, 72, 400);  // in pairs on two of them
}

// What the tests of the sm_80 kernels rely on, on a GPU too.
TEST(DeviceFacts, ALimitedCapabilityChoosesTheKernelsOfOlderDevices) {
  begin_test();
  std::vector<uint16_t> memory(64 * 64);
  core::FfnProblem p{};
  p.type = FLASHU_BF16;
  p.has_up = true;
  p.rows = p.hidden = p.intermediate = p.neurons = 64;
  p.runs = {{0, 64}};
  p.selected_by = FLASHU_SELECT_ALL;
  p.x = p.w_gate = p.w_up = p.h = {memory.data(), 64};
  for (const int capability : {90, 80}) {
    use_capability(capability);
    const auto chosen = core::ffn_candidates(cuda::plan_ffn(p).question, true).front().tile.kernel;
    EXPECT_EQ(chosen, capability == 90 ? core::FfnKernel::kSm90 : core::FfnKernel::kSm80);
  }
  use_capability(90);
}

TEST(DeviceFacts, PairsOfBlocksCanBeTurnedOff) {
  begin_test();
  simt::settings().multiprocessors = 132;
  std::vector<uint16_t> memory(64);
  core::FfnProblem p{};
  p.type = FLASHU_BF16;
  p.has_up = true;
  p.rows = p.hidden = p.intermediate = p.neurons = 2048;
  p.runs = {{0, 2048}};
  p.selected_by = FLASHU_SELECT_ALL;
  p.x = p.w_gate = p.w_up = p.h = {memory.data(), 2048};
  EXPECT_EQ(cuda::plan_ffn(p).up.tile.cluster, 2);
  cuda::ffn_limits().pairs = false;
  EXPECT_EQ(cuda::plan_ffn(p).up.tile.cluster, 1);
  begin_test();
}

TEST(DeviceFacts, TheFirstCallWithAnOldDriverSaysBothVersions) {
  begin_test();
  auto x = whole<float>({2, 8}, 1);
  auto weight = whole<float>({8}, 2);
  Guarded<float> out({2, 8});
  const auto error = [&](int driver) {
    simt::settings().driver = driver;
    try {
      rms_norm(x.upload(), weight.upload(), 0.0, out.upload());
    } catch (const Error& failure) {
      EXPECT_EQ(failure.status(), FLASHU_UNSUPPORTED);
      return std::string(failure.what());
    }
    return std::string();
  };
  EXPECT_EQ(error(13000), "");
  EXPECT_EQ(error(14010), "");
  EXPECT_NE(
      error(12080).find("CUDA driver: expected one for CUDA 13.0 or newer (version 580), since this build's "
                        "runtime is CUDA 13.0, got one for CUDA 12.8, which is too old"),
      std::string::npos);
  EXPECT_NE(error(0).find("got none"), std::string::npos);
  begin_test();
}

}  // namespace
}  // namespace flashu::test
