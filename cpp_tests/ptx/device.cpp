// The device that the host code sees: memory, which is the host's, attributes and errors.
#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "ptx/machine.hpp"
#include "ptx/runtime.hpp"

using namespace ptx;

namespace {

int shared_opt_in() { return (capability() == 80 ? 163 : 227) * 1024; }

}  // namespace

extern "C" {

// ---- kernels

cudaError_t cudaFuncSetAttribute(const void* f, cudaFuncAttribute a, int value) {
  const std::scoped_lock lock(runtime().mutex);
  const auto found = runtime().functions.find(f);
  if (found == runtime().functions.end()) return fail(cudaErrorInvalidDeviceFunction, "cudaFuncSetAttribute");
  if (a == cudaFuncAttributeMaxDynamicSharedMemorySize) {
    if (value > shared_opt_in())
      return fail(cudaErrorInvalidValue, "more shared memory than a block may have");
    found->second.shared_limit = value;
  }
  return cudaSuccess;
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* a, const void* f) {
  const std::scoped_lock lock(runtime().mutex);
  const auto found = runtime().functions.find(f);
  if (found == runtime().functions.end())
    return fail(cudaErrorInvalidDeviceFunction, "cudaFuncGetAttributes");
  try {
    Kernel* k = find_kernel(found->second);
    if (k == nullptr) return fail(cudaErrorNoKernelImageForDevice, "no PTX for " + found->second.name);
    *a = cudaFuncAttributes{};
    a->ptxVersion = a->binaryVersion = k->module->target;
    a->maxThreadsPerBlock = k->max_threads > 0 ? k->max_threads : 1024;
    a->sharedSizeBytes = k->static_shared > kSharedBase ? k->static_shared - kSharedBase : 0;
  } catch (const std::exception& e) {
    return fail(cudaErrorInvalidPtx, e.what());
  }
  return cudaSuccess;
}

// ---- memory

cudaError_t cudaMalloc(void** p, size_t n) {
  const std::scoped_lock lock(runtime().mutex);
  const size_t room = (n + 255) / 256 * 256 + 512;
  auto* raw = static_cast<u8*>(std::aligned_alloc(256, room));
  std::memset(raw, 0xff, room);
  *p = raw;
  note_allocation(raw, std::max<size_t>(n, 1));
  return cudaSuccess;
}
cudaError_t cudaMallocAsync(void** p, size_t n, cudaStream_t) { return cudaMalloc(p, n); }
cudaError_t cudaFree(void* p) {
  const std::scoped_lock lock(runtime().mutex);
  if (p == nullptr) return cudaSuccess;
  if (!forget_allocation(p)) return fail(cudaErrorInvalidValue, "cudaFree of what was not allocated");
  std::free(p);
  return cudaSuccess;
}
cudaError_t cudaFreeAsync(void* p, cudaStream_t) { return cudaFree(p); }
cudaError_t cudaMallocHost(void** p, size_t n) {
  *p = std::malloc(n);
  return cudaSuccess;
}
cudaError_t cudaFreeHost(void* p) {
  std::free(p);
  return cudaSuccess;
}
cudaError_t cudaMemcpy(void* to, const void* from, size_t n, cudaMemcpyKind) {
  std::memcpy(to, from, n);
  return runtime().error;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t n, cudaMemcpyKind, cudaStream_t) {
  std::memcpy(to, from, n);
  return runtime().error;
}
cudaError_t cudaMemset(void* p, int v, size_t n) {
  std::memset(p, v, n);
  return runtime().error;
}
cudaError_t cudaMemsetAsync(void* p, int v, size_t n, cudaStream_t) {
  std::memset(p, v, n);
  return runtime().error;
}
cudaError_t cudaMemcpyToSymbol(const void* symbol, const void* from, size_t n, size_t offset,
                               cudaMemcpyKind) {
  const auto v = runtime().variables.find(symbol);
  if (v == runtime().variables.end()) return fail(cudaErrorInvalidSymbol, "symbol");
  decode(*v->second.binary);
  for (auto& m : v->second.binary->modules) {
    const auto g = m->globals.find(v->second.name);
    if (g == m->globals.end()) continue;
    std::memcpy(g->second.data + offset, from, n);
    return cudaSuccess;
  }
  return fail(cudaErrorInvalidSymbol, "symbol");
}

// ---- errors

cudaError_t cudaDeviceSynchronize() { return runtime().error; }
cudaError_t cudaGetLastError() {
  const auto e = runtime().error;
  if (e != cudaErrorLaunchFailure) runtime().error = cudaSuccess;
  return e;
}
// A new start after an error that stays.
cudaError_t cudaDeviceReset() {
  runtime().error = cudaSuccess;
  runtime().message.clear();
  runtime().written = Written{};
  return cudaSuccess;
}
cudaError_t cudaPeekAtLastError() { return runtime().error; }
const char* cudaGetErrorString(cudaError_t e) {
  return e == cudaSuccess ? "no error" : runtime().message.empty() ? "error" : runtime().message.c_str();
}
const char* cudaGetErrorName(cudaError_t e) { return e == cudaSuccess ? "cudaSuccess" : "cudaError"; }

// ---- attributes

cudaError_t cudaGetDeviceCount(int* n) {
  *n = 1;
  return cudaSuccess;
}
cudaError_t cudaGetDevice(int* d) {
  *d = 0;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int d) { return d == 0 ? cudaSuccess : cudaErrorInvalidDevice; }
cudaError_t cudaDeviceGetAttribute(int* v, cudaDeviceAttr a, int) {
  switch (a) {
    case cudaDevAttrMultiProcessorCount:
      *v = multiprocessors();
      break;
    case cudaDevAttrComputeCapabilityMajor:
      *v = capability() / 10;
      break;
    case cudaDevAttrComputeCapabilityMinor:
      *v = capability() % 10;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *v = shared_opt_in();
      break;
    case cudaDevAttrMaxSharedMemoryPerBlock:
      *v = 48 * 1024;
      break;
    default:
      *v = 0;
  }
  return cudaSuccess;
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* p, int) {
  std::memset(p, 0, sizeof *p);
  p->multiProcessorCount = multiprocessors();
  p->major = capability() / 10;
  p->minor = capability() % 10;
  p->sharedMemPerBlockOptin = shared_opt_in();
  p->warpSize = 32;
  return cudaSuccess;
}
cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** f, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* r) {
  *f = std::string(name) == "cuTensorMapEncodeTiled" ? reinterpret_cast<void*>(&encode_tensor_map) : nullptr;
  if (r != nullptr) *r = *f != nullptr ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}
cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* a, const void* p) {
  u64 low, high;
  *a = cudaPointerAttributes{};
  a->type = find_allocation(reinterpret_cast<u64>(p), &low, &high) ? cudaMemoryTypeDevice
                                                                   : cudaMemoryTypeUnregistered;
  a->devicePointer = a->type == cudaMemoryTypeDevice ? const_cast<void*>(p) : nullptr;
  return cudaSuccess;
}
CUresult cuGetErrorString(CUresult, const char** text) {
  *text = "refused";
  return CUDA_SUCCESS;
}
cudaError_t cudaMemGetInfo(size_t* a, size_t* b) {
  *a = *b = size_t{64} << 30;
  return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int* v) {
  *v = 13000;
  return cudaSuccess;
}
cudaError_t cudaRuntimeGetVersion(int* v) {
  *v = 13000;
  return cudaSuccess;
}

// Multiprocessors of one GPC are not told apart: every pair may be a cluster.
cudaError_t cudaOccupancyMaxActiveClusters(int* n, const void* key, const cudaLaunchConfig_t* c) {
  const auto f = runtime().functions.find(key);
  if (f == runtime().functions.end()) return cudaErrorInvalidDeviceFunction;
  if (c->dynamicSmemBytes > f->second.shared_limit) return cudaErrorInvalidValue;
  unsigned blocks = 1;
  for (unsigned a = 0; a < c->numAttrs; ++a) {
    if (c->attrs[a].id == cudaLaunchAttributeClusterDimension) blocks = c->attrs[a].val.clusterDim.x;
  }
  *n = multiprocessors() / static_cast<int>(blocks);
  return cudaSuccess;
}

// ---- streams and events, of which nothing is left to wait for

cudaError_t cudaStreamCreate(cudaStream_t* s) {
  *s = nullptr;
  return cudaSuccess;
}
cudaError_t cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaStreamSynchronize(cudaStream_t) { return runtime().error; }
cudaError_t cudaEventCreate(cudaEvent_t* e) {
  *e = nullptr;
  return cudaSuccess;
}
cudaError_t cudaEventDestroy(cudaEvent_t) { return cudaSuccess; }
cudaError_t cudaEventRecord(cudaEvent_t, cudaStream_t) { return cudaSuccess; }
cudaError_t cudaEventSynchronize(cudaEvent_t) { return cudaSuccess; }
cudaError_t cudaEventElapsedTime(float* t, cudaEvent_t, cudaEvent_t) {
  *t = 0;  // there is no time here
  return cudaSuccess;
}

}  // extern "C"
