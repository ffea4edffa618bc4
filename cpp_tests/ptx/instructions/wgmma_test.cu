// wgmma: descriptors, core matrices and swizzles of its operands, every width that the kernels use, and its
// sums.
#include <cstring>
#include <random>

#include "cuda/primitives/wgmma.cuh"
#include "device.cuh"

namespace flashu::test {
namespace {

constexpr int kBytesA = 8192, kBytesB = 65536;  // more than 16 of K take, so that layouts may have gaps

// How an operand of 16-bit values stands in shared memory, as the documentation's figures of the canonical
// layouts say it: the byte of value k of row (column) n, and the descriptor that says so.
struct Layout {
  const char* name;
  int mode;             // of the swizzle in bits 62-63: 0 none, 1 128 bytes, 2 64, 3 32
  bool transposed;      // M or N is contiguous
  int leading, stride;  // bytes
};

// Literals of single places, checked against place() below.
struct Known {
  int layout, n, k, byte;
};

// Bytes of a row in one swizzle atom.
int width(const Layout& l) { return l.mode == 1 ? 128 : l.mode == 2 ? 64 : 32; }

int place(const Layout& l, int n, int k) {
  int byte = 0;
  if (l.mode == 0) {
    // Core matrices of 8 rows of 16 bytes, one after another.
    byte = l.transposed ? n / 8 * l.stride + k / 8 * l.leading + k % 8 * 16 + n % 8 * 2
                        : n / 8 * l.stride + k / 8 * l.leading + n % 8 * 16 + k % 8 * 2;
    return byte;
  }
  const int row = width(l), across = row / 2;
  byte = l.transposed ? n / across * l.leading + k / 8 * l.stride + k % 8 * row + n % across * 2
                      : n / 8 * l.stride + n % 8 * row + k * 2;
  // The chunk's number is exchanged with the number of the 128-byte line in its group of eight.
  const int line = byte / 128 % 8;
  return byte ^ (line & (row / 16 - 1)) * 16;
}

constexpr Layout kLayouts[] = {
    {"K contiguous, 128-byte swizzle", 1, false, 16, 1024},
    {"K contiguous, 64-byte swizzle", 2, false, 16, 512},
    {"K contiguous, 32-byte swizzle", 3, false, 16, 256},
    {"K contiguous, no swizzle", 0, false, 128, 256},
    {"N contiguous, 128-byte swizzle", 1, true, 2048, 1024},
    {"N contiguous, 64-byte swizzle", 2, true, 1024, 512},
    {"N contiguous, no swizzle", 0, true, 128, 256},
};

constexpr Known kKnown[] = {
    {0, 0, 0, 0},     {0, 1, 0, 144},  {0, 2, 9, 306}, {0, 7, 8, 992}, {0, 8, 0, 1024}, {3, 1, 0, 16},
    {3, 0, 8, 128},   {3, 8, 0, 256},  {3, 9, 9, 402}, {4, 1, 0, 2},   {4, 0, 1, 144},  {4, 8, 0, 16},
    {4, 64, 0, 2048}, {4, 0, 8, 1024}, {2, 4, 0, 144}, {1, 2, 0, 144},
};

TEST(Wgmma, PlacesOfLayouts) {
  for (const Known& k : kKnown)
    EXPECT_EQ(place(kLayouts[k.layout], k.n, k.k), k.byte)
        << kLayouts[k.layout].name << ": " << k.n << ", " << k.k;
}

__host__ __device__ constexpr uint64_t descriptor(uint32_t address, int mode, int leading, int stride) {
  return (address >> 4 & 0x3fff) | static_cast<uint64_t>(leading >> 4) << 16 |
         static_cast<uint64_t>(stride >> 4) << 32 | static_cast<uint64_t>(mode) << 62;
}

// ---- products

// Operands as bytes of shared memory, their descriptors without addresses, and what is added to.
struct Job {
  const uint8_t *a, *b;
  uint64_t a_descriptor, b_descriptor;
  float* sums;  // [128, N / 2]
};

// Places both operands and returns their descriptors.
struct Operands {
  uint64_t a, b;
};
__device__ Operands place_operands(const Job& job) {
  extern __shared__ __align__(1024) uint8_t shared[];
  for (int i = static_cast<int>(threadIdx.x); i < kBytesA + kBytesB; i += 128)
    shared[i] = i < kBytesA ? job.a[i] : job.b[i - kBytesA];
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  __syncthreads();
  const auto at = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  return {job.a_descriptor | (at >> 4 & 0x3fff), job.b_descriptor | (at + kBytesA) >> 4 & 0x3fff};
}

// The project's own instruction, at each of its widths.
template <int kN, class T>
__global__ void wide(Job job) {
  const Operands o = place_operands(job);
  float sums[kN / 2];
  for (int i = 0; i < kN / 2; ++i) sums[i] = job.sums[threadIdx.x * (kN / 2) + i];
  cuda::wgmma_fence();
  cuda::wgmma<kN, T>(sums, o.a, o.b);
  cuda::wgmma_commit();
  cuda::wgmma_wait<0>();
  for (int i = 0; i < kN / 2; ++i) job.sums[threadIdx.x * (kN / 2) + i] = sums[i];
}

// Sixteen columns, with every modifier.
enum class Mode { kPlain, kNegatedA, kNegatedB, kFresh, kTransposedA, kTransposedB, kRegisters, kHalfSums };
template <Mode kMode>
__global__ void narrow(Job job) {
  const Operands o = place_operands(job);
  float* d = job.sums + threadIdx.x * 8;
#define FLASHU_WGMMA16(scale_d, rest)                                                                        \
  asm volatile("{ .reg .pred p; setp.eq.u32 p, " scale_d                                                     \
               ", 1; wgmma.fence.sync.aligned;"                                                              \
               "wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 {%0, %1, %2, %3, %4, %5, %6, %7}, %8, " \
               "%9, p, " rest "; wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0; }"        \
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]),         \
                 "+f"(d[7])                                                                                  \
               : "l"(o.a), "l"(o.b)                                                                          \
               : "memory")
  if constexpr (kMode == Mode::kPlain) FLASHU_WGMMA16("1", "1, 1, 0, 0");
  if constexpr (kMode == Mode::kNegatedA) FLASHU_WGMMA16("1", "-1, 1, 0, 0");
  if constexpr (kMode == Mode::kNegatedB) FLASHU_WGMMA16("1", "1, -1, 0, 0");
  if constexpr (kMode == Mode::kFresh) FLASHU_WGMMA16("0", "1, 1, 0, 0");
  if constexpr (kMode == Mode::kTransposedA) FLASHU_WGMMA16("1", "1, 1, 1, 0");
  if constexpr (kMode == Mode::kTransposedB) FLASHU_WGMMA16("1", "1, 1, 0, 1");
  if constexpr (kMode == Mode::kRegisters) {
    // Row (warp, lane / 4) of A from shared memory, K contiguous without a swizzle, as mma.sync takes it.
    extern __shared__ __align__(1024) uint8_t shared[];
    uint32_t a[4];
    for (int r = 0; r < 4; ++r) {
      const int row =
          static_cast<int>(threadIdx.x) / 32 * 16 + static_cast<int>(threadIdx.x) % 32 / 4 + r % 2 * 8;
      const int k = static_cast<int>(threadIdx.x) % 4 * 2 + r / 2 * 8;
      a[r] =
          *reinterpret_cast<const uint32_t*>(shared + row / 8 * 256 + row % 8 * 16 + k / 8 * 128 + k % 8 * 2);
    }
    asm volatile(
        "{ .reg .pred p; setp.eq.u32 p, 1, 1; wgmma.fence.sync.aligned;"
        "wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 {%0, %1, %2, %3, %4, %5, %6, %7}, {%8, %9, "
        "%10, %11}, %12, p, 1, 1, 0;"
        "wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0; }"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(o.b)
        : "memory");
  }
  if constexpr (kMode == Mode::kHalfSums) {
    // Sums of f16, (d0, d1) in the first of four registers; the operands are f16 then.
    uint32_t h[4] = {0, 0, 0, 0};
    asm volatile(
        "{ .reg .pred p; setp.eq.u32 p, 1, 0; wgmma.fence.sync.aligned;"
        "wgmma.mma_async.sync.aligned.m64n16k16.f16.f16.f16 {%0, %1, %2, %3}, %4, %5, p, 1, 1, 0, 0;"
        "wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0; }"
        : "+r"(h[0]), "+r"(h[1]), "+r"(h[2]), "+r"(h[3])
        : "l"(o.a), "l"(o.b)
        : "memory");
    for (int i = 0; i < 8; ++i) {
      float f;
      asm("{ .reg .b16 x; cvt.u16.u32 x, %1; cvt.f32.f16 %0, x; }"
          : "=f"(f)
          : "r"(h[i / 2] >> (16 * (i % 2))));
      d[i] += f;
    }
  }
}

// Bits of a small whole number in bf16 or f16.
uint16_t coded(int v, bool brain) {
  const uint32_t f = bits(static_cast<float>(v));
  if (brain) return static_cast<uint16_t>(f >> 16);
  return v == 0
             ? 0
             : static_cast<uint16_t>((f >> 16 & 0x8000) | ((f >> 23 & 0xff) - 112) << 10 | (f >> 13 & 0x3ff));
}

// Row and column of value i of a thread's sums: the documentation's figure of the m64nNk16 fragment.
struct Place {
  int row, column;
};
Place sum_at(int thread, int i) {
  return {thread / 32 * 16 + thread % 32 / 4 + i / 2 % 2 * 8, i / 4 * 8 + thread % 4 * 2 + i % 2};
}
TEST(Wgmma, FigureOfTheSums) {
  const auto at = [](int thread, int i) { return sum_at(thread, i).row * 1000 + sum_at(thread, i).column; };
  EXPECT_EQ(at(0, 0), 0);
  EXPECT_EQ(at(0, 1), 1);
  EXPECT_EQ(at(0, 2), 8000);
  EXPECT_EQ(at(0, 4), 8);
  EXPECT_EQ(at(3, 7), 8015);
  EXPECT_EQ(at(31, 3), 15007);
  EXPECT_EQ(at(32, 0), 16000);
  EXPECT_EQ(at(127, 127), 63255);
}

template <class Kernel>
void expect_product(Kernel kernel, int columns, bool brain, const Layout& la, const Layout& lb, int sign = 1,
                    bool fresh = false) {
  std::mt19937 random(static_cast<uint32_t>(columns));
  std::vector<uint8_t> a(kBytesA, 0x7f), b(kBytesB, 0x7f);  // NaN where nothing is
  std::vector<int> va(64 * 16), vb(static_cast<size_t>(columns) * 16);
  const auto fill = [&](std::vector<int>& values, std::vector<uint8_t>& bytes, const Layout& layout) {
    for (int i = 0; i < static_cast<int>(values.size()); ++i) {
      values[i] = static_cast<int>(random() % 9) - 4;
      const uint16_t v = coded(values[i], brain);
      std::memcpy(&bytes.at(place(layout, i / 16, i % 16)), &v, 2);
    }
  };
  fill(va, a, la);
  fill(vb, b, lb);
  std::vector<float> sums(static_cast<size_t>(64 * columns));
  for (float& s : sums) s = static_cast<float>(random() % 100);
  const OnDevice<uint8_t> a_device(a), b_device(b);
  const OnDevice<float> sums_device(sums);
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytesA + kBytesB));
  kernel<<<1, 128, kBytesA + kBytesB>>>(
      Job{a_device.get(), b_device.get(), descriptor(0, la.mode, la.leading, la.stride),
          descriptor(0, lb.mode, lb.leading, lb.stride), sums_device.get()});
  check(cudaGetLastError());
  const auto got = sums_device.values();
  for (int thread = 0; thread < 128; ++thread) {
    for (int i = 0; i < columns / 2; ++i) {
      const Place p = sum_at(thread, i);
      const size_t at = static_cast<size_t>(thread * (columns / 2) + i);
      int product = 0;
      for (int k = 0; k < 16; ++k) product += va[p.row * 16 + k] * vb[p.column * 16 + k];
      ASSERT_EQ(got[at], (fresh ? 0 : sums[at]) + static_cast<float>(sign * product))
          << la.name << " by " << lb.name << ", thread " << thread << ", value " << i;
    }
  }
}

template <int kN>
void expect_width() {
  expect_product(wide<kN, bfloat16>, kN, true, kLayouts[0], kLayouts[0]);
  expect_product(wide<kN, float16>, kN, false, kLayouts[0], kLayouts[0]);
}
TEST(Wgmma, Width64) { expect_width<64>(); }
TEST(Wgmma, Width96) { expect_width<96>(); }
TEST(Wgmma, Width128) { expect_width<128>(); }
TEST(Wgmma, Width160) { expect_width<160>(); }
TEST(Wgmma, Width192) { expect_width<192>(); }
TEST(Wgmma, Width224) { expect_width<224>(); }
TEST(Wgmma, Width256) { expect_width<256>(); }

// A and B in every layout whose rows are along K.
TEST(Wgmma, LayoutsAlongK) {
  for (int a = 0; a < 4; ++a) {
    for (int b = 0; b < 4; ++b) expect_product(narrow<Mode::kPlain>, 16, true, kLayouts[a], kLayouts[b]);
  }
}
TEST(Wgmma, LayoutsAlongRowsAndColumns) {
  for (int l = 4; l < 7; ++l) {
    expect_product(narrow<Mode::kTransposedA>, 16, true, kLayouts[l], kLayouts[0]);
    expect_product(narrow<Mode::kTransposedB>, 16, true, kLayouts[0], kLayouts[l]);
  }
}
TEST(Wgmma, Signs) {
  expect_product(narrow<Mode::kNegatedA>, 16, true, kLayouts[0], kLayouts[0], -1);
  expect_product(narrow<Mode::kNegatedB>, 16, true, kLayouts[0], kLayouts[0], -1);
}
TEST(Wgmma, WithoutWhatWasThere) {
  expect_product(narrow<Mode::kFresh>, 16, true, kLayouts[0], kLayouts[0], 1, true);
}
TEST(Wgmma, RowsFromRegisters) {
  expect_product(narrow<Mode::kRegisters>, 16, true, kLayouts[3], kLayouts[0]);
}
TEST(Wgmma, SumsOfF16) { expect_product(narrow<Mode::kHalfSums>, 16, false, kLayouts[0], kLayouts[0]); }

}  // namespace
}  // namespace flashu::test
