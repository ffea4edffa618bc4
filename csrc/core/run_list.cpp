// Validation of run lists and index lists.
#include "core/run_list.hpp"

#include "core/checks.hpp"

namespace flashu::core {
namespace {

// Appends a run that starts at or after the end of the last one, as its continuation when they touch.
void append(RunList& runs, int64_t start, int64_t length) {
  if (!runs.empty() && start == runs.back().start + runs.back().length) {
    runs.back().length += length;
  } else {
    runs.push_back({start, length});
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
    append(runs, start, length);
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

int64_t total_length(const RunList& runs) {
  int64_t total = 0;
  for (const Run& run : runs) total += run.length;
  return total;
}

}  // namespace flashu::core
