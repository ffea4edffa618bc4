// Attention on the CPU against double around every edge of its blocking, bits that depend on nothing but what
// a query sees, masks, lengths, empty sizes, errors.
#include "flashu/attention.hpp"

#include <cmath>
#include <limits>

#include "guarded.hpp"

namespace flashu::test {
namespace {

template <class T>
class Attention : public ::testing::Test {};
using Storage = ::testing::Types<float, bfloat16, float16>;
TYPED_TEST_SUITE(Attention, Storage);

constexpr float kInfinity = std::numeric_limits<float>::infinity();

template <class T>
float lowest() {
  if constexpr (std::is_same_v<T, bfloat16>) return -0x1.fep127f;
  if constexpr (std::is_same_v<T, float16>) return -65504.0f;
  return -std::numeric_limits<float>::max();
}

struct Shape {
  int64_t rows, heads, kv_heads, n, tokens, d;
};

// Every tensor with a stride of its own. Rows of a Guarded are numbered in the order of its dimensions.
template <class T>
struct Operands {
  Shape s;
  Guarded<T> query, key, value, mask, out;
  std::vector<int64_t> lengths;

  explicit Operands(const Shape& shape)
      : s(shape),
        query({s.rows, s.heads, s.n, s.d}, 3),
        key({s.rows, s.kv_heads, s.tokens, s.d}, 5),
        value({s.rows, s.kv_heads, s.tokens, s.d}, 7),
        mask({s.rows, 1, s.n, s.tokens}, 9),
        out({s.rows, s.n, s.heads, s.d}, 11),
        lengths(static_cast<size_t>(s.rows), s.tokens) {
    query.real(1);
    key.real(2);
    value.real(3);
    // Query i sees a range of its own, with holes, or, every seventh, nothing but lowest numbers.
    mask.fill([&](int64_t at, int64_t token) {
      const int64_t i = at % s.n;
      const bool hidden = i % 7 == 3 || token < i * 5 % (s.tokens / 2 + 1) ||
                          token >= s.tokens - i * 11 % (s.tokens / 2 + 1) || (token * 7 + i) % 5 == 1;
      return hidden ? lowest<T>() : 0.25f * static_cast<float>((token + i) % 5);
    });
  }

  AttentionArgs args(bool masked) const {
    AttentionArgs args{};
    args.query = query;
    args.key = key;
    args.value = value;
    if (masked) args.mask = mask;
    args.out = out;
    args.lengths = tensor(lengths.data(), FLASHU_I64, {s.rows});
    return args;
  }

  float result(int64_t row, int64_t head, int64_t i, int64_t c) const {
    return out.value((row * s.n + i) * s.heads + head, c);
  }

  // One query, in double.
  std::vector<double> exact(int64_t row, int64_t head, int64_t i, bool masked) const {
    const int64_t length = lengths[static_cast<size_t>(row)];
    const int64_t first = (row * s.kv_heads + head / (s.heads / s.kv_heads)) * s.tokens;
    std::vector<double> scores;
    double most = -std::numeric_limits<double>::infinity();
    for (int64_t t = 0; t < length; ++t) {
      double score = 0;
      for (int64_t c = 0; c < s.d; ++c)
        score += static_cast<double>(query.value((row * s.heads + head) * s.n + i, c)) *
                 static_cast<double>(key.value(first + t, c));
      score /= std::sqrt(static_cast<double>(s.d));
      if (masked) {
        const float added = mask.value(row * s.n + i, t);
        score = added == lowest<T>() ? -1e300 : score + static_cast<double>(added);
      }
      scores.push_back(score);
      most = std::max(most, score);
    }
    std::vector<double> sums(static_cast<size_t>(s.d));
    double total = 0;
    for (int64_t t = 0; t < length; ++t) {
      const double weight = scores[static_cast<size_t>(t)] == -std::numeric_limits<double>::infinity()
                                ? 0
                                : std::exp(scores[static_cast<size_t>(t)] - most);
      total += weight;
      for (int64_t c = 0; c < s.d; ++c)
        sums[static_cast<size_t>(c)] += weight * static_cast<double>(value.value(first + t, c));
    }
    for (double& sum : sums) sum = total == 0 ? 0 : sum / total;
    return sums;
  }

  void expect_exact(bool masked) const {
    const double spacing = std::is_same_v<T, bfloat16>  ? 0x1p-8
                           : std::is_same_v<T, float16> ? 0x1p-11
                                                        : 0x1p-21;
    for (int64_t row = 0; row < s.rows; ++row) {
      for (int64_t head = 0; head < s.heads; ++head) {
        for (int64_t i = 0; i < s.n; ++i) {
          const std::vector<double> y = exact(row, head, i, masked);
          for (int64_t c = 0; c < s.d; ++c) {
            const double truth = y[static_cast<size_t>(c)];
            ASSERT_NEAR(static_cast<double>(result(row, head, i, c)), truth,
                        1.01 * spacing * std::fabs(truth) + 3e-6)
                << "row " << row << ", head " << head << ", query " << i << ", column " << c
                << (masked ? ", masked" : "");
          }
        }
      }
    }
    ASSERT_TRUE(out.intact());
  }
};

TYPED_TEST(Attention, IsThatOfDoubleAtEveryEdge) {
  const auto check = [](const Shape& s) {
    SCOPED_TRACE("[" + std::to_string(s.rows) + ", " + std::to_string(s.heads) + " of " +
                 std::to_string(s.kv_heads) + ", " + std::to_string(s.n) + "] x " + std::to_string(s.tokens) +
                 " x " + std::to_string(s.d));
    for (const int32_t count : {1, 3}) {
      const Threads threads(count);
      for (const bool masked : {false, true}) {
        Operands<TypeParam> o(s);
        if (s.rows > 1) o.lengths[1] = s.tokens / 3;
        attention(o.args(masked));
        o.expect_exact(masked);
      }
    }
  };
  for (const int64_t n : {1, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 65, 140}) check({1, 1, 1, n, 37, 9});
  for (const int64_t d : {1, 2, 4, 5, 6, 7, 11, 12, 13, 20, 31, 33, 72, 128}) check({1, 2, 1, 3, 20, d});
  for (const int64_t tokens : {1, 4, 11, 12, 13, 31, 33, 127, 128, 129, 255, 256, 257, 400})
    check({1, 3, 1, 7, tokens, 5});
  check({3, 6, 2, 20, 140, 24});
  check({2, 4, 4, 5, 70, 16});
  check({2, 2, 1, 3, 0, 8});
  check({0, 2, 1, 3, 5, 8});
  check({2, 2, 1, 0, 5, 8});
  check({2, 0, 1, 3, 5, 8});
  check({2, 2, 1, 3, 5, 0});
}

// The same query alone, with the keys up to the last one that it sees, has the same bits.
TYPED_TEST(Attention, AQueryHasTheSameBitsInAnyCompany) {
  for (const Shape& s : {Shape{2, 6, 2, 40, 300, 20}, Shape{1, 3, 3, 150, 140, 9}}) {
    for (const int32_t count : kThreadCounts) {
      const Threads threads(count);
      Operands<TypeParam> o(s);
      o.lengths[0] = s.tokens - 9;
      attention(o.args(true));
      for (int64_t row = 0; row < s.rows; ++row) {
        for (int64_t head = 0; head < s.heads; ++head) {
          for (int64_t i = 0; i < s.n; i += 1 + head) {
            const int64_t kv_head = head / (s.heads / s.kv_heads);
            int64_t end = o.lengths[static_cast<size_t>(row)];
            if (i % 7 != 3) {
              while (o.mask.value(row * s.n + i, end - 1) == lowest<TypeParam>()) --end;
            }
            Operands<TypeParam> alone(Shape{1, 1, 1, 1, end, s.d});
            alone.query.fill(
                [&](int64_t, int64_t c) { return o.query.value((row * s.heads + head) * s.n + i, c); });
            alone.key.fill([&](int64_t t, int64_t c) {
              return o.key.value((row * s.kv_heads + kv_head) * s.tokens + t, c);
            });
            alone.value.fill([&](int64_t t, int64_t c) {
              return o.value.value((row * s.kv_heads + kv_head) * s.tokens + t, c);
            });
            alone.mask.fill([&](int64_t, int64_t t) { return o.mask.value(row * s.n + i, t); });
            attention(alone.args(true));
            for (int64_t c = 0; c < s.d; ++c)
              ASSERT_EQ(alone.result(0, 0, 0, c), o.result(row, head, i, c))
                  << "row " << row << ", head " << head << ", query " << i << ", " << count << " threads";
          }
        }
      }
    }
  }
}

// Keys that are hidden, wherever they are, and those behind a length change no bit.
TYPED_TEST(Attention, WhatIsNotSeenCountsForNothing) {
  for (const float hidden : {lowest<TypeParam>(), -kInfinity}) {
    Operands<TypeParam> o(Shape{1, 2, 1, 3, 300, 12});
    o.lengths[0] = 290;
    const auto seen = [](int64_t t) { return t >= 130 && t != 140 && t < 280; };
    o.mask.fill([&](int64_t, int64_t t) { return seen(t) ? 0.5f : hidden; });
    attention(o.args(true));
    Operands<TypeParam> other(o.s);
    other.lengths = o.lengths;
    other.mask.fill([&](int64_t, int64_t t) { return seen(t) ? 0.5f : hidden; });
    const auto changed = [&](const Guarded<TypeParam>& from) {
      return [&](int64_t t, int64_t c) {
        return seen(t) ? from.value(t, c) : t < 290 ? 100.0f : std::nanf("");
      };
    };
    other.key.fill(changed(o.key));
    other.value.fill(changed(o.value));
    attention(other.args(true));
    ASSERT_TRUE(other.out.same(o.out));
    o.expect_exact(true);
  }
}

// Beside queries that see keys: they are in the same panel.
TYPED_TEST(Attention, AQueryThatSeesNothingGetsZeros) {
  Operands<TypeParam> o(Shape{1, 2, 1, 6, 200, 5});
  o.mask.fill([&](int64_t i, int64_t t) {
    return i == 2 ? -kInfinity : i == 4 ? (t < 150 ? lowest<TypeParam>() : -kInfinity) : 0.0f;
  });
  attention(o.args(true));
  o.expect_exact(true);
  for (int64_t c = 0; c < o.s.d; ++c) EXPECT_EQ(o.result(0, 1, 2, c), 0.0f);
}

TEST(AttentionMask, OneForAllRowsOrQueriesIsReadForEach) {
  Operands<float> o(Shape{2, 2, 1, 5, 40, 6});
  Guarded<float> shared({1, 1, 1, 40});
  shared.fill([](int64_t, int64_t t) { return t % 3 == 0 ? -kInfinity : 0.1f * static_cast<float>(t); });
  o.mask.fill([&](int64_t, int64_t t) { return shared.value(0, t); });
  attention(o.args(true));
  const Guarded<float> expected = o.out;
  for (const std::vector<int64_t>& sizes :
       {std::vector<int64_t>{1, 1, 1, 40}, {2, 1, 1, 40}, {1, 1, 5, 40}}) {
    Guarded<float> mask(sizes, 3);
    mask.fill([&](int64_t, int64_t t) { return shared.value(0, t); });
    AttentionArgs args = o.args(false);
    args.mask = mask;
    o.out.fill([](int64_t, int64_t) { return 7; });
    attention(args);
    EXPECT_TRUE(o.out.same(expected));
  }
}

TEST(AttentionErrors, AreNamedAndWriteNothing) {
  Operands<float> o(Shape{2, 4, 2, 3, 10, 8});
  o.out.fill([](int64_t, int64_t) { return 7; });
  const auto text = [&](auto change) {
    AttentionArgs args = o.args(true);
    change(args);
    return error_of([&] { attention(args); });
  };
  const auto expect = [&](const char* part, auto change) {
    const std::string said = text(change);
    EXPECT_NE(said.find(std::string("attention: ") + part), std::string::npos)
        << part << " is not in: " << said;
  };
  expect("query: expected float32", [](AttentionArgs& a) { a.query.dtype = FLASHU_I32; });
  expect("query: expected 4 dimensions", [](AttentionArgs& a) { a.query.ndim = 3; });
  expect("query: expected stride 1", [](AttentionArgs& a) { a.query.strides[3] = 2; });
  expect("key: expected 4 dimensions", [](AttentionArgs& a) { a.key.ndim = 3; });
  expect("key: expected float32", [](AttentionArgs& a) { a.key.dtype = FLASHU_BF16; });
  expect("key: expected size 2", [](AttentionArgs& a) { a.key.sizes[0] = 1; });
  expect("key: expected size 8", [](AttentionArgs& a) { a.key.sizes[3] = 7; });
  expect("key: expected a number of heads", [](AttentionArgs& a) { a.query.sizes[1] = 3; });
  expect("key: expected stride 1", [](AttentionArgs& a) { a.key.strides[3] = 2; });
  expect("value: expected", [](AttentionArgs& a) { a.value.sizes[2] -= 1; });
  expect("value: expected", [](AttentionArgs& a) { a.value.dtype = FLASHU_F16; });
  expect("value: expected stride 1", [](AttentionArgs& a) { a.value.strides[3] = 2; });
  expect("lengths: expected int64", [](AttentionArgs& a) { a.lengths.dtype = FLASHU_I32; });
  expect("lengths: expected 1 dimensions", [](AttentionArgs& a) { a.lengths.ndim = 2; });
  expect("lengths: expected size 2", [](AttentionArgs& a) { a.lengths.sizes[0] = 1; });
  expect("mask: expected float32", [](AttentionArgs& a) { a.mask.dtype = FLASHU_BF16; });
  expect("mask: expected 4 dimensions", [](AttentionArgs& a) { a.mask.ndim = 3; });
  expect("mask: expected shape [2 or 1, 1, 3 or 1, 10]", [](AttentionArgs& a) { a.mask.sizes[3] -= 1; });
  expect("mask: expected shape", [](AttentionArgs& a) { a.mask.sizes[2] = 2; });
  expect("mask: expected stride 1", [](AttentionArgs& a) { a.mask.strides[3] = 2; });
  expect("out: expected", [](AttentionArgs& a) { a.out.sizes[1] -= 1; });
  expect("out: expected", [](AttentionArgs& a) { a.out.dtype = FLASHU_BF16; });
  expect("out: expected", [](AttentionArgs& a) { a.out.strides[0] = 0; });
  for (const flashu_tensor AttentionArgs::* input :
       {&AttentionArgs::query, &AttentionArgs::key, &AttentionArgs::value, &AttentionArgs::mask})
    expect("out: expected", [&](AttentionArgs& a) { a.out.data = (a.*input).data; });
  for (const int64_t length : {-1, 11}) {
    o.lengths[1] = length;
    expect("lengths: expected 0 to 10 keys, got", [](AttentionArgs&) {});
  }
  o.lengths[1] = 10;
  alignas(64) static char small[64];
  expect("workspace: expected", [](AttentionArgs& a) {
    a.workspace = small;
    a.workspace_bytes = 64;
  });
  for (int64_t r = 0; r < o.out.rows(); ++r) {
    for (int64_t c = 0; c < o.out.width(); ++c) ASSERT_EQ(o.out.value(r, c), 7.0f);
  }
  EXPECT_EQ(text([](AttentionArgs&) {}), "");
}

}  // namespace
}  // namespace flashu::test
