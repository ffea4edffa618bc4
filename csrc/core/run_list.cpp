// Validation and algebra of run lists.
#include "core/run_list.hpp"

#include <algorithm>

#include "core/checks.hpp"

namespace flashu::core {
namespace {

// Appends a run that starts at or after the end of the last one, merging it when they touch or overlap.
void append(RunList& runs, int64_t start, int64_t end) {
  if (end <= start) return;
  if (!runs.empty() && start <= runs.back().start + runs.back().length) {
    const int64_t reach = std::max(end, runs.back().start + runs.back().length);
    runs.back().length = reach - runs.back().start;
  } else {
    runs.push_back({start, end - start});
  }
}

}  // namespace

RunList runs_from_flat(const char* name, std::span<const int64_t> flat, int64_t limit) {
  FLASHU_CHECK(flat.size() % 2 == 0, FLASHU_INVALID_VALUE, name, ": expected (start, length) pairs, got ",
               flat.size(), " numbers");
  RunList runs;
  int64_t end = 0;
  for (size_t i = 0; i < flat.size(); i += 2) {
    const int64_t start = flat[i];
    const int64_t length = flat[i + 1];
    FLASHU_CHECK(length >= 1, FLASHU_INVALID_INDEX, name, ": expected lengths >= 1, got ", length, " in run ",
                 i / 2);
    FLASHU_CHECK(start >= 0 && length <= limit && start <= limit - length, FLASHU_INVALID_INDEX, name,
                 ": expected runs inside [0, ", limit, "), got start ", start, " and length ", length,
                 " in run ", i / 2);
    FLASHU_CHECK(start >= end, FLASHU_INVALID_INDEX, name,
                 ": expected ascending runs that do not overlap, got start ", start, " after end ", end,
                 " in run ", i / 2);
    end = start + length;
    append(runs, start, end);
  }
  return runs;
}

template <class T>
void check_index(const char* name, std::span<const T> index, int64_t limit) {
  std::vector<uint8_t> seen(static_cast<size_t>(limit), 0);
  for (size_t i = 0; i < index.size(); ++i) {
    const int64_t value = index[i];
    FLASHU_CHECK(value >= 0 && value < limit, FLASHU_INVALID_INDEX, name, ": expected values in [0, ", limit,
                 "), got ", value, " at position ", i);
    FLASHU_CHECK(!seen[static_cast<size_t>(value)], FLASHU_INVALID_INDEX, name,
                 ": expected each value at most once, got ", value, " again at position ", i);
    seen[static_cast<size_t>(value)] = 1;
  }
}
template void check_index<int32_t>(const char*, std::span<const int32_t>, int64_t);
template void check_index<int64_t>(const char*, std::span<const int64_t>, int64_t);

RunList runs_from_index(const char* name, std::span<const int64_t> index, int64_t limit) {
  FLASHU_CHECK(limit >= 0, FLASHU_INVALID_VALUE, "limit: expected at least 0, got ", limit);
  check_index(name, index, limit);
  std::vector<int64_t> sorted(index.begin(), index.end());
  std::sort(sorted.begin(), sorted.end());
  RunList runs;
  for (const int64_t value : sorted) append(runs, value, value + 1);
  return runs;
}

std::vector<int64_t> index_from_runs(const RunList& runs) {
  std::vector<int64_t> index;
  index.reserve(static_cast<size_t>(total_length(runs)));
  for (const Run& run : runs) {
    for (int64_t i = 0; i < run.length; ++i) index.push_back(run.start + i);
  }
  return index;
}

std::vector<int64_t> flat_from_runs(const RunList& runs) {
  std::vector<int64_t> flat;
  for (const Run& run : runs) flat.insert(flat.end(), {run.start, run.length});
  return flat;
}

int64_t total_length(const RunList& runs) {
  int64_t total = 0;
  for (const Run& run : runs) total += run.length;
  return total;
}

RunList unite(const RunList& a, const RunList& b) {
  RunList merged;
  size_t i = 0;
  size_t j = 0;
  while (i < a.size() || j < b.size()) {
    const bool from_a = j == b.size() || (i < a.size() && a[i].start <= b[j].start);
    const Run& run = from_a ? a[i++] : b[j++];
    append(merged, run.start, run.start + run.length);
  }
  return merged;
}

RunList intersect(const RunList& a, const RunList& b) {
  RunList common;
  size_t i = 0;
  size_t j = 0;
  while (i < a.size() && j < b.size()) {
    const int64_t end_a = a[i].start + a[i].length;
    const int64_t end_b = b[j].start + b[j].length;
    append(common, std::max(a[i].start, b[j].start), std::min(end_a, end_b));
    (end_a < end_b ? i : j) += 1;
  }
  return common;
}

RunList complement(const RunList& runs, int64_t limit) {
  RunList rest;
  int64_t next = 0;
  for (const Run& run : runs) {
    append(rest, next, run.start);
    next = run.start + run.length;
  }
  append(rest, next, limit);
  return rest;
}

RunList round_out(const RunList& runs, int64_t multiple, int64_t limit) {
  FLASHU_CHECK(multiple >= 1, FLASHU_INVALID_VALUE, "multiple: expected at least 1, got ", multiple);
  RunList rounded;
  for (const Run& run : runs) {
    const int64_t last_tile = (run.start + run.length - 1) / multiple;
    append(rounded, run.start / multiple * multiple, std::min(limit, (last_tile + 1) * multiple));
  }
  return rounded;
}

}  // namespace flashu::core
