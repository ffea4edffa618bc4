// Warpgroup matrix instructions: the sums of a warp are NaN from the first product on until all of them are
// done, which is late and for each warp on its own.
#pragma once

#include <memory>
#include <vector>

#include "cuda/primitives/tma.cuh"

namespace flashu::cuda {

FLASHU_DEVICE uint64_t wgmma_descriptor(const void* tile FLASHU_WHERE) {
  if (!simt::in_shared(tile, 16)) simt::fail(where, "wgmma: an operand is not in dynamic shared memory");
  const auto address = static_cast<uint64_t>(static_cast<const char*>(tile) - simt::dynamic_shared());
  return operand_descriptor(address);
}

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

// Value (outer, k) of an operand; `outer` is a row of A or a column of B.
template <class T>
float operand_value(const char* shared, uint64_t descriptor, int outer, int k) {
  const uint64_t start = (descriptor & 0x3fff) * 16;
  const uint64_t stride = (descriptor >> 32 & 0x3fff) * 16;
  const auto o = static_cast<uint64_t>(outer);
  const auto d = static_cast<uint64_t>(k);
  const uint64_t offset = o / 8 * stride + o % 8 * 128 + d * 2;
  const auto address = reinterpret_cast<uintptr_t>(shared + start + offset);
  return to_float(*reinterpret_cast<const T*>(address ^ ((address >> 7 & 7) << 4)));
}

template <int kN, class T>
void multiply_warp(WarpSums& sums, const char* shared, uint64_t a, uint64_t b, int warp) {
  float left[16][16];
  float right[kN][16];
  for (int k = 0; k < 16; ++k) {
    for (int r = 0; r < 16; ++r) left[r][k] = operand_value<T>(shared, a, warp * 16 + r, k);
    for (int n = 0; n < kN; ++n) right[n][k] = operand_value<T>(shared, b, n, k);
  }
  for (int l = 0; l < kWarp; ++l) {
    for (int i = 0; i < kN / 2; ++i) {
      float sum = 0;
      for (int k = 0; k < 16; ++k)
        sum += left[l / 4 + i / 2 % 2 * 8][k] * right[i / 4 * 8 + l % 4 * 2 + i % 2][k];
      sums.running[static_cast<std::size_t>(l * (kN / 2) + i)] += sum;
    }
  }
}

// One instruction of a warp. The sums become NaN until the products are done.
template <int kN, class T>
void begin_product(float* registers, uint64_t a, uint64_t b, const simt::Place& where) {
  constexpr int kRegisters = kN / 2;
  struct Slot {
    float* registers;
    uint64_t a, b;
  } slot{registers, a, b};
  const simt::Unseen unseen;
  if (simt::threads_in_block() % 128 != 0) simt::fail(where, "wgmma: expected whole warpgroups");
  const auto warp = static_cast<int>(simt::linear_thread() / kWarp % 4);
  char* shared = simt::dynamic_shared();
  simt::check_proxy(shared + (a & 0x3fff) * 16, 64 * kBoxRowBytes - 96, "wgmma", where);
  simt::check_proxy(shared + (b & 0x3fff) * 16, kN * kBoxRowBytes - 96, "wgmma", where);
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
          if (s.a != first.a || s.b != first.b)
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
              multiply_warp<kN, T>(*target, shared, first.a, first.b, warp);
              if (--target->under_way != 0) return;
              for (std::size_t l = 0; l < kWarp; ++l) {
                std::copy_n(target->running.begin() + static_cast<std::ptrdiff_t>(l * kN / 2), kN / 2,
                            target->registers[l]);
              }
            },
            sums.last);
        groups.add(sums.last);
      },
      false, where);
}

}  // namespace emulated

// There are as many registers as anyone wants.
template <int kRegisters>
FLASHU_DEVICE void warpgroup_reg_dealloc() {}
template <int kRegisters>
FLASHU_DEVICE void warpgroup_reg_alloc() {}

FLASHU_DEVICE void wgmma_fence(FLASHU_WHERE_ONLY) {
  simt::collective(
      kAllLanes, "wgmma fence", nullptr, [](void* const*) { emulated::warp_sums().fenced = true; }, false,
      where);
}

FLASHU_DEVICE void wgmma_commit(FLASHU_WHERE_ONLY) {
  simt::collective(
      kAllLanes, "wgmma commit", nullptr, [](void* const*) { simt::product_groups().commit(); }, false,
      where);
}

template <int kPending>
FLASHU_DEVICE void wgmma_wait(FLASHU_WHERE_ONLY) {
  simt::collective(
      kAllLanes, "wgmma wait", nullptr,
      [](void* const*) {
        simt::product_groups().finish(kPending);
        if (kPending == 0) emulated::warp_sums().fenced = false;
      },
      true, where);
}

FLASHU_DEVICE void wgmma_touch(float& /*value*/) {}

template <int kN, class T>
FLASHU_DEVICE void wgmma(float (&sums)[kN / 2], uint64_t a, uint64_t b FLASHU_WHERE) {
  static_assert(kN % 8 == 0 && kN <= 256, "wgmma has 8 to 256 columns in steps of 8");
  emulated::begin_product<kN, T>(sums, a, b, where);
}

}  // namespace flashu::cuda
