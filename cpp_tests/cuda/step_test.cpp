// The step family on the device against the CPU.
#include "flashu/step.hpp"

#include "cuda/support.hpp"

namespace flashu::test {
namespace {

template <class T>
class DeviceStep : public DeviceTest {
 protected:
  // V: the type of the model's output.
  template <class V>
  void euler_steps() {
    struct Case {
      int64_t images, channels, height, width;
      bool guided, velocity;
    };
    for (const Case& c :
         {Case{1, 16, 6, 6, true, false}, Case{2, 3, 5, 13, true, true}, Case{1, 17, 9, 9, false, true}}) {
      const int64_t positions = c.height * c.width;
      const auto latents = normal<T>({c.images, c.channels, c.height, c.width}, 1);
      auto v = normal<V>({c.images * (c.guided ? 2 : 1), positions, c.channels}, 2);
      auto s = normal<float>({4}, 3);
      auto dt = normal<float>({4}, 4);
      Guarded<int64_t> step({1});
      step[0] = 2;
      auto expected = latents;
      Guarded<T> expected_velocity({c.images, c.channels, c.height, c.width});
      EulerStepArgs args{};
      args.latents = expected;
      args.v = v;
      args.s = s;
      args.dt = dt;
      args.step = step;
      if (c.velocity) args.velocity = expected_velocity;
      guided_euler_step(args);
      this->under_every_schedule([&] {
        auto got = latents;
        Guarded<T> velocity({c.images, c.channels, c.height, c.width});
        EulerStepArgs on_device{};
        on_device.latents = got.upload();
        on_device.v = v.upload();
        on_device.s = s.upload();
        on_device.dt = dt.upload();
        on_device.step = step.upload();
        if (c.velocity) on_device.velocity = velocity.upload();
        guided_euler_step(on_device);
        device_synchronize();
        expect_near(got.download(), expected, 1);
        if (c.velocity) expect_near(velocity.download(), expected_velocity, 1);
      });
      // A step that the tables do not have changes nothing; the host could not see it.
      auto got = latents;
      step[0] = 4;
      EulerStepArgs outside{};
      outside.latents = got.upload();
      outside.v = v.upload();
      outside.s = s.upload();
      outside.dt = dt.upload();
      outside.step = step.upload();
      guided_euler_step(outside);
      device_synchronize();
      expect_equal(got.download(), latents);
    }
  }
};
TYPED_TEST_SUITE(DeviceStep, Storage3);

TYPED_TEST(DeviceStep, EulerWithAndWithoutGuidance) {
  this->template euler_steps<float>();
  this->template euler_steps<bfloat16>();
  this->template euler_steps<float16>();
}

TYPED_TEST(DeviceStep, FeatureDelta) {
  for (const auto& [rows, width, padding] :
       {std::array<int64_t, 3>{3, 7, 1}, {5, 64, 8}, {33, 256, 0}, {0, 8, 0}, {2, 0, 0}}) {
    auto a = normal<TypeParam>({rows, width}, 1, padding);
    auto b = normal<TypeParam>({rows, width}, 2);
    Guarded<float> expected({3});
    feature_delta(a, b, expected);
    this->under_every_schedule([&] {
      Guarded<float> out({3});
      const flashu_tensor left = a.upload();
      const flashu_tensor right = b.upload();
      const flashu_tensor result = out.upload();
      auto args = make_args<flashu_feature_delta_args>();
      args.a = left;
      args.b = right;
      args.out = result;
      uint64_t bytes = 0;
      check(flashu_feature_delta_workspace(&args, &bytes));
      const DeviceWorkspace workspace(bytes);
      feature_delta(left, right, result, workspace.get());
      device_synchronize();
      expect_near(out.download(), expected, 16);
      EXPECT_NE(error_of([&] { feature_delta(left, right, result); }).find("workspace"), std::string::npos);
    });
  }
}

TYPED_TEST(DeviceStep, DifferencesAndExtrapolation) {
  for (const int64_t n : {int64_t{7}, int64_t{64}, int64_t{1000}}) {
    for (const int64_t order : {0, 1, 2, 8}) {
      const auto state = normal<TypeParam>({order + 1, n}, 1);
      auto expected = state;
      auto got = state;
      Guarded<TypeParam> expected_out({n});
      got.upload();
      for (int64_t count = 0; count < order + 2; ++count) {
        auto feature = normal<TypeParam>({n}, static_cast<uint32_t>(10 + count));
        taylor_update(expected, feature, 2.0, count);
        taylor_predict(expected, 1.5, count + 1, expected_out);
        auto next = got;
        Guarded<TypeParam> out({n});
        const flashu_tensor on_device = next.upload();
        taylor_update(on_device, feature.upload(), 2.0, count);
        const flashu_tensor result = out.upload();
        taylor_predict(on_device, 1.5, count + 1, result);
        device_synchronize();
        got = next.download();
        expect_near(got, expected, 1);
        expect_near(out.download(), expected_out, 2, 4e-6);
        got = expected;  // so that one rounding does not become two
      }
    }
  }
}

}  // namespace
}  // namespace flashu::test
