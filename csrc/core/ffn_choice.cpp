// Predicted cost of the CUDA kernels of the gathered FFN. Rates are of an H200 by its data sheet and by
// published kernels of the same make; they were not measured with these kernels yet. The order of the
// candidates matters, not the microseconds.
#include "core/ffn_choice.hpp"

#include <algorithm>
#include <iomanip>
#include <sstream>

#include "flashu/flashu.h"

namespace flashu::core {
namespace {

constexpr double kHopperFlopsPerUs = 6.0e6;  // of one multiprocessor, dense wgmma: 790 TFLOP/s over 132
constexpr double kAmpereShare = 0.62;        // of that, what mma.sync reaches there
constexpr double kF32FlopsPerUs = 0.3e6;
constexpr double kTileOverheadUs = 1.2;  // filling the pipeline, and what of the epilogue is not hidden
constexpr int64_t kSm80Rows = 128;
constexpr int64_t kSm90Rows = 128;
constexpr int64_t kMaxDecodeRows = 16;

int64_t divide_up(int64_t value, int64_t by) { return (value + by - 1) / by; }

// How much of the rate a tile of so many product columns gets: narrow ones read A more often than they use
// it.
double width_share(int product_columns) {
  return product_columns >= 256 ? 1.0 : product_columns >= 224 ? 0.98 : product_columns >= 192 ? 0.95 : 0.85;
}

FfnCandidate candidate(const FfnQuestion& q, bool up, FfnKernel kernel, int columns, int64_t rows_of_tile,
                       double flops_per_us) {
  const int64_t all_columns = up ? q.neurons : q.width;
  const int64_t depth = up ? q.hidden : q.neurons;
  FfnCandidate c{kernel,  static_cast<int>(rows_of_tile),
                 columns, divide_up(q.rows, rows_of_tile) * divide_up(all_columns, columns),
                 0,       0};
  c.waves = static_cast<double>(c.tiles) / static_cast<double>(std::max(q.multiprocessors, 1));
  const double flops = 2.0 * static_cast<double>(rows_of_tile) * static_cast<double>(columns) * (up ? 2 : 1) *
                       static_cast<double>(depth);
  const double waves = static_cast<double>(divide_up(c.tiles, std::max(q.multiprocessors, 1)));
  c.us = waves * (flops / flops_per_us + kTileOverheadUs);
  return c;
}

const char* name_of(FfnKernel kernel) {
  switch (kernel) {
    case FfnKernel::kF32:
      return "f32";
    case FfnKernel::kSm80:
      return "sm80";
    default:
      return "sm90";
  }
}

}  // namespace

std::vector<FfnCandidate> ffn_candidates(const FfnQuestion& q, bool up) {
  if (q.type == FLASHU_F32) return {candidate(q, up, FfnKernel::kF32, 64, 64, kF32FlopsPerUs)};
  std::vector<FfnCandidate> candidates = {
      candidate(q, up, FfnKernel::kSm80, up ? 64 : 128, kSm80Rows, kHopperFlopsPerUs * kAmpereShare)};
  // Columns of down that a list names are gathered value by value, which only the first kernel does.
  // A matrix of no columns has no tensor map.
  const bool hopper = q.capability == 90 && q.has_sm90 && q.aligned &&
                      (up ? q.hidden > 0 && q.neurons > 0 : !q.listed && q.width > 0);
  if (hopper) {
    const std::vector<int> widths = !up        ? std::vector<int>{256, 192, 128}
                                    : q.listed ? std::vector<int>{128}
                                               : std::vector<int>{128, 112, 64};
    for (const int width : widths) {
      const double rate = kHopperFlopsPerUs * width_share(up ? 2 * width : width);
      candidates.push_back(candidate(q, up, FfnKernel::kSm90, width, kSm90Rows, rate));
    }
  }
  std::stable_sort(candidates.begin(), candidates.end(),
                   [](const FfnCandidate& a, const FfnCandidate& b) { return a.us < b.us; });
  return candidates;
}

bool ffn_decodes(const FfnQuestion& q) {
  return q.has_up && q.has_down && !q.needs_h && q.type != FLASHU_F32 && q.rows <= kMaxDecodeRows &&
         q.aligned && q.range_aligned && q.hidden % 8 == 0;
}

std::string explain_ffn(const FfnQuestion& q) {
  std::ostringstream text;
  text << q.rows << " rows, hidden " << q.hidden << ", " << q.neurons << " neurons "
       << (q.listed ? q.blocks_of_8 ? "(listed, by eights)" : "(listed)" : "(one range)") << ", sm_"
       << q.capability << ", " << q.multiprocessors << " multiprocessors\n";
  if (ffn_decodes(q)) {
    text << "  both halves: one pass over the weights (decode)\n";
    return text.str();
  }
  for (const bool up : {true, false}) {
    if (up ? !q.has_up : !q.has_down) continue;
    bool first = true;
    for (const FfnCandidate& c : ffn_candidates(q, up)) {
      text << "  " << (up ? "up  " : "down") << (first ? " * " : "   ") << std::left << std::setw(5)
           << name_of(c.kernel) << std::right << std::setw(4) << c.rows << " x " << std::left << std::setw(4)
           << c.columns << std::right << std::setw(7) << c.tiles << " tiles " << std::fixed
           << std::setprecision(2) << std::setw(7) << c.waves << " waves " << std::setprecision(0)
           << std::setw(7) << c.us << " us predicted\n";
      first = false;
    }
  }
  return text.str();
}

}  // namespace flashu::core
