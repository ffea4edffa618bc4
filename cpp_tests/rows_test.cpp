// The norm, routing and step families through the C++ API, without torch.
#include <cmath>
#include <limits>

#include "flashu/norm.hpp"
#include "flashu/routing.hpp"
#include "flashu/step.hpp"
#include "support.hpp"

namespace flashu::test {
namespace {

template <class T>
class Rows : public ::testing::Test {};
using Storage = ::testing::Types<float, bfloat16, float16>;
TYPED_TEST_SUITE(Rows, Storage);

TYPED_TEST(Rows, AddRmsNorm) {
  // Rows of equal magnitude: the mean square is exact, and so is everything after it.
  Owned<TypeParam> x({2, 4}), residual({2, 4}), weight({4});
  for (int i = 0; i < 8; ++i) {
    x.data[i] = from_float<TypeParam>(1.0f);
    residual.data[i] = from_float<TypeParam>(i % 2 ? -3.0f : 1.0f);
  }
  for (int i = 0; i < 4; ++i) weight.data[i] = from_float<TypeParam>(static_cast<float>(i));
  add_rms_norm(x, residual, weight, 0.0);
  for (int i = 0; i < 8; ++i) {
    EXPECT_EQ(to_float(residual.data[i]), i % 2 ? -2.0f : 2.0f);
    EXPECT_EQ(to_float(x.data[i]), (i % 2 ? -1.0f : 1.0f) * static_cast<float>(i % 4));
  }
}

TYPED_TEST(Rows, EveryBatchHasItsModulation) {
  Owned<TypeParam> x({2, 3, 2}), weight({2}), out({2, 3, 2});
  for (auto& value : x.data) value = from_float<TypeParam>(2.0f);
  for (auto& value : weight.data) value = from_float<TypeParam>(1.0f);
  Owned<TypeParam> shift({2, 2}), scale({2, 2});
  for (int i = 0; i < 4; ++i) {
    shift.data[i] = from_float<TypeParam>(i < 2 ? 0.5f : -1.0f);
    scale.data[i] = from_float<TypeParam>(i < 2 ? 3.0f : 0.0f);
  }
  rms_norm(x, weight, 0.0, out, shift, scale);
  for (int i = 0; i < 12; ++i) EXPECT_EQ(to_float(out.data[i]), i < 6 ? 4.5f : 0.0f) << i;
  gate_add(x, out, scale);
  for (int i = 0; i < 12; ++i) EXPECT_EQ(to_float(x.data[i]), i < 6 ? 2.0f + 3.0f * 4.5f : 2.0f) << i;
  for (auto& value : x.data) value = from_float<TypeParam>(1.0f);
  gate_add(x, out);
  for (int i = 0; i < 12; ++i) EXPECT_EQ(to_float(x.data[i]), i < 6 ? 5.5f : 1.0f) << i;
}

TYPED_TEST(Rows, ModulationOfAnotherShapeIsRefusedByName) {
  Owned<TypeParam> x({2, 3, 2}), weight({2}), out({2, 3, 2}), two({2, 2}), one({1, 2}), flat({6, 2}),
      flat_out({6, 2});
  const flashu_tensor none{};
  const auto norm = [&](const flashu_tensor& shift, const flashu_tensor& scale) {
    return error_of([&] { rms_norm(x, weight, 0.0, out, shift, scale); });
  };
  EXPECT_EQ(norm(two, two), "");
  EXPECT_EQ(norm(two, none), "rms_norm: scale: expected a tensor, because shift is given, got none");
  EXPECT_EQ(norm(none, two), "rms_norm: shift: expected a tensor, because scale is given, got none");
  EXPECT_EQ(norm(one, two), "rms_norm: shift: expected size 2 in dimension 0, got 1 (shape [1, 2])");
  EXPECT_EQ(norm(two, one), "rms_norm: scale: expected size 2 in dimension 0, got 1 (shape [1, 2])");
  EXPECT_EQ(error_of([&] { rms_norm(flat, weight, 0.0, flat_out, two, two); }),
            "rms_norm: x: expected 3 dimensions, got 2 (shape [6, 2])");
  EXPECT_EQ(error_of([&] { gate_add(x, out, one); }),
            "gate_add_: gate: expected size 2 in dimension 0, got 1 (shape [1, 2])");
}

TYPED_TEST(Rows, HeadsAreRotatedByAQuarterIntoTheirSlots) {
  // Rotated by 90 degrees (a, b) is (-b, a); in the norm of (3, 3) and a weight of 2 both are 2.
  Owned<TypeParam> query({1, 2, 1, 2}), cos({1, 2, 2}), sin({1, 2, 2}), weight({2});
  Owned<TypeParam> keys({1, 3, 1, 2}), values({1, 3, 1, 2}), out({1, 1, 2, 2});
  for (int i = 0; i < 4; ++i) {
    query.data[i] = from_float<TypeParam>(3.0f);
    cos.data[i] = from_float<TypeParam>(0.0f);
    sin.data[i] = from_float<TypeParam>(1.0f);
  }
  for (auto& value : weight.data) value = from_float<TypeParam>(2.0f);
  for (auto& value : keys.data) value = from_float<TypeParam>(7.0f);
  const Owned<int64_t> start({1}, {2});
  RotaryCacheArgs args{};
  args.query = query;
  args.key = query;
  args.value = query;
  args.cos = cos;
  args.sin = sin;
  args.keys = keys;
  args.values = values;
  args.start = start;
  args.query_norm = weight;
  args.key_norm = weight;
  args.out = out;
  rotary_cache(args);
  const float rotated[] = {-2, 2};
  for (int i = 0; i < 4; ++i) EXPECT_EQ(to_float(out.data[i]), rotated[i % 2]) << i;
  // Token 0 has slot 2, token 1 has none.
  for (int i = 0; i < 6; ++i) {
    EXPECT_EQ(to_float(keys.data[i]), i < 4 ? 7.0f : rotated[i % 2]) << i;
    EXPECT_EQ(to_float(values.data[i]), i < 4 ? 0.0f : 3.0f) << i;
  }
  args.key_norm = {};
  EXPECT_NE(error_of([&] { rotary_cache(args); }).find("key_norm: expected a weight"), std::string::npos);
  args.query_norm = {};
  args.out = query;
  EXPECT_NE(error_of([&] { rotary_cache(args); }).find("out"), std::string::npos);
}

TYPED_TEST(Rows, TopKKeepsOrderAndBreaksTiesLow) {
  Owned<TypeParam> scores({1, 6});
  const float values[] = {1, 3, -2, 3, 3, 0};
  for (int i = 0; i < 6; ++i) scores.data[i] = from_float<TypeParam>(values[i]);
  Owned<int64_t> index({1, 3});
  Owned<int32_t> count({1});
  select_topk(scores, 3, index, count);
  EXPECT_EQ(index.data, (std::vector<int64_t>{1, 3, 4}));
  EXPECT_EQ(count.data[0], 3);
  Owned<int64_t> two({1, 2});
  select_topk(scores, 2, two, count);
  EXPECT_EQ(two.data, (std::vector<int64_t>{1, 3}));
  select_threshold(scores, 1.0, two, count);
  EXPECT_EQ(two.data, (std::vector<int64_t>{0, 1}));
  EXPECT_EQ(count.data[0], 4);
  scores.data[2] = from_float<TypeParam>(std::numeric_limits<float>::quiet_NaN());
  EXPECT_NE(error_of([&] { select_topk(scores, 2, two, count); }).find("NaN at row 0, token 2"),
            std::string::npos);
}

TYPED_TEST(Rows, MovesSkipPaddingAndKeepTheOrderOfRepeats) {
  auto rows = integers<TypeParam>({4, 3}, 5);
  const auto before = rows.data;
  const Owned<int32_t> index({3}, {2, -1, 2});
  Owned<TypeParam> moved({3, 3});
  gather_rows(rows, index, moved);
  for (int j = 0; j < 3; ++j) {
    EXPECT_EQ(to_float(moved.data[j]), to_float(before[6 + j]));
    EXPECT_EQ(to_float(moved.data[3 + j]), 0.0f);
  }
  for (auto& value : moved.data) value = from_float<TypeParam>(1.0f);
  scatter_add_rows(rows, index, moved);
  for (int j = 0; j < 3; ++j) EXPECT_EQ(to_float(rows.data[6 + j]), to_float(before[6 + j]) + 2.0f);
  moved.data[6] = from_float<TypeParam>(5.0f);
  scatter_rows(rows, index, moved);
  EXPECT_EQ(to_float(rows.data[6]), 5.0f);
  EXPECT_EQ(to_float(rows.data[0]), to_float(before[0]));
  const Owned<int32_t> outside({3}, {0, 1, 4});
  EXPECT_NE(error_of([&] { gather_rows(rows, outside, moved); }).find("index"), std::string::npos);
}

TYPED_TEST(Rows, Scores) {
  const auto a = integers<TypeParam>({3, 5}, 7);
  Owned<float> none({3}), mean(std::vector<int64_t>{});
  cosine_importance(a, a, FLASHU_REDUCE_NONE, none);
  for (const float value : none.data) EXPECT_NEAR(value, 0.0f, 1e-6);
  cosine_importance(a, a, FLASHU_REDUCE_MEAN, mean);
  EXPECT_NEAR(mean.data[0], 0.0f, 1e-6);
  Owned<TypeParam> v({1, 2, 1, 2});
  const float values[] = {1, 2, 2, 4};
  for (int i = 0; i < 4; ++i) v.data[i] = from_float<TypeParam>(values[i]);
  Owned<float> norms({1, 1});
  value_norms(v, norms);
  EXPECT_EQ(norms.data[0], 5.0f);
}

TYPED_TEST(Rows, EulerStepReadsItsTables) {
  Owned<TypeParam> latents({1, 2, 1, 2}), v({2, 1, 4}), velocity({1, 2, 1, 2});
  for (int i = 0; i < 8; ++i) v.data[i] = from_float<TypeParam>(static_cast<float>(i));
  const Owned<float> s({2}, {9, 2}), dt({2}, {9, 0.5f});
  Owned<int64_t> step(std::vector<int64_t>{}, {1});
  EulerStepArgs args{};
  args.latents = latents;
  args.v = v;
  args.s = s;
  args.dt = dt;
  args.step = step;
  args.velocity = velocity;
  guided_euler_step(args);
  // Conditional i, unconditional i + 4: v = i + 4 + 2 * (i - (i + 4)) = i - 4, laid out [position, channel].
  const float expected[] = {-4, -2, -3, -1};
  for (int i = 0; i < 4; ++i) {
    EXPECT_EQ(to_float(velocity.data[i]), expected[i]);
    EXPECT_EQ(to_float(latents.data[i]), 0.5f * expected[i]);
  }
  step.data[0] = 2;
  EXPECT_NE(error_of([&] { guided_euler_step(args); }).find("step"), std::string::npos);
}

TYPED_TEST(Rows, TaylorExtrapolatesParabolas) {
  // t^2 at t = 0, 2, 4: order 2 is exact at every later time only for equal intervals, with backward
  // differences.
  Owned<TypeParam> state({3, 1}), feature({1}), out({1});
  const float values[] = {0, 4, 16};
  for (int i = 0; i < 3; ++i) {
    feature.data[0] = from_float<TypeParam>(values[i]);
    taylor_update(state, feature, 2.0, i);
  }
  EXPECT_EQ(to_float(state.data[1]), 6.0f);
  EXPECT_EQ(to_float(state.data[2]), 2.0f);
  taylor_predict(state, 2.0, 3, out);
  EXPECT_EQ(to_float(out.data[0]), 16.0f + 12.0f + 4.0f);
  EXPECT_NE(error_of([&] { taylor_predict(state, 2.0, 0, out); }).find("count"), std::string::npos);
  Owned<float> delta({3});
  feature_delta(state, state, delta);
  EXPECT_EQ(delta.data[0], 0.0f);
  EXPECT_EQ(delta.data[1], 0.0f);
  EXPECT_NEAR(delta.data[2], 1.0f, 1e-6);
}

}  // namespace
}  // namespace flashu::test
