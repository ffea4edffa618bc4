// Resolving the selection of a problem.
#include "cpu/selection.hpp"

#include <algorithm>
#include <span>

#include "core/checks.hpp"
#include "core/run_list.hpp"
#include "cpu/ffn.hpp"

namespace flashu::cpu {
namespace {

bool ascends_by_one(const std::vector<int32_t>& list) {
  for (size_t i = 1; i < list.size(); ++i) {
    if (list[i] != list[0] + static_cast<int32_t>(i)) return false;
  }
  return true;
}

// A copy without strides, because validation and packing both walk it.
template <class T>
std::vector<int32_t> from_index(const flashu_tensor& index, int64_t intermediate) {
  const T* const data = static_cast<const T*>(index.data);
  std::vector<T> values(static_cast<size_t>(index.sizes[0]));
  for (size_t i = 0; i < values.size(); ++i) values[i] = data[static_cast<int64_t>(i) * index.strides[0]];
  core::check_index<T>("index", values, intermediate);
  return {values.begin(), values.end()};
}

std::vector<int32_t> from_runs(const core::FfnProblem& problem) {
  std::vector<int32_t> list;
  list.reserve(static_cast<size_t>(problem.neurons));
  for (const core::Run& run : problem.runs) {
    for (int64_t i = 0; i < run.length; ++i) list.push_back(static_cast<int32_t>(run.start + i));
  }
  return list;
}

std::vector<int32_t> own_list(const core::FfnProblem& problem) {
  if (problem.by_runs()) return from_runs(problem);
  return problem.index.dtype == FLASHU_I32 ? from_index<int32_t>(problem.index, problem.intermediate)
                                           : from_index<int64_t>(problem.index, problem.intermediate);
}

// What was checked once is not checked again, but for what would leave the weights.
Selection in_place(const core::FfnProblem& problem) {
  const std::span list(static_cast<const int32_t*>(problem.index.data), static_cast<size_t>(problem.neurons));
  const auto outside = std::ranges::find_if(
      list, [&](int32_t neuron) { return neuron < 0 || neuron >= problem.intermediate; });
  if (outside != list.end()) core::check_index<int32_t>("index", list, problem.intermediate);
  return {list.data(), problem.neurons};
}

bool names_blocks(const std::vector<int32_t>& list, size_t block) {
  if (list.size() % block != 0) return false;
  for (size_t i = 0; i < list.size(); ++i) {
    if (i % block == 0 ? list[i] % 8 != 0 : list[i] != list[i - 1] + 1) return false;
  }
  return true;
}

}  // namespace

Selection resolve(const core::FfnProblem& problem) {
  if (problem.one_run()) return {problem.first(), problem.neurons};
  if (problem.selected_by == FLASHU_SELECT_LIST) return in_place(problem);
  std::vector<int32_t> list = own_list(problem);
  if (list.empty() || ascends_by_one(list))
    return {list.empty() ? 0 : int64_t{list[0]}, static_cast<int64_t>(list.size())};
  return Selection(std::move(list));
}

int32_t list_neurons(const core::FfnProblem& problem, int32_t* to) {
  const std::vector<int32_t> list = own_list(problem);
  std::ranges::copy(list, to);
  return names_blocks(list, 64) ? 64 : names_blocks(list, 8) ? 8 : 1;
}

}  // namespace flashu::cpu
