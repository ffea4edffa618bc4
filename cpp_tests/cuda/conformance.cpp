// Prints a hash of what every kernel makes of numbers that leave nothing to rounding. Compiled for the
// emulator and for a GPU: the lines must be identical, and then what the emulator's tests found holds for the
// device half of the primitives too.
#include <cstdio>

#include "cuda/support.hpp"
#include "flashu/ffn.hpp"
#include "flashu/linear.hpp"
#include "flashu/norm.hpp"
#include "flashu/routing.hpp"
#include "flashu/step.hpp"

namespace flashu::test {
namespace {

void print(const std::string& name, const void* data, size_t bytes) {
  uint64_t hash = 1469598103934665603ull;
  for (size_t i = 0; i < bytes; ++i)
    hash = (hash ^ static_cast<const unsigned char*>(data)[i]) * 1099511628211ull;
  std::printf("%-60s %016llx\n", name.c_str(), static_cast<unsigned long long>(hash));
}

template <class T>
void print(const std::string& name, const Guarded<T>& got) {
  std::vector<T> values;
  for (int64_t i = 0; i < got.count(); ++i) values.push_back(got[i]);
  // -0 and 0 are one number.
  if constexpr (!std::is_integral_v<T>) {
    for (T& value : values) {
      if (to_float(value) == 0) value = from_float<T>(0.0f);
    }
  }
  print(name, values.data(), values.size() * sizeof(T));
}

// Gates of more than 104 pass SiLU unchanged, and products of a few bits add up exactly: every kernel, every
// order of summing and every storage type must give the same numbers.
template <class T>
void ffn(const std::string& type, int64_t rows, int64_t hidden, int64_t intermediate, int64_t width,
         bool listed) {
  std::mt19937 random(static_cast<uint32_t>(rows * 31 + hidden * 7 + intermediate));
  const auto sample = [&](int low, int high) {
    return from_float<T>(static_cast<float>(std::uniform_int_distribution<int>(low, high)(random)));
  };
  Guarded<T> x({rows, hidden});
  Guarded<T> gate({intermediate, hidden});
  Guarded<T> up({intermediate, hidden});
  Guarded<T> down({width, intermediate});
  x.fill([&](int64_t) { return sample(2, 3); });
  gate.fill([&](int64_t) { return sample(2, 3); });
  up.fill([&](int64_t i) {
    return i % hidden == i / hidden * 13 % hidden ? sample(-1, 1) : from_float<T>(0.0f);
  });
  down.fill([&](int64_t) { return sample(-3, 3); });
  auto residual = whole<T>({rows, width}, 9);
  Guarded<int32_t> index({intermediate * 3 / 4});
  index.fill([&](int64_t i) { return static_cast<int32_t>((i * 7 + 3) % intermediate); });
  const std::vector<int64_t> run = {8, intermediate - 16};
  Guarded<T> out({rows, width});
  FfnArgs args{};
  args.struct_size = sizeof args;
  args.x = x.upload();
  args.w_gate = gate.upload();
  args.w_up = up.upload();
  args.w_down = down.upload();
  args.selection = listed ? select_index(index.upload()) : select_runs(run);
  args.residual = residual.upload();
  args.out = out.upload();
  uint64_t bytes = 0;
  check(flashu_gathered_ffn_workspace(&args, &bytes));
  const DeviceWorkspace workspace(bytes);
  args.workspace = workspace.get().data;
  args.workspace_bytes = workspace.get().bytes;
  gathered_ffn(args);
  device_synchronize();
  print("ffn " + type + " " + std::to_string(rows) + " x " + std::to_string(hidden) + " x " +
            std::to_string(intermediate) + (listed ? " index" : " run"),
        out.download());
}

template <class T>
void linear(const std::string& type, int64_t rows, int64_t n, int64_t k) {
  auto x = whole<T>({rows, k}, 1);
  auto weight = whole<T>({n, k}, 2);
  auto bias = whole<T>({n}, 3);
  auto residual = whole<T>({rows, n}, 4);
  Guarded<T> out({rows, n});
  auto args = make_args<LinearArgs>();
  args.x = x.upload();
  args.weight = weight.upload();
  args.bias = bias.upload();
  args.residual = residual.upload();
  args.out = out.upload();
  check(flashu_linear_workspace(&args, &args.workspace_bytes));
  const DeviceWorkspace workspace(args.workspace_bytes);
  args.workspace = workspace.get().data;
  flashu::linear(args);
  device_synchronize();
  print("linear " + type + " " + std::to_string(rows) + " x " + std::to_string(n) + " x " + std::to_string(k),
        out.download());
}

template <class T>
void all_of(const std::string& type) {
  for (const bool listed : {false, true}) {
    for (const int64_t rows : {int64_t{1}, int64_t{9}, int64_t{17}, int64_t{130}})
      ffn<T>(type, rows, 72, 136, 40, listed);
    ffn<T>(type, 40, 200, 400, 264, listed);
    ffn<T>(type, 33, 61, 77, 29, listed);  // rows that are not aligned
  }
  for (const int64_t rows : {1, 9, 17}) linear<T>(type, rows, 40, 136);
  linear<T>(type, 5, 29, 45);
  const auto residual = whole<T>({3, 5, 64}, 1);
  auto sum = residual;
  auto y = whole<T>({3, 5, 64}, 2);
  auto gate = whole<T>({3, 64}, 3);
  gate_add(sum.upload(), y.upload(), gate.upload());
  device_synchronize();
  print("gate_add " + type, sum.download());

  auto query = whole<T>({2, 5, 3, 64}, 10);
  auto key = whole<T>({2, 5, 1, 64}, 11);
  auto cos = whole<T>({1, 5, 64}, 12);
  auto sin = whole<T>({1, 5, 64}, 13);
  auto keys = whole<T>({2, 6, 1, 64}, 14);
  auto values = whole<T>({2, 6, 1, 64}, 15);
  Guarded<int64_t> start({2});
  start[0] = -1;
  start[1] = 3;
  Guarded<T> rotated({2, 3, 5, 64});
  RotaryCacheArgs rotary{};
  rotary.query = query.upload();
  rotary.key = rotary.value = key.upload();
  rotary.cos = cos.upload();
  rotary.sin = sin.upload();
  rotary.keys = keys.upload();
  rotary.values = values.upload();
  rotary.start = start.upload();
  rotary.out = rotated.upload();
  rotary_cache(rotary);
  device_synchronize();
  print("rotary_cache " + type, rotated.download());
  print("rotary_cache keys " + type, keys.download());

  Guarded<T> ones({4, 2048});
  ones.fill([](int64_t i) { return from_float<T>(i % 2 == 0 ? 2.0f : -2.0f); });
  auto weight = whole<T>({2048}, 4);
  Guarded<T> normed({4, 2048});
  const flashu_tensor to = normed.upload();
  rms_norm(ones.upload(), weight.upload(), 0.0, to);
  device_synchronize();
  print("rms_norm " + type, normed.download());

  auto scores = whole<T>({3, 1500}, 5);
  Guarded<int64_t> best({3, 400});
  Guarded<int32_t> count({3});
  const flashu_tensor i = best.upload();
  const flashu_tensor c = count.upload();
  select_topk(scores.upload(), 400, i, c);
  device_synchronize();
  print("select_topk " + type, best.download());
  select_threshold(scores.upload(), 2.0, i, c);
  device_synchronize();
  print("select_threshold " + type, best.download());

  auto rows = whole<T>({9, 72}, 6);
  Guarded<int64_t> index({6});
  const int64_t entries[] = {3, 8, -1, 3, 0, 3};
  for (int e = 0; e < 6; ++e) index[e] = entries[e];
  auto moved = whole<T>({6, 72}, 7);
  scatter_add_rows(rows.upload(), index.upload(), moved.upload());
  device_synchronize();
  print("scatter_add_rows " + type, rows.download());

  auto latents = whole<T>({2, 5, 3, 7}, 8);
  auto v = whole<T>({4, 21, 5}, 9);
  Guarded<float> s({2});
  Guarded<float> dt({2});
  Guarded<int64_t> step({1});
  s[0] = s[1] = 2;
  dt[0] = dt[1] = 0.5f;
  step[0] = 1;
  EulerStepArgs euler{};
  euler.latents = latents.upload();
  euler.v = v.upload();
  euler.s = s.upload();
  euler.dt = dt.upload();
  euler.step = step.upload();
  guided_euler_step(euler);
  device_synchronize();
  print("guided_euler_step " + type, latents.download());

  auto state = whole<T>({3, 100}, 10);
  auto feature = whole<T>({100}, 11);
  Guarded<T> ahead({100});
  const flashu_tensor on_device = state.upload();
  taylor_update(on_device, feature.upload(), 2.0, 2);
  const flashu_tensor result = ahead.upload();
  taylor_predict(on_device, 2.0, 3, result);
  device_synchronize();
  print("taylor " + type, ahead.download());
}

}  // namespace
}  // namespace flashu::test

int main() {
  using namespace flashu;
  const std::string reason = test::why_no_device();
  if (!reason.empty()) {
    std::fprintf(stderr, "%s\n", reason.c_str());
    return 1;
  }
  test::use_schedule(1);
  try {
    test::all_of<float>("float32");
    test::all_of<bfloat16>("bfloat16");
    test::all_of<float16>("float16");
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
