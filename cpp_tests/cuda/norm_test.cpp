// The norm family on the device against the CPU: every width path, strided and misaligned rows, modulation.
#include "flashu/norm.hpp"

#include "cuda/support.hpp"

namespace flashu::test {
namespace {

template <class T>
class DeviceNorm : public DeviceTest {};
TYPED_TEST_SUITE(DeviceNorm, Storage3);

struct Shape {
  int64_t rows, width, padding, offset;
};
// Widths: scalar, part of a warp (32 to 128), a warp, blocks of 128 and 256; the last one too wide for
// registers.
constexpr Shape kShapes[] = {{1, 1, 0, 0},    {3, 7, 2, 0},    {37, 64, 0, 0},  {9, 64, 8, 0},
                             {6, 32, 0, 0},   {5, 128, 0, 0},  {4, 72, 0, 1},   {7, 256, 0, 0},
                             {3, 520, 0, 0},  {2, 1536, 8, 0}, {2, 2048, 0, 0}, {2, 2056, 0, 0},
                             {1, 4096, 0, 0}, {1, 8192, 0, 0}, {1, 8200, 0, 0}};

TYPED_TEST(DeviceNorm, RmsNorm) {
  for (const Shape& s : kShapes) {
    SCOPED_TRACE("width " + std::to_string(s.width));
    const auto x = normal<TypeParam>({s.rows, s.width}, 1, s.padding, 2, s.offset);
    const auto weight = normal<TypeParam>({s.width}, 2);
    Guarded<TypeParam> expected({s.rows, s.width}, s.padding);
    rms_norm(x, weight, 1e-6, expected);
    this->under_every_schedule([&] {
      auto in = x;
      auto w = weight;
      Guarded<TypeParam> out({s.rows, s.width}, s.padding);
      const flashu_tensor on_device = out.upload();
      rms_norm(in.upload(), w.upload(), 1e-6, on_device);
      device_synchronize();
      expect_near(out.download(), expected, sizeof(TypeParam) == 4 ? 8 : 1);
    });
  }
}

TYPED_TEST(DeviceNorm, AddRmsNorm) {
  for (const Shape& s : kShapes) {
    SCOPED_TRACE("width " + std::to_string(s.width));
    const auto x = normal<TypeParam>({s.rows, s.width}, 1, s.padding, 2, s.offset);
    const auto residual = normal<TypeParam>({s.rows, s.width}, 3, s.padding);
    const auto weight = normal<TypeParam>({s.width}, 2);
    auto expected_x = x;
    auto expected_sum = residual;
    add_rms_norm(expected_x, expected_sum, weight, 1e-5);
    this->under_every_schedule([&] {
      auto got_x = x;
      auto got_sum = residual;
      auto w = weight;
      add_rms_norm(got_x.upload(), got_sum.upload(), w.upload(), 1e-5);
      device_synchronize();
      expect_equal(got_sum.download(), expected_sum);
      expect_near(got_x.download(), expected_x, sizeof(TypeParam) == 4 ? 8 : 1);
    });
  }
}

// The norm is that of the sum as it is stored. Here every stored sum is 1, whose norm is the weight exactly;
// the sums before they were rounded are off by enough to give the weight's neighbours.
TYPED_TEST(DeviceNorm, NormOfTheStoredSum) {
  if (sizeof(TypeParam) == 4) GTEST_SKIP() << "a spacing of fp32 is lost in the norm's own rounding";
  const auto unit = static_cast<float>(spacing<TypeParam>(1));
  for (const Shape& s : {Shape{3, 64, 0, 0}, {2, 520, 0, 0}, {2, 1536, 0, 0}, {3, 72, 0, 1}, {2, 7, 2, 0}}) {
    SCOPED_TRACE("width " + std::to_string(s.width));
    this->under_every_schedule([&] {
      Guarded<TypeParam> x({s.rows, s.width}, s.padding, s.offset);
      Guarded<TypeParam> residual({s.rows, s.width}, s.padding);
      Guarded<TypeParam> weight({s.width});
      x.fill([&](int64_t i) { return from_float<TypeParam>((i % 2 == 0 ? 0.375f : -0.1875f) * unit); });
      residual.fill([](int64_t) { return from_float<TypeParam>(1.0f); });
      weight.fill([&](int64_t) { return from_float<TypeParam>(2 - unit); });
      add_rms_norm(x.upload(), residual.upload(), weight.upload(), 1e-7);
      device_synchronize();
      const auto sum = residual.download();
      const auto norm = x.download();
      for (int64_t i = 0; i < sum.count(); ++i) {
        ASSERT_EQ(to_float(sum[i]), 1.0f) << "element " << i;
        ASSERT_EQ(to_float(norm[i]), 2 - unit) << "element " << i;
      }
    });
  }
}

// Three batches of rows, none of them contiguous with the next, of every width path.
TYPED_TEST(DeviceNorm, EveryBatchHasItsModulation) {
  for (const auto& [tokens, width] : {std::array<int64_t, 2>{5, 5},
                                      {5, 32},
                                      {5, 64},
                                      {3, 128},
                                      {2, 512},
                                      {5, 640},
                                      {1, 2048},
                                      {1, 4096},
                                      {1, 8192}}) {
    const auto x = normal<TypeParam>({3, tokens, width}, 1, 8);
    const auto weight = normal<TypeParam>({width}, 2);
    const auto shift = normal<TypeParam>({3, width}, 3, 16);
    const auto scale = normal<TypeParam>({3, width}, 4);
    Guarded<TypeParam> expected({3, tokens, width}, 8);
    rms_norm(x, weight, 1e-6, expected, shift, scale);
    this->under_every_schedule([&] {
      auto in = x;
      auto w = weight;
      auto a = shift;
      auto b = scale;
      Guarded<TypeParam> out({3, tokens, width}, 8);
      const flashu_tensor on_device = out.upload();
      rms_norm(in.upload(), w.upload(), 1e-6, on_device, a.upload(), b.upload());
      device_synchronize();
      expect_near(out.download(), expected, sizeof(TypeParam) == 4 ? 16 : 2, 4e-6);
    });
  }
}

TYPED_TEST(DeviceNorm, GatedAndPlainResidual) {
  for (const int64_t width : {int64_t{5}, int64_t{64}, int64_t{640}}) {
    for (const bool gated : {false, true}) {
      const auto residual = normal<TypeParam>({3, 5, width}, 1, 8);
      const auto y = normal<TypeParam>({3, 5, width}, 7, 8);
      const auto gate = normal<TypeParam>({3, width}, 4, 16);
      auto expected = residual;
      gate_add(expected, y, gated ? flashu_tensor(gate) : flashu_tensor{});
      this->under_every_schedule([&] {
        auto sum = residual;
        auto more = y;
        auto g = gate;
        gate_add(sum.upload(), more.upload(), gated ? g.upload() : flashu_tensor{});
        device_synchronize();
        expect_near(sum.download(), expected, gated ? 1 : 0);
      });
    }
  }
}

}  // namespace
}  // namespace flashu::test
