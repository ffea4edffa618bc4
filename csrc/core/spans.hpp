// Spans of rows: which modulation row, if any, belongs to every token of a [rows, tokens, width] tensor.
#pragma once

#include <cstdint>
#include <vector>

#include "flashu/norm.h"

namespace flashu::core {

// Fails where a span is outside [rows, tokens] or overlaps another.
void check_spans(const flashu_spans& spans, int64_t rows, int64_t tokens);

// For every (row, token), row-major, the number of the span that holds it, or -1. The spans must be checked.
std::vector<int32_t> span_map(const flashu_spans& spans, int64_t rows, int64_t tokens);

}  // namespace flashu::core
