// The selected neurons in the form that the CPU loops read.
#pragma once

#include <cstdint>
#include <vector>

#include "core/ffn_problem.hpp"

namespace flashu::cpu {

// Either one range [first, first + count), or a list of `count` neurons: the caller's, or this one's own.
class Selection {
 public:
  Selection() = default;
  Selection(int64_t first, int64_t count) : count(count), first(first) {}
  Selection(const int32_t* list, int64_t count) : count(count), list_(list) {}
  explicit Selection(std::vector<int32_t> own)
      : count(static_cast<int64_t>(own.size())), own_(std::move(own)) {}

  int64_t count = 0;
  int64_t first = 0;

  // Null for a range.
  const int32_t* list() const { return list_ != nullptr ? list_ : own_.empty() ? nullptr : own_.data(); }

  int64_t operator[](int64_t position) const {
    const int32_t* const neurons = list();
    return neurons == nullptr ? first + position : neurons[position];
  }

 private:
  const int32_t* list_ = nullptr;
  std::vector<int32_t> own_;
};

// Throws Failure for indices that are out of range or repeated. A list is only looked at for its range.
Selection resolve(const core::FfnProblem& problem);

}  // namespace flashu::cpu
