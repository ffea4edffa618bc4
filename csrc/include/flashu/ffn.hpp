/// @file
/// C++ API of the FFN family: typed wrappers over flashu/ffn.h that throw flashu::Error.
#pragma once

#include "flashu/ffn.h"
#include "flashu/flashu.hpp"

namespace flashu {

/// Arguments of gathered_swiglu(); struct_size is filled in.
using SwigluArgs = flashu_swiglu_args;
/// Arguments of gathered_down(); struct_size is filled in.
using DownArgs = flashu_down_args;
/// Arguments of gathered_ffn(); struct_size is filled in.
using FfnArgs = flashu_ffn_args;

/// All neurons.
inline flashu_selection select_all() { return {}; }

/// Runs of neurons: (start, length) pairs, ascending and disjoint. `runs` is read during the call and must
/// outlive it.
inline flashu_selection select_runs(const std::vector<int64_t>& runs) {
  if (runs.size() % 2 != 0) {
    throw Error(FLASHU_INVALID_VALUE,
                "runs: expected (start, length) pairs, got " + std::to_string(runs.size()) + " numbers");
  }
  flashu_selection selection{};
  selection.kind = FLASHU_SELECT_RUNS;
  selection.num_runs = static_cast<int64_t>(runs.size() / 2);
  selection.runs = runs.data();
  return selection;
}

/// Single neurons by number, [n] i32 or i64, in any order.
inline flashu_selection select_index(const flashu_tensor& index) {
  flashu_selection selection{};
  selection.kind = FLASHU_SELECT_INDEX;
  selection.index = index;
  return selection;
}

/// A list as list_neurons() wrote it, on the device of the weights.
inline flashu_selection select_list(const flashu_tensor& list, int32_t block) {
  flashu_selection selection = select_index(list);
  selection.kind = FLASHU_SELECT_LIST;
  selection.block = block;
  return selection;
}

/// Checks a selection of `intermediate` neurons and writes it into list [n], on the CPU. Returns how many
/// neighbours it names at a time, for select_list().
inline int32_t list_neurons(const flashu_selection& selection, int64_t intermediate,
                            const flashu_tensor& list) {
  auto args = make_args<flashu_list_args>();
  int32_t block = 1;
  args.intermediate = intermediate;
  args.selection = selection;
  args.list = list;
  args.block = &block;
  check(flashu_list_neurons(&args));
  return block;
}

/// out = silu(x w_gate[S]^T) * (x w_up[S]^T)
inline void gathered_swiglu(const SwigluArgs& args) {
  detail::run_with_workspace(args, args.x.device, flashu_gathered_swiglu_workspace, flashu_gathered_swiglu);
}

/// out = h w_down[:, S]^T (+ residual)
inline void gathered_down(const DownArgs& args) {
  detail::run_with_workspace(args, args.h.device, flashu_gathered_down_workspace, flashu_gathered_down);
}

/// out = swiglu(x) w_down[:, S]^T (+ residual); norms += squares of the product in between
inline void gathered_ffn(const FfnArgs& args) {
  detail::run_with_workspace(args, args.x.device, flashu_gathered_ffn_workspace, flashu_gathered_ffn);
}

/// acc[j] += sum over rows of h[r, j]^2
inline void neuron_norms(const flashu_tensor& acc, const flashu_tensor& h, void* stream = nullptr) {
  auto args = make_args<flashu_neuron_norms_args>();
  args.acc = acc;
  args.h = h;
  args.stream = stream;
  check(flashu_neuron_norms(&args));
}

}  // namespace flashu
