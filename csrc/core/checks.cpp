// Implementation of the argument checks and of the thread-local error text.
#include "core/checks.hpp"

#include <algorithm>
#include <cmath>
#include <vector>

namespace flashu::core {
namespace {

thread_local std::string last_error;

// Address range [first, last) that the tensor's elements touch; empty tensors touch nothing.
std::pair<uintptr_t, uintptr_t> extent(const flashu_tensor& tensor) {
  if (numel(tensor) == 0) return {0, 0};
  int64_t last = 0;
  for (int d = 0; d < tensor.ndim; ++d) last += (tensor.sizes[d] - 1) * tensor.strides[d];
  const auto base = reinterpret_cast<uintptr_t>(tensor.data);
  return {base, base + static_cast<uintptr_t>((last + 1) * dtype_size(tensor.dtype))};
}

std::string device_text(int32_t device) {
  return device == FLASHU_DEVICE_CPU ? "cpu" : "cuda:" + std::to_string(cuda_ordinal(device));
}

}  // namespace

void set_last_error(const char* op, const std::string& message) noexcept {
  try {
    last_error = std::string(op) + ": " + message;
  } catch (...) {
    last_error.clear();
  }
}

void clear_last_error() noexcept { last_error.clear(); }

const char* dtype_name(int32_t dtype) {
  switch (dtype) {
    case FLASHU_F32:
      return "float32";
    case FLASHU_BF16:
      return "bfloat16";
    case FLASHU_F16:
      return "float16";
    case FLASHU_F64:
      return "float64";
    case FLASHU_I32:
      return "int32";
    case FLASHU_I64:
      return "int64";
    case FLASHU_I8:
      return "int8";
    default:
      return "an unknown dtype";
  }
}

int64_t dtype_size(int32_t dtype) {
  switch (dtype) {
    case FLASHU_I8:
      return 1;
    case FLASHU_BF16:
    case FLASHU_F16:
      return 2;
    case FLASHU_F32:
    case FLASHU_I32:
      return 4;
    case FLASHU_F64:
    case FLASHU_I64:
      return 8;
    default:
      return 0;
  }
}

std::string shape_text(const flashu_tensor& tensor) {
  std::string text = "[";
  for (int d = 0; d < tensor.ndim; ++d) text += (d ? ", " : "") + std::to_string(tensor.sizes[d]);
  return text + "]";
}

int64_t numel(const flashu_tensor& tensor) {
  int64_t count = 1;
  for (int d = 0; d < tensor.ndim; ++d) count *= tensor.sizes[d];
  return count;
}

bool present(const flashu_tensor& tensor) { return tensor.data != nullptr || tensor.ndim != 0; }

void check_rank(const char* name, const flashu_tensor& tensor, int rank) {
  FLASHU_CHECK(tensor.ndim == rank, FLASHU_INVALID_VALUE, name, ": expected ", rank, " dimensions, got ",
               tensor.ndim, " (shape ", shape_text(tensor), ")");
}

void check_rank_at_least(const char* name, const flashu_tensor& tensor, int rank) {
  FLASHU_CHECK(tensor.ndim >= rank, FLASHU_INVALID_VALUE, name, ": expected at least ", rank,
               " dimensions, got ", tensor.ndim, " (shape ", shape_text(tensor), ")");
}

void check_dtype(const char* name, const flashu_tensor& tensor, std::initializer_list<flashu_dtype> allowed) {
  if (std::find(allowed.begin(), allowed.end(), tensor.dtype) != allowed.end()) return;
  std::string names;
  for (const flashu_dtype dtype : allowed)
    names += (names.empty() ? "" : " or ") + std::string(dtype_name(dtype));
  fail(FLASHU_INVALID_TYPE, name, ": expected ", names, ", got ", dtype_name(tensor.dtype));
}

void check_same_dtype(const char* name, const flashu_tensor& tensor, const char* other_name,
                      const flashu_tensor& other) {
  FLASHU_CHECK(tensor.dtype == other.dtype, FLASHU_INVALID_TYPE, name, ": expected ", dtype_name(other.dtype),
               " as ", other_name, " has, got ", dtype_name(tensor.dtype));
}

void check_size(const char* name, const flashu_tensor& tensor, int dim, int64_t expected) {
  FLASHU_CHECK(tensor.sizes[dim] == expected, FLASHU_INVALID_VALUE, name, ": expected size ", expected,
               " in dimension ", dim, ", got ", tensor.sizes[dim], " (shape ", shape_text(tensor), ")");
}

void check_same_shape(const char* name, const flashu_tensor& tensor, const char* other_name,
                      const flashu_tensor& other) {
  const bool same =
      tensor.ndim == other.ndim && std::equal(tensor.sizes, tensor.sizes + tensor.ndim, other.sizes);
  FLASHU_CHECK(same, FLASHU_INVALID_VALUE, name, ": expected shape ", shape_text(other), " as ", other_name,
               " has, got ", shape_text(tensor));
}

void check_inner_contiguous(const char* name, const flashu_tensor& tensor) {
  if (tensor.ndim == 0 || numel(tensor) == 0) return;
  const int last = tensor.ndim - 1;
  FLASHU_CHECK(tensor.sizes[last] == 1 || tensor.strides[last] == 1, FLASHU_INVALID_VALUE, name,
               ": expected stride 1 in the last dimension, got ", tensor.strides[last]);
}

void check_non_overlapping(const char* name, const flashu_tensor& tensor) {
  if (numel(tensor) == 0) return;
  // Sorted by stride, every dimension must step over everything the smaller ones span.
  std::vector<std::pair<int64_t, int64_t>> dims;
  for (int d = 0; d < tensor.ndim; ++d) {
    if (tensor.sizes[d] > 1) dims.emplace_back(tensor.strides[d], tensor.sizes[d]);
  }
  std::sort(dims.begin(), dims.end());
  int64_t span = 1;
  for (const auto& [stride, size] : dims) {
    FLASHU_CHECK(stride >= span, FLASHU_INVALID_VALUE, name,
                 ": expected elements that do not share memory, got stride ", stride, " over a span of ",
                 span);
    span = stride * (size - 1) + span;
  }
}

void check_disjoint(const char* name, const flashu_tensor& tensor, const char* other_name,
                    const flashu_tensor& other) {
  const auto [first, last] = extent(tensor);
  const auto [other_first, other_last] = extent(other);
  FLASHU_CHECK(first >= other_last || other_first >= last, FLASHU_INVALID_VALUE, name,
               ": expected memory of its own, got one that overlaps ", other_name);
}

void check_floating(const char* name, const flashu_tensor& tensor) {
  check_dtype(name, tensor, {FLASHU_F32, FLASHU_BF16, FLASHU_F16});
}

void check_like(const char* name, const flashu_tensor& tensor, const char* other_name,
                const flashu_tensor& other) {
  check_same_shape(name, tensor, other_name, other);
  check_same_dtype(name, tensor, other_name, other);
}

void check_contiguous(const char* name, const flashu_tensor& tensor) {
  if (numel(tensor) == 0) return;
  int64_t expected = 1;
  for (int d = tensor.ndim - 1; d >= 0; --d) {
    FLASHU_CHECK(tensor.sizes[d] == 1 || tensor.strides[d] == expected, FLASHU_INVALID_VALUE, name,
                 ": expected a contiguous tensor, got stride ", tensor.strides[d], " in dimension ", d,
                 " instead of ", expected);
    expected *= tensor.sizes[d];
  }
}

void check_output(const char* name, const flashu_tensor& out,
                  std::initializer_list<std::pair<const char*, const flashu_tensor*>> inputs) {
  check_non_overlapping(name, out);
  for (const auto& [input_name, input] : inputs) {
    if (present(*input)) check_disjoint(name, out, input_name, *input);
  }
}

void check_finite(const char* name, double value) {
  FLASHU_CHECK(std::isfinite(value), FLASHU_INVALID_VALUE, name, ": expected a finite number, got ", value);
}

void check_workspace(const void* workspace, uint64_t bytes, uint64_t needed) {
  if (needed == 0) return;
  FLASHU_CHECK(workspace != nullptr && reinterpret_cast<uintptr_t>(workspace) % kWorkspaceAlign == 0,
               FLASHU_WORKSPACE, "workspace: expected a pointer aligned to ", kWorkspaceAlign, " bytes, got ",
               workspace);
  FLASHU_CHECK(bytes >= needed, FLASHU_WORKSPACE, "workspace: expected at least ", needed, " bytes, got ",
               bytes);
}

int32_t check_device(std::initializer_list<std::pair<const char*, const flashu_tensor*>> tensors) {
  const auto& [first_name, first] = *tensors.begin();
  for (const auto& [name, tensor] : tensors) {
    if (!present(*tensor)) continue;
    FLASHU_CHECK(tensor->device == first->device, FLASHU_INVALID_VALUE, name, ": expected device ",
                 device_text(first->device), " as ", first_name, " has, got ", device_text(tensor->device));
  }
#if !FLASHU_HAS_CUDA
  FLASHU_CHECK(first->device == FLASHU_DEVICE_CPU, FLASHU_UNSUPPORTED, first_name,
               ": expected a CPU tensor, because this build has no CUDA kernels, got ",
               device_text(first->device));
#endif
  return first->device;
}

void check_tensor(const char* name, const flashu_tensor& tensor) {
  FLASHU_CHECK(dtype_size(tensor.dtype) != 0, FLASHU_INVALID_TYPE, name,
               ": expected a known dtype, got code ", tensor.dtype);
  FLASHU_CHECK(tensor.ndim >= 0 && tensor.ndim <= FLASHU_MAX_DIMS, FLASHU_INVALID_VALUE, name,
               ": expected at most ", FLASHU_MAX_DIMS, " dimensions, got ", tensor.ndim);
  int64_t count = 1;
  int64_t last = 0;
  bool empty = false;
  for (int d = 0; d < tensor.ndim; ++d) {
    const int64_t size = tensor.sizes[d];
    const int64_t stride = tensor.strides[d];
    FLASHU_CHECK(size >= 0, FLASHU_INVALID_VALUE, name, ": expected sizes >= 0, got ", shape_text(tensor));
    FLASHU_CHECK(stride >= 0, FLASHU_INVALID_VALUE, name, ": expected strides >= 0, got ", stride,
                 " in dimension ", d);
    if (size == 0) {
      empty = true;
      continue;
    }
    int64_t reach = 0;
    const bool fits = !__builtin_mul_overflow(count, size, &count) &&
                      !__builtin_mul_overflow(size - 1, stride, &reach) &&
                      !__builtin_add_overflow(last, reach, &last) && last < (int64_t{1} << 60);
    FLASHU_CHECK(fits, FLASHU_INVALID_VALUE, name, ": expected an extent below 2^60 elements, got shape ",
                 shape_text(tensor));
  }
  FLASHU_CHECK(tensor.device == FLASHU_DEVICE_CPU || tensor.device >= FLASHU_DEVICE_CUDA(0),
               FLASHU_INVALID_VALUE, name,
               ": expected device FLASHU_DEVICE_CPU or FLASHU_DEVICE_CUDA(ordinal), got ", tensor.device,
               tensor.device == 0 ? ": it was not filled in" : "");
  if (empty) return;
  FLASHU_CHECK(tensor.data != nullptr, FLASHU_INVALID_VALUE, name, ": expected data, got NULL");
  const auto misaligned =
      reinterpret_cast<uintptr_t>(tensor.data) % static_cast<uintptr_t>(dtype_size(tensor.dtype));
  FLASHU_CHECK(misaligned == 0, FLASHU_INVALID_VALUE, name, ": expected data aligned to its ",
               dtype_size(tensor.dtype), "-byte elements, got an address ", misaligned, " bytes off");
}

}  // namespace flashu::core

extern "C" {
int32_t flashu_abi_version(void) { return FLASHU_ABI_VERSION; }

const char* flashu_version(void) { return FLASHU_VERSION; }
const char* flashu_last_error(void) { return flashu::core::last_error.c_str(); }
}
