// Resolving a selection of neurons.
#include "cpu/selection.hpp"

#include <limits>
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

Selection from_runs(const flashu_selection& selection, int64_t intermediate) {
  const std::span<const int64_t> flat(selection.runs, static_cast<size_t>(2 * selection.num_runs));
  const core::RunList runs = core::runs_from_flat("runs", flat, intermediate);
  Selection out;
  out.count = core::total_length(runs);
  if (runs.size() == 1) out.first = runs[0].start;
  if (runs.size() <= 1) return out;
  out.range = false;
  out.list.reserve(static_cast<size_t>(out.count));
  for (const core::Run& run : runs) {
    for (int64_t i = 0; i < run.length; ++i) out.list.push_back(static_cast<int32_t>(run.start + i));
  }
  return out;
}

void check_kind(const flashu_selection& selection) {
  switch (selection.kind) {
    case FLASHU_SELECT_ALL:
      return;
    case FLASHU_SELECT_RUNS:
      FLASHU_CHECK(selection.num_runs >= 0 && (selection.num_runs == 0 || selection.runs != nullptr),
                   FLASHU_INVALID_VALUE, "runs: expected a pointer to 2 * num_runs numbers, got num_runs ",
                   selection.num_runs);
      return;
    case FLASHU_SELECT_INDEX:
      core::check_tensor("index", selection.index);
      core::check_dtype("index", selection.index, {FLASHU_I32, FLASHU_I64});
      core::check_rank("index", selection.index, 1);
      return;
    default:
      core::fail(FLASHU_INVALID_VALUE, "selection.kind: expected 0, 1 or 2, got ", selection.kind);
  }
}

}  // namespace

Selection resolve(const flashu_selection& selection, int64_t intermediate) {
  FLASHU_CHECK(intermediate <= std::numeric_limits<int32_t>::max(), FLASHU_UNSUPPORTED,
               "selection: expected fewer than 2^31 neurons, got ", intermediate);
  check_kind(selection);
  if (selection.kind == FLASHU_SELECT_RUNS) return from_runs(selection, intermediate);
  if (selection.kind == FLASHU_SELECT_INDEX) {
    return selection.index.dtype == FLASHU_I32 ? from_index<int32_t>(selection.index, intermediate)
                                               : from_index<int64_t>(selection.index, intermediate);
  }
  Selection all;
  all.count = intermediate;
  return all;
}

}  // namespace flashu::cpu
