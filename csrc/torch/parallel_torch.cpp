// The threads of a process that loads the torch ops: torch's own pool, so that torch.set_num_threads counts
// and nested use inside a parallel region of torch stays serial.
#include <dlfcn.h>
#include <pthread.h>
#include <torch/csrc/stable/ops.h>

#include "flashu/flashu.h"

namespace flashu::torch_ops {
namespace {

void run(int64_t begin, int64_t end, int64_t grain, flashu_parallel_body body, void* context) {
  torch::stable::parallel_for(begin, end, grain,
                              [&](int64_t first, int64_t last) { body(first, last, context); });
}
int32_t threads() { return static_cast<int32_t>(torch::stable::get_num_threads()); }

// As in core/parallel_openmp.cpp, for torch's own OpenMP; linking with one here could load another.
void end_threads() {
  constexpr int kHard = 2;  // omp_pause_hard
  using Pause = int (*)(int);
  if (const auto pause = reinterpret_cast<Pause>(dlsym(RTLD_DEFAULT, "omp_pause_resource_all"))) pause(kHard);
}
[[maybe_unused]] const int at_fork = pthread_atfork(end_threads, nullptr, nullptr);

[[maybe_unused]] const bool at_load = [] {
  const flashu_parallel_backend backend{run, threads};
  flashu_set_parallel_backend(&backend);
  return true;
}();

}  // namespace
}  // namespace flashu::torch_ops
