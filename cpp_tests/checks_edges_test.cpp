// What must be refused, at the very edge of being right: memory that overlaps in one element, workspaces one
// byte too small, indices that repeat. Nothing is written, and what is just right is accepted.
#include "flashu/ffn.hpp"
#include "flashu/norm.hpp"
#include "flashu/routing.hpp"
#include "flashu/step.hpp"
#include "guarded.hpp"

namespace flashu::test {
namespace {

// Expects an error that has `part` in it.
template <class Call>
void expect_refused(const char* part, const Call& call) {
  EXPECT_NE(error_of(call).find(part), std::string::npos) << part << ": '" << error_of(call) << "'";
}

flashu_tensor floats(float* data, const std::vector<int64_t>& sizes,
                     const std::vector<int64_t>& strides = {}) {
  return tensor(data, FLASHU_F32, sizes, strides);
}

TEST(Checks, MemoryThatOverlapsInOneElement) {
  std::vector<float> memory(32, 1.0f);
  const auto x = floats(memory.data(), {2, 4}), weight = floats(memory.data() + 24, {4});
  expect_refused("out", [&] { rms_norm(x, weight, 0.0, floats(memory.data() + 7, {2, 4})); });
  expect_refused("out", [&] { rms_norm(x, weight, 0.0, floats(memory.data() + 17, {2, 4})); });
  EXPECT_EQ(error_of([&] { rms_norm(x, weight, 0.0, floats(memory.data() + 8, {2, 4})); }), "");
  EXPECT_EQ(error_of([&] { rms_norm(x, weight, 0.0, floats(memory.data() + 16, {2, 4})); }), "");
}

TEST(Checks, RowsThatShareOneElement) {
  std::vector<float> memory(32, 1.0f), x(8, 2.0f), weight(4, 1.0f);
  const auto in = floats(x.data(), {2, 4}), w = floats(weight.data(), {4});
  expect_refused("do not share memory", [&] { rms_norm(in, w, 0.0, floats(memory.data(), {2, 4}, {3, 1})); });
  EXPECT_EQ(error_of([&] { rms_norm(in, w, 0.0, floats(memory.data(), {2, 4}, {4, 1})); }), "");
}

TEST(Checks, DimensionsThatDoNotFold) {
  std::vector<float> memory(64, 1.0f), weight(4, 1.0f), out(64);
  const auto w = floats(weight.data(), {4}), to = floats(out.data(), {2, 2, 4});
  expect_refused("fold", [&] { rms_norm(floats(memory.data(), {2, 2, 4}, {17, 4, 1}), w, 0.0, to); });
  EXPECT_EQ(error_of([&] { rms_norm(floats(memory.data(), {2, 2, 4}, {10, 5, 1}), w, 0.0, to); }), "");
}

TEST(Checks, ElementsThatAreNotAligned) {
  alignas(8) char memory[80] = {};
  std::vector<float> weight(4, 1.0f), out(8);
  const auto w = floats(weight.data(), {4}), to = floats(out.data(), {2, 4});
  for (const int off : {1, 2, 3}) {
    expect_refused("aligned", [&] { rms_norm(tensor(memory + off, FLASHU_F32, {2, 4}), w, 0.0, to); });
  }
}

TEST(Checks, WorkspacesOfJustTheSize) {
  const int64_t rows = 30, hidden = 40, neurons = 50, width = 60;
  Guarded<float> x({rows, hidden}), gate({neurons, hidden}), up({neurons, hidden}), down({width, neurons});
  x.integers(1, -2, 2), gate.integers(2, -2, 2), up.integers(3, -2, 2), down.integers(4, -2, 2);
  for (const int32_t threads : {1, 7}) {
    const Threads pretended(threads);
    Guarded<float> out({rows, width}), expected({rows, width});
    auto args = make_args<FfnArgs>();
    args.x = x, args.w_gate = gate, args.w_up = up, args.w_down = down, args.out = expected;
    gathered_ffn(args);
    args.out = out;
    uint64_t bytes = 0;
    ASSERT_EQ(flashu_gathered_ffn_workspace(&args, &bytes), FLASHU_OK);
    std::vector<unsigned char> memory(bytes + 3 * 4096, 0xff);
    const auto address = (reinterpret_cast<uintptr_t>(memory.data()) + 4095) / 4096 * 4096;
    unsigned char* const begin = memory.data() + (address - reinterpret_cast<uintptr_t>(memory.data()));
    args.workspace = begin, args.workspace_bytes = bytes - 1;
    EXPECT_EQ(flashu_gathered_ffn(&args), FLASHU_WORKSPACE);
    args.workspace = begin + 32, args.workspace_bytes = bytes;
    EXPECT_EQ(flashu_gathered_ffn(&args), FLASHU_WORKSPACE);
    EXPECT_TRUE(std::all_of(memory.begin(), memory.end(), [](unsigned char b) { return b == 0xff; }));
    args.workspace = begin;
    ASSERT_EQ(flashu_gathered_ffn(&args), FLASHU_OK) << flashu_last_error();
    EXPECT_TRUE(out.same(expected));
    for (unsigned char* p = memory.data(); p != memory.data() + memory.size(); ++p)
      ASSERT_TRUE((p >= begin && p < begin + bytes) || *p == 0xff) << "written " << p - begin;
  }
}

TEST(Checks, AStepsTensorsAreItsOwn) {
  std::vector<float> latents(32, 1.0f), v(16, 2.0f), velocity(16);
  std::vector<float> table(2, 1.0f);
  const int64_t at = 0;
  EulerStepArgs good{};
  good.latents = floats(latents.data(), {1, 4, 2, 2});
  good.v = floats(v.data(), {1, 4, 4});
  good.s = floats(table.data(), {2});
  good.dt = good.s;
  good.step = tensor(&at, FLASHU_I64, {});
  good.velocity = floats(velocity.data(), {1, 4, 2, 2});
  const auto refused = [&](const char* part, auto change) {
    EulerStepArgs args = good;
    change(args);
    expect_refused(part, [&] { guided_euler_step(args); });
  };
  refused("velocity: expected memory", [&](EulerStepArgs& a) { a.velocity = a.latents; });
  refused("velocity: expected memory", [&](EulerStepArgs& a) { a.velocity.data = latents.data() + 15; });
  refused("velocity: expected memory", [&](EulerStepArgs& a) { a.velocity.data = v.data(); });
  refused("latents: expected memory", [&](EulerStepArgs& a) { a.latents.data = v.data(); });
  refused("dt: expected size 2", [&](EulerStepArgs& a) { a.dt.sizes[0] = 1; });
  for (const float value : latents) EXPECT_EQ(value, 1.0f);
  EXPECT_EQ(error_of([&] { guided_euler_step(good); }), "");
}

TEST(Checks, SelectionsAndMovesDoNotOverlap) {
  std::vector<int64_t> memory(64, 0);
  const auto longs = [&](int64_t at, const std::vector<int64_t>& sizes) {
    return tensor(memory.data() + at, FLASHU_I64, sizes);
  };
  const auto counts = [&](int64_t at) { return tensor(memory.data() + at, FLASHU_I32, {2}); };
  const auto scores = tensor(memory.data() + 40, FLASHU_F32, {2, 4});
  expect_refused("index", [&] { select_topk(scores, 2, longs(0, {2, 2}), counts(3)); });
  expect_refused("count", [&] { select_topk(scores, 2, longs(0, {2, 2}), counts(43)); });
  EXPECT_EQ(error_of([&] { select_topk(scores, 2, longs(0, {2, 2}), counts(4)); }), "");
  std::vector<float> moved(8);
  const auto rows = tensor(memory.data() + 8, FLASHU_F32, {4, 4});
  expect_refused("rows", [&] { scatter_rows(rows, longs(15, {2}), floats(moved.data(), {2, 4})); });
  EXPECT_EQ(error_of([&] { scatter_rows(rows, longs(16, {2}), floats(moved.data(), {2, 4})); }), "");
}

TEST(Checks, AnFfnsTensorsAreItsOwn) {
  std::vector<float> x(6, 1.0f), w(12, 1.0f), down(9, 1.0f), residual(9, 1.0f), out(9, 5.0f), norms(3);
  FfnArgs good{};
  good.x = floats(x.data(), {3, 2});
  good.w_gate = good.w_up = floats(w.data(), {3, 2});
  good.w_down = floats(down.data(), {3, 3});
  good.residual = floats(residual.data(), {3, 3});
  good.out = floats(out.data(), {3, 3});
  good.norms = floats(norms.data(), {3});
  const auto refused = [&](const char* part, auto change) {
    FfnArgs args = good;
    change(args);
    expect_refused(part, [&] { gathered_ffn(args); });
  };
  refused("norms: expected memory", [&](FfnArgs& a) { a.norms.data = out.data() + 6; });
  refused("norms: expected memory", [&](FfnArgs& a) { a.norms.data = residual.data(); });
  refused("out: expected memory", [&](FfnArgs& a) { a.out = a.residual; });
  refused("w_down: expected size 3", [&](FfnArgs& a) { a.w_down.sizes[1] = 2; });
  const Guarded<int64_t> twice = Guarded<int64_t>({2}).fill([](int64_t, int64_t) { return 0; });
  refused("at most once", [&](FfnArgs& a) {
    a.selection = select_index(twice);
    a.norms = floats(norms.data(), {2});
  });
  const std::vector<int64_t> runs = {0, 2, 1, 1};
  refused("runs: expected ascending", [&](FfnArgs& a) { a.selection = select_runs(runs); });
  for (const float value : out) EXPECT_EQ(value, 5.0f);
  EXPECT_EQ(error_of([&] { gathered_ffn(good); }), "");
}

TEST(Checks, QueriesAreNotWrittenOverTheCaches) {
  std::vector<float> given(8, 1.0f), keys(8), values(8), out(8);
  RotaryCacheArgs good{};
  good.query = good.key = good.value = floats(given.data(), {1, 2, 2, 2});
  std::vector<float> angles(4, 1.0f);
  good.cos = good.sin = floats(angles.data(), {1, 2, 2});
  good.keys = floats(keys.data(), {1, 2, 2, 2});
  good.values = floats(values.data(), {1, 2, 2, 2});
  good.out = floats(out.data(), {1, 2, 2, 2});
  for (std::vector<float>* memory : {&keys, &values, &given}) {
    RotaryCacheArgs args = good;
    args.out.data = memory->data();
    expect_refused("out: expected memory", [&] { rotary_cache(args); });
  }
  EXPECT_EQ(error_of([&] { rotary_cache(good); }), "");
}

// A selection resolved once: in order, with its blocks, or refused.
TEST(Checks, ListsOfNeurons) {
  const auto listed = [](const std::vector<int64_t>& runs, int64_t limit, std::vector<int32_t>& to) {
    const auto count = static_cast<int64_t>(to.size());
    return list_neurons(select_runs(runs), limit, tensor(to.data(), FLASHU_I32, {count}));
  };
  std::vector<int32_t> list(16, -1);
  EXPECT_EQ(listed({3, 8, 20, 8}, 28, list), 1) << "3 is no multiple of eight";
  for (int32_t i = 0; i < 16; ++i) EXPECT_EQ(list[static_cast<size_t>(i)], i < 8 ? 3 + i : 12 + i);
  EXPECT_EQ(listed({0, 8, 16, 8}, 28, list), 8);
  EXPECT_EQ(listed({0, 1, 8, 15}, 28, list), 1) << "the first eight are not neighbours";
  std::vector<int32_t> twelve(12), many(192);
  EXPECT_EQ(listed({0, 12}, 28, twelve), 1) << "twelve are not eights";
  EXPECT_EQ(listed({8, 64, 80, 128}, 300, many), 64);
  EXPECT_EQ(listed({8, 72, 88, 120}, 300, many), 8);
  expect_refused("inside [0, 27)", [&] { listed({3, 8, 20, 8}, 27, list); });
  expect_refused("expected size 16", [&] { listed({3, 8, 20, 8}, 28, twelve); });
  std::vector<int64_t> index = {5, 3, 5};
  std::vector<int32_t> three(3);
  const auto numbers = tensor(index.data(), FLASHU_I64, {3});
  const auto to = tensor(three.data(), FLASHU_I32, {3});
  expect_refused("again at position 2", [&] { list_neurons(select_index(numbers), 6, to); });
  index[2] = 0;
  EXPECT_EQ(list_neurons(select_index(numbers), 6, to), 1);
  EXPECT_EQ(three, (std::vector<int32_t>{5, 3, 0}));
}

TEST(Checks, ListsAreOfOneTypeWithoutGapsAndInside) {
  std::vector<float> x(4, 1.0f), weights(24, 1.0f), out(3);
  std::vector<int32_t> narrow = {5, 3, 0, 0, 0, 0};
  std::vector<int64_t> wide = {5, 3, 0};
  const auto run = [&](const flashu_tensor& list, int32_t block = 1) {
    SwigluArgs args{};
    args.x = floats(x.data(), {1, 4});
    args.w_gate = args.w_up = floats(weights.data(), {6, 4});
    args.out = floats(out.data(), {1, 3});
    args.selection = select_list(list, block);
    gathered_swiglu(args);
  };
  expect_refused("expected int32", [&] { run(tensor(wide.data(), FLASHU_I64, {3})); });
  expect_refused("stride 1", [&] { run(tensor(narrow.data(), FLASHU_I32, {3}, {2})); });
  EXPECT_EQ(error_of([&] { run(tensor(narrow.data(), FLASHU_I32, {3})); }), "");
  for (const int32_t block : {0, 2, -8}) {
    expect_refused("expected 1, 8 or 64", [&] { run(tensor(narrow.data(), FLASHU_I32, {3}), block); });
  }
  expect_refused("whole blocks of 8", [&] { run(tensor(narrow.data(), FLASHU_I32, {3}), 8); });
  for (const int32_t outside : {-1, 6}) {
    narrow[1] = outside;
    expect_refused("[0, 6)", [&] { run(tensor(narrow.data(), FLASHU_I32, {3})); });
  }
}

}  // namespace
}  // namespace flashu::test
