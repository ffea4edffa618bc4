// The default thread backend: GNU OpenMP, or serial where there is none. It is opened when it is first
// needed: a library that was linked with it would bring it into every process that loads the ops of torch,
// which has threads of its own.
#include <algorithm>
#include <type_traits>

#include "core/parallel.hpp"

#if FLASHU_OPENMP
#include <dlfcn.h>
#include <pthread.h>
#endif

namespace flashu::core {
namespace {

#if FLASHU_OPENMP
// What GCC makes of `#pragma omp parallel num_threads(n)`, and functions of omp.h.
struct OpenMp {
  void (*parallel)(void (*body)(void*), void* data, unsigned threads, unsigned flags) = nullptr;
  int (*max_threads)() = nullptr;
  int (*in_parallel)() = nullptr;
  int (*granted)() = nullptr;
  int (*number)() = nullptr;
  int (*pause)(int kind) = nullptr;

  OpenMp() {
    void* library = dlopen("libgomp.so.1", RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) return;
    const auto find = [&](auto& function, const char* name) {
      function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(dlsym(library, name));
      return function != nullptr;
    };
    find(pause, "omp_pause_resource_all");  // of GCC 9 and newer
    const bool found = find(max_threads, "omp_get_max_threads") && find(in_parallel, "omp_in_parallel") &&
                       find(granted, "omp_get_num_threads") && find(number, "omp_get_thread_num");
    if (!found || !find(parallel, "GOMP_parallel")) parallel = nullptr;
  }
};

const OpenMp& openmp() {
  static const OpenMp found;
  return found;
}

// GNU OpenMP's threads do not survive a fork, and the next parallel region in the child would wait for them
// for ever. So the thread that forks ends its own before; parent and child start new ones.
void end_threads() {
  constexpr int kHard = 2;  // omp_pause_hard
  if (openmp().pause != nullptr) openmp().pause(kHard);
}

struct Region {
  int64_t begin, count;
  flashu_parallel_body body;
  void* context;
};

// The runtime may grant fewer threads than asked for, so the split follows what it granted.
void run_chunk(void* data) {
  const Region& region = *static_cast<const Region*>(data);
  const int64_t granted = openmp().granted();
  const int64_t chunk = openmp().number();
  const int64_t first = region.begin + region.count * chunk / granted;
  const int64_t last = region.begin + region.count * (chunk + 1) / granted;
  if (first < last) region.body(first, last, region.context);
}

int32_t threads() {
  return openmp().parallel == nullptr || openmp().in_parallel() ? 1 : openmp().max_threads();
}

void run(int64_t begin, int64_t end, int64_t grain, flashu_parallel_body body, void* context) {
  const int64_t count = end - begin;
  const int64_t chunks = std::min<int64_t>(threads(), count / std::max<int64_t>(grain, 1));
  if (chunks <= 1) {
    body(begin, end, context);
    return;
  }
  [[maybe_unused]] static const int at_fork = pthread_atfork(end_threads, nullptr, nullptr);
  Region region{begin, count, body, context};
  openmp().parallel(run_chunk, &region, static_cast<unsigned>(chunks), 0);
}
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
