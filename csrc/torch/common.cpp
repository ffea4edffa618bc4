// Tensor views and error conversion for the torch adapters.
#include "torch/common.hpp"

// Weak: a libtorch for the CPU does not have it.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device,
                                                                                   void** stream);

namespace flashu::torch_ops {
namespace {

int32_t dtype_code(const char* op, const char* name, const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return FLASHU_F32;
    case ScalarType::BFloat16:
      return FLASHU_BF16;
    case ScalarType::Half:
      return FLASHU_F16;
    case ScalarType::Double:
      return FLASHU_F64;
    case ScalarType::Int:
      return FLASHU_I32;
    case ScalarType::Long:
      return FLASHU_I64;
    case ScalarType::Char:
      return FLASHU_I8;
    case ScalarType::Bool:
      STD_TORCH_CHECK(false, "flashu type error: ", op, ": ", name, ": expected numbers, got a bool tensor");
      break;
    default:
      break;
  }
  STD_TORCH_CHECK(
      false, "flashu type error: ", op, ": ", name,
      ": expected float32, bfloat16, float16, float64, int32, int64 or int8, got scalar type code ",
      static_cast<int>(tensor.scalar_type()));
  return -1;
}

const char* kind(int32_t status) {
  switch (status) {
    case FLASHU_INVALID_VALUE:
      return "value";
    case FLASHU_INVALID_TYPE:
      return "type";
    case FLASHU_INVALID_INDEX:
      return "index";
    case FLASHU_UNSUPPORTED:
      return "unsupported";
    default:
      return "internal";
  }
}

}  // namespace

flashu_tensor view(const char* op, const char* name, const Tensor& tensor) {
  flashu_tensor out{};
  out.dtype = dtype_code(op, name, tensor);
  STD_TORCH_CHECK(tensor.is_cpu() || tensor.is_cuda(), "flashu value error: ", op, ": ", name,
                  ": expected a CPU or CUDA tensor");
  out.device = tensor.is_cpu() ? FLASHU_DEVICE_CPU : FLASHU_DEVICE_CUDA(tensor.get_device_index());
  const auto sizes = tensor.sizes();
  const auto strides = tensor.strides();
  STD_TORCH_CHECK(sizes.size() <= FLASHU_MAX_DIMS, "flashu value error: ", op, ": ", name,
                  ": expected at most ", FLASHU_MAX_DIMS, " dimensions, got ", sizes.size());
  out.ndim = static_cast<int32_t>(sizes.size());
  for (size_t d = 0; d < sizes.size(); ++d) {
    out.sizes[d] = sizes[d];
    out.strides[d] = strides[d];
  }
  // The C API decides what is written; data_ptr() does not mark the tensor as mutated, the schema does.
  out.data = tensor.data_ptr();
  return out;
}

flashu_tensor view(const char* op, const char* name, const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? view(op, name, *tensor) : flashu_tensor{};
}

Tensor foldable(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  const auto strides = tensor.strides();
  int64_t folded = 1;
  int64_t stride = 0;
  for (int64_t d = static_cast<int64_t>(sizes.size()) - 2; d >= 0; --d) {
    if (sizes[d] == 1) continue;
    if (folded == 1) stride = strides[d];
    if (strides[d] != stride * folded) return torch::stable::contiguous(tensor);
    folded *= sizes[d];
  }
  return tensor;
}

std::optional<Tensor> foldable(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? std::optional<Tensor>(foldable(*tensor)) : std::nullopt;
}

void* current_stream(const Tensor& tensor) {
  if (tensor.is_cpu()) return nullptr;
  void* stream = nullptr;
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr &&
                      aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream) == 0,
                  "flashu unsupported error: this libtorch has no CUDA streams");
  return stream;
}

void check_status(int32_t status) {
  STD_TORCH_CHECK(status == FLASHU_OK, "flashu ", kind(status), " error: ", flashu_last_error());
}

}  // namespace flashu::torch_ops
