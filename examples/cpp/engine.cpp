// A layer of an engine in C++ without torch: the tokens with the smallest value norms pass through the
// feed-forward block, the others stay as they are. The kernels run on the engine's own threads. Prints the
// chosen tokens, the hidden states and how far each token has moved; to stderr, how often its threads were
// used.
//
// Build it in one of two ways (README.md): find_package(flashu) or pkg-config.
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <flashu/ffn.hpp>
#include <flashu/routing.hpp>
#include <thread>
#include <vector>

namespace {

constexpr int64_t kTokens = 256, kHidden = 128, kNeurons = 384, kHeads = 2, kHeadSize = 16, kKept = 100;
constexpr int kThreads = 3;

// Stands for the engine's thread pool.
std::atomic<int64_t> pool_chunks{0};
thread_local bool inside = false;

void pool_parallel_for(int64_t begin, int64_t end, int64_t grain, flashu_parallel_body body, void* context) {
  const int64_t count = end - begin;
  const int64_t chunks = std::min<int64_t>(kThreads, count / std::max<int64_t>(grain, 1));
  if (inside || chunks <= 1) return body(begin, end, context);
  std::vector<std::thread> threads;
  for (int64_t i = 0; i < chunks; ++i) {
    threads.emplace_back([=] {
      inside = true;
      ++pool_chunks;
      body(begin + count * i / chunks, begin + count * (i + 1) / chunks, context);
    });
  }
  for (auto& thread : threads) thread.join();
}
int32_t pool_threads() { return inside ? 1 : kThreads; }

// Numbers in [-scale / 2, scale / 2), the same on every machine.
std::vector<float> numbers(int64_t count, float scale, uint32_t seed) {
  std::vector<float> data(static_cast<size_t>(count));
  for (auto& value : data) {
    seed = seed * 1664525u + 1013904223u;
    value = (static_cast<float>(seed >> 8) / 16777216.0f - 0.5f) * scale;
  }
  return data;
}

void run() {
  using flashu::tensor;
  std::vector<float> hidden = numbers(kTokens * kHidden, 2.0f, 1);
  const std::vector<float> before = hidden;
  const std::vector<float> values = numbers(kHeads * kTokens * kHeadSize, 2.0f, 2);
  const std::vector<float> gate = numbers(kNeurons * kHidden, 0.5f, 3);
  const std::vector<float> up = numbers(kNeurons * kHidden, 0.5f, 4);
  const std::vector<float> down = numbers(kHidden * kNeurons, 0.5f, 5);

  // The kept tokens have the smallest value norms: scores are their negatives.
  std::vector<float> norms(kTokens);
  flashu::value_norms(tensor(values.data(), FLASHU_F32, {1, kHeads, kTokens, kHeadSize}),
                      tensor(norms.data(), FLASHU_F32, {1, kTokens}));
  for (auto& norm : norms) norm = -norm;
  std::vector<int64_t> kept(kKept);
  std::vector<int32_t> count(1);
  const flashu_tensor index = tensor(kept.data(), FLASHU_I64, {kKept});
  flashu::select_topk(tensor(norms.data(), FLASHU_F32, {kTokens}), kKept, index,
                      tensor(count.data(), FLASHU_I32, {}));

  // Every third neuron, resolved once for many calls.
  std::vector<int64_t> neurons;
  for (int64_t i = 0; i < kNeurons; i += 3) neurons.push_back(i);
  std::vector<int32_t> list(neurons.size());
  const auto size = static_cast<int64_t>(neurons.size());
  const flashu_tensor listed = tensor(list.data(), FLASHU_I32, {size});
  const int32_t block = flashu::list_neurons(flashu::select_index(tensor(neurons.data(), FLASHU_I64, {size})),
                                             kNeurons, listed);

  std::vector<float> moved(kKept * kHidden), out(kKept * kHidden);
  const flashu_tensor rows = tensor(hidden.data(), FLASHU_F32, {kTokens, kHidden});
  flashu::gather_rows(rows, index, tensor(moved.data(), FLASHU_F32, {kKept, kHidden}));
  auto args = flashu::make_args<flashu::FfnArgs>();
  args.x = tensor(moved.data(), FLASHU_F32, {kKept, kHidden});
  args.w_gate = tensor(gate.data(), FLASHU_F32, {kNeurons, kHidden});
  args.w_up = tensor(up.data(), FLASHU_F32, {kNeurons, kHidden});
  args.w_down = tensor(down.data(), FLASHU_F32, {kHidden, kNeurons});
  args.selection = flashu::select_list(listed, block);
  args.out = tensor(out.data(), FLASHU_F32, {kKept, kHidden});
  flashu::gathered_ffn(args);
  flashu::scatter_add_rows(rows, index, args.out);

  std::vector<float> importance(kTokens);
  flashu::cosine_importance(tensor(before.data(), FLASHU_F32, {kTokens, kHidden}), rows, FLASHU_REDUCE_NONE,
                            tensor(importance.data(), FLASHU_F32, {kTokens}));

  for (const int64_t token : kept) std::printf("%d\n", static_cast<int>(token));
  for (const float value : hidden) std::printf("%.9g\n", value);
  for (const float value : importance) std::printf("%.9g\n", value);
}

}  // namespace

int main() {
  try {
    const flashu_parallel_backend pool = {pool_parallel_for, pool_threads};
    flashu_set_parallel_backend(&pool);
    run();
    std::fprintf(stderr, "chunks on the engine's threads: %d\n", static_cast<int>(pool_chunks));
  } catch (const std::exception& error) {  // flashu::Error: the argument, what was expected, what came
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
