// Checks of the operands of matrix products, which the FFN and the linear layer share. Each throws Failure.
#pragma once

#include <initializer_list>
#include <utility>

#include "core/checks.hpp"
#include "core/matrix.hpp"

namespace flashu::api {

using NamedTensors = std::initializer_list<std::pair<const char*, const flashu_tensor*>>;

// Every tensor that is present by itself, and all of them on one device.
void check_all(NamedTensors tensors);

// A weight matrix of the dtype of `like`, with contiguous rows.
core::Matrix weight(const char* name, const flashu_tensor& tensor, const char* like_name,
                    const flashu_tensor& like);

// A weight matrix of int8 with contiguous rows, on the CPU.
core::Matrix int8_weight(const char* name, const flashu_tensor& tensor);

// The scales of its `rows` rows.
const float* row_scales(const char* name, const flashu_tensor& tensor, int64_t rows);

// A tensor of rows that must have the leading dimensions of `like` and `width` columns.
core::Matrix rows_like(const char* name, const flashu_tensor& tensor, const char* like_name,
                       const flashu_tensor& like, int64_t width);

// The same, for one that is written: it overlaps neither itself nor an input.
core::Matrix output(const flashu_tensor& out, const char* like_name, const flashu_tensor& like, int64_t width,
                    NamedTensors inputs);

}  // namespace flashu::api
