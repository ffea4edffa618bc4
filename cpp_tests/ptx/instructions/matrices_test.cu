// ldmatrix, stmatrix and mma.sync: which lane holds which value.
#include <random>

#include "device.cuh"

namespace flashu::test {
namespace {

// ---- 8 x 8 matrices of 16-bit values: value v of matrix m at row r, column c is m * 64 + r * 8 + c.

struct Registers {
  uint32_t r[4];
};

template <int kCount, bool kTransposed>
struct Load {
  __device__ Registers operator()(int lane) const {
    __shared__ __align__(16) uint16_t values[256];
    for (int i = lane; i < 256; i += 32) values[i] = static_cast<uint16_t>(i);
    __syncwarp();
    const auto at = static_cast<uint32_t>(__cvta_generic_to_shared(values + lane % (kCount * 8) * 8));
    Registers d{};
    if constexpr (kCount == 1) {
      asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];" : "=r"(d.r[0]) : "r"(at));
    } else if constexpr (kCount == 2) {
      asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                   : "=r"(d.r[0]), "=r"(d.r[1])
                   : "r"(at));
    } else if constexpr (kTransposed) {
      asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                   : "=r"(d.r[0]), "=r"(d.r[1]), "=r"(d.r[2]), "=r"(d.r[3])
                   : "r"(at));
    } else {
      asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                   : "=r"(d.r[0]), "=r"(d.r[1]), "=r"(d.r[2]), "=r"(d.r[3])
                   : "r"(at));
    }
    return d;
  }
};

constexpr uint32_t pair(uint32_t low, uint32_t high) { return low | high << 16; }

// Lane l holds row l / 4, columns 2 (l % 4) and the next.
TEST(Ldmatrix, RowsOfFourLanes) {
  const auto got = on_threads(Load<4, false>{});
  const int lanes[] = {0, 1, 3, 4, 31};
  const uint32_t first[] = {pair(0, 1), pair(2, 3), pair(6, 7), pair(8, 9), pair(62, 63)};
  for (int n = 0; n < 5; ++n) {
    for (uint32_t m = 0; m < 4; ++m) EXPECT_EQ(got[lanes[n]].r[m], first[n] + m * pair(64, 64)) << lanes[n];
  }
  const auto one = on_threads(Load<1, false>{});
  const auto two = on_threads(Load<2, false>{});
  for (int l = 0; l < 32; ++l) {
    EXPECT_EQ(one[l].r[0], got[l].r[0]);
    EXPECT_EQ(two[l].r[1], got[l].r[1]);
  }
}

// Transposed: column l / 4, rows 2 (l % 4) and the next.
TEST(Ldmatrix, Transposed) {
  const auto got = on_threads(Load<4, true>{});
  const int lanes[] = {0, 1, 3, 4, 31};
  const uint32_t first[] = {pair(0, 8), pair(16, 24), pair(48, 56), pair(1, 9), pair(55, 63)};
  for (int n = 0; n < 5; ++n) {
    for (uint32_t m = 0; m < 4; ++m) EXPECT_EQ(got[lanes[n]].r[m], first[n] + m * pair(64, 64)) << lanes[n];
  }
}

struct Stored {
  uint16_t v[8];
};

// Every lane stores (2 l, 2 l + 1) of matrix 0, 64 more of matrix 1 and so on; lane l returns row l of the
// memory.
template <bool kTransposed>
struct Store {
  __device__ Stored operator()(int lane) const {
    __shared__ __align__(16) uint16_t values[256];
    const auto at = static_cast<uint32_t>(__cvta_generic_to_shared(values + lane * 8));
    uint32_t r[4];
    for (int m = 0; m < 4; ++m)
      r[m] = static_cast<uint32_t>(64 * m + 2 * lane) | static_cast<uint32_t>(64 * m + 2 * lane + 1) << 16;
    if constexpr (kTransposed) {
      asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(at),
                   "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
                   : "memory");
    } else {
      asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(at), "r"(r[0]),
                   "r"(r[1]), "r"(r[2]), "r"(r[3])
                   : "memory");
    }
    __syncwarp();
    Stored s;
    for (int c = 0; c < 8; ++c) s.v[c] = values[lane * 8 + c];
    return s;
  }
};

TEST(Stmatrix, IsLdmatrixBackwards) {
  const auto rows = on_threads(Store<false>{});
  const auto columns = on_threads(Store<true>{});
  for (int r = 0; r < 32; ++r) {
    for (int c = 0; c < 8; ++c) {
      EXPECT_EQ(rows[r].v[c], r * 8 + c);
      EXPECT_EQ(columns[r].v[c], r / 8 * 64 + c * 8 + r % 8);
    }
  }
}

// ---- mma.sync: the documentation's figures of the fragments, as row and column of each value of some lanes

struct Place {
  int row, column;
};
// m16n8k16: A (a0..a7), B (b0..b3; row is k) and C (c0..c3) of lanes 0, 6 and 31.
constexpr int kLanesOfTable[] = {0, 6, 31};
constexpr Place kA16[3][8] = {{{0, 0}, {0, 1}, {8, 0}, {8, 1}, {0, 8}, {0, 9}, {8, 8}, {8, 9}},
                              {{1, 4}, {1, 5}, {9, 4}, {9, 5}, {1, 12}, {1, 13}, {9, 12}, {9, 13}},
                              {{7, 6}, {7, 7}, {15, 6}, {15, 7}, {7, 14}, {7, 15}, {15, 14}, {15, 15}}};
constexpr Place kB16[3][4] = {
    {{0, 0}, {1, 0}, {8, 0}, {9, 0}}, {{4, 1}, {5, 1}, {12, 1}, {13, 1}}, {{6, 7}, {7, 7}, {14, 7}, {15, 7}}};
constexpr Place kC[3][4] = {
    {{0, 0}, {0, 1}, {8, 0}, {8, 1}}, {{1, 4}, {1, 5}, {9, 4}, {9, 5}}, {{7, 6}, {7, 7}, {15, 6}, {15, 7}}};

// The documentation's formulas, for all lanes: group = lane / 4, of the group = lane % 4.
Place a_of(int lane, int i) {
  return {lane / 4 + ((i & 2) != 0 ? 8 : 0), lane % 4 * 2 + (i & 1) + (i >= 4 ? 8 : 0)};
}
Place b_of(int lane, int i) { return {lane % 4 * 2 + (i & 1) + (i >= 2 ? 8 : 0), lane / 4}; }
Place c_of(int lane, int i) { return {lane / 4 + (i >= 2 ? 8 : 0), lane % 4 * 2 + (i & 1)}; }
bool same(Place x, Place y) { return x.row == y.row && x.column == y.column; }

TEST(Mma, FormulasAreTheFigures) {
  for (int n = 0; n < 3; ++n) {
    const int lane = kLanesOfTable[n];
    for (int i = 0; i < 8; ++i) EXPECT_TRUE(same(a_of(lane, i), kA16[n][i])) << lane << " a" << i;
    for (int i = 0; i < 4; ++i) EXPECT_TRUE(same(b_of(lane, i), kB16[n][i])) << lane << " b" << i;
    for (int i = 0; i < 4; ++i) EXPECT_TRUE(same(c_of(lane, i), kC[n][i])) << lane << " c" << i;
  }
}

struct Fragments {
  uint32_t a[4], b[2];
  float c[4];
};
struct Sums {
  float d[4];
};
enum class Kind { kBrain16, kHalf16, kBrain8, kHalf8, kHalfSums };

template <Kind kKind>
struct Multiply {
  Fragments of[32];
  __device__ Sums operator()(int lane) const {
    const Fragments& f = of[lane];
    Sums s{{f.c[0], f.c[1], f.c[2], f.c[3]}};
    float* d = s.d;
#define FLASHU_D "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
#define FLASHU_MMA16(types)                                                       \
  asm volatile("mma.sync.aligned.m16n8k16.row.col." types                         \
               " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
               : FLASHU_D                                                         \
               : "r"(f.a[0]), "r"(f.a[1]), "r"(f.a[2]), "r"(f.a[3]), "r"(f.b[0]), "r"(f.b[1]))
#define FLASHU_MMA8(types)                                            \
  asm volatile("mma.sync.aligned.m16n8k8.row.col." types              \
               " {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};" \
               : FLASHU_D                                             \
               : "r"(f.a[0]), "r"(f.a[1]), "r"(f.b[0]))
    if constexpr (kKind == Kind::kBrain16) FLASHU_MMA16("f32.bf16.bf16.f32");
    if constexpr (kKind == Kind::kHalf16) FLASHU_MMA16("f32.f16.f16.f32");
    if constexpr (kKind == Kind::kBrain8) FLASHU_MMA8("f32.bf16.bf16.f32");
    if constexpr (kKind == Kind::kHalf8) FLASHU_MMA8("f32.f16.f16.f32");
    if constexpr (kKind == Kind::kHalfSums) {
      // Sums of f16: (c0, c1) and (c2, c3) in two registers.
      asm volatile(
          "{ .reg .b32 x, y; .reg .b16 p, q; cvt.rn.f16x2.f32 x, %1, %0; cvt.rn.f16x2.f32 y, %3, %2; "
          "mma.sync.aligned.m16n8k16.row.col.f16.f16.f16.f16 {x, y}, {%4, %5, %6, %7}, {%8, %9}, {x, y}; "
          "mov.b32 {p, q}, x; cvt.f32.f16 %0, p; cvt.f32.f16 %1, q; "
          "mov.b32 {p, q}, y; cvt.f32.f16 %2, p; cvt.f32.f16 %3, q; }"
          : FLASHU_D
          : "r"(f.a[0]), "r"(f.a[1]), "r"(f.a[2]), "r"(f.a[3]), "r"(f.b[0]), "r"(f.b[1]));
    }
    return s;
  }
};

// Small whole numbers are exact in both types.
uint32_t coded(int v, bool brain) {
  const uint32_t f = bits(static_cast<float>(v));
  if (brain) return f >> 16;
  return v == 0 ? 0 : (f >> 16 & 0x8000) | (((f >> 23 & 0xff) - 112) << 10) | (f >> 13 & 0x3ff);
}

template <Kind kKind>
void multiply() {
  constexpr bool kBrain = kKind == Kind::kBrain16 || kKind == Kind::kBrain8;
  constexpr int kDepth = kKind == Kind::kBrain8 || kKind == Kind::kHalf8 ? 8 : 16;
  std::mt19937 random(3);
  int a[16][16], b[16][8], c[16][8];
  const auto fill = [&](auto& m) {
    for (auto& row : m) {
      for (int& v : row) v = static_cast<int>(random() % 9) - 4;
    }
  };
  fill(a);
  fill(b);
  fill(c);
  Multiply<kKind> f{};
  const auto put = [&](uint32_t* registers, int i, int v) {
    registers[i / 2] |= coded(v, kBrain) << (16 * (i % 2));
  };
  for (int l = 0; l < 32; ++l) {
    for (int i = 0; i < kDepth / 2; ++i) put(f.of[l].a, i, a[a_of(l, i).row][a_of(l, i).column]);
    for (int i = 0; i < kDepth / 4; ++i) put(f.of[l].b, i, b[b_of(l, i).row][b_of(l, i).column]);
    for (int i = 0; i < 4; ++i) f.of[l].c[i] = static_cast<float>(c[c_of(l, i).row][c_of(l, i).column]);
  }
  const auto got = on_threads(f);
  for (int l = 0; l < 32; ++l) {
    for (int i = 0; i < 4; ++i) {
      const Place p = c_of(l, i);
      int want = c[p.row][p.column];
      for (int k = 0; k < kDepth; ++k) want += a[p.row][k] * b[k][p.column];
      EXPECT_EQ(got[l].d[i], static_cast<float>(want)) << "lane " << l << " c" << i;
    }
  }
}

TEST(Mma, Bf16Depth16) { multiply<Kind::kBrain16>(); }
TEST(Mma, F16Depth16) { multiply<Kind::kHalf16>(); }
TEST(Mma, Bf16Depth8) { multiply<Kind::kBrain8>(); }
TEST(Mma, F16Depth8) { multiply<Kind::kHalf8>(); }
TEST(Mma, F16Sums) { multiply<Kind::kHalfSums>(); }

}  // namespace
}  // namespace flashu::test
