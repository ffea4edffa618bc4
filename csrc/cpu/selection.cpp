// Resolving the selection of a problem.
#include "cpu/selection.hpp"

#include <span>

#include "core/checks.hpp"
#include "core/run_list.hpp"

namespace flashu::cpu {
namespace {

// A copy without strides, because validation and packing both walk it.
template <class T>
Selection from_index(const flashu_tensor& index, int64_t intermediate) {
  const int64_t count = index.sizes[0];
  const T* data = static_cast<const T*>(index.data);
  std::vector<T> values(static_cast<size_t>(count));
  for (int64_t i = 0; i < count; ++i) values[static_cast<size_t>(i)] = data[i * index.strides[0]];
  core::check_index<T>("index", values, intermediate);
  Selection out;
  out.count = count;
  for (int64_t i = 1; i < count; ++i)
    out.range &= values[static_cast<size_t>(i)] == values[0] + static_cast<T>(i);
  if (out.range) {
    out.first = count > 0 ? static_cast<int64_t>(values[0]) : 0;
  } else {
    out.list.assign(values.begin(), values.end());
  }
  return out;
}

Selection from_runs(const core::FfnProblem& problem) {
  Selection out;
  out.count = problem.neurons;
  out.first = problem.first();
  out.range = problem.one_run();
  if (out.range) return out;
  out.list.reserve(static_cast<size_t>(out.count));
  for (const core::Run& run : problem.runs) {
    for (int64_t i = 0; i < run.length; ++i) out.list.push_back(static_cast<int32_t>(run.start + i));
  }
  return out;
}

}  // namespace

Selection resolve(const core::FfnProblem& problem) {
  if (!problem.by_index) return from_runs(problem);
  return problem.index.dtype == FLASHU_I32 ? from_index<int32_t>(problem.index, problem.intermediate)
                                           : from_index<int64_t>(problem.index, problem.intermediate);
}

}  // namespace flashu::cpu
