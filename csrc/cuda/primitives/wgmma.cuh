// Warpgroup matrix instructions (sm_90a): 64 x N products of 16-bit operands in shared memory, float sums in
// registers of 128 threads. Begun, not done: what they read must stay and what they add to must not be looked
// at before wgmma_wait().
#pragma once

#include "cuda/primitives/tma.cuh"

namespace flashu::cuda {

FLASHU_DEVICE uint64_t wgmma_descriptor(const void* tile) { return operand_descriptor(shared_address(tile)); }

// setmaxnreg: a warpgroup keeps kRegisters for each thread and gives the rest back, or takes as many. The
// kernel must have launch bounds, and every warpgroup one of the two as the first thing of its
// branch.
template <int kRegisters>
FLASHU_DEVICE void warpgroup_reg_dealloc() {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256, "what setmaxnreg takes");
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
FLASHU_DEVICE void warpgroup_reg_alloc() {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256, "what setmaxnreg takes");
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// Before the first product, and after registers of the sums were written.
FLASHU_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

FLASHU_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Returns when at most kPending committed groups are under way; the sums of the others may be read then.
template <int kPending>
FLASHU_DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Tells the compiler that a register may have been written behind its back, so that it is not moved across a
// wait.
FLASHU_DEVICE void wgmma_touch([[maybe_unused]] float& value) { asm volatile("" : "+f"(value)::"memory"); }

// sums += A B for the 64 rows of A at descriptor `a`, kN columns of B at `b` and 16 of K. Register
// 4 j + 2 h + c of a thread is row (warp * 16 + lane / 4 + 8 h), column (8 j + lane % 4 * 2 + c).
// Always added, so a kernel begins with sums of zero: where a predicate decides whether the sums are read,
// ptxas 12.5 to 12.8 takes their first value for a write inside the pipeline and waits for every product
// (advisory C7515).
#define FLASHU_SUMS_8(i)                                                                     \
  "+f"(sums[i]), "+f"(sums[i + 1]), "+f"(sums[i + 2]), "+f"(sums[i + 3]), "+f"(sums[i + 4]), \
      "+f"(sums[i + 5]), "+f"(sums[i + 6]), "+f"(sums[i + 7])
#define FLASHU_SUMS_32(i) FLASHU_SUMS_8(i), FLASHU_SUMS_8(i + 8), FLASHU_SUMS_8(i + 16), FLASHU_SUMS_8(i + 24)
#define FLASHU_SUMS_16(i) FLASHU_SUMS_8(i), FLASHU_SUMS_8(i + 8)

// One instruction: N, operand types, the registers' list and their operands, the numbers of the
// operands that follow the registers.
#define FLASHU_WGMMA(n, types, list, a_number, b_number, ...)                                            \
  asm volatile(                                                                                          \
      "{\n\t.reg .pred p;\n\tsetp.eq.b32 p, 0, 0;\n\t"                                                   \
      "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." types " {" list "}, %" #a_number ", %" #b_number \
      ", p, 1, 1, 0, 0;\n\t}"                                                                            \
      : __VA_ARGS__                                                                                      \
      : "l"(a), "l"(b))
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

#define FLASHU_WGMMA_OF_N(n, list, a_number, b_number, ...)                 \
  template <int kN, class T>                                                \
    requires(kN == n)                                                       \
  FLASHU_DEVICE void wgmma(float (&sums)[kN / 2], uint64_t a, uint64_t b) { \
    if constexpr (std::is_same_v<T, bfloat16>) {                            \
      FLASHU_WGMMA(n, "bf16.bf16", list, a_number, b_number, __VA_ARGS__);  \
    } else {                                                                \
      FLASHU_WGMMA(n, "f16.f16", list, a_number, b_number, __VA_ARGS__);    \
    }                                                                       \
  }
FLASHU_WGMMA_OF_N(64, FLASHU_LIST_32, 32, 33, FLASHU_SUMS_32(0))
FLASHU_WGMMA_OF_N(96, FLASHU_LIST_48, 48, 49, FLASHU_SUMS_32(0), FLASHU_SUMS_16(32))
FLASHU_WGMMA_OF_N(128, FLASHU_LIST_64, 64, 65, FLASHU_SUMS_32(0), FLASHU_SUMS_32(32))
FLASHU_WGMMA_OF_N(160, FLASHU_LIST_80, 80, 81, FLASHU_SUMS_32(0), FLASHU_SUMS_32(32), FLASHU_SUMS_16(64))
FLASHU_WGMMA_OF_N(192, FLASHU_LIST_96, 96, 97, FLASHU_SUMS_32(0), FLASHU_SUMS_32(32), FLASHU_SUMS_32(64))
FLASHU_WGMMA_OF_N(224, FLASHU_LIST_112, 112, 113, FLASHU_SUMS_32(0), FLASHU_SUMS_32(32), FLASHU_SUMS_32(64),
                  FLASHU_SUMS_16(96))
FLASHU_WGMMA_OF_N(256, FLASHU_LIST_128, 128, 129, FLASHU_SUMS_32(0), FLASHU_SUMS_32(32), FLASHU_SUMS_32(64),
                  FLASHU_SUMS_32(96))

}  // namespace flashu::cuda
