// The tensor memory accelerator: copies that happen late and in any order, and whose bytes are counted.
#pragma once

#include "core/divide_up.hpp"
#include "cuda/primitives/mbarrier.cuh"

namespace flashu::cuda {

struct TensorMap {
  const char* base;
  int64_t rows, columns, stride;  // in values
  int box_rows;
};

inline TensorMap encode_tensor_map(const void* base, int64_t rows, int64_t columns, int64_t stride,
                                   int box_rows) {
  check_tensor_map(base, rows, columns, stride, box_rows);
  return {static_cast<const char*>(base), rows, columns, stride, box_rows};
}

namespace emulated {

// Chunk `chunk` of row `row` of a box.
inline char* box_chunk(char* box, int row, int chunk) {
  const auto address =
      reinterpret_cast<uintptr_t>(box) + static_cast<uintptr_t>(row * kBoxRowBytes + chunk * 16);
  return reinterpret_cast<char*>(address ^ ((address >> 7 & 7) << 4));
}

inline void check_box(const void* box, const TensorMap& map, const char* what, const simt::Place& where) {
  if (reinterpret_cast<uintptr_t>(box) % 1024 != 0)
    simt::fail(where, std::string(what) + ": a swizzled box must begin at a multiple of 1024 bytes");
  if (!simt::in_shared(box, static_cast<std::size_t>(map.box_rows * kBoxRowBytes)))
    simt::fail(where, std::string(what) + ": the box is not in shared memory");
}

// The hardware takes a first column that is no multiple of 16 bytes for an illegal instruction, and the
// context is lost. PTX ISA does not say so; triton #7385 and tilelang #2527 do.
inline void check_column(int column, const char* what, const simt::Place& where) {
  if (column % kChunkColumns != 0)
    simt::fail(where, std::string(what) + ": expected a first column at a multiple of 16 bytes, got column " +
                          std::to_string(column));
}

// What every load checks of its own block.
inline void check_load(const void* to, const TensorMap& map, int column, const simt::Place& where) {
  check_box(to, map, "TMA load", where);
  check_column(column, "TMA load", where);
  if (simt::waited_for_previous() && !simt::fenced_global())
    simt::fail(where, "TMA load: what the kernel before stored is read without fence.proxy.async.global");
}

// To shared memory of this block (`own`) or of another one of the cluster.
inline void begin_load(void* to, const TensorMap& map, int column, int row, Mbarrier* barrier, bool own,
                       const simt::Place& where) {
  const int bytes = map.box_rows * kBoxRowBytes;
  auto* words = static_cast<uint64_t*>(to);
  for (int i = 0; i < bytes / 8; ++i) words[i] = ~uint64_t{0};  // undefined until it is there
  const simt::Unseen unseen;
  ask_bytes(barrier, bytes, own, where);
  simt::defer(simt::Kind::kLoad, [to, source = map, column, row, barrier, bytes, where] {
    simt::check_lives(to, "TMA load", where);
    for (int r = 0; r < source.box_rows; ++r) {
      for (int c = 0; c < kBoxColumns; ++c) {
        const int64_t y = int64_t{row} + r;
        const int64_t x = int64_t{column} + c;
        const bool inside = y >= 0 && y < source.rows && x >= 0 && x < source.columns;
        auto* value = reinterpret_cast<uint16_t*>(box_chunk(static_cast<char*>(to), r, c / 8)) + c % 8;
        *value = inside ? reinterpret_cast<const uint16_t*>(source.base)[y * source.stride + x] : uint16_t{0};
      }
    }
    complete_bytes(barrier, bytes);
  });
}

}  // namespace emulated

// Which lane it is may not matter.
FLASHU_DEVICE bool elect_one(FLASHU_WHERE_ONLY) {
  simt::collective(kAllLanes, "elect.sync", nullptr, [](void* const*) {}, false, where);
  return simt::lane() == simt::settings().seed % kWarp;
}

FLASHU_DEVICE void tma_load(void* to, const TensorMap& map, int column, int row,
                            Mbarrier* barrier FLASHU_WHERE) {
  emulated::check_load(to, map, column, where);
  emulated::begin_load(to, map, column, row, barrier, true, where);
  simt::maybe_yield();
}

FLASHU_DEVICE void tma_store(const TensorMap& map, const void* from, int column, int row FLASHU_WHERE) {
  emulated::check_box(from, map, "TMA store", where);
  emulated::check_column(column, "TMA store", where);
  simt::check_proxy(from, static_cast<std::size_t>(map.box_rows * kBoxRowBytes), "TMA store", where);
  const simt::Unseen unseen;
  simt::bulk_groups().add(simt::defer(simt::Kind::kStore, [from, target = map, column, row] {
    auto* box = const_cast<char*>(static_cast<const char*>(from));
    // Chunks of 16 bytes are written whole: one that begins inside the matrix reaches past its last column
    // (triton #11583).
    const int64_t written = divide_up(target.columns, kChunkColumns) * kChunkColumns;
    for (int r = 0; r < target.box_rows; ++r) {
      for (int c = 0; c < kBoxColumns; ++c) {
        const int64_t y = int64_t{row} + r;
        const int64_t x = int64_t{column} + c;
        if (y < 0 || y >= target.rows || x < 0 || x >= written) continue;
        auto* values = reinterpret_cast<uint16_t*>(const_cast<char*>(target.base));
        values[y * target.stride + x] =
            reinterpret_cast<const uint16_t*>(emulated::box_chunk(box, r, c / 8))[c % 8];
      }
    }
  }));
}

FLASHU_DEVICE void tma_store_commit() { simt::bulk_groups().commit(); }

template <int kPending>
FLASHU_DEVICE void tma_store_wait_read() {
  simt::bulk_groups().wait(kPending);
}

FLASHU_DEVICE void tma_prefetch(const TensorMap& /*map*/) {}

}  // namespace flashu::cuda
