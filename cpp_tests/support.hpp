// What the C++ tests share: owned tensors with their view, random fill, and the text of an expected error.
#pragma once

#include <gtest/gtest.h>

#include <cstdint>
#include <random>
#include <string>
#include <type_traits>
#include <vector>

#include "core/half.hpp"
#include "flashu/flashu.hpp"

namespace flashu::test {

template <class T>
constexpr flashu_dtype dtype_of() {
  if constexpr (std::is_same_v<T, float>) return FLASHU_F32;
  if constexpr (std::is_same_v<T, bfloat16>) return FLASHU_BF16;
  if constexpr (std::is_same_v<T, float16>) return FLASHU_F16;
  if constexpr (std::is_same_v<T, double>) return FLASHU_F64;
  if constexpr (std::is_same_v<T, int32_t>) return FLASHU_I32;
  if constexpr (std::is_same_v<T, int64_t>) return FLASHU_I64;
  if constexpr (std::is_same_v<T, int8_t>) return FLASHU_I8;
}

// A contiguous tensor that owns its elements.
template <class T>
struct Owned {
  std::vector<int64_t> sizes;
  std::vector<T> data;

  explicit Owned(std::vector<int64_t> shape, std::vector<T> values = {})
      : sizes(std::move(shape)), data(std::move(values)) {
    int64_t count = 1;
    for (const int64_t size : sizes) count *= size;
    data.resize(static_cast<size_t>(count));
  }
  flashu_tensor view() const { return tensor(data.data(), dtype_of<T>(), sizes); }
  operator flashu_tensor() const { return view(); }
};

// Small integers, exact in every storage type and in every order of summing.
template <class T>
Owned<T> integers(std::vector<int64_t> sizes, uint32_t seed, int limit = 3) {
  Owned<T> owned(std::move(sizes));
  std::mt19937 random(seed);
  std::uniform_int_distribution<int> value(-limit, limit);
  for (T& element : owned.data) {
    if constexpr (std::is_integral_v<T>) {
      element = value(random);
    } else {
      element = from_float<T>(static_cast<float>(value(random)));
    }
  }
  return owned;
}

// The text of the flashu::Error that `call` throws, "" if it throws none.
template <class Call>
std::string error_of(const Call& call) {
  try {
    call();
  } catch (const Error& error) {
    return error.what();
  }
  return "";
}

}  // namespace flashu::test
