// What the parts of the CUDA runtime without a device share.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <mutex>

#include "ptx/machine.hpp"

namespace ptx {

// PTX as a program contains it, one for every .cu file.
struct Binary {
  struct Text {
    int target;
    std::string ptx;
  };
  std::vector<Text> texts;
  std::vector<std::unique_ptr<Module>> modules;  // decoded when a kernel of it is wanted
  bool decoded = false;
};

struct Function {
  Binary* binary;
  std::string name;
  std::size_t shared_limit;
};

struct Variable {
  Binary* binary;
  std::string name;
};

struct Runtime {
  std::recursive_mutex mutex;
  std::vector<std::unique_ptr<Binary>> binaries;
  std::map<const void*, Function> functions;
  std::map<const void*, Variable> variables;
  Written written;  // by launches that may still run where the next one overlaps them
  cudaError_t error = cudaSuccess;
  std::string message;
};
Runtime& runtime();

// The device: FLASHU_PTX_CAPABILITY (90) and FLASHU_PTX_SMS (132).
int capability();
int multiprocessors();

// Prints and remembers an error; one of a launch stays, as on a device.
cudaError_t fail(cudaError_t, const std::string& message);

// Decodes the newest PTX that the device can run.
void decode(Binary&);
// The kernel of that name, or null.
Kernel* find_kernel(const Function&);

// At the end of the program, what was executed: FLASHU_PTX_STATS=file.
void write_statistics();

CUresult encode_tensor_map(CUtensorMap* out, CUtensorMapDataType type, cuuint32_t rank, void* address,
                           const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box,
                           const cuuint32_t* steps, CUtensorMapInterleave interleave,
                           CUtensorMapSwizzle swizzle, CUtensorMapL2promotion l2,
                           CUtensorMapFloatOOBfill fill);

}  // namespace ptx
