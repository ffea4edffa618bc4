// Spans of rows: validation and the token -> span map.
#include "core/spans.hpp"

#include "core/checks.hpp"

namespace flashu::core {

std::vector<int32_t> span_map(const flashu_spans& spans, int64_t rows, int64_t tokens) {
  FLASHU_CHECK(spans.num_spans >= 0 && spans.num_spans <= INT32_MAX, FLASHU_INVALID_VALUE,
               "spans: expected a count in [0, 2^31), got ", spans.num_spans);
  FLASHU_CHECK(spans.num_spans == 0 || spans.spans != nullptr, FLASHU_INVALID_VALUE,
               "spans: expected a pointer, got NULL");
  std::vector<int32_t> map(static_cast<size_t>(rows * tokens), -1);
  for (int64_t s = 0; s < spans.num_spans; ++s) {
    const int64_t row = spans.spans[3 * s];
    const int64_t offset = spans.spans[3 * s + 1];
    const int64_t length = spans.spans[3 * s + 2];
    FLASHU_CHECK(row >= 0 && row < rows, FLASHU_INVALID_INDEX, "spans: expected rows in [0, ", rows,
                 "), got ", row, " in span ", s);
    FLASHU_CHECK(offset >= 0 && length >= 0 && length <= tokens && offset <= tokens - length,
                 FLASHU_INVALID_INDEX, "spans: expected tokens in [0, ", tokens, "), got [", offset, ", ",
                 offset, " + ", length, ") in span ", s);
    for (int64_t t = offset; t < offset + length; ++t) {
      int32_t& entry = map[static_cast<size_t>(row * tokens + t)];
      FLASHU_CHECK(entry < 0, FLASHU_INVALID_INDEX, "spans: expected disjoint spans, got ", entry, " and ", s,
                   " both at row ", row, ", token ", t);
      entry = static_cast<int32_t>(s);
    }
  }
  return map;
}

}  // namespace flashu::core
