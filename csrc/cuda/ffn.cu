// The gathered FFN on CUDA devices: the selection as the kernels read it, the workspace, and which kernel
// runs. Also the neuron statistics.
#include <algorithm>
#include <cstdlib>
#include <limits>
#include <string_view>

#include "core/checks.hpp"
#include "core/ffn_choice.hpp"
#include "core/rows.hpp"
#include "core/typed.hpp"
#include "cuda/ffn.hpp"
#include "cuda/ffn_decode.hpp"
#include "cuda/projection.hpp"
#include "cuda/vector.cuh"

namespace flashu::cuda {
namespace {

using core::FfnProblem;
using core::pointer;

constexpr int kThreads = 256;

// ---- the selection

// Runs travel as kernel arguments, so that a captured graph keeps them.
constexpr int kRunsOfLaunch = 240;
struct RunTable {
  struct Entry {
    int32_t start, length, position;  // `position`: of its first neuron in the list
  };
  int32_t count;
  Entry runs[kRunsOfLaunch];
};

__global__ void __launch_bounds__(kThreads) list_runs(const __grid_constant__ RunTable table, int32_t* list) {
  for (int r = static_cast<int>(blockIdx.x); r < table.count; r += static_cast<int>(gridDim.x)) {
    const RunTable::Entry& run = table.runs[r];
    for (int i = static_cast<int>(threadIdx.x); i < run.length; i += kThreads)
      list[run.position + i] = run.start + i;
  }
}

template <class I>
__global__ void __launch_bounds__(kThreads)
    read_index(const I* index, int64_t stride, int64_t count, int64_t limit, int32_t* list, int32_t* status) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= count) return;
  int64_t value = index[i * stride];
  if (value < 0 || value >= limit) {
    // A trap would destroy the process's context: the nearest neuron serves instead, and the caller may find
    // out.
    value = value < 0 ? 0 : limit - 1;
    if (status != nullptr) atomicOr(status, 1);
  }
  list[i] = static_cast<int32_t>(value);
}

void write_list(const FfnProblem& p, int32_t* list, Stream stream) {
  if (p.selected_by == FLASHU_SELECT_INDEX) {
    const LaunchConfig config{dim3(static_cast<unsigned>(divide_up(p.neurons, kThreads))), dim3(kThreads), 0,
                              stream};
    int32_t* const status = pointer<int32_t>(p.status);
    if (p.index.dtype == FLASHU_I32) {
      launch<read_index<int32_t>>("read_index", config, pointer<const int32_t>(p.index), p.index.strides[0],
                                  p.neurons, p.intermediate, list, status);
    } else {
      launch<read_index<int64_t>>("read_index", config, pointer<const int64_t>(p.index), p.index.strides[0],
                                  p.neurons, p.intermediate, list, status);
    }
    return;
  }
  RunTable table{};
  int64_t position = 0;
  const auto send = [&] {
    if (table.count == 0) return;
    const LaunchConfig config{dim3(static_cast<unsigned>(table.count)), dim3(kThreads), 0, stream};
    launch<list_runs>("list_runs", config, table, list);
    table.count = 0;
  };
  for (const core::Run& run : p.runs) {
    table.runs[table.count++] = {static_cast<int32_t>(run.start), static_cast<int32_t>(run.length),
                                 static_cast<int32_t>(position)};
    position += run.length;
    if (table.count == kRunsOfLaunch) send();
  }
  send();
}

// ---- workspace

constexpr int64_t kAlign = static_cast<int64_t>(core::kWorkspaceAlign);
int64_t aligned(int64_t bytes) { return divide_up(bytes, kAlign) * kAlign; }

int64_t element_bytes(int32_t type) { return type == FLASHU_F32 ? 4 : 2; }

FfnDecode decode_of(const FfnProblem& p, int64_t lead) {
  FfnDecode f{};
  f.x = p.x.data;
  f.x_row_stride = p.x.stride;
  f.rows = p.rows;
  f.hidden = p.hidden;
  f.gate = p.w_gate.data;
  f.up = p.w_up.data;
  f.down = p.w_down.data;
  f.gate_stride = p.w_gate.stride;
  f.up_stride = p.w_up.stride;
  f.down_stride = p.w_down.stride;
  f.neurons = lead + p.neurons;
  f.intermediate = p.intermediate;
  f.first = p.first() - lead;
  f.lead = lead;
  f.width = p.width;
  f.residual = p.residual.data;
  f.residual_stride = p.residual.stride;
  f.out = p.out.data;
  f.out_stride = p.out.stride;
  f.neurons_of_block = decode_neurons_of_block(f.neurons);
  return f;
}

}  // namespace

FfnLimits& ffn_limits() {
  const auto wanted = [](const char* name) {
    const char* const wish = std::getenv(name);
    return wish == nullptr || std::string_view(wish) != "0";
  };
  static FfnLimits limits{std::numeric_limits<int>::max(), wanted("FLASHU_FFN_DECODE"),
                          wanted("FLASHU_FFN_PAIRS")};
  return limits;
}

FfnPlan plan_ffn(const FfnProblem& p) {
  const DeviceFacts facts = device_facts(core::cuda_ordinal(p.device));
  FfnPlan plan;
  core::FfnQuestion& q = plan.question;
  q.rows = p.rows;
  q.hidden = p.hidden;
  q.width = p.width;
  q.neurons = p.neurons;
  q.has_up = p.has_up;
  q.has_down = p.has_down;
  q.type = p.type;
  q.listed = !p.one_run();
  q.block = q.listed ? p.block : 1;
  q.aligned = p.type != FLASHU_F32;
  for (const core::Matrix& matrix : {p.x, p.w_gate, p.w_up}) q.aligned &= takes_tma(matrix, p.hidden);
  q.aligned &= takes_tma(p.w_down, p.intermediate) && takes_tma(p.h, p.neurons) && takes_tma(p.out, p.width);
  q.needs_h = core::present(p.norms);
  q.capability = std::min(facts.capability, ffn_limits().capability.load());
  q.has_sm90 = FLASHU_HAS_SM90 != 0;
  q.multiprocessors = facts.multiprocessors;
  q.pairs = ffn_limits().pairs;
  if (p.neurons == 0 || p.rows == 0) return plan;
  if (p.has_down && q.aligned && !q.listed) plan.lead = p.first() % 8;
  const FfnDecode decode = decode_of(p, plan.lead);
  plan.decodes =
      ffn_limits().decodes && p.width > 0 && ffn_decodes(q) && decode_fits(decode, facts.shared_bytes);
  if (q.listed && p.selected_by != FLASHU_SELECT_LIST) plan.list_bytes = aligned(p.neurons * 4);
  if (plan.decodes) {
    plan.partials.bytes = aligned(decode_blocks(decode) * p.rows * p.width * 4);
    return plan;
  }
  if (p.has_up) plan.up = core::ffn_candidates(q, true).front();
  if (!p.has_down) return plan;
  plan.down = core::ffn_candidates(q, false).front();
  if (p.has_up || plan.lead > 0) {
    plan.h_stride = divide_up(plan.lead + p.neurons, 8) * 8;
    plan.h_bytes = aligned(p.rows * plan.h_stride * element_bytes(p.type));
  }
  plan.partials = core::ffn_partials(plan.down, p.rows, p.width);
  return plan;
}

namespace {

// ---- running

// to[r] = `lead` zeros and then from[r]; all zeros where `from` is null. width: of `to`.
template <class T>
__global__ void __launch_bounds__(kThreads)
    copy_rows(T* to, int64_t to_stride, const T* from, int64_t from_stride, int64_t rows, int64_t width,
              int64_t lead) {
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (column >= width) return;
  for (int64_t row = blockIdx.y; row < rows; row += gridDim.y) {
    const bool copied = from != nullptr && column >= lead;
    to[row * to_stride + column] = copied ? from[row * from_stride + column - lead] : T{};
  }
}

constexpr int64_t kMostBlocksY = 65535;

void copy_matrix(const FfnProblem& p, const core::Matrix& to, const core::Matrix& from, int64_t width,
                 int64_t lead, Stream stream) {
  core::with_type(p.type, [&](auto tag) {
    using T = decltype(tag);
    const LaunchConfig config{dim3(static_cast<unsigned>(divide_up(width, kThreads)),
                                   static_cast<unsigned>(std::min(p.rows, kMostBlocksY))),
                              dim3(kThreads), 0, stream};
    launch<copy_rows<T>>("copy_rows", config, static_cast<T*>(to.data), to.stride,
                         static_cast<const T*>(from.data), from.stride, p.rows, width, lead);
  });
}

// What is left of a down half without neurons.
void write_residual_only(const FfnProblem& p, Stream stream) {
  if (p.has_down && p.width > 0) copy_matrix(p, p.out, p.residual, p.width, 0, stream);
}

// ---- statistics

template <class T, class A>
struct NormsArguments {
  const T* h;
  int64_t rows, stride, width;
  A* acc;
};

constexpr int kNormColumns = 32;  // of a block: a warp's width, so that rows are read in whole sectors
constexpr int kNormShares = kThreads / kNormColumns;

// A block to 32 columns; eight shares of the rows are added in order, in double.
template <class T, class A>
__global__ void __launch_bounds__(kThreads) add_squares(const NormsArguments<T, A> a) {
  FLASHU_SHARED(double, shares, kNormShares* kNormColumns);
  const int column = static_cast<int>(threadIdx.x) % kNormColumns;
  const int share = static_cast<int>(threadIdx.x) / kNormColumns;
  const int64_t c = static_cast<int64_t>(blockIdx.x) * kNormColumns + column;
  const int64_t begin = a.rows * share / kNormShares;
  const int64_t end = a.rows * (share + 1) / kNormShares;
  double sum = 0;
  if (c < a.width) {
    // Sixteen squares in float, then on in double: few enough that float loses nothing that matters.
    for (int64_t r = begin; r < end; r += 16) {
      float part = 0;
#pragma unroll 4
      for (int64_t i = r; i < min(r + 16, end); ++i) {
        const float value = to_float(a.h[i * a.stride + c]);
        part += value * value;
      }
      sum += static_cast<double>(part);
    }
  }
  shares[share * kNormColumns + column] = sum;
  __syncthreads();
  if (share != 0 || c >= a.width) return;
  double total = 0;
  for (int s = 0; s < kNormShares; ++s) total += shares[s * kNormColumns + column];
  a.acc[c] = static_cast<A>(static_cast<double>(a.acc[c]) + total);
}

void add_norms(const flashu_tensor& acc, int32_t type, const void* h, int64_t rows, int64_t stride,
               int64_t width, Stream stream) {
  core::with_type(type, [&](auto tag) {
    using T = decltype(tag);
    const LaunchConfig config{dim3(static_cast<unsigned>(divide_up(width, kNormColumns))), dim3(kThreads), 0,
                              stream};
    const auto* const values = static_cast<const T*>(h);
    if (acc.dtype == FLASHU_F64) {
      launch<add_squares<T, double>>(
          "add_squares", config,
          NormsArguments<T, double>{values, rows, stride, width, pointer<double>(acc)});
    } else {
      launch<add_squares<T, float>>(
          "add_squares", config, NormsArguments<T, float>{values, rows, stride, width, pointer<float>(acc)});
    }
  });
}

}  // namespace

void ffn(const FfnProblem& p, const FfnPlan& plan, void* workspace) {
  const DeviceGuard guard(p.device);
  const auto stream = static_cast<Stream>(p.stream);
  if (p.neurons == 0) return write_residual_only(p, stream);
  auto* const memory = static_cast<char*>(workspace);
  const int32_t* list = nullptr;
  if (p.selected_by == FLASHU_SELECT_LIST) {
    list = pointer<const int32_t>(p.index);
  } else if (plan.question.listed) {
    list = reinterpret_cast<int32_t*>(memory);
    write_list(p, reinterpret_cast<int32_t*>(memory), stream);
  }
  if (plan.decodes) {
    FfnDecode f = decode_of(p, plan.lead);
    f.list = list;
    f.block = plan.question.block;
    f.partial = reinterpret_cast<float*>(memory + plan.list_bytes);
    return ffn_decode(f, p.type, stream);
  }
  core::Matrix h = p.h;
  if (plan.h_bytes > 0) h = {memory + plan.list_bytes, plan.h_stride};
  FfnGemm g{};
  g.m = p.rows;
  g.intermediate = p.intermediate;
  g.list = list;
  g.first = p.first() - plan.lead;
  g.lead = plan.lead;
  g.block = plan.question.block;
  if (p.has_up) {
    FfnGemm up = g;
    up.a = p.x.data;
    up.a_stride = p.x.stride;
    up.b = p.w_gate.data;
    up.b2 = p.w_up.data;
    up.gated = true;
    up.b_stride = p.w_gate.stride;
    up.b2_stride = p.w_up.stride;
    up.n = plan.lead + p.neurons;
    up.k = p.hidden;
    up.out = h.data;
    up.out_stride = h.stride;
    run_gemm(up, plan.up.tile, p.type, stream, plan.question.multiprocessors);
    if (core::present(p.norms)) {
      const auto* const values = static_cast<const char*>(h.data) + plan.lead * element_bytes(p.type);
      add_norms(p.norms, p.type, values, p.rows, h.stride, p.neurons, stream);
    }
  } else if (plan.lead > 0 && p.width > 0) {
    copy_matrix(p, h, p.h, plan.lead + p.neurons, plan.lead, stream);
  }
  if (p.has_down && p.width > 0) {
    FfnGemm down = g;
    down.a = h.data;
    down.a_stride = h.stride;
    down.b = p.w_down.data;
    down.b_stride = p.w_down.stride;
    down.n = p.width;
    down.k = plan.lead + p.neurons;
    down.residual = p.residual.data;
    down.residual_stride = p.residual.stride;
    down.out = p.out.data;
    down.out_stride = p.out.stride;
    project(down, plan.down.tile, plan.partials, memory + plan.list_bytes + plan.h_bytes, p.type, stream,
            plan.question.multiprocessors);
  }
}

void neuron_norms(const flashu_neuron_norms_args& args) {
  const DeviceGuard guard(args.h.device);
  const core::Rows h = core::as_rows("h", args.h);
  add_norms(args.acc, args.h.dtype, args.h.data, h.count, h.stride, h.width,
            static_cast<Stream>(args.stream));
}

}  // namespace flashu::cuda
