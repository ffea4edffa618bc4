// The gathered FFN on the device against a reference in double: every kernel, layout and selection; exact
// integers; rows that do not depend on each other; neurons left out that hold anything.
#include "flashu/ffn.hpp"

#include <algorithm>
#include <limits>
#include <numeric>
#include <optional>

#include "core/ffn_choice.hpp"
#include "cuda/ffn.hpp"
#include "cuda/support.hpp"

namespace flashu::test {
namespace {

// Which neurons, in each of the ways that the API has.
struct Chosen {
  std::string name;
  std::optional<std::vector<int64_t>> runs;
  std::optional<std::vector<int64_t>> index;
  bool wide_index = false;
  bool resolved = false;  // by list_neurons, before the call
  int32_t block = 8;      // of runs, what list_neurons says

  std::vector<int64_t> list(int64_t intermediate) const {
    if (index) return *index;
    std::vector<int64_t> out;
    if (!runs) {
      out.resize(static_cast<size_t>(intermediate));
      std::iota(out.begin(), out.end(), 0);
      return out;
    }
    for (size_t i = 0; i < runs->size(); i += 2) {
      for (int64_t j = 0; j < (*runs)[i + 1]; ++j) out.push_back((*runs)[i] + j);
    }
    return out;
  }
};

std::vector<int64_t> shuffled(int64_t count, int64_t limit, uint32_t seed) {
  std::vector<int64_t> all(static_cast<size_t>(limit));
  std::iota(all.begin(), all.end(), 0);
  std::shuffle(all.begin(), all.end(), std::mt19937(seed));
  all.resize(static_cast<size_t>(count));
  return all;
}

std::vector<Chosen> selections(int64_t intermediate) {
  return {{"all", {}, {}},
          {"first range", {{0, intermediate * 4 / 5 / 8 * 8}}, {}},
          {"odd range", {{13, intermediate - 20}}, {}},
          {"runs of eights", {{8, 24, 40, 64, 120, intermediate / 8 * 8 - 128}}, {}},
          {"runs", {{1, 5, 7, 30, 60, 41}}, {}},
          {"index", {}, {shuffled(intermediate * 3 / 4, intermediate, 1)}},
          {"wide index", {}, {shuffled(77, intermediate, 2)}, true},
          {"list of eights", {{8, 24, 40, 64, 120, intermediate / 8 * 8 - 128}}, {}, false, true},
          {"list", {}, {shuffled(intermediate * 3 / 4, intermediate, 1)}, false, true},
          {"eights from anywhere", {{1, 8, 20, 16}}, {}},
          {"runs of 64", {{0, 64, 72, 64}}, {}},
          {"list of 64", {{0, 64, 72, 64}}, {}, false, true, 64},
          {"none", {std::vector<int64_t>{}}, {}}};
}

template <class T>
struct Operands {
  Guarded<T> x, gate, up, down, residual;
  int64_t rows, hidden, intermediate, width;

  // `padding` behind rows and `offset` off alignment put the operands outside what TMA and cp.async take.
  Operands(int64_t m, int64_t k, int64_t i, int64_t n, int64_t padding = 0, int64_t offset = 0)
      : x(normal<T>({m, k}, 1, padding, 1, offset)),
        gate(normal<T>({i, k}, 2, padding, 1 / std::sqrt(static_cast<float>(k)), offset)),
        up(normal<T>({i, k}, 3, padding, 1 / std::sqrt(static_cast<float>(k)), offset)),
        down(normal<T>({n, i}, 4, padding, 1 / std::sqrt(static_cast<float>(i)), offset)),
        residual(normal<T>({m, n}, 5, padding)),
        rows(m),
        hidden(k),
        intermediate(i),
        width(n) {}
};

double silu(double x) { return x / (1 + std::exp(-x)); }

double dot(const double* a, const double* b, int64_t n) {
  double sum = 0;
  for (int64_t k = 0; k < n; ++k) sum += a[k] * b[k];
  return sum;
}

// The product in between, rounded to T as the device stores it.
template <class T>
std::vector<double> reference_h(const Operands<T>& o, const std::vector<int64_t>& list) {
  const std::vector<double> x = o.x.values(), gate = o.gate.values(), up = o.up.values();
  std::vector<double> h;
  for (int64_t r = 0; r < o.rows; ++r) {
    const double* const row = x.data() + r * o.hidden;
    for (const int64_t n : list) {
      const double value =
          silu(dot(row, gate.data() + n * o.hidden, o.hidden)) * dot(row, up.data() + n * o.hidden, o.hidden);
      h.push_back(static_cast<double>(to_float(from_float<T>(static_cast<float>(value)))));
    }
  }
  return h;
}

// How far a result may be off: one rounding, and a small part of the size that a sum of such terms has by
// chance (a wrong or missing term is a whole one of them).
template <class T>
constexpr double kNoise = std::is_same_v<T, bfloat16>  ? 0.02
                          : std::is_same_v<T, float16> ? 0.004
                                                       : 1e-5;

template <class T>
void expect_down(const Guarded<T>& got, const std::vector<double>& h, const Guarded<T>& down,
                 const std::vector<int64_t>& list, const Guarded<T>* residual, int64_t rows,
                 int64_t intermediate, int64_t width, bool exact) {
  const auto n = static_cast<int64_t>(list.size());
  const std::vector<double> values = got.values(), weights = down.values();
  const std::vector<double> added = residual != nullptr ? residual->values() : std::vector<double>{};
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < width; ++c) {
      const auto at = static_cast<size_t>(r * width + c);
      double sum = residual != nullptr ? added[at] : 0;
      double noise = sum * sum;
      for (int64_t j = 0; j < n; ++j) {
        const double term = h[static_cast<size_t>(r * n + j)] *
                            weights[static_cast<size_t>(c * intermediate + list[static_cast<size_t>(j)])];
        sum += term;
        noise += term * term;
      }
      const double y = values[at];
      if (exact) {
        ASSERT_EQ(y, static_cast<double>(to_float(from_float<T>(static_cast<float>(sum)))))
            << "row " << r << ", column " << c;
      } else {
        ASSERT_LE(std::fabs(y - sum), spacing<T>(sum) + kNoise<T> * std::sqrt(noise))
            << "row " << r << ", column " << c;
      }
    }
  }
}

struct OnDevice {
  flashu_selection selection{};
  Guarded<int32_t> narrow{std::vector<int64_t>{0}};
  Guarded<int64_t> wide{std::vector<int64_t>{0}};

  explicit OnDevice(const Chosen& chosen) {
    if (chosen.runs) selection = select_runs(*chosen.runs);
    if (chosen.resolved) {
      resolve(chosen);
      return;
    }
    if (!chosen.index) return;
    const auto n = static_cast<int64_t>(chosen.index->size());
    const auto value = [&](int64_t i) { return (*chosen.index)[static_cast<size_t>(i)]; };
    if (chosen.wide_index) {
      wide = Guarded<int64_t>({n}).fill(value);
      selection = select_index(wide.upload());
    } else {
      narrow = Guarded<int32_t>({n}).fill([&](int64_t i) { return static_cast<int32_t>(value(i)); });
      selection = select_index(narrow.upload());
    }
  }

 private:
  void resolve(const Chosen& chosen) {
    const std::vector<int64_t> neurons = chosen.list(0);
    narrow = Guarded<int32_t>({static_cast<int64_t>(neurons.size())});
    wide = Guarded<int64_t>({static_cast<int64_t>(neurons.size())}).fill([&](int64_t i) {
      return neurons[static_cast<size_t>(i)];
    });
    const int32_t block = list_neurons(chosen.runs ? selection : select_index(wide), 1 << 20, narrow);
    EXPECT_EQ(block, chosen.runs ? chosen.block : 1);
    selection = select_list(narrow.upload(), block);
  }
};

// With a workspace of the size that the call asks for.
template <class Args>
void run(Args& args, int32_t (*size)(const Args*, uint64_t*), void (*op)(const Args&)) {
  args.struct_size = sizeof(Args);
  check(size(&args, &args.workspace_bytes));
  const DeviceWorkspace workspace(args.workspace_bytes);
  args.workspace = workspace.get().data;
  op(args);
  device_synchronize();
}

// A tensor without elements has no memory in torch; kernels must not be chosen by its address.
flashu_tensor as_torch_has_it(flashu_tensor tensor) {
  for (int d = 0; d < tensor.ndim; ++d) {
    if (tensor.sizes[d] == 0) tensor.data = nullptr;
  }
  return tensor;
}

template <class T>
FfnArgs arguments(Operands<T>& o) {
  FfnArgs args{};
  args.x = as_torch_has_it(o.x.upload());
  args.w_gate = as_torch_has_it(o.gate.upload());
  args.w_up = as_torch_has_it(o.up.upload());
  args.w_down = as_torch_has_it(o.down.upload());
  return args;
}

template <class T>
Guarded<T> run_ffn(Operands<T>& o, const Chosen& chosen, bool with_residual, int64_t out_padding = 0,
                   Guarded<double>* norms = nullptr) {
  Guarded<T> out({o.rows, o.width}, out_padding);
  OnDevice on_device(chosen);
  FfnArgs args = arguments(o);
  args.selection = on_device.selection;
  if (with_residual) args.residual = o.residual.upload();
  if (norms != nullptr) args.norms = norms->upload();
  args.out = as_torch_has_it(out.upload());
  run(args, flashu_gathered_ffn_workspace, gathered_ffn);
  return out.download();
}

template <class T>
Guarded<T> run_down(Guarded<T>& h, Guarded<T>& down, const Chosen& chosen, Guarded<T>* residual,
                    int64_t out_padding = 0) {
  Guarded<T> out({h.size(0), down.size(0)}, out_padding);
  OnDevice on_device(chosen);
  DownArgs args{};
  args.h = h.upload();
  args.w_down = down.upload();
  args.selection = on_device.selection;
  if (residual != nullptr) args.residual = residual->upload();
  args.out = out.upload();
  run(args, flashu_gathered_down_workspace, gathered_down);
  return out.download();
}

template <class T>
class DeviceFfn : public DeviceTest {};
TYPED_TEST_SUITE(DeviceFfn, Storage3);

template <class T>
void whole_ffn(Operands<T> o, const Chosen& chosen, bool residual, int64_t out_padding = 0) {
  SCOPED_TRACE(chosen.name + ", " + std::to_string(o.rows) + " rows");
  const std::vector<int64_t> list = chosen.list(o.intermediate);
  const auto h = reference_h(o, list);
  const auto got = run_ffn(o, chosen, residual, out_padding);
  expect_down(got, h, o.down, list, residual ? &o.residual : nullptr, o.rows, o.intermediate, o.width, false);
}

TYPED_TEST(DeviceFfn, EverySelectionOnHopper) {
  const Operands<TypeParam> o(40, 136, 304, 72);
  for (const Chosen& chosen : selections(304)) {
    this->under_every_schedule([&] { whole_ffn(o, chosen, true); });
  }
}

TYPED_TEST(DeviceFfn, EverySelectionOnAmpere) {
  const Operands<TypeParam> o(40, 136, 304, 72);
  if (!use_capability(80)) GTEST_SKIP() << "this device is no sm_80";
  for (const Chosen& chosen : selections(304)) {
    this->under_every_schedule([&] { whole_ffn(o, chosen, true); });
  }
}

TYPED_TEST(DeviceFfn, EverySelectionWhenDecoding) {
  for (const int64_t rows : {int64_t{1}, int64_t{7}, int64_t{13}}) {
    // Rows of out at multiples of 16 bytes, or another kernel would be chosen.
    const Operands<TypeParam> o(rows, 200, 304, 104);
    for (const Chosen& chosen : selections(304)) {
      this->under_every_schedule([&] { whole_ffn(o, chosen, rows != 7); });
    }
  }
}

TYPED_TEST(DeviceFfn, SeveralTilesInBothDirections) {
  const Operands<TypeParam> o(150, 72, 400, 264);
  for (const int capability : {90, 80}) {
    if (!use_capability(capability)) continue;
    whole_ffn(o, {"all", {}, {}}, true, 8);
    whole_ffn(o, {"index", {}, {shuffled(300, 400, 3)}}, false);
  }
}

// More steps than stages, more results than boxes to leave from, in both warpgroups: only then is anything
// overwritten while it is read, if a wait or a barrier lets it.
TYPED_TEST(DeviceFfn, StagesAndBoxesAreUsedAgain) {
  Operands<TypeParam> o(72, 328, 520, 72);
  for (const Chosen& chosen : {Chosen{"all", {}, {}}, Chosen{"runs of eights", {{8, 40, 64, 448}}, {}},
                               Chosen{"index", {}, {shuffled(440, 520, 3)}}}) {
    SCOPED_TRACE(chosen.name);
    const std::vector<int64_t> list = chosen.list(520);
    const auto h = reference_h(o, list);
    this->under_every_schedule(
        [&] {
          const auto got = run_ffn(o, chosen, true);
          expect_down(got, h, o.down, list, &o.residual, 72, 520, 72, false);
        },
        2);
  }
}

// Rows whose last chunk of 16 bytes is not whole, listed: NaN lies behind them.
TYPED_TEST(DeviceFfn, LastChunksOfRows) {
  const Operands<TypeParam> o(40, 45, 301, 29, 3);
  for (const Chosen& chosen :
       {Chosen{"range", {{3, 290}}, {}}, Chosen{"runs of eights", {{8, 40, 64, 232}}, {}},
        Chosen{"index", {}, {shuffled(260, 301, 3)}}}) {
    whole_ffn(o, chosen, false, 3);
  }
}

// TMA stores eight columns at a time: those behind the last one belong to somebody else.
TYPED_TEST(DeviceFfn, ColumnsBehindAResultStay) {
  for (const int capability : {90, 80}) {
    if (!use_capability(capability)) continue;
    for (const int64_t width : {int64_t{3}, int64_t{29}, int64_t{130}, int64_t{263}}) {
      const Operands<TypeParam> o(70, 72, 200, width);
      for (const Chosen& chosen :
           {Chosen{"range", {{8, 184}}, {}}, Chosen{"index", {}, {shuffled(90, 200, 3)}}})
        this->under_every_schedule([&] { whole_ffn(o, chosen, true, (8 - width % 8) % 8 + 8); });
    }
  }
}

// Runs that begin and end between multiples of eight, with NaN on both sides.
TYPED_TEST(DeviceFfn, RunsThatBeginAnywhere) {
  for (const int capability : {90, 80}) {
    if (!use_capability(capability)) continue;
    for (const int64_t rows : {int64_t{5}, int64_t{12}, int64_t{70}}) {
      for (const auto& [first, count] :
           {std::array<int64_t, 2>{1, 150}, {7, 1}, {13, 67}, {30, 3}, {100, 100}, {63, 137}}) {
        Operands<TypeParam> o(rows, 72, 200, 136);
        const Chosen chosen{std::to_string(first) + " + " + std::to_string(count), {{first, count}}, {}};
        const TypeParam nan = from_float<TypeParam>(std::numeric_limits<float>::quiet_NaN());
        for (int64_t n = 0; n < 200; ++n) {
          if (n >= first && n < first + count) continue;
          for (int64_t k = 0; k < 72; ++k) o.gate[n * 72 + k] = o.up[n * 72 + k] = nan;
          for (int64_t c = 0; c < 136; ++c) o.down[c * 200 + n] = nan;
        }
        this->under_every_schedule([&] { whole_ffn(o, chosen, true); });
      }
    }
  }
}

TYPED_TEST(DeviceFfn, OperandsThatAreNotAligned) {
  for (const int64_t rows : {int64_t{5}, int64_t{33}}) {
    // With padding 3 rows are aligned, but hold no whole chunks of 16 bytes.
    for (const auto& [padding, offset] : {std::array<int64_t, 2>{1, 0}, {0, 1}, {8, 0}, {4, 3}, {3, 0}}) {
      const Operands<TypeParam> o(rows, 45, 61, 29, padding, offset);
      whole_ffn(o, {"all", {}, {}}, true, 3);
      whole_ffn(o, {"runs", {{1, 9, 20, 8}}, {}}, true, 3);
      whole_ffn(o, {"odd range", {{3, 50}}, {}}, false);
      whole_ffn(o, {"index", {}, {shuffled(31, 61, 4)}}, true, 3);
    }
  }
}

// The limit of dynamic shared memory is set per kernel: after a small launch a large one still has what it
// needs.
TYPED_TEST(DeviceFfn, LaunchesOfAnySizeInAnyOrder) {
  for (const int64_t rows : {int64_t{8}, int64_t{16}}) {
    const Operands<TypeParam> wide(rows, 1792, 16, 8);
    const Operands<TypeParam> narrow(rows, 1600, 16, 8);
    for (const auto* o : {&wide, &narrow, &wide}) whole_ffn(*o, {"all", {}, {}}, false);
  }
}

TYPED_TEST(DeviceFfn, NothingToMultiply) {
  for (const int64_t rows : {int64_t{0}, int64_t{1}, int64_t{40}}) {
    for (const auto& [hidden, width] : {std::array<int64_t, 2>{0, 24}, {64, 0}, {0, 0}}) {
      // With padding the rows have strides that the fast kernels would take; with 304 neurons those would be
      // chosen.
      for (const int64_t padding : {0, 8}) {
        const Operands<TypeParam> o(rows, hidden, 304, width, padding);
        whole_ffn(o, {"all", {}, {}}, true, padding);
        whole_ffn(o, {"index", {}, {shuffled(231, 304, 4)}}, false, padding);
      }
    }
  }
}

TYPED_TEST(DeviceFfn, HalvesAlone) {
  for (const int64_t rows : {int64_t{4}, int64_t{40}}) {
    Operands<TypeParam> o(rows, 136, 304, 72);
    for (const Chosen& chosen : selections(304)) {
      SCOPED_TRACE(chosen.name);
      const std::vector<int64_t> list = chosen.list(304);
      const auto n = static_cast<int64_t>(list.size());
      const auto h = reference_h(o, list);
      OnDevice on_device(chosen);
      // Rows in whole chunks of 16 bytes, where that is so without a list, and not.
      for (const int64_t padding : {(8 - n % 8) % 8, (8 - n % 8) % 8 + 1}) {
        Guarded<TypeParam> out({rows, n}, padding);
        SwigluArgs up{};
        up.x = o.x.upload();
        up.w_gate = o.gate.upload();
        up.w_up = o.up.upload();
        up.selection = on_device.selection;
        up.out = out.upload();
        run(up, flashu_gathered_swiglu_workspace, gathered_swiglu);
        const auto got = out.download();
        for (int64_t i = 0; i < rows * n; ++i) {
          const double expected = h[static_cast<size_t>(i)];
          ASSERT_LE(std::fabs(static_cast<double>(to_float(got[i])) - expected),
                    2 * spacing<TypeParam>(expected) + 2e-5)
              << "element " << i;
        }
      }
    }
  }
}

TYPED_TEST(DeviceFfn, DownIsExactOnIntegers) {
  for (const int capability : {90, 80}) {
    if (!use_capability(capability)) continue;
    for (const auto& [rows, intermediate, width] :
         {std::array<int64_t, 3>{1, 96, 8}, {130, 200, 40}, {64, 152, 200}, {3, 50, 7}}) {
      auto w = whole<TypeParam>({width, intermediate}, 1);
      for (const Chosen& chosen : selections(std::max<int64_t>(intermediate, 136))) {
        const std::vector<int64_t> list = chosen.list(intermediate);
        if (!list.empty() && *std::max_element(list.begin(), list.end()) >= intermediate) continue;
        SCOPED_TRACE(chosen.name);
        const auto n = static_cast<int64_t>(list.size());
        auto h = whole<TypeParam>({rows, n}, 2, (8 - n % 8) % 8);
        auto residual = whole<TypeParam>({rows, width}, 3);
        const std::vector<double> values = h.values();
        this->under_every_schedule([&] {
          const auto out = run_down(h, w, chosen, &residual);
          expect_down(out, values, w, list, &residual, rows, intermediate, width, true);
        });
      }
    }
  }
}

// Neither rows of h in whole chunks nor neighbours in the list.
TYPED_TEST(DeviceFfn, DownOfAListFromRowsThatAreNotAligned) {
  auto w = whole<TypeParam>({40, 152}, 1);
  const Chosen chosen{"index", {}, {shuffled(77, 152, 3)}};
  auto h = whole<TypeParam>({33, 77}, 2, 2);
  auto residual = whole<TypeParam>({33, 40}, 3);
  expect_down(run_down(h, w, chosen, &residual), h.values(), w, *chosen.index, &residual, 33, 152, 40, true);
}

TYPED_TEST(DeviceFfn, RowsDoNotDependOnEachOther) {
  const Operands<TypeParam> many(140, 72, 120, 40);
  const Chosen chosen{"range", {{8, 96}}, {}};
  auto all = many;
  const auto together = run_ffn(all, chosen, false);
  for (const auto& [first, count] : {std::array<int64_t, 2>{0, 17}, {100, 40}}) {
    Operands<TypeParam> part(count, 72, 120, 40);
    part.x.fill([&](int64_t i) { return many.x[first * 72 + i]; });
    const auto alone = run_ffn(part, chosen, false);
    for (int64_t i = 0; i < count * 40; ++i)
      ASSERT_EQ(to_float(alone[i]), to_float(together[first * 40 + i])) << "element " << i;
  }
}

// The kernel for few rows sums in another order; without it the number of rows decides nothing.
TYPED_TEST(DeviceFfn, FewRowsHaveTheBitsOfManyWithoutTheirOwnKernel) {
  cuda::ffn_limits().decodes = false;
  const Operands<TypeParam> many(140, 72, 120, 40);
  for (const int capability : {90, 80}) {
    if (!use_capability(capability)) continue;
    for (const int64_t start : {8, 13}) {
      const Chosen chosen{"range", {{start, 96}}, {}};
      auto all = many;
      const auto together = run_ffn(all, chosen, false);
      for (const auto& [first, count] : {std::array<int64_t, 2>{0, 1}, {60, 9}, {124, 16}}) {
        Operands<TypeParam> part(count, 72, 120, 40);
        part.x.fill([&, begin = first](int64_t i) { return many.x[begin * 72 + i]; });
        const auto alone = run_ffn(part, chosen, false);
        for (int64_t i = 0; i < count * 40; ++i)
          ASSERT_EQ(to_float(alone[i]), to_float(together[first * 40 + i])) << "element " << i;
      }
    }
  }
}

// Sums over many neurons are made of parts, by one block or by several.
TYPED_TEST(DeviceFfn, PartsOfManyNeurons) {
  // Of odd width, and one tile, so that each part is a block of its own. The odd ranges also have one neuron
  // too few for another part, until those in front are counted.
  constexpr int64_t kIntermediate = 3100, kWidth = 61;
  auto w = whole<TypeParam>({kWidth, kIntermediate}, 1, 4);
  for (const Chosen& chosen : {Chosen{"range", {{0, 2064}}, {}}, Chosen{"odd range", {{5, 2047}}, {}},
                               Chosen{"odd range, more parts", {{5, 3071}}, {}},
                               Chosen{"runs of 64", {{16, 1024, 1048, 1024}}, {}}}) {
    SCOPED_TRACE(chosen.name);
    const std::vector<int64_t> list = chosen.list(kIntermediate);
    for (const int64_t rows : {1, 40}) {
      const auto n = static_cast<int64_t>(list.size());
      auto h = whole<TypeParam>({rows, n}, 2, (8 - n % 8) % 8);
      auto residual = whole<TypeParam>({rows, kWidth}, 3, 2);
      const std::vector<double> values = h.values();
      this->under_every_schedule([&] {
        const auto out = run_down(h, w, chosen, &residual, 64 - kWidth);
        expect_down(out, values, w, list, &residual, rows, kIntermediate, kWidth, true);
      });
    }
  }
}

// Results wide enough that a thread adds four columns of the blocks' sums; those of one row are not.
TYPED_TEST(DeviceFfn, DecodedRowsOfManyColumns) {
  const Operands<TypeParam> many(16, 16, 80, 600);
  const Chosen chosen{"all", {}, {}};
  whole_ffn(many, chosen, true);
  whole_ffn(Operands<TypeParam>(16, 16, 80, 601), chosen, true, 7);
  auto all = many;
  const auto together = run_ffn(all, chosen, false);
  Operands<TypeParam> last(1, 16, 80, 600);
  last.x.fill([&](int64_t i) { return many.x[15 * 16 + i]; });
  const auto alone = run_ffn(last, chosen, false);
  for (int64_t i = 0; i < 600; ++i)
    ASSERT_EQ(to_float(alone[i]), to_float(together[15 * 600 + i])) << "element " << i;
}

// On hardware nobody has said that a box may be larger than its matrix; gpu.sh runs this first and alone.
TYPED_TEST(DeviceFfn, ABoxLargerThanItsMatrix) {
  cuda::ffn_limits().decodes = false;
  for (const int64_t rows : {1, 20}) whole_ffn(Operands<TypeParam>(rows, 16, 24, 8), {"all", {}, {}}, true);
}

TYPED_TEST(DeviceFfn, BadValuesStayInTheirRowAndNeuronsLeftOutMayHoldAnything) {
  for (const int64_t rows : {int64_t{9}, int64_t{20}}) {
    for (const Chosen& chosen :
         {Chosen{"range", {{16, 40}}, {}}, Chosen{"short range behind others", {{13, 2}}, {}},
          Chosen{"index", {}, {shuffled(40, 96, 5)}}}) {
      Operands<TypeParam> o(rows, 64, 96, 24);
      const auto expected = run_ffn(o, chosen, true);
      const std::vector<int64_t> list = chosen.list(96);
      const TypeParam nan = from_float<TypeParam>(std::numeric_limits<float>::quiet_NaN());
      for (int64_t n = 0; n < 96; ++n) {
        if (std::find(list.begin(), list.end(), n) != list.end()) continue;
        for (int64_t k = 0; k < 64; ++k) o.gate[n * 64 + k] = o.up[n * 64 + k] = nan;
        for (int64_t c = 0; c < 24; ++c) o.down[c * 96 + n] = nan;
      }
      o.x[3 * 64 + 5] = nan;
      const auto got = run_ffn(o, chosen, true);
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t c = 0; c < 24; ++c) {
          const float y = to_float(got[r * 24 + c]);
          if (r == 3) {
            ASSERT_TRUE(std::isnan(y));
          } else {
            ASSERT_EQ(y, to_float(expected[r * 24 + c])) << "row " << r << ", column " << c;
          }
        }
      }
    }
  }
}

TYPED_TEST(DeviceFfn, AnIndexOutOfRangeIsClampedAndReported) {
  Operands<TypeParam> o(20, 64, 96, 24);
  const Chosen clamped{"index", {}, {{0, 95, 7}}};
  const auto expected = run_ffn(o, clamped, false);
  Guarded<int32_t> index({3});
  index[0] = -4;
  index[1] = 96;
  index[2] = 7;
  Guarded<int32_t> status({1});
  status[0] = 0;
  Guarded<TypeParam> out({20, 24});
  FfnArgs args = arguments(o);
  args.selection = select_index(index.upload());
  args.status = status.upload();
  args.out = out.upload();
  run(args, flashu_gathered_ffn_workspace, gathered_ffn);
  expect_equal(out.download(), expected);
  EXPECT_EQ(status.download()[0], 1);
}

// Whoever writes a list by hand may be wrong: it leads to other neurons, never outside the weights.
TYPED_TEST(DeviceFfn, AListOutOfRangeStaysInTheWeights) {
  for (const int64_t rows : {2, 20}) {
    Operands<TypeParam> o(rows, 64, 96, 24);
    const auto expected = run_ffn(o, Chosen{"index", {}, {{95, 7, 94}}}, false);
    Guarded<int32_t> list({3});
    list[0] = -4;
    list[1] = 7;
    list[2] = 94;
    Guarded<TypeParam> out({rows, 24});
    FfnArgs args = arguments(o);
    args.selection = select_list(list.upload(), 1);
    args.out = out.upload();
    run(args, flashu_gathered_ffn_workspace, gathered_ffn);
    expect_equal(out.download(), expected);
  }
}

TYPED_TEST(DeviceFfn, NormsOfTheProductInBetween) {
  for (const int64_t rows : {int64_t{3}, int64_t{70}}) {
    Operands<TypeParam> o(rows, 72, 96, 24);
    const Chosen chosen{"range", {{rows % 8, 80}}, {}};
    const auto h = reference_h(o, chosen.list(96));
    Guarded<double> norms({80});
    norms.fill([](int64_t) { return 2.0; });
    run_ffn(o, chosen, false, 0, &norms);
    const auto got = norms.download();
    for (int64_t j = 0; j < 80; ++j) {
      double sum = 2;
      for (int64_t r = 0; r < rows; ++r)
        sum += h[static_cast<size_t>(r * 80 + j)] * h[static_cast<size_t>(r * 80 + j)];
      ASSERT_NEAR(got[j], sum, 0.02 * sum);
    }
  }
}

TYPED_TEST(DeviceFfn, NeuronNorms) {
  for (const auto& [rows, width, padding] : {std::array<int64_t, 3>{1, 5, 0}, {33, 70, 2}, {300, 32, 0}}) {
    auto h = normal<TypeParam>({rows, width}, 1, padding);
    Guarded<float> expected({width});
    expected.fill([](int64_t j) { return static_cast<float>(j); });
    const auto before = expected;
    neuron_norms(expected, h);
    this->under_every_schedule([&] {
      auto got = before;
      neuron_norms(got.upload(), h.upload());
      device_synchronize();
      expect_near(got.download(), expected, 8);
    });
  }
}

}  // namespace
}  // namespace flashu::test
