/** @file
 * The public C API, base part: version, status, tensor view, dtypes, errors, threads. Ops have a header per
 * family. Nothing here knows torch or C++.
 *
 * Ops take one struct of arguments and return a flashu_status. They check all arguments before they touch
 * memory. `struct_size` is sizeof the struct in the caller's header. Within one FLASHU_ABI_VERSION no struct
 * changes, so another size, smaller or larger, comes from another version and is FLASHU_INVALID_VALUE.
 *
 * `stream` is a CUDA stream (cudaStream_t, NULL the default one), on which an op on a CUDA device is
 * launched; it is ignored on the CPU.
 *
 * `workspace` is memory of the caller on the op's device, aligned to 64 bytes, of at least the size that the
 * op's `_workspace` function gives for the same arguments and the same number of threads. That function
 * checks the arguments as the op does and ignores the workspace fields. A larger workspace is fine, a smaller
 * one is FLASHU_WORKSPACE.
 */
#ifndef FLASHU_FLASHU_H
#define FLASHU_FLASHU_H

#include <stddef.h>
#include <stdint.h>

#if defined(__GNUC__)
#define FLASHU_API __attribute__((visibility("default")))
#else
#define FLASHU_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

/** @name Version of these headers
 * That of the library is flashu_version(). @{ */
#define FLASHU_VERSION_MAJOR 0 /**< major */
#define FLASHU_VERSION_MINOR 1 /**< minor */
#define FLASHU_VERSION_PATCH 0 /**< patch */
/** @} */
#define FLASHU_TEXT_(number) #number
#define FLASHU_TEXT(number) FLASHU_TEXT_(number)
/** The version as text, such as "0.1.0". */
#define FLASHU_VERSION              \
  FLASHU_TEXT(FLASHU_VERSION_MAJOR) \
  "." FLASHU_TEXT(FLASHU_VERSION_MINOR) "." FLASHU_TEXT(FLASHU_VERSION_PATCH)

/** Raised whenever a struct, a function or a code changes, a field added at the end included. */
#define FLASHU_ABI_VERSION 5

/** Largest rank a tensor view can have. */
#define FLASHU_MAX_DIMS 6

/** What a call came back with. Any status but FLASHU_OK leaves outputs untouched and a text in
 * flashu_last_error(); the next call starts clean. */
typedef enum flashu_status {
  FLASHU_OK = 0,            /**< done, or on its way on the stream */
  FLASHU_INVALID_VALUE = 1, /**< a size, stride, rank, range, aliasing or device is wrong */
  FLASHU_INVALID_TYPE = 2,  /**< a dtype is wrong */
  FLASHU_INVALID_INDEX = 3, /**< an index or run is out of range, or repeated */
  FLASHU_UNSUPPORTED = 4,   /**< right in itself, but this build or device has no kernel for it */
  FLASHU_WORKSPACE = 5,     /**< the workspace is missing, too small or misaligned */
  FLASHU_OUT_OF_MEMORY = 6, /**< the host or the device has no memory left */
  FLASHU_INTERNAL = 7       /**< a fault of the library or of the CUDA runtime */
} flashu_status;

/** Type of a tensor's elements. Which ones an op takes stands at its arguments. */
typedef enum flashu_dtype {
  FLASHU_F32 = 0,  /**< float */
  FLASHU_BF16 = 1, /**< bfloat16: the upper half of a float */
  FLASHU_F16 = 2,  /**< IEEE half precision */
  FLASHU_F64 = 3,  /**< double */
  FLASHU_I32 = 4,  /**< int32_t */
  FLASHU_I64 = 5,  /**< int64_t */
  FLASHU_I8 = 6    /**< int8_t */
} flashu_dtype;

/** The CPU as a device. Device 0 is none, so one that was not filled in is an error and never the first GPU.
 */
#define FLASHU_DEVICE_CPU (-1)
/** The CUDA device of an ordinal. */
#define FLASHU_DEVICE_CUDA(ordinal) (256 + (ordinal))

/** A strided tensor that the caller owns. Sizes and strides count elements; only the first `ndim` are read.
 * An optional tensor is absent where data is NULL and ndim is 0, as in a zeroed struct; its other fields are
 * not read. An empty tensor (some size is 0) is given, whether its data is NULL or not. */
typedef struct flashu_tensor {
  void* data;                       /**< the first element, in memory of `device` */
  int32_t dtype;                    /**< flashu_dtype */
  int32_t device;                   /**< FLASHU_DEVICE_CPU or FLASHU_DEVICE_CUDA(ordinal) */
  int32_t ndim;                     /**< rank, at most FLASHU_MAX_DIMS */
  int32_t reserved;                 /**< zero */
  int64_t sizes[FLASHU_MAX_DIMS];   /**< of each dimension */
  int64_t strides[FLASHU_MAX_DIMS]; /**< from one element to the next of each dimension, in elements */
} flashu_tensor;

/** FLASHU_ABI_VERSION of the library that is linked. */
FLASHU_API int32_t flashu_abi_version(void);
/** FLASHU_VERSION of the library that is linked. */
FLASHU_API const char* flashu_version(void);

/** Text of this thread's latest failure, "" if the latest call succeeded. Valid until the thread's next call.
 */
FLASHU_API const char* flashu_last_error(void);

/** One word for the CPU instruction set in use: "baseline", "avx2", "avx512" or "avx512_bf16". The
 * environment variable FLASHU_ISA can lower it, read once. */
FLASHU_API const char* flashu_cpu_isa(void);

/** The newest CUDA that the installed driver knows, as CUDA counts (12080 is 12.8); 0 where there is none. */
FLASHU_API int32_t flashu_cuda_driver(void);
/** The version of the CUDA runtime in this build, as CUDA counts; 0 where there is none. */
FLASHU_API int32_t flashu_cuda_runtime(void);
/** Why no op can run on a CUDA device: a driver that is missing or too old, or a build without CUDA kernels.
 * "" where nothing is known to be missing. Ops on such a device fail with this text and FLASHU_UNSUPPORTED.
 */
FLASHU_API const char* flashu_cuda_problem(void);

/** Work on the chunk [begin, end) of a range; `context` is the caller's of parallel_for. */
typedef void (*flashu_parallel_body)(int64_t begin, int64_t end, void* context);
/** The threads that CPU kernels run on. Results never depend on them. */
typedef struct flashu_parallel_backend {
  /** Runs body(begin, end, context) over disjoint chunks that cover [begin, end), each at least `grain` long
   * (the last may be shorter), and returns when all are done. Inside a chunk it may be called again and must
   * then not deadlock. */
  void (*parallel_for)(int64_t begin, int64_t end, int64_t grain, flashu_parallel_body body, void* context);
  int32_t (*num_threads)(void); /**< how many chunks may run at once */
} flashu_parallel_backend;

/** Replaces the backend, with the host's own thread pool for example (examples/cpp/engine.cpp does). Default:
 * GNU OpenMP where its libgomp.so.1 is found; serial in a library built with FLASHU_OPENMP=OFF. The library
 * of torch ops sets torch's threads when it is loaded. NULL restores the default. The struct is copied. Call
 * it while no op is running. */
FLASHU_API void flashu_set_parallel_backend(const flashu_parallel_backend* backend);

#ifdef __cplusplus
} /* extern "C" */
#endif
#endif /* FLASHU_FLASHU_H */
