// rotary_cache on the device against the CPU: every head dimension's path, slots in and outside the cache,
// strides.
#include <cmath>
#include <optional>

#include "cuda/support.hpp"
#include "flashu/norm.hpp"

namespace flashu::test {
namespace {

template <class T>
class DeviceRotary : public DeviceTest {};
TYPED_TEST_SUITE(DeviceRotary, Storage3);

struct Problem {
  int64_t rows, tokens, heads, kv_heads, d, capacity;
  int64_t padding = 0, offset = 0;
  int64_t tables = 1;  // rows of cos and sin
  bool norms = false;
  std::vector<int64_t> start = {};  // none where empty
};

template <class T>
struct Tensors {
  Guarded<T> query, key, value, cos, sin, keys, values, query_norm, key_norm, out;
  std::optional<Guarded<int64_t>> start;
  bool norms;

  explicit Tensors(const Problem& p)
      : query(normal<T>({p.rows, p.tokens, p.heads, p.d}, 1, p.padding, 2, p.offset)),
        key(normal<T>({p.rows, p.tokens, p.kv_heads, p.d}, 2, p.padding)),
        value(normal<T>({p.rows, p.tokens, p.kv_heads, p.d}, 3, p.padding)),
        cos(normal<T>({p.tables, p.tokens, p.d}, 4, p.padding)),
        sin(normal<T>({p.tables, p.tokens, p.d}, 5, p.padding)),
        keys(normal<T>({p.rows, p.capacity, p.kv_heads, p.d}, 6, p.padding)),
        values(normal<T>({p.rows, p.capacity, p.kv_heads, p.d}, 7, p.padding)),
        query_norm(normal<T>({p.d}, 8)),
        key_norm(normal<T>({p.d}, 9)),
        out({p.rows, p.heads, p.tokens, p.d}, p.padding),
        norms(p.norms) {
    if (p.start.empty()) return;
    start.emplace(std::vector<int64_t>{static_cast<int64_t>(p.start.size())});
    start->fill([&](int64_t i) { return p.start[static_cast<size_t>(i)]; });
  }

  void call(const auto& place) {
    RotaryCacheArgs args{};
    args.query = place(query);
    args.key = place(key);
    args.value = place(value);
    args.cos = place(cos);
    args.sin = place(sin);
    args.keys = place(keys);
    args.values = place(values);
    if (start) args.start = place(*start);
    if (norms) {
      args.query_norm = place(query_norm);
      args.key_norm = place(key_norm);
    }
    args.eps = 1e-6;
    args.out = place(out);
    rotary_cache(args);
  }
  void on_cpu() {
    call([](auto& tensor) { return tensor.view(); });
  }
  void on_device() {
    call([](auto& tensor) { return tensor.upload(); });
    device_synchronize();
  }
};

template <class T>
void expect_as_on_cpu(const Problem& p) {
  SCOPED_TRACE("head dimension " + std::to_string(p.d) + (p.norms ? ", normed" : ""));
  Tensors<T> expected(p);
  expected.on_cpu();
  Tensors<T> got(p);
  got.on_device();
  // A norm that rounds the other way moves the rotated values by a spacing of the larger half.
  const double spacings = sizeof(T) == 4 ? 16 : 1;
  const double absolute = sizeof(T) == 4 ? 1e-5 : p.norms ? spacing<T>(16.0) : spacing<T>(0.125);
  expect_near(got.out.download(), expected.out, spacings, absolute);
  expect_near(got.keys.download(), expected.keys, spacings, absolute);
  expect_equal(got.values.download(), expected.values);
}

TYPED_TEST(DeviceRotary, EveryHeadDimension) {
  // Scalar in a part of a warp and in a warp; 16-byte chunks on 4, 8, 16 and 32 threads, whole and with idle
  // ones; too wide for registers.
  for (const int64_t d : {2, 8, 16, 22, 32, 64, 72, 88, 96, 128, 130, 192, 256, 320, 512, 1040}) {
    for (const bool norms : {false, true}) {
      this->under_every_schedule([&] { expect_as_on_cpu<TypeParam>({2, 3, 3, 2, d, 5, 0, 0, 1, norms}); });
    }
  }
}

TYPED_TEST(DeviceRotary, StridesAndAlignment) {
  for (const int64_t d : {16, 64, 128}) {
    for (const int64_t padding : {1, 8}) {
      for (const int64_t offset : {0, 1}) {
        this->under_every_schedule(
            [&] { expect_as_on_cpu<TypeParam>({2, 5, 4, 1, d, 6, padding, offset, 2, true, {1, 0}}); });
      }
    }
  }
}

TYPED_TEST(DeviceRotary, MoreHeadsThanOneBlockHas) {
  for (const int64_t d : {8, 64, 128}) {
    expect_as_on_cpu<TypeParam>({3, 37, 12, 2, d, 40, 0, 0, 3, false, {0, 2, 3}});
    expect_as_on_cpu<TypeParam>({1, 1, 12, 2, d, 40, 0, 0, 1, true, {17}});
  }
}

TYPED_TEST(DeviceRotary, SlotsOutsideTheCacheAreNotWritten) {
  constexpr int64_t kFar = INT64_MAX;
  for (const int64_t d : {8, 64}) {
    for (const auto& start : std::vector<std::vector<int64_t>>{
             {-2, 3, 0}, {-4, 4, 5}, {kFar, -kFar - 1, 2}, {-1}, {3}, {kFar - 1}, {-kFar}}) {
      this->under_every_schedule(
          [&] { expect_as_on_cpu<TypeParam>({3, 4, 2, 2, d, 5, 3 * (d == 8), 0, 1, false, start}); });
    }
    expect_as_on_cpu<TypeParam>({3, 4, 2, 2, d, 0, 0, 0, 1, false, {0}});
  }
}

TYPED_TEST(DeviceRotary, QueriesOnlyAndKeysOnly) {
  expect_as_on_cpu<TypeParam>({2, 3, 4, 0, 64, 3});
  expect_as_on_cpu<TypeParam>({2, 3, 0, 2, 64, 3, 0, 0, 1, true});
  expect_as_on_cpu<TypeParam>({2, 0, 4, 2, 64, 3});
}

// The norm is the very one of rms_norm, bit for bit, at the usual head dimensions.
TYPED_TEST(DeviceRotary, NormsAreThoseOfRmsNorm) {
  for (const int64_t d : {32, 64, 128}) {
    const Problem p{2, 5, 3, 2, d, 5};
    Tensors<TypeParam> apart(p);
    Tensors<TypeParam> fused(p);
    fused.norms = true;
    fused.on_device();
    Guarded<TypeParam> query({p.rows, p.tokens, p.heads, d});
    Guarded<TypeParam> key({p.rows, p.tokens, p.kv_heads, d});
    const flashu_tensor normed_query = query.upload();
    const flashu_tensor normed_key = key.upload();
    rms_norm(apart.query.upload(), apart.query_norm.upload(), 1e-6, normed_query);
    rms_norm(apart.key.upload(), apart.key_norm.upload(), 1e-6, normed_key);
    device_synchronize();
    apart.query = query.download();
    apart.key = key.download();
    apart.on_device();
    expect_equal(fused.out.download(), apart.out.download());
    expect_equal(fused.keys.download(), apart.keys.download());
  }
}

}  // namespace
}  // namespace flashu::test
