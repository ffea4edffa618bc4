// Run lists: which neurons (or tokens) are kept, as runs (start, length) over [0, limit). Pure functions; the
// one place where index lists are validated.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace flashu::core {

struct Run {
  int64_t start;
  int64_t length;
  bool operator==(const Run&) const = default;
};

using RunList = std::vector<Run>;

// Every RunList below is canonical: lengths >= 1, ascending, disjoint, not touching, inside [0, limit).

// From flat (start, length) pairs, which must be in range, ascending and disjoint. Runs that touch are
// merged. Throws Failure (FLASHU_INVALID_INDEX or _VALUE) that names `name` and the position.
RunList runs_from_flat(const char* name, std::span<const int64_t> flat, int64_t limit);

int64_t total_length(const RunList& runs);

// Throws the Failure of an index that is out of range or repeated; any order is allowed. T is int32_t or
// int64_t.
template <class T>
void check_index(const char* name, std::span<const T> index, int64_t limit);

}  // namespace flashu::core
