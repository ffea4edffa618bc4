// What the tests of the CUDA kernels share: tensors between red zones, on the host and on the device, and
// comparison of the two. The CPU ops are the oracle: they are tested against fp64 by themselves.
#pragma once

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <string>

#include "../support.hpp"
#include "cuda/device.hpp"

namespace flashu::test {

// A tensor with 4 KiB before and behind it and padding behind every row, all of it 0xff (NaN): stray reads
// give NaN, stray writes are found by check_zones().
template <class T>
class Guarded {
 public:
  // `padding`: elements between the rows (last dimension); `offset`: elements that the data is off 16-byte
  // alignment.
  explicit Guarded(std::vector<int64_t> sizes, int64_t padding = 0, int64_t offset = 0)
      : sizes_(std::move(sizes)) {
    int64_t stride = 1;
    strides_.resize(sizes_.size());
    for (size_t d = sizes_.size(); d-- > 0;) {
      strides_[d] = stride;
      stride *= sizes_[d];
      if (d + 1 == sizes_.size()) stride += padding;
    }
    elements_ = std::max<int64_t>(stride, 1) + offset;
    offset_ = offset;
    memory_.assign(2 * kZone + static_cast<size_t>(elements_) * sizeof(T), '\xff');
  }

  T* data() { return reinterpret_cast<T*>(memory_.data() + kZone) + offset_; }
  const T* data() const { return const_cast<Guarded*>(this)->data(); }
  int64_t count() const {
    int64_t n = 1;
    for (const int64_t size : sizes_) n *= size;
    return n;
  }
  // Element i in row-major order.
  T& operator[](int64_t i) { return data()[place(i)]; }
  const T& operator[](int64_t i) const { return data()[place(i)]; }

  int64_t size(size_t dimension) const { return sizes_[dimension]; }

  // All elements in row-major order.
  std::vector<double> values() const {
    std::vector<double> out(static_cast<size_t>(count()));
    for (int64_t i = 0; i < count(); ++i)
      out[static_cast<size_t>(i)] = static_cast<double>(to_float((*this)[i]));
    return out;
  }

  template <class Fill>
  Guarded& fill(const Fill& value) {
    for (int64_t i = 0; i < count(); ++i) (*this)[i] = value(i);
    return *this;
  }

  flashu_tensor view() const { return tensor(data(), dtype_of<T>(), sizes_, strides_); }
  operator flashu_tensor() const { return view(); }

  // The tensor on the device, as it is now.
  flashu_tensor upload() {
    if (device_ == nullptr) {
      device_ =
          std::shared_ptr<void>(device_allocate(memory_.size()), [bytes = memory_.size()](void* memory) {
            device_forbid(memory, bytes, false);
            device_free(memory);
          });
    }
    forbid_zones(false);
    copy_to_device(device_.get(), memory_.data(), memory_.size());
    forbid_zones(true);
    flashu_tensor out = view();
    out.device = FLASHU_DEVICE_CUDA(0);
    out.data = static_cast<char*>(device_.get()) + kZone + offset_ * static_cast<int64_t>(sizeof(T));
    return out;
  }

  // What the device has made of it; zones and padding must be as they were.
  Guarded download() const {
    Guarded out = *this;
    forbid_zones(false);
    copy_from_device(out.memory_.data(), device_.get(), memory_.size());
    forbid_zones(true);
    out.device_ = nullptr;
    out.check_zones();
    return out;
  }

  void check_zones() const {
    std::vector<bool> ours(memory_.size(), false);
    for (int64_t i = 0; i < count(); ++i) {
      const size_t at = kZone + static_cast<size_t>(offset_ + place(i)) * sizeof(T);
      std::fill_n(ours.begin() + static_cast<std::ptrdiff_t>(at), sizeof(T), true);
    }
    int64_t strays = 0;
    for (size_t i = 0; i < memory_.size(); ++i) strays += !ours[i] && memory_[i] != '\xff';
    EXPECT_EQ(strays, 0) << "bytes written outside the tensor";
  }

 private:
  static constexpr size_t kZone = 4096;

  // A read that changes no result is still one of memory that may not be there.
  void forbid_zones(bool forbid) const {
    auto* const memory = static_cast<char*>(device_.get());
    device_forbid(memory, kZone, forbid);
    device_forbid(memory + memory_.size() - kZone, kZone, forbid);
  }

  int64_t place(int64_t i) const {
    int64_t at = 0;
    for (size_t d = sizes_.size(); d-- > 0;) {
      at += i % sizes_[d] * strides_[d];
      i /= sizes_[d];
    }
    return at;
  }

  std::vector<int64_t> sizes_, strides_;
  int64_t elements_ = 0, offset_ = 0;
  std::vector<char> memory_;
  std::shared_ptr<void> device_;
};

template <class T>
Guarded<T> normal(std::vector<int64_t> sizes, uint32_t seed, int64_t padding = 0, float scale = 1,
                  int64_t offset = 0) {
  std::mt19937 random(seed);
  std::normal_distribution<float> value(0, scale);
  Guarded<T> out(std::move(sizes), padding, offset);
  return out.fill([&](int64_t) { return from_float<T>(value(random)); });
}

// Small integers: exact in every storage type and every order of summing.
template <class T>
Guarded<T> whole(std::vector<int64_t> sizes, uint32_t seed, int64_t padding = 0, int limit = 3,
                 int64_t offset = 0) {
  std::mt19937 random(seed);
  std::uniform_int_distribution<int> value(-limit, limit);
  Guarded<T> out(std::move(sizes), padding, offset);
  return out.fill([&](int64_t) { return from_float<T>(static_cast<float>(value(random))); });
}

// The distance to the next number of T.
template <class T>
double spacing(double value) {
  const double bits = std::is_same_v<T, bfloat16> ? 7 : std::is_same_v<T, float16> ? 10 : 23;
  return std::exp2(std::floor(std::log2(std::max(std::fabs(value), 1e-30))) - bits);
}

// Equal up to `spacings` of the larger number and `absolute`; NaN equals NaN.
template <class T>
void expect_near(const Guarded<T>& got, const Guarded<T>& expected, double spacings, double absolute = 1e-6) {
  ASSERT_EQ(got.count(), expected.count());
  for (int64_t i = 0; i < got.count(); ++i) {
    double a = 0;
    double b = 0;
    if constexpr (std::is_floating_point_v<T> && sizeof(T) == 8) {
      a = got[i];
      b = expected[i];
    } else {
      a = static_cast<double>(to_float(got[i]));
      b = static_cast<double>(to_float(expected[i]));
    }
    if (std::isnan(b)) {
      ASSERT_TRUE(std::isnan(a)) << "element " << i << ": expected NaN, got " << a;
      continue;
    }
    ASSERT_LE(std::fabs(a - b), spacings * spacing<T>(std::max(std::fabs(a), std::fabs(b))) + absolute)
        << "element " << i << ": expected " << b << ", got " << a;
  }
}

template <class T>
void expect_equal(const Guarded<T>& got, const Guarded<T>& expected) {
  ASSERT_EQ(got.count(), expected.count());
  for (int64_t i = 0; i < got.count(); ++i) {
    if constexpr (std::is_integral_v<T>) {
      ASSERT_EQ(got[i], expected[i]) << "element " << i;
    } else {
      ASSERT_EQ(to_float(got[i]), to_float(expected[i])) << "element " << i;
    }
  }
}

// Device memory for an op that needs some.
class DeviceWorkspace {
 public:
  explicit DeviceWorkspace(uint64_t bytes)
      : bytes_(bytes), memory_(device_allocate(std::max<uint64_t>(bytes, 1)), device_free) {
    const std::vector<char> fill(std::max<uint64_t>(bytes, 1), '\xff');
    copy_to_device(memory_.get(), fill.data(), fill.size());
  }
  Workspace get() const { return {bytes_ > 0 ? memory_.get() : nullptr, bytes_}; }

 private:
  uint64_t bytes_;
  std::shared_ptr<void> memory_;
};

// Base of all device tests: skips where there is none; each test body runs under every schedule.
class DeviceTest : public ::testing::Test {
 protected:
  void SetUp() override {
    const std::string reason = why_no_device();
    if (!reason.empty()) GTEST_SKIP() << reason;
    begin_test();
    use_capability(90);
  }
  static void under_every_schedule(const std::function<void()>& body, int times = 1) {
    for (const uint64_t schedule : schedules(times)) {
      SCOPED_TRACE("schedule " + std::to_string(schedule));
      use_schedule(schedule);
      body();
      device_synchronize();
      if (HasFatalFailure()) return;
    }
  }
};

template <class T>
class DeviceOf : public DeviceTest {};
using Storage3 = ::testing::Types<float, bfloat16, float16>;

}  // namespace flashu::test
