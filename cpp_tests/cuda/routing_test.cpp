// The routing family on the device against the CPU: scores, order-preserving selection with ties, row moves
// with padding and repeated rows.
#include "flashu/routing.hpp"

#include <limits>

#include "cuda/support.hpp"

namespace flashu::test {
namespace {

template <class T>
class DeviceRouting : public DeviceTest {};
TYPED_TEST_SUITE(DeviceRouting, Storage3);

TYPED_TEST(DeviceRouting, CosineImportance) {
  for (const auto& [batch, tokens, width, padding] :
       {std::array<int64_t, 4>{2, 3, 7, 0}, {1, 9, 64, 8}, {3, 5, 520, 0}, {2, 4, 33, 3}}) {
    // Rows fold into one stride only without padding between batches; padding is behind every row here.
    auto in = normal<TypeParam>({batch, tokens, width}, 1, padding);
    auto out = normal<TypeParam>({batch, tokens, width}, 2);
    in[0] = from_float<TypeParam>(0.0f);
    for (const flashu_reduce reduce : {FLASHU_REDUCE_NONE, FLASHU_REDUCE_MEAN, FLASHU_REDUCE_LAST}) {
      const std::vector<int64_t> shape = reduce == FLASHU_REDUCE_NONE   ? std::vector<int64_t>{batch, tokens}
                                         : reduce == FLASHU_REDUCE_LAST ? std::vector<int64_t>{batch}
                                                                        : std::vector<int64_t>{};
      Guarded<float> expected(shape);
      cosine_importance(in, out, reduce, expected);
      this->under_every_schedule([&] {
        Guarded<float> got(shape);
        auto args = make_args<flashu_cosine_importance_args>();
        args.reduce = reduce;
        args.x_in = in.upload();
        args.x_out = out.upload();
        args.out = got.upload();
        uint64_t bytes = 0;
        check(flashu_cosine_importance_workspace(&args, &bytes));
        const DeviceWorkspace workspace(bytes);
        cosine_importance(args.x_in, args.x_out, reduce, args.out, workspace.get());
        device_synchronize();
        expect_near(got.download(), expected, 0, 1e-6);
      });
    }
  }
}

TYPED_TEST(DeviceRouting, ValueNorms) {
  for (const auto& [heads, tokens, width] : {std::array<int64_t, 3>{1, 3, 5}, {2, 9, 64}, {4, 5, 128}}) {
    auto v = normal<TypeParam>({2, heads, tokens, width}, 1, 8);
    Guarded<float> expected({2, tokens});
    value_norms(v, expected);
    this->under_every_schedule([&] {
      Guarded<float> out({2, tokens});
      const flashu_tensor result = out.upload();
      value_norms(v.upload(), result);
      device_synchronize();
      expect_near(out.download(), expected, 8);
    });
  }
}

// Scores with many ties, infinities and both zeros.
template <class T>
Guarded<T> scores_with_ties(int64_t rows, int64_t tokens, uint32_t seed) {
  auto scores = whole<T>({rows, tokens}, seed, 3, 4);
  for (int64_t r = 0; r < rows; ++r) {
    if (tokens < 5) continue;
    scores[r * tokens + 1] = from_float<T>(-0.0f);
    scores[r * tokens + 2] = from_float<T>(std::numeric_limits<float>::infinity());
    scores[r * tokens + 3] = from_float<T>(-std::numeric_limits<float>::infinity());
  }
  return scores;
}

TYPED_TEST(DeviceRouting, TopkKeepsOrderAndLowestTies) {
  for (const auto& [rows, tokens] : {std::array<int64_t, 2>{1, 1}, {3, 37}, {2, 1500}}) {
    auto scores = scores_with_ties<TypeParam>(rows, tokens, 1);
    for (const int64_t k : {int64_t{0}, int64_t{1}, tokens / 3, tokens}) {
      Guarded<int64_t> expected({rows, k});
      Guarded<int32_t> expected_count({rows});
      select_topk(scores, k, expected, expected_count);
      this->under_every_schedule([&] {
        Guarded<int64_t> index({rows, k});
        Guarded<int32_t> count({rows});
        const flashu_tensor i = index.upload();
        const flashu_tensor c = count.upload();
        select_topk(scores.upload(), k, i, c);
        device_synchronize();
        expect_equal(index.download(), expected);
        expect_equal(count.download(), expected_count);
      });
    }
  }
}

TYPED_TEST(DeviceRouting, NanIsSmallerThanEveryNumber) {
  Guarded<TypeParam> scores({1, 6});
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const float values[] = {nan, -5, nan, 2, -std::numeric_limits<float>::infinity(), nan};
  for (int i = 0; i < 6; ++i) scores[i] = from_float<TypeParam>(values[i]);
  Guarded<int64_t> index({1, 4});
  Guarded<int32_t> count({1});
  const flashu_tensor i = index.upload();
  const flashu_tensor c = count.upload();
  select_topk(scores.upload(), 4, i, c);
  device_synchronize();
  const auto got = index.download();
  const int64_t expected[] = {0, 1, 3, 4};
  for (int j = 0; j < 4; ++j) EXPECT_EQ(got[j], expected[j]);
  Guarded<int64_t> passed({1, 4});
  const flashu_tensor p = passed.upload();
  select_threshold(scores.upload(), -5.0, p, c);
  device_synchronize();
  EXPECT_EQ(count.download()[0], 2);
}

TYPED_TEST(DeviceRouting, ThresholdFillsUpToItsCapacity) {
  for (const auto& [rows, tokens] : {std::array<int64_t, 2>{1, 1}, {3, 37}, {1, 2100}}) {
    auto scores = scores_with_ties<TypeParam>(rows, tokens, 5);
    for (const int64_t capacity : {int64_t{0}, tokens / 2, tokens + 3}) {
      for (const double threshold : {-100.0, 0.0, 2.0, 100.0}) {
        Guarded<int64_t> expected({rows, capacity});
        Guarded<int32_t> expected_count({rows});
        select_threshold(scores, threshold, expected, expected_count);
        Guarded<int64_t> index({rows, capacity});
        Guarded<int32_t> count({rows});
        const flashu_tensor i = index.upload();
        const flashu_tensor c = count.upload();
        select_threshold(scores.upload(), threshold, i, c);
        device_synchronize();
        expect_equal(index.download(), expected);
        expect_equal(count.download(), expected_count);
      }
    }
  }
}

template <class T, class I>
void move_everything_by(const std::vector<int64_t>& sequence, int64_t width, int64_t padding) {
  const auto n = static_cast<int64_t>(sequence.size());
  Guarded<I> index({2, n}, 1);
  for (int64_t b = 0; b < 2; ++b) {
    for (int64_t e = 0; e < n; ++e) {
      const int64_t row = sequence[static_cast<size_t>(b == 0 ? e : n - 1 - e)];
      index[b * n + e] = static_cast<I>(row);
    }
  }
  const auto rows = normal<T>({2, 9, width}, 1, padding);
  const auto moved = normal<T>({2, n, width}, 2, padding);
  for (const uint64_t schedule : schedules()) {
    use_schedule(schedule);
    Guarded<T> gathered({2, n, width}, padding);
    Guarded<T> expected_gathered({2, n, width}, padding);
    auto long_side = rows;
    auto i = index;
    const flashu_tensor to = gathered.upload();
    gather_rows(long_side.upload(), i.upload(), to);
    gather_rows(rows, index, expected_gathered);
    device_synchronize();
    expect_equal(gathered.download(), expected_gathered);

    auto scattered = rows;
    auto expected = rows;
    auto short_side = moved;
    scatter_rows(scattered.upload(), i.upload(), short_side.upload());
    scatter_rows(expected, index, moved);
    device_synchronize();
    expect_equal(scattered.download(), expected);

    auto added = rows;
    expected = rows;
    scatter_add_rows(added.upload(), i.upload(), short_side.upload());
    scatter_add_rows(expected, index, moved);
    device_synchronize();
    expect_equal(added.download(), expected);
  }
}

template <class T>
class DeviceMovesOf : public DeviceTest {};
TYPED_TEST_SUITE(DeviceMovesOf, Storage3);
TYPED_TEST(DeviceMovesOf, RowsByIndexWithPaddingAndRepeats) {
  const std::vector<int64_t> distinct = {8, 0, 3};
  const std::vector<int64_t> repeated = {3, -1, 3, 5, 3, 0, 5, -1, 3};
  std::vector<int64_t> many;
  for (int i = 0; i < 70; ++i) many.push_back(i % 9 - (i % 5 == 0));
  for (const auto& sequence : {distinct, repeated, many, {}}) {
    for (const auto& [width, padding] : {std::array<int64_t, 2>{5, 0}, {64, 8}, {264, 0}, {0, 0}}) {
      move_everything_by<TypeParam, int32_t>(sequence, width, padding);
      move_everything_by<TypeParam, int64_t>(sequence, width, padding);
    }
  }
}

class DeviceMoves : public DeviceTest {};
TEST_F(DeviceMoves, RowsThatDoNotExistAreLeftOut) {
  auto rows = normal<float>({4, 8}, 1);
  Guarded<int32_t> index({3});
  index[0] = 2;
  index[1] = 4;
  index[2] = -7;
  Guarded<float> moved({3, 8});
  const flashu_tensor to = moved.upload();
  gather_rows(rows.upload(), index.upload(), to);
  device_synchronize();
  const auto got = moved.download();
  for (int64_t j = 0; j < 8; ++j) {
    EXPECT_EQ(got[j], rows[16 + j]);
    EXPECT_EQ(got[8 + j], 0);
    EXPECT_EQ(got[16 + j], 0);
  }
}

}  // namespace
}  // namespace flashu::test
