// Faults that the machine must name, each planted alone. On a GPU they would hang it or end its context.
#include <cuda.h>

#include "faults.cuh"

namespace flashu::test {
namespace {

INSTANTIATE_TEST_SUITE_P(When, Faults, testing::Values("eager", "late", "random"));

// ---- addresses

FLASHU_FAULT(reads_past_the_end) { memory[0] = memory[256 + threadIdx.x]; }
FLASHU_FAULT(reads_misaligned) {
  uint32_t v;
  asm volatile("ld.global.u32 %0, [%1];" : "=r"(v) : "l"(reinterpret_cast<char*>(memory) + 2));
  memory[0] = v;
}
FLASHU_FAULT(writes_past_shared_memory) {
  asm volatile("st.shared.u32 [%0], 1;" ::"r"(200000 + threadIdx.x * 4) : "memory");
}
FLASHU_FAULT(copies_misaligned) {
  __shared__ __align__(16) uint32_t values[8];
  FLASHU_COPY(values + 1, memory);
  FLASHU_COPY_WAIT();
}
TEST_P(Faults, Addresses) {
  expect(reads_past_the_end, "outside every allocation");
  expect(reads_misaligned, "misaligned");
  expect(writes_past_shared_memory, "shared memory: offset");
  expect(copies_misaligned, "cp.async: misaligned");
}

// ---- meetings

FLASHU_FAULT(shuffles_with_absent_lanes) {
  uint32_t v = threadIdx.x;
  if (threadIdx.x % 32 < 16) asm volatile("shfl.sync.idx.b32 %0, %0, 20, 31, 0xffff;" : "+r"(v));
  memory[threadIdx.x] = v;
}
FLASHU_FAULT(is_not_in_its_mask) {
  asm volatile("bar.warp.sync 0xfffffffe;" ::: "memory");
  memory[threadIdx.x] = 0;
}
FLASHU_FAULT(waits_for_a_warp_that_does_not_come) {
  if (threadIdx.x < 32) asm volatile("bar.sync 1, 64;" ::: "memory");
}
FLASHU_FAULT(disagrees_on_a_barrier) {
  asm volatile("bar.sync 1, %0;" ::"r"(threadIdx.x < 32 ? 64 : 96) : "memory");
}
TEST_P(Faults, Meetings) {
  expect(shuffles_with_absent_lanes, "shfl from a lane that does not take part");
  expect(is_not_in_its_mask, "not in its own member mask");
  expect(waits_for_a_warp_that_does_not_come, "deadlock");
  expect(disagrees_on_a_barrier, "different numbers of threads");
}

// ---- mbarriers and bulk copies

FLASHU_FAULT(uses_no_mbarrier) {
  __shared__ uint64_t bar;
  if (threadIdx.x == 0) FLASHU_ARRIVE(&bar);
}
FLASHU_FAULT(arrives_too_often) {
  __shared__ uint64_t bar;
  if (threadIdx.x == 0) {
    FLASHU_INIT(&bar, 2);
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0], 3;" ::"r"(FLASHU_AT(&bar)) : "memory");
  }
}
FLASHU_FAULT(waits_for_the_wrong_phase) {
  __shared__ uint64_t bar;
  if (threadIdx.x == 0) {
    FLASHU_INIT(&bar, 1);
    FLASHU_ARRIVE(&bar);
    FLASHU_WAIT(&bar, 1);
  }
}
FLASHU_FAULT(expects_more_bytes_than_come) {
  __shared__ uint64_t bar;
  __shared__ __align__(128) uint32_t values[64];
  if (threadIdx.x == 0) {
    FLASHU_INIT(&bar, 1);
    FLASHU_EXPECT(&bar, 272);
    FLASHU_BULK_LOAD(values, memory, 256, &bar);
    FLASHU_WAIT(&bar, 0);
  }
}
FLASHU_FAULT(ends_while_a_store_reads) {
  __shared__ __align__(128) uint32_t values[64];
  values[threadIdx.x] = 1;
  FLASHU_FENCE();
  __syncthreads();
  if (threadIdx.x == 0) FLASHU_BULK_STORE(memory, values, 256);
}
FLASHU_FAULT(does_not_fence_what_a_store_reads) {
  __shared__ __align__(128) uint32_t values[64];
  values[threadIdx.x] = 1;
  __syncthreads();
  if (threadIdx.x == 0) {
    FLASHU_BULK_STORE(memory, values, 256);
    asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
  }
}
TEST_P(Faults, Mbarriers) {
  expect(uses_no_mbarrier, "not initialised");
  expect(arrives_too_often, "more arrivals");
  expect(waits_for_the_wrong_phase, "deadlock");
  expect(expects_more_bytes_than_come, "deadlock");
  expect(ends_while_a_store_reads, "a block ended while a bulk store");
  expect(does_not_fence_what_a_store_reads, "without fence.proxy.async");
}

// ---- tensor maps (docs/hardware.md, H1)

__global__ void load_box_at(const __grid_constant__ CUtensorMap map, int column) {
  __shared__ uint64_t bar;
  __shared__ __align__(1024) uint16_t box[64 * 8];
  if (threadIdx.x == 0) {
    FLASHU_INIT(&bar, 1);
    FLASHU_EXPECT(&bar, 1024);
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, "
        "%3}], "
        "[%4];" ::"r"(FLASHU_AT(box)),
        "l"(&map), "r"(column), "r"(0), "r"(FLASHU_AT(&bar))
        : "memory");
    FLASHU_WAIT(&bar, 0);
  }
}
TEST_P(Faults, BoxesBeginAtSixteenBytes) {
  void* function = nullptr;
  check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault,
                                         nullptr));
  alignas(64) CUtensorMap map;
  const cuuint64_t sizes[] = {64, 4}, strides[] = {128};
  const cuuint32_t box[] = {64, 8}, steps[] = {1, 1};
  ASSERT_EQ(reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function)(
                &map, CU_TENSOR_MAP_DATA_TYPE_UINT16, 2, memory_.get(), sizes, strides, box, steps,
                CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_NONE,
                CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE),
            CUDA_SUCCESS);
  EXPECT_EQ(said(load_box_at, map, 8), "");
  EXPECT_NE(said(load_box_at, map, 4).find("no multiple of 16 bytes"), std::string::npos);
}

// ---- setmaxnreg: 65,536 registers are shared out by the launch bounds

template <int kTaken>
__global__ void __launch_bounds__(256, 1) takes_registers(uint32_t*) {
  if (threadIdx.x < 128) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kTaken));
  }
}
std::string said_of_registers(void (*kernel)(uint32_t*)) {
  kernel<<<1, 256>>>(nullptr);
  const cudaError_t status = cudaDeviceSynchronize();
  const std::string message = status == cudaSuccess ? "" : cudaGetErrorString(status);
  check(cudaDeviceReset());
  return message;
}
__global__ void takes_without_bounds(uint32_t*) { asm volatile("setmaxnreg.inc.sync.aligned.u32 240;"); }
TEST_P(Faults, Registers) {
  EXPECT_EQ(said_of_registers(takes_registers<248>), "");
  EXPECT_NE(said_of_registers(takes_without_bounds).find("without launch bounds"), std::string::npos);
}

// ---- launches that overlap the one before

__global__ void waits_for_the_kernel_before(uint32_t* memory) {
  asm volatile("griddepcontrol.wait;" ::: "memory");
  memory[threadIdx.x] = 2;
}
__global__ void does_not_wait(uint32_t* memory) { memory[threadIdx.x] = 2; }
TEST_P(Faults, LaunchesThatOverlap) {
  for (const bool waits : {true, false, true}) {
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = 1;
    config.blockDim = 64;
    config.attrs = &attribute;
    config.numAttrs = 1;
    static_cast<void>(
        cudaLaunchKernelEx(&config, waits ? waits_for_the_kernel_before : does_not_wait, memory_.get()));
    const cudaError_t status = cudaDeviceSynchronize();
    EXPECT_EQ(status == cudaSuccess, waits) << cudaGetErrorString(status);
    check(cudaDeviceReset());
  }
}

// What the kernel before wrote is read after the wait of the thread that reads, by TMA after a proxy fence
// too.
enum class Reads { kAfterWaiting, kBeforeWaiting, kInBulkUnfenced, kInBulk };
template <Reads kReads>
__global__ void reads_what_was_written(uint32_t* memory) {
  __shared__ __align__(128) uint32_t values[64];
  __shared__ uint64_t bar;
  if (kReads != Reads::kBeforeWaiting || threadIdx.x >= 32) asm volatile("griddepcontrol.wait;" ::: "memory");
  if (kReads == Reads::kAfterWaiting || kReads == Reads::kBeforeWaiting) {
    memory[threadIdx.x] += 1;
    return;
  }
  if (kReads == Reads::kInBulk) asm volatile("fence.proxy.async.global;" ::: "memory");
  if (threadIdx.x == 0) {
    FLASHU_INIT(&bar, 1);
    FLASHU_EXPECT(&bar, 256);
    FLASHU_BULK_LOAD(values, memory, 256, &bar);
    FLASHU_WAIT(&bar, 0);
  }
}
template <Reads kReads>
std::string said_of_second(uint32_t* memory) {
  does_not_wait<<<1, 64>>>(memory);
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = 1;
  config.blockDim = 64;
  config.attrs = &attribute;
  config.numAttrs = 1;
  static_cast<void>(cudaLaunchKernelEx(&config, reads_what_was_written<kReads>, memory));
  const cudaError_t status = cudaDeviceSynchronize();
  const std::string message = status == cudaSuccess ? "" : cudaGetErrorString(status);
  check(cudaDeviceReset());
  return message;
}
TEST_P(Faults, ReadsWhatTheKernelBeforeWrote) {
  EXPECT_EQ(said_of_second<Reads::kAfterWaiting>(memory_.get()), "");
  EXPECT_NE(said_of_second<Reads::kBeforeWaiting>(memory_.get()).find("without griddepcontrol.wait"),
            std::string::npos);
  EXPECT_EQ(said_of_second<Reads::kInBulk>(memory_.get()), "");
  EXPECT_NE(said_of_second<Reads::kInBulkUnfenced>(memory_.get()).find("without fence.proxy.async.global"),
            std::string::npos);
}

// ---- wgmma

__device__ uint64_t operand(const void* p) {
  return (FLASHU_AT(p) >> 4 & 0x3fff) | uint64_t{8} << 16 | uint64_t{16} << 32;
}
enum class Wgmma {
  kRight,
  kUnfencedRegisters,
  kUnfencedMemory,
  kReadEarly,
  kOverwritten,
  kNotWaitedFor,
  kOtherDescriptor
};
template <Wgmma kFault>
__global__ void product(uint32_t* memory) {
  __shared__ __align__(1024) uint16_t a[64 * 16], b[8 * 16 + 8];
  for (int i = static_cast<int>(threadIdx.x); i < 64 * 16; i += 128) {
    a[i] = 0x3f80;
    if (i < 8 * 16) b[i] = 0x3f80;
  }
  if (kFault != Wgmma::kUnfencedMemory) FLASHU_FENCE();
  __syncthreads();
  float d[4] = {0, 0, 0, 0};
  if (kFault != Wgmma::kUnfencedRegisters) asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
  asm volatile(
      "{ .reg .pred p; setp.eq.u32 p, 1, 1;"
      "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%0, %1, %2, %3}, %4, %5, p, 1, 1, 0, 0;"
      "wgmma.commit_group.sync.aligned; }"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "l"(operand(a)), "l"(operand(b) + (kFault == Wgmma::kOtherDescriptor && threadIdx.x >= 32 ? 1 : 0))
      : "memory");
  if (kFault == Wgmma::kReadEarly) asm volatile("add.f32 %0, %0, 0f3f800000;" : "+f"(d[0])::"memory");
  if (kFault == Wgmma::kOverwritten) a[threadIdx.x] = 0;
  if (kFault != Wgmma::kNotWaitedFor) asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
  if (kFault != Wgmma::kNotWaitedFor) memory[threadIdx.x] = __float_as_uint(d[0]);
}
std::string said_of_product(void (*kernel)(uint32_t*), uint32_t* memory) {
  kernel<<<1, 128>>>(memory);
  const cudaError_t status = cudaDeviceSynchronize();
  const std::string message = status == cudaSuccess ? "" : cudaGetErrorString(status);
  check(cudaDeviceReset());
  return message;
}
TEST_P(Faults, Wgmma) {
  const auto has = [&](void (*kernel)(uint32_t*), const char* text) {
    const std::string message = said_of_product(kernel, memory_.get());
    EXPECT_NE(message.find(text), std::string::npos) << "expected: " << text << "\ngot: " << message;
  };
  EXPECT_EQ(said_of_product(product<Wgmma::kRight>, memory_.get()), "");
  EXPECT_EQ(memory_.values()[5], bits(16.0f));
  has(product<Wgmma::kUnfencedRegisters>, "wgmma before wgmma.fence");
  has(product<Wgmma::kUnfencedMemory>, "without fence.proxy.async");
  has(product<Wgmma::kReadEarly>, "a register of sums while wgmma is under way");
  has(product<Wgmma::kOverwritten>, "shared memory");
  has(product<Wgmma::kOtherDescriptor>, "differs between the warps");
  has(product<Wgmma::kNotWaitedFor>, "before its products were waited for");
}

}  // namespace
}  // namespace flashu::test
