// Tiles that two blocks of a cluster take together have the bits of the same tiles taken alone: numbers of
// rows and multiprocessors that leave a block without rows or a multiprocessor without a neighbour, ranges,
// lists, parts of K, neurons in front of a run. For nvcc and for the emulator, by the host entry point.
#include "core/ffn_tiles.hpp"
#include "cuda/ffn_sm90.hpp"
#include "cuda/support.hpp"

namespace flashu::test {
namespace {

using core::FfnFetch;
using core::FfnKernel;
using core::FfnTile;

template <class T>
class DeviceClusters : public DeviceOf<T> {};
using Storage2 = ::testing::Types<bfloat16, float16>;
TYPED_TEST_SUITE(DeviceClusters, Storage2);

struct Case {
  int64_t rows, n, k;
  int multiprocessors = 3;
  int64_t lead = 0;
  bool listed = false;
  int parts = 1;
  bool spread = false;

  std::string name() const {
    return std::to_string(rows) + " x " + std::to_string(n) + " x " + std::to_string(k) + ", " +
           std::to_string(multiprocessors) + " multiprocessors, lead " + std::to_string(lead) +
           (listed ? ", listed" : "") + ", parts " + std::to_string(parts) + (spread ? ", spread" : "");
  }
};

constexpr int64_t kFirst = 16;  // of a range

int32_t block_of(FfnFetch fetch, bool up) {
  return fetch == FfnFetch::kRuns || !up ? 64 : fetch == FfnFetch::kBlocks ? 8 : 1;
}

// `count` neurons in blocks of so many, the blocks in any order.
std::vector<int32_t> blocks(int64_t count, int32_t block, int64_t intermediate) {
  std::vector<int32_t> list;
  const int64_t all = intermediate / block;
  for (int64_t j = 0; j < count; ++j)
    list.push_back(static_cast<int32_t>((j / block * 5 + 1) % all * block + j % block));
  return list;
}

template <class T>
struct Half {
  bool up;
  Case c;
  int64_t intermediate;
  Guarded<T> a, b, b2, residual, out;
  Guarded<float> partial;
  Guarded<int32_t> list;

  Half(bool up_, const Case& of)
      : up(up_),
        c(of),
        intermediate((up_ ? of.n : of.k) / 64 * 64 + 192),
        a(normal<T>({of.rows, of.k}, 1, (8 - of.k % 8) % 8)),
        b(up_ ? normal<T>({intermediate, of.k}, 2, (8 - of.k % 8) % 8, 0.2f)
              : normal<T>({of.n, intermediate}, 2, 0, 0.2f)),
        b2(up_ ? normal<T>({intermediate, of.k}, 3, (8 - of.k % 8) % 8, 0.2f) : normal<T>({1, 1}, 3)),
        residual(normal<T>({of.rows, of.n}, 4)),
        out({of.rows, of.n}, (8 - of.n % 8) % 8 + 8),
        partial({of.parts, of.rows, (of.n + 3) / 4 * 4}),
        list({std::max<int64_t>(up_ ? of.n : of.k, 1)}) {}

  // What the tile makes: the result, or the parts' sums.
  std::vector<double> run(const FfnTile& tile) {
    const flashu_tensor a_d = a.upload(), b_d = b.upload(), b2_d = b2.upload(),
                        residual_d = residual.upload();
    out.fill([](int64_t) { return T{0x1234}; });
    const flashu_tensor out_d = out.upload(), partial_d = partial.upload();
    cuda::FfnGemm g{};
    g.a = a_d.data;
    g.a_stride = a_d.strides[0];
    g.m = c.rows;
    g.b = b_d.data;
    g.b_stride = b_d.strides[0];
    g.b2 = up ? b2_d.data : nullptr;
    g.gated = up;
    g.b2_stride = b2_d.strides[0];
    g.n = c.n;
    g.k = c.k;
    g.intermediate = intermediate;
    g.block = c.listed ? block_of(tile.fetch, up) : 1;
    if (c.listed) {
      const std::vector<int32_t> neurons = blocks(list.count(), g.block, intermediate);
      list.fill([&](int64_t i) { return neurons[static_cast<size_t>(i)]; });
      g.list = static_cast<const int32_t*>(list.upload().data);
    } else {
      g.first = kFirst;
      g.lead = c.lead;
    }
    if (!up) {
      g.residual = residual_d.data;
      g.residual_stride = residual_d.strides[0];
    }
    g.out = out_d.data;
    g.out_stride = out_d.strides[0];
    g.parts = c.parts;
    if (c.spread) g.partial = static_cast<float*>(partial_d.data);
    g.partial_stride = partial.size(2);
    cuda::ffn_gemm_sm90(tile, g, dtype_of<T>(), nullptr, c.multiprocessors);
    device_synchronize();
    return c.spread ? partial.download().values() : out.download().values();
  }
};

// Whether a row of the results holds NaN: of what was never written, or of neurons that were not asked for.
bool finite(const std::vector<double>& values) {
  for (const double value : values) {
    if (!std::isfinite(value)) return false;
  }
  return true;
}

template <class T>
void compare(const FfnTile& tile, const Case& c) {
  SCOPED_TRACE((tile.up ? "up " : "down ") + std::to_string(tile.block_n) + ", fetch " +
               std::to_string(static_cast<int>(tile.fetch)) + ": " + c.name());
  FfnTile alone = tile;
  alone.cluster = 1;
  Half<T> half(tile.up, c);
  const std::vector<double> expected = half.run(alone);
  const std::vector<double> got = half.run(tile);
  ASSERT_TRUE(c.spread || finite(expected));
  for (size_t i = 0; i < expected.size(); ++i) {
    if (std::isnan(expected[i]) && std::isnan(got[i])) continue;  // columns that pad the parts' rows
    ASSERT_EQ(got[i], expected[i]) << "element " << i;
  }
}

template <class Body>
void each_cluster(bool up, const Body& body) {
  for (const FfnTile& tile : core::kFfnTiles) {
    if (tile.cluster > 1 && tile.up == up) body(tile);
  }
}

// One block of neurons or several; more steps of K than there are stages, in one tile or in several of one
// cluster, so that the stages of both blocks are used again.
TYPED_TEST(DeviceClusters, UpHalf) {
  if (!use_capability(90)) GTEST_SKIP() << "this device is no sm_90";
  each_cluster(true, [&](const FfnTile& tile) {
    const bool listed = tile.fetch != FfnFetch::kRange;
    for (Case c : {Case{1, 64, 40}, Case{129, 64, 330, 2}, Case{257, 192, 136}, Case{257, 320, 72, 5}}) {
      c.listed = listed;
      this->under_every_schedule([&] { compare<TypeParam>(tile, c); });
    }
    if (listed) return;
    for (Case c : {Case{129, 77, 72, 2, 5}, Case{300, 229, 136, 8, 3}})
      this->under_every_schedule([&] { compare<TypeParam>(tile, c); });
  });
}

TYPED_TEST(DeviceClusters, DownHalf) {
  if (!use_capability(90)) GTEST_SKIP() << "this device is no sm_90";
  each_cluster(false, [&](const FfnTile& tile) {
    for (const Case& c : {Case{1, 8, 64, 2}, Case{129, 70, 450, 2, 5}, Case{257, 200, 136, 3},
                          Case{257, 200, 128, 4, 0, true, 2}, Case{130, 390, 200, 2, 3, false, 3},
                          Case{130, 70, 200, 2, 3, false, 3, true}, Case{257, 210, 128, 5, 0, true, 2, true},
                          Case{5, 30, 136, 132, 0, false, 2, true}})
      this->under_every_schedule([&] { compare<TypeParam>(tile, c); });
  });
}

// Tiles whose clusters would need more multiprocessors than there are still run: a launch has one cluster at
// least.
TYPED_TEST(DeviceClusters, OneMultiprocessor) {
  if (!use_capability(90)) GTEST_SKIP() << "this device is no sm_90";
  for (const bool up : {true, false}) {
    each_cluster(up, [&](const FfnTile& tile) {
      compare<TypeParam>(
          tile, {257, 64, 72, 1, 0, tile.fetch == FfnFetch::kRuns || tile.fetch == FfnFetch::kBlocks});
    });
  }
}

}  // namespace
}  // namespace flashu::test
