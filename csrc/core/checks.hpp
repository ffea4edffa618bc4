// Argument checks shared by every op of the C API. A failed check throws Failure, which guarded() turns into
// a status and the thread's last error; nothing below the C API lets an exception out.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <new>
#include <sstream>
#include <string>
#include <utility>

#include "core/for_ops.hpp"
#include "flashu/flashu.h"

namespace flashu::core {

struct Failure {
  flashu_status status;
  std::string message;
};

// Throws Failure with the parts streamed one after another: fail(FLASHU_INVALID_VALUE, "x", ": expected
// ...").
template <class... Parts>
[[noreturn]] void fail(flashu_status status, const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw Failure{status, text.str()};
}

// The text is built only when the check fails.
#define FLASHU_CHECK(condition, status, ...)     \
  do {                                           \
    if (!(condition)) [[unlikely]]               \
      ::flashu::core::fail(status, __VA_ARGS__); \
  } while (false)

FLASHU_FOR_OPS void set_last_error(const char* op, const std::string& message) noexcept;
FLASHU_FOR_OPS void clear_last_error() noexcept;

// Runs the body of a C API function: every outcome becomes a status.
template <class Body>
int32_t guarded(const char* op, Body&& body) noexcept {
  clear_last_error();
  try {
    std::forward<Body>(body)();
    return FLASHU_OK;
  } catch (const Failure& failure) {
    set_last_error(op, failure.message);
    return failure.status;
  } catch (const std::bad_alloc&) {
    set_last_error(op, "out of host memory");
    return FLASHU_OUT_OF_MEMORY;
  } catch (const std::exception& error) {
    set_last_error(op, std::string("internal error: ") + error.what());
    return FLASHU_INTERNAL;
  }
}

// The caller's argument struct, of this very version: the rule of struct_size is in flashu.h.
template <class Args>
const Args& read_args(const Args* args) {
  FLASHU_CHECK(args != nullptr, FLASHU_INVALID_VALUE, "args: expected a pointer, got NULL");
  FLASHU_CHECK(args->struct_size == sizeof(Args), FLASHU_INVALID_VALUE, "args.struct_size: expected ",
               sizeof(Args), ", got ", args->struct_size);
  return *args;
}

const char* dtype_name(int32_t dtype);
int64_t dtype_size(int32_t dtype);

// "[2, 3]"; for messages.
std::string shape_text(const flashu_tensor& tensor);

int64_t numel(const flashu_tensor& tensor);

// An optional tensor was given: the rule of absent tensors is in flashu.h.
bool present(const flashu_tensor& tensor);

// Each of these throws Failure with "name: expected ..., got ...".
void check_rank(const char* name, const flashu_tensor& tensor, int rank);
void check_rank_at_least(const char* name, const flashu_tensor& tensor, int rank);
void check_dtype(const char* name, const flashu_tensor& tensor, std::initializer_list<flashu_dtype> allowed);
void check_same_dtype(const char* name, const flashu_tensor& tensor, const char* other_name,
                      const flashu_tensor& other);
void check_size(const char* name, const flashu_tensor& tensor, int dim, int64_t expected);
void check_same_shape(const char* name, const flashu_tensor& tensor, const char* other_name,
                      const flashu_tensor& other);

// The last dimension has stride 1; other strides are free for inputs.
void check_inner_contiguous(const char* name, const flashu_tensor& tensor);

// No two elements share memory: needed of everything that is written.
void check_non_overlapping(const char* name, const flashu_tensor& tensor);

// Two tensors share no byte (by extent): needed of an output against every input it does not update in place.
void check_disjoint(const char* name, const flashu_tensor& tensor, const char* other_name,
                    const flashu_tensor& other);

// float32, bfloat16 or float16.
void check_floating(const char* name, const flashu_tensor& tensor);

// Same shape and dtype.
void check_like(const char* name, const flashu_tensor& tensor, const char* other_name,
                const flashu_tensor& other);

void check_contiguous(const char* name, const flashu_tensor& tensor);

// A tensor that is written: it overlaps neither itself nor an input. Absent inputs are passed over.
void check_output(const char* name, const flashu_tensor& out,
                  std::initializer_list<std::pair<const char*, const flashu_tensor*>> inputs);

void check_finite(const char* name, double value);

// Alignment of every workspace, in bytes.
inline constexpr uint64_t kWorkspaceAlign = 64;

// The caller's workspace holds `needed` bytes (nothing is asked of it where that is 0); FLASHU_WORKSPACE
// otherwise.
void check_workspace(const void* workspace, uint64_t bytes, uint64_t needed);

// The ordinal of a CUDA device, as CUDA counts.
inline int32_t cuda_ordinal(int32_t device) { return device - FLASHU_DEVICE_CUDA(0); }

// All of one device, and that device has kernels in this build. Returns the device.
int32_t check_device(std::initializer_list<std::pair<const char*, const flashu_tensor*>> tensors);

// What every tensor argument must satisfy: valid dtype, rank and device, sizes >= 0, strides >= 0, data
// present when there are elements, aligned to its element, and an extent that fits in int64 bytes.
void check_tensor(const char* name, const flashu_tensor& tensor);

}  // namespace flashu::core
