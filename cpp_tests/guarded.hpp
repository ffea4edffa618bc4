// Tensors between red zones with padded rows, numbers that are exact in every order of summing, and threads
// that are only pretended.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>

#include "support.hpp"

namespace flashu::test {

// A tensor seen as rows, in memory that is all ones around it (NaN, or -1): between its rows, between its
// elements where they are `inner` apart, and before and behind it. Dimensions of one have odd strides.
template <class T>
class Guarded {
 public:
  explicit Guarded(std::vector<int64_t> shape, int64_t padding = 0, int64_t inner = 1)
      : shape_(std::move(shape)), inner_(inner) {
    width_ = shape_.empty() ? 1 : shape_.back();
    rows_ = 1;
    for (size_t d = 0; d + 1 < shape_.size(); ++d) rows_ *= shape_[d];
    stride_ = width_ * inner_ + padding;
    memory_.resize(static_cast<size_t>(2 * kZone + kOffset + rows_ * stride_));
    std::memset(memory_.data(), 0xff, memory_.size() * sizeof(T));
  }

  int64_t rows() const { return rows_; }
  int64_t width() const { return width_; }
  T& operator()(int64_t row, int64_t column) { return memory_[at(row, column)]; }
  const T& operator()(int64_t row, int64_t column) const { return memory_[at(row, column)]; }
  float value(int64_t row, int64_t column) const { return to_float((*this)(row, column)); }

  // value(row, column) for every element.
  template <class Value>
  Guarded& fill(const Value& value) {
    for (int64_t r = 0; r < rows_; ++r) {
      for (int64_t c = 0; c < width_; ++c) (*this)(r, c) = converted(value(r, c));
    }
    return *this;
  }

  // Integers in [low, high].
  Guarded& integers(uint32_t seed, int low, int high) {
    std::mt19937 random(seed);
    std::uniform_int_distribution<int> number(low, high);
    return fill([&](int64_t, int64_t) { return number(random); });
  }

  Guarded& real(uint32_t seed, float scale = 1.0f) {
    std::mt19937 random(seed);
    std::normal_distribution<float> number(0.0f, scale);
    return fill([&](int64_t, int64_t) { return number(random); });
  }

  flashu_tensor view() const {
    std::vector<int64_t> strides(shape_.size());
    int64_t step = stride_;
    for (size_t d = shape_.size(); d-- > 0;) {
      const bool last = d + 1 == shape_.size();
      strides[d] = shape_[d] == 1 ? 7 + 2 * static_cast<int64_t>(d) : last ? inner_ : step;
      if (!last) step *= shape_[d];
    }
    return tensor(memory_.data() + kZone + kOffset, dtype_of<T>(), shape_, strides);
  }
  operator flashu_tensor() const { return view(); }

  // Nothing around the elements was written.
  bool intact() const {
    std::vector<T> copy = memory_;
    for (int64_t r = 0; r < rows_; ++r) {
      for (int64_t c = 0; c < width_; ++c) std::memset(&copy[at(r, c)], 0xff, sizeof(T));
    }
    const auto* bytes = reinterpret_cast<const unsigned char*>(copy.data());
    return std::all_of(bytes, bytes + copy.size() * sizeof(T), [](unsigned char b) { return b == 0xff; });
  }

  // Bit for bit, padding included.
  bool same(const Guarded& other) const {
    return memory_.size() == other.memory_.size() &&
           std::memcmp(memory_.data(), other.memory_.data(), memory_.size() * sizeof(T)) == 0;
  }

 private:
  static constexpr int64_t kZone = 512;
  static constexpr int64_t kOffset = 3;  // no vector is aligned

  size_t at(int64_t row, int64_t column) const {
    return static_cast<size_t>(kZone + kOffset + row * stride_ + column * inner_);
  }
  template <class Number>
  static T converted(Number number) {
    if constexpr (std::is_integral_v<T> || std::is_same_v<T, double>) {
      return static_cast<T>(number);
    } else {
      return from_float<T>(static_cast<float>(number));
    }
  }

  std::vector<int64_t> shape_;
  int64_t inner_, width_, rows_, stride_;
  std::vector<T> memory_;
};

// As long as it lives, `count` threads are pretended: the chunks run one after another, the last one first.
class Threads {
 public:
  explicit Threads(int32_t count) {
    pretended = count;
    flashu_set_parallel_backend(&kBackend);
  }
  ~Threads() { flashu_set_parallel_backend(nullptr); }
  Threads(const Threads&) = delete;
  Threads& operator=(const Threads&) = delete;

 private:
  static void run(int64_t begin, int64_t end, int64_t grain, flashu_parallel_body body, void* context) {
    const int64_t count = end - begin;
    const int64_t chunks = std::clamp<int64_t>(count / std::max<int64_t>(grain, 1), 1, pretended);
    for (int64_t chunk = chunks; chunk-- > 0;)
      body(begin + count * chunk / chunks, begin + count * (chunk + 1) / chunks, context);
  }
  static inline int32_t pretended = 1;
  static constexpr flashu_parallel_backend kBackend{run, [] { return pretended; }};
};

inline constexpr int32_t kThreadCounts[] = {1, 7};

// One rounding to T.
template <class T>
float rounded(double value) {
  return to_float(from_float<T>(static_cast<float>(value)));
}

// |a - b| is at most `ulps` roundings of T at b's size.
template <class T>
::testing::AssertionResult near(double a, double b, double ulps = 1) {
  const double eps = std::is_same_v<T, float> ? 0x1p-23 : std::is_same_v<T, float16> ? 0x1p-10 : 0x1p-7;
  const double least = std::is_same_v<T, float16> ? 0x1p-24 : 0x1p-126;
  if (std::fabs(a - b) <= ulps * std::max(eps * std::fabs(b), least)) return ::testing::AssertionSuccess();
  return ::testing::AssertionFailure() << a << " is not within " << ulps << " roundings of " << b;
}

}  // namespace flashu::test
