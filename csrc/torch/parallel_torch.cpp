// The default thread backend of the torch ops library: torch's own pool, so that torch.set_num_threads counts
// and nested use inside a parallel region of torch stays serial.
#include <torch/csrc/stable/ops.h>

#include "core/parallel.hpp"

namespace flashu::core {
namespace {

void run(int64_t begin, int64_t end, int64_t grain, flashu_parallel_body body, void* context) {
  torch::stable::parallel_for(begin, end, grain,
                              [&](int64_t first, int64_t last) { body(first, last, context); });
}
int32_t threads() { return static_cast<int32_t>(torch::stable::get_num_threads()); }

constexpr flashu_parallel_backend kBackend{run, threads};

}  // namespace

const flashu_parallel_backend& default_parallel_backend() { return kBackend; }

}  // namespace flashu::core
