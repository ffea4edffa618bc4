// cp.async, bulk copies, and boxes of tensors with their swizzles.
#include <cuda.h>

#include <cstring>

#include "device.cuh"

namespace flashu::test {
namespace {

// ---- cp.async

// Copies `read` of kBytes from `from`; what was there before is 0xff.
template <int kBytes>
struct Copy {
  const uint8_t* from;
  int read;
  __device__ uint4 operator()(int) const {
    __shared__ __align__(16) uint8_t values[16];
    auto* words = reinterpret_cast<uint32_t*>(values);
    if (threadIdx.x == 0) {
      for (int i = 0; i < 4; ++i) words[i] = 0xffffffffu;
      const auto at = static_cast<uint32_t>(__cvta_generic_to_shared(values));
      if constexpr (kBytes == 16) {
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(at), "l"(from), "r"(read)
                     : "memory");
      } else {
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(at), "l"(from), "n"(kBytes),
                     "r"(read)
                     : "memory");
      }
      asm volatile("cp.async.commit_group; cp.async.wait_group 0;" ::: "memory");
    }
    __syncthreads();
    return {words[0], words[1], words[2], words[3]};
  }
};

std::vector<uint8_t> bytes_from(int first, int count) {
  std::vector<uint8_t> v(count);
  for (int i = 0; i < count; ++i) v[i] = static_cast<uint8_t>(first + i);
  return v;
}

// The first `read` bytes are copied, the others of the copy are zero, what is behind it stays.
template <int kBytes>
void expect_zero_fill() {
  const OnDevice<uint8_t> from(bytes_from(1, 16));
  for (int read = 0; read <= kBytes; ++read) {
    const auto got = on_threads(Copy<kBytes>{from.get(), read});
    uint8_t seen[16];
    std::memcpy(seen, &got[0], 16);
    for (int i = 0; i < 16; ++i)
      EXPECT_EQ(seen[i], i < read ? i + 1 : i < kBytes ? 0 : 0xff) << read << ": " << i;
  }
}
TEST(CpAsync, ZerosBehindTheSource16) { expect_zero_fill<16>(); }
TEST(CpAsync, ZerosBehindTheSource8) { expect_zero_fill<8>(); }
TEST(CpAsync, ZerosBehindTheSource4) { expect_zero_fill<4>(); }

// Nothing is read where no byte is asked for: the address need not be one.
TEST(CpAsync, ReadsNothingOfNoBytes) {
  const auto got = on_threads(Copy<16>{nullptr, 0});
  EXPECT_EQ(got[0].x | got[0].y | got[0].z | got[0].w, 0u);
}

// ---- bulk copies without tensor maps

struct Roundtrip {
  const uint32_t* from;
  uint32_t* to;
  __device__ int operator()(int thread) const {
    __shared__ __align__(128) uint32_t values[64];
    __shared__ uint64_t barrier;
    const auto at = static_cast<uint32_t>(__cvta_generic_to_shared(values));
    const auto bar = static_cast<uint32_t>(__cvta_generic_to_shared(&barrier));
    if (thread == 0) {
      asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(bar) : "memory");
      asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    if (thread == 0) {
      asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], 256;" ::"r"(bar) : "memory");
      asm volatile(
          "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], 256, [%2];" ::"r"(
              at),
          "l"(from), "r"(bar)
          : "memory");
    }
    asm volatile(
        "{ .reg .pred p; WAIT_%=: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], 0; @!p bra WAIT_%=; }" ::
            "r"(bar)
        : "memory");
    for (int i = thread; i < 64; i += 32) values[i] += 1000;
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    __syncthreads();
    if (thread == 0) {
      asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], 256;" ::"l"(to), "r"(at)
                   : "memory");
      asm volatile("cp.async.bulk.commit_group; cp.async.bulk.wait_group 0;" ::: "memory");
    }
    return 0;
  }
};

TEST(Bulk, ThereAndBack) {
  Words values(64), want(64);
  for (uint32_t i = 0; i < 64; ++i) values[i] = i, want[i] = i + 1000;
  const OnDevice<uint32_t> from(values), to(Words(64, 0));
  on_threads(Roundtrip{from.get(), to.get()});
  EXPECT_EQ(to.values(), want);
}

// ---- tensors

using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                            const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave,
                            CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

struct Tensor {  // of 16-bit values
  void* base;
  cuuint64_t columns, rows, stride;  // values
  cuuint32_t box_columns, box_rows;
};

CUresult encode(const Tensor& t, CUtensorMapSwizzle swizzle, CUtensorMap* map) {
  void* function = nullptr;
  check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault,
                                         nullptr));
  const cuuint64_t sizes[] = {t.columns, t.rows}, strides[] = {t.stride * 2};
  const cuuint32_t box[] = {t.box_columns, t.box_rows}, steps[] = {1, 1};
  return reinterpret_cast<Encode>(function)(map, CU_TENSOR_MAP_DATA_TYPE_UINT16, 2, t.base, sizes, strides,
                                            box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle,
                                            CU_TENSOR_MAP_L2_PROMOTION_NONE,
                                            CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
}

// Loads a box of at most 1024 values and returns them as they stand in shared memory, in the order of
// addresses.
__global__ void load_box(const __grid_constant__ CUtensorMap map, int column, int row, int values,
                         uint16_t* out) {
  __shared__ __align__(1024) uint16_t box[1024];
  __shared__ uint64_t barrier;
  const auto at = static_cast<uint32_t>(__cvta_generic_to_shared(box));
  const auto bar = static_cast<uint32_t>(__cvta_generic_to_shared(&barrier));
  if (threadIdx.x == 0) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(bar) : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(values * 2)
                 : "memory");
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, "
        "%3}], [%4];" ::"r"(at),
        "l"(&map), "r"(column), "r"(row), "r"(bar)
        : "memory");
  }
  __syncthreads();
  asm volatile(
      "{ .reg .pred p; WAIT_%=: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], 0; @!p bra WAIT_%=; }" ::
          "r"(bar)
      : "memory");
  for (int i = static_cast<int>(threadIdx.x); i < values; i += 32) out[i] = box[i];
}

// Stores a box whose values are 5000, 5001, ... in the order of addresses.
__global__ void store_box(const __grid_constant__ CUtensorMap map, int column, int row, int values) {
  __shared__ __align__(1024) uint16_t box[1024];
  for (int i = static_cast<int>(threadIdx.x); i < values; i += 32) box[i] = static_cast<uint16_t>(5000 + i);
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  __syncthreads();
  if (threadIdx.x == 0) {
    const auto at = static_cast<uint32_t>(__cvta_generic_to_shared(box));
    asm volatile(
        "cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%2, %3}], [%1];" ::"l"(&map),
        "r"(at), "r"(column), "r"(row)
        : "memory");
    asm volatile("cp.async.bulk.commit_group; cp.async.bulk.wait_group 0;" ::: "memory");
  }
}

std::vector<uint16_t> numbered(int count) {
  std::vector<uint16_t> v(count);
  for (int i = 0; i < count; ++i) v[i] = static_cast<uint16_t>(i);
  return v;
}

std::vector<uint16_t> load(const Tensor& t, CUtensorMapSwizzle swizzle, int column, int row) {
  alignas(64) CUtensorMap map;
  if (encode(t, swizzle, &map) != CUDA_SUCCESS) throw std::runtime_error("encode");
  const int values = static_cast<int>(t.box_columns * t.box_rows);
  const OnDevice<uint16_t> out(std::vector<uint16_t>(values, 0xffff));
  load_box<<<1, 32>>>(map, column, row, values, out.get());
  check(cudaGetLastError());
  return out.values();
}

// A tensor of 8 columns a chunk of 16 bytes: chunk c of row r holds 8 (r * chunks + c) and the next seven.
template <int kChunks>
void expect_swizzle(CUtensorMapSwizzle swizzle, const int (&chunk_at)[8][kChunks]) {
  const OnDevice<uint16_t> values(numbered(8 * kChunks * 8));
  const Tensor t{values.get(), kChunks * 8, 8, kChunks * 8, kChunks * 8, 8};
  const auto got = load(t, swizzle, 0, 0);
  for (int r = 0; r < 8; ++r) {
    for (int c = 0; c < kChunks; ++c) {
      for (int e = 0; e < 8; ++e)
        EXPECT_EQ(got[(r * kChunks + c) * 8 + e], (r * kChunks + chunk_at[r][c]) * 8 + e)
            << "row " << r << " place " << c;
    }
  }
}

// Which chunk of 16 bytes stands at each place of each row, as the documentation's figures of the modes show
// it.
TEST(TensorCopy, Swizzle128) {
  expect_swizzle<8>(CU_TENSOR_MAP_SWIZZLE_128B, {{0, 1, 2, 3, 4, 5, 6, 7},
                                                 {1, 0, 3, 2, 5, 4, 7, 6},
                                                 {2, 3, 0, 1, 6, 7, 4, 5},
                                                 {3, 2, 1, 0, 7, 6, 5, 4},
                                                 {4, 5, 6, 7, 0, 1, 2, 3},
                                                 {5, 4, 7, 6, 1, 0, 3, 2},
                                                 {6, 7, 4, 5, 2, 3, 0, 1},
                                                 {7, 6, 5, 4, 3, 2, 1, 0}});
}
TEST(TensorCopy, Swizzle64) {
  expect_swizzle<4>(CU_TENSOR_MAP_SWIZZLE_64B, {{0, 1, 2, 3},
                                                {0, 1, 2, 3},
                                                {1, 0, 3, 2},
                                                {1, 0, 3, 2},
                                                {2, 3, 0, 1},
                                                {2, 3, 0, 1},
                                                {3, 2, 1, 0},
                                                {3, 2, 1, 0}});
}
TEST(TensorCopy, Swizzle32) {
  expect_swizzle<2>(CU_TENSOR_MAP_SWIZZLE_32B,
                    {{0, 1}, {0, 1}, {0, 1}, {0, 1}, {1, 0}, {1, 0}, {1, 0}, {1, 0}});
}
TEST(TensorCopy, NoSwizzle) {
  expect_swizzle<2>(CU_TENSOR_MAP_SWIZZLE_NONE,
                    {{0, 1}, {0, 1}, {0, 1}, {0, 1}, {0, 1}, {0, 1}, {0, 1}, {0, 1}});
}

// What a load reads outside the tensor is zero, on every side; the bytes of the whole box are counted.
TEST(TensorCopy, ZerosOutside) {
  const OnDevice<uint16_t> values(numbered(16 * 6));
  const Tensor t{values.get(), 12, 4, 16, 16, 4};  // of 6 rows, 4 belong to the tensor; of 16 columns, 12
  const auto behind = load(t, CU_TENSOR_MAP_SWIZZLE_NONE, 8, 2);
  const auto before = load(t, CU_TENSOR_MAP_SWIZZLE_NONE, -8, -1);
  for (int r = 0; r < 4; ++r) {
    for (int c = 0; c < 16; ++c) {
      EXPECT_EQ(behind[r * 16 + c], r < 2 && c < 4 ? (2 + r) * 16 + 8 + c : 0) << r << ", " << c;
      EXPECT_EQ(before[r * 16 + c], r >= 1 && c >= 8 ? (r - 1) * 16 + c - 8 : 0) << r << ", " << c;
    }
  }
}

// A store leaves out what is outside the tensor, but writes the last chunk of 16 bytes of a row whole (H2).
TEST(TensorCopy, StoresWholeChunks) {
  const OnDevice<uint16_t> values(std::vector<uint16_t>(32 * 6, 1));
  const Tensor t{values.get(), 12, 4, 32, 32, 4};  // of a chunk of 8 columns, 4 belong to the tensor
  alignas(64) CUtensorMap map;
  ASSERT_EQ(encode(t, CU_TENSOR_MAP_SWIZZLE_NONE, &map), CUDA_SUCCESS);
  store_box<<<1, 32>>>(map, 0, 1, 128);
  check(cudaGetLastError());
  const auto got = values.values();
  for (int r = 0; r < 6; ++r) {
    for (int c = 0; c < 32; ++c)
      EXPECT_EQ(got[r * 32 + c], r >= 1 && r < 4 && c < 16 ? 5000 + (r - 1) * 32 + c : 1) << r << ", " << c;
  }
}

// What the driver refuses.
TEST(TensorMap, ArgumentsThatCannotBe) {
  const OnDevice<uint16_t> values(numbered(64 * 8));
  const Tensor good{values.get(), 64, 8, 64, 64, 8};
  alignas(64) CUtensorMap map;
  const auto encoded = [&](auto change, CUtensorMapSwizzle swizzle = CU_TENSOR_MAP_SWIZZLE_128B) {
    Tensor t = good;
    change(t);
    return encode(t, swizzle, &map) == CUDA_SUCCESS;
  };
  EXPECT_TRUE(encoded([](Tensor&) {}));
  EXPECT_FALSE(encoded([](Tensor& t) { t.base = static_cast<uint16_t*>(t.base) + 4; })) << "base at 8 bytes";
  EXPECT_FALSE(encoded([](Tensor& t) { t.stride = 60; })) << "stride of 120 bytes";
  EXPECT_FALSE(encoded([](Tensor& t) { t.rows = 0; })) << "no rows";
  EXPECT_FALSE(encoded([](Tensor& t) { t.box_rows = 257; })) << "box of 257 rows";
  EXPECT_FALSE(encoded([](Tensor& t) { t.box_rows = 0; })) << "box of no rows";
  EXPECT_FALSE(encoded([](Tensor& t) { t.box_columns = 4; })) << "rows of 8 bytes";
  EXPECT_FALSE(encoded([](Tensor&) {}, CU_TENSOR_MAP_SWIZZLE_64B)) << "rows wider than the swizzle";
}

}  // namespace
}  // namespace flashu::test
