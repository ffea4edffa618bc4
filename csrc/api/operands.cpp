// Checks of the operands of matrix products.
#include "api/operands.hpp"

#include "core/rows.hpp"

namespace flashu::api {

void check_all(NamedTensors tensors) {
  for (const auto& [name, tensor] : tensors) {
    if (core::present(*tensor)) core::check_tensor(name, *tensor);
  }
  core::check_device(tensors);
}

core::Matrix weight(const char* name, const flashu_tensor& tensor, const char* like_name,
                    const flashu_tensor& like) {
  core::check_rank(name, tensor, 2);
  core::check_same_dtype(name, tensor, like_name, like);
  core::check_inner_contiguous(name, tensor);
  return {tensor.data, tensor.strides[0]};
}

core::Matrix int8_weight(const char* name, const flashu_tensor& tensor) {
  FLASHU_CHECK(tensor.device == FLASHU_DEVICE_CPU, FLASHU_UNSUPPORTED, name,
               ": expected int8 weights on the CPU, which alone has kernels for them, got a CUDA tensor");
  core::check_rank(name, tensor, 2);
  core::check_dtype(name, tensor, {FLASHU_I8});
  core::check_inner_contiguous(name, tensor);
  return {tensor.data, tensor.strides[0]};
}

const float* row_scales(const char* name, const flashu_tensor& tensor, int64_t rows) {
  core::check_dtype(name, tensor, {FLASHU_F32});
  core::check_rank(name, tensor, 1);
  core::check_inner_contiguous(name, tensor);
  core::check_size(name, tensor, 0, rows);
  return static_cast<const float*>(tensor.data);
}

core::Matrix rows_like(const char* name, const flashu_tensor& tensor, const char* like_name,
                       const flashu_tensor& like, int64_t width) {
  core::check_same_dtype(name, tensor, like_name, like);
  core::check_rank(name, tensor, like.ndim);
  for (int d = 0; d < like.ndim - 1; ++d) core::check_size(name, tensor, d, like.sizes[d]);
  core::check_size(name, tensor, like.ndim - 1, width);
  return {tensor.data, core::as_rows(name, tensor).stride};
}

core::Matrix output(const flashu_tensor& out, const char* like_name, const flashu_tensor& like, int64_t width,
                    NamedTensors inputs) {
  const core::Matrix matrix = rows_like("out", out, like_name, like, width);
  core::check_output("out", out, inputs);
  return matrix;
}

}  // namespace flashu::api
