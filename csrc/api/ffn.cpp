// C API of the FFN family: every check but that of the index, then the kernels of the device.
#include "flashu/ffn.h"

#include <algorithm>
#include <limits>
#include <span>

#include "api/calls.hpp"
#include "api/dispatch.hpp"
#include "api/ffn_plan.hpp"
#include "api/operands.hpp"
#include "core/rows.hpp"

namespace flashu::api {
namespace {

using core::FfnProblem;

// x or h: the operand whose dtype and leading dimensions the others follow.
template <class Args>
FfnProblem begin(const char* name, const flashu_tensor& tensor, const Args& a) {
  core::check_floating(name, tensor);
  FfnProblem p{};
  p.type = tensor.dtype;
  p.device = tensor.device;
  p.rows = core::as_rows(name, tensor).count;
  p.status = a.status;
  p.stream = a.stream;
  if (core::present(a.status)) {
    core::check_dtype("status", a.status, {FLASHU_I32});
    FLASHU_CHECK(core::numel(a.status) == 1, FLASHU_INVALID_VALUE, "status: expected one element, got shape ",
                 core::shape_text(a.status));
  }
  return p;
}

// How many neighbours all runs consist of; see flashu_selection.block.
int32_t block_of(const core::RunList& runs) {
  const auto come_in = [&](int64_t block) {
    return std::all_of(runs.begin(), runs.end(),
                       [&](const core::Run& run) { return run.start % 8 == 0 && run.length % block == 0; });
  };
  return come_in(64) ? 64 : come_in(8) ? 8 : 1;
}

// The tensor of an index or a list; its values are left to the device.
void check_index_tensor(FfnProblem& p, const flashu_selection& selection, const char* like_name,
                        const flashu_tensor& like) {
  const flashu_tensor& index = selection.index;
  core::check_tensor("index", index);
  core::check_rank("index", index, 1);
  core::check_device({{like_name, &like}, {"index", &index}});
  FLASHU_CHECK(index.sizes[0] <= p.intermediate, FLASHU_INVALID_INDEX,
               "index: expected each value at most once in [0, ", p.intermediate, "), got ", index.sizes[0],
               " values");
  p.index = index;
  p.neurons = index.sizes[0];
}

// Which neurons; the values of an index or a list are left to the device.
void check_selection(FfnProblem& p, const flashu_selection& selection, const char* like_name,
                     const flashu_tensor& like) {
  FLASHU_CHECK(p.intermediate <= std::numeric_limits<int32_t>::max(), FLASHU_UNSUPPORTED,
               "selection: expected fewer than 2^31 neurons, got ", p.intermediate);
  p.selected_by = selection.kind;
  switch (selection.kind) {
    case FLASHU_SELECT_ALL:
      if (p.intermediate > 0) p.runs = {{0, p.intermediate}};
      break;
    case FLASHU_SELECT_RUNS:
      FLASHU_CHECK(selection.num_runs >= 0 && (selection.num_runs == 0 || selection.runs != nullptr),
                   FLASHU_INVALID_VALUE, "runs: expected a pointer to 2 * num_runs numbers, got num_runs ",
                   selection.num_runs);
      p.runs = core::runs_from_flat(
          "runs", std::span<const int64_t>(selection.runs, static_cast<size_t>(2 * selection.num_runs)),
          p.intermediate);
      break;
    case FLASHU_SELECT_INDEX:
      core::check_dtype("index", selection.index, {FLASHU_I32, FLASHU_I64});
      return check_index_tensor(p, selection, like_name, like);
    case FLASHU_SELECT_LIST:
      core::check_dtype("index", selection.index, {FLASHU_I32});
      check_index_tensor(p, selection, like_name, like);
      core::check_inner_contiguous("index", selection.index);
      FLASHU_CHECK(
          selection.block == 1 || selection.block == 8 || selection.block == 64, FLASHU_INVALID_VALUE,
          "selection.block: expected 1, 8 or 64, as flashu_list_neurons says, got ", selection.block);
      FLASHU_CHECK(p.neurons % selection.block == 0, FLASHU_INVALID_VALUE,
                   "selection.block: expected a list of whole blocks of ", selection.block, ", got ",
                   p.neurons, " neurons");
      p.block = selection.block;
      return;
    default:
      core::fail(FLASHU_INVALID_VALUE, "selection.kind: expected 0 to 3, got ", selection.kind);
  }
  p.neurons = core::total_length(p.runs);
  p.block = block_of(p.runs);
}

core::Matrix any_weight(const FfnProblem& p, const char* name, const flashu_tensor& tensor,
                        const flashu_tensor& x) {
  return p.int8 ? int8_weight(name, tensor) : weight(name, tensor, "x", x);
}

void check_up_weights(FfnProblem& p, const flashu_tensor& x, const flashu_tensor& w_gate,
                      const flashu_tensor& w_up) {
  const core::Rows rows = core::as_rows("x", x);
  p.hidden = rows.width;
  p.x = {x.data, rows.stride};
  p.w_gate = any_weight(p, "w_gate", w_gate, x);
  core::check_size("w_gate", w_gate, 1, p.hidden);
  p.w_up = any_weight(p, "w_up", w_up, x);
  core::check_same_shape("w_up", w_up, "w_gate", w_gate);
  p.intermediate = w_gate.sizes[0];
  p.has_up = true;
}

// What is added to a product of the up half.
core::Matrix addend(const FfnProblem& p, const char* name, const flashu_tensor& tensor,
                    const flashu_tensor& x) {
  if (!core::present(tensor)) return {};
  FLASHU_CHECK(p.device == FLASHU_DEVICE_CPU, FLASHU_UNSUPPORTED, name,
               ": expected none on CUDA, whose kernels add nothing, got a tensor");
  return rows_like(name, tensor, "x", x, p.neurons);
}

FfnProblem checked(const flashu_swiglu_args& a) {
  check_all({{"x", &a.x},
             {"w_gate", &a.w_gate},
             {"w_up", &a.w_up},
             {"gate_add", &a.gate_add},
             {"up_add", &a.up_add},
             {"out", &a.out},
             {"status", &a.status}});
  FfnProblem p = begin("x", a.x, a);
  check_up_weights(p, a.x, a.w_gate, a.w_up);
  check_selection(p, a.selection, "x", a.x);
  p.gate_add = addend(p, "gate_add", a.gate_add, a.x);
  p.up_add = addend(p, "up_add", a.up_add, a.x);
  p.h = output(a.out, "x", a.x, p.neurons,
               {{"x", &a.x},
                {"w_gate", &a.w_gate},
                {"w_up", &a.w_up},
                {"gate_add", &a.gate_add},
                {"up_add", &a.up_add}});
  return p;
}

FfnProblem checked(const flashu_down_args& a) {
  check_all({{"h", &a.h},
             {"w_down", &a.w_down},
             {"residual", &a.residual},
             {"out", &a.out},
             {"status", &a.status}});
  FfnProblem p = begin("h", a.h, a);
  p.h = {a.h.data, core::as_rows("h", a.h).stride};
  p.w_down = weight("w_down", a.w_down, "h", a.h);
  p.width = a.w_down.sizes[0];
  p.has_down = true;
  p.intermediate = a.w_down.sizes[1];
  check_selection(p, a.selection, "h", a.h);
  core::check_size("h", a.h, a.h.ndim - 1, p.neurons);
  if (core::present(a.residual)) p.residual = rows_like("residual", a.residual, "h", a.h, p.width);
  p.out = output(a.out, "h", a.h, p.width, {{"h", &a.h}, {"w_down", &a.w_down}, {"residual", &a.residual}});
  return p;
}

FfnProblem checked(const flashu_ffn_args& a) {
  check_all({{"x", &a.x},
             {"w_gate", &a.w_gate},
             {"w_up", &a.w_up},
             {"w_down", &a.w_down},
             {"gate_scale", &a.gate_scale},
             {"up_scale", &a.up_scale},
             {"down_scale", &a.down_scale},
             {"residual", &a.residual},
             {"norms", &a.norms},
             {"out", &a.out},
             {"status", &a.status}});
  FfnProblem p = begin("x", a.x, a);
  p.int8 = core::present(a.gate_scale) || core::present(a.up_scale) || core::present(a.down_scale);
  check_up_weights(p, a.x, a.w_gate, a.w_up);
  p.w_down = any_weight(p, "w_down", a.w_down, a.x);
  core::check_size("w_down", a.w_down, 1, p.intermediate);
  p.width = a.w_down.sizes[0];
  if (p.int8) {
    p.gate_scale = row_scales("gate_scale", a.gate_scale, p.intermediate);
    p.up_scale = row_scales("up_scale", a.up_scale, p.intermediate);
    p.down_scale = row_scales("down_scale", a.down_scale, p.width);
  }
  p.has_down = true;
  check_selection(p, a.selection, "x", a.x);
  if (core::present(a.residual)) p.residual = rows_like("residual", a.residual, "x", a.x, p.width);
  p.out = output(a.out, "x", a.x, p.width,
                 {{"x", &a.x},
                  {"w_gate", &a.w_gate},
                  {"w_up", &a.w_up},
                  {"w_down", &a.w_down},
                  {"gate_scale", &a.gate_scale},
                  {"up_scale", &a.up_scale},
                  {"down_scale", &a.down_scale},
                  {"residual", &a.residual}});
  if (core::present(a.norms)) {
    core::check_dtype("norms", a.norms, {FLASHU_F32, FLASHU_F64});
    core::check_rank("norms", a.norms, 1);
    core::check_inner_contiguous("norms", a.norms);
    core::check_size("norms", a.norms, 0, p.neurons);
    for (const auto& [name, other] : {std::pair{"x", &a.x},
                                      {"w_gate", &a.w_gate},
                                      {"w_up", &a.w_up},
                                      {"w_down", &a.w_down},
                                      {"residual", &a.residual},
                                      {"out", &a.out}}) {
      if (core::present(*other)) core::check_disjoint("norms", a.norms, name, *other);
    }
    p.norms = a.norms;
  }
  return p;
}

void list_neurons(const flashu_list_args& a) {
  FLASHU_CHECK(a.intermediate >= 0, FLASHU_INVALID_VALUE, "intermediate: expected at least 0, got ",
               a.intermediate);
  FLASHU_CHECK(a.block != nullptr, FLASHU_INVALID_VALUE, "block: expected a pointer, got NULL");
  core::check_tensor("list", a.list);
  core::check_dtype("list", a.list, {FLASHU_I32});
  core::check_rank("list", a.list, 1);
  core::check_inner_contiguous("list", a.list);
  FLASHU_CHECK(a.list.device == FLASHU_DEVICE_CPU, FLASHU_INVALID_VALUE, "list: expected a CPU tensor");
  FfnProblem p{};
  p.intermediate = a.intermediate;
  check_selection(p, a.selection, "list", a.list);
  core::check_size("list", a.list, 0, p.neurons);
  *a.block = cpu::list_neurons(p, static_cast<int32_t*>(a.list.data));
}

void neuron_norms(const flashu_neuron_norms_args& args) {
  core::check_tensor("acc", args.acc);
  core::check_tensor("h", args.h);
  core::check_device({{"acc", &args.acc}, {"h", &args.h}});
  core::check_dtype("acc", args.acc, {FLASHU_F32, FLASHU_F64});
  core::check_floating("h", args.h);
  core::check_rank("acc", args.acc, 1);
  core::check_inner_contiguous("acc", args.acc);
  core::check_size("acc", args.acc, 0, core::as_rows("h", args.h).width);
  core::check_disjoint("acc", args.acc, "h", args.h);
  if (core::numel(args.h) == 0) return;
  run_on(args.h.device, [&] { cpu::neuron_norms(args); }, [&] { cuda::neuron_norms(args); });
}

}  // namespace

template <class Args>
FfnPlan::FfnPlan(const Args& args) : problem_(checked(args)) {
  if (problem_.rows == 0) return;
  run_on(
      problem_.device, [&] { plan_ = cpu::plan_ffn(problem_); }, [&] { plan_ = cuda::plan_ffn(problem_); });
}
template FfnPlan::FfnPlan(const flashu_swiglu_args&);
template FfnPlan::FfnPlan(const flashu_down_args&);
template FfnPlan::FfnPlan(const flashu_ffn_args&);

uint64_t FfnPlan::workspace_bytes() const {
  return std::visit([](const auto& plan) { return static_cast<uint64_t>(plan.bytes()); }, plan_);
}

void FfnPlan::run(void* workspace, uint64_t bytes) const {
  if (problem_.rows == 0) return;
  core::check_workspace(workspace, bytes, workspace_bytes());
  run_on(
      problem_.device, [&] { cpu::ffn(problem_, std::get<cpu::FfnPlan>(plan_), workspace); },
      [&] { cuda::ffn(problem_, std::get<cuda::FfnPlan>(plan_), workspace); });
}

}  // namespace flashu::api

extern "C" {

int32_t flashu_gathered_swiglu(const flashu_swiglu_args* args) {
  return flashu::api::run<flashu::api::FfnPlan>("gathered_swiglu", args);
}
int32_t flashu_gathered_swiglu_workspace(const flashu_swiglu_args* args, uint64_t* bytes) {
  return flashu::api::workspace<flashu::api::FfnPlan>("gathered_swiglu", args, bytes);
}
int32_t flashu_gathered_down(const flashu_down_args* args) {
  return flashu::api::run<flashu::api::FfnPlan>("gathered_down", args);
}
int32_t flashu_gathered_down_workspace(const flashu_down_args* args, uint64_t* bytes) {
  return flashu::api::workspace<flashu::api::FfnPlan>("gathered_down", args, bytes);
}
int32_t flashu_gathered_ffn(const flashu_ffn_args* args) {
  return flashu::api::run<flashu::api::FfnPlan>("gathered_ffn", args);
}
int32_t flashu_gathered_ffn_workspace(const flashu_ffn_args* args, uint64_t* bytes) {
  return flashu::api::workspace<flashu::api::FfnPlan>("gathered_ffn", args, bytes);
}
int32_t flashu_list_neurons(const flashu_list_args* args) {
  using namespace flashu;
  return core::guarded("list_neurons", [&] { api::list_neurons(core::read_args(args)); });
}
int32_t flashu_neuron_norms(const flashu_neuron_norms_args* args) {
  using namespace flashu;
  return core::guarded("neuron_norms_", [&] { api::neuron_norms(core::read_args(args)); });
}

}  // extern "C"
