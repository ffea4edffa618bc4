// The FFN through the C++ API, without torch: exact integers in every storage type, selections, row
// independence, workspace, errors.
#include "flashu/ffn.hpp"

#include <cmath>
#include <numeric>

#include "cpu/digits.hpp"
#include "support.hpp"

namespace flashu::test {
namespace {

template <class T>
class Ffn : public ::testing::Test {};
using Storage = ::testing::Types<float, bfloat16, float16>;
TYPED_TEST_SUITE(Ffn, Storage);

constexpr int64_t kHidden = 37;
constexpr int64_t kNeurons = 29;
constexpr int64_t kWidth = 19;

// out[r, c] = sum over the list of h[r, i] * w[c, list[i]] + residual, exact for small integers.
template <class T>
std::vector<float> down_reference(const Owned<T>& h, const Owned<T>& w, const std::vector<int64_t>& list,
                                  const Owned<T>& residual) {
  const int64_t rows = h.sizes[0];
  std::vector<float> out(static_cast<size_t>(rows * kWidth));
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < kWidth; ++c) {
      float sum = to_float(residual.data[r * kWidth + c]);
      for (size_t i = 0; i < list.size(); ++i) {
        sum += to_float(h.data[r * list.size() + i]) * to_float(w.data[c * kNeurons + list[i]]);
      }
      out[r * kWidth + c] = to_float(from_float<T>(sum));
    }
  }
  return out;
}

template <class T>
void expect_equal(const Owned<T>& got, const std::vector<float>& expected) {
  for (size_t i = 0; i < expected.size(); ++i)
    ASSERT_EQ(to_float(got.data[i]), expected[i]) << "element " << i;
}

// Bytes, and the same numbers in the storage type.
template <class T>
std::pair<Owned<int8_t>, Owned<T>> bytes(int64_t rows, int64_t width, uint32_t seed) {
  const auto numbers = integers<int32_t>({rows, width}, seed, 127);
  Owned<int8_t> small({rows, width});
  Owned<T> wide({rows, width});
  for (size_t i = 0; i < numbers.data.size(); ++i) {
    small.data[i] = static_cast<int8_t>(numbers.data[i]);
    wide.data[i] = from_float<T>(static_cast<float>(numbers.data[i]));
  }
  return {small, wide};
}

// With scales of 1 int8 weights give the bits that the same numbers give, sums having one order, unless bytes
// are multiplied as such (int8_test.cpp).
TYPED_TEST(Ffn, OfInt8WeightsHasTheBitsOfTheirNumbers) {
  if (cpu::uses_digits(dtype_of<TypeParam>(), 300)) GTEST_SKIP() << "other sums, in whole numbers";
  for (const int64_t hidden : {37, 64, 130, 300}) {
    const auto [gate8, gate] = bytes<TypeParam>(kNeurons, hidden, 1);
    const auto [up8, up] = bytes<TypeParam>(kNeurons, hidden, 2);
    const auto [down8, down] = bytes<TypeParam>(kWidth, kNeurons, 3);
    const Owned<float> one({kNeurons}, std::vector<float>(kNeurons, 1.0f));
    const Owned<float> one_down({kWidth}, std::vector<float>(kWidth, 1.0f));
    for (const int64_t rows : {1, 2, 13}) {
      Owned<TypeParam> x({rows, hidden});
      for (size_t i = 0; i < x.data.size(); ++i)
        x.data[i] = from_float<TypeParam>(1e-3f * std::sin(static_cast<float>(i)));
      Owned<TypeParam> got({rows, kWidth});
      Owned<TypeParam> expected({rows, kWidth});
      FfnArgs args{};
      args.x = x;
      args.w_gate = gate;
      args.w_up = up;
      args.w_down = down;
      args.out = expected;
      gathered_ffn(args);
      args.w_gate = gate8;
      args.w_up = up8;
      args.w_down = down8;
      args.gate_scale = one;
      args.up_scale = one;
      args.down_scale = one_down;
      args.out = got;
      gathered_ffn(args);
      for (size_t i = 0; i < got.data.size(); ++i)
        ASSERT_EQ(to_float(got.data[i]), to_float(expected.data[i]))
            << hidden << " " << rows << " element " << i;
    }
  }
}

TYPED_TEST(Ffn, DownIsExactOnIntegersForEverySelection) {
  const auto w = integers<TypeParam>({kWidth, kNeurons}, 1);
  for (const int64_t rows : {1, 2, 6, 7, 13, 40}) {
    const auto residual = integers<TypeParam>({rows, kWidth}, 3);
    Owned<int64_t> index({6}, {28, 3, 0, 17, 4, 9});
    const std::vector<int64_t> one = {5, 11};
    const std::vector<int64_t> several = {0, 2, 7, 1, 12, 9};
    const auto list_of = [](const std::vector<int64_t>& runs) {
      std::vector<int64_t> list;
      for (size_t i = 0; i < runs.size(); i += 2) {
        for (int64_t j = 0; j < runs[i + 1]; ++j) list.push_back(runs[i] + j);
      }
      return list;
    };
    std::vector<int64_t> all(kNeurons);
    std::iota(all.begin(), all.end(), 0);
    const std::vector<std::pair<flashu_selection, std::vector<int64_t>>> selections = {
        {select_all(), all},
        {select_runs(one), list_of(one)},
        {select_runs(several), list_of(several)},
        {select_index(index), index.data}};
    for (const auto& [selection, list] : selections) {
      const auto h = integers<TypeParam>({rows, static_cast<int64_t>(list.size())}, 2);
      Owned<TypeParam> out({rows, kWidth});
      DownArgs args{};
      args.h = h;
      args.w_down = w;
      args.selection = selection;
      args.residual = residual;
      args.out = out;
      gathered_down(args);
      expect_equal(out, down_reference(h, w, list, residual));
    }
  }
}

TYPED_TEST(Ffn, RowsDoNotDependOnEachOther) {
  const auto x = integers<TypeParam>({9, kHidden}, 1);
  auto gate = integers<TypeParam>({kNeurons, kHidden}, 2);
  const auto up = integers<TypeParam>({kNeurons, kHidden}, 3);
  const auto down = integers<TypeParam>({kWidth, kNeurons}, 4);
  for (auto& value : gate.data) value = from_float<TypeParam>(to_float(value) * 0.013f);
  Owned<TypeParam> together({9, kWidth});
  FfnArgs args{};
  args.x = x;
  args.w_gate = gate;
  args.w_up = up;
  args.w_down = down;
  args.out = together;
  gathered_ffn(args);
  for (int64_t r = 0; r < 9; ++r) {
    Owned<TypeParam> alone({1, kWidth});
    args.x = tensor(x.data.data() + r * kHidden, dtype_of<TypeParam>(), {1, kHidden});
    args.out = alone;
    gathered_ffn(args);
    for (int64_t c = 0; c < kWidth; ++c) {
      const float whole = to_float(together.data[r * kWidth + c]);
      ASSERT_TRUE(std::isfinite(whole));
      ASSERT_EQ(to_float(alone.data[c]), whole) << "row " << r << ", column " << c;
    }
  }
}

TEST(FfnErrors, AreNamedAndWriteNothing) {
  const auto x = integers<float>({2, kHidden}, 1);
  const auto gate = integers<float>({kNeurons, kHidden}, 2);
  const auto down = integers<float>({kWidth, kNeurons}, 4);
  Owned<float> out({2, kWidth}, std::vector<float>(2 * kWidth, 7.0f));
  FfnArgs good{};
  good.x = x;
  good.w_gate = gate;
  good.w_up = gate;
  good.w_down = down;
  good.out = out;

  const auto text = [&](auto change) {
    FfnArgs args = good;
    change(args);
    return error_of([&] { gathered_ffn(args); });
  };
  const std::vector<int64_t> overlapping = {0, 4, 3, 2};
  const std::vector<int64_t> outside = {20, 10};
  const Owned<int64_t> twice({2}, {3, 3});
  EXPECT_NE(text([&](FfnArgs& a) { a.selection = select_runs(overlapping); }).find("runs"),
            std::string::npos);
  EXPECT_NE(text([&](FfnArgs& a) { a.selection = select_runs(outside); }).find("runs"), std::string::npos);
  EXPECT_NE(text([&](FfnArgs& a) { a.selection = select_index(twice); }).find("index"), std::string::npos);
  EXPECT_NE(text([&](FfnArgs& a) { a.w_up.sizes[0] -= 1; }).find("w_up"), std::string::npos);
  EXPECT_NE(text([&](FfnArgs& a) { a.x.dtype = FLASHU_F16; }).find("expected"), std::string::npos);
  EXPECT_NE(text([&](FfnArgs& a) { a.out.data = x.view().data; }).find("out"), std::string::npos);
  alignas(64) static char small[64];
  EXPECT_NE(text([&](FfnArgs& a) {
              a.workspace = small;
              a.workspace_bytes = 64;
            }).find("workspace"),
            std::string::npos);
  for (const float value : out.data) EXPECT_EQ(value, 7.0f);
  EXPECT_EQ(text([](FfnArgs&) {}), "");
}

}  // namespace
}  // namespace flashu::test
