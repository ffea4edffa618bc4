// Launches ops at given shapes on the machine for PTX and prints what each launch executed and moved, a line
// of JSON for each op. Values are whatever memory holds, except where addresses or branches depend on them.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "core/half.hpp"
#include "cuda/device.hpp"
#include "flashu/ffn.hpp"
#include "flashu/linear.hpp"
#include "flashu/norm.hpp"
#include "flashu/routing.hpp"
#include "flashu/step.hpp"
#include "ptx/counters.hpp"

namespace flashu::test {
namespace {

constexpr const char* kUsage =
    "usage: flashu_count_ops OP:NAME=NUMBER,NAME=NUMBER... ...\n"
    "\n"
    "Prints what every launch of the ops executes and moves. Set FLASHU_PTX_WHEN=eager FLASHU_PTX_VALUES=0.\n"
    "\n"
    "  ffn                rows, hidden, intermediate, neurons, by: run 0, list of eights 1, any list 2, list "
    "of 64 3\n"
    "  linear             rows, n, k\n"
    "  rms_norm           rows, width, modulated\n"
    "  add_rms_norm       rows, width\n"
    "  gate_add           rows, width\n"
    "  rotary_cache       rows, heads, kv_heads, head_dim\n"
    "  cosine_importance  rows, width\n"
    "  value_norms        rows, kv_heads, head_dim\n"
    "  select_topk        rows, keep\n"
    "  gather_rows        rows, keep, width\n"
    "  scatter_rows       rows, keep, width\n"
    "  neuron_norms       rows, width\n"
    "  guided_euler_step  channels, height\n"
    "  feature_delta      rows, width\n"
    "  taylor_update      rows, width\n"
    "  taylor_predict     rows, width\n"
    "\n"
    "example: flashu_count_ops ffn:rows=64,hidden=1536,intermediate=8960,neurons=7168,by=0\n";

// An op with its sizes, and what its tensors have to move.
class Case {
 public:
  explicit Case(const std::string& text) : text_(text) {
    const size_t colon = text.find(':');
    op = text.substr(0, colon);
    for (size_t at = colon; at != std::string::npos && at + 1 < text.size();) {
      const size_t next = text.find(',', at + 1);
      const std::string word = text.substr(at + 1, next - at - 1);
      const size_t equal = word.find('=');
      if (equal == std::string::npos) throw std::runtime_error("expected NAME=NUMBER, got " + word);
      sizes_[word.substr(0, equal)] = std::atoll(word.c_str() + equal + 1);
      at = next;
    }
  }
  int64_t operator[](const std::string& name) const {
    const auto found = sizes_.find(name);
    if (found == sizes_.end()) throw std::runtime_error(text_ + ": expected " + name);
    return found->second;
  }
  // A tensor in memory of the device that is read, written, or both.
  flashu_tensor tensor(flashu_dtype dtype, const std::vector<int64_t>& sizes, int times = 1) {
    int64_t count = 1;
    for (const int64_t size : sizes) count *= size;
    const int64_t bytes = count * (dtype == FLASHU_I64 ? 8 : dtype == FLASHU_BF16 ? 2 : 4);
    memory_.emplace_back(device_allocate(static_cast<size_t>(bytes)), device_free);
    bytes_ += times * bytes;
    flashu_tensor t = flashu::tensor(memory_.back().get(), dtype, sizes);
    t.device = FLASHU_DEVICE_CUDA(0);
    return t;
  }
  flashu_tensor read(const std::vector<int64_t>& sizes) { return tensor(FLASHU_BF16, sizes); }
  flashu_tensor written(const std::vector<int64_t>& sizes) { return tensor(FLASHU_BF16, sizes); }
  flashu_tensor updated(const std::vector<int64_t>& sizes) { return tensor(FLASHU_BF16, sizes, 2); }
  template <class T>
  flashu_tensor holding(flashu_dtype dtype, const std::vector<T>& values) {
    flashu_tensor t = tensor(dtype, {static_cast<int64_t>(values.size())});
    copy_to_device(t.data, values.data(), values.size() * sizeof(T));
    return t;
  }
  void* workspace(uint64_t bytes) {
    memory_.emplace_back(device_allocate(std::max<uint64_t>(bytes, 1)), device_free);
    return memory_.back().get();
  }
  void more_bytes(int64_t bytes) { bytes_ += bytes; }
  int64_t bytes() const { return bytes_; }
  const std::string& text() const { return text_; }

  std::string op;

 private:
  std::string text_;
  std::map<std::string, int64_t> sizes_;
  std::vector<std::shared_ptr<void>> memory_;
  int64_t bytes_ = 0;
};

// `keep` of `count` numbers, ascending, the same every time.
template <class T>
std::vector<T> some_of(int64_t count, int64_t keep) {
  std::mt19937 random(1);
  std::vector<T> kept;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t left = count - i, wanted = keep - static_cast<int64_t>(kept.size());
    if (static_cast<int64_t>(random() % static_cast<uint64_t>(left)) < wanted)
      kept.push_back(static_cast<T>(i));
  }
  return kept;
}

void ffn(Case& c) {
  const int64_t rows = c["rows"], hidden = c["hidden"], intermediate = c["intermediate"], n = c["neurons"],
                by = c["by"];
  auto args = make_args<FfnArgs>();
  args.x = c.read({rows, hidden});
  args.w_gate = c.read({intermediate, hidden});
  args.w_up = c.read({intermediate, hidden});
  args.w_down = c.read({hidden, intermediate});
  c.more_bytes(-3 * 2 * (intermediate - n) * hidden);
  args.residual = c.read({rows, hidden});
  args.out = c.written({rows, hidden});
  const std::vector<int64_t> run = {0, n};
  if (by == 0) {
    args.selection = select_runs(run);
  } else {
    std::vector<int32_t> neurons;
    const int32_t block = by == 3 ? 64 : by == 1 ? 8 : 1;
    for (const auto start : some_of<int32_t>(intermediate / block, n / block)) {
      for (int32_t i = 0; i < block; ++i) neurons.push_back(start * block + i);
    }
    args.selection = select_list(c.holding(FLASHU_I32, neurons), block);
  }
  uint64_t bytes = 0;
  check(flashu_gathered_ffn_workspace(&args, &bytes));
  args.workspace = c.workspace(bytes);
  args.workspace_bytes = bytes;
  gathered_ffn(args);
}

void linear(Case& c) {
  const int64_t rows = c["rows"], n = c["n"], k = c["k"];
  auto args = make_args<LinearArgs>();
  args.x = c.read({rows, k});
  args.weight = c.read({n, k});
  args.bias = c.read({n});
  args.out = c.written({rows, n});
  uint64_t bytes = 0;
  check(flashu_linear_workspace(&args, &bytes));
  args.workspace = c.workspace(bytes);
  args.workspace_bytes = bytes;
  flashu::linear(args);
}

void norms(Case& c) {
  const int64_t rows = c["rows"], width = c["width"];
  if (c.op == "gate_add") {
    const flashu_tensor residual = c.updated({1, rows, width}), y = c.read({1, rows, width});
    gate_add(residual, y, c.read({1, width}));
  } else if (c.op == "add_rms_norm") {
    const flashu_tensor x = c.updated({rows, width}), residual = c.updated({rows, width});
    add_rms_norm(x, residual, c.read({width}), 1e-6);
  } else if (c["modulated"] != 0) {
    const flashu_tensor x = c.read({1, rows, width}), out = c.written({1, rows, width});
    const flashu_tensor shift = c.read({1, width}), scale = c.read({1, width});
    rms_norm(x, c.read({width}), 1e-6, out, shift, scale);
  } else {
    const flashu_tensor x = c.read({rows, width}), out = c.written({rows, width});
    rms_norm(x, c.read({width}), 1e-6, out);
  }
}

void rotary(Case& c) {
  const int64_t n = c["rows"], heads = c["heads"], kv = c["kv_heads"], d = c["head_dim"];
  RotaryCacheArgs args{};
  args.query = c.read({1, n, heads, d});
  args.key = c.read({1, n, kv, d});
  args.value = c.read({1, n, kv, d});
  args.cos = c.read({1, n, d});
  args.sin = c.read({1, n, d});
  args.keys = c.written({1, n, kv, d});
  args.values = c.written({1, n, kv, d});
  args.out = c.written({1, heads, n, d});
  rotary_cache(args);
}

void routing(Case& c) {
  const int64_t rows = c["rows"];
  if (c.op == "cosine_importance") {
    const flashu_tensor in = c.read({rows, c["width"]}), out = c.read({rows, c["width"]});
    cosine_importance(in, out, FLASHU_REDUCE_NONE, c.tensor(FLASHU_F32, {rows}));
  } else if (c.op == "value_norms") {
    const flashu_tensor v = c.read({1, c["kv_heads"], rows, c["head_dim"]});
    value_norms(v, c.tensor(FLASHU_F32, {1, rows}));
  } else if (c.op == "select_topk") {
    std::mt19937 random(1);
    std::normal_distribution<float> value;
    std::vector<float> scores;
    for (int64_t i = 0; i < rows; ++i) scores.push_back(value(random));
    const flashu_tensor of = c.holding(FLASHU_F32, scores);
    const flashu_tensor index = c.tensor(FLASHU_I64, {c["keep"]});
    flashu_tensor count = c.tensor(FLASHU_I32, {1});
    count.ndim = 0;
    select_topk(of, c["keep"], index, count);
  } else {
    const flashu_tensor all = c.tensor(FLASHU_BF16, {rows, c["width"]}, 0);
    const flashu_tensor index = c.holding(FLASHU_I64, some_of<int64_t>(rows, c["keep"]));
    const flashu_tensor moved = c.updated({c["keep"], c["width"]});
    (c.op == "gather_rows" ? gather_rows : scatter_rows)(all, index, moved, nullptr);
  }
}

void step(Case& c) {
  if (c.op == "guided_euler_step") {
    const int64_t channels = c["channels"], height = c["height"];
    EulerStepArgs args{};
    args.latents = c.updated({1, channels, height, height});
    args.v = c.read({2, height * height, channels});
    args.s = c.holding(FLASHU_F32, std::vector<float>{5.0f});
    args.dt = c.holding(FLASHU_F32, std::vector<float>{0.02f});
    args.step = c.holding(FLASHU_I64, std::vector<int64_t>{0});
    return guided_euler_step(args);
  }
  const int64_t rows = c["rows"], width = c["width"];
  if (c.op == "neuron_norms") {
    const flashu_tensor acc = c.tensor(FLASHU_F32, {width}, 2);
    return neuron_norms(acc, c.read({rows, width}));
  }
  if (c.op == "feature_delta") {
    auto args = make_args<flashu_feature_delta_args>();
    args.a = c.read({rows, width});
    args.b = c.read({rows, width});
    args.out = c.tensor(FLASHU_F32, {3});
    uint64_t bytes = 0;
    check(flashu_feature_delta_workspace(&args, &bytes));
    return feature_delta(args.a, args.b, args.out, {c.workspace(bytes), bytes});
  }
  const flashu_tensor state =
      c.op == "taylor_update" ? c.updated({3, rows, width}) : c.read({3, rows, width});
  if (c.op == "taylor_update") c.more_bytes(-2 * rows * width);  // the last difference is not read
  if (c.op == "taylor_update") return taylor_update(state, c.read({rows, width}), 2.0, 2);
  taylor_predict(state, 1.0, 3, c.written({rows, width}));
}

void run(Case& c) {
  const std::map<std::string, void (*)(Case&)> ops = {
      {"ffn", ffn},
      {"linear", linear},
      {"rms_norm", norms},
      {"add_rms_norm", norms},
      {"gate_add", norms},
      {"rotary_cache", rotary},
      {"cosine_importance", routing},
      {"value_norms", routing},
      {"select_topk", routing},
      {"gather_rows", routing},
      {"scatter_rows", routing},
      {"neuron_norms", step},
      {"guided_euler_step", step},
      {"feature_delta", step},
      {"taylor_update", step},
      {"taylor_predict", step},
  };
  const auto found = ops.find(c.op);
  if (found == ops.end()) throw std::runtime_error("no such op: " + c.op);
  std::vector<std::string> launches;
  ptx::count_listener() = [&](const ptx::Launch& l, const ptx::Counts& counts) {
    launches.push_back(ptx::to_json(l, counts));
  };
  found->second(c);
  device_synchronize();
  std::printf("{\"case\": \"%s\", \"bytes\": %lld, \"launches\": [", c.text().c_str(),
              static_cast<long long>(c.bytes()));
  for (size_t i = 0; i < launches.size(); ++i) std::printf("%s%s", i == 0 ? "" : ", ", launches[i].c_str());
  std::printf("]}\n");
  std::fflush(stdout);
}

}  // namespace
}  // namespace flashu::test

int main(int argc, char** argv) {
  if (argc < 2 || std::strcmp(argv[1], "--help") == 0 || std::strcmp(argv[1], "-h") == 0) {
    std::fputs(flashu::test::kUsage, argc < 2 ? stderr : stdout);
    return argc < 2 ? 2 : 0;
  }
  try {
    for (int i = 1; i < argc; ++i) {
      flashu::test::Case c(argv[i]);
      flashu::test::run(c);
    }
  } catch (const std::exception& e) {
    std::fprintf(stderr, "flashu_count_ops: %s\n", e.what());
    return 1;
  }
  return 0;
}
