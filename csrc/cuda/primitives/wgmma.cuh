// Warpgroup matrix instructions (sm_90a): 64 x N products of 16-bit operands in shared memory, float sums in
// registers of 128 threads. Begun, not done: what they read must stay and what they add to must not be looked
// at before wgmma_wait().
#pragma once

#include <memory>
#include <vector>

#include "cuda/primitives/tma.cuh"

namespace flashu::cuda {

// How an operand lies in shared memory; both are boxes as tma.cuh has them.
//   kDepth: a row of a box is a row of A (a column of the product for B), with 64 of the depth.
//   kOuter: a row of a box is one k, with 64 columns of the product; more boxes follow `box_bytes` apart. B
//   only.
enum class Major { kDepth, kOuter };

// The 64-bit descriptor of an operand. kDepth: the address moves 32 bytes inside a box for every 16 of the
// depth. kOuter: 2048 bytes (16 rows).
template <Major kMajor>
FLASHU_DEVICE uint64_t wgmma_descriptor(const void* tile, int box_bytes FLASHU_WHERE) {
  // Bits 0-13: address / 16. 16-29: leading offset / 16, from box to box for kOuter, unused for kDepth.
  // 32-45: stride offset / 16, from one group of 8 rows to the next. 62-63 = 1: 128-byte swizzle.
#if FLASHU_EMULATED
  if (!simt::in_shared(tile, 16)) simt::fail(where, "wgmma: an operand is not in dynamic shared memory");
  const auto address = static_cast<uint64_t>(static_cast<const char*>(tile) - simt::dynamic_shared());
#else
  const uint64_t address = shared_address(tile);
#endif
  const uint64_t leading = kMajor == Major::kDepth ? 1 : static_cast<uint64_t>(box_bytes) / 16;
  return (address & 0x3ffff) / 16 | leading << 16 | uint64_t{1024 / 16} << 32 | uint64_t{1} << 62;
}

#if FLASHU_EMULATED
namespace emulated {

// The sums of one warp while products are under way. A warp works on its own 16 rows of A, as the hardware's
// do.
struct WarpSums {
  float* registers[kWarp] = {};
  std::vector<float> running;  // [lane][register]
  int under_way = 0;
  bool fenced = false;  // since the registers were last free to be used otherwise
  std::shared_ptr<simt::Deferred> last;
};

// Those of the running thread's warp.
inline WarpSums& warp_sums() {
  std::shared_ptr<void>& memory = simt::product_groups().memory();
  if (memory == nullptr) memory = std::make_shared<WarpSums>();
  return *static_cast<WarpSums*>(memory.get());
}

// Value (row, k) of an operand by rows, or (k, column) of one by depth.
template <class T, Major kMajor>
float operand_value(const char* shared, uint64_t descriptor, int outer, int k) {
  const uint64_t start = (descriptor & 0x3fff) * 16;
  const uint64_t leading = (descriptor >> 16 & 0x3fff) * 16;
  const uint64_t stride = (descriptor >> 32 & 0x3fff) * 16;
  const auto o = static_cast<uint64_t>(outer);
  const auto d = static_cast<uint64_t>(k);
  const uint64_t offset = kMajor == Major::kDepth
                              ? o / 8 * stride + o % 8 * 128 + d * 2
                              : o / 64 * leading + d / 8 * stride + d % 8 * 128 + o % 64 * 2;
  const auto address = reinterpret_cast<uintptr_t>(shared + start + offset);
  return to_float(*reinterpret_cast<const T*>(address ^ ((address >> 7 & 7) << 4)));
}

template <int kColumns, class T, Major kMajorB>
void multiply_warp(WarpSums& sums, const char* shared, uint64_t a, uint64_t b, int warp, bool accumulate) {
  float left[16][16];
  float right[kColumns][16];
  for (int k = 0; k < 16; ++k) {
    for (int r = 0; r < 16; ++r) left[r][k] = operand_value<T, Major::kDepth>(shared, a, warp * 16 + r, k);
    for (int n = 0; n < kColumns; ++n) right[n][k] = operand_value<T, kMajorB>(shared, b, n, k);
  }
  for (int l = 0; l < kWarp; ++l) {
    for (int i = 0; i < kColumns / 2; ++i) {
      float sum = 0;
      for (int k = 0; k < 16; ++k)
        sum += left[l / 4 + i / 2 % 2 * 8][k] * right[i / 4 * 8 + l % 4 * 2 + i % 2][k];
      float& running = sums.running[static_cast<std::size_t>(l * (kColumns / 2) + i)];
      running = (accumulate ? running : 0.0f) + sum;
    }
  }
}

// One instruction of a warp. The sums become NaN until the products are done.
template <int kColumns, class T, Major kMajorB>
void begin_product(float* registers, uint64_t a, uint64_t b, bool accumulate, const simt::Place& where) {
  constexpr int kRegisters = kColumns / 2;
  struct Slot {
    float* registers;
    uint64_t a, b;
    bool accumulate;
  } slot{registers, a, b, accumulate};
  const simt::Unseen unseen;
  if (simt::threads_in_block() % 128 != 0) simt::fail(where, "wgmma: expected whole warpgroups");
  const auto warp = static_cast<int>(simt::linear_thread() / kWarp % 4);
  char* shared = simt::dynamic_shared();
  simt::check_proxy(shared + (a & 0x3fff) * 16, 64 * kBoxRowBytes - 96, "wgmma", where);
  if (kMajorB == Major::kDepth)
    simt::check_proxy(shared + (b & 0x3fff) * 16, kColumns * kBoxRowBytes - 96, "wgmma", where);
  auto& groups = simt::product_groups();
  WarpSums& sums = warp_sums();
  if (!sums.fenced) simt::fail(where, "wgmma: the registers of the sums were not fenced");
  simt::order_release(&sums);
  simt::collective(
      kAllLanes, "wgmma", &slot,
      [&](void* const* slots) {
        const Slot& first = *static_cast<const Slot*>(slots[0]);
        for (int l = 0; l < kWarp; ++l) {
          const Slot& s = *static_cast<const Slot*>(slots[l]);
          if (s.a != first.a || s.b != first.b || s.accumulate != first.accumulate)
            simt::fail(where, "wgmma: operands differ between the threads of a warp");
        }
        const bool fresh = sums.under_way == 0 || sums.registers[0] != first.registers;
        if (fresh && sums.under_way != 0)
          simt::fail(where, "wgmma: a second set of sums while the first is under way");
        if (fresh) {
          sums.running.assign(static_cast<std::size_t>(kWarp * kRegisters), 0.0f);
          for (int l = 0; l < kWarp; ++l) {
            sums.registers[l] = static_cast<const Slot*>(slots[l])->registers;
            for (int i = 0; i < kRegisters; ++i) {
              float& value = sums.registers[l][i];
              sums.running[static_cast<std::size_t>(l * kRegisters + i)] = value;
              value = std::bit_cast<float>(~uint32_t{0});
            }
          }
        }
        ++sums.under_way;
        WarpSums* const target = &sums;
        sums.last = simt::defer(
            simt::Kind::kProduct,
            [target, shared, first, warp] {
              simt::order_acquire(target);
              multiply_warp<kColumns, T, kMajorB>(*target, shared, first.a, first.b, warp, first.accumulate);
              if (--target->under_way != 0) return;
              for (std::size_t l = 0; l < kWarp; ++l) {
                std::copy_n(target->running.begin() + static_cast<std::ptrdiff_t>(l * kColumns / 2),
                            kColumns / 2, target->registers[l]);
              }
            },
            sums.last);
        groups.add(sums.last);
      },
      false, where);
}

}  // namespace emulated
#endif

// setmaxnreg: a warpgroup keeps kRegisters for each thread and gives the rest back, or takes as many. The
// kernel must have launch bounds, and every warpgroup one of the two as the first thing of its branch.
template <int kRegisters>
FLASHU_DEVICE void give_registers() {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256, "what setmaxnreg takes");
#if !FLASHU_EMULATED
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
#endif
}
template <int kRegisters>
FLASHU_DEVICE void take_registers() {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256, "what setmaxnreg takes");
#if !FLASHU_EMULATED
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
#endif
}

// Before the first product, and after registers of the sums were written.
FLASHU_DEVICE void wgmma_fence(FLASHU_WHERE_ONLY) {
#if FLASHU_EMULATED
  simt::collective(
      kAllLanes, "wgmma fence", nullptr, [](void* const*) { emulated::warp_sums().fenced = true; }, false,
      where);
#else
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}

FLASHU_DEVICE void wgmma_commit(FLASHU_WHERE_ONLY) {
#if FLASHU_EMULATED
  simt::collective(
      kAllLanes, "wgmma commit", nullptr, [](void* const*) { simt::product_groups().commit(); }, false,
      where);
#else
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}

// Returns when at most kPending committed groups are under way; the sums of the others may be read then.
template <int kPending>
FLASHU_DEVICE void wgmma_wait(FLASHU_WHERE_ONLY) {
#if FLASHU_EMULATED
  simt::collective(
      kAllLanes, "wgmma wait", nullptr,
      [](void* const*) {
        simt::product_groups().finish(kPending);
        if (kPending == 0) emulated::warp_sums().fenced = false;
      },
      true, where);
#else
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
#endif
}

// Tells the compiler that a register may have been written behind its back, so that it is not moved across a
// wait.
FLASHU_DEVICE void wgmma_touch([[maybe_unused]] float& value) {
#if !FLASHU_EMULATED
  asm volatile("" : "+f"(value)::"memory");
#endif
}

// sums (+)= A B for the 64 rows of A at descriptor `a` and kColumns columns of B at `b`, 16 deep. Register
// 4 j + 2 h + c of a thread is row (warp * 16 + lane / 4 + 8 h), column (8 j + lane % 4 * 2 + c).
#if FLASHU_EMULATED
template <int kColumns, class T, Major kMajorB>
FLASHU_DEVICE void wgmma(float (&sums)[kColumns / 2], uint64_t a, uint64_t b, bool accumulate FLASHU_WHERE) {
  static_assert(kColumns % 8 == 0 && kColumns <= 256, "wgmma has 8 to 256 columns in steps of 8");
  emulated::begin_product<kColumns, T, kMajorB>(sums, a, b, accumulate, where);
}
#else
#define FLASHU_SUMS_8(i)                                                                     \
  "+f"(sums[i]), "+f"(sums[i + 1]), "+f"(sums[i + 2]), "+f"(sums[i + 3]), "+f"(sums[i + 4]), \
      "+f"(sums[i + 5]), "+f"(sums[i + 6]), "+f"(sums[i + 7])
#define FLASHU_SUMS_32(i) FLASHU_SUMS_8(i), FLASHU_SUMS_8(i + 8), FLASHU_SUMS_8(i + 16), FLASHU_SUMS_8(i + 24)
#define FLASHU_SUMS_16(i) FLASHU_SUMS_8(i), FLASHU_SUMS_8(i + 8)

// One instruction: columns, operand types, the registers' list and their operands, the numbers of the
// operands that follow the registers.
#define FLASHU_WGMMA(columns, types, list, a_number, b_number, p_number, trans_number, ...)             \
  asm volatile("{\n\t.reg .pred p;\n\tsetp.ne.b32 p, %" #p_number                                       \
               ", 0;\n\t"                                                                               \
               "wgmma.mma_async.sync.aligned.m64n" #columns "k16.f32." types " {" list "}, %" #a_number \
               ", %" #b_number ", p, 1, 1, 0, %" #trans_number ";\n\t}"                                 \
               : __VA_ARGS__                                                                            \
               : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)), "n"(kMajorB == Major::kOuter ? 1 : 0))
#define FLASHU_R0 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define FLASHU_R16 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define FLASHU_R32 "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define FLASHU_R48 "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define FLASHU_R64 "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"
#define FLASHU_R80 "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define FLASHU_R96 \
  "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111"
#define FLASHU_R112 \
  "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define FLASHU_LIST_32 FLASHU_R0 ", " FLASHU_R16
#define FLASHU_LIST_48 FLASHU_LIST_32 ", " FLASHU_R32
#define FLASHU_LIST_64 FLASHU_LIST_48 ", " FLASHU_R48
#define FLASHU_LIST_80 FLASHU_LIST_64 ", " FLASHU_R64
#define FLASHU_LIST_96 FLASHU_LIST_80 ", " FLASHU_R80
#define FLASHU_LIST_112 FLASHU_LIST_96 ", " FLASHU_R96
#define FLASHU_LIST_128 FLASHU_LIST_112 ", " FLASHU_R112

#define FLASHU_WGMMA_OF_COLUMNS(columns, list, a_number, b_number, p_number, trans_number, ...)          \
  template <int kColumns, class T, Major kMajorB>                                                        \
    requires(kColumns == columns)                                                                        \
  FLASHU_DEVICE void wgmma(float (&sums)[kColumns / 2], uint64_t a, uint64_t b, bool accumulate) {       \
    if constexpr (std::is_same_v<T, bfloat16>) {                                                         \
      FLASHU_WGMMA(columns, "bf16.bf16", list, a_number, b_number, p_number, trans_number, __VA_ARGS__); \
    } else {                                                                                             \
      FLASHU_WGMMA(columns, "f16.f16", list, a_number, b_number, p_number, trans_number, __VA_ARGS__);   \
    }                                                                                                    \
  }
FLASHU_WGMMA_OF_COLUMNS(64, FLASHU_LIST_32, 32, 33, 34, 35, FLASHU_SUMS_32(0))
FLASHU_WGMMA_OF_COLUMNS(96, FLASHU_LIST_48, 48, 49, 50, 51, FLASHU_SUMS_32(0), FLASHU_SUMS_16(32))
FLASHU_WGMMA_OF_COLUMNS(128, FLASHU_LIST_64, 64, 65, 66, 67, FLASHU_SUMS_32(0), FLASHU_SUMS_32(32))
FLASHU_WGMMA_OF_COLUMNS(160, FLASHU_LIST_80, 80, 81, 82, 83, FLASHU_SUMS_32(0), FLASHU_SUMS_32(32),
                        FLASHU_SUMS_16(64))
FLASHU_WGMMA_OF_COLUMNS(192, FLASHU_LIST_96, 96, 97, 98, 99, FLASHU_SUMS_32(0), FLASHU_SUMS_32(32),
                        FLASHU_SUMS_32(64))
FLASHU_WGMMA_OF_COLUMNS(224, FLASHU_LIST_112, 112, 113, 114, 115, FLASHU_SUMS_32(0), FLASHU_SUMS_32(32),
                        FLASHU_SUMS_32(64), FLASHU_SUMS_16(96))
FLASHU_WGMMA_OF_COLUMNS(256, FLASHU_LIST_128, 128, 129, 130, 131, FLASHU_SUMS_32(0), FLASHU_SUMS_32(32),
                        FLASHU_SUMS_32(64), FLASHU_SUMS_32(96))
#endif

}  // namespace flashu::cuda
