// The default thread backend of libflashu: OpenMP where it is compiled with it, else serial.
#include <algorithm>

#include "core/parallel.hpp"

#ifdef _OPENMP
#include <omp.h>
#include <pthread.h>
#endif

namespace flashu::core {
namespace {

#ifdef _OPENMP
void run(int64_t begin, int64_t end, int64_t grain, flashu_parallel_body body, void* context) {
  const int64_t count = end - begin;
  const int64_t chunks = std::min<int64_t>(omp_get_max_threads(), count / std::max<int64_t>(grain, 1));
  if (chunks <= 1 || omp_in_parallel()) {
    body(begin, end, context);
    return;
  }
#pragma omp parallel num_threads(static_cast<int>(chunks))
  {
    // The runtime may grant fewer threads than asked for, so the split follows what it granted.
    const int64_t granted = omp_get_num_threads();
    const int64_t chunk = omp_get_thread_num();
    const int64_t first = begin + count * chunk / granted;
    const int64_t last = begin + count * (chunk + 1) / granted;
    if (first < last) body(first, last, context);
  }
}
int32_t threads() { return omp_in_parallel() ? 1 : omp_get_max_threads(); }

// GNU OpenMP's threads do not survive a fork, and the next parallel region in the child would wait for them
// for ever. So the thread that forks ends its own before; parent and child start new ones.
[[maybe_unused]] const int at_fork =
    pthread_atfork([] { omp_pause_resource_all(omp_pause_hard); }, nullptr, nullptr);
#else
void run(int64_t begin, int64_t end, int64_t, flashu_parallel_body body, void* context) {
  body(begin, end, context);
}
int32_t threads() { return 1; }
#endif

constexpr flashu_parallel_backend kBackend{run, threads};

}  // namespace

const flashu_parallel_backend& default_parallel_backend() { return kBackend; }

}  // namespace flashu::core
