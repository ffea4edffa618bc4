// The FFN on the CPU around every edge of its blocking: exact integers, every argument with a stride of its
// own between red zones, every kind of selection, one thread and many.
#include <cmath>
#include <numeric>
#include <string_view>

#include "flashu/ffn.hpp"
#include "guarded.hpp"

namespace flashu::test {
namespace {

struct Sizes {
  int64_t rows, hidden, neurons, width;
};

// Around the vectors and panels (4 to 32 columns), sums of 32 slots (64 bf16), and blocks of 128 and 384
// slots (256 and 768 bf16) of csrc/cpu/gemm_kernels.cpp and csrc/core/tiles.cpp.
const std::vector<int64_t> kSizesOfK = {1,   2,   3,   4,   5,   7,   8,   9,   15,  16,  17,  31,  32,
                                        33,  47,  63,  64,  65,  95,  96,  97,  127, 128, 129, 191, 193,
                                        255, 256, 257, 383, 384, 385, 511, 513, 767, 768, 769, 801};
// Around tiles of 6 and 12 rows, blocks of 96 and 192, and chunks of 1,020.
const std::vector<int64_t> kRows = {1,  2,  3,  5,  6,   7,   11,  12,   13,   17,   18,  24,
                                    25, 95, 96, 97, 191, 192, 193, 1019, 1020, 1021, 2100};
// Around panels of 8, 16 and 32 columns, and 4 and 8 of them.
const std::vector<int64_t> kWidths = {1, 3, 4, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 65, 127, 129, 255, 257};

std::vector<Sizes> all_sizes() {
  std::vector<Sizes> sizes;
  for (const int64_t rows : kRows) sizes.push_back({rows, 21, 40, 35});
  for (const int64_t k : kSizesOfK) {
    for (const int64_t rows : {1, 2, 13}) sizes.push_back({rows, k, 11, 9});
    for (const int64_t rows : {1, 3}) sizes.push_back({rows, 19, k, 10});
  }
  for (const int64_t width : kWidths) sizes.push_back({5, 20, 9, width});
  sizes.push_back({300, 400, 330, 260});  // several panels of several blocks
  sizes.push_back({1100, 30, 70, 300});
  // By the baseline's panels of 8 columns one half streams and the other keeps panels, in both orders; the
  // second has several blocks of rows and of K in panels too.
  sizes.push_back({1020, 20, 150, 3});
  sizes.push_back({1020, 20, 390, 9});
  return sizes;
}

// Selected neurons, in the two forms.
struct Selected {
  std::vector<int64_t> list;
  std::vector<int64_t> runs;
  Guarded<int64_t> wide{{0}};
  Guarded<int32_t> narrow{{0}};
  enum { kAll, kRuns, kWide, kNarrow, kList } kind;

  flashu_selection selection() const {
    switch (kind) {
      case kRuns:
        return select_runs(runs);
      case kWide:
        return select_index(wide);
      case kNarrow:
        return select_index(narrow);
      case kList:
        return select_list(narrow, 1);
      default:
        return select_all();
    }
  }
};

Selected of_runs(std::vector<int64_t> runs) {
  Selected s{{}, std::move(runs), Guarded<int64_t>({0}), Guarded<int32_t>({0}), Selected::kRuns};
  for (size_t i = 0; i < s.runs.size(); i += 2) {
    for (int64_t j = 0; j < s.runs[i + 1]; ++j) s.list.push_back(s.runs[i] + j);
  }
  return s;
}

// An index with gaps between its elements.
Selected of_index(std::vector<int64_t> list, bool wide) {
  const auto count = static_cast<int64_t>(list.size());
  Selected s{list,
             {},
             Guarded<int64_t>({count}, 0, 2),
             Guarded<int32_t>({count}, 0, 3),
             wide ? Selected::kWide : Selected::kNarrow};
  s.wide.fill([&](int64_t, int64_t i) { return list[static_cast<size_t>(i)]; });
  s.narrow.fill([&](int64_t, int64_t i) { return list[static_cast<size_t>(i)]; });
  return s;
}

// What list_neurons() makes of another selection.
Selected as_list(const Selected& from, int64_t neurons) {
  const auto count = static_cast<int64_t>(from.list.size());
  Selected s{from.list, {}, Guarded<int64_t>({0}), Guarded<int32_t>({count}), Selected::kList};
  list_neurons(from.selection(), neurons, s.narrow);
  return s;
}

std::vector<Selected> selections(int64_t neurons) {
  std::vector<int64_t> all(static_cast<size_t>(neurons));
  std::iota(all.begin(), all.end(), 0);
  std::vector<Selected> out = {of_runs({0, neurons})};
  out.front().kind = Selected::kAll;
  if (neurons < 4) return out;
  out.push_back(of_runs({neurons / 3, neurons / 2}));
  out.push_back(of_runs({0, 1, 2, neurons - 3}));
  std::vector<int64_t> ascending, shuffled = all;
  for (int64_t i = 0; i < neurons; ++i) {
    if (i % 5 != 3) ascending.push_back(i);
  }
  std::shuffle(shuffled.begin(), shuffled.end(), std::mt19937(7));
  shuffled.resize(static_cast<size_t>(neurons - neurons / 4));
  out.push_back(of_index(ascending, true));
  out.push_back(of_index(shuffled, false));
  out.push_back(of_index({all.begin() + neurons / 4, all.end()}, true));  // a range, said by an index
  out.push_back(as_list(of_runs({0, 1, 2, neurons - 3}), neurons));
  out.push_back(as_list(of_index(shuffled, true), neurons));
  return out;
}

template <class T>
class FfnEdges : public ::testing::Test {
 protected:
  // Whether h is rounded to bf16 between the halves.
  static bool pairs() {
    return std::is_same_v<T, bfloat16> && std::string_view(flashu_cpu_isa()) == "avx512_bf16";
  }

  // Integers for which silu is exact: the gate's sums are at least 18, and e^-18 is lost beside 1.
  struct Problem {
    Sizes size;
    Guarded<T> x, gate, up, down, residual;
    std::vector<double> product;  // [rows, neurons] of silu(gate) * up, exact

    explicit Problem(const Sizes& s)
        : size(s),
          x({s.rows, s.hidden}, 1),
          gate({s.neurons, s.hidden}, 3),
          up({s.neurons, s.hidden}, 6),
          down({s.width, s.neurons}, 2),
          residual({s.rows, s.width}, 5) {
      const bool small = s.hidden < 18;
      x.integers(1, 1, 2);
      gate.integers(2, small ? 18 : 1, small ? 20 : 2);
      up.integers(3, -1, 1);
      down.integers(4, -1, 1);
      residual.integers(5, -9, 9);
      const auto up_row = [](const Guarded<T>& w, int64_t neuron) {
        std::vector<float> row(static_cast<size_t>(w.width()));
        for (int64_t k = 0; k < w.width(); ++k) row[static_cast<size_t>(k)] = w.value(neuron, k);
        return row;
      };
      product.resize(static_cast<size_t>(s.rows * s.neurons));
      std::vector<std::vector<float>> rows;
      for (int64_t r = 0; r < s.rows; ++r) rows.push_back(up_row(x, r));
      for (int64_t j = 0; j < s.neurons; ++j) {
        const auto g = up_row(gate, j), u = up_row(up, j);
        for (int64_t r = 0; r < s.rows; ++r) {
          const auto& row = rows[static_cast<size_t>(r)];
          product[static_cast<size_t>(r * s.neurons + j)] =
              static_cast<double>(std::inner_product(row.begin(), row.end(), g.begin(), 0.0f)) *
              static_cast<double>(std::inner_product(row.begin(), row.end(), u.begin(), 0.0f));
        }
      }
    }

    double h(int64_t row, int64_t neuron) const {
      return product[static_cast<size_t>(row * size.neurons + neuron)];
    }
  };

  static ::testing::AssertionResult equal(const Guarded<T>& got, const std::vector<double>& exact) {
    for (int64_t r = 0; r < got.rows(); ++r) {
      for (int64_t c = 0; c < got.width(); ++c) {
        const float expected = rounded<T>(exact[static_cast<size_t>(r * got.width() + c)]);
        if (got.value(r, c) != expected) {
          return ::testing::AssertionFailure()
                 << "row " << r << ", column " << c << ": " << got.value(r, c) << ", expected " << expected;
        }
      }
    }
    return got.intact() ? ::testing::AssertionSuccess() : ::testing::AssertionFailure() << "red zone written";
  }

  // h [rows, list] times the selected columns of down, plus the residual where there is one.
  static std::vector<double> down_of(const Problem& p, const Selected& s, const Guarded<T>& h,
                                     const Guarded<T>* residual) {
    const auto n = static_cast<int64_t>(s.list.size());
    std::vector<double> out(static_cast<size_t>(p.size.rows * p.size.width));
    std::vector<double> column(static_cast<size_t>(n));
    for (int64_t c = 0; c < p.size.width; ++c) {
      for (int64_t i = 0; i < n; ++i)
        column[static_cast<size_t>(i)] = p.down.value(c, s.list[static_cast<size_t>(i)]);
      for (int64_t r = 0; r < p.size.rows; ++r) {
        double sum = residual == nullptr ? 0.0 : residual->value(r, c);
        for (int64_t i = 0; i < n; ++i) sum += h.value(r, i) * column[static_cast<size_t>(i)];
        out[static_cast<size_t>(r * p.size.width + c)] = sum;
      }
    }
    return out;
  }
};
using Storage = ::testing::Types<float, bfloat16, float16>;
TYPED_TEST_SUITE(FfnEdges, Storage);

std::string text(const Sizes& s, int kind, int32_t threads) {
  return "[" + std::to_string(s.rows) + ", " + std::to_string(s.hidden) + "] with " +
         std::to_string(s.neurons) + " neurons to " + std::to_string(s.width) + ", selection " +
         std::to_string(kind) + ", threads " + std::to_string(threads);
}

TYPED_TEST(FfnEdges, SwigluIsExact) {
  for (const Sizes& size : all_sizes()) {
    const typename TestFixture::Problem p(size);
    int kind = 0;
    for (const Selected& s : selections(size.neurons)) {
      const auto n = static_cast<int64_t>(s.list.size());
      std::vector<double> exact;
      for (int64_t r = 0; r < size.rows; ++r) {
        for (const int64_t neuron : s.list) exact.push_back(p.h(r, neuron));
      }
      for (const int32_t threads : kThreadCounts) {
        const Threads pretended(threads);
        Guarded<TypeParam> out({size.rows, n}, 4);
        SwigluArgs args{};
        args.x = p.x;
        args.w_gate = p.gate;
        args.w_up = p.up;
        args.selection = s.selection();
        args.out = out;
        gathered_swiglu(args);
        ASSERT_TRUE(this->equal(out, exact)) << text(size, kind, threads);
      }
      ++kind;
    }
  }
}

TYPED_TEST(FfnEdges, DownIsExact) {
  for (const Sizes& size : all_sizes()) {
    const typename TestFixture::Problem p(size);
    int kind = 0;
    for (const Selected& s : selections(size.neurons)) {
      Guarded<TypeParam> h({size.rows, static_cast<int64_t>(s.list.size())}, 7);
      h.integers(6, -3, 3);
      for (const Guarded<TypeParam>* residual :
           {&p.residual, static_cast<const Guarded<TypeParam>*>(nullptr)}) {
        const std::vector<double> exact = this->down_of(p, s, h, residual);
        const int32_t threads = kThreadCounts[residual == nullptr ? 0 : 1];
        const Threads pretended(threads);
        Guarded<TypeParam> out({size.rows, size.width}, 9);
        DownArgs args{};
        args.h = h;
        args.w_down = p.down;
        args.selection = s.selection();
        if (residual != nullptr) args.residual = *residual;
        args.out = out;
        gathered_down(args);
        ASSERT_TRUE(this->equal(out, exact)) << text(size, kind, threads);
      }
      ++kind;
    }
  }
}

TYPED_TEST(FfnEdges, WholeFfnAndItsNormsAreExact) {
  for (const Sizes& size : all_sizes()) {
    if (size.hidden > 70) continue;  // sums beyond 2^24 are no longer exact
    const typename TestFixture::Problem p(size);
    int kind = 0;
    for (const Selected& s : selections(size.neurons)) {
      const auto n = static_cast<int64_t>(s.list.size());
      Guarded<float> between({size.rows, n});  // h as it is between the halves
      between.fill([&](int64_t r, int64_t i) {
        const double h = p.h(r, s.list[static_cast<size_t>(i)]);
        return this->pairs() ? rounded<bfloat16>(h) : static_cast<float>(h);
      });
      std::vector<double> exact(static_cast<size_t>(size.rows * size.width));
      for (int64_t r = 0; r < size.rows; ++r) {
        for (int64_t c = 0; c < size.width; ++c) {
          double sum = kind % 2 == 0 ? p.residual.value(r, c) : 0.0;
          for (int64_t i = 0; i < n; ++i)
            sum += between.value(r, i) * p.down.value(c, s.list[static_cast<size_t>(i)]);
          exact[static_cast<size_t>(r * size.width + c)] = sum;
        }
      }
      for (const int32_t threads : kThreadCounts) {
        const Threads pretended(threads);
        Guarded<TypeParam> out({size.rows, size.width}, 9);
        Guarded<double> norms({n});
        norms.fill([](int64_t, int64_t j) { return static_cast<double>(j); });
        FfnArgs args{};
        args.x = p.x;
        args.w_gate = p.gate;
        args.w_up = p.up;
        args.w_down = p.down;
        args.selection = s.selection();
        if (kind % 2 == 0) args.residual = p.residual;
        args.norms = norms;
        args.out = out;
        gathered_ffn(args);
        ASSERT_TRUE(this->equal(out, exact)) << text(size, kind, threads);
        for (int64_t i = 0; i < n; ++i) {
          double squares = static_cast<double>(i);
          for (int64_t r = 0; r < size.rows; ++r) {
            const double h = p.h(r, s.list[static_cast<size_t>(i)]);
            squares += h * h;
          }
          ASSERT_EQ(norms(0, i), squares) << "neuron " << i << ", " << text(size, kind, threads);
        }
        ASSERT_TRUE(norms.intact());
        Guarded<float> narrow({n});
        narrow.fill([](int64_t, int64_t) { return 3; });
        args.norms = narrow;
        gathered_ffn(args);
        for (int64_t i = 0; i < n && size.rows <= 1020; ++i)
          ASSERT_EQ(narrow(0, i), static_cast<float>(3.0 + (norms(0, i) - static_cast<double>(i))));
      }
      ++kind;
    }
  }
}

// A row's bits are the same alone and in any company, though its sums are not exact: what is left of them
// when the second half of K takes away the first is rounding, and shows any other order.
TYPED_TEST(FfnEdges, RowsAloneAreRowsTogether) {
  for (const int64_t k : kSizesOfK) {
    const int64_t rows = 14, neurons = 11, width = 9;
    Guarded<TypeParam> x({rows, k}, 1), gate({neurons, k}, 2), up({neurons, k}, 3), h({rows, k}, 4),
        down({width, k}, 5), products({rows, neurons}, 6), sums({rows, width}, 7);
    x.real(1), gate.real(2, 0.1f), up.real(3, 0.1f), h.real(4), down.real(5, 0.1f);
    for (int64_t i = k / 2; i < 2 * (k / 2); ++i) {
      for (int64_t r = 0; r < rows; ++r) {
        x(r, i) = x(r, i - k / 2);
        h(r, i) = h(r, i - k / 2);
      }
      for (int64_t j = 0; j < neurons; ++j) up(j, i) = from_float<TypeParam>(-up.value(j, i - k / 2));
      for (int64_t c = 0; c < width; ++c) down(c, i) = from_float<TypeParam>(-down.value(c, i - k / 2));
    }
    SwigluArgs up_half{};
    up_half.x = x;
    up_half.w_gate = gate;
    up_half.w_up = up;
    up_half.out = products;
    gathered_swiglu(up_half);
    DownArgs down_half{};
    down_half.h = h;
    down_half.w_down = down;
    down_half.out = sums;
    gathered_down(down_half);
    for (const int64_t row : {0, 5, 13}) {
      Guarded<TypeParam> product({1, neurons}), sum({1, width});
      up_half.x = tensor(&x(row, 0), dtype_of<TypeParam>(), {1, k});
      up_half.out = product;
      gathered_swiglu(up_half);
      down_half.h = tensor(&h(row, 0), dtype_of<TypeParam>(), {1, k});
      down_half.out = sum;
      gathered_down(down_half);
      for (int64_t c = 0; c < neurons; ++c) ASSERT_EQ(product.value(0, c), products.value(row, c)) << k;
      for (int64_t c = 0; c < width; ++c) ASSERT_EQ(sum.value(0, c), sums.value(row, c)) << k;
    }
  }
}

// Nothing that was given is written.
TYPED_TEST(FfnEdges, InputsStayAsTheyAre) {
  const typename TestFixture::Problem p({1100, 21, 40, 35}), before({1100, 21, 40, 35});
  for (const Selected& s : selections(40)) {
    Guarded<TypeParam> out({1100, 35});
    FfnArgs args{};
    args.x = p.x;
    args.w_gate = p.gate;
    args.w_up = p.up;
    args.w_down = p.down;
    args.selection = s.selection();
    args.residual = p.residual;
    args.out = out;
    gathered_ffn(args);
    ASSERT_TRUE(p.x.same(before.x) && p.gate.same(before.gate) && p.up.same(before.up) &&
                p.down.same(before.down) && p.residual.same(before.residual));
  }
}

// Against fp64 over the whole range, the vector's tail included.
TEST(Silu, IsWithinTwoRoundings) {
  const int64_t count = 1003;
  Guarded<float> x({1, 1}), gate({count, 1}, 1), up({count, 1}, 2), out({1, count});
  x.fill([](int64_t, int64_t) { return 1.0f; });
  up.fill([](int64_t, int64_t) { return 1.0f; });
  gate.fill([](int64_t j, int64_t) { return -88.0 + 0.1787 * static_cast<double>(j); });
  SwigluArgs args{};
  args.x = x;
  args.w_gate = gate;
  args.w_up = up;
  args.out = out;
  gathered_swiglu(args);
  for (int64_t j = 0; j < count; ++j) {
    const double g = gate.value(j, 0);
    ASSERT_TRUE(near<float>(out(0, j), g / (1 + std::exp(-g)), 4)) << "silu(" << g << ")";
  }
}

// What the FFN stores, whole vectors and their tails, is rounded as single numbers are: ties to even.
TYPED_TEST(FfnEdges, SumsAreStoredToNearestEven) {
  const int64_t count = 4003;
  Guarded<TypeParam> gate({count, 2}, 1), up({count, 2}, 2);
  gate.fill([](int64_t, int64_t c) { return c == 0 ? 64 : 0; });
  // Sums of two numbers of T that T cannot hold: between its neighbours, and exactly in the middle.
  up.fill([](int64_t j, int64_t c) { return c == 0 ? 1.0 + 0x1p-7 * (j % 128) : 0x1p-13 * (j % 67); });
  for (const int64_t rows : {1, 2}) {
    Guarded<TypeParam> several({rows, 2}, 3), out({rows, count}, 5);
    several.fill([](int64_t, int64_t) { return 1; });
    SwigluArgs args{};
    args.x = several;
    args.w_gate = gate;
    args.w_up = up;
    args.out = out;
    gathered_swiglu(args);
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t j = 0; j < count; ++j) {
        const double sum = 64.0 * (static_cast<double>(up.value(j, 0)) + up.value(j, 1));
        ASSERT_EQ(out.value(r, j), rounded<TypeParam>(sum)) << "neuron " << j;
      }
    }
  }
}

TYPED_TEST(FfnEdges, NeuronNormsAreExact) {
  // Chunks of 128 columns (csrc/cpu/neuron_norms.cpp).
  for (const int64_t width : {1, 7, 127, 128, 129, 255, 256, 300, 1000}) {
    for (const int64_t rows : {1, 2, 9}) {
      Guarded<TypeParam> h({rows, width}, 5);
      h.integers(1, -9, 9);
      for (const int32_t threads : kThreadCounts) {
        const Threads pretended(threads);
        Guarded<double> wide({width});
        Guarded<float> narrow({width});
        wide.fill([](int64_t, int64_t j) { return static_cast<double>(j); });
        narrow.fill([](int64_t, int64_t j) { return static_cast<double>(j); });
        neuron_norms(wide, h);
        neuron_norms(narrow, h);
        for (int64_t j = 0; j < width; ++j) {
          double sum = static_cast<double>(j);
          for (int64_t r = 0; r < rows; ++r) sum += h.value(r, j) * h.value(r, j);
          ASSERT_EQ(wide(0, j), sum) << rows << " x " << width << ", column " << j;
          ASSERT_EQ(narrow(0, j), sum) << rows << " x " << width << ", column " << j;
        }
        ASSERT_TRUE(wide.intact() && narrow.intact());
      }
    }
  }
}

}  // namespace
}  // namespace flashu::test
