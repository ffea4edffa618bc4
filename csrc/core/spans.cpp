// Spans of rows: validation and the token -> span map.
#include "core/spans.hpp"

#include <algorithm>
#include <numeric>

#include "core/checks.hpp"

namespace flashu::core {

void check_spans(const flashu_spans& spans, int64_t rows, int64_t tokens) {
  FLASHU_CHECK(spans.num_spans >= 0 && spans.num_spans <= INT32_MAX, FLASHU_INVALID_VALUE,
               "spans: expected a count in [0, 2^31), got ", spans.num_spans);
  FLASHU_CHECK(spans.num_spans == 0 || spans.spans != nullptr, FLASHU_INVALID_VALUE,
               "spans: expected a pointer, got NULL");
  const auto row = [&](int64_t s) { return spans.spans[3 * s]; };
  const auto offset = [&](int64_t s) { return spans.spans[3 * s + 1]; };
  const auto length = [&](int64_t s) { return spans.spans[3 * s + 2]; };
  for (int64_t s = 0; s < spans.num_spans; ++s) {
    FLASHU_CHECK(row(s) >= 0 && row(s) < rows, FLASHU_INVALID_INDEX, "spans: expected rows in [0, ", rows,
                 "), got ", row(s), " in span ", s);
    FLASHU_CHECK(offset(s) >= 0 && length(s) >= 0 && length(s) <= tokens && offset(s) <= tokens - length(s),
                 FLASHU_INVALID_INDEX, "spans: expected tokens in [0, ", tokens, "), got [", offset(s), ", ",
                 offset(s), " + ", length(s), ") in span ", s);
  }
  std::vector<int64_t> order(static_cast<size_t>(spans.num_spans));
  std::iota(order.begin(), order.end(), 0);
  std::erase_if(order, [&](int64_t s) { return length(s) == 0; });
  std::sort(order.begin(), order.end(),
            [&](int64_t a, int64_t b) { return row(a) != row(b) ? row(a) < row(b) : offset(a) < offset(b); });
  for (size_t i = 1; i < order.size(); ++i) {
    const int64_t a = order[i - 1];
    const int64_t b = order[i];
    FLASHU_CHECK(row(a) != row(b) || offset(a) + length(a) <= offset(b), FLASHU_INVALID_INDEX,
                 "spans: expected disjoint spans, got ", std::min(a, b), " and ", std::max(a, b),
                 " both at row ", row(b), ", token ", offset(b));
  }
}

std::vector<int32_t> span_map(const flashu_spans& spans, int64_t rows, int64_t tokens) {
  std::vector<int32_t> map(static_cast<size_t>(rows * tokens), -1);
  for (int64_t s = 0; s < spans.num_spans; ++s) {
    const auto first = map.begin() + spans.spans[3 * s] * tokens + spans.spans[3 * s + 1];
    std::fill_n(first, spans.spans[3 * s + 2], static_cast<int32_t>(s));
  }
  return map;
}

}  // namespace flashu::core
