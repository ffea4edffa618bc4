// A CUDA runtime without a device: kernels are registered and launched on the PTX machine. All of a launch
// has happened when the call returns.
#include "ptx/runtime.hpp"

#include <chrono>
#include <cstdio>
#include <cstring>

#include "ptx/machine.hpp"

namespace ptx {

Runtime& runtime() {
  static auto* instance = new Runtime;  // used until the very end
  return *instance;
}

int capability() {
  static const int value = environment("FLASHU_PTX_CAPABILITY", 90);
  return value;
}

int multiprocessors() { return environment("FLASHU_PTX_SMS", 132); }

cudaError_t fail(cudaError_t error, const std::string& message) {
  std::fprintf(stderr, "ptx: %s\n", message.c_str());
  runtime().message = "ptx: " + message;
  return runtime().error = error;
}

void decode(Binary& b) {
  if (b.decoded) return;
  b.decoded = true;
  [[maybe_unused]] static const int once = std::atexit(write_statistics);
  int newest = -1;
  for (const auto& text : b.texts) {
    if (text.target <= capability()) newest = std::max(newest, text.target);
  }
  for (const auto& text : b.texts) {
    if (text.target == newest) b.modules.push_back(parse(text.ptx));
  }
}

Kernel* find_kernel(const Function& function) {
  decode(*function.binary);
  for (const auto& m : function.binary->modules) {
    if (const auto k = m->kernels.find(function.name); k != m->kernels.end()) return k->second.get();
  }
  return nullptr;
}

namespace {

constexpr std::size_t kSharedWithoutOptIn = 48 * 1024;

struct Configuration {  // of a launch by <<<>>>
  dim3 grid, block;
  std::size_t shared;
  cudaStream_t stream;
};
std::vector<Configuration>& configurations() {
  static thread_local std::vector<Configuration> all;
  return all;
}

Dim dim(dim3 d) { return {d.x, d.y, d.z}; }

bool possible(dim3 grid, dim3 block) {
  const u64 threads = dim(block).count();
  return dim(grid).count() > 0 && grid.x <= 0x7fffffffu && grid.y <= 65535 && grid.z <= 65535 &&
         threads > 0 && threads <= 1024 && block.z <= 64;
}

void report(const Launch& l, const Machine& machine, double seconds) {
  std::fprintf(stderr, "ptx: %ux%ux%u of %u threads, %zu B shared, %.3f s, %.2f M warp instructions: %s\n",
               l.grid.x, l.grid.y, l.grid.z, static_cast<u32>(l.block.count()), l.dynamic_shared, seconds,
               static_cast<double>(machine.steps) / 1e6, l.kernel->name.c_str());
}

cudaError_t run_kernel(const void* key, dim3 grid, dim3 block, void** args, std::size_t shared, dim3 cluster,
                       bool overlaps) {
  Runtime& r = runtime();
  const std::scoped_lock lock(r.mutex);
  if (r.error == cudaErrorLaunchFailure) return r.error;
  const auto f = r.functions.find(key);
  if (f == r.functions.end()) return fail(cudaErrorInvalidDeviceFunction, "no such kernel");
  const std::string& name = f->second.name;
  try {
    Kernel* k = find_kernel(f->second);
    if (k == nullptr) return fail(cudaErrorNoKernelImageForDevice, "no PTX for " + name);
    if (shared > f->second.shared_limit)
      return fail(cudaErrorInvalidValue, "more dynamic shared memory than allowed for " + name);
    if (!possible(grid, block)) return fail(cudaErrorInvalidConfiguration, "launch of " + name);
    auto* params = reinterpret_cast<u8*>(k->param_base());
    for (std::size_t n = 0; n < k->params.size(); ++n)
      std::memcpy(params + k->params[n].offset, args[n], k->params[n].size);
    Settings settings = Settings::from_environment();
    static u64 launches = 0;
    settings.seed += 1000003 * launches++;
    Launch l{k, dim(grid), dim(block), dim(cluster), shared, overlaps, overlaps ? r.written : Written{}};
    if (k->cluster[0] > 0) l.cluster = {k->cluster[0], k->cluster[1], k->cluster[2]};
    if (l.cluster.y != 1 || l.cluster.z != 1 || l.grid.x % l.cluster.x != 0)
      return fail(cudaErrorInvalidConfiguration,
                  "a cluster that is not modelled, or no part of the grid: " + name);
    const auto begin = std::chrono::steady_clock::now();
    Machine machine(settings);
    std::unique_ptr<Counter> counter;
    if (count_listener()) counter = std::make_unique<Counter>(*k);
    machine.counter = counter.get();
    machine.run(l);
    if (counter != nullptr) count_listener()(l, counter->counts());
    if (!overlaps) r.written = Written{};
    r.written.add(machine.written);
    if (environment("FLASHU_PTX_SAY", 0) != 0)
      report(l, machine, std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count());
    return cudaSuccess;
  } catch (const std::exception& e) {
    return fail(cudaErrorLaunchFailure, e.what());
  }
}

template <class T>
T read(const u8* at) {
  T value;
  std::memcpy(&value, at, sizeof value);
  return value;
}

// The PTX in what nvcc puts into a program: entries of a header and text each.
void read_fat_binary(const u8* fat, Binary& binary) {
  constexpr u32 kMagic = 0xBA55ED50u;
  constexpr u16 kPtx = 1;
  if (read<u32>(fat) != kMagic) throw Error("not a fat binary");
  const u64 begin = read<u16>(fat + 6), end = begin + read<u64>(fat + 8);
  for (u64 at = begin; at + 64 <= end;) {
    const u8* entry = fat + at;
    const auto header = read<u32>(entry + 4);
    const auto size = read<u64>(entry + 8);
    if (header == 0) break;
    if (read<u16>(entry) == kPtx) {
      std::string text(reinterpret_cast<const char*>(entry + header), size);
      text.resize(std::min(text.size(), text.find('\0')));
      if (text.find(".version") == std::string::npos)
        throw Error("compressed PTX (compile with --no-compress)");
      binary.texts.push_back({static_cast<int>(read<u32>(entry + 28)), std::move(text)});
    }
    at += header + size;
  }
}

}  // namespace

}  // namespace ptx

using namespace ptx;

extern "C" {

// What nvcc's code calls.
void** __cudaRegisterFatBinary(void* wrapper) {
  const std::scoped_lock lock(runtime().mutex);
  auto& binaries = runtime().binaries;
  binaries.push_back(std::make_unique<Binary>());
  try {
    read_fat_binary(read<const u8*>(static_cast<const u8*>(wrapper) + 8), *binaries.back());
  } catch (const Error& e) {
    fail(cudaErrorInvalidKernelImage, e.what());
  }
  return reinterpret_cast<void**>(binaries.back().get());
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
char __cudaInitModule(void**) { return 1; }
void __cudaRegisterFunction(void** handle, const char* host, char*, const char* name, int, uint3*, uint3*,
                            dim3*, dim3*, int*) {
  const std::scoped_lock lock(runtime().mutex);
  runtime().functions[host] = Function{reinterpret_cast<Binary*>(handle), name, kSharedWithoutOptIn};
}
void __cudaRegisterVar(void** handle, char* host, char*, const char* name, int, size_t, int, int) {
  const std::scoped_lock lock(runtime().mutex);
  runtime().variables[host] = Variable{reinterpret_cast<Binary*>(handle), name};
}
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, cudaStream_t stream) {
  configurations().push_back({grid, block, shared, stream});
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  const auto c = configurations().back();
  configurations().pop_back();
  *grid = c.grid;
  *block = c.block;
  *shared = c.shared;
  *static_cast<cudaStream_t*>(stream) = c.stream;
  return cudaSuccess;
}
cudaError_t __cudaGetKernel(cudaKernel_t* out, const void* function) {
  *out = reinterpret_cast<cudaKernel_t>(const_cast<void*>(function));
  return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** args, size_t shared,
                               cudaStream_t) {
  return run_kernel(kernel, grid, block, args, shared, dim3(1, 1, 1), false);
}
cudaError_t cudaLaunchKernel(const void* f, dim3 grid, dim3 block, void** args, size_t shared, cudaStream_t) {
  return run_kernel(f, grid, block, args, shared, dim3(1, 1, 1), false);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* c, const void* f, void** args) {
  dim3 cluster(1, 1, 1);
  for (unsigned n = 0; n < c->numAttrs; ++n)
    if (c->attrs[n].id == cudaLaunchAttributeClusterDimension)
      cluster =
          dim3(c->attrs[n].val.clusterDim.x, c->attrs[n].val.clusterDim.y, c->attrs[n].val.clusterDim.z);
  bool overlaps = false;
  for (unsigned n = 0; n < c->numAttrs; ++n)
    overlaps |= c->attrs[n].id == cudaLaunchAttributeProgrammaticStreamSerialization &&
                c->attrs[n].val.programmaticStreamSerializationAllowed;
  return run_kernel(f, c->gridDim, c->blockDim, args, c->dynamicSmemBytes, cluster, overlaps);
}

}  // extern "C"
