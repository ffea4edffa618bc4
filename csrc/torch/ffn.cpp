// torch adapters of the FFN family: views in, C API, outputs and workspace from torch's allocator.
#include "flashu/ffn.h"

#include <algorithm>

#include "api/ffn_plan.hpp"
#include "torch/planned.hpp"

namespace flashu::torch_ops {
namespace {

using Runs = std::optional<std::vector<int64_t>>;
using OptionalTensor = std::optional<Tensor>;

// How a call names its neurons. `listed`: index is a list that was checked before; `block`: see
// flashu_selection.
struct Neurons {
  const Runs& runs;
  const OptionalTensor& index;
  bool listed;
  int64_t block;
};

flashu_selection select(const char* op, const Neurons& neurons) {
  const auto& [runs, index, listed, block] = neurons;
  STD_TORCH_CHECK(!(runs.has_value() && index.has_value()), "flashu value error: ", op,
                  ": runs, index: expected at most one of them, got both");
  flashu_selection selection{};
  if (runs.has_value()) {
    STD_TORCH_CHECK(runs->size() % 2 == 0, "flashu value error: ", op,
                    ": runs: expected (start, length) pairs, got ", runs->size(), " numbers");
    selection.kind = FLASHU_SELECT_RUNS;
    selection.num_runs = static_cast<int64_t>(runs->size() / 2);
    selection.runs = runs->data();
  } else if (index.has_value()) {
    selection.kind = listed ? FLASHU_SELECT_LIST : FLASHU_SELECT_INDEX;
    selection.block = static_cast<int32_t>(block);
    selection.index = view(op, "index", *index);
  }
  return selection;
}

// How wide the output will be. Unchecked input may lie, so this only has to be a size that can be allocated:
// the C API checks it against the truth.
int64_t selected(const flashu_selection& selection, const Tensor& weight) {
  const int64_t limit = weight.dim() > 0 ? weight.size(0) : 0;
  if (selection.kind == FLASHU_SELECT_ALL) return limit;
  int64_t count = selection.index.ndim == 1 ? selection.index.sizes[0] : 0;
  for (int64_t i = 0; i < selection.num_runs; ++i) {
    count += std::clamp<int64_t>(selection.runs[2 * i + 1], 0, limit);
  }
  return std::min(count, limit);
}

// What both variants of gathered_swiglu share.
struct UpTensors {
  const Tensor& x;
  const Tensor& w_gate;
  const Tensor& w_up;
  const OptionalTensor& gate_add;
  const OptionalTensor& up_add;
};

void run_swiglu(const UpTensors& t, const Neurons& neurons, const Tensor& out) {
  const char* op = "gathered_swiglu";
  const Tensor rows = foldable(t.x);
  const OptionalTensor gate_add = foldable(t.gate_add);
  const OptionalTensor up_add = foldable(t.up_add);
  auto args = make_args<flashu_swiglu_args>(t.x);
  args.x = view(op, "x", rows);
  args.w_gate = view(op, "w_gate", t.w_gate);
  args.w_up = view(op, "w_up", t.w_up);
  args.gate_add = view(op, "gate_add", gate_add);
  args.up_add = view(op, "up_add", up_add);
  args.selection = select(op, neurons);
  args.out = view(op, "out", out);
  run_planned<api::FfnPlan>(op, args, t.x);
}

Tensor gathered_swiglu(const Tensor& x, const Tensor& w_gate, const Tensor& w_up, Runs runs,
                       OptionalTensor index, bool listed, int64_t block, OptionalTensor gate_add,
                       OptionalTensor up_add) {
  const Neurons neurons{runs, index, listed, block};
  const Tensor out = new_rows(x, selected(select("gathered_swiglu", neurons), w_gate));
  run_swiglu({x, w_gate, w_up, gate_add, up_add}, neurons, out);
  return out;
}

Tensor gathered_swiglu_into(const Tensor& x, const Tensor& w_gate, const Tensor& w_up, Runs runs,
                            OptionalTensor index, bool listed, int64_t block, OptionalTensor gate_add,
                            OptionalTensor up_add, const Tensor& out) {
  run_swiglu({x, w_gate, w_up, gate_add, up_add}, {runs, index, listed, block}, out);
  return out;
}

void run_down(const Tensor& h, const Tensor& w_down, const Neurons& neurons, const OptionalTensor& residual,
              const Tensor& out) {
  const char* op = "gathered_down";
  const Tensor rows = foldable(h);
  const OptionalTensor added = foldable(residual);
  auto args = make_args<flashu_down_args>(h);
  args.h = view(op, "h", rows);
  args.w_down = view(op, "w_down", w_down);
  args.selection = select(op, neurons);
  args.residual = view(op, "residual", added);
  args.out = view(op, "out", out);
  run_planned<api::FfnPlan>(op, args, h);
}

Tensor gathered_down(const Tensor& h, const Tensor& w_down, Runs runs, OptionalTensor index,
                     OptionalTensor residual, bool listed, int64_t block) {
  const Tensor out = new_rows(h, size_or_zero(w_down, 0));
  run_down(h, w_down, {runs, index, listed, block}, residual, out);
  return out;
}

Tensor gathered_down_into(const Tensor& h, const Tensor& w_down, Runs runs, OptionalTensor index,
                          OptionalTensor residual, bool listed, int64_t block, const Tensor& out) {
  run_down(h, w_down, {runs, index, listed, block}, residual, out);
  return out;
}

// What the gathered_ffn variants share; torch hands over each argument by itself.
struct FfnTensors {
  const Tensor& x;
  const Tensor& w_gate;
  const Tensor& w_up;
  const Tensor& w_down;
  const OptionalTensor& residual;
  const OptionalTensor gate_scale{}, up_scale{}, down_scale{};  // of int8 weights
};

void run_ffn(const char* op, const FfnTensors& t, const Neurons& neurons, const OptionalTensor& norms,
             const Tensor& out) {
  const Tensor rows = foldable(t.x);
  const OptionalTensor added = foldable(t.residual);
  auto args = make_args<flashu_ffn_args>(t.x);
  args.x = view(op, "x", rows);
  args.w_gate = view(op, "w_gate", t.w_gate);
  args.w_up = view(op, "w_up", t.w_up);
  args.w_down = view(op, "w_down", t.w_down);
  args.gate_scale = view(op, "gate_scale", t.gate_scale);
  args.up_scale = view(op, "up_scale", t.up_scale);
  args.down_scale = view(op, "down_scale", t.down_scale);
  args.selection = select(op, neurons);
  args.residual = view(op, "residual", added);
  args.norms = view(op, "norms", norms);
  args.out = view(op, "out", out);
  run_planned<api::FfnPlan>(op, args, t.x);
}

Tensor gathered_ffn(const Tensor& x, const Tensor& w_gate, const Tensor& w_up, const Tensor& w_down,
                    Runs runs, OptionalTensor index, OptionalTensor residual, bool listed, int64_t block) {
  const Tensor out = new_rows(x, size_or_zero(w_down, 0));
  run_ffn("gathered_ffn", {x, w_gate, w_up, w_down, residual}, {runs, index, listed, block}, std::nullopt,
          out);
  return out;
}

Tensor gathered_ffn_into(const Tensor& x, const Tensor& w_gate, const Tensor& w_up, const Tensor& w_down,
                         Runs runs, OptionalTensor index, OptionalTensor residual, bool listed, int64_t block,
                         const Tensor& out) {
  run_ffn("gathered_ffn", {x, w_gate, w_up, w_down, residual}, {runs, index, listed, block}, std::nullopt,
          out);
  return out;
}

Tensor gathered_ffn_norms(const Tensor& x, const Tensor& w_gate, const Tensor& w_up, const Tensor& w_down,
                          const Tensor& norms, Runs runs, OptionalTensor index, OptionalTensor residual,
                          bool listed, int64_t block) {
  const Tensor out = new_rows(x, size_or_zero(w_down, 0));
  run_ffn("gathered_ffn", {x, w_gate, w_up, w_down, residual}, {runs, index, listed, block}, norms, out);
  return out;
}

Tensor int8_ffn(const Tensor& x, const Tensor& w_gate, const Tensor& gate_scale, const Tensor& w_up,
                const Tensor& up_scale, const Tensor& w_down, const Tensor& down_scale, Runs runs,
                OptionalTensor index, OptionalTensor residual, bool listed, int64_t block) {
  const Tensor out = new_rows(x, size_or_zero(w_down, 0));
  run_ffn("int8_ffn", {x, w_gate, w_up, w_down, residual, gate_scale, up_scale, down_scale},
          {runs, index, listed, block}, std::nullopt, out);
  return out;
}

Tensor int8_ffn_into(const Tensor& x, const Tensor& w_gate, const Tensor& gate_scale, const Tensor& w_up,
                     const Tensor& up_scale, const Tensor& w_down, const Tensor& down_scale, Runs runs,
                     OptionalTensor index, OptionalTensor residual, bool listed, int64_t block,
                     const Tensor& out) {
  run_ffn("int8_ffn", {x, w_gate, w_up, w_down, residual, gate_scale, up_scale, down_scale},
          {runs, index, listed, block}, std::nullopt, out);
  return out;
}

// Writes the neurons into `list`, in order; how many neighbours they are at a time.
int64_t list_neurons(const Tensor& list, int64_t limit, Runs runs, OptionalTensor index) {
  const char* op = "list_neurons";
  int32_t block = 1;
  flashu_list_args args{};
  args.struct_size = sizeof(args);
  args.intermediate = limit;
  args.selection = select(op, {runs, index, false, 1});
  args.list = view(op, "list", list);
  args.block = &block;
  check_status(flashu_list_neurons(&args));
  return block;
}

void neuron_norms_(const Tensor& acc, const Tensor& h) {
  const Tensor rows = foldable(h);
  auto args = make_args<flashu_neuron_norms_args>(acc);
  args.acc = view("neuron_norms_", "acc", acc);
  args.h = view("neuron_norms_", "h", rows);
  check_status(flashu_neuron_norms(&args));
}

}  // namespace

template <class Library>
void register_ffn(Library& m) {
  m.impl("gathered_swiglu", TORCH_BOX(&gathered_swiglu));
  m.impl("gathered_swiglu.out", TORCH_BOX(&gathered_swiglu_into));
  m.impl("gathered_down", TORCH_BOX(&gathered_down));
  m.impl("gathered_down.out", TORCH_BOX(&gathered_down_into));
  m.impl("gathered_ffn", TORCH_BOX(&gathered_ffn));
  m.impl("gathered_ffn.out", TORCH_BOX(&gathered_ffn_into));
  m.impl("gathered_ffn_norms", TORCH_BOX(&gathered_ffn_norms));
  m.impl("int8_ffn", TORCH_BOX(&int8_ffn));
  m.impl("int8_ffn.out", TORCH_BOX(&int8_ffn_into));
  m.impl("list_neurons", TORCH_BOX(&list_neurons));
  m.impl("neuron_norms_", TORCH_BOX(&neuron_norms_));
}

}  // namespace flashu::torch_ops

FLASHU_REGISTER(ffn)
